"""What the host does for a training step, the device's work taken out; and its memory.

Of a joint step of 20 labelled slices + 10 pairs: drawing record numbers and their rows of the store
(`DeviceSlices.rows`), and dispatching a program with the step's arguments that computes nothing,
for the steps between two log lines through `stage.run_steps` itself: in one dispatch, as on GPUs
and TPUs, and one by one, as on CPUs. Dispatches and waits for the device are counted there.

Milliseconds are CPU time of the thread that does it, so that other programs on the machine disturb
little; it leaves out what the thread waits. Memory is that of a fresh process that holds all slices
(Linux).
"""

import re
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import harness, phantom_run

WANTED_MS = 0.3  # a step, at most


def resident_mb() -> dict[str, float]:
    text = Path("/proc/self/status").read_text()
    return {k: int(re.search(rf"{k}:\s+(\d+)", text)[1]) / 1024 for k in ("VmRSS", "RssAnon")}


def serve_ours(folder: Path, size: int, num_volumes: int) -> None:
    import jax
    import jax.numpy as jnp

    from lclseg import stage
    from lclseg.run import devices
    from lclseg.run.setup import set_up_process

    config = phantom_run.config(folder, size=size, num_volumes=num_volumes, num_cpu_devices=1)
    set_up_process(config)
    current = {"first": 0}

    def open_set() -> int:
        """Prepares the set if need be and loads it; returns its number of slices."""
        with harness.stdout_to_stderr():
            run, slices = phantom_run.start(config, folder / "run", num_volumes=num_volumes)
        slices.load(0, 1)
        current.update(run=run, slices=slices)
        return len(slices.all)

    def one(state, store, rows, key):
        return state, {"loss": jnp.zeros(())}

    def many(state, store, rows, number, key):
        return state, {"loss": jnp.zeros(()), "first_not_finite": number}

    programs = {1: one, config.log.every: many}
    programs = {n: devices.over_devices(f, donate_state=False) for n, f in programs.items()}

    def lines(number: int, at_once: bool) -> dict[str, float]:
        """Seconds a step over `number` log lines; dispatches and waits of each line."""
        run, slices, each = current["run"], current["slices"], config.log.every
        state, counts = devices.replicate(()), {"dispatches": 0, "waits": 0}
        length = each if at_once else 1

        def counted(*arguments):
            counts["dispatches"] += 1
            return programs[length](*arguments)

        get, steps_per_dispatch = jax.device_get, devices.steps_per_dispatch

        def wait(x):
            counts["waits"] += 1
            return get(x)

        of_run = run.programs["joint"]._replace(train=counted)
        first = current["first"]
        current["first"] += number * each  # other batches: no cache may know them
        jax.device_get, devices.steps_per_dispatch = wait, lambda log_every: length
        try:
            started = time.thread_time()
            for start in range(first, first + number * each, each):
                stage.run_steps(run, of_run, state, slices, range(start, start + each), run.key)
            seconds = (time.thread_time() - started) / (number * each)
        finally:
            jax.device_get, devices.steps_per_dispatch = get, steps_per_dispatch
        return {"seconds": seconds, **{k: v / number for k, v in counts.items()}}

    def memory() -> dict[str, float]:
        return resident_mb()

    harness.serve(open_set, lines, memory)


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 96, 192], help="px")
    parser.add_argument("--volumes", type=int, nargs="+", default=[50, 500])
    parser.add_argument("--lines", type=int, default=20, help="log lines of each timed repeat")
    parser.add_argument("--worker", type=Path, help="of a worker: its folder")
    args = parser.parse_args()
    if args.worker:
        return serve_ours(args.worker, args.sizes[0], args.volumes[0])
    rows = []
    for size, num_volumes in [(s, args.volumes[0]) for s in args.sizes] + [
        (args.sizes[0], n) for n in args.volumes[1:]
    ]:
        with tempfile.TemporaryDirectory() as folder:
            arguments = ("--worker", folder, "--sizes", size, "--volumes", num_volumes)
            with harness.Worker("benchmarks.host_work", *arguments) as preparing:
                preparing.ask("open_set")
            with harness.Worker("benchmarks.host_work", *arguments) as ours:
                num_slices = ours.ask("open_set")
                found = {True: [], False: []}
                for repeat in range(args.repeats + 1):
                    for at_once, timed in found.items():
                        line = ours.ask("lines", number=args.lines, at_once=at_once)
                        timed += [line] if repeat else []  # the first compiles
                memory = ours.ask("memory")
        for at_once, timed in found.items():
            middle = sorted(timed, key=lambda f: f["seconds"])[len(timed) // 2]
            rows.append(
                {
                    "px": size,
                    "volumes": num_volumes,
                    "slices": num_slices,
                    "as on": "GPU, TPU" if at_once else "CPU",
                    "host, ms a step": 1e3 * middle["seconds"],
                    "wanted, at most": WANTED_MS,
                    "dispatches a line": middle["dispatches"],
                    "waits a line": middle["waits"],
                    "resident, MB": memory["VmRSS"],
                    "not mapped, MB": memory["RssAnon"],
                }
            )
    harness.report("Host work of a joint step, 20 slices + 10 pairs", rows, args.json)


if __name__ == "__main__":
    sys.exit(main())
