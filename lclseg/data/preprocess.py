"""The way from a native volume to the network's slices: one for preparing sets and for predicting.

Letters: X Y S native volume (slices on the last axis), H W training grid. No JAX in here.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lclseg.data import grid, nifti, orientation
from lclseg.data.layouts import Files, channel_number
from lclseg.data.nifti import Volume, VolumeError

# What `to_slices` does whatever the values of a `Preprocessing`; stored beside them, so that a
# version that does otherwise can tell.
FIXED = {"percentiles": list(grid.PERCENTILES), "clip": list(grid.CLIP)}
MAX_IMAGE_SIZE = 4096


class Preprocessing(NamedTuple):
    """How a run's volumes became slices, and what its classes are called.

    Attributes:
      class_names: of the foreground classes 1, 2, ...
      label_values: which the label files of the data set have for them.
      others_are_background: whether other values of these files count as background, or are errors.
      image_size: H = W.
      target_spacing_mm: in-plane spacing of the training grid.
      n4_shrink_factor: of N4 bias-field correction, see `bias_field`; 0: none.
      channel: which one of a 4-D file is the image; None: files are 3-D.
      orientation: of the volumes, their slices along the last axis; see `orientation`.
      channels: which of a case's files NAME_0000, NAME_0001, ... are the image; (): it is one file.
      windows: by channel, the intensities that become 0 and 1, or None: the volume's own
        percentiles; (): None for all.
      ignore_value: of the label files, where nothing is known; None: there is none.
      seen_spacing_mm: by axis, smallest and largest of the prepared volumes; (): not known.
      seen_median: likewise, of `grid.relative_median`, first channel.
    """

    class_names: tuple[str, ...]
    label_values: tuple[int, ...]
    others_are_background: bool
    image_size: int
    target_spacing_mm: float
    n4_shrink_factor: int
    channel: int | None
    orientation: str = "RAS"
    channels: tuple[int, ...] = ()
    windows: tuple[tuple[float, float] | None, ...] = ()
    ignore_value: int | None = None
    seen_spacing_mm: tuple[tuple[float, float], ...] = ()
    seen_median: tuple[float, ...] = ()

    @property
    def num_channels(self) -> int:
        """K."""
        return max(1, len(self.channels))


def read_case(files: Files, how: Preprocessing) -> tuple[Volume, dict[float, int]]:
    """Reads a case, axes as its files have them; labels become classes, and `nifti.IGNORED`.

    Returns:
      The volume, its label [X, Y, S] uint8 where there is one; and the label values that are no
      class, with their number of voxels.

    Raises:
      VolumeError: whatever is wrong with the files.
    """
    image, *others = _read_channels(files, how)
    for path, other in others:
        if other.image.shape != image[1].image.shape or nifti.max_gap_mm(
            other.affine, image[1].affine, other.image.shape
        ) > nifti.MAX_GAP_VOXELS * min(other.spacing_mm):
            raise VolumeError(
                f"{path}: found shape {other.image.shape}, or another place in space, than "
                f"{image[0]}; wanted the channels of a case voxel on voxel: resample one onto the "
                "other"
            )
    volume = image[1]
    if others:
        stacked = np.stack([volume.image, *(other.image for _, other in others)], axis=-1)
        volume = volume._replace(image=stacked)
    if files.label is None:
        return volume, {}
    raw = nifti.read_raw_label(files.label, volume, image[0])
    whole = nifti.whole_numbers(files.label, raw)
    label, unknown = nifti.map_label_values(whole, how.label_values, ignored=how.ignore_value)
    return volume._replace(label=label), unknown


def _read_channels(files: Files, how: Preprocessing) -> list[tuple[Path, Volume]]:
    """The files of a case that a set takes, in its order, each with its volume."""
    if not how.channels:
        if files.others:
            raise VolumeError(
                f"{files.image}: found {len(files.images)} channels of {files.case_id}; wanted "
                "one image, as in training: move the others away"
            )
        channel = how.channel if how.channel is None or nifti.has_channels(files.image) else None
        return [(files.image, nifti.read_image(files.image, channel=channel))]
    by_number = {channel_number(p): p for p in files.images}
    missing = [n for n in how.channels if n not in by_number]
    if missing:
        raise VolumeError(
            f"{files.image}: found channel {', '.join(map(str, sorted(by_number)))} of "
            f"{files.case_id}; wanted {', '.join(map(str, how.channels))} as in training: add "
            f"{files.case_id}_{missing[0]:04d}"
        )
    return [(by_number[n], nifti.read_image(by_number[n])) for n in how.channels]


def to_slices(
    image: np.ndarray,
    spacing_mm: tuple[float, float, float],
    *,
    image_size: int,
    target_spacing_mm: float,
    n4_shrink_factor: int,
    windows: Sequence[tuple[float, float] | None] = (),
) -> np.ndarray:
    """Applies N4, percentiles or window, resampling, crop or pad: [X, Y, S] -> [S, H, W] float32.

    Of several channels, [X, Y, S, K] -> [S, H, W, K], each by itself.
    """

    def channel(one: np.ndarray, window: tuple[float, float] | None) -> np.ndarray:
        if window is not None:
            normalized = grid.window_intensity(one, *window)
        else:
            if n4_shrink_factor:
                # Here: a set that is not corrected does without SimpleITK's second of import.
                from lclseg.data.bias_field import correct_bias_field

                one = grid.without_outliers(one)  # one of them would be all that N4 sees
                one = correct_bias_field(one, spacing_mm, shrink_factor=n4_shrink_factor)
            normalized = grid.normalize_intensity(one)
        return grid.image_to_grid(
            normalized, spacing_mm, image_size=image_size, target_spacing_mm=target_spacing_mm
        )

    if image.ndim == 3:
        return channel(image, windows[0] if windows else None)
    windows = windows or [None] * image.shape[3]
    return np.stack([channel(image[..., k], window) for k, window in enumerate(windows)], axis=-1)


def to_json(preprocessing: Preprocessing) -> dict:
    """Makes values for a JSON file; `from_json` reads them back."""
    return preprocessing._asdict() | FIXED


def from_json(content: Any, source: str) -> Preprocessing:
    """Reads what `to_json` gave, trusting nothing.

    Raises:
      ValueError: naming `source`, the value found and the one wanted.
    """
    check_values(content, WANTED, source)
    values = {k: content[k] for k in Preprocessing._fields}
    names, label_values = tuple(values["class_names"]), tuple(values["label_values"])
    if len(names) != len(label_values):
        raise ValueError(
            f"{source}: found {len(names)} class_names and {len(label_values)} label_values; "
            "wanted as many of one as of the other"
        )
    values |= {"class_names": names, "label_values": label_values}
    for key in ("channels", "seen_median"):
        values[key] = tuple(values[key])
    values["windows"] = tuple(w and (w[0], w[1]) for w in values["windows"])
    values["seen_spacing_mm"] = tuple((s[0], s[1]) for s in values["seen_spacing_mm"])
    if values["windows"] and len(values["windows"]) != max(1, len(values["channels"])):
        raise ValueError(
            f"{source}: found {len(values['windows'])} windows for {len(values['channels'])} "
            "channels; wanted as many of one as of the other"
        )
    return Preprocessing(**values)


def is_whole(value: Any, low: int, high: int) -> bool:
    """Tells whether a JSON value is a whole number from low to high."""
    return type(value) is int and low <= value <= high


def _are_names(value: Any) -> bool:
    if not (isinstance(value, list) and all(isinstance(v, str) and v for v in value)):
        return False
    return 0 < len(value) == len(set(value)) < 256


def _are_label_values(value: Any) -> bool:
    if not (isinstance(value, list) and all(is_whole(v, 1, nifti.MAX_LABEL_VALUE) for v in value)):
        return False
    return len(set(value)) == len(value)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_length(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_range(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(map(_is_number, value))
        and value[0] <= value[1]
    )


def _are_channels(value: Any) -> bool:
    if not (isinstance(value, list | tuple) and all(is_whole(v, 0, 99) for v in value)):
        return False
    return len(set(value)) == len(value)


def _are_windows(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(
        w is None or (_is_range(w) and w[0] < w[1]) for w in value
    )


def _are_spacings(value: Any) -> bool:
    if not isinstance(value, list | tuple) or len(value) not in (0, 3):
        return False
    return all(_is_range(v) and v[0] > 0 for v in value)


# Key: (is it right, what is wanted).
WANTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "class_names": (_are_names, "a list of different names"),
    "label_values": (_are_label_values, f"different whole numbers 1..{nifti.MAX_LABEL_VALUE}"),
    "others_are_background": (lambda v: type(v) is bool, "true or false"),
    "image_size": (lambda v: is_whole(v, 1, MAX_IMAGE_SIZE), f"1..{MAX_IMAGE_SIZE}"),
    "target_spacing_mm": (_is_length, "a number above 0"),
    "n4_shrink_factor": (lambda v: is_whole(v, 0, 64), "0..64"),
    "channel": (lambda v: v is None or is_whole(v, 0, 2**15), "null, or 0 or more"),
    "orientation": (orientation.is_valid, "three letters such as RAS"),
    "channels": (_are_channels, "different numbers 0..99"),
    "windows": (_are_windows, "null or [low, high] for each channel"),
    "ignore_value": (
        lambda v: v is None or is_whole(v, 0, nifti.MAX_LABEL_VALUE),
        f"null, or 0..{nifti.MAX_LABEL_VALUE}",
    ),
    "seen_spacing_mm": (_are_spacings, "[], or [low, high] for each of three axes"),
    "seen_median": (lambda v: v in ([], ()) or _is_range(v), "[], or [low, high]"),
    **{
        key: (functools.partial(operator.eq, fixed), f"{fixed}: this version knows no other")
        for key, fixed in FIXED.items()
    },
}


def check_values(
    content: Any, wanted: dict[str, tuple[Callable[[Any], bool], str]], source: str
) -> None:
    """Raises ValueError at the first key of a JSON object that is missing, wrong or unknown."""
    if not isinstance(content, dict):
        raise ValueError(f"{source}: found {_short(content)}; wanted an object")
    for key, (is_right, text) in wanted.items():
        if key not in content:
            raise ValueError(f"{source}: {key} is missing; wanted {text}")
        if not is_right(content[key]):
            raise ValueError(f"{source}: {key} is {_short(content[key])}; wanted {text}")
    unknown = sorted(content.keys() - wanted.keys())
    if unknown:
        raise ValueError(
            f"{source}: found {unknown[0]!r}, which this version does not know; use the version "
            "that wrote it"
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
