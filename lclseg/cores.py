"""How many CPU cores there are to use."""

import os


def usable_cores() -> int:
    """Returns the number of CPU cores that this process may use, at least 1.

    Where an affinity mask allows fewer than the machine has, as in containers and under Slurm, it
    is those of the mask. macOS has no such masks.
    """
    if hasattr(os, "process_cpu_count"):  # Python 3.13 and newer
        return os.process_cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
