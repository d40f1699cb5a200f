"""The way from a native volume to the network's slices: one for preparing sets and for predicting.

Letters: X Y S native volume (slices on the last axis), H W training grid. No JAX in here.
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from lclseg.data import grid, nifti

# What `to_slices` does whatever the values of a `Preprocessing`; stored beside them, so that a
# version that does otherwise can tell.
FIXED = {"percentiles": list(grid.PERCENTILES)}
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
      slice_axis: of the files; see `volumes.slices_last`.
    """

    class_names: tuple[str, ...]
    label_values: tuple[int, ...]
    others_are_background: bool
    image_size: int
    target_spacing_mm: float
    n4_shrink_factor: int
    channel: int | None
    slice_axis: int = 2


def to_slices(
    image: np.ndarray,
    spacing_mm: tuple[float, float, float],
    *,
    image_size: int,
    target_spacing_mm: float,
    n4_shrink_factor: int,
) -> np.ndarray:
    """N4, percentiles, resampling, crop or pad: [X, Y, S] -> [S, H, W] float32."""
    if n4_shrink_factor:
        # Here: a set that is not corrected does without SimpleITK and its second of import.
        from lclseg.data.bias_field import correct_bias_field

        image = correct_bias_field(image, spacing_mm, shrink_factor=n4_shrink_factor)
    return grid.image_to_grid(
        grid.normalize_intensity(image),
        spacing_mm,
        image_size=image_size,
        target_spacing_mm=target_spacing_mm,
    )


def to_json(preprocessing: Preprocessing) -> dict:
    """Values for a JSON file; `from_json` reads them back."""
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
    return Preprocessing(**values)


def is_whole(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _are_names(value: Any) -> bool:
    if not (isinstance(value, list) and all(isinstance(v, str) and v for v in value)):
        return False
    return 0 < len(value) == len(set(value)) < 256


def _are_label_values(value: Any) -> bool:
    if not (isinstance(value, list) and all(is_whole(v, 1, nifti.MAX_LABEL_VALUE) for v in value)):
        return False
    return len(set(value)) == len(value)


def _is_length(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0


# Key: (is it right, what is wanted).
WANTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "class_names": (_are_names, "a list of different names"),
    "label_values": (_are_label_values, f"different whole numbers 1..{nifti.MAX_LABEL_VALUE}"),
    "others_are_background": (lambda v: type(v) is bool, "true or false"),
    "image_size": (lambda v: is_whole(v, 1, MAX_IMAGE_SIZE), f"1..{MAX_IMAGE_SIZE}"),
    "target_spacing_mm": (_is_length, "a number above 0"),
    "n4_shrink_factor": (lambda v: is_whole(v, 0, 64), "0..64"),
    "channel": (lambda v: v is None or is_whole(v, 0, 2**15), "null, or 0 or more"),
    "slice_axis": (lambda v: is_whole(v, 0, 2), "0, 1 or 2"),
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
