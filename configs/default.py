"""Every quantity that all methods share, with the paper's values; other configs start from here.

Symbols and sections are those of arXiv:2112.09645. The method and its own values come from
methods/NAME.py; a config's argument names it: --config=configs/acdc.py:self_training. Override any
value on the command line: --config.method.temperature=0.2
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

METHODS = Path(__file__).with_name("methods")


def get_config(method: str = "local_contrastive") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.num_cpu_devices = 0  # 0: one per core, as far as the batches divide
    config.method = get_method(method)

    data = config.data = ConfigDict()
    data.name = ""  # of a builder in tfds_builders/
    data.data_dir = ""  # prepared sets; "": TFDS_DATA_DIR or ~/tensorflow_datasets
    data.manual_dir = ""  # the downloaded volumes
    data.image_size = 192  # px
    data.target_spacing_mm = 1.0  # in-plane
    data.n4_shrink_factor = 0  # of N4 bias-field correction: fit to every n-th pixel; 0: none
    data.num_labeled = "1"  # which lists of `splits`: "1", "2", "8", "all"
    data.split = "c1"
    data.splits = ConfigDict()  # splits[num_labeled][split] = {labeled, validation}
    data.pool = ()  # unlabelled patients, before labelled and validation ones are taken out
    data.test_patients = ()
    # Non-empty: in place of the list above, e.g. --config.data.test="('p1','p2')"
    data.labeled = ()
    data.unlabeled = ()
    data.validation = ()
    # Masks spent on choosing the checkpoint. -1: the list's, or of own data what is proposed; 0:
    # none, and the last averaged weights of the last stage are handed out.
    data.num_validation = -1
    data.test = ()
    data.labeled_batch_size = 20  # slices, over all devices
    data.min_classes = 3  # classes a labelled slice must show, background included
    data.unlabeled_batch_size = 20  # slices without ground truth, of methods that draw them
    data.eval_batch_size = 40  # slices

    model = config.model = ConfigDict()
    model.filters = (16, 32, 64, 128, 128, 128)
    model.embedding_dim = 16  # E
    model.dtype = "float32"  # of the computation; "bfloat16" on TPU and GPU

    loss = config.loss = ConfigDict()
    # dice_with_background, dice_foreground, cross_entropy or batch_dice_and_cross_entropy
    loss.segmentation = "dice_with_background"
    loss.class_weights = ()  # of cross_entropy, background first; (): equal

    augment = config.augment = ConfigDict()
    # paper: the values below. strong: those of lclseg.augment.strong_geometry and strong_intensity.
    augment.strength = "paper"
    augment.strong_rotation_degrees = 45.0  # strong: bound of the rotation, either way
    augment.any_orientation = False  # strong: flips and whole turns, for scans without a fixed one
    augment.max_rotation_degrees = 15.0
    augment.scale_range = (0.95, 1.05)
    augment.elastic_probability = 0.5
    augment.elastic_sigma = 0.026  # share of the slice's side: 5 px at 192 px
    augment.contrast_range = (0.8, 1.2)
    augment.max_brightness = 0.1

    crf = config.crf = ConfigDict()  # refines pseudo-labels or predictions, slice by slice
    crf.num_steps = 30  # of mean field; 0: no CRF
    crf.spatial_sigma = 10.0  # px
    crf.spatial_weight = 30.0
    crf.bilateral_sigma = 0.01  # px: in effect a pixel's feedback on itself
    crf.intensity_sigma = 0.5
    crf.bilateral_weight = 10.0

    pseudo_labels = config.pseudo_labels = ConfigDict()
    # Gate: two augmented predictions of a volume must agree to more than this Dice, else it is left
    # out of the round; the authors' is 0.9. 0: no gate.
    pseudo_labels.min_agreement = 0.0
    # Of a class in a volume the largest component is kept, in 3-D: "no", "yes", or "by_masks", of
    # the classes that are one piece in all masks of labelled volumes. "together_by_masks": before
    # that the piece of foreground that holds most of the classes, if it is one in all masks, too.
    pseudo_labels.largest_component = "no"
    pseudo_labels.min_confidence = 0.0  # pixels less certain than this are not learnt from
    # A slice's prediction is the mean over the slice and two copies of it, turned as far as
    # training turns slices, either way.
    pseudo_labels.test_time_augmentation = False
    pseudo_labels.crf = True  # refine them by `crf`, unless its num_steps are 0
    # Smooth probabilities across the slices of a volume, by a Gaussian of so many mm; 0: do not.
    pseudo_labels.through_plane_sigma = 0.0

    predictions = config.predictions = ConfigDict()
    predictions.largest_component = "by_masks"  # of what is handed out; tested with and without
    predictions.test_time_augmentation = False  # as above; in validation and tests, too
    predictions.crf = False  # refine them by `crf`; in validation and tests, too
    # The CRF's grid is so many times as fine as the training grid; see crf.upsampled_dense_crf.
    predictions.crf_upsampling = 1
    predictions.through_plane_sigma = 0.0  # as above; in validation and tests, too

    optimizer = config.optimizer = ConfigDict()
    optimizer.learning_rate = 1e-3  # Adam
    optimizer.schedule = "constant"  # or cosine, to 0 over each stage
    optimizer.ema_decay = 0.0  # of the weights that evaluate and write pseudo-labels; 0: off

    rounds = config.rounds = ConfigDict()
    rounds.baseline_steps = 5000
    rounds.num_rounds = 3
    rounds.steps_per_round = 5000
    rounds.baseline_from = ""  # workdir of a run whose finished baseline this run takes over
    # Workdir of a run whose best weights the baseline starts from; own data keep its roles, and new
    # masks are learnt from.
    rounds.start_from = ""
    # Within a round, pseudo-labels are made anew every so many steps; 0: once a round.
    rounds.refresh_every = 0
    # Of volumes with so many slices, drawn each time, which alone are learnt from then; 0: of all.
    rounds.refresh_slices = 0
    rounds.eval_every = 50  # steps between validations
    # Training batches from which BatchNorm's statistics are re-estimated before each validation.
    # 0: running averages, which lag by 100 steps and, with ema_decay, belong to other weights.
    rounds.batch_norm_batches = 0
    rounds.fresh_heads = True  # joint training starts both heads afresh

    log = config.log = ConfigDict()
    log.every = 20  # steps between lines of metrics.jsonl

    return config


def get_method(name: str) -> ConfigDict:
    """The values of a method; raises ValueError where methods/ has none of that name."""
    path = METHODS / f"{name}.py"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in METHODS.glob("*.py")))
        raise ValueError(f"the config's argument is {name!r}; wanted one of {known}")
    return ConfigDict({"name": name, **runpy.run_path(str(path))["OPTIONS"]})
