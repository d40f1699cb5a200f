"""The paper's method, arXiv:2112.09645; see lclseg/methods/local_contrastive.py."""

OPTIONS = {
    "contrastive_weight": 0.02,  # lambda; the authors' 0.1 in their normalisation
    "temperature": 0.1,  # tau
    "pixels_per_class": 3,  # K anchors per class and image; 0: every pixel
    "matching": "inter",  # or intra, batch
    "include_background": False,
    "pseudo_label_weight": 0.0,  # > 0: segmentation loss on pseudo-labels too (self-training)
    # Pairs of a global batch, by kind.
    "pairs": {"labeled_self": 2, "pseudo_self": 2, "labeled_pseudo": 3, "pseudo_pseudo": 3},
    "view_min_classes": 0,  # classes that a slice of a pair must show; 0: all
    "view_contrast_range": (0.7, 1.3),  # views: intensity only
    "view_max_brightness": 0.3,
    "view_clip": (0.0, 1.5),
    "view_geometry": False,  # True: views are moved like labelled slices, masks with them
}
