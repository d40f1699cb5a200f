"""What each part is worth on ACDC, 96 x 96, 1 labelled volume: a sweep for lclseg.ablation.

  python -m lclseg.ablation --sweep=configs/ablations/acdc.py --manual_dir=ACDC/training

A short schedule that two CPU cores can afford; the same number of optimiser steps in every row.
The test patients are in none of the paper's lists, so that the paper's own test patients stay
unseen.
"""

CONFIG = "../acdc.py"
PAIRS = (("c1", 0), ("c2", 1), ("c3", 2))
BASE = {
    "data.image_size": 96,
    "data.target_spacing_mm": 2.73438,
    "data.test": tuple(
        f"patient{n:03d}"
        for first, last in ((13, 16), (32, 36), (51, 56), (73, 76), (91, 93), (96, 96))
        for n in range(first, last + 1)
    ),
    "data.labeled_batch_size": 8,
    "data.min_classes": 1,
    "data.view_min_classes": 1,
    "data.pairs.labeled_self": 0,
    "data.pairs.pseudo_self": 0,
    "data.pairs.labeled_pseudo": 2,
    "data.pairs.pseudo_pseudo": 2,
    "loss.segmentation": "batch_dice_and_cross_entropy",
    # Three times the paper's: a short schedule has to level off, or the row that trains longest
    # without a stop wins.
    "optimizer.learning_rate": 3e-3,
    "optimizer.ema_decay": 0.98,
    "crf.num_steps": 0,
    "rounds.baseline_steps": 400,
    "rounds.steps_per_round": 100,
    "rounds.eval_every": 50,
    # Running statistics lag: c1's baseline validates at 0.2 for 200 steps with them.
    "rounds.calibration_batches": 10,
    "rounds.fresh_heads": False,
}
SELF_TRAINING = {"loss.pseudo_label_weight": 1.0, "augment.view_geometry": True}
EVERY_PIXEL = {"loss.pixels_per_class": 0}
ROWS = {
    "a supervised": {"rounds.num_rounds": 0, "rounds.baseline_steps": 700},
    # Unlabelled slices go through the network, and so through BatchNorm, but no loss reads them.
    "joint pass only": {"loss.contrastive_weight": 0.0},
    "b self-training": SELF_TRAINING | {"loss.contrastive_weight": 0.0},
    "d inter, every pixel": EVERY_PIXEL,
    "b + d": SELF_TRAINING | EVERY_PIXEL,
}
