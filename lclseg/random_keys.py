"""Random keys by purpose and by slice, so that no draw depends on another, nor on devices."""

import zlib

import jax
import jax.numpy as jnp

Array = jax.Array


def named_key(key: Array, name: str) -> Array:
    """Makes the random key of one purpose: independent of all others, whichever these are."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def first_place(num_local: int, axis_name: str | None) -> Array | int:
    """Finds the *global* place of this device's first slice; arguments as `slice_keys`."""
    return 0 if axis_name is None else jax.lax.axis_index(axis_name) * num_local


def slice_keys(key: Array, num_local: int, axis_name: str | None) -> Array:
    """Makes one key per local slice, by its place in the *global* batch: no device count in it.

    Args:
      key: of the purpose.
      num_local: slices of this device.
      axis_name: the mapped device axis, or None on a single device.
    """
    places = first_place(num_local, axis_name) + jnp.arange(num_local)
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(places)
