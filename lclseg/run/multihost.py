"""Several processes that train together, and what they tell each other.

All run the same program on the same numbers, so that they take every step and every decision
alike. Each has its share of the batches, of the slices to predict and of the devices; what one of
them alone knows (files, a signal) it tells the others here. Only the first process has the workdir:
no shared disk is needed. With one process every function here is the identity.
"""

import contextlib
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from lclseg.errors import ConfigError

# A process that has not been heard of for so long is dead, and the others end.
HEARTBEAT_TIMEOUT_S = 60
PREPARING_TIMEOUT_S = 24 * 3600
# How many tasks a launcher started: Slurm, Open MPI, MPICH and Intel MPI. A lone one keeps all
# devices of its host; JAX would give it one.
TASKS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
SETTINGS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def settings(environment: Mapping[str, str] = os.environ) -> dict:
    """Reads the variables `SETTINGS` as arguments of `connect`; {} where none is set.

    Raises:
      ConfigError: some of the variables are missing or wrong.
    """
    given = {name: environment[name] for name in SETTINGS if environment.get(name)}
    missing = [name for name in SETTINGS if name not in given]
    if not given:
        return {}
    if missing:
        raise ConfigError(
            f"{', '.join(given)} set, but not {', '.join(missing)}; set all three, or none of them"
        )
    address, count, index = given.values()
    if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
        raise ConfigError(
            f"JAX_NUM_PROCESSES is {count!r} and JAX_PROCESS_ID {index!r}; wanted whole numbers, "
            "the second from 0 to one less than the first"
        )
    return {
        "coordinator_address": address,
        "num_processes": int(count),
        "process_id": int(index),
    }


def connect(**given: Any) -> None:
    """Joins the other processes of a cluster: one that is given, or one that JAX detects.

    JAX detects TPU pods, Slurm (srun) and Open MPI. Without a cluster nothing happens. Runs before
    JAX's first computation.

    Raises:
      ConfigError: a launcher started several tasks, and JAX does not detect their cluster. Each
        would train alone, and all write into one workdir.
    """
    alone = not given and {os.environ.get(name, "1") for name in TASKS} == {"1"}
    alone = alone and any(name in os.environ for name in TASKS)
    if alone or jax.distributed.is_initialized():
        return
    try:
        jax.distributed.initialize(**given, heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S)
    except ValueError as error:
        if given or "coordinator_address" not in str(error):
            raise
        for name in TASKS:
            if os.environ.get(name, "1") != "1":
                raise ConfigError(
                    f"{name} is {os.environ[name]}, but JAX finds no cluster of so many tasks. "
                    f"Start them with srun or a mpirun that JAX knows, or tell each of them "
                    f"{', '.join(SETTINGS)}; to train in one process only, start one with {name}=1"
                ) from error


def several() -> bool:
    """Tells whether several processes train together."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Tells whether this process is the first, which writes files."""
    return jax.process_index() == 0


def devices() -> list[jax.Device] | None:
    """Lists all devices, a process' side by side; None, JAX's own order, in a single process."""
    if not several():
        return None
    return sorted(jax.devices(), key=lambda d: (d.process_index, d.id))


@contextlib.contextmanager
def first_goes_first() -> Iterator[None]:
    """Runs the block in the first process, then in the others, which find what it prepared.

    They wait on the coordinator, for up to a day: no backend's time limit for operations applies.
    """
    if several() and not is_first():
        _wait()
    yield
    if several() and is_first():
        _wait()


def _wait() -> None:
    wait = multihost.get_barrier_sync_fn()
    wait(key="lclseg_first_goes_first", timeout_ms=PREPARING_TIMEOUT_S * 1000)


@contextlib.contextmanager
def own_workdir(workdir: Path) -> Iterator[Path]:
    """Gives the workdir to the first process, to others a temporary folder that nobody reads."""
    if not several() or is_first():
        yield workdir
        return
    with tempfile.TemporaryDirectory(prefix="lclseg-") as folder:
        yield Path(folder) / "run"


def arrays_from_first(tree: Any) -> Any:
    """Gives every process the first one's arrays; shapes and dtypes must be the same everywhere."""
    return multihost_utils.broadcast_one_to_all(tree) if several() else tree


def bytes_from_first(content: bytes) -> bytes:
    """Gives every process the first one's bytes."""
    if not several():
        return content
    size = int(arrays_from_first(np.array(len(content), np.int32)))
    buffer = np.zeros(size, np.uint8)
    if is_first():
        buffer[:] = np.frombuffer(content, np.uint8)
    return arrays_from_first(buffer).tobytes()


def json_from_first(value: Any) -> Any:
    """Gives every process the first one's value, of what JSON can hold."""
    if not several():
        return value
    return json.loads(bytes_from_first(json.dumps(value).encode()))


def file_from_first(path: Path) -> None:
    """Writes the first process' file to the same path below the others' own workdirs."""
    if not several():
        return
    content = bytes_from_first(path.read_bytes() if is_first() else b"")
    if not is_first():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def any_process(flag: bool) -> bool:
    """Tells whether the flag is set in any process; all must ask at the same place."""
    if not several():
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def share(rows: np.ndarray) -> np.ndarray:
    """Takes this process' part of a global batch [B, ...], B a multiple of their number."""
    return np.split(rows, jax.process_count())[jax.process_index()]


def predict_together(predict: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """Predicts slices -> probabilities, each process its part, for all of them.

    Of several arguments each has an entry for every slice.
    """
    if not several():
        return predict

    def own_part(array: np.ndarray) -> np.ndarray:
        padding = np.repeat(array[-1:], -len(array) % jax.process_count(), axis=0)
        return share(np.concatenate([array, padding]))

    def together(*arrays: np.ndarray) -> np.ndarray:
        own = predict(*map(own_part, arrays))
        return multihost_utils.process_allgather(own, tiled=True)[: len(arrays[0])]

    return together


def end(message: str) -> NoReturn:
    """Ends the process with a message and exit status 1, at once.

    Python's own way out waits for other processes, and for threads that may write to a full disk.
    """
    print(message, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Ends one of several processes at once on an error, which ends the others.

    Ending as Python does would wait for processes that in turn wait for this one.
    """
    try:
        yield
    except BaseException as error:
        if not several() or (isinstance(error, SystemExit) and not error.code):
            raise
        where = f"process {jax.process_index()} of {jax.process_count()}"
        if isinstance(error, SystemExit):
            message = f"{where}: {error.code}"
        elif isinstance(error, jax.errors.JaxRuntimeError):
            message = (
                f"{where}: lclseg: a computation over all processes failed, most likely because "
                f"another process ended; see its messages first. The same command, started again "
                f"everywhere, goes on from the last checkpoint. ({str(error)[:300]})"
            )
        else:
            message = traceback.format_exc()
        end(message)
