"""MM-WHS MR (seven structures of the heart) with the paper's patients, 160 x 160.

  python -m lclseg.main --config=configs/mmwhs.py --config.data.manual_dir=mr_train

Expected: no run of this schedule has been made yet. Made for a GPU: 20 000 steps.

arXiv:2112.09645, experiments on MM-WHS: 1, 2 or 8 labelled volumes. Another split:
--config.data.num_labeled=2 --config.data.split=c3. Eight labelled volumes and a validation pair are
the whole pool: that leaves nothing unlabelled, so "8" runs with --config.rounds.num_rounds=0 only
and is the upper bound "all" as well. The schedule is the paper's, 5000 + 3 x 5000 steps.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

HERE = Path(__file__).parent
get_default = runpy.run_path(str(HERE / "default.py"))["get_config"]
lists = runpy.run_path(str(HERE / "parts" / "splits.py"))
patients, table, all_but = lists["patients"], lists["table"], lists["all_but"]

IDS = "{}"

TEST = patients(IDS, "1011-1020")
POOL = patients(IDS, "1001-1010")
# num_labeled: split: (labelled, validation)
SPLITS = {
    "1": {
        "c1": ("1003", "1002 1005"),
        "c2": ("1006", "1001 1008"),
        "c3": ("1008", "1007 1002"),
        "c4": ("1001", "1002 1005"),
        "c5": ("1009", "1007 1002"),
    },
    "2": {
        "c1": ("1001 1003", "1002 1005"),
        "c2": ("1009 1008", "1007 1002"),
        "c3": ("1006 1002", "1001 1008"),
        "c4": ("1010 1007", "1004 1008"),
    },
}
# The pool without it is labelled.
VALIDATION_OF_8 = {"c1": "1002 1005", "c2": "1001 1008", "c3": "1007 1002"}


def get_config(method: str = "local_contrastive") -> ConfigDict:
    config = get_default(method)
    data = config.data
    data.name = "mmwhs"
    data.image_size = 160
    data.target_spacing_mm = 1.5
    data.n4_shrink_factor = 4
    data.num_labeled = "1"
    data.min_classes = 3
    data.test_patients = TEST
    data.pool = POOL
    rest = all_but(IDS, POOL, VALIDATION_OF_8)
    data.splits = table(IDS, SPLITS) | {"8": rest, "all": rest}
    return config
