"""N4 correction against a known field on a synthetic volume."""

import numpy as np
import pytest

from lclseg.data.bias_field import correct_bias_field

SPACING_MM = (1.5, 1.2, 8.0)


def tissue_and_field(shape=(48, 56, 6)):
    """A bright ellipsoid of two tissues on dark air, and a smooth field over it."""
    rng = np.random.default_rng(0)
    x, y, s = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    radius = x**2 + y**2 + 0.2 * s**2
    tissue = np.select([radius < 0.25, radius < 0.8], [200.0, 120.0], 2.0)
    tissue += rng.normal(0, 2, shape).clip(-2)
    return tissue, np.exp(0.35 * x - 0.25 * y + 0.1 * s), radius < 0.8


def spread(image, inside, tissue):
    """Coefficient of variation within each tissue, mean over the two."""
    classes = [inside & (tissue > 160), inside & (tissue <= 160)]
    return np.mean([image[c].std() / image[c].mean() for c in classes])


@pytest.mark.parametrize("shrink_factor", [1, 2])
def test_a_known_field_is_taken_out(shrink_factor):
    tissue, field, inside = tissue_and_field()
    image = (tissue * field).astype(np.float32)
    corrected = correct_bias_field(image, SPACING_MM, shrink_factor=shrink_factor)
    assert corrected.shape == image.shape and corrected.dtype == np.float32
    assert spread(image, inside, tissue) > 0.12
    assert spread(corrected, inside, tissue) < 0.05
    ratio = np.log(image[inside] / corrected[inside])
    # The field is known up to a factor; its axes must be those of the image.
    assert np.corrcoef(ratio, np.log(field[inside]))[0, 1] > 0.97


def test_an_image_below_zero_is_lifted():
    tissue, field, _ = tissue_and_field((32, 32, 4))
    image = tissue * field
    expected = correct_bias_field(image - image.min(), SPACING_MM, shrink_factor=2)
    lifted = correct_bias_field(image - image.min() - 500, SPACING_MM, shrink_factor=2)
    np.testing.assert_allclose(lifted, expected, rtol=0.02, atol=0.5)
