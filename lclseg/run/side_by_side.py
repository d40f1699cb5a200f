"""Commands side by side, each with one device of this machine: how a sweep fills it.

A process a run: a run that fails takes nobody along, and each has its device to itself, without
all-reduces. Imports no JAX: the device is chosen before a command's JAX sees any.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from lclseg.cores import usable_cores

POLL_SECONDS = 0.2
COUNT = "import jax; print(jax.default_backend(), jax.local_device_count())"


class Job(NamedTuple):
    """A command to run once.

    Attributes:
      name: of the job.
      command: program and arguments.
      log: file that takes what it prints, appended to.
      after: names of jobs that must have ended before, whether well or not.
    """

    name: str
    command: Sequence[str]
    log: Path
    after: Sequence[str] = ()


def devices_here() -> tuple[str, int]:
    """Finds JAX's platform, "cpu", "gpu" or "tpu", and its devices; of CPUs the cores.

    Asked of another process, which ends: this one leaves the devices to the jobs.
    """
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"JAX finds no device: {done.stderr.strip().splitlines()[-1]}")
    platform, number = done.stdout.split()
    return platform, usable_cores() if platform == "cpu" else int(number)


def environment(platform: str, device: int) -> dict[str, str]:
    """Makes the variables that show a process one device alone."""
    if platform == "gpu":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else []
        return {"CUDA_VISIBLE_DEVICES": names[device] if names else str(device)}
    if platform == "tpu":
        return {
            "TPU_VISIBLE_CHIPS": str(device),
            "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1",
            "TPU_PROCESS_BOUNDS": "1,1,1",
        }
    return {}


def _pin(platform: str, device: int) -> Callable[[], None] | None:
    """What a CPU job does first: it keeps to one core, so that it is what it would be alone."""
    if platform != "cpu" or not hasattr(os, "sched_setaffinity"):
        return None
    core = sorted(os.sched_getaffinity(0))[device]
    return lambda: os.sched_setaffinity(0, {core})


def run_side_by_side(
    jobs: Sequence[Job],
    *,
    platform: str,
    num_devices: int,
    stop_asked: Callable[[], bool] = lambda: False,
    ended: Callable[[str, int], None] = lambda name, status: None,
) -> dict[str, int]:
    """Runs the jobs, at most one per device at a time, in their order as far as they need no other.

    Args:
      jobs: each name once; a job may only name earlier ones in `after`.
      platform: see `devices_here`.
      num_devices: how many run at a time.
      stop_asked: where it gives True, nothing new is begun, and running jobs get SIGTERM once, on
        which they save what they have.
      ended: called with name and exit status of each job as it ends.

    Returns:
      Exit statuses by name, of the jobs that ran.
    """
    waiting, status = list(jobs), {}
    running: dict[str, tuple[subprocess.Popen, IO[str], int]] = {}
    free = list(range(num_devices))
    told_to_stop = False
    while waiting or running:
        if stop_asked() and not told_to_stop:
            told_to_stop, waiting = True, []
            for process, _, _ in running.values():
                process.send_signal(signal.SIGTERM)
        ready = [j for j in waiting if all(name in status for name in j.after)]
        while ready and free:
            job, device = ready.pop(0), free.pop(0)
            waiting.remove(job)
            running[job.name] = (*_start(job, platform, device), device)
        for name, (process, log, device) in list(running.items()):
            code = process.poll()
            if code is not None:
                log.close()
                del running[name]
                free = sorted([*free, device])
                status[name] = code
                ended(name, code)
        time.sleep(POLL_SECONDS)
    return status


def _start(job: Job, platform: str, device: int) -> tuple[subprocess.Popen, IO[str]]:
    """The process of a job on a device, and its open log."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    log = job.log.open("a")
    variables: Mapping[str, str] = environment(platform, device)
    process = subprocess.Popen(
        list(job.command),
        env={**os.environ, **variables},
        stdout=log,
        stderr=subprocess.STDOUT,
        # Its own group: Ctrl-C on the terminal reaches this process alone, which hands it on.
        start_new_session=True,
        preexec_fn=_pin(platform, device),
    )
    return process, log
