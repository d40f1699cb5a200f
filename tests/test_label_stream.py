"""Labels made on the devices: a byte a pixel, to the bit those of the probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from lclseg import label_stream
from lclseg.crf import dense_crf
from lclseg.losses import IGNORE
from lclseg.pseudo_labels import label_bytes, label_of, label_of_bytes

THRESHOLD = 0.6


def probabilities():
    """[3, 16, 16, 4] float32: random, with ties, and with values at the threshold and beside it."""
    rng = np.random.default_rng(0)
    probs = rng.dirichlet([0.4] * 4, (3, 16, 16)).astype(np.float32)
    probs[0, 0] = [0.5, 0.5, 0, 0]
    at = np.float32(THRESHOLD)
    for column, top in enumerate((at, np.nextafter(at, 1), np.nextafter(at, 0))):
        probs[1, 1, column::3] = [0.1, top, 0.1, 0.1]
    return probs


@pytest.mark.parametrize("keep_largest", [(), (1, 3)])
@pytest.mark.parametrize("min_confidence", [0.0, THRESHOLD])
def test_bytes_give_the_labels_of_the_probabilities(min_confidence, keep_largest):
    probs = probabilities()
    found = np.asarray(jax.jit(label_bytes, static_argnums=1)(probs, min_confidence))
    assert found.shape == (3, 16, 16, 1) and found.dtype == np.uint8
    expected = label_of(
        np.stack([probs, probs], axis=1), min_confidence=min_confidence, keep_largest=keep_largest
    )
    assert np.any(expected == IGNORE) == (min_confidence > 0)
    np.testing.assert_array_equal(label_of_bytes(found, keep_largest=keep_largest), expected)


def test_volumes_are_drawn_until_they_have_enough_slices():
    num_slices = {f"v{k}": 5 + k for k in range(10)}
    seen = set()
    for seed in range(50):
        ids = label_stream.draw_volumes(np.random.default_rng(seed), num_slices, 20)
        total = [num_slices[v] for v in ids]
        assert sum(total) >= 20 > sum(total[:-1]) and len(set(ids)) == len(ids)
        seen.update(ids)
    assert seen == set(num_slices)
    for wanted in (0, 1000):
        found = label_stream.draw_volumes(np.random.default_rng(0), num_slices, wanted)
        assert set(found) == set(num_slices)


def test_the_crf_refines_on_all_devices():
    """Each its share of the slices; as one device would all of them."""
    settings = {"spatial_sigma": 2.0, "spatial_weight": 3.0, "bilateral_sigma": 0.01}
    settings |= {"intensity_sigma": 0.5, "bilateral_weight": 1.0, "num_steps": 3}
    rng = np.random.default_rng(1)
    image = rng.random((4, 2, 8, 8), np.float32)
    probs = rng.dirichlet([1.0] * 3, (4, 2, 8, 8)).astype(np.float32)
    config = ConfigDict({"crf": settings, "pseudo_labels": {"crf": True}})
    found = label_stream.refinement(config)(image, probs)
    assert found.sharding.device_set == set(jax.local_devices()) and found.shape[:3] == (4, 2, 2)
    alone = dense_crf(jnp.reshape(image, (8, 8, 8)), jnp.reshape(probs, (8, 8, 8, 3)), **settings)
    np.testing.assert_array_equal(found[:, :, 0], probs)
    np.testing.assert_allclose(np.reshape(found[:, :, 1], alone.shape), alone, atol=1e-5)
    assert np.any(np.argmax(alone, -1) != np.argmax(np.reshape(probs, alone.shape), -1))
    # The same program for each round.
    again = config.copy_and_resolve_references()
    assert label_stream.refinement(config) is label_stream.refinement(again)
    config.crf.num_steps = 0
    again.pseudo_labels.crf = False  # predictions alone are refined
    for unrefined in (config, again):
        plain = label_stream.refinement(unrefined)(image, probs)
        np.testing.assert_array_equal(plain, np.stack([probs, probs], axis=2))
