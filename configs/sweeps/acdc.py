"""What each part is worth on ACDC, 96 x 96, 1 labelled volume: a sweep for lclseg.sweep.

  python -m lclseg.sweep --sweep=configs/sweeps/acdc.py --manual_dir=ACDC/training

The same number of optimiser steps in every row. The test patients are in none of the paper's lists,
so that the paper's own test patients stay unseen.
"""

CONFIG = "../acdc_short.py"
PAIRS = (("c1", 0), ("c2", 1), ("c3", 2))
BASE = {
    "data.test": tuple(
        f"patient{n:03d}"
        for first, last in ((13, 16), (32, 36), (51, 56), (73, 76), (91, 93), (96, 96))
        for n in range(first, last + 1)
    ),
    # The paper's.
    "method.pixels_per_class": 3,
    "method.pseudo_label_weight": 0.0,
    "method.view_geometry": False,
}
SELF_TRAINING = {"method.pseudo_label_weight": 1.0, "method.view_geometry": True}
EVERY_PIXEL = {"method.pixels_per_class": 0}
ROWS = {
    "a supervised": {"rounds.num_rounds": 0, "rounds.baseline_steps": 700},
    # Unlabelled slices go through the network, and so through BatchNorm, but no loss reads them.
    "joint pass only": {"method.contrastive_weight": 0.0},
    "b self-training": SELF_TRAINING | {"method.contrastive_weight": 0.0},
    "d inter, every pixel": EVERY_PIXEL,
    "b + d": SELF_TRAINING | EVERY_PIXEL,
}
