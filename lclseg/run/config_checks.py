"""Checks of a config, all of it, before any work is done."""

import importlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from lclseg.data import case_files
from lclseg.data.layouts import MAX_CHANNELS
from lclseg.data.splits import choose_lists
from lclseg.errors import ConfigError, UserError
from lclseg.rules import (
    ABOVE_0,
    FACTORS,
    NAME,
    NAMES,
    NOT_NEGATIVE,
    PROBABILITY,
    SHARE_BELOW_1,
    TEXT,
    YES_NO,
    Rule,
    each,
    is_number,
    is_whole,
    one_of,
    span,
    whole,
)

ANY = Rule(lambda v: True, "any value")
THRESHOLD = Rule(SHARE_BELOW_1.holds, "0 <= x < 1, 0 to accept all")
CHOICES = {
    "augment.strength": ("paper", "strong"),
    "loss.segmentation": (
        "dice_with_background",
        "dice_foreground",
        "cross_entropy",
        "batch_dice_and_cross_entropy",
    ),
    "pseudo_labels.largest_component": ("no", "yes", "by_masks", "together_by_masks"),
    "predictions.largest_component": ("no", "yes", "by_masks", "together_by_masks"),
    "optimizer.schedule": ("constant", "cosine"),
    "model.dtype": ("float32", "bfloat16"),
}
# Every key of a config but the method's own, whose rules stand in the method's file.
RULES: dict[str, Rule] = {
    **{key: one_of(*choices) for key, choices in CHOICES.items()},
    "seed": whole(0, 2**31 - 1),
    "num_cpu_devices": whole(0),
    "method.name": Rule(
        lambda v: NAME.holds(v) and v.isidentifier(), "the name of a file in lclseg/methods"
    ),
    "data.name": NAME,
    "data.data_dir": TEXT,
    "data.manual_dir": TEXT,
    "data.image_size": whole(1),
    "data.target_spacing_mm": ABOVE_0,
    "data.n4_shrink_factor": whole(0, 64),
    "data.num_labeled": NAME,
    "data.split": NAME,
    "data.splits": Rule(lambda v: hasattr(v, "items"), "{num_labeled: {split: lists}}"),
    "data.pool": NAMES,
    "data.test_patients": NAMES,
    "data.labeled": NAMES,
    "data.unlabeled": NAMES,
    "data.validation": NAMES,
    "data.test": NAMES,
    "data.num_validation": whole(-1),
    "data.labeled_batch_size": whole(1),
    "data.unlabeled_batch_size": whole(1),
    "data.min_classes": whole(1),
    "data.eval_batch_size": whole(1),
    "model.filters": each(
        lambda v: is_whole(v) and v > 0,
        "two or more whole numbers above 0, one a level",
        at_least=2,
    ),
    "model.embedding_dim": whole(1),
    "loss.class_weights": Rule(
        lambda v: each(NOT_NEGATIVE.holds, "").holds(v) and (len(v) == 0 or sum(v) > 0),
        "a tuple of numbers, 0 or more and not all 0, one a class; or ()",
    ),
    "augment.any_orientation": YES_NO,
    "augment.strong_rotation_degrees": Rule(lambda v: is_number(v) and 0 <= v <= 180, "0 to 180"),
    "augment.max_rotation_degrees": Rule(lambda v: is_number(v) and 0 <= v <= 180, "0 to 180"),
    "augment.scale_range": span(
        lambda low, high: 0 < low <= high, "(low, high) with 0 < low <= high"
    ),
    "augment.elastic_probability": PROBABILITY,
    "augment.elastic_sigma": SHARE_BELOW_1,
    "augment.contrast_range": FACTORS,
    "augment.max_brightness": NOT_NEGATIVE,
    "crf.num_steps": whole(0),
    "crf.spatial_sigma": ABOVE_0,
    "crf.spatial_weight": NOT_NEGATIVE,
    "crf.bilateral_sigma": ABOVE_0,
    "crf.intensity_sigma": ABOVE_0,
    "crf.bilateral_weight": NOT_NEGATIVE,
    "pseudo_labels.min_agreement": THRESHOLD,
    "pseudo_labels.min_confidence": THRESHOLD,
    "pseudo_labels.test_time_augmentation": YES_NO,
    "predictions.test_time_augmentation": YES_NO,
    "pseudo_labels.crf": YES_NO,
    "predictions.crf": YES_NO,
    "predictions.crf_upsampling": whole(1, 8),
    "pseudo_labels.through_plane_sigma": NOT_NEGATIVE,
    "predictions.through_plane_sigma": NOT_NEGATIVE,
    "optimizer.learning_rate": ABOVE_0,
    "optimizer.ema_decay": SHARE_BELOW_1,
    "rounds.baseline_steps": whole(1),
    "rounds.num_rounds": whole(0),
    "rounds.steps_per_round": whole(1),
    "rounds.baseline_from": TEXT,
    "rounds.start_from": TEXT,
    "rounds.refresh_every": whole(0),
    "rounds.refresh_slices": whole(0),
    "rounds.eval_every": whole(1),
    "rounds.batch_norm_batches": whole(0),
    "rounds.fresh_heads": YES_NO,
    "log.every": whole(1),
}
# Those of own data alone, and what `own_data.complete` fills in, which is open until then.
OWN_DATA_RULES: dict[str, Rule] = {
    "data.slice_axis": whole(-1, 2),
    "data.label_values": each(lambda v: is_whole(v) and 0 <= v < 2**16, "whole numbers 0..65535"),
    "data.class_names": NAMES,
    "data.ignore_value": whole(-1, 2**16 - 1),
    "data.exclude": NAMES,
    "data.patients_by_name": YES_NO,
    "data.channels": each(lambda v: is_whole(v) and 0 <= v < MAX_CHANNELS, "whole numbers 0..99"),
    "data.windows": each(
        lambda w: w is None or (len(w) == 2 and all(map(is_number, w)) and w[0] < w[1]),
        "(low, high) with low < high, or None, one a channel",
    ),
    "data.folder_digest": TEXT,
    "data.with_mask": NAMES,
    "data.draw_seed": whole(0),
}
# Of single data sets.
SET_RULES: dict[str, dict[str, Rule]] = {
    case_files.NAME: OWN_DATA_RULES,
    "acdc": {"data.frames": one_of("end_diastolic", "both", "both_in_pool")},
}
OPEN = {"data.image_size": 0, "data.target_spacing_mm": 0}


