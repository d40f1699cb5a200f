"""From NIfTI files to the prepared set, without N4: lclseg against skimage slice by slice.

lclseg's `open_prepared` on synthetic volumes in the Decathlon's layout: read, normalise, resample,
crop, write a set that training reads at random, native labels included. The peer is the usual
loop: nibabel, percentiles, `skimage.transform.rescale` for each slice, crop or pad; once in the
place of lclseg's own, one volume after the other, writing the same set; and once as a script of its
own that writes one uncompressed .npz file per volume, in one process and in one per core. The grids
of both coincide, so that their slices can be compared; that is done before the timing.
"""

import concurrent.futures
import functools
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import numpy as np

from benchmarks import harness

# Their ratio puts no sampling point midway between two pixels. Sizes are odd, and so is what they
# become, 189 and 217: the middle pixels, which ours aligns, are the centres, which skimage aligns.
SPACING_MM, TARGET_MM = 1.0, 9 / 7
SHAPE = (243, 279, 10)


def write_volumes(folder: Path, num_volumes: int) -> None:
    """The Decathlon's layout of hippocampus: images int16, labels 0..2, compressed."""
    import nibabel as nib

    listing = []
    for n in range(num_volumes):
        rng = np.random.default_rng(n)
        grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1) / SHAPE
        radius = np.linalg.norm((grid - rng.uniform(0.4, 0.6, 3)) * (1, 1, 0.5), axis=-1)
        label = (radius < 0.2).astype(np.uint8) + (radius < 0.1)
        image = (300.0 + 200.0 * label + 50 * rng.standard_normal(SHAPE)).astype(np.int16)
        names = {"image": f"imagesTr/case_{n:03d}.nii.gz", "label": f"labelsTr/case_{n:03d}.nii.gz"}
        for kind, data in (("image", image), ("label", label)):
            path = folder / names[kind]
            path.parent.mkdir(parents=True, exist_ok=True)
            file = nib.Nifti1Image(data, np.diag([SPACING_MM, SPACING_MM, 8.0, 1.0]))
            nib.save(file, path)
        listing.append(names)
    (folder / "dataset.json").write_text(json.dumps({"training": listing}))


def rescale_slices(
    volume: np.ndarray, spacing_mm: Sequence[float], *, image_size: int, order: int
) -> np.ndarray:
    """The peer's resampling: [X, Y, S] -> [S, H, W]."""
    from skimage.transform import rescale

    options = {"order": order, "preserve_range": True, "anti_aliasing": False, "mode": "edge"}
    scale = np.array(spacing_mm[:2]) / TARGET_MM
    slices = np.moveaxis(volume, 2, 0)
    return np.stack([crop_or_pad(rescale(s, scale, **options), image_size) for s in slices])


def rescale_image(image: np.ndarray, spacing_mm: Sequence[float], *, image_size: int, **_):
    """What the peer has for `preprocessing.to_slices`; [S, H, W] float32."""
    low, high = np.percentile(image, (1, 99))
    image = (image - low) / (high - low)
    return rescale_slices(image, spacing_mm, image_size=image_size, order=1).astype(np.float32)


def rescale_label(label: np.ndarray, spacing_mm: Sequence[float], *, image_size: int, **_):
    """What the peer has for `volumes.label_to_grid`; [S, H, W] uint8."""
    return rescale_slices(label, spacing_mm, image_size=image_size, order=0).astype(np.uint8)


def rescale_to_file(names: dict[str, str], *, folder: Path, output: Path, size: int) -> None:
    """The peer as a script of its own."""
    import nibabel as nib

    file = nib.load(folder / names["image"])
    spacing_mm = file.header.get_zooms()
    image = rescale_image(file.get_fdata(dtype=np.float32), spacing_mm, image_size=size)
    label = np.asarray(nib.load(folder / names["label"]).dataobj)
    label = rescale_label(label, spacing_mm, image_size=size)
    np.savez(output / Path(names["image"]).name, image=image, label=label)


