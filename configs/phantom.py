"""SYNTHETIC cardiac volumes, generated on the spot: the demonstration that needs no download.

  ./run.sh        or        python -m lclseg.main --config=configs/phantom.py

Expected: test Dice 0.77 for the baseline and 0.80 after round 3 (means of three seeds), in 5 to 10
minutes on two CPU cores.

One labelled volume, short schedule. Volumes 000-043 are the pool, 044-063 the test set.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

HERE = Path(__file__).parent
get_default = runpy.run_path(str(HERE / "default.py"))["get_config"]
lists = runpy.run_path(str(HERE / "parts" / "splits.py"))
short = runpy.run_path(str(HERE / "parts" / "short.py"))
patients, table, all_but = lists["patients"], lists["table"], lists["all_but"]

IDS = "phantom_{:03d}"

POOL = patients(IDS, "0-43")
# num_labeled: split: (labelled, validation)
SPLITS = {
    "1": {"c1": ("0", "40 41"), "c2": ("1", "42 43"), "c3": ("2", "38 39")},
    "2": {"c1": ("0 3", "40 41"), "c2": ("1 4", "42 43"), "c3": ("2 5", "38 39")},
}


def get_config(method: str = "self_training") -> ConfigDict:
    config = get_default(method)
    data = config.data
    data.name = "phantom"
    data.image_size = 64
    data.target_spacing_mm = 2.0
    data.num_labeled = "1"
    data.pool = POOL
    data.test_patients = patients(IDS, "44-63")
    pairs = {c: pair for c, (_, pair) in SPLITS["1"].items()}
    data.splits = table(IDS, SPLITS) | {"all": all_but(IDS, POOL, pairs)}
    # Smaller batches than the paper's: the run has ten minutes on two cores.
    short["shorten"](config, 8)
    return config
