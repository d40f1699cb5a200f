"""A config as it is stored beside a run, and how two of them compare.

Stored are the lists of patients that the run has, not the tables they were chosen from. So a
further split, config key or data set leaves every stored run as it is: a key that is missing stands
for its default, which is what was done before there was the key. A key that no config has any more
is a difference: code without it may do something else.
"""

import contextlib
import functools
import json
import runpy
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from lclseg.data.splits import ROLES, SplitError, choose_lists

# Of the checkout that this code belongs to. A wheel has none: there a key that one side lacks is a
# difference, which refuses too much rather than too little.
CONFIGS = Path(__file__).parents[2] / "configs"
# What the lists are chosen from.
TABLES = ("splits", "pool", "test_patients")
FIRST_METHOD = "local_contrastive"  # of configs from before there was a choice
# What a run may have otherwise when it goes on: where things are, and how often it tells.
MACHINE_KEYS = ("num_cpu_devices", "data.data_dir", "data.manual_dir", "log.every")
# Prefixes of the keys that the baseline does not depend on.
JOINT_ONLY = (
    "num_cpu_devices",
    "data.data_dir",
    "data.manual_dir",
    "data.unlabeled",
    "data.unlabeled_batch_size",
    "method.",
    "crf.",
    "pseudo_labels.",
    "predictions.largest_component",
    "rounds.num_rounds",
    "rounds.steps_per_round",
    "rounds.fresh_heads",
    "rounds.refresh_every",
    "rounds.refresh_slices",
    "rounds.baseline_from",
    "log.",
)


def to_store(config: ConfigDict) -> dict:
    """Makes JSON of the config, with the chosen lists in place of the tables."""
    return as_now(json.loads(config.to_json_best_effort()))


def as_now(stored: dict) -> dict:
    """Brings a config stored at any time to what `to_store` would write; changes no argument.

    Lists are resolved where they can be: own data's are drawn from the folder before they are
    stored. Keys that are missing get their defaults.
    """
    content = json.loads(json.dumps(stored))
    data = content["data"]
    for role in ROLES:
        data.setdefault(role, [])
    with contextlib.suppress(SplitError):
        data.update({role: list(found) for role, found in choose_lists(ConfigDict(data)).items()})
    for table in TABLES:
        data.pop(table, None)
    method = content.setdefault("method", {}).setdefault("name", FIRST_METHOD)
    for name in ("default", data.get("name", "")):
        _fill(content, _defaults(name, method))
    return content


@functools.cache
def _defaults(name: str, method: str) -> dict:
    """What configs/<name>.py gives for a method, without tables; {} where there is no such file."""
    path = CONFIGS / f"{name}.py"
    if not name.isidentifier() or not path.exists():  # it is run: of this folder only
        return {}
    known = (CONFIGS / "methods" / f"{method}.py").exists()
    config = runpy.run_path(str(path))["get_config"](method if known else FIRST_METHOD)
    content = json.loads(config.to_json_best_effort())
    if not known:
        del content["method"]
    for table in TABLES:
        content["data"].pop(table, None)
    return content


def _fill(content: dict, defaults: dict) -> None:
    """Gives the content what it lacks; what is there stays."""
    for key, value in defaults.items():
        if isinstance(value, dict):
            _fill(content.setdefault(key, {}), value)
        else:
            content.setdefault(key, value)


def differing_keys(before: dict, now: dict, prefix: str = "") -> list[str]:
    """Finds the dotted names of values in which two configs, both as `as_now` has them, differ."""
    keys = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            keys += differing_keys(old, new, f"{prefix}{key}.")
        elif old != new or (key in before) != (key in now):
            keys.append(prefix + key)
    return keys


def baseline_differences(before: dict, now: dict, *, by_method: bool) -> list[str]:
    """Finds dotted names of the differing values on which the first stage depends.

    Args:
      before, now: as `as_now` gives them.
      by_method: whether one of the methods trains its first stage its own way, by its options.
    """
    # Where the CRF refines what is validated and tested, the baseline's results depend on it.
    matters = ("method.",) * by_method + ("crf.",) * now["predictions"]["crf"]
    return [
        key
        for key in differing_keys(before, now)
        if not key.startswith(JOINT_ONLY) or key.startswith(matters)
    ]


def refused_changes(before: dict, now: dict, begun: Sequence[str]) -> list[str]:
    """Finds dotted names of the values that a run cannot go on with.

    Allowed are other machine keys, more rounds, and more steps of the stage that is the last one
    begun; with a decaying learning rate a stage's steps are fixed.

    Args:
      before, now: configs as `as_now` gives them.
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
