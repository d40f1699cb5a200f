"""Test-time augmentation against SciPy, which turns slices by code of its own."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from lclseg import test_time

SIZE = 48


def smooth(channels=()):
    noise = np.random.default_rng(0).normal(size=(3, SIZE, SIZE, *channels))
    return ndimage.gaussian_filter(noise, (0, 3, 3, *[0] * len(channels))).astype(np.float32)


def turned_by_scipy(slices, degrees):
    return ndimage.rotate(
        slices, degrees, axes=(1, 2), reshape=False, order=1, mode="grid-constant"
    )


def predict(images):
    """Of two channels or one, by place too: turning the slice does not just turn the result."""
    rows = np.linspace(-2, 1, SIZE, dtype=np.float32)[None, :, None]
    first = images[..., 0] if images.ndim == 4 else images
    last = images[..., -1] if images.ndim == 4 else images
    odds = jnp.exp(jnp.stack([0 * first, 5 * first + rows, -3 * last], axis=-1))
    return odds / odds.sum(axis=-1, keepdims=True)


def test_angles_are_within_those_that_training_shows():
    assert sorted(np.rad2deg(test_time.copy_angles(90.0))) == pytest.approx([-90, 90])


@pytest.mark.parametrize("channels", [(), (2,)])
@pytest.mark.parametrize("degrees", [30, -75])
def test_slices_are_turned_as_scipy_turns_them(channels, degrees):
    image = smooth(channels)
    found = test_time.turned(jnp.array(image), np.deg2rad(degrees))
    assert found.shape == image.shape
    np.testing.assert_allclose(found, turned_by_scipy(image, degrees), atol=1e-5)


@pytest.mark.parametrize("channels", [(), (2,)])
def test_the_mean_over_copies(channels):
    """Corners too, of which turned copies see nothing: there fewer count."""
    image, degrees = smooth(channels), (30, -75)
    found = test_time.mean_over_copies(predict, jnp.array(image), np.deg2rad(degrees).tolist())
    total = np.asarray(predict(image), np.float64)
    for angle in degrees:
        probs = np.asarray(predict(turned_by_scipy(image, angle)))
        total += turned_by_scipy(probs, -angle)
    seen = total.sum(axis=-1, keepdims=True)
    assert seen.min() < 1.5 and seen.max() > 2.9
    np.testing.assert_allclose(found, total / seen, atol=1e-5)
    assert np.abs(found - predict(image)).max() > 0.1


def test_without_copies_it_is_the_prediction():
    image = jnp.array(smooth())
    found = test_time.mean_over_copies(predict, image, ())
    np.testing.assert_array_equal(found, predict(image))
