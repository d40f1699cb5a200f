"""A tiny problem on which the terms of a method are compared with slow NumPy versions."""

import runpy
import types
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from lclseg import losses, steps
from lclseg.methods.contract import Base, Slices

NUM_CLASSES, SIZE = 3, 16
KEY = jax.random.key(5)


def cross_entropy(logits, label, axis_name):
    return losses.cross_entropy_loss(logits, label, class_weights=jnp.ones(logits.shape[-1]))


def unchanged(key, image, label):
    return image, label


def changed(key, image, label):
    return 1.2 * image + 0.1, label


BASE = Base(
    num_classes=NUM_CLASSES,
    segmentation=cross_entropy,
    labeled_view=unchanged,
    move=unchanged,
    change=changed,
    unlabeled_batch_size=4,
    embedding_dim=4,
)


def options_of(name: str, **other) -> ConfigDict:
    """The method's options from configs/methods, some of them changed."""
    path = Path(__file__).parents[1] / "configs" / "methods" / f"{name}.py"
    found = ConfigDict(runpy.run_path(str(path))["OPTIONS"])
    found.update(other)
    return found


def slices(seed: int, number: int, *, is_labeled: bool = True, size: int = SIZE) -> Slices:
    """Random images and blocks of classes."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, NUM_CLASSES, (number, size // 4, size // 4)).astype(np.uint8)
    label = coarse.repeat(4, axis=1).repeat(4, axis=2)
    image = (label / 2 + rng.normal(0, 0.3, label.shape)).astype(np.float32)
    if not is_labeled:
        label = np.full_like(label, losses.IGNORE)
    return Slices(jnp.asarray(image), jnp.asarray(label), jnp.full(number, is_labeled))


class FakeNet:
    """Stands in for `models.Net`; the statistics of a pass are its images by group.

    `forward` maps (params, images by group, heads by group) to the outputs by group and head.
    """

    def __init__(self, forward: Callable, axis_name: str | None = None):
        self.forward = forward
        self.axis_name = axis_name

    def __call__(self, params, batch_stats, images, heads, *, dropout=None):
        return self.forward(params, images, heads), images


def run_terms(terms, forward, params, state, batch) -> tuple[dict[str, float], dict]:
    """(weight x total / number of each term, images by group of the student's pass), compiled."""

    @jax.jit
    def run(params, batch):
        found, images = terms(FakeNet(forward), params, state, batch, KEY)
        values = {k: t.weight * t.total / jnp.maximum(t.number, 1) for k, t in found.items()}
        return values, images

    return jax.tree.map(np.asarray, run(params, batch))


def state_of(**fields):
    """What terms read of a state; half of the stage is done."""
    given = {"batch_stats": {}, "ema_params": {}, "progress": jnp.float32(0.5), "step": 0}
    return types.SimpleNamespace(**given | fields)


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def assert_same_on_4_devices(terms, views, forward, params, state, groups) -> None:
    """One device and four give the same loss terms and gradients, but for rounding in float64.

    Args:
      terms, views: of the method; of a stage.
      forward: of `FakeNet`.
      params: numbers and arrays; the state may use any others.
      groups: `Slices` of a global batch by group.
    """

    def run(axis_name):
        def step(params, groups):
            net = FakeNet(forward, axis_name)
            batch = steps.make_views(KEY, groups, views, axis_name)

            def loss(params):
                return steps.total_loss(terms(net, params, state, batch, KEY)[0], axis_name)

            found = jax.grad(loss, has_aux=True)(params)
            return found if axis_name is None else jax.lax.psum(found, axis_name)

        if axis_name is None:
            return jax.jit(step)(params, groups)
        shared = jax.tree.map(lambda x: x.reshape(4, -1, *x.shape[1:]), groups)
        some = jax.local_devices()[:4]
        found = jax.pmap(step, axis_name, in_axes=(None, 0), devices=some)(params, shared)
        return jax.tree.map(lambda x: x[0], found)

    with jax.enable_x64(True):
        params, groups = jax.tree.map(_wide, (params, groups))
        one, four = run(None), run("devices")
    for gradient in jax.tree.leaves(one[0]):
        assert np.linalg.norm(gradient) > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), one, four)


def _wide(x):
    x = np.asarray(x)
    return x.astype(np.float64) if x.dtype.kind == "f" else x
