"""What the short recipe was chosen by, on ACDC, 96 x 96, 1 labelled volume.

  python -m lclseg.sweep --sweep=configs/sweeps/recipe_acdc.py \\
    --manual_dir=ACDC/training

No volume of the reported tables' test sets is seen here: other volumes are labelled than there, and
tested are volumes of the pool, which is without them.
"""

import runpy
from pathlib import Path

CONFIGS = Path(__file__).parents[1]
acdc = runpy.run_path(str(CONFIGS / "acdc.py"))
lists = runpy.run_path(str(CONFIGS / "parts" / "splits.py"))
sweep = runpy.run_path(str(CONFIGS / "sweeps" / "acdc.py"))
self_training = runpy.run_path(str(CONFIGS / "parts" / "methods.py"))["self_training"]

IDS = acdc["IDS"]
SPLITS = {
    "1": {"d1": ("063", "011 071"), "d2": ("023", "011 071"), "d3": ("003", "011 071")},
}
# The test volumes are what they were before there was d3, which is none of them.
USED = lists["patients"](IDS, "063 023 072")
TEST = tuple(p for p in acdc["POOL"] if p not in USED)[::3]

CONFIG = "../acdc_short.py"
PAIRS = (("d1", 1), ("d2", 2), ("d3", 3))
BASE = {
    "data.splits": lists["table"](IDS, SPLITS),
    "data.pool": tuple(p for p in acdc["POOL"] if p not in TEST),
    "data.test_patients": TEST,
    "augment.strong_rotation_degrees": 45.0,
    "pseudo_labels.largest_component": "by_masks",
    "predictions.largest_component": "by_masks",
    "pseudo_labels.test_time_augmentation": False,
    "predictions.test_time_augmentation": False,
    **sweep["NO_CRF"],
}
TURNED = {"augment.strong_rotation_degrees": 90.0}
CONTRASTIVE = {"method": "local_contrastive"} | TURNED | sweep["TURNED_COPIES"]

ROWS = {
    "supervised": {"method": "supervised"},
    "self-training, weight 0.5": self_training(0.5),
    "self-training, weight 0.5, copy-paste": self_training(0.5, copy_paste=True),
    "self-training, weight 0.25, copy-paste": self_training(0.25, copy_paste=True),
    "supervised, 90 degrees": {"method": "supervised"} | TURNED,
    "self-training, weight 0.5, copy-paste, 90 degrees": self_training(0.5, copy_paste=True)
    | TURNED,
    "self-training, weight 0.5, copy-paste, 90 degrees, confidence 0.9": (
        self_training(0.5, copy_paste=True) | TURNED | {"pseudo_labels.min_confidence": 0.9}
    ),
    "BCP, 90 degrees": {"method": "bcp"} | TURNED,
    "self-training, weight 0.5, copy-paste, 90 degrees, cosine": (
        self_training(0.5, copy_paste=True) | TURNED | {"optimizer.schedule": "cosine"}
    ),
    "self-training, weight 0.5, copy-paste, 90 degrees, labels every 25 steps": (
        self_training(0.5, copy_paste=True) | TURNED | {"rounds.refresh_every": 25}
    ),
    "self-training, weight 0.5, copy-paste, 90 degrees, end-systolic frames in the pool": (
        self_training(0.5, copy_paste=True) | TURNED | {"data.frames": "both_in_pool"}
    ),
    "self-training, weight 0.5, copy-paste, 90 degrees, test-time augmentation": (
        self_training(0.5, copy_paste=True) | TURNED | sweep["TURNED_COPIES"]
    ),
    # Of the labels; predicted and tested without it.
    "self-training, weight 0.5, copy-paste, 90 degrees, test-time augmentation, CRF": (
        self_training(0.5, copy_paste=True)
        | TURNED
        | sweep["TURNED_COPIES"]
        | sweep["CRF"]
        | {"pseudo_labels.crf": True, "predictions.crf": False}
    ),
    "self-training, weight 0.5, 90 degrees, test-time augmentation": (
        self_training(0.5) | TURNED | sweep["TURNED_COPIES"]
    ),
    # Moved views of slices that show a structure, changed less in intensity, nothing pasted.
    "local contrastive, 90 degrees, test-time augmentation": CONTRASTIVE,
    # How much the contrastive term counts, 0.02 above, and which class means it sees.
    **{
        f"local contrastive, 90 degrees, test-time augmentation, {name}": CONTRASTIVE | values
        for name, values in (
            ("weight 0", {"method.contrastive_weight": 0.0}),
            ("weight 0.1", {"method.contrastive_weight": 0.1}),
            (
                "weight 0.1, background, means of the batch",
                {
                    "method.contrastive_weight": 0.1,
                    "method.include_background": True,
                    "method.matching": "batch",
                },
            ),
        )
    },
}
