"""ACDC at 96 x 96 with a short schedule, 400 + 600 steps, for a CPU.

  python -m lclseg.main --config=configs/acdc_short.py --config.data.manual_dir=ACDC/training

Expected: test Dice 0.85 (mean of five splits) on the development test volumes of sweeps/acdc.py,
in some 18 minutes on one CPU core. With --config.rounds.steps_per_round=1600, twice the steps:
0.87, in 42 minutes. With 3600, four times: 0.88, in 88 minutes.

Patients are those of acdc.py. The method is self-training; sweeps/acdc.py compares it with others.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

HERE = Path(__file__).parent
get_acdc = runpy.run_path(str(HERE / "acdc.py"))["get_config"]
shorten = runpy.run_path(str(HERE / "parts" / "short.py"))["shorten"]


def get_config(method: str = "self_training") -> ConfigDict:
    config = get_acdc(method)
    data = config.data
    data.image_size = 96
    data.target_spacing_mm = 2.73438
    shorten(config)
    # The pool's scans are turned by up to 120 degrees against each other in the plane of slices.
    config.augment.strong_rotation_degrees = 90.0  # chosen in sweeps/recipe_acdc.py
    config.rounds.refresh_slices = 0  # the whole pool, 460 slices
    # Chosen by the pools of sweeps/acdc.py: a false piece of one class that is larger than the
    # right one is no part of the heart.
    for group in (config.pseudo_labels, config.predictions):
        group.largest_component = "together_by_masks"
        group.test_time_augmentation = True  # chosen in sweeps/recipe_acdc.py
    # Chosen by pools of sweeps/acdc_2.py; for pseudo-labels it is no use, in sweeps/recipe_acdc.py.
    config.pseudo_labels.crf = False
    config.crf.update(num_steps=3, spatial_weight=0.0)
    config.crf.update(bilateral_sigma=1.5, intensity_sigma=0.05, bilateral_weight=3.0)
    config.predictions.crf = True
    if config.method.name == "self_training":  # chosen in sweeps/recipe_acdc.py
        config.method.weight = 0.5
        config.method.copy_paste = True
    if config.method.name == "local_contrastive":  # as much as there: they differ by the term only
        config.method.pseudo_label_weight = 0.5
    return config
