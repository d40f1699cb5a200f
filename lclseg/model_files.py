"""The best model of a run, with all that a prediction needs beside it."""

import re
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from lclseg import steps
from lclseg.data import preprocess
from lclseg.data.dataset import open_builder, preprocessing_of
from lclseg.data.preprocess import Preprocessing
from lclseg.models import UNet
from lclseg.run import checkpoint
from lclseg.run.setup import make_optimizer
from lclseg.run.workdir import read_json


class ModelError(ValueError):
    """A model that cannot be loaded or used; the message names it, found, wanted and way out."""


class TrainedModel(NamedTuple):
    """A model ready to predict.

    Attributes:
      source: folder that it comes from.
      preprocessing: what a volume goes through before it, and what its classes are called.
      architecture: {"filters": [...], "embedding_dim": int, "dtype": str} of the U-Net.
      batch_size: slices at once.
      state: averaged weights and BatchNorm's statistics; nothing that only training needs.
      facts: JSON-ready, where the model comes from: see `_facts`.
    """

    source: Path
    preprocessing: Preprocessing
    architecture: dict
    batch_size: int
    state: steps.TrainState
    facts: dict


def unet(preprocessing: Preprocessing, architecture: dict) -> UNet:
    """The U-Net of a trained model."""
    return UNet(
        num_classes=len(preprocessing.class_names) + 1,
        filters=tuple(architecture["filters"]),
        embedding_dim=architecture["embedding_dim"],
        dtype=architecture["dtype"],
    )


def inference_state(params: dict, batch_stats: dict) -> steps.TrainState:
    """A state that can predict, and cannot be trained."""
    return steps.TrainState(
        step=jnp.zeros((), jnp.int32),
        params={},
        batch_stats=batch_stats,
        opt_state=(),
        ema_params=params,
    )


def load_run(workdir: Path, stage: str | None = None) -> TrainedModel:
    """The best model of a run: highest validation Dice of all stages that have a checkpoint.

    With `stage`, "baseline" or "round_<k>": the best of that one.

    The run may be unfinished, even under way: nothing is changed in its folder.

    Raises:
      ModelError: no run, none of its checkpoints has been validated, or one that this version
        cannot read.
    """
    content = read_json(workdir / "config.json")
    if content is None:
        raise ModelError(
            f"{workdir}: found neither config.json nor model.json; wanted the --workdir of a run, "
            "or a folder that lclseg.export wrote"
        )
    config = ConfigDict(content)
    stage, step, dice = _best_checkpoint(workdir, stage)
    how = _preprocessing(workdir, config)
    architecture = {
        "filters": list(config.model.filters),
        "embedding_dim": config.model.embedding_dim,
        "dtype": config.model.dtype,
    }
    like = steps.create_train_state(
        jax.random.key(0),
        unet(how, architecture),
        make_optimizer(config.optimizer, 1),
        image_size=how.image_size,
        num_channels=how.num_channels,
    )
    folder = workdir / "checkpoints" / stage
    try:
        with checkpoint.open_stage(folder, read_only=True) as manager:
            state, _ = checkpoint.restore(manager, step, like)
    except Exception as error:  # Orbax raises many types, with pages of text
        reason = str(error).strip().partition("\n")[0][:200]
        raise ModelError(
            f"{folder}: the checkpoint of step {step} is damaged, or of another version of lclseg "
            f"({type(error).__name__}: {reason})"
        ) from error
    return TrainedModel(
        source=workdir,
        preprocessing=how,
        architecture=architecture,
        batch_size=config.data.eval_batch_size,
        state=inference_state(state.ema_params, state.batch_stats),
        facts=_facts(workdir, config, stage, step, dice),
    )


def _best_checkpoint(workdir: Path, only: str | None) -> tuple[str, int, float]:
    """Stage, step and validation Dice; of equals, the earliest stage, as the run chooses."""
    folders = [p for p in (workdir / "checkpoints").glob(only or "*") if p.is_dir()]
    rounds = {
        int(number[1]): p.name
        for p in folders
        if (number := re.fullmatch(r"round_(\d+)", p.name)) is not None
    }
    stages = [p.name for p in folders if p.name == "baseline"]
    stages += [rounds[number] for number in sorted(rounds)]
    found = []
    for stage in stages:
        with checkpoint.open_stage(workdir / "checkpoints" / stage, read_only=True) as manager:
            step, dice = checkpoint.best(manager)
        if dice > checkpoint.UNVALIDATED:
            found.append((stage, step, dice))
    if not found:
        raise ModelError(
            f"{workdir}: no validated checkpoint of {only or 'any stage'} in it yet; wanted one at "
            "least: let the run reach its first validation (rounds.eval_every)"
        )
    return max(found, key=lambda f: f[2])


def _preprocessing(workdir: Path, config: ConfigDict) -> Preprocessing:
    """What the run recorded; of a run that did not yet do so, what the builder's code says."""
    path = workdir / "preprocessing.json"
    content = read_json(path)
    if content is not None:
        try:
            return preprocess.from_json(content, str(path))
        except ValueError as error:
            raise ModelError(str(error)) from error
    builder = open_builder(
        config.data.name,
        image_size=config.data.image_size,
        target_spacing_mm=config.data.target_spacing_mm,
        data_dir=config.data.data_dir,
        n4_shrink_factor=config.data.get("n4_shrink_factor", 0),
    )
    return preprocessing_of(builder)


def _facts(workdir: Path, config: ConfigDict, stage: str, step: int, dice: float) -> dict:
    """Where a model comes from.

    Keys: "dataset", "description", "stage", "step", "validation_dice", "num_labeled", "split",
    "seed"; "num_volumes", {role: int}, and "versions", None before the run's first test; "test",
    its means (see `metrics.summarize`, without volumes), None where this checkpoint is not tested.
    """
    results = read_json(workdir / "results.json") or {}
    tested = results.get("results", {}).get(stage)
    test = None
    # A stage may have become longer since, and better.
    if tested is not None and tested["best_validation_dice"] == dice:
        test = {k: v for k, v in tested["test"].items() if k != "per_volume"}
    volumes = results.get("volumes")
    return {
        "dataset": config.data.name,
        "description": results.get("description", ""),
        "stage": stage,
        "step": step,
        "validation_dice": dice,
        "num_labeled": config.data.num_labeled,
        "split": config.data.split,
        "seed": config.seed,
        "num_volumes": volumes and {role: len(ids) for role, ids in volumes.items()},
        "versions": results.get("versions"),
        "test": test,
    }
