"""What a training grid costs: Dice of masks with themselves, put on it and taken back.

A network that is right and certain in every pixel of the grid gets this. Probabilities that tell
where in a pixel an edge lies get somewhat more. So it tells which size and spacing a set needs.

  python -m benchmarks.grid_limit --input=FOLDER --grids 96x2.73438 128x2.05078

Folders are those of `layouts.find_files`; slices lie along the last axis.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks import harness
from lclseg import metrics
from lclseg.data import grid, layouts, nifti


def round_trip_dice(
    label: np.ndarray, spacing_mm: Sequence[float], *, image_size: int, target_spacing_mm: float
) -> float | None:
    """Mean foreground Dice of [X, Y, S] uint8 with itself after both ways; None: all background."""
    num_classes = int(label.max()) + 1
    there = grid.label_to_grid(
        label, spacing_mm, image_size=image_size, target_spacing_mm=target_spacing_mm
    )
    back = grid.probs_to_native_label(
        np.eye(num_classes, dtype=np.float32)[there],
        spacing_mm,
        label.shape[:2],
        target_spacing_mm=target_spacing_mm,
    )
    return metrics.mean_foreground_dice(back, label, num_classes)


def measure(folder: Path, grids: Sequence[str]) -> list[dict]:
    """A row a grid, "<px>x<mm>": mean and least Dice over the folder's masks."""
    scores: dict[str, list[float]] = {text: [] for text in grids}
    for case in layouts.find_files(folder):
        if case.label is None:
            continue
        image = nifti.read_geometry(case.image)
        values, label = np.unique(
            nifti.read_raw_label(case.label, image, case.image), return_inverse=True
        )
        label = label.reshape(image.shape).astype(np.uint8) + (values[0] != 0)
        for text, found in scores.items():
            size, spacing = text.split("x")
            dice = round_trip_dice(
                label, image.spacing_mm, image_size=int(size), target_spacing_mm=float(spacing)
            )
            found += [] if dice is None else [dice]
    if not all(scores.values()):
        raise SystemExit(f"{folder}: found no mask with foreground; wanted images with their masks")
    return [
        {"grid": text, "masks": len(found), "mean Dice": float(np.mean(found)), "least": min(found)}
        for text, found in scores.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--input", type=Path, required=True, help="folder of volumes and masks")
    parser.add_argument("--grids", nargs="+", required=True, help="e.g. 96x2.73438: px x mm")
    parser.add_argument("--json", type=Path, help="write the rows there too")
    args = parser.parse_args()
    rows = measure(args.input, args.grids)
    harness.report("masks put on a grid and taken back", rows, args.json)


if __name__ == "__main__":
    main()
