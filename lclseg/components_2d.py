"""Largest connected components of a slice's label, within a compiled step."""

import jax
import jax.numpy as jnp


def largest_component_2d(
    label: jax.Array, num_classes: int, *, num_iterations: int = 24
) -> jax.Array:
    """Does to one slice what `components.largest_component` does, for use within jit.

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
