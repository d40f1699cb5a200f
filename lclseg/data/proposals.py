"""What is proposed for own data: grid, classes, and windows of CT, from headers and masks.

Nothing here is special to a modality, but for CT, whose intensities mean the same in every scan.
"""

import collections
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lclseg.data import nifti, orientation
from lclseg.data.dataset_json import is_ct, listed_names
from lclseg.data.layouts import Files, channel_number
from lclseg.data.nifti import VolumeError
from lclseg.data.survey import NAMED, Survey, voxels_in

SIZE_MULTIPLE = 32  # px: five poolings
MARGIN = 1.1  # the grid covers so many times what the masks' foreground needs
MAX_CLASSES = 255  # uint8, of which the last value stands for voxels that nothing is known of
TIE = 0.99  # spacings nearer than that count as equal
MAX_PROPOSED_SIZE = 1024  # px; a larger grid is rather a mistake of a header than meant
STRAY_VOXELS = 10  # a value with so many voxels a mask, in few masks, is a slip of the hand
WINDOW_PERCENTILES = (0.5, 99.5)  # of the foreground of CT, as nnU-Net has it


def propose_slice_axis(surveys: Sequence[Survey]) -> int:
    """Proposes the axis of the patient with the coarsest median spacing; of equal ones the last."""
    along = []
    for s in surveys:
        axes = orientation.nearest(s.affine, (1.0, 1.0, 1.0), "RAS").axes
        along.append([s.spacing_mm[a] for a in axes])
    spacing = np.median(along, axis=0)
    return int(np.flatnonzero(spacing >= TIE * spacing.max())[-1])


def propose_spacing_mm(turned: Sequence[Survey]) -> float:
    """Proposes the median in-plane spacing of all images, to five digits; axes of the volumes."""
    return float(f"{np.median([s.spacing_mm[:2] for s in turned]):.5g}")


def propose_image_size(turned: Sequence[Survey], target_spacing_mm: float) -> int:
    """Proposes the least multiple of 32 px that covers the foreground seen, and 10 % more.

    About the centre of the image, where volumes are cropped and padded; the margin ends with the
    largest image.

    Args:
      turned: their axes those of the volumes.
      target_spacing_mm: of the grid.

    Raises:
      VolumeError: more than `MAX_PROPOSED_SIZE`.
    """
    needed: dict[Files, float] = {}
    for s in turned:
        for axis in (0, 1):
            extent = s.shape[axis] * s.spacing_mm[axis]
            wanted = min(2 * MARGIN * s.reach_mm[axis], extent)
            needed[s.files] = max(needed.get(s.files, 0.0), wanted)
    largest = max(needed, key=lambda files: needed[files])
    # Rounded: 32.0000001 px of a header's float32 are 32.
    blocks = math.ceil(round(needed[largest] / target_spacing_mm / SIZE_MULTIPLE, 4))
    size = SIZE_MULTIPLE * max(blocks, 1)
    if size > MAX_PROPOSED_SIZE:
        raise VolumeError(
            f"{largest.label}: its foreground reaches over {needed[largest]:.4g} mm, which are "
            f"{size} px of {target_spacing_mm:g} mm; wanted a grid of at most {MAX_PROPOSED_SIZE} "
            "px: look at spacing and unit in its header, leave the case out (data.exclude), or set "
            "data.target_spacing_mm or data.image_size yourself"
        )
    return size


def propose_label_values(
    folder: Path, surveys: Sequence[Survey], ignore_value: int | None
) -> tuple[tuple[int, ...], list[str]]:
    """Proposes the foreground values that the masks looked at show, and warns of others.

    Others are left out: they are in so few voxels of so few masks that a hand has slipped.

    Raises:
      VolumeError: none with foreground, too many values, or 255 among others, which may
        be one or mean that nothing is known there.
    """
    masks = [s for s in surveys if s.voxels]
    shown: dict[int, list[Survey]] = collections.defaultdict(list)
    for s in masks:
        for value in s.voxels:
            if value not in (0, ignore_value):
                shown[value].append(s)
    if not shown:
        cases = ", ".join(s.case_id for s in masks[:NAMED])
        raise VolumeError(
            f"{folder}: {len(masks)} labelled and validation masks ({cases}), all of them empty; "
            "set data.labeled and data.validation to others, or draw anew with another "
            "data.draw_seed"
        )
    if len(shown) >= MAX_CLASSES:
        values = ", ".join(map(str, sorted(shown)[:8]))
        raise VolumeError(
            f"{folder}: masks show {len(shown)} values ({values}, ...); wanted fewer than "
            f"{MAX_CLASSES}: are these images? Or set data.label_values"
        )
    stray = {
        value: where
        for value, where in shown.items()
        if max(s.voxels[value] for s in where) <= STRAY_VOXELS
        and len(where) <= max(1, len(masks) // 10)
    }
    if len(stray) == len(shown):
        stray = {}
    if (
        nifti.IGNORED in shown
        and len(shown) - len(stray) > 1
        and nifti.IGNORED not in stray
        and nifti.IGNORED not in listed_names(folder)
    ):
        others = tuple(sorted(v for v in shown if v not in stray and v != nifti.IGNORED))
        raise VolumeError(
            f"{shown[nifti.IGNORED][0].files.label}: found value {nifti.IGNORED} in "
            f"{len(shown[nifti.IGNORED])} masks, beside {', '.join(map(str, others))}; wanted to "
            'know what it means. If nothing is known there, call it "ignore" in dataset.json or '
            f"set data.ignore_value={nifti.IGNORED}; if it is a class, set data.label_values="
            f"{(*others, nifti.IGNORED)}"
        )
    warnings = [
        f"value {value}: {' and '.join(voxels_in(s, value) for s in where)}, in no other mask; "
        "counts as background. If it is a class, set data.label_values; else mend the mask"
        for value, where in sorted(stray.items())
    ]
    return tuple(sorted(shown.keys() - stray.keys())), warnings


def propose_class_names(folder: Path, label_values: Sequence[int]) -> tuple[str, ...]:
    """Proposes names from dataset.json, or class_<value>."""
    listed = listed_names(folder)
    return tuple(listed.get(v) or f"class_{v}" for v in label_values)


def propose_windows(
    folder: Path, channels: Sequence[int], labeled: Sequence[Files], label_values: Sequence[int]
) -> tuple[tuple[float, float] | None, ...]:
    """Proposes percentiles of the foreground's intensities for each channel that is CT; else None.

    Args:
      folder: holds dataset.json.
      channels: numbers; (): the one file of each case.
      labeled: the cases to learn from.
      label_values: of the foreground.

    Returns:
      A window or None for each channel; () where none is CT.
    """
    windows: list[tuple[float, float] | None] = []
    for channel in channels or (0,):
        if not is_ct(folder, channel):
            windows.append(None)
            continue
        values = []
        for f in labeled:
            assert f.label is not None
            path = next(p for p in f.images if channel_number(p) == channel or not channels)
            volume = nifti.read_image(path)
            raw = nifti.read_raw_label(f.label, volume, path)
            label = nifti.whole_numbers(f.label, raw)
            values.append(volume.image[np.isin(label, label_values)])
        if not values:  # `splits.resolve_split` tells that they have no mask
            windows.append(None)
            continue
        low, high = np.percentile(np.concatenate(values), WINDOW_PERCENTILES)
        windows.append((float(low), float(high)) if high > low else None)
    return tuple(windows) if any(windows) else ()
