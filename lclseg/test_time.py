"""Test-time augmentation: a slice's prediction is the mean over turned copies of it.

Copies are turned no further than training has shown the network (arXiv:1807.07356).
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from lclseg.augment import read_linear, rotation_matrix, warp_coordinates


def copy_angles(max_degrees: float) -> tuple[float, ...]:
    """Chooses the turned copies' angles, radians: as far as training turns slices, either way.

    On ACDC copies turned so far were worth more than ones turned less (docs/recipe.md). By 90
    degrees nothing is interpolated.
    """
    return math.radians(max_degrees), -math.radians(max_degrees)


def turned(slices: jax.Array, angle: float) -> jax.Array:
    """Turns slices [B, H, W] or [B, H, W, K] about their centre; 0 outside; same shape.

    Turning by -angle undoes it, but for what left the slice and what linear interpolation smooths.
    """
    still = jnp.zeros((2, *slices.shape[1:3]))
    coordinates = warp_coordinates(rotation_matrix(angle), still)
    return jax.vmap(lambda one: read_linear(one, coordinates))(slices)


def mean_over_copies(
    predict: Callable[[jax.Array], jax.Array], images: jax.Array, angles: Sequence[float]
) -> jax.Array:
    """Averages what is predicted for slices and for turned copies of them, turned back.

    mean_k T_k^-1 p(T_k x), k = 0 the slice x itself. Where a copy shows nothing of a pixel, the
    others alone count.

    Args:
      predict: slices [n, H, W] or [n, H, W, K] -> class probabilities [n, H, W, C], for any n; it
        is called once, with all copies.
      images: [B, H, W] or [B, H, W, K].
      angles: of the copies, radians; (): the slices alone.

    Returns:
      [B, H, W, C] float32, sums to 1 over the classes.
    """
    if not angles:
        return predict(images)
    copies = [images, *(turned(images, angle) for angle in angles)]
    probs, *others = jnp.split(predict(jnp.concatenate(copies)), len(copies))
    for other, angle in zip(others, angles, strict=True):
        probs += turned(other, -angle)
    return probs / jnp.sum(probs, axis=-1, keepdims=True)
