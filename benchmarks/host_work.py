"""What the host does for a training step, the device's work taken out; and its memory.

Of a joint step of 20 labelled slices + 10 pairs: drawing record numbers and their rows of the store
(`DeviceSlices.rows`), and dispatching a program with the step's arguments that computes nothing,
for the steps between two log lines through `stage.run_steps` itself. Dispatches and waits for the
device are counted there. Memory is that of a fresh process that holds all slices (Linux).
"""

import re
import sys
import tempfile
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

    def stub(state, store, rows, key):
        return state, {"loss": jnp.zeros(())}

    def lines(number: int) -> dict[str, float]:
        """Seconds a step over `number` log lines; dispatches and waits of each line."""
        run, slices = current["run"], current["slices"]
        program = devices.over_devices(stub, donate_state=False)
        state, counts = devices.replicate(()), {"dispatches": 0, "waits": 0}

        def counted(*arguments):
            counts["dispatches"] += 1
            return program(*arguments)

        get = jax.device_get

        def wait(x):
            counts["waits"] += 1
            return get(x)

        programs = run.programs["joint"]._replace(train=counted)
        each, first = config.log.every, current["first"]
        current["first"] += number * each  # other batches: no cache may know them

        def work():
            for start in range(first, first + number * each, each):
                stage.run_steps(run, programs, state, slices, range(start, start + each))

        jax.device_get = wait
        try:
            seconds = harness.timed(work) / (number * each)
        finally:
            jax.device_get = get
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
                ours.ask("lines", number=1)
                found = [ours.ask("lines", number=args.lines) for _ in range(args.repeats)]
                memory = ours.ask("memory")
        found.sort(key=lambda f: f["seconds"])
        middle = found[len(found) // 2]
        rows.append(
            {
                "px": size,
                "volumes": num_volumes,
                "slices": num_slices,
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
