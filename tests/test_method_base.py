"""What every method builds on: the supervised loss, terms of it, and augmentation by config."""

import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lclseg import augment, losses
from lclseg.losses import IGNORE
from lclseg.methods import base, contract

DEFAULT = Path(__file__).parents[1] / "configs" / "default.py"
KINDS = (
    "dice_with_background",
    "dice_foreground",
    "cross_entropy",
    "batch_dice_and_cross_entropy",
)


def make_slices():
    rng = np.random.default_rng(1)
    label = rng.integers(0, 3, (8, 16, 16)).astype(np.uint8)
    return rng.normal(size=(*label.shape, 3)).astype(np.float32), label


@pytest.mark.parametrize(
    ("kind", "class_weights", "expected"),
    [
        ("dice_with_background", (), lambda z, y: losses.dice_loss(z, y)),
        (
            "dice_foreground",
            (),
            lambda z, y: losses.dice_loss(z, y, include_background=False),
        ),
        (
            "cross_entropy",
            (),
            lambda z, y: losses.cross_entropy_loss(z, y, class_weights=(1, 1, 1)),
        ),
        (
            "cross_entropy",
            (0.1, 1.0, 2.0),
            lambda z, y: losses.cross_entropy_loss(z, y, class_weights=(0.1, 1.0, 2.0)),
        ),
    ],
)
def test_segmentation_loss_is_the_named_one(kind, class_weights, expected):
    logits, label = make_slices()
    loss = base.segmentation_loss(logits, label, kind=kind, class_weights=class_weights)
    assert loss.shape == (8,)
    np.testing.assert_array_equal(loss, expected(logits, label))


def test_a_loss_of_the_whole_batch_has_the_batch_loss_as_its_mean():
    logits, label = make_slices()
    loss = base.segmentation_loss(
        logits, label, kind="batch_dice_and_cross_entropy", class_weights=()
    )
    assert loss.shape == (8,)
    # Dice of all slices stacked to one tall image, and optax's cross-entropy.
    dice = losses.dice_loss(logits.reshape(1, -1, 16, 3), label.reshape(1, -1, 16))[0]
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, label.astype(int))
    np.testing.assert_allclose(jnp.mean(loss), dice + jnp.mean(cross_entropy), rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "class_weights", "message"),
    [
        ("focal", (), "'focal'.*dice_with_background, dice_foreground"),
        ("cross_entropy", (1.0, 2.0), r"class_weights \(2,\); wanted \[3\]"),
    ],
)
def test_segmentation_loss_names_what_does_not_fit(kind, class_weights, message):
    logits, label = jnp.zeros((1, 2, 2, 3)), jnp.zeros((1, 2, 2), int)
    with pytest.raises(ValueError, match=message):
        base.segmentation_loss(logits, label, kind=kind, class_weights=class_weights)


def make_base(**values):
    config = runpy.run_path(str(DEFAULT))["get_config"]()
    config.update_from_flattened_dict(values)
    return base.base_of(config, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_slices_without_a_label_do_not_count(kind):
    """The term of some slices is that of the same with unlabelled ones among them."""
    made, (logits, label) = make_base(**{"loss.segmentation": kind}), make_slices()
    label[3, :4] = IGNORE  # a part of a slice
    some = [0, 3, 4]
    among = np.full_like(label, IGNORE)
    among[some] = label[some]
    few = contract.segmentation_term(made, logits[some], label[some], None, 0.25)
    all_of_them = contract.segmentation_term(made, logits, among, None, 0.25)
    assert few.number == all_of_them.number == 3
    assert few.weight == all_of_them.weight == 0.25
    np.testing.assert_allclose(all_of_them.total, few.total, rtol=1e-6)
    other = logits.copy()
    other[[1, 2, 5, 6, 7]] += 3.0
    other[3, :4] -= 2.0
    again = contract.segmentation_term(made, other, among, None)
    np.testing.assert_array_equal(again.total, all_of_them.total)


@pytest.mark.parametrize("kind", KINDS)
def test_no_label_at_all_gives_a_finite_term_and_no_gradient(kind):
    made, (logits, label) = make_base(**{"loss.segmentation": kind}), make_slices()
    nothing = np.full_like(label, IGNORE)

    def total(z):
        return contract.segmentation_term(made, z, nothing, None).total

    term = contract.segmentation_term(made, logits, nothing, None)
    assert (term.total, term.number) == (0, 0)
    np.testing.assert_array_equal(jax.grad(total)(logits), 0)


def test_ramp_up_and_confident_labels_by_hand():
    found = contract.ramp_up(jnp.array([0.0, 0.5, 1.0]))
    np.testing.assert_allclose(found, np.exp([-5.0, -1.25, 0.0]), rtol=1e-6)
    probs = jnp.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.05, 0.95, 0.0]]).reshape(1, 1, 3, 3)
    label = contract.confident_label(probs, 0.8)
    assert label.dtype == jnp.uint8
    assert label.ravel().tolist() == [IGNORE, 2, 1]


def some_slice():
    rng = np.random.default_rng(0)
    label = np.kron(rng.integers(0, 3, (4, 4)), np.ones((4, 4))).astype(np.uint8)
    return (label / 2 + rng.normal(0, 0.1, label.shape)).astype(np.float32), label


def test_the_paper_s_augmentation_is_that_of_the_config():
    """All of it; its geometry alone; its intensities alone."""
    key, (image, label) = jax.random.key(1), some_slice()
    values = {"augment.max_rotation_degrees": 30.0, "augment.elastic_probability": 0.0}
    made = make_base(**values)
    geometry = {
        "max_rotation_degrees": 30.0,
        "scale_range": (0.95, 1.05),
        "elastic_probability": 0.0,
        "elastic_sigma": 0.026,
    }
    for view, contrast, brightness in (
        (made.labeled_view, (0.8, 1.2), 0.1),
        (made.move, (1.0, 1.0), 0.0),
    ):
        expected = augment.augment_slice(
            key, image, label, contrast_range=contrast, max_brightness=brightness, **geometry
        )
        for ours, theirs in zip(view(key, image, label), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    changed, same = made.change(key, image, label)
    np.testing.assert_array_equal(same, label)
    # One contrast and one brightness: a line.
    slope, offset = np.polyfit(image.ravel(), np.asarray(changed).ravel(), 1)
    np.testing.assert_allclose(changed, slope * image + offset, atol=1e-5)
    assert (slope, offset) != (1, 0)


def test_strong_augmentation_is_geometry_then_intensity():
    key, (image, label) = jax.random.key(1), some_slice()
    values = {"strength": "strong", "any_orientation": True, "strong_rotation_degrees": 70.0}
    made = make_base(**{f"augment.{name}": value for name, value in values.items()})
    moved, moved_label = made.move(key, image, label)
    expected = augment.strong_geometry(
        key, image, label, any_orientation=True, max_rotation_degrees=70.0
    )
    np.testing.assert_array_equal(moved, expected[0])
    np.testing.assert_array_equal(moved_label, expected[1])
    changed, same = made.change(key, image, label)
    np.testing.assert_array_equal(same, label)
    np.testing.assert_array_equal(changed, augment.strong_intensity(key, image))
    both, both_label = made.labeled_view(key, image, label)
    move_key, change_key = jax.random.split(key)
    again, again_label = made.move(move_key, image, label)
    np.testing.assert_array_equal(both_label, again_label)
    np.testing.assert_array_equal(both, made.change(change_key, again, again_label)[0])
