"""Checks of a config before any work is done, and the comparison of two."""

from collections.abc import Sequence

from ml_collections import ConfigDict

CHOICES = {
    "augment.strength": ("paper", "strong"),
    "loss.segmentation": (
        "dice_with_background",
        "dice_foreground",
        "cross_entropy",
        "batch_dice_and_cross_entropy",
    ),
    "optimizer.schedule": ("constant", "cosine"),
    "model.dtype": ("float32", "bfloat16"),
}
POSITIVE = (
    "data.image_size",
    "data.target_spacing_mm",
    "data.labeled_batch_size",
    "data.unlabeled_batch_size",
    "data.min_classes",
    "data.eval_batch_size",
    "model.embedding_dim",
    "optimizer.learning_rate",
    "rounds.baseline_steps",
    "rounds.steps_per_round",
    "rounds.eval_every",
    "log.every",
    "crf.spatial_sigma",
    "crf.bilateral_sigma",
    "crf.intensity_sigma",
)
NOT_NEGATIVE = (
    "data.n4_shrink_factor",
    "crf.num_steps",
    "crf.spatial_weight",
    "crf.bilateral_weight",
    "rounds.num_rounds",
    "rounds.batch_norm_batches",
)
# Prefixes of the keys that the baseline does not depend on.
JOINT_ONLY = (
    "num_cpu_devices",
    "data.data_dir",
    "data.manual_dir",
    "data.pool",
    "data.unlabeled",
    "data.unlabeled_batch_size",
    "method.",
    "crf.",
    "pseudo_labels.",
    "rounds.num_rounds",
    "rounds.steps_per_round",
    "rounds.fresh_heads",
    "rounds.baseline_from",
    "log.",
)

# What a run may have otherwise when it goes on: where things are, and how often it tells.
MACHINE_KEYS = ("num_cpu_devices", "data.data_dir", "data.manual_dir", "log.every")


class ConfigError(ValueError):
    """A config that cannot be run; the message names the keys and the way out."""


def check_config(config: ConfigDict, *, num_devices: int) -> None:
    """Raises ConfigError, naming every value that cannot be run, found and wanted."""
    problems = []
    for key, choices in CHOICES.items():
        if _value(config, key) not in choices:
            problems.append(f"{key} is {_value(config, key)!r}; wanted one of {', '.join(choices)}")
    for key in POSITIVE:
        if not _value(config, key) > 0:
            problems.append(f"{key} is {_value(config, key)}; wanted a number above 0")
    for key in NOT_NEGATIVE:
        if not _value(config, key) >= 0:
            problems.append(f"{key} is {_value(config, key)}; wanted 0 or more")
    for key in ("pseudo_labels.min_agreement", "pseudo_labels.min_confidence"):
        if not 0 <= _value(config, key) < 1:
            problems.append(f"{key} is {_value(config, key)}; wanted 0 <= x < 1, 0 to accept all")
    if not 0 <= config.optimizer.ema_decay < 1:
        problems.append(f"optimizer.ema_decay is {config.optimizer.ema_decay}; wanted 0 <= x < 1")
    multiple = 2 ** (len(config.model.filters) - 1)
    if config.data.image_size % multiple:
        problems.append(
            f"data.image_size is {config.data.image_size}; with {len(config.model.filters)} levels "
            f"in model.filters wanted a multiple of {multiple}"
        )
    for name, size in units_per_batch(config).items():
        if size <= 0 or size % num_devices:
            problems.append(
                f"{name} is {size}; wanted a multiple of the {num_devices} devices, since batch "
                "sizes are global"
            )
    if problems:
        raise ConfigError("\n  ".join(["the config cannot be run:", *problems]))


def units_per_batch(config: ConfigDict) -> dict[str, int]:
    """How much of each kind a global batch holds; devices share it equally."""
    units = {
        "data.labeled_batch_size": config.data.labeled_batch_size,
        "data.unlabeled_batch_size": config.data.unlabeled_batch_size,
    }
    if "pairs" in config.method:
        units["the sum of method.pairs"] = sum(config.method.pairs.values())
    return units


def _value(config: ConfigDict, key: str):
    group, name = key.split(".")
    return config[group][name]


def differing_keys(before: dict, now: dict, prefix: str = "") -> list[str]:
    """Dotted names of the values in which two configs, read from JSON, differ."""
    keys = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            keys += differing_keys(old, new, f"{prefix}{key}.")
        elif old != new:
            keys.append(prefix + key)
    return keys


def refused_changes(before: dict, now: dict, begun: Sequence[str]) -> list[str]:
    """Dotted names of the values that a run cannot go on with.

    Allowed are other machine keys, more rounds, and more steps of the stage that is the last one
    begun; with a decaying learning rate a stage's steps are fixed.

    Args:
      before, now: configs, read from JSON.
      begun: names of the stages that have checkpoints.
    """
    rounds = [before["rounds"], now["rounds"]]
    allowed = list(MACHINE_KEYS)
    if rounds[1]["num_rounds"] > rounds[0]["num_rounds"]:
        allowed.append("rounds.num_rounds")
    if now["optimizer"]["schedule"] == "constant":
        if rounds[1]["baseline_steps"] > rounds[0]["baseline_steps"] and "round_1" not in begun:
            allowed.append("rounds.baseline_steps")
        if rounds[1]["steps_per_round"] > rounds[0]["steps_per_round"] and "round_2" not in begun:
            allowed.append("rounds.steps_per_round")
    return [k for k in differing_keys(before, now) if k not in allowed]
