"""Labels made on the devices: a byte a pixel, to the bit those of the probabilities."""

import jax
import numpy as np
import pytest

from lclseg import label_stream
from lclseg.evaluation import VolumePrediction
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
    prediction = VolumePrediction("", np.empty(0), probs, probs)
    expected = label_of(prediction, min_confidence=min_confidence, keep_largest=keep_largest)
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