def check_config(config: ConfigDict, *, num_devices: int) -> None:
    """Raises ConfigError, naming every value that cannot be run, found and wanted.

    Needs the config only. What depends on the data set is checked as soon as that is known: see
    `check_classes`, and `splits.resolve_split` for patients that are not there.
    """
    wrong = dict(_wrong_values(config))
    problems = [*wrong.values(), *_misfits(config, num_devices, wrong)]
    if problems:
        raise ConfigError("\n  ".join(["the config cannot be run:", *problems]))


def check_classes(config: ConfigDict, class_names: Sequence[str]) -> None:
    """Raises ConfigError where a value does not fit the classes of the data set."""
    weights, wanted = config.loss.class_weights, len(class_names) + 1
    if weights and len(weights) != wanted:
        raise ConfigError(
            f"loss.class_weights has {len(weights)} values; wanted {wanted}, of background, "
            f"{', '.join(class_names)}; or () for equal weights"
        )


def units_per_batch(config: ConfigDict) -> dict[str, int]:
    """Tells how much of each kind a global batch holds; devices share it equally."""
    units = {
        "data.labeled_batch_size": config.data.labeled_batch_size,
        "data.unlabeled_batch_size": config.data.unlabeled_batch_size,
    }
    if "pairs" in config.method:
        units["the sum of method.pairs"] = sum(config.method.pairs.values())
    return units


