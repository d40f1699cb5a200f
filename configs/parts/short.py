"""Schedules for two CPU cores, which the short configs share."""

from ml_collections import ConfigDict

# Of the paper's method: how many pairs of views, by kind; 8 slices.
PAIRS = {"labeled_self": 0, "pseudo_self": 0, "labeled_pseudo": 2, "pseudo_pseudo": 2}


def shorten(config: ConfigDict) -> None:
    """400 + 600 steps in batches of 8 slices with ground truth and as many without.

    And what so few steps ask for: every slice and every pixel is learnt from, slices are changed
    strongly, and labels of the pool are made anew every 100 steps.
    """
    config.data.labeled_batch_size = config.data.unlabeled_batch_size = 8
    config.data.min_classes = 1  # slices that show nothing are learnt from, too
    config.loss.segmentation = "batch_dice_and_cross_entropy"
    config.augment.strength = "strong"
    config.pseudo_labels.largest_component = "by_masks"
    # Pseudo-labels of so early a model are poor: a higher weight has lost on sets where they are
    # poorest; ../sweeps/recipe_hippocampus.py.
    if config.method.name == "self_training":
        config.method.weight = 0.25
    if config.method.name == "local_contrastive":
        config.method.pairs.update(PAIRS)
        config.method.pixels_per_class = 0  # every pixel
        config.method.view_min_classes = 1
        config.method.pseudo_label_weight = 0.25
        config.method.view_geometry = True  # learnt from, views move as labelled slices do
    config.crf.num_steps = 0  # its sigmas are made for 192 px
    # Three times the paper's: a short schedule has to level off.
    config.optimizer.learning_rate = 3e-3
    config.optimizer.ema_decay = 0.98
    rounds = config.rounds
    rounds.baseline_steps, rounds.num_rounds, rounds.steps_per_round = 400, 1, 600
    rounds.refresh_every, rounds.refresh_slices = 100, 1000
    rounds.eval_every = 100
    # Running statistics lag: the baseline of ACDC, c1, validates at 0.2 for 200 steps with them.
    # And averaged weights need statistics of their own.
    rounds.batch_norm_batches = 10
    rounds.fresh_heads = False  # too few steps to learn a head anew
