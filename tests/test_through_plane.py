"""Smoothing across slices, against sums written out."""

import numpy as np
import pytest

from lclseg.through_plane import smooth_across_slices

SHAPE = 7, 2, 3, 4  # slices, rows, columns, classes


@pytest.fixture
def probs():
    rng = np.random.default_rng(0)
    return rng.dirichlet([0.3] * SHAPE[-1], SHAPE[:-1]).astype(np.float32)


def by_hand(probs, spacing, sigma):
    """The formula, slice by slice; far beyond 4 sigma nothing counts."""
    reach, last = 60, len(probs) - 1
    offsets = np.arange(-reach, reach + 1)
    weights = np.exp(-((offsets * spacing) ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    smoothed = np.zeros(probs.shape)
    for s in range(len(probs)):
        for offset, weight in zip(offsets, weights, strict=True):
            smoothed[s] += weight * probs[min(max(s + offset, 0), last)]
    return smoothed


@pytest.mark.parametrize("spacing, sigma", [(1.0, 1.0), (1.5, 2.5), (0.5, 1.5)])
def test_as_the_formula_says(probs, spacing, sigma):
    found = smooth_across_slices(probs, spacing, sigma)
    assert found.dtype == np.float32
    assert np.abs(found - probs).max() > 0.1
    np.testing.assert_allclose(found, by_hand(probs, spacing, sigma), atol=2e-4)
    np.testing.assert_allclose(found.sum(axis=-1), 1, atol=1e-5)


def test_thick_slices_stay_as_they_are(probs):
    np.testing.assert_allclose(smooth_across_slices(probs, 10.0, 1.0), probs, atol=1e-6)


def test_no_smoothing_by_nothing(probs):
    assert smooth_across_slices(probs, 1.0, 0.0) is probs
