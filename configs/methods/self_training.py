"""Segmentation loss on pseudo-labels; see lclseg/methods/self_training.py."""

OPTIONS = {
    "weight": 1.0,  # of the loss on pseudo-labelled slices
}
