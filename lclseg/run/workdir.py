"""The JSON and text files of a workdir; each is whole at any moment."""

import fcntl
import importlib.metadata
import json
import logging
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

import jax
from ml_collections import ConfigDict

import lclseg
from lclseg.data.dataset import PreparedSet
from lclseg.data.splits import Split
from lclseg.errors import ConfigError, UserError
from lclseg.run.stored_config import as_now, refused_changes, to_store

# The file that is locked: what it says is for who reads it, the lock itself is the system's.
LOCK = "lock"
logger = logging.getLogger("lclseg")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def new_results(config: ConfigDict, prepared: PreparedSet, split: Split) -> dict:
    """Makes the head of results.json; `results` is filled stage by stage."""
    device = jax.devices()[0]
    return {
        "dataset": prepared.name,
        "description": prepared.description,
        "class_names": list(prepared.class_names),
        "image_size": prepared.image_size,
        "target_spacing_mm": prepared.target_spacing_mm,
        "seed": config.seed,
        "num_labeled": config.data.num_labeled,
        "split": config.data.split,
        "volumes": {role: list(ids) for role, ids in split._asdict().items()},
        # lclseg's own from the code that runs: a checkout need not be installed.
        "versions": {"lclseg": lclseg.__version__}
        | {p: importlib.metadata.version(p) for p in PACKAGES}
        | {"python": platform.python_version()},
        "device": {
            "kind": device.device_kind,
            "platform": device.platform,
            "count": len(jax.devices()),
        },
        "results": {},
    }


class WorkdirError(UserError):
    """A workdir that another process writes into; the message tells which, and the way out."""


def lock(workdir: Path) -> TextIO:
    """Locks a workdir for its one writer; to read it needs no lock.

    The system gives the lock free when the file is closed or the process ends, however it ends.

    Returns:
      The open file.

    Raises:
      WorkdirError: another process has the lock.
    """
    path = workdir / LOCK
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        raise WorkdirError(
            f"{workdir}: {owner} writes into it; wait until it has ended, or end it (the same "
            "command goes on from there), or choose another --workdir"
        ) from None
    except OSError as error:  # a disk that has no locks
        logger.warning(
            "%s: the disk does not lock files (%s); see that no other run writes into this folder",
            workdir,
            error.strerror,
        )
        return file
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    return file


def chosen_stage(stages: Mapping[str, dict]) -> str:
    """Chooses the stage that a run hands out, of results.json's `results`.

    The best by validation Dice, the first of equals; the last where no volume validates.
    """
    dice = {stage: result["best_validation_dice"] for stage, result in stages.items()}
    if None in dice.values():
        return list(stages)[-1]
    return max(dice, key=dice.__getitem__)


def write_json(path: Path, content: dict) -> None:
    """Writes JSON to a file that is whole at any moment."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file that is whole at any moment: a temporary one, then renamed."""
    temporary = path.with_suffix(".partial")
    temporary.write_text(text)
    os.replace(temporary, path)


def forget_lines(path: Path, stage: str, *, after_step: int) -> None:
    """Takes out of metrics.jsonl what a stage that goes on from `after_step` will write again.

    A line that was cut off while it was written goes, too.
    """
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    kept = []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry["stage"] != stage or entry["step"] <= after_step:
            kept.append(line)
    if kept != lines:
        write_text(path, "".join(kept))


def read_json(path: Path) -> dict | None:
    """Reads the file's content, None where there is no file."""
    return json.loads(path.read_text()) if path.exists() else None


def claim_workdir(config: ConfigDict, workdir: Path) -> TextIO:
    """Creates the workdir with the config in it, or checks that its run can go on with this config.

    A run may be longer than it was, and go on elsewhere or on other devices; see `refused_changes`.

    Returns:
      The lock on the workdir; closing it, or the end of the process, gives the folder free.

    Raises:
      ConfigError: the folder holds something else, or a run that cannot go on with this config.
      WorkdirError: another process has it.
    """
    path = workdir / "config.json"
    ours = {"config.partial", LOCK}  # of a run that ended before it began
    if workdir.exists() and not path.exists():
        if any(p.name not in ours for p in workdir.iterdir()):
            raise ConfigError(f"{workdir} is not empty and no lclseg run; choose another --workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    held = lock(workdir)
    content = to_store(config)
    before = read_json(path)
    if before is not None:
        begun = [p.name for p in (workdir / "checkpoints").glob("*")]
        keys = refused_changes(as_now(before), content, begun)
        if keys:
            held.close()
            raise ConfigError(
                f"{workdir} holds a run with other values of {', '.join(keys[:8])}; go on with its "
                "config, or choose another --workdir"
            )
    write_json(path, content)
    return held
