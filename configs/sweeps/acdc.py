"""Every method on ACDC, 96 x 96, 1 labelled volume: a sweep for lclseg.sweep.

  python -m lclseg.sweep --sweep=configs/sweeps/acdc.py --manual_dir=ACDC/training

The test patients are in none of the paper's lists, so that the paper's own test patients stay
unseen.
"""

import runpy
from pathlib import Path

rows = runpy.run_path(str(Path(__file__).parents[1] / "parts" / "methods.py"))

CONFIG = "../acdc_short.py"
acdc = runpy.run_path(str(Path(__file__).parents[1] / "acdc.py"))
# Every patient of the pool that validates in no split. The config's own list for "all" has more,
# the test patients below among them.
POOL = tuple(p for p in acdc["POOL"] if p != "patient072")
ALL_LABELS = rows["ROWS"]["all labels"] | {"data.num_labeled": "1", "data.labeled": POOL}
# As acdc_short.py has it.
TOGETHER = {
    "pseudo_labels.largest_component": "together_by_masks",
    "predictions.largest_component": "together_by_masks",
}
TURNED_COPIES = {
    "pseudo_labels.test_time_augmentation": True,
    "predictions.test_time_augmentation": True,
}
# As acdc_short.py has it; without, what all configs had when most rows were measured.
CRF = {"pseudo_labels.crf": False, "predictions.crf": True} | {
    f"crf.{key}": value
    for key, value in (
        ("num_steps", 3),
        ("spatial_weight", 0.0),
        ("bilateral_sigma", 1.5),
        ("intensity_sigma", 0.05),
        ("bilateral_weight", 3.0),
    )
}
NO_CRF = {f"crf.{key}": value for key, value in acdc["get_config"]().crf.items()}
NO_CRF |= {"crf.num_steps": 0, "pseudo_labels.crf": True, "predictions.crf": False}
# All of it: how acdc_short.py cleans labels and predicts, whatever the method.
RULES = TOGETHER | TURNED_COPIES | CRF
PAIRS = rows["PAIRS"]
COPY_PASTE = rows["ROWS"]["self-training, copy-paste"]
ROWS = rows["ROWS"] | {
    "all labels": ALL_LABELS,
    "BCP, classes together": rows["ROWS"]["BCP"] | TOGETHER,
    "recipe, without copies and CRF": COPY_PASTE | TOGETHER,
    "recipe, without CRF": COPY_PASTE | TOGETHER | TURNED_COPIES,
    # As acdc_short.py is.
    "recipe": COPY_PASTE | RULES,
    # Other methods by the same rules: what is left between them is training.
    "supervised, by the recipe's rules": rows["ROWS"]["supervised"] | RULES,
    "all labels, by the recipe's rules": ALL_LABELS | RULES,
    "local contrastive, by the recipe's rules": rows["ROWS"]["local contrastive"] | RULES,
    "local contrastive, by the recipe's rules, without its term": (
        rows["ROWS"]["local contrastive, without its term"] | RULES
    ),
}
BASE = {
    # Most rows were measured with it; see TOGETHER, TURNED_COPIES and CRF.
    **NO_CRF,
    "pseudo_labels.largest_component": "by_masks",
    "predictions.largest_component": "by_masks",
    "pseudo_labels.test_time_augmentation": False,
    "predictions.test_time_augmentation": False,
    "data.test": tuple(
        f"patient{n:03d}"
        for first, last in ((13, 16), (32, 36), (51, 56), (73, 76), (91, 93), (96, 96))
        for n in range(first, last + 1)
    ),
}
