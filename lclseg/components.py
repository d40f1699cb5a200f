"""Largest connected components of label maps, on the host; no JAX, since data/ uses it, too."""

from collections.abc import Iterable, Sequence

import numpy as np
from scipy import ndimage

STRAY = 0.01  # share of a class that may lie apart, as specks of a mask, and it is still one piece


def one_piece(labels: Iterable[np.ndarray], classes: Sequence[int]) -> tuple[int, ...]:
    """Those of some classes that are one piece in each label that shows them, and in one at least.

    Specks do not count: the largest component holds all but 1 % of the class.

    Args:
      labels: [S, H, W] or [H, W] integers each.
      classes: foreground classes, 1 and more.
    """
    shown: set[int] = set()
    apart: set[int] = set()
    for label in labels:
        kept = largest_component(label, classes)
        for k in classes:
            if size := np.count_nonzero(label == k):
                shown.add(k)
                if np.count_nonzero(kept == k) < (1 - STRAY) * size:
                    apart.add(k)
    return tuple(sorted(shown - apart))


def largest_component(
    label: np.ndarray, classes: Sequence[int], connectivity: int | None = None
) -> np.ndarray:
    """Keeps the largest connected component of each of some classes; the rest becomes background.

    Of components of one size the one stays that comes first in the array's order (slices, then
    rows, then columns). A class that is absent stays absent; all other values stay as they are.

    Args:
      label: [S, H, W] or [H, W] integers.
      classes: foreground classes, 1 and more.
      connectivity: how many coordinates may differ by one between neighbours: in 3-D 1 for the 6
        that share a face, 2 for 18, 3 for all 26; None: as many as there are axes.

    Returns:
      A new array of the shape and dtype of `label`.

    Example: a lone pixel beside two.

      >>> largest_component(np.array([[1, 1, 0, 1]]), classes=[1])
      array([[1, 1, 0, 0]])

    Raises:
      ValueError: a label of other than 2 or 3 axes, or a connectivity that it does not have.
      TypeError: the label is not an integer array.
    """
    if label.ndim not in (2, 3):
        raise ValueError(f"found a label {label.shape}; wanted [S, H, W] or [H, W]")
    if not np.issubdtype(label.dtype, np.integer):
        raise TypeError(f"found a label of {label.dtype}; wanted integers, a class per pixel")
    connectivity = label.ndim if connectivity is None else connectivity
    if not 1 <= connectivity <= label.ndim:
        raise ValueError(
            f"found connectivity {connectivity}; wanted 1 to {label.ndim}, the axes of the label"
        )
    neighbours = ndimage.generate_binary_structure(label.ndim, connectivity)
    kept = label.copy()
    # Each class in its own bounding box: most classes fill a small part of the volume.
    boxes = ndimage.find_objects(np.where(np.isin(label, classes), label, 0))
    for k, box in enumerate(boxes, start=1):
        if box is None:
            continue
        components, count = ndimage.label(label[box] == k, neighbours)
        if count > 1:
            sizes = np.bincount(components.ravel())
            largest = 1 + sizes[1:].argmax()  # SciPy numbers them in the array's order
            kept[box][(components != 0) & (components != largest)] = 0
    return kept
