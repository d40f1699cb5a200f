"""Confident labels of the weak view for the strong one; see lclseg/methods/fixmatch.py."""

OPTIONS = {
    "weight": 1.0,  # of the loss on strong views
    "threshold": 0.95,  # pixels less certain than this are not learnt from
}
