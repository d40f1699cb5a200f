"""From the start of Python to the first steps, and how often each program is compiled.

A whole small run (baseline and two rounds, CRF, evaluation) of `train_and_evaluate` on prepared
phantoms, in a fresh process: `cold` with an empty compilation cache, `warm` with the one that the
cold run left. `compilations` count calls of XLA, or of its cache, in the whole run: three of
programs mapped over devices are right (baseline step, joint step, prediction; JAX gives them one
name), and one of the CRF; the others are small.
"""

import collections
import statistics
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import harness, phantom_run

NUM_VOLUMES = 8
# Part of the name that JAX's monitoring gives; "" is in all of them.
PROGRAMS = {"mapped over devices": "_fun", "CRF": "_mean_field", "others": ""}


def serve_ours(folder: Path, size: int, threads: int, started: float) -> None:
    import jax

    from lclseg import stage, train
    from lclseg.run.setup import set_up_process

    imported = time.time() - started
    config = phantom_run.config(folder, size=size, num_volumes=NUM_VOLUMES, num_cpu_devices=threads)
    config.rounds.update(baseline_steps=4, num_rounds=2, steps_per_round=4, eval_every=2)
    config.log.every = 1
    phantom_run.set_num_volumes(NUM_VOLUMES)

    def run() -> dict[str, float]:
        first_steps, compilations = {}, collections.Counter()
        seconds = collections.Counter()
        run_steps = stage.run_steps

        def run_and_tell(run, programs, *rest):
            trained = run_steps(run, programs, *rest)  # waits for the device
            kind = "first" if programs is run.programs["first"] else "joint"
            first_steps.setdefault(kind, time.time() - started)
            return trained

        def compiled(event, duration, fun_name="", **_):
            if event == "/jax/core/compile/backend_compile_duration":
                name = next(n for n, part in PROGRAMS.items() if part in fun_name)
                compilations[name] += 1
                seconds[name] += duration

        jax.monitoring.register_event_duration_secs_listener(compiled)
        stage.run_steps = run_and_tell
        set_up_process(config)
        with tempfile.TemporaryDirectory() as workdir:
            train.train_and_evaluate(config, Path(workdir))
        result = {
            "imports done, s": imported,
            "first baseline step done, s": first_steps["first"],
            "first joint step done, s": first_steps["joint"],
            "run done, s": time.time() - started,
        }
        for name in PROGRAMS:
            result[f"compilations, {name}"] = compilations[name]
        for name in PROGRAMS:
            result[f"compiling, {name}, s"] = seconds[name]
        return result

    harness.serve(run)


def main() -> None:
    parser = harness.parser(__doc__, repeats=3)
    parser.add_argument("--size", type=int, default=64, help="px")
    parser.add_argument("--worker", type=Path, help="of a worker: folder of the data")
    parser.add_argument("--started", type=float, help="of a worker: when, time.time()")
    args = parser.parse_args()
    if args.worker:
        return serve_ours(args.worker, args.size, args.threads, args.started)
    with tempfile.TemporaryDirectory() as folder:
        # The cache lies in the user's home.
        def run(home: str) -> dict[str, float]:
            arguments = ("--worker", folder, "--size", args.size, "--threads", args.threads)
            with harness.Worker(
                "benchmarks.startup",
                *arguments,
                "--started",
                time.time(),
                cores=args.threads,
                env={"HOME": home},
            ) as worker:
                return worker.ask("run")

        found = {"cold": [], "warm": []}
        with tempfile.TemporaryDirectory() as home:
            run(home)  # prepares the data
        for _ in range(args.repeats):
            with tempfile.TemporaryDirectory() as home:
                found["cold"].append(run(home))
                found["warm"].append(run(home))
    rows = [
        {"": name} | {k: statistics.median(r[name] for r in runs) for k, runs in found.items()}
        for name in found["cold"][0]
    ]
    title = f"Start-up at {args.size} px, {args.threads} threads, one run of 12 steps"
    harness.report(title, rows, args.json)


if __name__ == "__main__":
    sys.exit(main())
