"""Segmentation loss on pseudo-labels; see lclseg/methods/self_training.py."""

OPTIONS = {
    "weight": 1.0,  # of the loss on pseudo-labelled pixels
    "copy_paste": False,  # mix each labelled slice with a pseudo-labelled one, both ways
}
