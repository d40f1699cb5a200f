"""A model of a run, as a rule its best, with all that a prediction needs beside it."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from lclseg import steps
from lclseg.class_groups import Kind, classes_of, names_of
from lclseg.data import preprocess
from lclseg.data.dataset import open_builder, preprocessing_of
from lclseg.data.preprocess import Preprocessing
from lclseg.errors import UserError
from lclseg.methods.base import base_of, method_of
from lclseg.models import UNet
from lclseg.run import checkpoint
from lclseg.run.programs import copy_angles, first_method, make_optimizer
from lclseg.run.workdir import chosen_stage, read_json

LAST = "last"  # in place of a stage's name: the newest weights of the last one
PARTS = ("unet_trunk", "segmentation_head")  # of the network; a prediction needs no other


class ModelError(UserError):
    """A model that cannot be loaded or used; the message names it, found, wanted and way out."""


class TrainedModel(NamedTuple):
    """A model ready to predict.

    Attributes:
      source: folder that it comes from.
      preprocessing: what a volume goes through before it, and what its classes are called.
      architecture: {"filters": [...], "dtype": str} of the U-Net.
      batch_size: slices at once.
      largest_component: classes of which a prediction keeps the largest component alone.
      angles: radians, of the copies whose mean a prediction is; (): of none, see `test_time`.
      crf: settings of the CRF that refines that mean, see `crf.dense_crf`; {}: none does.
      crf_upsampling: how many times its grid is as fine as the training grid.
      through_plane_sigma: mm, how far predictions are smoothed across slices, see `through_plane`.
      state: averaged weights and BatchNorm's statistics of trunk and segmentation head; nothing
        that only training needs. Of several networks those of the first.
      facts: JSON-ready, where the model comes from: see `_facts`.
    """

    source: Path
    preprocessing: Preprocessing
    architecture: dict
    batch_size: int
    largest_component: tuple[Kind, ...]
    angles: tuple[float, ...]
    crf: dict[str, float]
    crf_upsampling: int
    through_plane_sigma: float
    state: steps.TrainState
    facts: dict


def unet(preprocessing: Preprocessing, architecture: dict) -> UNet:
    """Makes the U-Net of a trained model, with the segmentation head alone."""
    return UNet(
        num_classes=len(preprocessing.class_names) + 1,
        filters=tuple(architecture["filters"]),
        dtype=architecture["dtype"],
    )


def inference_state(params: dict, batch_stats: dict) -> steps.TrainState:
    """Makes a state that predicts and cannot be trained, with the segmentation's head alone."""
    return steps.TrainState(
        step=jnp.zeros((), jnp.int32),
        stage=jnp.zeros((2,), jnp.int32),
        params={},
        batch_stats={name: batch_stats[name] for name in PARTS},
        opt_state=(),
        ema_params={name: params[name] for name in PARTS},
    )


