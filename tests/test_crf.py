import functools

import jax
import numpy as np
import pytest
from scipy import ndimage

from lclseg.crf import dense_crf, upsampled_dense_crf

# The paper's settings for cardiac images; 5 px and 0.1 are ordinary values of a bilateral kernel.
PAPER = {
    "spatial_sigma": 10.0,
    "spatial_weight": 30.0,
    "bilateral_sigma": 0.01,
    "intensity_sigma": 0.5,
    "bilateral_weight": 10.0,
    "num_steps": 30,
}
ORDINARY = {
    "spatial_sigma": 2.0,
    "spatial_weight": 2.0,
    "bilateral_sigma": 5.0,
    "intensity_sigma": 0.1,
    "bilateral_weight": 4.0,
    "num_steps": 10,
}
OFF = {
    "spatial_sigma": 1.0,
    "spatial_weight": 0.0,
    "bilateral_sigma": 1.0,
    "intensity_sigma": 1.0,
    "bilateral_weight": 0.0,
    "num_steps": 1,
}


def phantom(height, width, seed, *, sharpness=4.0, noise=1.0):
    """Image [H, W], noisy probs [H, W, 4] and label [H, W] of three nested ellipses."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    y = (y - height * rng.uniform(0.45, 0.55)) / height
    x = (x - width * rng.uniform(0.45, 0.55)) / width
    label = sum(np.hypot(y / r, x / (0.85 * r)) < 1 for r in (0.42, 0.30, 0.18))
    image = np.array([0.1, 0.4, 0.6, 0.9])[label] + 0.1 * rng.standard_normal(label.shape)
    logits = sharpness * np.eye(4)[label] + noise * rng.standard_normal((height, width, 4))
    return image.astype(np.float32), jax.nn.softmax(logits.astype(np.float32)), label


def slow_crf(
    image,
    probs,
    *,
    spatial_sigma,
    spatial_weight,
    bilateral_sigma,
    intensity_sigma,
    bilateral_weight,
    num_steps,
):
    """The mean field in float64 over all pairs of pixels of one slice, kernels written out."""
    y, x = (axis.ravel() for axis in np.mgrid[: image.shape[0], : image.shape[1]])
    distance2 = (y[:, None] - y) ** 2.0 + (x[:, None] - x) ** 2.0
    intensity = image.astype(np.float64).ravel()
    contrast2 = (intensity[:, None] - intensity) ** 2
    spatial = np.exp(-distance2 / (2 * spatial_sigma**2))
    bilateral = np.exp(-distance2 / (2 * bilateral_sigma**2) - contrast2 / (2 * intensity_sigma**2))
    coupling = 0.0
    for weight, kernel in ((spatial_weight, spatial), (bilateral_weight, bilateral)):
        root = np.sqrt(kernel.sum(axis=1))
        coupling = coupling + weight * kernel / np.outer(root, root)
    start = np.clip(np.asarray(probs, np.float64).reshape(len(y), -1), 1e-5, 1)
    q = start / start.sum(axis=1, keepdims=True)
    for _ in range(num_steps):
        energy = np.log(start) + coupling @ q
        q = np.exp(energy - energy.max(axis=1, keepdims=True))
        q /= q.sum(axis=1, keepdims=True)
    return q.reshape(probs.shape)


def refine_one(image, probs, **settings):
    return np.asarray(dense_crf(image[None], probs[None], **settings)[0])


@pytest.mark.parametrize(
    ("shape", "seed", "sharpness", "noise"),
    [((64, 72), 0, 7.0, 2.0), ((96, 128), 1, 4.0, 1.5), ((128, 128), 2, 3.0, 1.0)],
)
def test_agrees_with_the_permutohedral_implementation(shape, seed, sharpness, noise):
    reason = "the oracle, pydensecrf2, is not installed"
    densecrf = pytest.importorskip("pydensecrf.densecrf", reason=reason, exc_type=ImportError)
    from pydensecrf.utils import create_pairwise_bilateral, unary_from_softmax

    image, probs, label = phantom(*shape, seed, sharpness=sharpness, noise=noise)
    oracle = densecrf.DenseCRF2D(shape[1], shape[0], 4)
    oracle.setUnaryEnergy(unary_from_softmax(np.moveaxis(probs, -1, 0)))
    options = {"kernel": densecrf.DIAG_KERNEL, "normalization": densecrf.NORMALIZE_SYMMETRIC}
    oracle.addPairwiseGaussian(sxy=10, compat=30, **options)
    # addPairwiseBilateral takes bytes only; ready-made features may be floating point.
    features = create_pairwise_bilateral(sdims=(0.01, 0.01), schan=0.5, img=image)
    oracle.addPairwiseEnergy(features, compat=10, **options)
    theirs = np.argmax(oracle.inference(30), axis=0).reshape(shape)

    ours = refine_one(image, probs, **PAPER).argmax(axis=-1)
    assert np.mean(ours == theirs) >= 0.99
    assert np.mean(ours == label) >= np.mean(theirs == label)
    # The comparison means nothing if both erase the organs or leave the noise.
    assert np.mean(ours == label) > max(0.95, np.mean(np.argmax(probs, axis=-1) == label))


def test_papers_settings_equal_the_sum_over_all_pairs():
    image, probs, _ = phantom(40, 52, seed=3, sharpness=8.0, noise=2.0)
    expected = slow_crf(image, probs, **PAPER)
    assert len(np.unique(expected.argmax(axis=-1))) == 4
    np.testing.assert_allclose(refine_one(image, probs, **PAPER), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("bilateral_sigma", "atol"),
    [(3.0, 1e-3), (5.0, 1e-3), (9.0, 2e-5)],  # at 9 px the window holds the whole 24 x 24 slice
)
def test_bilateral_sum_equals_the_sum_over_all_pairs(bilateral_sigma, atol):
    image, probs, _ = phantom(24, 24, seed=4, sharpness=2.0)
    settings = ORDINARY | {"bilateral_sigma": bilateral_sigma}
    expected = slow_crf(image, probs, **settings)
    assert (
        np.abs(expected - slow_crf(image, probs, **settings | {"bilateral_weight": 0})).max() > 0.1
    )
    np.testing.assert_allclose(refine_one(image, probs, **settings), expected, atol=atol)


@pytest.mark.parametrize("shape", [(17, 30), (30, 17), (5, 1)])
def test_slices_need_not_be_square(shape):
    image, probs, _ = phantom(*shape, seed=5, sharpness=2.0)
    expected = slow_crf(image, probs, **ORDINARY)
    np.testing.assert_allclose(refine_one(image, probs, **ORDINARY), expected, atol=1e-3)


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        # Both pixels hear the mean (0.625, 0.375): 4 ln 3 x 0.25 adds ln 3 to ln 3 and to 0.
        ({"spatial_sigma": 1e4, "spatial_weight": 4 * np.log(3)}, (0.9, 0.75)),
        ({"bilateral_sigma": 1e4, "bilateral_weight": 4 * np.log(3)}, (0.9, 0.75)),
        # Each hears itself only, too far or too unlike: 2 ln 3 x 0.5 adds ln 3 to ln 3, 0 to 0.
        ({"spatial_sigma": 0.01, "spatial_weight": 2 * np.log(3)}, (0.9, 0.5)),
        ({"bilateral_sigma": 0.01, "bilateral_weight": 2 * np.log(3)}, (0.9, 0.5)),
        (
            {"bilateral_sigma": 1e4, "intensity_sigma": 0.1, "bilateral_weight": 2 * np.log(3)},
            (0.9, 0.5),
        ),
    ],
)
def test_two_pixels_by_hand(kernel, expected):
    image = np.array([[0.0, 1.0]])
    probs = np.array([[[0.75, 0.25], [0.5, 0.5]]])
    result = refine_one(image, probs, **OFF | {"intensity_sigma": 1e4} | kernel)
    np.testing.assert_allclose(result[0, :, 0], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("confidence", "settings"),
    # Certainty counts as 1 - 1e-5, so a strong kernel can still overrule it: ln 1e5 = 11.5 < 30.
    [(0.8, ORDINARY), (1.0, ORDINARY | {"spatial_weight": 30.0, "bilateral_weight": 0.0})],
)
def test_isolated_wrong_pixel_is_corrected_and_the_border_stays(confidence, settings):
    label = np.repeat([[0] * 10 + [1] * 10], 20, axis=0)
    seen = label.copy()
    seen[12, 4] = 1
    probs = np.where(np.eye(2)[seen] > 0, confidence, 1 - confidence)
    refined = refine_one(label.astype(float), probs, **settings)
    np.testing.assert_array_equal(refined.argmax(axis=-1), label)


def test_zero_weights_return_the_probs():
    image, probs, _ = phantom(16, 20, seed=6)
    result = refine_one(image, probs, **OFF | {"num_steps": 5})
    np.testing.assert_allclose(result, probs, atol=1e-4)  # the clip at 1e-5 shows


@pytest.mark.parametrize("settings", [PAPER, ORDINARY, OFF])
def test_certain_probs_give_finite_marginals_that_sum_to_one(settings):
    image, _, label = phantom(24, 30, seed=7)
    result = refine_one(image, np.eye(4)[label], **settings)
    assert result.dtype == np.float32
    assert np.all(result >= 0)
    np.testing.assert_allclose(result.sum(axis=-1), 1, atol=1e-5)


@pytest.mark.parametrize("settings", [PAPER, ORDINARY])
def test_batch_equals_slice_by_slice(settings):
    image, probs = zip(*(phantom(24, 30, seed)[:2] for seed in range(3)), strict=True)
    batch = dense_crf(np.stack(image), np.stack(probs), **settings)
    alone = [refine_one(i, p, **settings) for i, p in zip(image, probs, strict=True)]
    np.testing.assert_allclose(batch, np.stack(alone), atol=1e-5)


@pytest.mark.parametrize("upsampling", [1, 2, 3])
def test_a_finer_grid_is_that_of_scipy(upsampling):
    """Middles aligned, linear between pixels, sigmas as long as on the coarse grid."""
    image, probs, _ = phantom(12, 15, seed=8)
    sizes = [n * upsampling for n in image.shape]
    at = [(np.arange(m) - m // 2) / upsampling + m // upsampling // 2 for m in sizes]
    fine = functools.partial(
        ndimage.map_coordinates,
        coordinates=np.meshgrid(*at, indexing="ij"),
        order=1,
        mode="nearest",
    )
    longer = {k: ORDINARY[k] * upsampling for k in ("spatial_sigma", "bilateral_sigma")}
    fine_probs = np.stack([fine(probs[..., c]) for c in range(4)], axis=-1)
    expected = refine_one(fine(image), fine_probs, **ORDINARY | longer)
    found = upsampled_dense_crf(image[None], probs[None], upsampling=upsampling, **ORDINARY)[0]
    assert found.shape == (12 * upsampling, 15 * upsampling, 4) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_finer_grid_finds_the_edge_between_pixels():
    """An edge of the image at a quarter of a pixel; the probabilities do not know where."""
    column = np.arange(16)
    share = np.clip(8.75 - column, 0, 1)  # of each pixel that lies left of 8.25, its centre at 8
    image = np.tile(share, (1, 16, 1))
    left = np.where(column < 8, 0.9, np.where(column > 8, 0.1, 0.5))
    probs = np.tile(np.stack([left, 1 - left], axis=-1), (1, 16, 1, 1))
    settings = OFF | {"bilateral_sigma": 1.5, "intensity_sigma": 0.2, "bilateral_weight": 3.0}
    settings["num_steps"] = 5
    found = upsampled_dense_crf(image, probs, upsampling=4, **settings)[0, 32]
    edge = ((found.argmax(axis=-1) == 0).sum() - 0.5) / 4  # in pixels of the coarse grid
    assert edge == pytest.approx(8.25, abs=0.125)


@pytest.mark.parametrize(
    ("image_shape", "probs_shape"),
    [((2, 8, 9, 1), (2, 8, 9, 4)), ((2, 8, 9), (2, 8, 9)), ((2, 8, 9), (2, 9, 8, 4))],
)
def test_shapes_that_do_not_fit_raise(image_shape, probs_shape):
    with pytest.raises(ValueError, match=r"found image \(2, 8, 9.*wanted \[B, H, W\]"):
        dense_crf(np.zeros(image_shape), np.ones(probs_shape), **OFF)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("spatial_sigma", -1.0),
        ("bilateral_sigma", 0.0),
        ("intensity_sigma", float("nan")),
        ("spatial_weight", -3.0),
        ("bilateral_weight", -3.0),
        ("num_steps", -1),
    ],
)
def test_settings_out_of_range_raise(name, value):
    with pytest.raises(ValueError, match=f"found {name}={value}, wanted"):
        dense_crf(np.zeros((1, 4, 4)), np.ones((1, 4, 4, 2)), **OFF | {name: value})
