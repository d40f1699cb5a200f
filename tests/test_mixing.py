"""Masks of CutMix and copy-paste: sizes, places and chances against their definitions."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lclseg import mixing
from lclseg.methods import self_training
from lclseg.methods.contract import Slices

SHAPE = (60, 90)


def masks_of(function, count=1500, shape=SHAPE, **options):
    one = functools.partial(function, shape=shape, **options)
    return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), count)))


def boxes(masks):
    """(top, left, height, width) of what is False in each mask, which must be one full box."""
    found = []
    for mask in masks:
        rows, columns = np.flatnonzero(~mask.all(axis=1)), np.flatnonzero(~mask.all(axis=0))
        top, left, height, width = rows[0], columns[0], np.ptp(rows) + 1, np.ptp(columns) + 1
        assert not mask[top : top + height, left : left + width].any()
        assert (~mask).sum() == height * width
        found.append((top, left, height, width))
    return np.array(found).T


def assert_even(values, low, high, tolerance=0.05):
    """The values spread evenly over [low, high]; 0.05 is 3.8 standard errors of 1500 draws."""
    for quantile in (0.1, 0.25, 0.5, 0.75, 0.9):
        share = (np.quantile(values, quantile) - low) / (high - low)
        assert share == pytest.approx(quantile, abs=tolerance)


@pytest.mark.parametrize("box", [(0, 0, 3, 4), (2, 1, 1, 5), (4, 6, 2, 1), (0, 0, 6, 7)])
def test_box_mask_is_false_in_the_box_alone(box):
    top, left, height, width = box
    expected = np.ones((6, 7), bool)
    expected[top : top + height, left : left + width] = False
    found = mixing.box_mask(*map(jnp.asarray, box), (6, 7))
    assert found.dtype == bool
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("share", "size"), [(2 / 3, (40, 60)), (0.5, (30, 45))])
def test_copy_paste_box_is_a_share_of_each_side_at_every_place_alike(share, size):
    top, left, height, width = boxes(masks_of(mixing.copy_paste_mask, share=share))
    assert set(height) == {size[0]} and set(width) == {size[1]}
    for place, last in ((top, SHAPE[0] - size[0]), (left, SHAPE[1] - size[1])):
        assert set(place) == set(range(last + 1))
        assert_even(place, 0, last)
    assert abs(np.corrcoef(top, left)[0, 1]) < 0.1


def test_copy_paste_shows_two_thirds_by_default():
    _, _, height, width = boxes(masks_of(mixing.copy_paste_mask, count=3))
    assert set(height) == {40} and set(width) == {60}


def test_cutmix_boxes_have_the_stated_areas_and_aspects():
    """With areas up to a quarter no side is longer than the slice's."""
    area_range, aspect_range, side = (0.05, 0.25), (0.3, 3.3), 240
    masks = masks_of(
        mixing.cutmix_mask,
        shape=(side, side),
        probability=1.0,
        area_range=area_range,
        aspect_range=aspect_range,
    )
    _, _, height, width = boxes(masks)
    assert_even(height * width / side**2, *area_range)
    assert_even(np.log(height / width), *np.log(aspect_range))


def test_cutmix_boxes_lie_anywhere_within_the_slice():
    top, left, height, width = boxes(masks_of(mixing.cutmix_mask, probability=1.0))
    for place, last in ((top, SHAPE[0] - height), (left, SHAPE[1] - width)):
        many = last > 20
        assert_even(place[many] / last[many], 0, 1, tolerance=0.07)
    assert abs(np.corrcoef(top, left)[0, 1]) < 0.1


def test_a_cutmix_side_longer_than_the_slice_is_cut_to_it():
    options = {"probability": 1.0, "area_range": (0.9, 0.9), "aspect_range": (3.3, 3.3)}
    top, _, height, width = boxes(masks_of(mixing.cutmix_mask, count=20, **options))
    assert set(top) == {0} and set(height) == {SHAPE[0]}
    assert set(width) == {round(np.sqrt(0.9 * SHAPE[0] * SHAPE[1] / 3.3))}


def test_the_smallest_cutmix_box_is_a_pixel():
    options = {"probability": 1.0, "area_range": (1e-6, 1e-6)}
    _, _, height, width = boxes(masks_of(mixing.cutmix_mask, count=20, **options))
    assert set(height) == set(width) == {1}


@pytest.mark.parametrize(
    ("options", "low", "high"),
    [({}, 0.45, 0.55), ({"probability": 0.0}, 0, 0), ({"probability": 1.0}, 1, 1)],
)
def test_cutmix_pastes_with_its_probability(options, low, high):
    pasted = ~masks_of(mixing.cutmix_mask, **options).all(axis=(1, 2))
    assert low <= pasted.mean() <= high


def test_image_and_label_are_mixed_alike_and_keep_their_type():
    mask = np.asarray(mixing.box_mask(*map(jnp.asarray, (1, 2, 3, 2)), (6, 7)))
    label = np.arange(42, dtype=np.uint8).reshape(1, 6, 7)
    image = label.astype(np.float32)
    mixed_image = mixing.mix(mask[None], image, image + 100)
    mixed_label = mixing.mix(mask[None], label, label + np.uint8(100))
    assert mixed_image.dtype == np.float32 and mixed_label.dtype == np.uint8
    np.testing.assert_array_equal(mixed_image, mixed_label)
    np.testing.assert_array_equal(np.asarray(mixed_label)[0] >= 100, ~mask)


@pytest.mark.parametrize("function", [mixing.copy_paste_mask, mixing.cutmix_mask])
def test_masks_take_the_key_first_and_options_by_keyword(function):
    parameters = list(inspect.signature(function).parameters.values())
    assert parameters[0].name == "key"
    assert {p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD} == {"key", "shape"}


def test_partners_of_groups_of_unequal_size():
    x, u = mixing.partners(2, 6)
    assert (x.tolist(), u.tolist()) == ([0, 0, 0, 1, 1, 1], [0, 1, 2, 3, 4, 5])
    x, u = mixing.partners(4, 4)
    assert x.tolist() == u.tolist() == [0, 1, 2, 3]


def test_self_training_mixes_every_slice_of_unequal_batches():
    """Slices of one value each: of a mixture's two values each shows where it should."""
    first, second = (
        Slices(
            image=jnp.broadcast_to(values[:, None, None], (len(values), 12, 12)),
            label=jnp.broadcast_to(values[:, None, None].astype(jnp.uint8), (len(values), 12, 12)),
            is_labeled=values < 10,
        )
        for values in (jnp.array([1.0, 2.0]), jnp.array([11.0, 12.0, 13.0, 14.0]))
    )
    image, label, is_first = self_training.copy_paste(jax.random.key(0), first, second, None)
    assert image.shape == label.shape == is_first.shape == (8, 12, 12)
    pairs = list(zip([1, 1, 2, 2] * 2, [11, 12, 13, 14] * 2, strict=True))
    for mixture, (own, other) in enumerate(pairs):
        wanted = np.where(is_first[mixture], own, other)
        np.testing.assert_array_equal(image[mixture], wanted)
        np.testing.assert_array_equal(label[mixture], wanted)
        # Of the first, all but a box of 8 x 8; the second mixture of the pair has the rest.
        assert is_first[mixture].sum() == (144 - 64 if mixture < 4 else 64)