def load_run(workdir: Path, stage: str | None = None) -> TrainedModel:
    """Loads the model of a run that is handed out, or that of a stage.

    Without `stage`: highest validation Dice of all stages that have a checkpoint. Where the run
    has no validation volumes: the last weights of the last finished stage.

    The run may be unfinished, even under way: nothing is changed in its folder.

    Args:
      workdir: of the run.
      stage: "baseline", "joint" or "round_<k>": the best of that one, or its last without
        validation; "last": the newest weights of the last stage, whatever their validation Dice.

    Raises:
      ModelError: no run, no such stage, none of its checkpoints has been validated, or one that
        this version cannot read.
    """
    content = read_json(workdir / "config.json")
    if content is None:
        raise ModelError(
            f"{workdir}: found neither config.json nor model.json; wanted the --workdir of a run, "
            "or a folder that lclseg.export wrote"
        )
    if "method" not in content:
        raise ModelError(
            f"{workdir}/config.json has no method: it is of a run of an earlier lclseg; export the "
            "model with the version that results.json names, and give the exported folder"
        )
    config = ConfigDict(content)
    stage, step, dice = _find_checkpoint(workdir, stage)
    how = _preprocessing(workdir, config)
    architecture = {"filters": list(config.model.filters), "dtype": config.model.dtype}
    num_classes = len(how.class_names) + 1
    method = method_of(config, num_classes)
    if stage == "baseline":
        method = first_method(method, base_of(config, num_classes))
    like = steps.create_train_state(
        jax.random.key(0),
        unet(how, architecture).clone(heads=method.heads),
        make_optimizer(config.optimizer, num_steps=1),  # which does not shape its state
        image_size=how.image_size,
        networks=method.networks,
        init_memory=method.init_memory,
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
    if method.networks > 1:
        state = steps.first_network(state)
    return TrainedModel(
        source=workdir,
        preprocessing=how,
        architecture=architecture,
        batch_size=config.data.eval_batch_size,
        largest_component=_largest_component(workdir, how),
        angles=copy_angles(config) if _predictions(config, "test_time_augmentation") else (),
        crf=dict(config.crf) if _predictions(config, "crf") else {},
        crf_upsampling=int(_predictions(config, "crf_upsampling") or 1),
        through_plane_sigma=float(_predictions(config, "through_plane_sigma")),
        state=inference_state(state.ema_params, state.batch_stats),
        facts=_facts(workdir, config, stage, step, dice),
    )


def _find_checkpoint(workdir: Path, stage: str | None) -> tuple[str, int, float | None]:
    """Stage, step and validation Dice of the checkpoint that `load_run` wants."""
    stages = _stages(workdir)
    if stage is not None and stage != LAST and stage not in stages:
        raise ModelError(
            f"{workdir}: found no checkpoint of the stage {stage!r}; wanted one of "
            f"{', '.join([*stages, LAST])}"
        )
    roles = read_json(workdir / "splits.json") or {}
    if stage == LAST or roles.get("validation") == []:
        return _newest_checkpoint(workdir, stage, stages)
    found = {}
    for name in [stage] if stage else stages:
        with checkpoint.open_stage(workdir / "checkpoints" / name, read_only=True) as manager:
            step, dice = checkpoint.best(manager)
        if dice > checkpoint.UNVALIDATED:
            found[name] = step, dice
    if not found:
        raise ModelError(
            f"{workdir}: no validated checkpoint of {stage or 'any stage'} in it yet; wanted one "
            "at least: let the run reach its first validation (rounds.eval_every)"
        )
    name = chosen_stage({name: {"best_validation_dice": dice} for name, (_, dice) in found.items()})
    return name, *found[name]


def _newest_checkpoint(
    workdir: Path, stage: str | None, stages: Sequence[str]
) -> tuple[str, int, float | None]:
    """The newest of a stage; of `LAST`: of the last stage; of None: of the last finished one."""
    finished = (read_json(workdir / "results.json") or {}).get("results", {})
    if stage is None:
        stages = [s for s in stages if s in finished] or stages[:1]
    elif stage != LAST:
        stages = [stage]
    for name in reversed(stages):
        with checkpoint.open_stage(workdir / "checkpoints" / name, read_only=True) as manager:
            step = checkpoint.latest_step(manager)
            if step:
                return name, step, checkpoint.validation_dice(manager, step)
    raise ModelError(
        f"{workdir}: no checkpoint in it yet; wanted one at least: let the run reach its first one "
        "(rounds.eval_every)"
    )


def _stages(workdir: Path) -> list[str]:
    """Names of the stages that have a folder of checkpoints, in the order of training."""
    names = {p.name for p in (workdir / "checkpoints").glob("*") if p.is_dir()}
    rounds = sorted(int(n[1]) for name in names if (n := re.fullmatch(r"round_(\d+)", name)))
    return [s for s in ("baseline", "joint", *(f"round_{k}" for k in rounds)) if s in names]


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


def class_numbers(names: Any, how: Preprocessing, source: str) -> tuple[Kind, ...]:
    """Reads the classes 1, 2, ... of which a file says that the largest component is kept.

    Several taken together come first; see `components.largest_component`.

    Raises:
      ModelError: not a list of different names of classes.
    """
    known = how.class_names
    try:
        if not isinstance(names, list) or len(set(names)) != len(names):
            raise ValueError
        found = classes_of(names, known)
    except (ValueError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{source}: largest_component is {names!r}; wanted a list of some of the classes "
            f"{', '.join(known)}, each once, or of several joined by ' + ': mend it, or [] to keep "
            "every component"
        ) from error
    return tuple(sorted(found, key=lambda kind: (not isinstance(kind, tuple), kind)))


def kept_largest(model: TrainedModel) -> list[str]:
    """Names the classes of which a model's predictions keep the largest component."""
    return names_of(model.largest_component, model.preprocessing.class_names)


def _largest_component(workdir: Path, how: Preprocessing) -> tuple[Kind, ...]:
    """What the run recorded; none of a run that did not yet do so."""
    path = workdir / "postprocessing.json"
    content = read_json(path)
    if content is None:
        return ()
    names = content.get("largest_component") if isinstance(content, dict) else content
    return class_numbers(names, how, str(path))


def _predictions(config: ConfigDict, option: str) -> bool | float:
    """An option of the run's predictions; off in a run from before there was such."""
    return config.get("predictions", {}).get(option, False)


def _facts(workdir: Path, config: ConfigDict, stage: str, step: int, dice: float | None) -> dict:
    """Where a model comes from.

    Keys: "dataset", "description", "stage", "step", "validation_dice" (None: not validated),
    "num_labeled", "split", "seed", "method"; "num_volumes", {role: int}, and "versions", None
    before the run's first test; "test", its means (see `evaluation.evaluate`, without volumes),
    None where this checkpoint is not tested.
    """
    results = read_json(workdir / "results.json") or {}
    tested = results.get("results", {}).get(stage, {})
    test = None
    # A stage may have become longer since, and better.
    if step == tested.get("num_steps") and "test_last" in tested:
        test = tested["test_last"]
    elif dice is not None and dice == tested.get("best_validation_dice"):
        test = tested["test"]
    test = test and _means(test)
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
        "method": config.method.name,
        "num_volumes": volumes and {role: len(ids) for role, ids in volumes.items()},
        "versions": results.get("versions"),
        "test": test,
    }


def _means(summary: dict) -> dict:
    """Without what tells of single volumes, whose ids are patients'; likewise within."""
    return {
        key: _means(value) if key == "largest_component" else value
        for key, value in summary.items()
        if key != "per_volume"
    }
