"""Alternate diverse teaching against NumPy, in both phases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_method as tiny

from lclseg.losses import IGNORE
from lclseg.methods import ad_mt

PERIOD, THRESHOLD = 10, 0.6
PARAMS = {"slope": jnp.float32(1.3)}
TEACHERS = ({"slope": jnp.float32(4.0)}, {"slope": jnp.float32(-3.0)})
METHOD = ad_mt.make(
    tiny.options_of("ad_mt", period=PERIOD, threshold=THRESHOLD, box_probability=1.0), tiny.BASE
)


def logits_of(slope, image):
    return jnp.stack([slope * image, jnp.sin(5 * image + slope), jnp.cos(9 * image)], axis=-1)


def forward(params, images, heads):
    return {g: {"segmentation": logits_of(params["slope"], x)} for g, x in images.items()}


def phases(steps):
    return np.array([bool(ad_mt.in_second_phase(jnp.int32(s), PERIOD)) for s in steps])


FIRST, SECOND = 0, 2 * PERIOD - 1


def state_of(step):
    return tiny.state_of(memory=TEACHERS, step=jnp.int32(step))


def make_batch():
    weak = tiny.slices(1, 4, is_labeled=False)
    changed = weak._replace(image=1.2 * weak.image + 0.1)
    return {"labeled": tiny.slices(0, 4), "unlabeled": weak, "changed": changed}


def pseudo_labels(image):
    """The slow version: pixel by pixel."""
    one, two = (tiny.softmax(np.asarray(logits_of(t["slope"], image))) for t in TEACHERS)
    label = np.full(image.shape, IGNORE, np.uint8)
    for place in np.ndindex(image.shape):
        weights = [np.exp(np.sum(q[place] * np.log(q[place]))) for q in (one, two)]
        mean = (weights[0] * one[place] + weights[1] * two[place]) / sum(weights)
        if mean.max() >= THRESHOLD:
            label[place] = mean.argmax()
    return label


def dice_loss(image, label, slope, epsilon=1e-5):
    probs = tiny.softmax(np.asarray(logits_of(slope, image), np.float64))
    known = label != IGNORE
    dice = []
    for k in range(tiny.NUM_CLASSES):
        p, g = probs[..., k][known], (label == k)[known]
        dice.append((2 * np.sum(p * g) + epsilon) / (np.sum(p) + np.sum(g) + epsilon))
    return 1 - np.mean(dice)


def test_phases_alternate_and_differ_in_length():
    found = phases(range(12 * PERIOD)).reshape(6, 2 * PERIOD)
    lengths = (~found).sum(axis=1)
    for row, length in zip(found, lengths, strict=True):
        np.testing.assert_array_equal(row, np.arange(2 * PERIOD) >= length)
    assert lengths.min() >= PERIOD / 2 and lengths.max() <= 1.5 * PERIOD
    assert len(set(lengths)) > 2


@pytest.mark.parametrize("step", [FIRST, SECOND])
def test_terms(step):
    batch = make_batch()
    values, images = tiny.run_terms(METHOD.terms, forward, PARAMS, state_of(step), batch)
    weak, changed = (np.asarray(batch[v].image) for v in ("unlabeled", "changed"))
    pseudo = pseudo_labels(weak)
    assert 0 < np.mean(pseudo == IGNORE) < 0.9
    if step == FIRST:
        np.testing.assert_array_equal(images["strong"], changed)
    else:
        own = images["strong"] == weak
        np.testing.assert_array_equal(images["strong"][~own], np.roll(weak, -1, axis=0)[~own])
        assert np.all((~own).any(axis=(1, 2))) and np.all(own.mean(axis=(1, 2)) > 0.5)
        pseudo = np.where(own, pseudo, np.roll(pseudo, -1, axis=0))
    weight = 2 * np.exp(-5 * 0.5**2)  # half of the stage is done
    wanted = weight * dice_loss(images["strong"], pseudo, 1.3)
    np.testing.assert_allclose(values["pseudo_label_loss"], wanted, rtol=1e-5)


def test_only_the_teacher_of_the_phase_learns():
    params = {"slope": jnp.float32(8.0)}
    for step, own in ((FIRST, 0), (SECOND, 1)):
        found = METHOD.remember(TEACHERS, params, jnp.int32(step))
        moved = 0.99 * TEACHERS[own]["slope"] + 0.01 * 8
        np.testing.assert_allclose(found[own]["slope"], moved, rtol=1e-6)
        assert found[1 - own]["slope"] == TEACHERS[1 - own]["slope"]


def test_both_teachers_start_as_the_student():
    for teacher in METHOD.init_memory(PARAMS):
        assert teacher == PARAMS


def test_no_gradient_flows_into_the_teachers():
    def loss(params, teachers):
        state = tiny.state_of(memory=teachers, step=jnp.int32(SECOND))
        terms, _ = METHOD.terms(tiny.FakeNet(forward), params, state, make_batch(), tiny.KEY)
        return terms["pseudo_label_loss"].total

    own, theirs = jax.jit(jax.grad(loss, argnums=(0, 1)))(PARAMS, TEACHERS)
    assert own["slope"] != 0
    assert all(t["slope"] == 0 for t in theirs)


def test_without_a_confident_pixel_the_term_and_its_gradient_are_0():
    method = ad_mt.make(tiny.options_of("ad_mt", threshold=1.0), tiny.BASE)

    def loss(params):
        terms, _ = method.terms(
            tiny.FakeNet(forward), params, state_of(SECOND), make_batch(), tiny.KEY
        )
        return terms["pseudo_label_loss"].total

    value, gradient = jax.jit(jax.value_and_grad(loss))(PARAMS)
    assert abs(value) < 1e-5 and gradient["slope"] == 0


def test_one_device_equals_four():
    groups = {"labeled": tiny.slices(0, 4), "unlabeled": tiny.slices(1, 8, is_labeled=False)}
    tiny.assert_same_on_4_devices(
        METHOD.terms, METHOD.views, forward, PARAMS, state_of(SECOND), groups
    )
