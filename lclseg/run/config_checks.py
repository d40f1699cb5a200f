"""Checks of a config, all of it, before any work is done."""

import math
import numbers
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from lclseg.data import own_data
from lclseg.data.splits import choose_lists
from lclseg.errors import UserError
from lclseg.losses import MATCHINGS


class ConfigError(UserError):
    """A config that cannot be run; the message names the keys and the way out."""


class Rule(NamedTuple):
    """Which values a key may have, as a test and in words."""

    holds: Callable[[Any], bool]
    wanted: str


def is_number(value: Any) -> bool:
    """Finite, and no bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def whole(least: int, most: int | None = None) -> Rule:
    words = f"a whole number, {least} or more" if most is None else f"{least} to {most}, whole"
    return Rule(lambda v: is_whole(v) and least <= v and (most is None or v <= most), words)


def one_of(*choices: Any) -> Rule:
    return Rule(lambda v: v in choices, f"one of {', '.join(map(str, choices))}")


def each(holds: Callable[[Any], bool], wanted: str) -> Rule:
    """A tuple or list, maybe empty, whose items are all right."""
    return Rule(lambda v: isinstance(v, tuple | list) and all(map(holds, v)), wanted)


def span(lowest: float, wanted: str, *, may_be_point: bool = True) -> Rule:
    """Two numbers in order, the first not below `lowest`."""

    def holds(value):
        if not (isinstance(value, tuple | list) and len(value) == 2 and all(map(is_number, value))):
            return False
        low, high = value
        return lowest <= low and (low <= high if may_be_point else low < high)

    return Rule(holds, wanted)


ABOVE_0 = Rule(lambda v: is_number(v) and v > 0, "a number above 0")
NOT_NEGATIVE = Rule(lambda v: is_number(v) and v >= 0, "0 or more")
SHARE_BELOW_1 = Rule(lambda v: is_number(v) and 0 <= v < 1, "0 <= x < 1")
THRESHOLD = Rule(SHARE_BELOW_1.holds, "0 <= x < 1, 0 to accept all")
PROBABILITY = Rule(lambda v: is_number(v) and 0 <= v <= 1, "0 <= x <= 1")
TEXT = Rule(lambda v: isinstance(v, str), "text")
NAME = Rule(lambda v: isinstance(v, str) and v != "", "text that is not empty")
YES_NO = Rule(lambda v: isinstance(v, bool), "True or False")
PATIENTS = each(lambda v: isinstance(v, str) and v != "", "a tuple of patient ids, as text")
FACTORS = span(0.0, "(low, high) with 0 <= low <= high")

CHOICES = {
    "loss.segmentation": (
        "dice_with_background",
        "dice_foreground",
        "cross_entropy",
        "batch_dice_and_cross_entropy",
    ),
    "loss.matching": MATCHINGS,
    "optimizer.schedule": ("constant", "cosine"),
    "model.dtype": ("float32", "bfloat16"),
}
# Every key of a config.
RULES: dict[str, Rule] = {
    **{key: one_of(*choices) for key, choices in CHOICES.items()},
    "seed": whole(0, 2**31 - 1),
    "num_cpu_devices": whole(0),
    "data.name": NAME,
    "data.data_dir": TEXT,
    "data.manual_dir": TEXT,
    "data.image_size": whole(1),
    "data.target_spacing_mm": ABOVE_0,
    "data.n4_shrink_factor": whole(0, 64),
    "data.num_labeled": NAME,
    "data.split": NAME,
    "data.splits": Rule(lambda v: hasattr(v, "items"), "{num_labeled: {split: lists}}"),
    **{f"data.{lists}": PATIENTS for lists in ("pool", "test_patients")},
    **{f"data.{lists}": PATIENTS for lists in ("labeled", "unlabeled", "validation", "test")},
    "data.labeled_batch_size": whole(1),
    "data.min_classes": whole(1),
    "data.view_min_classes": whole(0),
    "data.pairs.labeled_self": whole(0),
    "data.pairs.pseudo_self": whole(0),
    "data.pairs.labeled_pseudo": whole(0),
    "data.pairs.pseudo_pseudo": whole(0),
    "data.eval_batch_size": whole(1),
    "model.filters": Rule(
        lambda v: (
            isinstance(v, tuple | list) and len(v) >= 2 and all(is_whole(n) and n > 0 for n in v)
        ),
        "two or more whole numbers above 0, one a level",
    ),
    "model.embedding_dim": whole(1),
    "loss.class_weights": Rule(
        lambda v: (
            isinstance(v, tuple | list)
            and all(is_number(w) and w >= 0 for w in v)
            and (len(v) == 0 or sum(v) > 0)
        ),
        "a tuple of numbers, 0 or more and not all 0, one a class; or ()",
    ),
    "loss.contrastive_weight": NOT_NEGATIVE,
    "loss.temperature": ABOVE_0,
    "loss.pixels_per_class": Rule(
        lambda v: v is None or (is_whole(v) and v >= 0), "0 (every pixel) or more, whole"
    ),
    "loss.include_background": YES_NO,
    "loss.pseudo_label_weight": NOT_NEGATIVE,
    "loss.separate_batch_norm": YES_NO,
    "augment.max_rotation_degrees": Rule(lambda v: is_number(v) and 0 <= v <= 180, "0 to 180"),
    "augment.scale_range": Rule(
        lambda v: FACTORS.holds(v) and v[0] > 0, "(low, high) with 0 < low <= high"
    ),
    "augment.elastic_probability": PROBABILITY,
    "augment.elastic_sigma_px": NOT_NEGATIVE,
    "augment.contrast_range": FACTORS,
    "augment.max_brightness": NOT_NEGATIVE,
    "augment.view_contrast_range": FACTORS,
    "augment.view_max_brightness": NOT_NEGATIVE,
    "augment.view_clip": span(-math.inf, "(low, high) with low < high", may_be_point=False),
    "augment.view_geometry": YES_NO,
    "crf.num_steps": whole(0),
    "crf.spatial_sigma": ABOVE_0,
    "crf.spatial_weight": NOT_NEGATIVE,
    "crf.bilateral_sigma": ABOVE_0,
    "crf.intensity_sigma": ABOVE_0,
    "crf.bilateral_weight": NOT_NEGATIVE,
    "pseudo_labels.min_agreement": THRESHOLD,
    "pseudo_labels.min_confidence": THRESHOLD,
    "optimizer.learning_rate": ABOVE_0,
    "optimizer.ema_decay": SHARE_BELOW_1,
    "rounds.baseline_steps": whole(1),
    "rounds.num_rounds": whole(0),
    "rounds.steps_per_round": whole(1),
    "rounds.baseline_from": TEXT,
    "rounds.eval_every": whole(1),
    "rounds.calibration_batches": whole(0),
    "rounds.fresh_heads": YES_NO,
    "log.every": whole(1),
}
# Those of own data alone, and what `own_data.complete` fills in, which is open until then.
OWN_DATA_RULES: dict[str, Rule] = {
    "data.slice_axis": whole(-1, 2),
    "data.label_values": each(lambda v: is_whole(v) and 0 <= v < 2**16, "whole numbers 0..65535"),
    "data.class_names": each(lambda v: isinstance(v, str) and v != "", "a tuple of names"),
    "data.folder_digest": TEXT,
    "data.draw_seed": whole(0),
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


def _wrong_values(config: ConfigDict) -> Iterator[tuple[str, str]]:
    """(key, problem)."""
    is_own = config.get("data", {}).get("name") == own_data.NAME
    rules = RULES | (OWN_DATA_RULES if is_own else {})
    values = dict(_leaves(config))
    for key, rule in rules.items():
        if key not in values:
            yield key, f"{key} is missing; wanted {rule.wanted}, see configs/default.py"
        elif is_own and key in OPEN and values[key] == OPEN[key]:
            continue
        elif not rule.holds(values[key]):
            yield key, f"{key} is {values[key]!r}; wanted {rule.wanted}"
    for key in sorted(values.keys() - rules.keys()):
        yield key, f"{key} is no key of a config; see configs/default.py"


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
    sizes = {}
    if right("data.labeled_batch_size"):
        sizes["data.labeled_batch_size"] = config.data.labeled_batch_size
    if right("data.pairs"):
        sizes["the sum of data.pairs"] = sum(config.data.pairs.values())
    for name, size in sizes.items():
        if size <= 0 or size % num_devices:
            yield (
                f"{name} is {size}; wanted a multiple of the {num_devices} devices, since batch "
                "sizes are global"
            )
    if right("loss.class_weights", "loss.segmentation"):
        if config.loss.class_weights and config.loss.segmentation != "cross_entropy":
            yield (
                f"loss.class_weights is {config.loss.class_weights!r}, but loss.segmentation="
                f"{config.loss.segmentation} has no weights; wanted (), or cross_entropy"
            )
    # Own data's lists are drawn, see `own_data.complete`.
    if right("data.") and config.data.name != own_data.NAME:
        try:
            choose_lists(config.data)
        except UserError as error:
            yield str(error)
