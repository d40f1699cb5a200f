"""Checkpoints of one stage of a run: the newest and the best, by Orbax.

Of several processes only the first has files, and a manager; the others have None in its place, and
get from the first what it reads.
"""

import contextlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers
from orbax.checkpoint import options as ocp_options

from lclseg import processes
from lclseg.steps import TrainState

UNVALIDATED = -1.0  # below any Dice


def open_stage(folder: Path) -> contextlib.AbstractContextManager[ocp.CheckpointManager | None]:
    """Manager of a stage's checkpoints; use it as a context manager, saves are asynchronous.

    A checkpoint holds `state` (the TrainState) and `progress` (JSON). The newest and the one of
    highest validation Dice stay on disk.
    """
    if not processes.is_first():
        return contextlib.nullcontext()
    folder.mkdir(parents=True, exist_ok=True)
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
        create=False,  # it cannot, for one of several processes
        multiprocessing_options=ocp_options.MultiprocessingOptions(
            active_processes={0} if processes.several() else None
        ),
    )
    return ocp.CheckpointManager(folder.absolute(), options=options)


def latest_step(manager: ocp.CheckpointManager | None) -> int:
    """Step of the newest checkpoint, 0 if there is none."""
    return processes.json_from_first((manager and manager.latest_step()) or 0)


def best_step(manager: ocp.CheckpointManager | None) -> int:
    """Step of the checkpoint of highest validation Dice."""
    return processes.json_from_first(manager and manager.best_step())


def save(
    manager: ocp.CheckpointManager | None,
    step: int,
    state: TrainState,
    progress: dict,
    dice: float | None,
) -> None:
    """Saves a checkpoint; `step` must rise from save to save.

    `dice` is its validation Dice; None: it was not validated, and is never the best one.
    """
    if manager is None:
        return
    dice = UNVALIDATED if dice is None else dice
    if processes.several():  # Orbax refuses JAX arrays that only one process has
        state = jax.tree.map(np.asarray, state)
    items = ocp.args.Composite(
        state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress)
    )
    if not manager.save(step, args=items, metrics={"dice": dice}):
        raise RuntimeError(f"{manager.directory}: checkpoint of step {step} was not saved")


def finish(manager: ocp.CheckpointManager | None) -> None:
    """Waits until everything is on disk."""
    if manager is not None:
        manager.wait_until_finished()


def restore(
    manager: ocp.CheckpointManager | None, step: int, like: TrainState
) -> tuple[TrainState, Any]:
    """State and progress saved at `step`; `like` gives structure, shapes and placement."""
    state, progress = like, None
    if manager is not None:
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(like), progress=ocp.args.JsonRestore()
        )
        restored = manager.restore(step, args=items)
        state, progress = restored["state"], restored["progress"]
    return processes.arrays_from_first(state), processes.json_from_first(progress)
