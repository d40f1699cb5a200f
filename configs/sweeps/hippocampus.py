"""What each part is worth on hippocampus, 64 x 64, 2 labelled volumes: a sweep for lclseg.sweep.

  python -m lclseg.sweep --sweep=configs/sweeps/hippocampus.py --manual_dir=Task04_Hippocampus

The same number of optimiser steps in every row; each joint row shares the baseline of its pair.
"""

CONFIG = "../hippocampus.py"
PAIRS = (("c1", 0), ("c2", 1), ("c3", 2))
BASE = {
    "method.pixels_per_class": 3,  # the paper's
}
SELF_TRAINING = {"method.pseudo_label_weight": 1.0, "method.view_geometry": True}
SUPERVISED = {"rounds.num_rounds": 0, "rounds.baseline_steps": 700}
EVERY_PIXEL = {"method.pixels_per_class": 0}
ROWS = {
    "a supervised": SUPERVISED,
    # Unlabelled slices go through the network, and so through BatchNorm, but no loss reads them.
    "joint pass only": {"method.contrastive_weight": 0.0},
    "b self-training": SELF_TRAINING | {"method.contrastive_weight": 0.0},
    "b without CRF": SELF_TRAINING | {"method.contrastive_weight": 0.0, "crf.num_steps": 0},
    "c inter, 3 anchors": {},
    "d inter, every pixel": EVERY_PIXEL,
    "e batch, every pixel": EVERY_PIXEL | {"method.matching": "batch"},
    "f d without CRF": EVERY_PIXEL | {"crf.num_steps": 0},
    "g d, weight 0.01": EVERY_PIXEL | {"method.contrastive_weight": 0.01},
    "g d, weight 1": EVERY_PIXEL | {"method.contrastive_weight": 1.0},
    "b + d": SELF_TRAINING | EVERY_PIXEL,
    "h all labels": SUPERVISED | {"data.num_labeled": "all"},
}
