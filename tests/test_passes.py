"""Slices through the network in a step, against counts by hand."""

import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from lclseg import passes, steps
from lclseg.methods.base import base_of, method_of
from lclseg.models import UNet
from lclseg.run.programs import first_method

ROOT = Path(__file__).parents[1]
SIZE, CLASSES = 16, 3
LABELED, UNLABELED = 4, 6


def slices_in_step(name, *, first=False, shape=(SIZE, SIZE), **options):
    config = runpy.run_path(str(ROOT / "configs" / "default.py"))["get_config"](name)
    config.data.unlabeled_batch_size = UNLABELED
    config.method.update(options)
    method = method_of(config, CLASSES)
    if first:
        method = first_method(method, base_of(config, CLASSES))
    model = UNet(CLASSES, filters=(2, 4), heads=method.heads, axis_name="devices")

    def zeros(tree):
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)

    image = jnp.zeros((1, *shape))
    own = model.clone(axis_name=None)
    shapes = jax.eval_shape(lambda: own.init(jax.random.key(0), image, train=False))
    if method.networks > 1:
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((method.networks, *x.shape), x.dtype), shapes
        )
    params = zeros(shapes["params"])
    state = steps.TrainState(
        step=jnp.zeros((), jnp.int32),
        stage=jnp.array([0, 10], jnp.int32),
        params=params,
        batch_stats=zeros(shapes["batch_stats"]),
        opt_state=(),
        ema_params=params,
        memory=method.init_memory(params),
    )
    # UniMatch draws a partner for each slice.
    drawn = {"local_contrastive": {"pairs": 8}, "unimatch": {"unlabeled": 2 * UNLABELED}}
    others = {} if first else drawn.get(name, {"unlabeled": UNLABELED})
    batch = {"labeled": LABELED, **others}
    return passes.slices_in_step(model, method, state, batch, shape)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("local_contrastive", LABELED + 8),
        # The student, and the averaged weights.
        ("mean_teacher", LABELED + 2 * UNLABELED),
        # Weak, dropped features, two strong views; and the partners that are pasted.
        ("unimatch", LABELED + 4 * UNLABELED + UNLABELED),
        # Both networks see all.
        ("cps", 2 * (LABELED + UNLABELED)),
    ],
)
def test_slices_by_hand(name, expected):
    assert slices_in_step(name) == expected


def test_each_pass_of_a_loop_counts():
    """The student's slices, the teacher's pass, and those that tell how sure it is."""
    name = "uncertainty_aware_mean_teacher"
    assert slices_in_step(name, passes=8) == LABELED + UNLABELED + (1 + 8) * UNLABELED
    assert slices_in_step(name, passes=3) == LABELED + UNLABELED + (1 + 3) * UNLABELED


def test_a_gradient_within_the_step_counts_once():
    """Self-Loop: three groups; each encoder a pass of its gradient step, and one that predicts."""
    found = slices_in_step("self_loop", num_encoders=3)
    assert found == LABELED + 2 * UNLABELED + 3 * 2 * UNLABELED


def test_the_first_stage_and_channels():
    assert slices_in_step("unimatch", first=True) == LABELED
    assert slices_in_step("cps", first=True) == 2 * LABELED
    assert slices_in_step("mean_teacher", shape=(SIZE, SIZE, 2)) == LABELED + 2 * UNLABELED
