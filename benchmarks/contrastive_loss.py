"""Forward and backward pass of the local contrastive loss (`inter`), drawing anchors included.

lclseg's, mapped over one device per thread as in training, against vectorised PyTorch and against a
PyTorch loop over pairs, classes and anchors. First the joint step's case, then one quantity changed
at a time: pixels, classes, pairs. Loss and gradient are compared before anything is timed.
"""

import functools
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks import harness

AXIS = "devices"
PIXELS_PER_CLASS = 3
EMBEDDING_DIM = 16


def make_pairs(size: int, num_classes: int, num_pairs: int) -> dict[str, np.ndarray]:
    """Random embeddings [P, 2, H, W, E] and labels [P, 2, H, W]: a disc per class."""
    rng = np.random.default_rng(0)
    label = np.zeros((num_pairs, 2, size, size), np.uint8)
    rows, columns = np.mgrid[:size, :size]
    for mask in label.reshape(-1, size, size):
        for k in range(1, num_classes):
            centre = rng.uniform(0.25, 0.75, 2) * size
            mask[np.hypot(rows - centre[0], columns - centre[1]) < 0.12 * size] = k
    direction = rng.standard_normal((num_classes, EMBEDDING_DIM))
    z = direction[label] + rng.standard_normal((*label.shape, EMBEDDING_DIM))
    return {"z": z.astype(np.float32), "label": label}


def mapped_loss(*, num_classes: int, num_pairs: int, pixels_per_class: int | None):
    """(keys, z, labels), sharded -> (anchors or (), gradient, sum of losses / P), over devices."""
    import jax
    import jax.numpy as jnp

    from lclseg import losses

    def one_pair(key, z, label):
        anchors = None
        if pixels_per_class:
            anchors = losses.sample_anchors(
                key, label, num_classes=num_classes, pixels_per_class=pixels_per_class
            )
        loss = losses.local_contrastive_loss(z, label, anchors, num_classes=num_classes)
        return loss, () if anchors is None else anchors

    def local(keys, z, label):
        def total(z):
            pair_losses, anchors = jax.vmap(one_pair)(keys, z, label)
            return jnp.sum(pair_losses) / num_pairs, anchors

        (loss, anchors), grad = jax.value_and_grad(total, has_aux=True)(z)
        return anchors, grad, jax.lax.psum(loss, AXIS)

    return jax.pmap(local, axis_name=AXIS)


def place(x):
    """[B, ...] -> [N, B / N, ...] on N devices, so that a timed call moves no data."""
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    devices = jax.local_devices()
    sharding = NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec(AXIS))
    return jax.device_put(x.reshape(len(devices), -1, *x.shape[1:]), sharding)


def serve_ours(threads: int) -> None:
    import jax

    jax.config.update("jax_num_cpu_devices", threads)
    case = {}

    def prepare(path: str, num_classes: int) -> float:
        arrays = np.load(path)
        num_pairs = len(arrays["z"])
        keys = place(jax.random.split(jax.random.key(0), num_pairs))
        case["inputs"] = keys, place(arrays["z"]), place(arrays["label"])
        shared = {"num_classes": num_classes, "num_pairs": num_pairs}
        case["3"] = mapped_loss(**shared, pixels_per_class=PIXELS_PER_CLASS)
        case["all"] = mapped_loss(**shared, pixels_per_class=None)
        for kind in ("3", "all"):
            anchors, grad, loss = case[kind](*case["inputs"])
            result = {"loss": np.asarray(loss)[0], "grad": np.asarray(grad)}
            if kind == "3":
                anchors = np.asarray(anchors).reshape(num_pairs, 2, num_classes - 1, -1, 2)
                result["anchors"] = anchors[..., 0] * arrays["z"].shape[3] + anchors[..., 1]
            np.savez(f"{path}.{kind}.npz", **result)
        return float(loss[0])

    def run(kind: str) -> float:
        return harness.timed(lambda: jax.block_until_ready(case[kind](*case["inputs"])))

    harness.serve(prepare, run)


