"""What one device does with lclseg: a GPU, a TPU or a CPU, whichever JAX finds.

  python -m benchmarks.accelerator [--minutes 6] [--tiny] [--json FILE]

One line for each measurement, as it is known; --json has each as a line of JSON at once. A part
that fails is a line with its error, and the next one goes on; none begins after the minutes are
over, and the short run of configs/phantom.py at the end gets what is left. Bytes and operations are
those that `benchmarks.floor` counts, the least that a step needs. Data are random: speed only, but
for the golden values of the contrastive loss.
"""

import argparse
import functools
import json
import subprocess
import sys
import tempfile
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


def seconds_of(function: Callable, repeats: int) -> float:
    """Median seconds of a call, its result waited for; the first, which compiles, left out."""
    run = functools.partial(harness.timed, lambda: jax.block_until_ready(function()))
    run()
    return float(np.median([run() for _ in range(repeats)]))


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


def step_time(size: int, slices: int, dtype: str, args) -> Iterator[dict]:
    """One step a dispatch, against its floor."""
    config = config_of(size, slices, dtype, args.tiny)
    step, state, store, rows, key = inputs(config)
    compiled, first = jax.jit(step), {g: r[0] for g, r in rows.items()}
    seconds = seconds_of(lambda: compiled(state, store, first, key), args.repeats)
    found = floor.operations(config)
    chip = floor.KINDS.get(jax.devices()[0].device_kind)
    yield {
        "px": size,
        "slices": sum(map(len, first.values())),
        "dtype": dtype,
        "ms": 1e3 * seconds,
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

    alone = seconds_of(singly, args.repeats) / length
    together = seconds_of(lambda: many(state, store, rows, np.int32(length), key), args.repeats)
    yield {"px": size, "single, ms": 1e3 * alone, "scan, ms": 1e3 * together / length}


def seeds(size: int, dtype: str, args) -> Iterator[dict]:
    """One seed against several in one program."""
    config = config_of(size, PAPER_SLICES, dtype, args.tiny)
    step, state, store, rows, key = inputs(config)
    first = {g: r[0] for g, r in rows.items()}
    one, many = jax.jit(step), jax.jit(jax.vmap(step, in_axes=(0, None, None, 0)))
    states = jax.tree.map(lambda x: jnp.stack([x] * SEEDS), state)
    keys = jax.random.split(key, SEEDS)
    alone = seconds_of(lambda: one(state, store, first, key), args.repeats)
    together = seconds_of(lambda: many(states, store, first, keys), args.repeats)
    yield {"px": size, "1 seed, ms": 1e3 * alone, f"{SEEDS} seeds, ms": 1e3 * together}


def peer(size: int, args) -> Iterator[dict]:
    """PyTorch's forward and backward pass and Adam, bfloat16, without augmentation."""
    try:
        import torch
    except ModuleNotFoundError:
        yield {"PyTorch": "not installed"}
        return
    from benchmarks import torch_peer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = torch_peer.UNet(floor.NUM_CLASSES).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    image = torch.rand(PAPER_SLICES, 1, size, size, device=device)
    label = torch.randint(floor.NUM_CLASSES, (PAPER_SLICES, size, size), device=device)
    image = image.contiguous(memory_format=torch.channels_last)
    for name in ("eager", "compile"):
        try:
            trunk = torch.compile(net.trunk) if name == "compile" else net.trunk

            def step(trunk=trunk):
                with torch.autocast(device, torch.bfloat16):
                    logits = net.segment(trunk(image))
                optimizer.zero_grad(set_to_none=True)
                torch_peer.dice_loss(logits.float(), label).backward()
                optimizer.step()
                if device == "cuda":
                    torch.cuda.synchronize()

            step()
            step()
            found = [harness.timed(step) for _ in range(args.repeats)]
            yield {
                "px": size,
                "mode": name,
                "no augmentation, Dice loss; ms": 1e3 * np.median(found),
            }
        except Exception as error:  # torch.compile needs what may not be there
            yield {"px": size, "mode": name, "error": repr(error)[:200]}


def refinement(size: int, args) -> Iterator[dict]:
    """The dense CRF with the paper's settings."""
    number = 2 if args.tiny else PAPER_SLICES
    image, probs = map(jnp.asarray, dense_crf.make_slices(number, size, floor.NUM_CLASSES))
    settings = dense_crf.settings()
    seconds = seconds_of(lambda: crf.dense_crf(image, probs, **settings), args.repeats)
    yield {"px": size, "CRF, slices/s": number / seconds}


def prediction(size: int, dtype: str, args) -> Iterator[dict]:
    """Slices a second of a prediction, as a batch of validation."""
    config = config_of(size, PAPER_SLICES, dtype, args.tiny)
    step, state, *_ = inputs(config)
    images = jnp.ones((PAPER_SLICES, size, size))
    model = step.keywords["net"].model
    predict = jax.jit(functools.partial(steps.predict_step, model=model))
    seconds = seconds_of(lambda: predict(state, images), args.repeats)
    yield {"px": size, "dtype": dtype, "prediction, slices/s": PAPER_SLICES / seconds}


def short_run(seconds: float) -> Iterator[dict]:
    """configs/phantom.py as a user runs it; it is ended when the time is over."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "lclseg.main", "--config=configs/phantom.py"]
        command += [f"--workdir={folder}/run", f"--config.data.data_dir={folder}/data"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        started = time.monotonic()
        try:
            subprocess.run(command, cwd=harness.ROOT, timeout=seconds, check=True, **quiet)
        except subprocess.TimeoutExpired:
            yield {"run": "not done in time", "s": time.monotonic() - started}
            return
        results = json.loads((Path(folder) / "run" / "results.json").read_text())["results"]
        dice = {k: r["test_last"]["mean_dice"] for k, r in results.items()}
        yield {"run": "done", "s": time.monotonic() - started, **dice}


def parts(args) -> Iterator[tuple[str, Callable[[], Iterator[dict]]]]:
    """Name and work of each part, the most telling first."""
    sizes, batches = ([32], [PAPER_SLICES]) if args.tiny else ([192, 96, 64], [40, 160])
    yield "golden loss", golden
    for slices in batches:
        for size in sizes:
            for dtype in ("bfloat16", "float32"):
                yield "step", functools.partial(step_time, size, slices, dtype, args)
    for size in sizes:
        yield "scan", functools.partial(scan, size, "bfloat16", args)
        yield "seeds", functools.partial(seeds, size, "bfloat16", args)
        if not args.tiny:
            yield "PyTorch", functools.partial(peer, size, args)
    yield "CRF", functools.partial(refinement, sizes[0], args)
    yield "prediction", functools.partial(prediction, sizes[0], "bfloat16", args)


def main() -> None:
    parser = argparse.ArgumentParser("benchmarks.accelerator", description=__doc__)
    parser.add_argument("--minutes", type=float, default=6)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="small, seconds on a CPU")
    parser.add_argument("--json", type=Path, help="each line goes to this file as it is known")
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes
    if args.tiny:
        args.repeats = 1
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

    def guarded(part: str, work: Callable[[], Iterator[dict]]) -> None:
        try:
            for line in work():
                tell(part, line)
        except Exception as error:  # the next part may work
            tell(part, {"error": repr(error)[:300]})

    for part, work in parts(args):
        if time.monotonic() > end:
            tell(part, {"left out": "the time is over"})
        else:
            guarded(part, work)
    left = end - time.monotonic()
    if not args.tiny and left > 0:
        guarded("phantom", functools.partial(short_run, left))


if __name__ == "__main__":
    sys.exit(main())
