"""ACDC by the protocol that most semi-supervised papers share: both frames, 256 px, 30 000 steps.

  python -m lclseg.main --config=configs/acdc_256.py:unimatch \\
    --config.data.manual_dir=ACDC/training --workdir=runs/acdc_256

Patients: 70 train, 10 validate, 20 test. 1, 3 or 7 of the 70 are labelled (data.num_labeled),
always the same ones. Last averaged weights, millimetres, missed classes counted as misses.

Expected: not run yet; by benchmarks/floor.py at most an hour on an H100. Published Dice with 1 / 3
/ 7 patients: UniMatch .846 / .888 / .897, BCP - / .876 / .888, all 70 .914. Read these with care:
most are one seed, and several papers choose the checkpoint on test volumes. The published programs
resize every slice to 256 x 256; here a pixel is 1.25 mm, so that hearts keep their size.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

HERE = Path(__file__).parent
acdc = runpy.run_path(str(HERE / "acdc.py"))
lists = runpy.run_path(str(HERE / "parts" / "splits.py"))
patients, table, all_but = lists["patients"], lists["table"], lists["all_but"]

IDS = acdc["IDS"]
VALIDATION = "028 085 082 087 019 030 078 045 002 039"
TEST = patients(
    IDS, "011 013 084 033 093 022 068 024 083 081 080 001 007 066 008 065 075 064 059 052"
)
TRAIN = tuple(p for p in patients(IDS, "001-100") if p not in patients(IDS, VALIDATION) + TEST)
LABELED = {"1": "099", "3": "038 050 099", "7": "021 038 049 050 058 099 100"}


def get_config(method: str = "local_contrastive") -> ConfigDict:
    config = acdc["get_config"](method)
    data = config.data
    data.frames = "both"
    data.image_size = 256
    data.target_spacing_mm = 1.25
    data.num_labeled = "3"
    data.split = "c1"
    data.min_classes = 1  # slices that show nothing are learnt from, too
    data.pool, data.test_patients = TRAIN, TEST
    splits = {n: {"c1": (labeled, VALIDATION)} for n, labeled in LABELED.items()}
    data.splits = table(IDS, splits) | {"all": all_but(IDS, TRAIN, {"c1": VALIDATION})}
    data.labeled_batch_size = data.unlabeled_batch_size = 12
    if config.method.name == "local_contrastive":
        config.method.view_min_classes = 1
        config.method.pairs.update(labeled_self=0, pseudo_self=0, labeled_pseudo=3, pseudo_pseudo=3)
    config.loss.segmentation = "batch_dice_and_cross_entropy"
    config.augment.strength = "strong"
    config.augment.strong_rotation_degrees = 90.0  # as in acdc_short.py: how far scans are turned
    config.pseudo_labels.largest_component = "by_masks"
    config.crf.num_steps = 0  # its sigmas are made for 192 px
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.ema_decay = 0.99
    rounds = config.rounds
    rounds.baseline_steps = 6000
    rounds.num_rounds = 1
    rounds.steps_per_round = 24000
    rounds.refresh_every = 2000
    rounds.batch_norm_batches = 20
    rounds.eval_every = 1000
    return config
