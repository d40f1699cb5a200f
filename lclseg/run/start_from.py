"""Starting from the weights of another run: whether they fit, and whether its masks leak."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from lclseg.data.dataset import PreparedSet
from lclseg.data.splits import Split
from lclseg.errors import ConfigError
from lclseg.methods.base import method_of
from lclseg.run import multihost
from lclseg.run.programs import stages
from lclseg.run.stored_config import as_now, baseline_differences, to_store
from lclseg.run.workdir import read_json, write_json

ARCHITECTURE = ("filters", "embedding_dim")  # of config.model: they fix the weights' shapes


class Source(NamedTuple):
    """A run that another one starts from: its folder, and its JSON files."""

    workdir: Path
    config: dict
    preprocessing: dict
    splits: dict


def read_source(config: ConfigDict) -> Source | None:
    """Reads the run that `rounds.start_from` names, None where it is empty; prepares nothing.

    Raises:
      ConfigError: no run there, another architecture, a baseline from elsewhere too, or several
        processes.
    """
    name = config.rounds.start_from
    if not name:
        return None
    workdir = Path(name).expanduser().absolute()
    if config.rounds.baseline_from:
        raise ConfigError(
            "rounds.start_from and rounds.baseline_from are both set; wanted one: the first starts "
            "a baseline from weights, the second takes a finished baseline over"
        )
    if multihost.several():
        raise ConfigError("rounds.start_from needs one process; found several: start the run alone")
    theirs, preprocessing, splits = (
        read_json(workdir / f"{n}.json") for n in ("config", "preprocessing", "splits")
    )
    if theirs is None or preprocessing is None or splits is None:
        raise ConfigError(
            f"rounds.start_from: found no run in {workdir}; wanted a --workdir with config.json, "
            "preprocessing.json and splits.json"
        )
    ours = json.loads(config.model.to_json_best_effort())
    for key in ARCHITECTURE:
        if theirs["model"][key] != ours[key]:
            raise ConfigError(
                f"rounds.start_from: the run in {workdir} has model.{key} {theirs['model'][key]}, "
                f"this one {ours[key]}; wanted the same: set --config.model.{key}"
            )
    return Source(workdir, theirs, preprocessing, splits)


def check_source(
    source: Source | None, prepared: PreparedSet, split: Split, *, networks: int
) -> None:
    """Raises ConfigError where classes differ, or the source has learnt from what this run tests.

    And where the method trains several networks, which must not start alike. None: there is no
    source, and nothing to check.
    """
    if source is None:
        return
    if networks > 1:
        raise ConfigError(
            f"rounds.start_from: the method trains {networks} networks, which learn from their "
            "differences; wanted a method of one network: weights of a run would make them alike"
        )
    theirs = tuple(source.preprocessing["class_names"])
    if theirs != prepared.class_names:
        raise ConfigError(
            f"rounds.start_from: the run in {source.workdir} has the classes {', '.join(theirs)}, "
            f"this one {', '.join(prepared.class_names)}; wanted the same, in the same order"
        )
    channels = max(1, len(source.preprocessing.get("channels", ())))  # older runs name none
    if channels != prepared.preprocessing.num_channels:
        raise ConfigError(
            f"rounds.start_from: the run in {source.workdir} has images of {channels} channel(s), "
            f"this one of {prepared.preprocessing.num_channels}; wanted as many: set data.channels"
        )
    if source.config["data"]["name"] != prepared.name:
        return
    learnt = set(source.splits["labeled"])
    for role in ("validation", "test"):
        leaks = sorted(learnt & set(getattr(split, role)))
        if leaks:
            raise ConfigError(
                f"rounds.start_from: the run in {source.workdir} has learnt from the masks of "
                f"{', '.join(leaks[:8])}, which are this run's {role} volumes; take them out of "
                f"data.{role}"
            )


def other_baseline(theirs: dict, ours: dict) -> list[str]:
    """Finds the dotted names of values by which two stored configs have different baselines."""
    configs = [ConfigDict(content) for content in (theirs, ours)]
    methods = [method_of(config, num_classes=2) for config in configs]
    by_method = any(method.pretraining is not None for method in methods)
    keys = baseline_differences(theirs, ours, by_method=by_method)
    # Of a method that learns from labelled slices alone the steps of all stages are the baseline's.
    steps = {stages(*both)[0].num_steps for both in zip(configs, methods, strict=True)}
    return keys if len(steps) == 1 else [*keys, "method.name"]


def take_over_baseline(config: ConfigDict, workdir: Path, results: dict) -> None:
    """Copies the finished baseline of `rounds.baseline_from`, another workdir, into this run.

    Raises:
      ConfigError: no finished baseline there, or one of another config.
    """
    source = Path(config.rounds.baseline_from).expanduser()
    theirs = read_json(source / "results.json")
    if theirs is None or "baseline" not in theirs["results"]:
        raise ConfigError(f"rounds.baseline_from: no finished baseline in {source}")
    stored = json.loads((source / "config.json").read_text())
    keys = other_baseline(as_now(stored), to_store(config))
    if keys:
        raise ConfigError(
            f"rounds.baseline_from: the baseline in {source} has other values of "
            f"{', '.join(keys[:8])}"
        )
    for folder in ("checkpoints/baseline", "predictions/baseline"):
        if not (source / folder).exists():  # predictions, where there is nothing to test on
            continue
        shutil.copytree(source / folder, workdir / folder, dirs_exist_ok=True)
    results["results"]["baseline"] = theirs["results"]["baseline"]
    write_json(workdir / "results.json", results)
