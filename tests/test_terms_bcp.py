"""Bidirectional copy-paste against pixel-by-pixel mixing in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_method as tiny

from lclseg.components import largest_component
from lclseg.losses import IGNORE
from lclseg.methods import bcp

NUM_LABELED, NUM_UNLABELED = 4, 4


def logits_of(params, image):
    """Logits that tell the networks and the intensities apart."""
    slope = params["slope"]
    return jnp.stack([slope * image, jnp.sin(5 * image + slope), jnp.cos(9 * image)], axis=-1)


def forward(params, images, heads):
    return {g: {"segmentation": logits_of(params, x)} for g, x in images.items()}


STATE = tiny.state_of(ema_params={"slope": 0.7})
PARAMS = {"slope": 1.3}


def make_batch(num_labeled=NUM_LABELED, num_unlabeled=NUM_UNLABELED):
    weak = tiny.slices(1, num_unlabeled, is_labeled=False)
    strong = weak._replace(image=1.2 * weak.image + 0.1)
    return {"labeled": tiny.slices(0, num_labeled), "unlabeled": weak, "strong": strong}


def pixel_losses(image, label, slope):
    probs = tiny.softmax(np.asarray(logits_of({"slope": slope}, image)))
    known = label != IGNORE
    picked = np.take_along_axis(probs, np.where(known, label, 0)[..., None], axis=-1)[..., 0]
    return -np.log(picked), known


def mean_over_slices(image, label, slope):
    """Cross-entropy over the pixels with a label of each slice, then over slices."""
    each, known = pixel_losses(image, label, slope)
    return np.mean([e[k].mean() for e, k in zip(each, known, strict=True) if k.any()])


@pytest.mark.parametrize("num_unlabeled", [4, 8])
@pytest.mark.parametrize("cleaned", [True, False])
def test_terms_are_those_of_slices_mixed_pixel_by_pixel(cleaned, num_unlabeled):
    batch = make_batch(num_unlabeled=num_unlabeled)
    method = bcp.make(tiny.options_of("bcp", largest_component=cleaned), tiny.BASE)
    values, images = tiny.run_terms(method.terms, forward, PARAMS, STATE, batch)
    mixed, weak = images["mixed"], batch["unlabeled"].image
    pseudo = np.asarray(logits_of(STATE.ema_params, weak)).argmax(axis=-1).astype(np.uint8)
    before = pseudo
    if cleaned:
        pseudo = np.stack([largest_component(p, range(1, tiny.NUM_CLASSES)) for p in pseudo])
        assert np.any(pseudo != before)
    truth, both = np.full(mixed.shape, IGNORE), np.full(mixed.shape, IGNORE)
    shown = np.zeros(len(mixed))
    for i in range(len(mixed)):
        x, u = i * NUM_LABELED // len(mixed), i * num_unlabeled // len(mixed)
        for r in range(tiny.SIZE):
            for c in range(tiny.SIZE):
                if mixed[i, r, c] == batch["labeled"].image[x, r, c]:
                    truth[i, r, c] = batch["labeled"].label[x, r, c]
                    shown[i] += 1
                else:
                    assert mixed[i, r, c] == batch["strong"].image[u, r, c]
                    both[i, r, c] = pseudo[u, r, c]
    box = int(tiny.SIZE * 2 / 3) ** 2
    outside = tiny.SIZE**2 - box
    np.testing.assert_array_equal(shown, [outside, box] * (len(mixed) // 2))

    supervised = mean_over_slices(mixed, truth, 1.3)
    np.testing.assert_allclose(values["segmentation_loss"], supervised, rtol=1e-5)
    wanted = 0.5 * mean_over_slices(mixed, both, 1.3)
    np.testing.assert_allclose(values["pseudo_label_loss"], wanted, rtol=1e-5)


def test_no_gradient_flows_into_pseudo_labels():
    method = bcp.make(tiny.options_of("bcp"), tiny.BASE)

    def loss(params, ema_params):
        state = tiny.state_of(ema_params=ema_params)
        terms, _ = method.terms(tiny.FakeNet(forward), params, state, make_batch(), tiny.KEY)
        return sum(t.weight * t.total / t.number for t in terms.values())

    own, teachers = jax.jit(jax.grad(loss, argnums=(0, 1)))(PARAMS, STATE.ema_params)
    assert abs(own["slope"]) > 0
    assert teachers["slope"] == 0


def test_pretraining_pastes_the_next_labelled_slice_with_its_mask():
    method = bcp.make(tiny.options_of("bcp"), tiny.BASE)
    terms, views = method.pretraining
    assert list(views) == ["labeled"]
    labeled = tiny.slices(0, NUM_LABELED)
    values, images = tiny.run_terms(terms, forward, PARAMS, STATE, {"labeled": labeled})
    mixed = images["mixed"]
    own = mixed == labeled.image
    following = np.roll(labeled.image, -1, axis=0)
    np.testing.assert_array_equal(mixed[~own], following[~own])
    assert np.all((~own).sum(axis=(1, 2)) == int(tiny.SIZE * 2 / 3) ** 2)
    label = np.where(own, labeled.label, np.roll(labeled.label, -1, axis=0))
    wanted = mean_over_slices(mixed, label, 1.3)
    np.testing.assert_allclose(values["segmentation_loss"], wanted, rtol=1e-5)


def test_without_pretraining_the_first_stage_is_supervised():
    assert bcp.make(tiny.options_of("bcp", pretraining=False), tiny.BASE).pretraining is None


def test_one_device_equals_four():
    # One labelled slice a device, three unlabelled ones: a place may be even here and odd there.
    groups = {"labeled": tiny.slices(0, 4), "unlabeled": tiny.slices(1, 12, is_labeled=False)}
    method = bcp.make(tiny.options_of("bcp"), tiny.BASE)
    tiny.assert_same_on_4_devices(method.terms, method.views, forward, PARAMS, STATE, groups)


def test_one_device_equals_four_in_pretraining():
    terms, views = bcp.make(tiny.options_of("bcp"), tiny.BASE).pretraining
    groups = {"labeled": tiny.slices(0, 4)}
    tiny.assert_same_on_4_devices(terms, views, forward, PARAMS, STATE, groups)
