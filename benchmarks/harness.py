"""What the benchmarks share: peers in processes of their own, alternating repeats, one table.

Nothing here imports JAX or PyTorch: each peer loads its own, so that thread pools do not fight.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from lclseg.cores import usable_cores

CORES = usable_cores()
ROOT = Path(__file__).parents[1]
# As run.sh has it. PyTorch gets it too.
ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def parser(doc: str, *, repeats: int = 5) -> argparse.ArgumentParser:
    """Options that all benchmarks have; `doc` is the module's docstring."""
    result = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--repeats", type=int, default=repeats, help="timed repeats of each peer")
    result.add_argument("--threads", type=int, default=CORES, help="of each peer")
    result.add_argument("--json", type=Path, help="write the table to this file as well")
    return result


def alternate(peers: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Median seconds of each peer, timed in turns: A B A B ..., so that all see the same machine.

    A peer is a function that does its work once and returns the seconds that this took. One
    untimed turn goes ahead.
    """
    seconds = {name: [] for name in peers}
    for repeat in range(repeats + 1):
        for name, run in peers.items():
            value = run()
            if repeat > 0:
                seconds[name].append(value)
    return {name: statistics.median(values) for name, values in seconds.items()}


def timed(function: Callable[[], object]) -> float:
    """Seconds of one call, which must not return before its work is done."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def check(what: str, error: float, tolerance: float) -> None:
    """Ends the program if two peers do not agree: their times would mean nothing."""
    if not error <= tolerance:  # NaN too
        sys.exit(f"{what}: peers differ by {error:.3g}; wanted at most {tolerance:g}")


def report(title: str, rows: Sequence[Mapping[str, object]], path: Path | None) -> None:
    """Prints rows of one set of keys as an aligned table, and writes them to `path` as JSON."""
    columns = list(rows[0])
    cells = [columns] + [[_cell(row[c]) for c in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    print(f"\n{title}; {CORES} cores, {platform.machine()}, Python {platform.python_version()}")
    for line in cells:
        # Names to the left, numbers to the right.
        padded = [
            cell.rjust(width) if i and line is not columns else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(padded).rstrip())
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"title": title, "cores": CORES, "rows": rows}, indent=1) + "\n")


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Worker:
    """A peer in its own Python process: `ask` calls one of the functions it serves."""

    def __init__(self, module: str, *arguments: object, cores: int = CORES, env=None):
        """Starts `python -m module arguments...` on the first `cores` cores.

        Args:
          module: calls `serve` when started so.
          env: variables to add to the environment.
        """
        allowed = sorted(os.sched_getaffinity(0))[:cores]
        limits = {name: str(cores) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**ENVIRONMENT, **os.environ, **limits, **(env or {})},
            preexec_fn=lambda: os.sched_setaffinity(0, allowed),  # before JAX counts the cores
        )

    def ask(self, name: str, **arguments):
        """Returns what the served function returned; raises RuntimeError if the peer died."""
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps([name, arguments]), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"peer died at {name!r}; its message is above")
        return json.loads(answer)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.stdin.close()
        self._process.wait()


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """What is printed before `serve`, by C++ code too, must not be taken for an answer."""
    answers = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(answers, 1)
        os.close(answers)


def serve(*functions: Callable) -> None:
    """Answers `Worker.ask` with JSON, until the asking process closes the pipe.

    Whatever else this process prints goes to standard error.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    by_name = {function.__name__: function for function in functions}
    for line in sys.stdin:
        name, arguments = json.loads(line)
        print(json.dumps(by_name[name](**arguments)), file=answers, flush=True)
