"""What one device does with lclseg: a GPU, a TPU or a CPU, whichever JAX finds.

  python -m benchmarks.accelerator [--minutes 6] [--tiny] [--json FILE]

One line for each measurement, as it is known; --json has each as a line of JSON at once. A part
that fails is a line with its error, and the next one goes on. A measurement is begun only while as
much time is left as the longest one took; what is left out is a line, too. The short run of
configs/phantom.py at the end gets the rest of the minutes. Bytes and operations are those that
`benchmarks.floor` counts, the least that a step needs. Data are random: speed only, but for the
golden values of the contrastive loss.
"""

import argparse
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import dense_crf, floor, harness
from lclseg import crf, losses, steps

PAPER_SLICES = 40  # of the paper's batch
SEEDS = 4
DTYPES = ("bfloat16", "float32")
# Or the first of JAX, PyTorch and the short run would hold most of a GPU's memory.
ENVIRONMENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


class OutOfTimeError(Exception):
    """What would come next does not fit into the minutes; the message says so."""


class Clock:
    """The minutes that there are."""

    def __init__(self, minutes: float):
        self.end = time.monotonic() + 60 * minutes
        self.longest = 0.0  # seconds of a measurement, compilation included
        self.first = 0.0  # seconds of the first call of the last one: compilation, mostly

    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def seconds_of(self, function: Callable, repeats: int, wait=jax.block_until_ready) -> float:
        """Median seconds of a call, its result waited for; the first, which compiles, left out.

        Raises:
          OutOfTimeError: less is left than the longest measurement took.
        """
        if self.left() < max(self.longest, 1):
            raise OutOfTimeError(
                f"{max(self.left(), 0):.0f} s are left, the longest measurement took "
                f"{self.longest:.0f} s"
            )
        started, found = time.monotonic(), []
        run = functools.partial(harness.timed, lambda: wait(function()))
        self.first = run()
        while not found or (len(found) < repeats and self.left() > 0):
            found.append(run())
        self.longest = max(self.longest, time.monotonic() - started)
        return float(np.median(found))


def config_of(size: int, slices: int, dtype: str, tiny: bool):
    """The paper's config with so many slices a batch, half of them in pairs."""
    config = floor.paper_config()
    times = slices // PAPER_SLICES
    config.data.image_size, config.model.dtype = size, dtype
    config.data.labeled_batch_size *= times
    config.method.pairs.update({k: v * times for k, v in config.method.pairs.items()})
    if tiny:
        config.model.filters, config.data.labeled_batch_size = (4, 8), 4
        config.method.pairs.update(dict.fromkeys(config.method.pairs, 1))
    return config


def inputs(config, length: int = 1):
    """(step, state, store, rows [length, n] by group, key) on random slices."""
    step, create = floor.parts_of_step(config)
    size, rng = config.data.image_size, np.random.default_rng(0)
    sizes = {
        "labeled": config.data.labeled_batch_size,
        "pairs": 2 * sum(config.method.pairs.values()),
    }
    number = max(sizes.values())
    store = steps.Store(
        image=jnp.asarray(rng.random((number, size, size), np.float32)),
        label=jnp.asarray(
            rng.integers(floor.NUM_CLASSES, size=(number, size, size), dtype=np.uint8)
        ),
        is_labeled=jnp.ones(number, bool),
    )
    rows = {
        g: jnp.asarray(rng.integers(number, size=(length, n)), jnp.int32) for g, n in sizes.items()
    }
    key = jax.random.key(0)
    return step, create(key), store, rows, key


