"""ACDC (RV, myocardium, LV) with the paper's patients: 1, 2 or 8 labelled volumes, 192 x 192.

  python -m lclseg.main --config=configs/acdc.py --config.data.manual_dir=ACDC/training

Expected: no run of this schedule has been made yet. Made for a GPU: 20 000 steps.

arXiv:2112.09645, experiments on ACDC. Another split: --config.data.num_labeled=8
--config.data.split=c3; "all" is the upper bound, for which --config.rounds.num_rounds=0 leaves the
supervised run. The schedule is the paper's, 5000 + 3 x 5000 steps.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

HERE = Path(__file__).parent
get_default = runpy.run_path(str(HERE / "default.py"))["get_config"]
lists = runpy.run_path(str(HERE / "parts" / "splits.py"))
patients, table, all_but = lists["patients"], lists["table"], lists["all_but"]

IDS = "patient{:03d}"

TEST = patients(IDS, "007-010 027-030 047-050 067-070 087-090")
POOL = patients(IDS, "001-006 017-020 012 021-026 037-046 057-066 077-080 072 081-086 097-100")
EVERYONE = patients(IDS, "001-100")
# num_labeled: split: (labelled, validation)
SPLITS = {
    "1": {
        "c1": ("002", "011 071"),
        "c2": ("042", "031 072"),
        "c3": ("095", "011 071"),
        "c4": ("022", "011 071"),
        "c5": ("062", "011 071"),
    },
    "2": {
        "c1": ("042 062", "031 072"),
        "c2": ("002 042", "011 071"),
        "c3": ("042 095", "031 072"),
        "c4": ("002 022", "011 071"),
        "c5": ("002 095", "011 071"),
    },
    "8": {
        "c1": ("002 022 042 062 095 003 023 043", "011 071"),
        "c2": ("002 022 042 062 095 063 094 043", "031 072"),
        "c3": ("002 022 042 062 095 003 094 023", "011 071"),
    },
}


def get_config(method: str = "local_contrastive") -> ConfigDict:
    config = get_default(method)
    data = config.data
    data.name = "acdc"
    # end_diastolic; both; both_in_pool: the end-systolic ones of unlabelled patients alone.
    data.frames = "end_diastolic"
    data.image_size = 192
    data.target_spacing_mm = 1.36719
    data.n4_shrink_factor = 4
    data.num_labeled = "1"
    data.min_classes = 3
    data.test_patients = TEST
    data.pool = POOL
    # Upper bound: everyone else, with the validation pair of the split with one labelled volume.
    others = tuple(p for p in EVERYONE if p not in TEST)
    pairs = {c: pair for c, (_, pair) in SPLITS["1"].items()}
    data.splits = table(IDS, SPLITS) | {"all": all_but(IDS, others, pairs)}
    return config
