"""Checkpoints of one stage of a run: the newest and the best, by Orbax."""

from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from lclseg.steps import TrainState

UNVALIDATED = -1.0  # below any Dice


def open_stage(folder: Path, *, read_only: bool = False) -> ocp.CheckpointManager:
    """Manager of a stage's checkpoints; use it as a context manager, saves are asynchronous.

    `read_only`: it changes nothing in the folder, where another process may be training.

    A checkpoint holds `state` (the TrainState) and `progress` (JSON). The newest and the one of
    highest validation Dice stay on disk.
    """
    policy = checkpoint_managers.AnyPreservationPolicy(
        [
            checkpoint_managers.LatestN(1),
            checkpoint_managers.BestN(get_metric_fn=lambda metrics: metrics["dice"], n=1),
        ]
    )
    options = ocp.CheckpointManagerOptions(
        best_fn=lambda metrics: metrics["dice"],
        best_mode="max",
        preservation_policy=policy,
        read_only=read_only,
    )
    return ocp.CheckpointManager(folder.absolute(), options=options)


def save(
    manager: ocp.CheckpointManager,
    step: int,
    state: TrainState,
    progress: dict,
    dice: float | None,
) -> None:
    """Saves a checkpoint; `step` must rise from save to save.

    `dice` is its validation Dice; None: it was not validated, and is never the best one.
    """
    dice = UNVALIDATED if dice is None else dice
    items = ocp.args.Composite(
        state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress)
    )
    if not manager.save(step, args=items, metrics={"dice": dice}):
        raise RuntimeError(f"{manager.directory}: checkpoint of step {step} was not saved")


def restore(manager: ocp.CheckpointManager, step: int, like: TrainState) -> tuple[TrainState, Any]:
    """State and progress saved at `step`; `like` gives structure, shapes and placement."""
    items = ocp.args.Composite(
        state=ocp.args.StandardRestore(like), progress=ocp.args.JsonRestore()
    )
    restored = manager.restore(step, args=items)
    return restored["state"], restored["progress"]
