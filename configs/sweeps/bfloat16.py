"""float32 against bfloat16 on the phantom, 64 x 64, 1 labelled volume: a sweep for lclseg.sweep.

python -m lclseg.sweep --sweep=configs/sweeps/bfloat16.py
"""

CONFIG = "../phantom.py"
PAIRS = (("c1", 0), ("c2", 1), ("c3", 2))
BASE = {"rounds.baseline_steps": 200, "rounds.steps_per_round": 200}
ROWS = {"float32": {}, "bfloat16": {"model.dtype": "bfloat16"}}