def golden() -> Iterator[dict]:
    """Largest relative differences from the golden values, over all files."""
    for path in sorted((harness.ROOT / "tests" / "golden").glob("*.npz")):
        with np.load(path, allow_pickle=False) as g:
            loss = functools.partial(
                losses.local_contrastive_loss,
                labels=g["labels"],
                anchors=g["anchors"],
                num_classes=int(g["num_classes"]),
                temperature=float(g["temperature"]),
                matching=str(g["matching"]),
            )
            value, grad = jax.jit(jax.value_and_grad(loss))(g["embeddings"])
            wanted = g["grad"]
            yield {  # theirs is twice ours, see tests/golden/README.md
                "file": path.stem,
                "loss, relative": float(abs(2 * value / g["loss"] - 1)),
                "gradient, of the largest": float(
                    np.abs(2 * np.asarray(grad) - wanted).max() / np.abs(wanted).max()
                ),
            }


def step_time(slices: int, size: int, dtype: str, args) -> Iterator[dict]:
    """One step a dispatch, against its floor."""
    config = config_of(size, slices, dtype, args.tiny)
    step, state, store, rows, key = inputs(config)
    compiled, first = jax.jit(step), {g: r[0] for g, r in rows.items()}
    seconds = args.clock.seconds_of(lambda: compiled(state, store, first, key), args.repeats)
    found = floor.operations(config)
    chip = floor.KINDS.get(jax.devices()[0].device_kind)
    yield {
        "px": size,
        "slices": sum(map(len, first.values())),
        "dtype": dtype,
        "ms": 1e3 * seconds,
        "first call, s": args.clock.first,
        "of the floor": floor.floor(found, chip, dtype) / seconds if chip else None,
        "GB/s": sum(o.bytes for o in found) / seconds / 1e9,
        "Gflop/s": sum(o.flops for o in found) / seconds / 1e9,
    }


def scan(size: int, dtype: str, args) -> Iterator[dict]:
    """Many steps in one dispatch against one by one."""
    length = 2 if args.tiny else 20
    config = config_of(size, PAPER_SLICES, dtype, args.tiny)
    step, state, store, rows, key = inputs(config, length)
    one, many = jax.jit(step), jax.jit(functools.partial(steps.train_steps, step=step))

    def singly():
        now = state
        for i in range(length):
            now, _ = one(now, store, {g: r[i] for g, r in rows.items()}, key)
        return now

    def together():
        return many(state, store, rows, np.int32(length), key)

    alone = args.clock.seconds_of(singly, args.repeats) / length
    yield {"px": size, "dtype": dtype, "single, ms": 1e3 * alone}
    seconds = args.clock.seconds_of(together, args.repeats) / length
    yield {"px": size, "dtype": dtype, "scan, ms": 1e3 * seconds, "of single": seconds / alone}


def seeds(size: int, dtype: str, args) -> Iterator[dict]:
    """Several seeds in one program against one after the other."""
    config = config_of(size, PAPER_SLICES, dtype, args.tiny)
    step, state, store, rows, key = inputs(config)
    first = {g: r[0] for g, r in rows.items()}
    one, many = jax.jit(step), jax.jit(jax.vmap(step, in_axes=(0, None, None, 0)))
    states = jax.tree.map(lambda x: jnp.stack([x] * SEEDS), state)
    keys = jax.random.split(key, SEEDS)
    alone = args.clock.seconds_of(lambda: one(state, store, first, key), args.repeats)
    yield {"px": size, "dtype": dtype, "1 seed, ms": 1e3 * alone}
    together = args.clock.seconds_of(lambda: many(states, store, first, keys), args.repeats)
    name = f"{SEEDS} seeds, ms"
    shared = {"px": size, "dtype": dtype}
    yield {**shared, name: 1e3 * together, "of one by one": together / alone / SEEDS}


def peer(sizes: list[int], args) -> Iterator[dict]:
    """PyTorch's steps, in a process of its own: the two would share CUDA's libraries."""
    command = [sys.executable, "-m", "benchmarks.accelerator", "--torch", *map(str, sizes)]
    command += [f"--minutes={args.clock.left() / 60}", f"--repeats={args.repeats}"]
    command += ["--tiny"] if args.tiny else []
    with subprocess.Popen(command, cwd=harness.ROOT, stdout=subprocess.PIPE, text=True) as process:
        timer = threading.Timer(max(args.clock.left(), 1), process.kill)
        timer.start()
        yield from map(json.loads, process.stdout)
    timer.cancel()
    if process.returncode:
        yield {"error": f"its process ended with {process.returncode}"}


