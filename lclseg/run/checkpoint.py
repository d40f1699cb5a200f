"""Checkpoints of one stage of a run: the newest and the best, by Orbax.

Of several processes only the first has files, and a manager; the others have None in its place, and
get from the first what it reads.
"""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers
from orbax.checkpoint import options as ocp_options

from lclseg.run import multihost
from lclseg.steps import TrainState

UNVALIDATED = -1.0  # below any Dice


@contextlib.contextmanager
def naming(folder: Path) -> Iterator[None]:
    """Turns errors of the disk, raised in the block, into OSErrors that name the folder.

    Those that TensorStore raises while a checkpoint is written are ValueErrors.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror or str(error), str(folder)) from error
    except ValueError as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None:
            raise
        number = int(code[1])
        raise OSError(number, os.strerror(number), str(folder)) from error


@contextlib.contextmanager
def open_stage(folder: Path, *, read_only: bool = False) -> Iterator[ocp.CheckpointManager | None]:
    """Opens the manager of a stage's checkpoints; saves are asynchronous.

    `read_only`: it changes nothing in the folder, where another process may be training.

    A checkpoint holds `state` (the TrainState) and `progress` (JSON). The newest and the one of
    highest validation Dice stay on disk.
    """
    if not multihost.is_first():
        yield None
        return
    if not read_only:
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
            active_processes={0} if multihost.several() else None
        ),
        read_only=read_only,
    )
    with naming(folder):
        manager = ocp.CheckpointManager(folder.absolute(), options=options)
    try:
        yield manager
    except BaseException:
        with contextlib.suppress(Exception):  # a save that failed fails again here
            manager.close()
        raise
    with naming(folder):
        manager.close()


def latest_step(manager: ocp.CheckpointManager | None) -> int:
    """Finds the step of the newest checkpoint, 0 if there is none."""
    return multihost.json_from_first((manager and manager.latest_step()) or 0)


def best(manager: ocp.CheckpointManager | None) -> tuple[int, float]:
    """Finds step and validation Dice of the best checkpoint; 0 and `UNVALIDATED` without one."""
    found = (0, UNVALIDATED)
    if manager is not None and (step := manager.best_step()) is not None:
        found = (step, manager.metrics(step)["dice"])
    step, dice = multihost.json_from_first(found)
    return step, dice


def validation_dice(manager: ocp.CheckpointManager | None, step: int) -> float | None:
    """Reads validation Dice of the checkpoint of a step, None where it was not validated."""
    dice = UNVALIDATED if manager is None else manager.metrics(step)["dice"]
    dice = multihost.json_from_first(dice)
    return dice if dice > UNVALIDATED else None


def chosen(manager: ocp.CheckpointManager | None) -> tuple[int, float | None]:
    """Finds step and validation Dice of the best checkpoint; else the newest, and None."""
    step, dice = best(manager)
    return (step, dice) if dice > UNVALIDATED else (latest_step(manager), None)


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
    if multihost.several():  # Orbax refuses JAX arrays that only one process has
        state = jax.tree.map(np.asarray, state)
    # Orbax finds a full disk in its threads, after the fact, and tells by the page. It writes
    # everything twice, besides some small files.
    finish(manager)  # as `save` itself would: what is under way needs room, too
    needed = 2 * sum(x.nbytes for x in jax.tree.leaves(state)) + 2**18
    if shutil.disk_usage(manager.directory).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(manager.directory))
    items = ocp.args.Composite(
        state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress)
    )
    with naming(manager.directory):
        saved = manager.save(step, args=items, metrics={"dice": dice})
    if not saved:
        raise RuntimeError(f"{manager.directory}: checkpoint of step {step} was not saved")


def finish(manager: ocp.CheckpointManager | None) -> None:
    """Waits until everything is on disk."""
    if manager is not None:
        with naming(manager.directory):
            manager.wait_until_finished()


def restore(
    manager: ocp.CheckpointManager | None, step: int, like: TrainState
) -> tuple[TrainState, Any]:
    """Restores state and progress saved at `step`; `like` gives structure, shapes and placement."""
    state, progress = like, None
    if manager is not None:
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(like), progress=ocp.args.JsonRestore()
        )
        restored = manager.restore(step, args=items)
        state, progress = restored["state"], restored["progress"]
    return multihost.arrays_from_first(state), multihost.json_from_first(progress)
