"""As acdc.py, with 2 labelled volumes.

python -m lclseg.sweep --sweep=configs/sweeps/acdc_2.py --manual_dir=ACDC/training
"""

import runpy
from pathlib import Path

acdc = runpy.run_path(str(Path(__file__).parent / "acdc.py"))

CONFIG, PAIRS = acdc["CONFIG"], acdc["PAIRS"]
BASE = acdc["BASE"] | {"data.num_labeled": "2"}
# That row of acdc.py learns from all labels, whatever the others have: it holds here, too.
ROWS = {name: row for name, row in acdc["ROWS"].items() if name != "all labels"}
