"""As acdc.py, with twice the steps: 400 + 1600.

python -m lclseg.sweep --sweep=configs/sweeps/acdc_long.py --manual_dir=ACDC/training
"""

import runpy
from pathlib import Path

acdc = runpy.run_path(str(Path(__file__).parent / "acdc.py"))

CONFIG, PAIRS = acdc["CONFIG"], acdc["PAIRS"]
BASE = acdc["BASE"] | {"rounds.steps_per_round": 1600}
COMPARED = (
    "supervised",
    "self-training, copy-paste",
    "recipe, without copies and CRF",
    "recipe, without CRF",
    "recipe",
    "supervised, by the recipe's rules",
    "local contrastive, by the recipe's rules",
)
ROWS = {name: acdc["ROWS"][name] for name in COMPARED}
ROWS["all labels"] = acdc["ROWS"]["all labels"] | {"rounds.baseline_steps": 2000}
