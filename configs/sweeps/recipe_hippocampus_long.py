"""As recipe_hippocampus.py, with twice the steps: 600 + 1400, as hippocampus.py has them.

  python -m lclseg.sweep --sweep=configs/sweeps/recipe_hippocampus_long.py \\
    --manual_dir=Task04_Hippocampus
"""

import runpy
from pathlib import Path

short = runpy.run_path(str(Path(__file__).parent / "recipe_hippocampus.py"))

CONFIG, PAIRS = short["CONFIG"], short["PAIRS"]
BASE = short["BASE"] | {"rounds.baseline_steps": 600, "rounds.steps_per_round": 1400}
ROWS = {name: short["ROWS"][name] for name in ("supervised", "self-training, weight 0.25")}
# A model is less certain than this of many of its faults, and of few pixels that it gets right.
CONFIDENT = {"pseudo_labels.min_confidence": 0.9}
ROWS |= {
    "self-training, weight 0.25, confidence 0.9": short["self_training"](0.25) | CONFIDENT,
    "self-training, weight 0.5, confidence 0.9": short["self_training"](0.5) | CONFIDENT,
    "self-training, weight 1, confidence 0.9": short["self_training"](1.0) | CONFIDENT,
}
# Slices lie 1 mm apart there, and next ones show nearly the same.
THROUGH_PLANE = {"pseudo_labels.through_plane_sigma": 1.0, "predictions.through_plane_sigma": 1.0}
ROWS |= {
    "self-training, weight 0.5, confidence 0.9, through-plane": short["self_training"](0.5)
    | CONFIDENT
    | THROUGH_PLANE,
}
