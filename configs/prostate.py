"""MSD Task05 prostate (peripheral, transition zone) with the paper's patients, 192 x 192.

  python -m lclseg.main --config=configs/prostate.py

Expected: no run of this schedule has been made yet. Made for a GPU: 20 000 steps.

arXiv:2112.09645, experiments on the prostate: 1, 2 or 8 labelled volumes. Another split:
--config.data.num_labeled=8 --config.data.split=c3; num_labeled "all" is the upper bound, for which
--config.rounds.num_rounds=0 leaves the supervised run. The first run downloads the public archive,
unless --config.data.manual_dir=Task05_Prostate names a copy of it. The schedule is the paper's,
5000 + 3 x 5000 steps.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

HERE = Path(__file__).parent
get_default = runpy.run_path(str(HERE / "default.py"))["get_config"]
lists = runpy.run_path(str(HERE / "parts" / "splits.py"))
patients, table, all_but = lists["patients"], lists["table"], lists["all_but"]

IDS = "prostate_{:02d}"

TEST = patients(IDS, "29 31 32 34 35 37-44 46 47")
POOL = patients(IDS, "00 01 02 04 06 07 10 13 14 16 17 18 20 21 24 25 28")
# The pair depends on the split alone.
VALIDATION = {"c1": "13 14", "c2": "17 20", "c3": "25 28", "c4": "13 14", "c5": "25 28"}
# num_labeled: split: labelled
SPLITS = {
    "1": {"c1": "01", "c2": "02", "c3": "06", "c4": "00", "c5": "04"},
    "2": {"c1": "00 01", "c2": "21 24", "c3": "01 02", "c4": "04 10", "c5": "00 07"},
    "8": {
        "c1": "00 01 02 04 06 07 10 16",
        "c2": "02 04 06 07 10 16 21 18",
        "c3": "00 01 06 07 10 17 18 24",
    },
}


def get_config(method: str = "local_contrastive") -> ConfigDict:
    config = get_default(method)
    data = config.data
    data.name = "prostate"
    data.image_size = 192
    data.target_spacing_mm = 0.625
    data.n4_shrink_factor = 4
    data.num_labeled = "1"
    data.min_classes = 2  # of three: METHOD asks for 2 where there are two foreground classes
    data.test_patients = TEST
    data.pool = POOL
    by_pair = {
        n: {c: (own, VALIDATION[c]) for c, own in splits.items()} for n, splits in SPLITS.items()
    }
    # Upper bound: the whole pool but the validation pair.
    data.splits = table(IDS, by_pair) | {"all": all_but(IDS, POOL, VALIDATION)}
    config.crf.spatial_sigma = 5.0
    return config
