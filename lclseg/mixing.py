"""Mixing two slices by a mask: CutMix and copy-paste. Pure functions of arrays, one slice each.

A mask [H, W] is True where the first slice shows; image and label are mixed alike.
"""

import math

import jax
import jax.numpy as jnp

from lclseg.random_keys import first_place

Array = jax.Array


def box_mask(top: Array, left: Array, height: Array, width: Array, shape: tuple[int, int]) -> Array:
    """Makes [H, W] bool, True but for pixels of rows [top, top + height), columns likewise."""
    rows, columns = jnp.arange(shape[0])[:, None], jnp.arange(shape[1])[None, :]
    inside_rows = (rows >= top) & (rows < top + height)
    inside_columns = (columns >= left) & (columns < left + width)
    return ~(inside_rows & inside_columns)


def partners(*sizes: int) -> list[Array]:
    """Chooses which slice of each group goes into each mixture; groups may differ in size.

    By their share of the batch: the same on one device and on several. Of a smaller group each
    slice is mixed several times.

    Returns:
      [n] indices of each group, n the size of the largest.
    """
    number = max(sizes)
    return [jnp.arange(number) * size // number for size in sizes]


def copy_paste_mask(key: Array, shape: tuple[int, int], *, share: float = 2 / 3) -> Array:
    """Draws the mask of bidirectional copy-paste (BCP): all but a box of `share` of each side.

    The box lies at a random place within the slice.

    Args:
      key: a single random key.
      shape: (H, W).
      share: of each side, in (0, 1).

    Returns:
      [H, W] bool.
    """
    height, width = (int(side * share) for side in shape)
    free = jnp.array([shape[0] - height + 1, shape[1] - width + 1])
    top, left = jax.random.randint(key, (2,), 0, free)
    return box_mask(top, left, jnp.asarray(height), jnp.asarray(width), shape)


def cutmix_mask(
    key: Array,
    shape: tuple[int, int],
    *,
    probability: float = 0.5,
    area_range: tuple[float, float] = (0.02, 0.4),
    aspect_range: tuple[float, float] = (0.3, 3.3),
) -> Array:
    """Draws CutMix's mask as UniMatch has it (arXiv:2208.09910): all but a box, or everything.

    Args:
      key: a single random key.
      shape: (H, W).
      probability: chance of a box at all.
      area_range: (low, high) of the box, as a share of the slice.
      aspect_range: (low, high) of height / width; drawn evenly in its logarithm. A side longer than
        the slice's is cut to it.

    Returns:
      [H, W] bool.
    """
    apply_key, size_key, place_key = jax.random.split(key, 3)
    low = jnp.array([area_range[0], math.log(aspect_range[0])])
    high = jnp.array([area_range[1], math.log(aspect_range[1])])
    area, log_aspect = jax.random.uniform(size_key, (2,), minval=low, maxval=high)
    pixels, aspect = area * shape[0] * shape[1], jnp.exp(log_aspect)
    height = jnp.clip(jnp.round(jnp.sqrt(pixels * aspect)), 1, shape[0]).astype(jnp.int32)
    width = jnp.clip(jnp.round(jnp.sqrt(pixels / aspect)), 1, shape[1]).astype(jnp.int32)
    place = jax.random.uniform(place_key, (2,))
    top = jnp.floor(place[0] * (shape[0] - height + 1)).astype(jnp.int32)
    left = jnp.floor(place[1] * (shape[1] - width + 1)).astype(jnp.int32)
    mask = box_mask(top, left, height, width, shape)
    return mask | ~jax.random.bernoulli(apply_key, probability)


def mix(mask: Array, first: Array, second: Array) -> Array:
    """Takes `first` where the mask [..., H, W] is True, else `second`; images with channels too.

    A scalar stands for an array of its value.
    """
    if max(jnp.ndim(first), jnp.ndim(second)) > jnp.ndim(mask):
        mask = mask[..., None]
    return jnp.where(mask, first, second)


def next_slices(x: Array, axis_name: str | None) -> Array:
    """Takes the next slice of the *global* batch for each, the first for the last one: [n, ...]."""
    everything = x if axis_name is None else jax.lax.all_gather(x, axis_name, tiled=True)
    places = first_place(len(x), axis_name) + jnp.arange(len(x)) + 1
    return everything[places % len(everything)]