def torch_steps(size: int, args) -> Iterator[dict]:
    """PyTorch's joint step, that of `benchmarks.train_step`, on as many random slices."""
    import torch

    from benchmarks import torch_peer

    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")  # TF32, as JAX has it
    labeled = 4 if args.tiny else PAPER_SLICES // 2
    shapes = {"": (labeled,), "pair_": (labeled // 2, 2)}
    batch = {f"{k}image": torch.rand(*n, size, size) for k, n in shapes.items()}
    for k, n in shapes.items():
        batch[f"{k}label"] = torch.randint(floor.NUM_CLASSES, (*n, size, size))
    filters = {"filters": (4, 8)} if args.tiny else {}
    kinds = [("eager", torch.bfloat16), ("eager", None)]
    for mode, dtype in kinds if args.tiny else [*kinds, ("compiled trunk", torch.bfloat16)]:
        net = torch_peer.UNet(floor.NUM_CLASSES, **filters).train()
        net = net.to(memory_format=torch.channels_last)
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True)
        if mode != "eager":
            net.trunk = torch.compile(net.trunk)
        options = {"num_classes": floor.NUM_CLASSES, "weight": 0.1, "dtype": dtype}
        step = functools.partial(torch_peer.train_step, net, optimizer, batch, **options)
        named = {"px": size, "mode": mode, "dtype": "float32" if dtype is None else "bfloat16"}
        try:
            seconds = args.clock.seconds_of(step, args.repeats, lambda loss: loss.item())
        except OutOfTimeError:
            raise
        except Exception as error:  # torch.compile needs what may not be there
            yield {**named, "error": repr(error)[:200]}
        else:
            yield {**named, "ms": 1e3 * seconds, "first call, s": args.clock.first}


def tell_torch_steps(args) -> None:
    """Prints lines of JSON, for `peer`."""
    if importlib.util.find_spec("torch") is None:
        print(json.dumps({"PyTorch": "not installed"}))
        return
    try:
        for size in args.torch:
            for line in torch_steps(size, args):
                print(json.dumps(line), flush=True)
    except OutOfTimeError as reason:
        print(json.dumps({"left out": str(reason)}))


def refinement(size: int, args) -> Iterator[dict]:
    """The dense CRF with the paper's settings."""
    number = 2 if args.tiny else PAPER_SLICES
    image, probs = map(jnp.asarray, dense_crf.make_slices(number, size, floor.NUM_CLASSES))
    settings = dense_crf.settings()
    seconds = args.clock.seconds_of(lambda: crf.dense_crf(image, probs, **settings), args.repeats)
    yield {"px": size, "CRF, slices/s": number / seconds}


def prediction(size: int, dtype: str, args) -> Iterator[dict]:
    """Slices a second of a prediction, as a batch of validation."""
    config = config_of(size, PAPER_SLICES, dtype, args.tiny)
    step, state, *_ = inputs(config)
    images = jnp.ones((PAPER_SLICES, size, size))
    model = step.keywords["net"].model
    predict = jax.jit(functools.partial(steps.predict_step, model=model))
    seconds = args.clock.seconds_of(lambda: predict(state, images), args.repeats)
    yield {"px": size, "dtype": dtype, "prediction, slices/s": PAPER_SLICES / seconds}


def short_run(args) -> Iterator[dict]:
    """configs/phantom.py as a user runs it; it is ended when the time is over."""
    with tempfile.TemporaryDirectory() as folder:
        workdir, log = Path(folder) / "run", Path(folder) / "log.txt"
        command = [sys.executable, "-m", "lclseg.main", "--config=configs/phantom.py"]
        command += [f"--workdir={workdir}", f"--config.data.data_dir={folder}/data"]
        if args.tiny:
            command += [f"--config.{option}" for option in TINY_RUN]
        started = time.monotonic()
        try:
            with log.open("w") as out:
                subprocess.run(
                    command,
                    cwd=harness.ROOT,
                    env={**os.environ, **ENVIRONMENT},
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    timeout=max(args.clock.left(), 1),
                    check=True,
                )
            ended = "done"
        except subprocess.TimeoutExpired:
            ended = "not done in time"
        except subprocess.CalledProcessError:
            lines = log.read_text().strip().splitlines()
            ended = f"failed: {lines[-1] if lines else ''}"
        yield {"run": ended, "s": time.monotonic() - started}
        metrics = workdir / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        speed = {}  # of the last log line of each stage, which no compilation slows down
        for line in map(json.loads, lines):
            if "device_busy" in line:
                speed[line["stage"]] = {k: line[k] for k in ("steps_per_second", "device_busy")}
        results = workdir / "results.json"
        stages = json.loads(results.read_text())["results"] if results.exists() else {}
        for stage, found in speed.items():
            tested = stages.get(stage, {}).get("test_last", {}).get("mean_dice")
            yield {"stage": stage, **found, "test Dice": tested}


TINY_RUN = (
    "data.image_size=32",
    "data.target_spacing_mm=4.0",
    "data.unlabeled=('phantom_010','phantom_011')",
    "data.test=('phantom_044',)",
    "model.filters=(4,8)",
    "rounds.baseline_steps=4",
    "rounds.steps_per_round=4",
    "num_cpu_devices=1",
)


def parts(args) -> Iterator[tuple[str, Callable[[], Iterator[dict]]]]:
    """Name and work of each part, the most telling first."""
    sizes, batches = ([32], [PAPER_SLICES]) if args.tiny else ([192, 96, 64], [40, 160])
    timed_steps = [
        ("step", functools.partial(step_time, slices, size, dtype, args))
        for slices in batches
        for dtype in DTYPES
        for size in sizes
    ]
    compared = len(sizes[:2])  # not all: a GPU may take a minute to compile a step
    yield "golden loss", golden
    yield from timed_steps[:compared]
    yield "PyTorch", functools.partial(peer, sizes[:compared], args)
    for size in sizes:
        yield "scan", functools.partial(scan, size, "bfloat16", args)
        yield "seeds", functools.partial(seeds, size, "bfloat16", args)
    yield from timed_steps[compared:]
    yield "CRF", functools.partial(refinement, sizes[0], args)
    yield "prediction", functools.partial(prediction, sizes[0], "bfloat16", args)
    yield "phantom", functools.partial(short_run, args)


def main() -> None:
    parser = argparse.ArgumentParser("benchmarks.accelerator", description=__doc__)
    parser.add_argument("--minutes", type=float, default=6)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--tiny", action="store_true", help="small, for a CPU")
    parser.add_argument("--json", type=Path, help="each line goes to this file as it is known")
    parser.add_argument("--torch", type=int, nargs="+", help="of PyTorch's process: px")
    args = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    args.clock = Clock(args.minutes)
    if args.tiny:
        args.repeats = 1
    if args.torch:
        return tell_torch_steps(args)
    if args.json:
        args.json.write_text("")

    def tell(part: str, line: dict) -> None:
        cells = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items())
        print(f"{part}: " + ", ".join(cells), flush=True)
        if args.json:
            with args.json.open("a") as file:
                file.write(json.dumps({"part": part, **line}) + "\n")

    device = jax.devices()[0]
    tell(
        "device", {"kind": device.device_kind, "platform": device.platform, "jax": jax.__version__}
    )
    for part, work in parts(args):
        try:
            if args.clock.left() <= 0:
                raise OutOfTimeError("the minutes are over")
            for line in work():
                tell(part, line)
        except OutOfTimeError as reason:
            tell(part, {"left out": str(reason)})
        except Exception as error:  # the next part may work
            tell(part, {"error": repr(error)[:300]})


if __name__ == "__main__":
    sys.exit(main())