def serve_torch(threads: int) -> None:
    import torch

    from benchmarks import torch_peer

    torch.set_num_threads(threads)
    case = {}

    def compute(function, anchors, z):
        z = z.detach().requires_grad_()
        loss = function(z, case["label"], anchors, num_classes=case["num_classes"])
        loss.backward()
        return loss.item(), z.grad

    def prepare(path: str, num_classes: int) -> dict[str, float]:
        """Returns the relative differences of lclseg's loss and gradient from those in float64."""
        arrays = np.load(path)
        z, label = torch.from_numpy(arrays["z"]), torch.from_numpy(arrays["label"])
        case["z"], case["label"] = z.flatten(2, 3), label.flatten(2).to(torch.int64)
        case["num_classes"] = num_classes
        errors = {}
        for name, function, kind in (
            ("loop", torch_peer.contrastive_loss_loop, "3"),
            ("vectorised", torch_peer.contrastive_loss, "3"),
            ("vectorised, all pixels", torch_peer.contrastive_loss, "all"),
        ):
            ours = np.load(f"{path}.{kind}.npz")
            anchors = torch.from_numpy(ours["anchors"]).to(torch.int64) if kind == "3" else None
            loss, grad = compute(function, anchors, case["z"].double())
            grad, expected = grad.numpy().ravel(), ours["grad"].ravel()
            difference = np.linalg.norm(grad - expected) / np.linalg.norm(expected)
            errors[f"loss, {name}"] = abs(loss - float(ours["loss"])) / abs(float(ours["loss"]))
            errors[f"gradient, {name}"] = float(difference)
        return errors

    def run(kind: str) -> float:
        def work():
            anchors = None
            if kind != "all":
                anchors = torch_peer.sample_anchors(
                    case["label"],
                    num_classes=case["num_classes"],
                    pixels_per_class=PIXELS_PER_CLASS,
                )
            loop = kind == "loop"
            function = torch_peer.contrastive_loss_loop if loop else torch_peer.contrastive_loss
            compute(function, anchors, case["z"])

        return harness.timed(work)

    harness.serve(prepare, run)


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--size", type=int, default=192, help="px, of the joint step's case")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--worker", choices=("ours", "torch"))
    args = parser.parse_args()
    if args.worker:
        return {"ours": serve_ours, "torch": serve_torch}[args.worker](args.threads)
    base = {"size": args.size, "num_classes": 4, "num_pairs": args.pairs}
    changes = [{}, {"size": args.size // 2}, {"size": args.size // 3}, {"num_classes": 2}]
    changes += [{"num_classes": 8}, {"num_pairs": 2 * args.pairs}]
    start = functools.partial(harness.Worker, "benchmarks.contrastive_loss")
    rows = []
    with (
        tempfile.TemporaryDirectory() as folder,
        start("--worker", "ours", "--threads", args.threads, cores=args.threads) as ours,
        start("--worker", "torch", "--threads", args.threads, cores=args.threads) as theirs,
    ):
        for change in changes:
            case = base | change
            path = str(Path(folder) / "pairs.npz")
            np.savez(path, **make_pairs(**case))
            ours.ask("prepare", path=path, num_classes=case["num_classes"])
            errors = theirs.ask("prepare", path=path, num_classes=case["num_classes"])
            for what, error in errors.items():
                # Of float32 sums over up to 70 000 pixels, against float64.
                harness.check(what, error, 1e-3)
            peers = {
                "lclseg, 3 anchors": lambda: ours.ask("run", kind="3"),
                "PyTorch, 3 anchors": lambda: theirs.ask("run", kind="3"),
                "PyTorch loop, 3 anchors": lambda: theirs.ask("run", kind="loop"),
                "lclseg, all pixels": lambda: ours.ask("run", kind="all"),
                "PyTorch, all pixels": lambda: theirs.ask("run", kind="all"),
            }
            seconds = harness.alternate(peers, args.repeats)
            rows.append(
                {
                    "px": case["size"],
                    "classes": case["num_classes"],
                    "pairs": case["num_pairs"],
                    **{f"{name}, ms": 1e3 * s for name, s in seconds.items()},
                    "all / 3": seconds["lclseg, all pixels"] / seconds["lclseg, 3 anchors"],
                }
            )
    harness.report(f"Local contrastive loss, {args.threads} threads", rows, args.json)


if __name__ == "__main__":
    sys.exit(main())
