"""As hippocampus.py, with 2 labelled volumes.

python -m lclseg.sweep --sweep=configs/sweeps/hippocampus_2.py --manual_dir=Task04_Hippocampus
"""

import runpy
from pathlib import Path

hippocampus = runpy.run_path(str(Path(__file__).parent / "hippocampus.py"))

CONFIG = hippocampus["CONFIG"]
# Ten are drawn for one labelled volume alone.
PAIRS = hippocampus["PAIRS"][:5]
BASE = hippocampus["BASE"] | {"data.num_labeled": "2"}
# That row of hippocampus.py learns from all labels, whatever the others have.
ROWS = {name: row for name, row in hippocampus["ROWS"].items() if name != "all labels"}
