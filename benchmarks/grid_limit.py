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
) -> float:
    """Mean Dice of the classes that [X, Y, S] uint8, some foreground in it, shows: with itself."""
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


def measure(folder: Path, grids: Sequence[tuple[int, float]]) -> list[dict]:
    """A row a grid, (px, mm): mean and least Dice over the folder's masks that show anything."""
    scores: dict[tuple[int, float], list[float]] = {where: [] for where in grids}
    for case in layouts.find_files(folder):
        if case.label is None:
            continue
        image = nifti.read_geometry(case.image)
        raw = nifti.whole_numbers(case.label, nifti.read_raw_label(case.label, image, case.image))
        label, _ = nifti.map_label_values(raw, [v for v in np.unique(raw) if v])
        if not label.any():
            continue
        for (size, spacing), found in scores.items():
            dice = round_trip_dice(
                label, image.spacing_mm, image_size=size, target_spacing_mm=spacing
            )
            found.append(dice)
    if not all(scores.values()):
        raise SystemExit(f"{folder}: found no mask with foreground; wanted images with their masks")
    return [
        {
            "px": size,
            "mm": spacing,
            "masks": len(found),
            "mean Dice": float(np.mean(found)),
            "least": min(found),
        }
        for (size, spacing), found in scores.items()
    ]


def grid_of(text: str) -> tuple[int, float]:
    """(96, 2.5) of "96x2.5"; raises argparse.ArgumentTypeError."""
    size, _, spacing = text.partition("x")
    try:
        found = int(size), float(spacing)
    except ValueError:
        found = 0, 0.0
    if not (found[0] > 0 and 0 < found[1] < float("inf")):
        raise argparse.ArgumentTypeError(f"found {text!r}; wanted px x mm, such as 96x2.73438")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--input", type=Path, required=True, help="folder of volumes and masks")
    parser.add_argument(
        "--grids", nargs="+", type=grid_of, required=True, help="e.g. 96x2.73438: px x mm"
    )
    parser.add_argument("--json", type=Path, help="write the rows there too")
    args = parser.parse_args()
    rows = measure(args.input, args.grids)
    harness.report("masks put on a grid and taken back", rows, args.json)


if __name__ == "__main__":
    main()
