"""Largest connected components of label maps: on the host, and within a compiled step."""

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

STRAY = 0.01  # share of a class that may lie apart, as specks of a mask, and it is still one piece


def one_piece(labels: Iterable[np.ndarray], num_classes: int) -> tuple[int, ...]:
    """The foreground classes that are one piece in each label that shows them, and in one at least.

    Specks do not count: the largest component holds all but 1 % of the class.

    Args:
      labels: [S, H, W] or [H, W] integers each.
      num_classes: C.
    """
    classes = range(1, num_classes)
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


def largest_component_2d(
    label: jax.Array, num_classes: int, *, num_iterations: int = 24
) -> jax.Array:
    """What `largest_component` does to one slice, for use within jit.

    Each pixel points at a pixel of its own component, itself at first. An iteration moves every
    pointer to the pointer of its target, and joins what touches by the lower number: distances
    double, and no component of 96 x 96 px that was tried, a spiral of 4700 px among them, took more
    than 13 iterations (blobs: 8). It ends when nothing changes. Where the bound is hit, a component
    is still in parts and its largest part stays: pixels are lost, but two components never join.

    Args:
      label: [H, W] integers, background 0.
      num_classes: C; labels of C and more are left alone.
      num_iterations: bound.

    Returns:
      [H, W], dtype of `label`. Of components of one size the first in memory order stays.
    """
    height, width = label.shape
    num_pixels = height * width
    foreground = (label > 0) & (label < num_classes)

    def moved(x: jax.Array, down: int, right: int, outside) -> jax.Array:
        padded = jnp.pad(x, 1, constant_values=outside)
        return padded[1 + down : 1 + down + height, 1 + right : 1 + right + width]

    steps = [(d, r) for d in (-1, 0, 1) for r in (-1, 0, 1) if (d, r) != (0, 0)]
    # Background has class 0, what lies outside the slice too.
    touches = [foreground & (moved(label, d, r, 0) == label) for d, r in steps]

    def iterate(carry):
        number, _, pointer = carry
        jumped = pointer[pointer]
        there = jumped.reshape(height, width)
        lowest = there
        for touch, (d, r) in zip(touches, steps, strict=True):
            lowest = jnp.where(touch, jnp.minimum(lowest, moved(there, d, r, num_pixels)), lowest)
        lowest = lowest.ravel()
        joined = jnp.minimum(jumped, lowest).at[pointer].min(lowest)
        return number + 1, jnp.any(joined != pointer), joined

    start = (0, jnp.array(True), jnp.arange(num_pixels))
    *_, pointer = jax.lax.while_loop(lambda c: (c[0] < num_iterations) & c[1], iterate, start)
    sizes = jnp.zeros(num_pixels, jnp.int32).at[pointer].add(1)[pointer]
    flat = label.ravel()
    kept = ~foreground.ravel()
    for k in range(1, num_classes):
        largest = pointer[jnp.argmax(jnp.where(flat == k, sizes, 0))]
        kept |= (flat == k) & (pointer == largest)
    return jnp.where(kept.reshape(height, width), label, 0).astype(label.dtype)
