"""The quality gate against predictors whose agreement is known."""

import collections
import itertools

import numpy as np
import pytest
from scipy import ndimage

from lclseg import quality_gate


def smooth_image(shape=(3, 64, 64)):
    rng = np.random.default_rng(1)
    return ndimage.gaussian_filter(rng.normal(size=shape), (0, 6, 6)).astype(np.float32)


def as_probs(label, num_classes=3):
    return np.eye(num_classes, dtype=np.float32)[label]


def threshold(images):
    """A predictor that sees pixels only: it commutes with every change of view."""
    return as_probs(np.digitize(images, [0.02, 0.06]))


@pytest.mark.parametrize("seed", range(6))
def test_a_prediction_that_moves_with_the_image_agrees(seed):
    image = np.zeros((2, 64, 64), np.float32)
    image[:, 20:44, 24:38] = 0.04
    image[:, 26:36, 28:34] = 0.2
    image = ndimage.gaussian_filter(image, (0, 1, 1))
    value = quality_gate.agreement(np.random.default_rng(seed), threshold, image, flips=True)
    assert value > 0.9


def test_a_prediction_that_stays_in_place_does_not_agree():
    """Always the same corner: moved back by different maps it lies in different places."""

    def corner(images):
        label = np.zeros(images.shape, int)
        label[:, 4:16, 4:16] = 1
        label[:, 4:16, 18:30] = 2
        return as_probs(label)

    image = smooth_image((1, 64, 64))
    values = [
        quality_gate.agreement(np.random.default_rng(s), corner, image, flips=True)
        for s in range(400)
    ]
    # Every draw: one that passes by chance passes a volume unseen.
    assert max(values) < 0.9
    assert np.mean(values) < 0.3


def test_nothing_predicted_is_no_agreement():
    nothing = quality_gate.agreement(
        np.random.default_rng(0),
        lambda x: as_probs(np.zeros(x.shape, int)),
        smooth_image(),
        flips=True,
    )
    assert nothing == 0


def test_a_flip_is_undone_to_the_bit():
    flip = np.diag([1.0, -1.0])
    image = smooth_image()
    moved = quality_gate.move_slices(image, flip)
    np.testing.assert_allclose(moved, image[:, :, ::-1], atol=1e-6)
    np.testing.assert_allclose(quality_gate.move_slices(moved, flip), image, atol=1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_the_way_back_is_the_exact_inverse(seed):
    """A point comes back to where it was: to far less than a pixel, all over the middle."""
    matrices = quality_gate.draw_matrices(np.random.default_rng(seed), flips=True)
    # Linear interpolation is exact on coordinates.
    rows, columns = np.meshgrid(np.arange(65.0), np.arange(65.0), indexing="ij")
    for coordinate, matrix in itertools.product((rows, columns), matrices):
        moved = quality_gate.move_slices(coordinate[None], matrix)
        back = quality_gate.move_slices(moved, np.linalg.inv(matrix))
        np.testing.assert_allclose(back[0, 20:45, 20:45], coordinate[20:45, 20:45], atol=1e-4)


def test_slices_do_not_mix():
    image = np.zeros((3, 16, 16), np.float32)
    image[1] = 1
    for matrix in quality_gate.draw_matrices(np.random.default_rng(0), flips=True):
        moved = quality_gate.move_slices(image, matrix)
        assert not moved[[0, 2]].any() and moved[1, 8, 8] == pytest.approx(1)


def kind(matrix):
    if np.linalg.det(matrix) < 0:
        return "flip"
    return "scaling" if matrix[0, 1] == 0 else "rotation"


def test_the_two_maps_are_of_different_kinds_within_their_bounds():
    pairs = [quality_gate.draw_matrices(np.random.default_rng(s), flips=True) for s in range(600)]
    kinds = collections.Counter(tuple(map(kind, pair)) for pair in pairs)
    # 600 draws of six ordered pairs: 100 each, standard deviation 9.
    assert set(kinds) == set(itertools.permutations(("flip", "rotation", "scaling"), 2))
    assert all(60 < count < 140 for count in kinds.values())
    matrices = [m for pair in pairs for m in pair]
    angles = np.rad2deg([np.arctan2(m[1, 0], m[0, 0]) for m in matrices if kind(m) == "rotation"])
    factors = np.array([1 / m[0, 0] for m in matrices if kind(m) == "scaling"])
    for draws, low, high in ((angles, 10, 30), (factors - 1, 1 / 30, 1 / 10)):
        assert (np.abs(draws) >= low - 1e-9).all() and (np.abs(draws) <= high + 1e-9).all()
        assert np.ptp(np.abs(draws)) > 0.9 * (high - low)
        assert 0.4 < np.mean(draws > 0) < 0.6
    assert all((m == np.diag([1, -1])).all() for m in matrices if kind(m) == "flip")


def test_without_flips_one_copy_is_turned_and_one_scaled():
    pairs = [quality_gate.draw_matrices(np.random.default_rng(s), flips=False) for s in range(200)]
    kinds = collections.Counter(tuple(map(kind, pair)) for pair in pairs)
    assert set(kinds) == set(itertools.permutations(("rotation", "scaling"), 2))
    assert all(70 < count < 130 for count in kinds.values())  # 100 each, standard deviation 7


@pytest.mark.parametrize("flips", [False, True])
def test_a_network_that_has_never_seen_a_flip(flips):
    """It knows left from right: of a flipped slice it finds nothing where it looks."""
    image = np.zeros((2, 64, 64), np.float32)
    image[:, 24:40, 8:26] = 1

    def left(images):
        found = images > 0.5
        found[:, :, 32:] = False
        return np.stack([~found, found], axis=-1).astype(np.float32)

    rngs = [np.random.default_rng(s) for s in range(12)]
    values = [quality_gate.agreement(rng, left, image, flips=flips) for rng in rngs]
    assert (min(values) > 0.8) != flips  # a perfect prediction, and only flips tell otherwise


def test_who_has_seen_flips():
    assert quality_gate.has_seen_flips({"strength": "paper", "any_orientation": False})
    assert quality_gate.has_seen_flips({"strength": "strong", "any_orientation": True})
    assert not quality_gate.has_seen_flips({"strength": "strong", "any_orientation": False})


def test_expected_dice_is_the_mean_agreement_of_its_draws(monkeypatch):
    values = iter([0.5, 0.75, 1.0])
    monkeypatch.setattr(quality_gate, "agreement", lambda *_, flips: next(values) - flips)
    found = quality_gate.expected_dice(np.random.default_rng(0), None, None, draws=3, flips=False)
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
        quality_gate.expected_dice(np.random.default_rng(0), predict, image, draws=6, flips=True)
        for predict in (bright, upper)
    )
    assert good > 0.9 > poor
