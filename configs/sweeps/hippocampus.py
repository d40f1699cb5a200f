"""Every method on hippocampus, 64 x 64, 1 labelled volume: a sweep for lclseg.sweep.

python -m lclseg.sweep --sweep=configs/sweeps/hippocampus.py --manual_dir=Task04_Hippocampus
"""

import runpy
from pathlib import Path

rows = runpy.run_path(str(Path(__file__).parents[1] / "parts" / "methods.py"))

default = runpy.run_path(str(Path(__file__).parents[1] / "default.py"))["get_config"]("supervised")

CONFIG = "../hippocampus.py"
# Most rows were measured when the config had none of these.
OLDER = {f"crf.{key}": value for key, value in default.crf.items()} | {
    "crf.num_steps": 0,
    "pseudo_labels.crf": True,
    "pseudo_labels.min_confidence": 0.0,
    "pseudo_labels.through_plane_sigma": 0.0,
    "predictions.crf": False,
    "predictions.through_plane_sigma": 0.0,
}
# As hippocampus.py predicts.
RULES = {
    "predictions.through_plane_sigma": 1.0,
    "pseudo_labels.crf": False,
    "predictions.crf": True,
    "crf.num_steps": 3,
    "crf.spatial_weight": 0.0,
    "crf.bilateral_sigma": 1.5,
    "crf.intensity_sigma": 0.1,
    "crf.bilateral_weight": 3.0,
}
# As hippocampus.py is.
RECIPE = rows["self_training"](0.5) | {"pseudo_labels.min_confidence": 0.9} | RULES
ALL_LABELS = rows["ROWS"]["all labels"] | {"rounds.baseline_steps": 2000}
# Gains differ much between labelled volumes: five pairs did not tell them from 0. Ten are
# all that was planned before the others ran.
PAIRS = (*rows["PAIRS"], ("c6", 5), ("c7", 6), ("c8", 7), ("c9", 8), ("c10", 9))
ROWS = rows["ROWS"] | {
    "self-training": rows["self_training"](0.25),
    "self-training, copy-paste": rows["self_training"](0.25, copy_paste=True),
    "all labels": ALL_LABELS,
    "recipe": RECIPE,
    # Predicted by the same rules: what is left between them is training.
    "supervised, by the recipe's rules": rows["ROWS"]["supervised"] | RULES,
}
BASE = {"data.num_labeled": "1"} | OLDER
