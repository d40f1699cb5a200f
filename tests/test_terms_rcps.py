"""Rectified contrastive pseudo supervision against loops in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_method as tiny

from lclseg.methods import rcps
from lclseg.models import UNet

NUM, K = 2, 10  # slices of a stream; negatives
PARAMS = {"slope": jnp.float32(1.3)}
STATE = tiny.state_of()
RAMP = np.exp(-5 * 0.5**2)  # half of the stage is done
METHOD = rcps.make(tiny.options_of("rcps", num_negatives=K), tiny.BASE)
STREAMS = ("labeled", "unlabeled")


def logits_of(slope, image):
    return jnp.stack([slope * image, jnp.sin(3 * image + slope), jnp.cos(4 * image)], axis=-1)


def forward(params, images, heads):
    def outputs(x):
        cells = jnp.mean(x.reshape(len(x), 4, 4, 4, 4), axis=(2, 4))
        embedding = jnp.stack([cells, params["slope"] * jnp.cos(7 * cells), cells**2 - 1], axis=-1)
        return {"segmentation": logits_of(params["slope"], x), "embedding": embedding}

    return {g: outputs(x) for g, x in images.items()}


def make_batch():
    batch = {"labeled": tiny.slices(0, NUM), "unlabeled": tiny.slices(1, NUM, is_labeled=False)}
    for stream in STREAMS:
        clean = batch[stream]
        batch[f"{stream}_1"] = clean._replace(image=0.8 * clean.image + 0.1)
        batch[f"{stream}_2"] = clean._replace(image=1.3 * clean.image)
    return batch


def cosine(a, b):
    return np.dot(a, b) / np.sqrt(np.dot(a, a) * np.dot(b, b))


def slow_terms(batch):
    """The formulas of the module, a pixel or cell at a time."""
    images = {k: b.image for k, b in batch.items()}
    out = jax.tree.map(np.asarray, forward(PARAMS, images, None))
    logits = {k: o["segmentation"].astype(np.float64) for k, o in out.items()}
    probs = {k: tiny.softmax(z) for k, z in logits.items()}
    rectified, agreement, contrast = [], [], []
    for stream, other in (STREAMS, STREAMS[::-1]):
        for place in np.ndindex(NUM, tiny.SIZE, tiny.SIZE):
            sharp = tiny.softmax(logits[stream][place] / 0.5)
            soft = probs[stream][place]
            for v in (1, 2):
                p = probs[f"{stream}_{v}"][place]
                divergence = np.sum(soft * np.log(soft / p))
                rectified.append(-np.exp(-divergence) * np.sum(sharp * np.log(p)) + divergence)
            agreement.append(1 - cosine(*(probs[f"{stream}_{v}"][place] for v in (1, 2))))

        def cell(name, i, r, c):
            return probs[name][i, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4].mean(axis=(0, 1))

        for place in np.ndindex(NUM, 4, 4):
            own = cell(stream, *place).argmax()
            found = [(cell(other, *q), q) for q in np.ndindex(NUM, 4, 4)]
            found = [(m.max(), q) for m, q in found if m.argmax() != own]
            negatives = [q for _, q in sorted(found, reverse=True)[:K]]
            for anchor, positive in ((1, 2), (2, 1)):
                z = out[f"{stream}_{anchor}"]["embedding"][place]
                first = np.exp(cosine(z, out[f"{stream}_{positive}"]["embedding"][place]) / 0.1)
                others = [np.exp(cosine(z, out[other]["embedding"][q]) / 0.1) for q in negatives]
                contrast.append(-np.log(first / (first + sum(others))))
    return {
        "rectified_loss": 0.1 * RAMP * np.mean(rectified),
        "agreement_loss": 0.1 * RAMP * np.mean(agreement),
        "contrastive_loss": 0.1 * RAMP * np.mean(contrast),
    }


def test_terms_are_those_of_the_formulas():
    batch = make_batch()
    values, images = tiny.run_terms(METHOD.terms, forward, PARAMS, STATE, batch)
    assert set(images) == set(batch)  # one pass
    for name, wanted in slow_terms(batch).items():
        np.testing.assert_allclose(values[name], wanted, rtol=1e-4, err_msg=name)
    probs = tiny.softmax(np.asarray(logits_of(1.3, batch["labeled"].image)))
    label = np.asarray(batch["labeled"].label)[..., None]
    wanted = -np.mean(np.log(np.take_along_axis(probs, label, axis=-1)))
    np.testing.assert_allclose(values["segmentation_loss"], wanted, rtol=1e-5)


def test_only_the_divergence_of_the_view_learns():
    rng = np.random.default_rng(0)
    clean, view = rng.normal(size=(2, 5, 3)).astype(np.float32)

    def loss(clean, view):
        return jnp.sum(rcps.rectified_loss(clean, view, sharpening=0.5))

    of_clean, of_view = jax.grad(loss, argnums=(0, 1))(clean, view)
    assert not np.any(of_clean)
    # exp(-KL) is differentiated too: so says the numerical derivative.
    for place in np.ndindex(*view.shape):
        step = np.zeros_like(view)
        step[place] = 1e-2
        numerical = (loss(clean, view + step) - loss(clean, view - step)) / 2e-2
        np.testing.assert_allclose(of_view[place], numerical, rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("num_classes_seen", [1, 2])
def test_absent_classes_and_few_negatives_leave_all_finite(num_classes_seen):
    rng = np.random.default_rng(0)
    embeddings = jnp.asarray(rng.normal(size=(2, 3, 3, 4)), jnp.float32).at[0, 0, 0].set(0)
    predicted = rng.integers(0, num_classes_seen, (2, 3, 3))
    probs = jax.nn.one_hot(predicted, 3) * 0.7 + 0.1
    onehot = jax.nn.one_hot(predicted, 3)

    def loss(z):
        z = rcps.unit(z)
        negatives, known = rcps.most_confident(z, probs, number=50, axis_name=None)
        losses = rcps.contrastive_loss(z, z, onehot, negatives, known, temperature=0.1)
        return jnp.sum(losses), (losses, known)

    (_, (losses, known)), gradient = jax.value_and_grad(loss, has_aux=True)(embeddings)
    assert np.all(np.isfinite(losses)) and np.all(np.isfinite(gradient))
    wanted = [(predicted != c).sum() for c in range(3)]
    np.testing.assert_array_equal(known.sum(axis=1), wanted)
    if num_classes_seen == 1:  # nothing to tell apart
        np.testing.assert_allclose(losses, 0, atol=1e-6)


def test_views_change_intensities_as_said():
    view = METHOD.views["labeled_1"][1]
    image = np.asarray(tiny.slices(0, 1).image[0])
    label = np.asarray(tiny.slices(0, 1).label[0])
    keys = jax.random.split(tiny.KEY, 200)
    found, labels = jax.jit(jax.vmap(view, (0, None, None)))(keys, image, label)
    assert np.all(np.asarray(labels) == label)
    slopes, offsets, noises = [], [], []
    for changed in np.asarray(found):
        slope, offset = np.polyfit(image.ravel(), changed.ravel(), 1)
        slopes.append(slope)
        offsets.append(offset / image.mean())
        noises.append(np.std(changed - slope * image - offset))
    still = np.array(noises) < 1e-5
    assert 70 < still.sum() < 130
    noise_of_fit = 0.1
    assert 0.5 - noise_of_fit < min(slopes) < 0.6 and 1.4 < max(slopes) < 1.5 + noise_of_fit
    offsets = np.array(offsets)[still]
    assert -0.5 - 1e-4 < offsets.min() < -0.4 and 0.4 < offsets.max() < 0.5 + 1e-4
    assert 0.08 < max(noises) < 0.12


def test_embeddings_have_a_quarter_of_the_resolution():
    model = UNet(3, (4, 4, 8), METHOD.heads, dtype="bfloat16")
    image = jax.ShapeDtypeStruct((2, tiny.SIZE, tiny.SIZE), jnp.float32)
    run = functools.partial(model.init_with_output, train=False)
    found, _ = jax.eval_shape(run, jax.random.key(0), image)
    assert found["embedding"].shape == (2, 4, 4, 64)
    assert found["embedding"].dtype == jnp.float32


def test_the_head_is_a_prelu_between_two_linear_maps():
    head = rcps.EmbeddingHead(2)
    x = jnp.array([[[[2.0, -4.0]]]])
    dense = {"kernel": jnp.eye(2), "bias": jnp.zeros(2)}
    params = {"Dense_0": dense, "Dense_1": dense, "scale": jnp.ones(1)}
    np.testing.assert_allclose(head.apply({"params": params}, x, train=True), [[[[2, -1]]]])


def test_one_device_equals_four():
    groups = {"labeled": tiny.slices(0, 4), "unlabeled": tiny.slices(1, 4, is_labeled=False)}
    tiny.assert_same_on_4_devices(METHOD.terms, METHOD.views, forward, PARAMS, STATE, groups)
