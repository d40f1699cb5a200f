"""Rectified contrastive pseudo supervision, arXiv:2301.05500; see lclseg/methods/rcps.py."""

OPTIONS = {
    "consistency_weight": 0.1,  # c, of the rectified and the agreement term; published: 0.1 to 0.2
    "contrastive_weight": 0.1,
    "temperature": 0.1,  # of the contrast
    "num_negatives": 100,  # K for each anchor; published: 100 to 400
    "sharpening": 0.5,  # temperature of the pseudo-label
    "embedding_dim": 64,
    # Views a I + b mean(I); half of them with Gaussian noise.
    "contrast_range": (0.5, 1.5),  # a
    "max_brightness": 0.5,  # of b, either way
    "max_noise": 0.1,  # highest standard deviation
}
