"""Dense CRF with the paper's settings, lclseg against pydensecrf2 on as many cores.

One batch of slices for lclseg; pydensecrf2, which knows no threads, gets a pool of processes that
share the slices out. The labels of both are compared before anything is timed.
"""

import concurrent.futures
import functools
import multiprocessing
import runpy
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks import harness


def settings() -> dict[str, float]:
    """`config.crf` with the paper's values."""
    get_config = runpy.run_path(str(harness.ROOT / "configs" / "default.py"))["get_config"]
    return get_config().crf.to_dict()


def make_slices(num_slices: int, size: int, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Images [B, H, W] and noisy probabilities [B, H, W, C] of nested ellipses."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:size, :size] / size
    images, probs = [], []
    for _ in range(num_slices):
        row, column = rng.uniform(0.45, 0.55, 2)
        radii = np.linspace(0.42, 0.15, num_classes - 1)
        label = sum(np.hypot(rows - row, (columns - column) / 0.85) < r for r in radii)
        images.append(label / num_classes + 0.1 * rng.standard_normal(label.shape))
        logits = 4 * np.eye(num_classes)[label] + rng.standard_normal((*label.shape, num_classes))
        probs.append(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))
    return np.float32(images), np.float32(probs)


def refine_by_pydensecrf(image: np.ndarray, probs: np.ndarray, crf: dict) -> np.ndarray:
    """Labels [H, W] of one slice."""
    from pydensecrf import densecrf
    from pydensecrf.utils import create_pairwise_bilateral, unary_from_softmax

    height, width, num_classes = probs.shape
    field = densecrf.DenseCRF2D(width, height, num_classes)
    field.setUnaryEnergy(unary_from_softmax(np.ascontiguousarray(np.moveaxis(probs, -1, 0))))
    options = {"kernel": densecrf.DIAG_KERNEL, "normalization": densecrf.NORMALIZE_SYMMETRIC}
    field.addPairwiseGaussian(sxy=crf["spatial_sigma"], compat=crf["spatial_weight"], **options)
    # addPairwiseBilateral takes bytes only; ready-made features may be floating point.
    sigma, intensity = crf["bilateral_sigma"], crf["intensity_sigma"]
    features = create_pairwise_bilateral(sdims=(sigma, sigma), schan=intensity, img=image)
    field.addPairwiseEnergy(features, compat=crf["bilateral_weight"], **options)
    marginals = np.asarray(field.inference(crf["num_steps"]))
    return marginals.argmax(axis=0).astype(np.uint8).reshape(height, width)


def serve_ours(path: Path, threads: int) -> None:
    import jax

    from lclseg.crf import dense_crf
    from lclseg.run import devices

    jax.config.update("jax_num_cpu_devices", threads)  # as in a run, and all of them share
    with np.load(path) as content:
        image, probs = content["image"], content["probs"]
    refine = devices.on_each(functools.partial(dense_crf, **settings()))

    def shared(x: np.ndarray) -> np.ndarray:
        x = np.concatenate([x, np.repeat(x[:1], -len(x) % threads, axis=0)])
        return x.reshape(threads, -1, *x.shape[1:])

    def refined() -> np.ndarray:
        found = np.asarray(refine(shared(image), shared(probs)))
        return found.reshape(-1, *probs.shape[1:])[: len(image)]

    def labels() -> str:
        """Name of the file that they are in."""
        np.save(path.with_name("labels.npy"), refined().argmax(-1))
        return str(path.with_name("labels.npy"))

    def run() -> float:
        return harness.timed(refined)

    harness.serve(labels, run)


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--slices", type=int, default=10)
    parser.add_argument("--size", type=int, default=192, help="px")
    parser.add_argument("--classes", type=int, default=4)
    parser.add_argument("--worker", type=Path, help="of a worker: its slices")
    args = parser.parse_args()
    if args.worker:
        return serve_ours(args.worker, args.threads)
    image, probs = make_slices(args.slices, args.size, args.classes)
    crf = settings()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "slices.npz"
        np.savez(path, image=image, probs=probs)
        ours = harness.Worker(
            "benchmarks.dense_crf", "--worker", path, "--threads", args.threads, cores=args.threads
        )
        context = multiprocessing.get_context("spawn")
        with ours, concurrent.futures.ProcessPoolExecutor(args.threads, context) as pool:

            def theirs() -> list[np.ndarray]:
                return list(pool.map(refine_by_pydensecrf, image, probs, [crf] * len(image)))

            agreement = np.mean(np.load(ours.ask("labels")) == np.stack(theirs()))
            harness.check("labels", 1 - agreement, 0.01)
            seconds = harness.alternate(
                {
                    "lclseg": lambda: ours.ask("run"),
                    "pydensecrf2": lambda: harness.timed(theirs),
                },
                args.repeats,
            )
    rows = [
        {
            "peer": name,
            "slices/s": args.slices / value,
            "ms/slice": 1e3 * value / args.slices,
            "times pydensecrf2": seconds["pydensecrf2"] / value,
            "equal labels, %": 100 * float(agreement),
        }
        for name, value in seconds.items()
    ]
    shape = f"{args.slices} slices of {args.size} x {args.size}, {args.classes} classes"
    title = f"Dense CRF, {shape}, {crf['num_steps']} iterations, {args.threads} cores"
    harness.report(title, rows, args.json)


if __name__ == "__main__":
    sys.exit(main())