def crop_or_pad(x: np.ndarray, size: int) -> np.ndarray:
    """[X, Y] -> [size, size] about the middle pixel."""
    for axis, length in enumerate(x.shape):
        extra = size - length
        if extra > 0:
            width = [(0, 0), (0, 0)]
            before = size // 2 - length // 2
            width[axis] = (before, extra - before)
            x = np.pad(x, width)
        else:
            first = length // 2 - size // 2
            x = np.take(x, range(first, first + size), axis=axis)
    return x


def serve_ours(folder: Path, size: int) -> None:
    import absl.logging

    from lclseg.data import grid, preprocess
    from lclseg.data.dataset import open_prepared
    from tfds_builders import slices

    absl.logging.set_verbosity(absl.logging.ERROR)  # as in a run: TFDS logs by the page
    opened = {}

    def run() -> float:
        with tempfile.TemporaryDirectory() as data_dir:
            options = {"data_dir": data_dir, "manual_dir": str(folder)}

            def work():
                opened["set"] = open_prepared(
                    "hippocampus", image_size=size, target_spacing_mm=TARGET_MM, **options
                )

            seconds = harness.timed(work)
            first = next(iter(opened["set"].volumes.values()))
            image, label = opened["set"].read_slices(first.slices)
        np.savez(folder / "ours.npz", image=image, label=label)
        return seconds

    def run_with_rescale() -> float:
        """The same set, resampled by the peer, one volume after the other."""
        with (
            mock.patch.object(preprocess, "to_slices", rescale_image),
            mock.patch.object(grid, "label_to_grid", rescale_label),
            mock.patch.object(slices, "usable_cores", lambda: 1),
        ):
            return run()

    harness.serve(run, run_with_rescale)


def main() -> None:
    parser = harness.parser(__doc__, repeats=3)
    parser.add_argument("--volumes", type=int, default=60, help="of 10 slices, 243 x 279")
    parser.add_argument("--size", type=int, default=192, help="px")
    parser.add_argument("--worker", type=Path, help="of a worker: folder of the volumes")
    args = parser.parse_args()
    if args.worker:
        return serve_ours(args.worker, args.size)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_volumes(folder, args.volumes)
        cases = json.loads((folder / "dataset.json").read_text())["training"]
        output = folder / "output"
        output.mkdir()
        one = functools.partial(rescale_to_file, folder=folder, output=output, size=args.size)
        arguments = ("--worker", folder, "--size", args.size)
        context = multiprocessing.get_context("spawn")
        with (
            harness.Worker("benchmarks.preprocess", *arguments, cores=args.threads) as ours,
            concurrent.futures.ProcessPoolExecutor(args.threads, context) as pool,
        ):
            one(cases[0])
            expected = np.load(output / (Path(cases[0]["image"]).name + ".npz"))
            for program in ("run", "run_with_rescale"):
                ours.ask(program)
                found = np.load(folder / "ours.npz")
                harness.check(
                    "image", float(np.abs(found["image"] - expected["image"]).max()), 1e-4
                )
                harness.check("label", float(np.mean(found["label"] != expected["label"])), 0.0)
            peers = {
                "lclseg": lambda: ours.ask("run"),
                "skimage, the same set, 1 process": lambda: ours.ask("run_with_rescale"),
                "skimage, .npz, 1 process": lambda: harness.timed(lambda: list(map(one, cases))),
                f"skimage, .npz, {args.threads} processes": lambda: harness.timed(
                    lambda: list(pool.map(one, cases))
                ),
            }
            seconds = harness.alternate(peers, args.repeats)
    num_slices = args.volumes * SHAPE[2]
    rows = [
        {
            "peer": name,
            "slices/s": num_slices / value,
            "seconds": value,
            "lclseg / peer, speed": value / seconds["lclseg"],
        }
        for name, value in seconds.items()
    ]
    title = f"Preparation, {args.volumes} volumes {SHAPE} to {args.size} px, {args.threads} cores"
    harness.report(title, rows, args.json)


if __name__ == "__main__":
    sys.exit(main())
