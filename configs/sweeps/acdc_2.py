"""As acdc.py, with 2 labelled volumes.

python -m lclseg.sweep --sweep=configs/sweeps/acdc_2.py --manual_dir=ACDC/training
"""

import runpy
from pathlib import Path

acdc = runpy.run_path(str(Path(__file__).parent / "acdc.py"))

CONFIG, PAIRS = acdc["CONFIG"], acdc["PAIRS"]
BASE = acdc["BASE"] | {"data.num_labeled": "2"}
# These rows of acdc.py learn from all labels, whatever the others have: they hold here, too.
ROWS = {name: row for name, row in acdc["ROWS"].items() if not name.startswith("all labels")}
