"""Largest connected components of label maps, on the host; no JAX, since data/ uses it, too."""

from collections.abc import Iterable, Sequence

import numpy as np
from scipy import ndimage

from lclseg.class_groups import Kind, members_of

STRAY = 0.01  # share of a class that may lie apart, as specks of a mask, and it is still one piece


def one_piece(labels: Iterable[np.ndarray], classes: Sequence[Kind]) -> tuple[Kind, ...]:
    """Finds the classes that are one piece in each label that shows them, and in one at least.

    Specks do not count: the largest component holds all but 1 % of the class.

    Args:
      labels: [S, H, W] or [H, W] integers each.
      classes: foreground classes, 1 and more; a tuple is several taken together.

    Returns:
      In the order given.
    """
    shown: set[Kind] = set()
    apart: set[Kind] = set()
    for label in labels:
        for kind in classes:
            members = members_of(kind)
            for box in ndimage.find_objects(np.isin(label, members).astype(np.uint8)):
                shown.add(kind)
                size = np.count_nonzero(np.isin(label[box], members))
                kept = np.isin(largest_component(label[box], [kind]), members)
                if np.count_nonzero(kept) < (1 - STRAY) * size:
                    apart.add(kind)
    return tuple(kind for kind in classes if kind in shown - apart)


def largest_component(
    label: np.ndarray, classes: Sequence[Kind], connectivity: int | None = None
) -> np.ndarray:
    """Keeps the largest connected component of each of some classes; the rest becomes background.

    Of several classes taken together the component is kept that holds most of them: the sum over
    the classes k of |component and k| / |k| is largest. So a large false piece of one class does
    not stand against a piece that shows them all. Of one class that is the largest component.

    Of components of one size the one stays that comes first in the array's order (slices, then
    rows, then columns). A class that is absent stays absent; all other values stay as they are.

    Args:
      label: [S, H, W] or [H, W] integers.
      classes: foreground classes, 1 and more, one after the other; a tuple is several taken
        together.
      connectivity: how many coordinates may differ by one between neighbours: in 3-D 1 for the 6
        that share a face, 2 for 18, 3 for all 26; None: as many as there are axes.

    Returns:
      A new array of the shape and dtype of `label`.

    Example: a lone pixel beside two; and a piece of two classes beside a larger one of one class.

      >>> largest_component(np.array([[1, 1, 0, 1]]), classes=[1])
      array([[1, 1, 0, 0]])
      >>> largest_component(np.array([[1, 2, 0, 1, 1, 1]]), classes=[(1, 2)])
      array([[1, 2, 0, 0, 0, 0]])

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
    for kind in classes:
        members = members_of(kind)
        is_member = np.isin(kept, members)
        # In their own bounding box: most classes fill a small part of the volume.
        for box in ndimage.find_objects(is_member.astype(np.uint8)):
            components, count = ndimage.label(is_member[box], neighbours)
            if count < 2:
                continue
            sizes = [
                np.bincount(components[kept[box] == k], minlength=count + 1)[1:] for k in members
            ]
            shares = sum(size / size.sum() for size in sizes if size.any())
            best = 1 + np.argmax(shares)  # SciPy numbers them in the array's order
            kept[box][(components != 0) & (components != best)] = 0
    return kept
