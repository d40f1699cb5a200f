"""The joint step on one and two CPU devices, in one process and in two.

The benchmark `train_step`'s own program and batch. One device is measured on one core, and on as
many cores as two devices have (XLA's threads inside operations). Efficiency is against one device
on one core. Two processes of one device each train together over `jax.distributed`. The losses of
the first steps must agree. Four devices are a matter for the tests, not for two cores.
"""

import concurrent.futures
import contextlib
import functools
import socket
import sys
import tempfile

from benchmarks import harness


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--size", type=int, default=192, help="px")
    parser.add_argument("--steps", type=int, default=3, help="steps of each timed repeat")
    args = parser.parse_args()
    num_devices = 2
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())

        def worker(devices: int, cores: int, *more: object) -> harness.Worker:
            arguments = ("--worker", "ours", "--folder", folder, "--sizes", args.size)
            return stack.enter_context(
                harness.Worker(
                    "benchmarks.train_step", *arguments, "--threads", devices, *more, cores=cores
                )
            )

        def start(devices: int, cores: int) -> list[harness.Worker]:
            alone = worker(devices, cores)
            alone.ask("loss_of_first_step")  # prepares the data for all that follow
            return [alone]

        setups = {
            ("1 process, 1 device", 1): start(1, 1),
            ("1 process, 1 device", num_devices): start(1, num_devices),
            ("1 process, 2 devices", num_devices): start(num_devices, num_devices),
        }
        port = free_port()
        setups["2 processes, 1 device each", num_devices] = [
            worker(1, num_devices, "--process", i, num_devices, port) for i in range(num_devices)
        ]
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(num_devices))

        def ask(workers, name: str, **arguments):
            """All processes of a setup at once; the first one's answer."""
            answers = pool.map(lambda w: w.ask(name, **arguments), workers)
            return list(answers)[0]

        losses = {key: ask(workers, "loss_of_first_step") for key, workers in setups.items()}
        expected = losses["1 process, 1 device", 1]
        for (name, _), loss in losses.items():
            harness.check(f"loss, {name}", abs(loss / expected - 1), 1e-4)
        peers = {
            key: functools.partial(ask, workers, "step", num_steps=args.steps)
            for key, workers in setups.items()
        }
        seconds = harness.alternate(peers, args.repeats)
        ask(setups["2 processes, 1 device each", num_devices], "leave")
    one = seconds["1 process, 1 device", 1]
    rows = [
        {
            "setup": name,
            "cores": cores,
            "s/step": value,
            "slices/s": 40 / value,
            "speed-up": one / value,
            "efficiency, %": 100 * one / value / cores,
            "loss of step 1": losses[name, cores],
        }
        for (name, cores), value in seconds.items()
    ]
    harness.report(f"Joint step at {args.size} px, 20 slices + 10 pairs", rows, args.json)


if __name__ == "__main__":
    sys.exit(main())
