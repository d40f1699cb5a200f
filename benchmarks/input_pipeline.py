"""Batches per second without the model, and memory against the size of the data set.

Joint batches of 20 labelled slices and 10 pairs as a run makes them, one after the other in the
calling thread (`direct`) and read ahead in the thread that training uses. Each size of the set has
a fresh process, which only opens it. Memory is that process' resident memory after all batches
(from /proc: Linux), and of it the part that is no file mapping.
"""

import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from benchmarks import harness, phantom_run


def resident_mb() -> dict[str, float]:
    text = Path("/proc/self/status").read_text()
    return {k: int(re.search(rf"{k}:\s+(\d+)", text)[1]) / 1024 for k in ("VmRSS", "RssAnon")}


def consume(batches: Iterable) -> None:
    for _ in batches:
        pass


def serve_ours(folder: Path, size: int, num_volumes: int) -> None:
    from lclseg.data.batches import read_ahead
    from lclseg.run.setup import set_up_process

    config = phantom_run.config(folder, size=size, num_volumes=num_volumes, num_cpu_devices=1)
    set_up_process(config)

    def open_set() -> int:
        """Prepares the set if need be; returns its number of slices."""
        run, make = phantom_run.start(config, folder / "run", num_volumes=num_volumes)
        make_batch.append(make)
        return sum(len(v.slices) for v in run.prepared.volumes.values())

    def direct(batches: int) -> float:
        return harness.timed(lambda: consume(map(make_batch[0], range(batches))))

    def ahead(num_batches: int) -> float:
        # Other batches than `direct`: which slices they hold must not be known to any cache.
        numbers = num_batches, 2 * num_batches
        return harness.timed(lambda: consume(read_ahead(make_batch[0], *numbers)))

    def memory() -> dict[str, float]:
        return resident_mb()

    make_batch = []
    harness.serve(open_set, direct, ahead, memory)


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--size", type=int, default=96, help="px")
    parser.add_argument("--volumes", type=int, nargs="+", default=[50, 500])
    parser.add_argument("--batches", type=int, default=200, help="of each timed repeat")
    parser.add_argument("--worker", type=Path, help="of a worker: its folder")
    args = parser.parse_args()
    if args.worker:
        return serve_ours(args.worker, args.size, args.volumes[0])
    rows = []
    for num_volumes in args.volumes:
        with tempfile.TemporaryDirectory() as folder:
            arguments = ("--worker", folder, "--size", args.size, "--volumes", num_volumes)
            with harness.Worker("benchmarks.input_pipeline", *arguments) as preparing:
                preparing.ask("open_set")
            # All cores, as in training: what reads ahead has one beside the caller's.
            with harness.Worker("benchmarks.input_pipeline", *arguments) as ours:
                num_slices = ours.ask("open_set")
                opened = ours.ask("memory")
                peers = {
                    "direct": lambda ours=ours: ours.ask("direct", batches=args.batches),
                    "ahead": lambda ours=ours: ours.ask("ahead", batches=args.batches),
                }
                seconds = harness.alternate(peers, args.repeats)
                memory = ours.ask("memory")
        rows.append(
            {
                "volumes": num_volumes,
                "slices": num_slices,
                "direct, batches/s": args.batches / seconds["direct"],
                "ahead, batches/s": args.batches / seconds["ahead"],
                "opened, MB": opened["VmRSS"],
                "resident, MB": memory["VmRSS"],
                "not mapped, MB": memory["RssAnon"],
                "against the first": memory["VmRSS"]
                / (rows or [{}])[0].get("resident, MB", memory["VmRSS"]),
            }
        )
    title = f"Joint batches of 20 slices + 10 pairs, phantoms at {args.size} px"
    harness.report(title, rows, args.json)


if __name__ == "__main__":
    sys.exit(main())
