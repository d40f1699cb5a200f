"""ACDC at 96 x 96 with a short schedule, 400 + 3 x 100 steps, for a CPU.

  python -m lclseg.main --config=configs/acdc_short.py --config.data.manual_dir=ACDC/training

Expected: test Dice 0.80 after round 3 (mean of three splits; 0.77 on c1) on the development test
volumes of sweeps/acdc.py, in some 15 minutes on two CPU cores.

Patients are those of acdc.py. Of the rows of sweeps/acdc.py this is the one with the highest
validation Dice: self-training and the contrastive loss on every pixel.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

get_acdc = runpy.run_path(str(Path(__file__).with_name("acdc.py")))["get_config"]


def get_config(method: str = "local_contrastive") -> ConfigDict:
    config = get_acdc(method)
    data = config.data
    data.image_size = 96
    data.target_spacing_mm = 2.73438
    data.min_classes = 1  # slices that show nothing are learnt from, too
    data.labeled_batch_size = 8
    data.unlabeled_batch_size = 8
    config.loss.segmentation = "batch_dice_and_cross_entropy"
    if config.method.name == "local_contrastive":
        options = config.method
        options.pixels_per_class = 0  # every pixel
        options.pseudo_label_weight = 1.0
        options.view_geometry = True  # learnt from, views are moved as labelled slices are
        options.view_min_classes = 1
        options.pairs.update(labeled_self=0, pseudo_self=0, labeled_pseudo=2, pseudo_pseudo=2)
    config.crf.num_steps = 0  # its sigmas are made for 192 px
    # Three times the paper's: a short schedule has to level off.
    config.optimizer.learning_rate = 3e-3
    config.optimizer.ema_decay = 0.98
    rounds = config.rounds
    rounds.baseline_steps = 400
    rounds.steps_per_round = 100
    # Running statistics lag: the baseline of c1 validates at 0.2 for 200 steps with them.
    rounds.batch_norm_batches = 10
    rounds.fresh_heads = False  # too few steps to learn a head anew
    return config
