"""How many slices go through the network in a training step, counted in the program of the step.

A table by method would go stale, and a count of calls would miss loops, which JAX traces once.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lclseg import steps
from lclseg.methods.contract import Method
from lclseg.models import Net, UNet


def _into_network(image: jax.Array) -> jax.Array:
    """The slices as they are."""
    return image


class _MarkedNet(Net):
    """Calls `_into_network`, a program with a name, on the slices of each pass."""

    def __call__(self, params, batch_stats, images, heads, **kwargs):
        images = {group: jax.jit(_into_network)(x) for group, x in images.items()}
        return super().__call__(params, batch_stats, images, heads, **kwargs)


def slices_in_step(
    model: UNet,
    method: Method,
    state: steps.TrainState,
    batch: Mapping[str, int],
    image_shape: Sequence[int],
) -> int:
    """Counts the slices that all passes of a training step take together; computes nothing.

    A slice counts once for each pass and each network: a weak and two strong views are three, a
    teacher's pass is one more. The way back, and validation, are not counted.

    Args:
      model, method: what is trained.
      state: any of the method.
      batch: how many slices each group of a global batch has.
      image_shape: of a slice, [H, W] or [H, W, K].
    """
    array: Any = jax.ShapeDtypeStruct
    store = steps.Store(
        image=array((1, *image_shape), jnp.float32),
        label=array((1, *image_shape[:2]), jnp.uint8),
        is_labeled=array((1,), jnp.bool_),
    )
    rows = {group: array((n,), jnp.int32) for group, n in batch.items()}
    net = _MarkedNet(model.clone(axis_name=None))

    def losses(state, store, rows, key):
        views = steps.make_views(key, steps.gather(store, rows), method.views, None)
        return method.terms(net, state.params, state, views, key)

    program = jax.make_jaxpr(losses)(state, store, rows, jax.random.key(0))
    return sum(math.prod(shape) for shape in _marked(program.jaxpr)) // math.prod(image_shape)


def _marked(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    """Shapes of the marked arrays of a traced program, those in a loop once for each turn."""
    for equation in jaxpr.eqns:
        if equation.params.get("name") == _into_network.__name__:
            yield equation.outvars[0].aval.shape
            continue
        turns = equation.params["length"] if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from list(_marked(inner)) * turns