def _rules_of(values: Mapping[str, Any]) -> tuple[dict[str, Rule], str]:
    """The rules of a config's keys, and what is wrong with the method's name, "" if nothing."""
    rules = RULES | SET_RULES.get(values.get("data.name", ""), {})
    name = values.get("method.name")
    if not RULES["method.name"].holds(name):
        return rules, ""
    module_name = f"lclseg.methods.{name}"
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name:
            raise
        return rules, f"method.name is {name!r}, but there is no lclseg/methods/{name}.py"
    rules |= getattr(module, "CONFIG_RULES", {})  # narrower ones of keys that all methods share
    own = getattr(module, "RULES", None)
    if own is None:  # a method may do without
        own = {k.removeprefix("method."): ANY for k in values if k.startswith("method.")}
        del own["name"]
    return rules | {f"method.{key}": rule for key, rule in own.items()}, ""


def _wrong_values(config: ConfigDict) -> Iterator[tuple[str, str]]:
    """(key, problem)."""
    values = dict(_leaves(config))
    rules, no_method = _rules_of(values)
    if no_method:
        yield "method.", no_method
    is_open = OPEN if values.get("data.name") == case_files.NAME else {}
    for key, rule in rules.items():
        if key not in values:
            yield key, f"{key} is missing; wanted {rule.wanted}, see configs/default.py"
        elif key in is_open and values[key] == is_open[key]:
            continue
        elif not rule.holds(values[key]):
            yield key, f"{key} is {values[key]!r}; wanted {rule.wanted}"
    for key in sorted(values.keys() - rules.keys()):
        if not (no_method and key.startswith("method.")):
            yield key, f"{key} is no key of a config; see configs/default.py and configs/methods"


def _leaves(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value); the table of splits is a value."""
    for key, value in config.items():
        if isinstance(value, ConfigDict) and prefix + key != "data.splits":
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _misfits(config: ConfigDict, num_devices: int, wrong: Collection[str]) -> Iterator[str]:
    """What is wrong between values, none of which is wrong by itself."""

    def right(*prefixes):
        return not any(key.startswith(prefixes) for key in wrong)

    if right("data.image_size", "model.filters"):
        multiple = 2 ** (len(config.model.filters) - 1)
        if config.data.image_size % multiple:
            yield (
                f"data.image_size is {config.data.image_size}; with {len(config.model.filters)} "
                f"levels in model.filters wanted a multiple of {multiple}"
            )
    if right("data.labeled_batch_size", "data.unlabeled_batch_size", "method."):
        for name, size in units_per_batch(config).items():
            if size <= 0 or size % num_devices:
                yield (
                    f"{name} is {size}; wanted a multiple of the {num_devices} devices, since "
                    "batch sizes are global"
                )
    if right("loss.class_weights", "loss.segmentation"):
        if config.loss.class_weights and config.loss.segmentation != "cross_entropy":
            yield (
                f"loss.class_weights is {config.loss.class_weights!r}, but loss.segmentation="
                f"{config.loss.segmentation} has no weights; wanted (), or cross_entropy"
            )
    if right("crf.num_steps", "predictions.crf"):
        if config.predictions.crf and not config.crf.num_steps:
            yield (
                "predictions.crf is True, but crf.num_steps is 0, which refines nothing; wanted 1 "
                "or more, or predictions.crf=False"
            )
    if right("predictions.crf", "predictions.crf_upsampling"):
        if config.predictions.crf_upsampling > 1 and not config.predictions.crf:
            yield (
                f"predictions.crf_upsampling is {config.predictions.crf_upsampling}, but "
                "predictions.crf is False; wanted 1, or predictions.crf=True"
            )
    # Own data's lists are drawn, see `own_data.complete`.
    if right("data.") and config.data.name != case_files.NAME:
        try:
            choose_lists(config.data)
        except UserError as error:
            yield str(error)
