"""Schedules for two CPU cores, which the short configs share."""

from ml_collections import ConfigDict

# Of the paper's method, by the size of the batches: how many pairs, by kind.
PAIRS = {
    8: {"labeled_self": 0, "pseudo_self": 0, "labeled_pseudo": 2, "pseudo_pseudo": 2},
    12: {"labeled_self": 1, "pseudo_self": 1, "labeled_pseudo": 2, "pseudo_pseudo": 2},
}


def small_batches(config: ConfigDict, size: int) -> None:
    """Batches of 8 or 12 slices with ground truth, and as many without, or some pairs."""
    config.data.labeled_batch_size = size
    config.data.unlabeled_batch_size = size
    if config.method.name == "local_contrastive":
        config.method.pairs.update(PAIRS[size])


def shorten(config: ConfigDict, size: int, first: int = 400, joint: int = 600) -> None:
    """So many steps of each stage in batches of `size`, and what so few ask for.

    Every slice and every pixel is learnt from. Labels of the pool are made anew every 100 steps:
    three rounds of 100 steps, each with a test, stop while Dice still rises (docs/results.md).
    """
    config.data.min_classes = 1  # slices that show nothing are learnt from, too
    config.loss.segmentation = "batch_dice_and_cross_entropy"
    config.augment.strength = "strong"
    config.pseudo_labels.largest_component = "by_masks"
    small_batches(config, size)
    if config.method.name == "local_contrastive":
        config.method.pixels_per_class = 0  # every pixel
        config.method.view_min_classes = 1
        config.method.pseudo_label_weight = 1.0
        config.method.view_geometry = True  # learnt from, views move as labelled slices do
    config.crf.num_steps = 0  # its sigmas are made for 192 px
    # Three times the paper's: a short schedule has to level off.
    config.optimizer.learning_rate = 3e-3
    config.optimizer.ema_decay = 0.98
    rounds = config.rounds
    rounds.baseline_steps, rounds.num_rounds, rounds.steps_per_round = first, 1, joint
    rounds.refresh_every, rounds.refresh_slices = 100, 1000
    rounds.eval_every = 100
    # Running statistics lag: the baseline of ACDC, c1, validates at 0.2 for 200 steps with them.
    # And averaged weights need statistics of their own.
    rounds.batch_norm_batches = 10
    rounds.fresh_heads = False  # too few steps to learn a head anew
