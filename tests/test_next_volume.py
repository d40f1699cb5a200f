"""Which volume next: against cases worked by hand and loops written from the words."""

import numpy as np
import pytest

from lclseg import next_volume, quality_gate


def test_expected_dice_is_the_mean_agreement_of_its_draws(monkeypatch):
    values = iter([0.5, 0.75, 1.0])
    monkeypatch.setattr(quality_gate, "agreement", lambda *_, flips: next(values) - flips)
    found = next_volume.expected_dice(np.random.default_rng(0), None, None, draws=3, flips=False)
    assert found == pytest.approx(0.75)


def test_a_network_that_depends_on_the_position_is_expected_to_do_worse():
    """One finds what is bright, wherever it lies; the other the upper half of the slice."""
    image = np.zeros((2, 32, 32), np.float32)
    image[:, 8:20, 10:22] = 1.0

    def bright(images):
        return np.stack([images < 0.5, images >= 0.5], axis=-1).astype(np.float32)

    def upper(images):
        label = np.zeros(images.shape, np.float32)
        label[:, :16] = 1.0
        return np.stack([1 - label, label], axis=-1)

    good, poor = (
        next_volume.expected_dice(np.random.default_rng(0), predict, image, draws=6, flips=True)
        for predict in (bright, upper)
    )
    assert good > 0.9 > poor


def test_features_by_hand():
    """Two pixels of class 1 with 0.2 and 0.4, six of background with 0.5; class 2 is nowhere."""
    image = np.full((1, 2, 4), 0.5)
    image[0, 0, :2] = 0.2, 0.4
    probs = np.zeros((1, 2, 4, 3))
    probs[..., 0] = 1.0
    probs[0, 0, :2] = 0.0, 1.0, 0.0
    everywhere = image.mean(), image.std()
    wanted = [np.log10(3), 0.0, 0.5, 0.3, everywhere[0], 0.0, 0.1, everywhere[1]]
    np.testing.assert_allclose(next_volume.describe(image, probs), wanted, atol=1e-12)
    # A second channel, twice as bright: twice the means and spreads, after those of the first.
    both = next_volume.describe(np.stack([image, 2 * image], axis=-1), probs)
    np.testing.assert_allclose(both, [*wanted, *(2 * np.array(wanted[2:]))], atol=1e-12)


def test_distances_do_not_depend_on_units():
    rng = np.random.default_rng(0)
    pool, labelled = rng.random((5, 3)), rng.random((2, 3))
    pool[:, 2] = labelled[:, 2] = 0.5  # the same in all: tells nothing, and is no division by 0
    units = np.array([1.0, 1000.0, 1e-3])
    for found, wanted in zip(
        next_volume.distances(pool * units, labelled * units),
        next_volume.distances(pool, labelled),
        strict=True,
    ):
        np.testing.assert_allclose(found, wanted)
    within, to_labelled = next_volume.distances(pool, labelled)
    assert within.shape == (5, 5) and to_labelled.shape == (5, 2)
    np.testing.assert_allclose(np.diag(within), 0)
    spread = np.concatenate([pool, labelled]).std(axis=0)[:2]
    by_hand = np.sqrt((((pool[3] - labelled[1])[:2] / spread) ** 2).sum() / 3)
    assert to_labelled[3, 1] == pytest.approx(by_hand)


def missing(quality, nearest):
    return sum((1 - q) * d for q, d in zip(quality, nearest, strict=True))


def test_gains_are_what_the_pool_misses_less():
    """Against a loop that labels each volume in turn and adds up what is missing then."""
    rng = np.random.default_rng(1)
    places, labelled = rng.random((9, 2)), rng.random((2, 2))
    quality = rng.random(9)
    within = np.linalg.norm(places[:, None] - places, axis=-1)
    to_labelled = np.linalg.norm(places[:, None] - labelled, axis=-1)
    found = next_volume.choose(quality, within, to_labelled, 3)
    have = [list(row) for row in to_labelled]
    total = missing(quality, map(min, have))
    chosen = []
    for choice in found:
        now = missing(quality, map(min, have))
        gains = {
            v: now - missing(quality, [min(*row, within[u, v]) for u, row in enumerate(have)])
            for v in range(9)
            if v not in chosen
        }
        best = max(gains, key=gains.get)
        assert choice.number == best
        assert choice.gain == pytest.approx(gains[best] / total)
        chosen.append(best)
        for u, row in enumerate(have):
            row.append(within[u, best])


def choose_on_a_line(quality, pool, labelled, count=1):
    pool, labelled = np.array(pool, float)[:, None], np.array(labelled, float)[:, None]
    within, to_labelled = abs(pool - pool.T), abs(pool - labelled.T)
    return [c.number for c in next_volume.choose(quality, within, to_labelled, count)]


def test_low_quality_typical_and_unlike_what_is_labelled():
    # Of two alike, the one with the poorer prediction.
    assert choose_on_a_line([0.9, 0.5], [-1, 1], [0]) == [1]
    # Of two as poor, the one that others are like.
    assert choose_on_a_line([0.5] * 4, [-3, 3, 3.1, 2.9], [0]) == [1]
    # Of two as poor and as lonely, the one unlike what is labelled.
    assert choose_on_a_line([0.5, 0.5], [-1, 9], [0]) == [1]
    # The second is not the twin of the first.
    assert choose_on_a_line([0.5, 0.5, 0.5], [10, 10, -4], [0], count=2) == [0, 2]


def test_no_more_than_there_are_and_nothing_to_gain():
    assert choose_on_a_line([1.0, 1.0], [1, 2], [0], count=5) == [0, 1]
