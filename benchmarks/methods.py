"""Training steps of every method, side by side: slices through the network, and seconds.

Steps are those of real runs with the short configs' batches, 8 slices with ground truth and 8
without, and their strong augmentation; on phantoms, one CPU device per thread. A slice counts once
for each pass and network (`lclseg/passes.py`). Pseudo-labels that are stored in between, and the
first stage, are not in a step.
"""

import contextlib
import runpy
import sys
import tempfile
from pathlib import Path

from benchmarks import harness, phantom_run

NUM_VOLUMES = 8
METHODS = sorted(p.stem for p in (harness.ROOT / "configs" / "methods").glob("*.py"))
REFERENCE = "supervised"


def serve_ours(folder: Path, method: str, size: int, threads: int) -> None:
    from lclseg import passes
    from lclseg.run.setup import initial_state, set_up_process

    config = phantom_run.config(
        folder, size=size, num_volumes=NUM_VOLUMES, num_cpu_devices=threads, method=method
    )
    parts = harness.ROOT / "configs" / "parts"
    runpy.run_path(str(parts / "short.py"))["shorten"](config)
    set_up_process(config)
    with harness.stdout_to_stderr():
        run, slices = phantom_run.start(config, folder / method, num_volumes=NUM_VOLUMES)
        store, rows = slices.batch(0)
    kind = phantom_run.last_kind(run)
    state = initial_state(run, kind)
    training = phantom_run.Steps(run, state, store, rows)

    def slices_in_step() -> int:
        """Of a global batch, all passes and networks."""
        batch = {group: len(records) for group, records in slices.sampler(0).items()}
        return passes.slices_in_step(
            run.model, run.programs[kind].method, state, batch, (size, size)
        )

    def step(num_steps: int) -> float:
        """Seconds of one of `num_steps` steps."""
        return training.take(num_steps)

    harness.serve(slices_in_step, step)


def measure(methods: list[str], args) -> list[dict]:
    """Rows of the table, the quickest first."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        workers = {}
        for method in methods:
            options = ("--folder", folder, "--methods", method, "--size", args.size)
            workers[method] = stack.enter_context(
                harness.Worker(
                    "benchmarks.methods",
                    *(*options, "--threads", args.threads, "--worker"),
                    cores=args.threads,
                )
            )
            # One after the other: the first prepares the data for all.
            workers[method].ask("step", num_steps=1)
        seconds = harness.alternate(
            {m: lambda w=w: w.ask("step", num_steps=args.steps) for m, w in workers.items()},
            args.repeats,
        )
        slices = {m: w.ask("slices_in_step") for m, w in workers.items()}
    return [
        {
            "method": method,
            "slices a step": slices[method],
            "ms a step": 1e3 * seconds[method],
            "ms a slice": 1e3 * seconds[method] / slices[method],
            f"of {REFERENCE}": seconds[method] / seconds[REFERENCE],
        }
        for method in sorted(methods, key=seconds.get)
    ]


def main() -> None:
    parser = harness.parser(__doc__, repeats=3)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--size", type=int, default=96, help="px")
    parser.add_argument("--steps", type=int, default=10, help="steps of each timed repeat")
    parser.add_argument("--worker", action="store_true", help="be a worker")
    parser.add_argument("--folder", type=Path, help="of a worker")
    args = parser.parse_args()
    if args.worker:
        return serve_ours(args.folder, args.methods[0], args.size, args.threads)
    methods = sorted({REFERENCE, *args.methods})
    title = f"Training steps, 8 + 8 slices, {args.size} px, {args.threads} threads"
    harness.report(title, measure(methods, args), args.json)


if __name__ == "__main__":
    sys.exit(main())
