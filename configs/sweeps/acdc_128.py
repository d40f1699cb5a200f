"""As acdc.py, with 128 x 128 px: what finer pixels are worth.

python -m lclseg.sweep --sweep=configs/sweeps/acdc_128.py --manual_dir=ACDC/training
"""

import runpy
from pathlib import Path

acdc = runpy.run_path(str(Path(__file__).parent / "acdc.py"))

CONFIG, PAIRS = acdc["CONFIG"], acdc["PAIRS"]
# The same field of view as 96 px of 2.73438 mm.
BASE = acdc["BASE"] | {"data.image_size": 128, "data.target_spacing_mm": 2.05078}
ROWS = {
    name: acdc["ROWS"][name] for name in ("supervised", "self-training, copy-paste", "all labels")
}
