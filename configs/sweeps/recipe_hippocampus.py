"""What the short recipe was chosen by, on hippocampus, 64 x 64, 1 labelled volume.

  python -m lclseg.sweep --sweep=configs/sweeps/recipe_hippocampus.py \\
    --manual_dir=Task04_Hippocampus

No volume of the reported tables' test sets is seen here: other volumes are labelled than there, and
tested are volumes of the pool, which is without them.
"""

import runpy
from pathlib import Path

CONFIGS = Path(__file__).parents[1]
hippocampus = runpy.run_path(str(CONFIGS / "hippocampus.py"))
lists = runpy.run_path(str(CONFIGS / "parts" / "splits.py"))
OLDER = runpy.run_path(str(Path(__file__).parent / "hippocampus.py"))["OLDER"]
self_training = runpy.run_path(str(CONFIGS / "parts" / "methods.py"))["self_training"]

IDS = hippocampus["IDS"]
SPLITS = {
    "1": {
        "d1": ("180", "302 390"),
        "d2": ("056", "042 381"),
        "d3": ("290", "025 282"),
        "d4": ("065", "098 141"),
    }
}
USED = lists["patients"](IDS, " ".join(" ".join(both) for both in SPLITS["1"].values()))
TEST = tuple(p for p in hippocampus["POOL"] if p not in USED)[::5]

CONFIG = "../hippocampus.py"
PAIRS = (("d1", 1), ("d2", 2), ("d3", 3), ("d4", 4))
BASE = {
    "data.num_labeled": "1",
    "data.splits": lists["table"](IDS, SPLITS),
    "data.pool": tuple(p for p in hippocampus["POOL"] if p not in TEST),
    "data.test_patients": TEST,
    "rounds.baseline_steps": 400,  # of parts/short.py; recipe_hippocampus_long.py has twice as many
    "rounds.steps_per_round": 600,
} | OLDER

ROWS = {
    "supervised": {"method": "supervised"},
    "self-training, weight 1": self_training(1.0),
    "self-training, weight 0.5": self_training(0.5),
    "self-training, weight 0.25": self_training(0.25),
    "self-training, weight 0.5, copy-paste": self_training(0.5, copy_paste=True),
    "self-training, weight 0.25, 700 + 300 steps": self_training(0.25)
    | {"rounds.baseline_steps": 700, "rounds.steps_per_round": 300},
    "BCP": {"method": "bcp"},
}
