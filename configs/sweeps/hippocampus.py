"""Every method on hippocampus, 64 x 64, 1 labelled volume: a sweep for lclseg.sweep.

python -m lclseg.sweep --sweep=configs/sweeps/hippocampus.py --manual_dir=Task04_Hippocampus
"""

import runpy
from pathlib import Path

rows = runpy.run_path(str(Path(__file__).parents[1] / "parts" / "methods.py"))

CONFIG = "../hippocampus.py"
ALL_LABELS = rows["ROWS"]["all labels"] | {"rounds.baseline_steps": 2000}
# Gains differ much between labelled volumes: five pairs did not tell them from 0. Ten are
# all that was planned before the others ran.
PAIRS = (*rows["PAIRS"], ("c6", 5), ("c7", 6), ("c8", 7), ("c9", 8), ("c10", 9))
ROWS = rows["ROWS"] | {"all labels": ALL_LABELS}
BASE = {"data.num_labeled": "1"}
