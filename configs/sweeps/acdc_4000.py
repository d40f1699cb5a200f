"""As acdc_long.py, with twice its steps: 400 + 3600.

python -m lclseg.sweep --sweep=configs/sweeps/acdc_4000.py --manual_dir=ACDC/training
"""

import runpy
from pathlib import Path

long = runpy.run_path(str(Path(__file__).parent / "acdc_long.py"))

CONFIG, PAIRS = long["CONFIG"], long["PAIRS"]
BASE = long["BASE"] | {"rounds.steps_per_round": 3600}
ROWS = {n: row for n, row in long["ROWS"].items() if n != "self-training, copy-paste"}
ROWS["all labels"] |= {"rounds.baseline_steps": 4000}
