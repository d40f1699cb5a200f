"""Bidirectional copy-paste, arXiv:2305.00673; see lclseg/methods/bcp.py."""

OPTIONS = {
    "unlabeled_weight": 0.5,  # of the pixels of unlabelled slices; alpha
    "box_share": 2 / 3,  # of each side; beta
    "largest_component": True,  # of each class of a pseudo-label, in 2-D
    "pretraining": True,  # first stage on labelled slices pasted into each other; False: supervised
}
