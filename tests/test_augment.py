"""Augmentation against SciPy, NumPy and slow references."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from lclseg import augment

# Not square, and odd: on even sides a 45 degree turn puts diagonals exactly between two pixels,
# where the nearest one depends on how the compiler rounds.
SHAPE = (25, 31)
NO_JITTER = {"contrast_range": (1.0, 1.0), "max_brightness": 0.0}
NO_SMALL_AFFINE = {"max_rotation_degrees": 0.0, "scale_range": (1.0, 1.0)}


def random_slice(shape, *, dtype=np.int32, seed=0):
    rng = np.random.default_rng(seed)
    return rng.random(shape, np.float32), rng.integers(0, 4, shape).astype(dtype)


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def warp_affine(image, label, matrix, displacement=None):
    if displacement is None:
        displacement = jnp.zeros((2, *image.shape))
    return augment.warp(image, label, augment.warp_coordinates(matrix, displacement))


@jax.jit
def _over_keys(batch_keys, image, label, options):
    one = functools.partial(augment.augment_slice, **options)
    return jax.vmap(one, in_axes=(0, None, None))(batch_keys, image, label)


DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(augment.augment_slice).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
}


def over_keys(image, label, **options):
    """augment_slice of one slice under 400 keys, compiled once for all tests of one label dtype."""
    images, labels = _over_keys(keys(400), image, label, DEFAULTS | options)
    return np.asarray(images), np.asarray(labels)


def scipy_matrix(*, degrees=0.0, scale=1.0):
    """Output-to-input (row, column) matrix in float64, written down independently."""
    t = np.radians(degrees)
    return np.array([[np.cos(t), np.sin(t)], [-np.sin(t), np.cos(t)]]) / scale


def scipy_affine(array, matrix, order):
    centre = (np.array(array.shape) - 1) / 2
    return scipy.ndimage.affine_transform(
        array, matrix, offset=centre - matrix @ centre, order=order, mode="grid-constant"
    )


# --- coordinate maps and warping -----------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 8), (9, 14)])
@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_identity_is_exact(shape, dtype):
    image, label = random_slice(shape, dtype=dtype)
    warped_image, warped_label = warp_affine(image, label, jnp.eye(2))
    np.testing.assert_array_equal(warped_image, image)
    np.testing.assert_array_equal(warped_label, label)
    assert warped_image.dtype == np.float32 and warped_label.dtype == dtype


@pytest.mark.parametrize("side", [7, 8])
@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_quarter_turns_match_rot90(side, quarters):
    image, label = random_slice((side, side))
    matrix = augment.rotation_matrix(quarters * jnp.pi / 2)
    warped_image, warped_label = warp_affine(image, label, matrix)
    np.testing.assert_allclose(warped_image, np.rot90(image, quarters), atol=1e-5)
    np.testing.assert_array_equal(warped_label, np.rot90(label, quarters))


def test_quarter_turn_of_a_wide_slice_stays_centred():
    image, label = random_slice((8, 12))
    label = label + 1
    warped_image, warped_label = warp_affine(image, label, augment.rotation_matrix(jnp.pi / 2))
    np.testing.assert_allclose(warped_image[:, 2:-2], np.rot90(image[:, 2:-2]), atol=1e-5)
    np.testing.assert_array_equal(warped_label[:, 2:-2], np.rot90(label[:, 2:-2]))
    for outside in (np.s_[:, :2], np.s_[:, -2:]):
        np.testing.assert_allclose(warped_image[outside], 0, atol=1e-5)
        np.testing.assert_array_equal(warped_label[outside], 0)


@pytest.mark.parametrize("shape", [(8, 8), (9, 14)])
def test_flip_mirrors_columns(shape):
    image, label = random_slice(shape)
    warped_image, warped_label = warp_affine(image, label, augment.flip_matrix())
    np.testing.assert_array_equal(warped_image, image[:, ::-1])
    np.testing.assert_array_equal(warped_label, label[:, ::-1])


@pytest.mark.parametrize("shape", [(15, 15), (14, 21)])
@pytest.mark.parametrize(
    ("matrix", "reference"),
    [
        (augment.rotation_matrix(np.radians(13.0)), scipy_matrix(degrees=13.0)),
        (augment.rotation_matrix(np.radians(-120.0)), scipy_matrix(degrees=-120.0)),
        (augment.scaling_matrix(1.23), scipy_matrix(scale=1.23)),
        (augment.scaling_matrix(0.83), scipy_matrix(scale=0.83)),
    ],
    ids=["rotate13", "rotate-120", "enlarge", "shrink"],
)
def test_affine_matches_scipy(shape, matrix, reference):
    image, label = random_slice(shape)
    warped_image, warped_label = warp_affine(image, label, matrix)
    np.testing.assert_allclose(warped_image, scipy_affine(image, reference, 1), atol=1e-5)
    # A coordinate halfway between two pixels may round either way in float32.
    centre = (np.array(shape) - 1) / 2
    offsets = np.indices(shape) - centre[:, None, None]
    coordinates = np.einsum("ij,jhw->ihw", reference, offsets) + centre[:, None, None]
    decided = (np.abs(coordinates % 1 - 0.5) > 1e-4).all(axis=0)
    assert decided.mean() > 0.9
    np.testing.assert_array_equal(warped_label[decided], scipy_affine(label, reference, 0)[decided])


def test_enlarging_makes_a_square_larger():
    image = np.zeros((32, 32), np.float32)
    image[8:24, 8:24] = 1
    warped, label = warp_affine(image, image.astype(np.int32), augment.scaling_matrix(1.5))
    assert label.sum() == 24 * 24
    np.testing.assert_allclose(warped.sum(), 24 * 24, rtol=0.01)


def test_displaced_rotation_matches_scipy():
    shape = (14, 21)
    image, label = random_slice(shape)
    displacement = np.random.default_rng(1).normal(0, 2, (2, *shape)).astype(np.float32)
    warped, _ = warp_affine(image, label, augment.rotation_matrix(np.radians(20.0)), displacement)
    centre = ((np.array(shape) - 1) / 2)[:, None, None]
    offsets = np.indices(shape) - centre + displacement
    coordinates = np.einsum("ij,jhw->ihw", scipy_matrix(degrees=20.0), offsets) + centre
    expected = scipy.ndimage.map_coordinates(image, coordinates, order=1, mode="grid-constant")
    np.testing.assert_allclose(warped, expected, atol=2e-5)


def test_displacement_acts_after_the_affine_map():
    image, label = random_slice((15, 17))
    matrix = augment.rotation_matrix(np.radians(25.0))
    shift = jnp.broadcast_to(jnp.array([2.0, 3.0])[:, None, None], (2, 15, 17))
    first, _ = warp_affine(image, label, matrix)
    both, _ = warp_affine(image, label, matrix, shift)
    np.testing.assert_allclose(both[:-2, :-3], first[2:, 3:], atol=1e-5)


# --- the draw of a transform ---------------------------------------------------------------------


def test_affine_kinds_are_uniform_and_in_range():
    draw = functools.partial(
        augment.affine_matrix, max_rotation_degrees=10.0, scale_range=(1.5, 1.6)
    )
    matrices = np.asarray(jax.vmap(draw)(keys(4000)), np.float64)
    determinant = np.linalg.det(matrices)
    degrees = np.degrees(np.arctan2(matrices[:, 0, 1], matrices[:, 0, 0]))
    flipped = determinant < 0
    scaled = ~flipped & (np.abs(determinant - 1) > 0.1)
    rigid = ~flipped & ~scaled
    eighth = np.abs(degrees - 45 * np.round(degrees / 45)) < 1e-4
    small = rigid & ~eighth
    identity = rigid & (np.abs(degrees) < 1e-4)

    np.testing.assert_allclose(small.mean(), 1 / 5, atol=0.03)
    np.testing.assert_allclose(scaled.mean(), 1 / 5, atol=0.03)
    np.testing.assert_allclose(flipped.mean(), 1 / 10, atol=0.02)
    np.testing.assert_allclose(identity.mean(), 1 / 5 + 1 / 10 + 1 / 40, atol=0.03)
    for turn in (45, 90, 135, 180, -135, -90, -45):
        turned = rigid & (np.abs((degrees - turn + 180) % 360 - 180) < 1e-3)
        np.testing.assert_allclose(turned.mean(), 1 / 40, atol=0.01)

    assert -10 <= degrees[small].min() < -9 and 9 < degrees[small].max() <= 10
    magnification = determinant[scaled] ** -0.5
    assert 1.499 <= magnification.min() < 1.51 and 1.59 < magnification.max() <= 1.601
    assert (matrices[flipped] == np.diag([1, -1])).all()


def test_zero_strength_leaves_flips_and_eighth_turns_only():
    image, label = random_slice(SHAPE)
    images, labels = over_keys(
        image, label, elastic_probability=0.0, **NO_SMALL_AFFINE, **NO_JITTER
    )
    turns = [scipy_matrix(degrees=45 * k) for k in range(1, 8)]
    expected = [(image, label), (image[:, ::-1], label[:, ::-1])]
    expected += [(scipy_affine(image, m, 1), scipy_affine(label, m, 0)) for m in turns]
    matches = np.array(
        [[np.allclose(one, wanted, atol=1e-5) for wanted, _ in expected] for one in images]
    )
    assert (matches.sum(axis=1) == 1).all() and matches.any(axis=0).all()
    for match, one_image, one_label in zip(matches.argmax(axis=1), images, labels, strict=True):
        # The reference's own rounding at a coordinate of exactly one half is not ours to match.
        assert (one_label == expected[match][1]).mean() > 0.98
        if match == 0:
            np.testing.assert_array_equal(one_image, image)
            np.testing.assert_array_equal(one_label, label)
    np.testing.assert_allclose(matches[:, 0].mean(), 1 / 5 + 2 / 5 + 1 / 10 + 1 / 40, atol=0.07)


# --- elastic field -------------------------------------------------------------------------------


def keys_cubic_weights(size):
    """[size, 3] weights of Keys (1981), a = -1/2, pixel centres, renormalised at the edges."""
    weights = np.zeros((size, 3))
    for i in range(size):
        position = (i + 0.5) * 3 / size - 0.5
        for j in range(3):
            x = abs(position - j)
            if x < 1:
                weights[i, j] = 1.5 * x**3 - 2.5 * x**2 + 1
            elif x < 2:
                weights[i, j] = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        weights[i] /= weights[i].sum()
    return weights


def fields(count, shape, **options):
    draw = functools.partial(augment.elastic_displacement, shape=shape, **options)
    return np.asarray(jax.jit(jax.vmap(draw))(keys(count)), np.float64)


# In a 9 x 15 slice the nine nodes fall on pixels.
NODES = np.ix_([0, 1], [1, 4, 7], [2, 7, 12])


def test_elastic_nodes_have_the_stated_spread():
    """As shares of the sides, 9 and 15 px."""
    drawn = fields(3000, (9, 15), sigma=0.02, probability=1.0)[:, *NODES]
    nodes = (drawn / np.array([9, 15])[:, None, None]).reshape(len(drawn), 18)
    np.testing.assert_allclose(nodes.mean(axis=0), 0, atol=0.0016)
    np.testing.assert_allclose(nodes.std(axis=0), 0.02, rtol=0.07)
    np.testing.assert_allclose(np.corrcoef(nodes.T), np.eye(18), atol=0.1)


def test_elastic_interpolates_its_nodes():
    for field in fields(3, (9, 15), sigma=0.026, probability=1.0):
        rows, columns = keys_cubic_weights(9), keys_cubic_weights(15)
        for axis in range(2):
            np.testing.assert_allclose(
                field[axis], rows @ field[NODES][axis] @ columns.T, atol=1e-4
            )


def least_area(field):
    """Least area of what becomes of the triangles at the corners of all squares of four pixels."""
    points = np.indices(field.shape[1:]) + field
    corners = points[:, :-1, :-1], points[:, :-1, 1:], points[:, 1:, 1:], points[:, 1:, :-1]
    areas = []
    for i in range(4):  # going round; the cross product of the two sides that meet at a corner
        to_next, to_last = corners[(i + 1) % 4] - corners[i], corners[i - 1] - corners[i]
        areas.append(to_last[0] * to_next[1] - to_last[1] * to_next[0])
    return np.min(areas)


def unbounded(monkeypatch):
    monkeypatch.setattr(augment, "unfolded", lambda displacement: displacement)


def test_least_area_sees_a_fold():
    field = np.zeros((2, 5, 5))
    assert least_area(field) == 1
    field[0] = -0.75 * np.arange(5)[:, None]  # rows at a quarter of their distance
    assert least_area(field) == pytest.approx(0.25)
    field[1, 2, 2] = 2.5  # a column overtakes the two to its right
    assert least_area(field) < 0


@pytest.mark.parametrize("size", [64, 192])
@pytest.mark.parametrize("sigma", [0.026, 0.08, 0.3])
def test_no_field_folds(monkeypatch, size, sigma):
    options = {"sigma": sigma, "probability": 1.0}
    drawn = fields(80, (size, size), **options)
    assert min(map(least_area, drawn)) > 0.099
    unbounded(monkeypatch)
    free = fields(80, (size, size), **options)
    folds = np.array([least_area(field) < 0.1 for field in free])
    if sigma == 0.026:  # the paper's: never near to folding, and left as it is to the bit
        np.testing.assert_array_equal(drawn, free)
    else:
        assert folds.any()
    # Scaled down as a whole, and by no more than it takes.
    np.testing.assert_array_equal(drawn[~folds], free[~folds])
    for field, original in zip(drawn[folds], free[folds], strict=True):
        factor = np.sum(field * original) / np.sum(original**2)
        assert factor < 1
        np.testing.assert_allclose(field, factor * original, atol=1e-3)
        assert least_area(field) < 0.101


def test_a_field_is_the_same_at_every_size():
    """Five pixels at 192 px, and as much of a slice of 64 px."""
    small, large = (
        fields(20, (size, size), sigma=5 / 192, probability=1.0) / size for size in (64, 192)
    )
    np.testing.assert_allclose(small, large[:, :, 1::3, 1::3], atol=1e-6)
    # At 15 px a node is a pixel; of a sample of 18 per field.
    nodes = fields(500, (15, 15), sigma=5 / 192, probability=1.0)[:, :, 2::5, 2::5] * 192 / 15
    np.testing.assert_allclose(nodes.std(), 5, rtol=0.03)


@pytest.mark.parametrize(("probability", "atol"), [(0.0, 0.0), (0.3, 0.05), (1.0, 0.0)])
def test_elastic_probability(probability, atol):
    drawn = fields(1000, (6, 9), sigma=0.026, probability=probability)
    moved = (drawn != 0).any(axis=(1, 2, 3))
    np.testing.assert_allclose(moved.mean(), probability, atol=atol)


def test_half_of_the_slices_are_elastic_by_default():
    image, label = random_slice(SHAPE)
    default, _ = over_keys(image, label)
    rigid, _ = over_keys(image, label, elastic_probability=0.0)
    moved = np.any(np.abs(default - rigid) > 1e-3, axis=(1, 2))
    np.testing.assert_allclose(moved.mean(), 0.5, atol=0.08)


# --- image and label together --------------------------------------------------------------------


def test_label_values_never_grow():
    label = np.full(SHAPE, 5, np.uint8)
    label[4:12, 6:20] = 2
    label[15:20, 3:9] = 200
    image = np.ones(SHAPE, np.float32)
    _, labels = over_keys(image, label, elastic_sigma=0.3)
    assert labels.dtype == np.uint8
    assert set(np.unique(labels)) == {0, 2, 5, 200}


def test_image_and_label_move_together():
    label = np.zeros(SHAPE, np.int32)
    label[5:18, 8:24] = 1
    images, labels = over_keys(label.astype(np.float32), label, elastic_sigma=0.1, **NO_JITTER)
    # All four neighbours agree where the linear interpolation gives a plain 0 or 1.
    inside, outside = images > 1 - 1e-5, images < 1e-5
    assert (inside | outside).mean() > 0.8 and inside.any(axis=(1, 2)).all()
    assert (labels[inside] == 1).all() and (labels[outside] == 0).all()
    assert (labels != label).any(axis=(1, 2)).mean() > 0.6


# --- keys, tracing, errors -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        augment.augment_slice,
        augment.augment_view,
        augment.affine_matrix,
        augment.elastic_displacement,
        augment.jitter_intensity,
        augment.strong_geometry,
        augment.strong_intensity,
        augment.add_noise,
    ],
)
def test_random_functions_take_key_first_and_options_by_keyword(function):
    parameters = list(inspect.signature(function).parameters.values())
    assert parameters[0].name == "key"
    positional = {p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert positional <= {"key", "image", "label", "shape"}


def test_one_key_gives_one_result_alone_compiled_or_in_a_batch():
    image, label = random_slice(SHAPE)
    batch = over_keys(image, label)
    compiled = jax.jit(augment.augment_slice)
    for function, count in [(compiled, 12), (augment.augment_slice, 2)]:
        for index, key in enumerate(keys(400)[:count]):
            first, second = function(key, image, label), function(key, image, label)
            for part in range(2):
                np.testing.assert_array_equal(first[part], second[part])
            np.testing.assert_allclose(first[0], batch[0][index], atol=1e-4)
            # Compilers round differently, which may decide a near tie between two pixels.
            assert (first[1] == batch[1][index]).mean() > 0.995


def test_different_keys_differ():
    images, _ = over_keys(*random_slice(SHAPE))
    assert len({one.tobytes() for one in images}) == len(images)


def test_intensity_is_drawn_independently_of_geometry():
    _, label = random_slice(SHAPE)
    image = np.ones(SHAPE, np.float32)
    images, labels = over_keys(image, label, elastic_probability=0.0, max_brightness=0.0)
    contrast, moved = images[:, 12, 15], (labels != label).any(axis=(1, 2))
    np.testing.assert_allclose(contrast[moved].mean(), 1.0, atol=0.03)
    np.testing.assert_allclose(contrast[~moved].mean(), 1.0, atol=0.03)


def test_options_may_be_traced_and_no_rank_is_promoted():
    image, label = random_slice(SHAPE)

    @jax.jit
    def run(key, probability, sigma):
        slices = augment.augment_slice(
            key, image, label, elastic_probability=probability, elastic_sigma=sigma
        )
        return slices, augment.augment_view(key, image)

    with jax.numpy_rank_promotion("raise"):
        (warped, moved), view = run(jax.random.key(0), 0.5, 0.026)
    assert warped.shape == moved.shape == view.shape == SHAPE
    assert warped.dtype == view.dtype == np.float32


@pytest.mark.parametrize(
    ("image_shape", "label_shape"), [((8, 8, 1), (8, 8, 1)), ((8, 8), (8, 9)), ((8,), (8,))]
)
def test_wrong_shapes_are_named(image_shape, label_shape):
    with pytest.raises(ValueError, match="same \\[H, W\\]"):
        augment.augment_slice(
            jax.random.key(0), jnp.zeros(image_shape), jnp.zeros(label_shape, jnp.int32)
        )


def test_float_label_is_refused():
    with pytest.raises(TypeError, match="float32"):
        augment.augment_slice(jax.random.key(0), jnp.zeros((8, 8)), jnp.zeros((8, 8)))


# --- intensity -----------------------------------------------------------------------------------


def jittered(value):
    draw = functools.partial(
        augment.jitter_intensity, contrast_range=(0.5, 0.9), max_brightness=0.2
    )
    return jax.vmap(draw, in_axes=(0, None))(keys(400), jnp.full((5, 7), value))


def labelled(value):
    images, _ = over_keys(
        np.full(SHAPE, value, np.float32), np.zeros(SHAPE, np.int32), elastic_probability=0.0
    )
    return images[:, 8:17, 8:23]


def viewed(value):
    return jax.vmap(augment.augment_view, in_axes=(0, None))(keys(400), jnp.full((5, 7), value))


@pytest.mark.parametrize(
    ("function", "contrast_range", "max_brightness"),
    [(jittered, (0.5, 0.9), 0.2), (labelled, (0.8, 1.2), 0.1), (viewed, (0.7, 1.3), 0.3)],
)
def test_contrast_and_brightness_fill_their_ranges(function, contrast_range, max_brightness):
    # Two constant slices reveal the draws; 0.5 and 0.9 never reach the default clip of a view.
    at_low, at_high = np.asarray(function(0.5)), np.asarray(function(0.9))
    np.testing.assert_allclose(np.ptp(at_low, axis=(1, 2)), 0, atol=1e-6)
    at_low, at_high = at_low[:, 0, 0], at_high[:, 0, 0]
    contrast = (at_high - at_low) / (0.9 - 0.5)
    brightness = at_low - contrast * 0.5

    low, high = contrast_range
    margin = 0.03 * (high - low)
    assert low - 1e-5 <= contrast.min() < low + margin
    assert high - margin < contrast.max() <= high + 1e-5
    np.testing.assert_allclose(contrast.mean(), (low + high) / 2, atol=2 * margin)
    assert -max_brightness - 1e-5 <= brightness.min() < -0.94 * max_brightness
    assert 0.94 * max_brightness < brightness.max() <= max_brightness + 1e-5
    assert abs(np.corrcoef(contrast, brightness)[0, 1]) < 0.15


def test_view_is_clipped_and_keeps_its_geometry():
    image = np.linspace(-1, 3, 77, dtype=np.float32).reshape(7, 11)
    views = np.asarray(jax.vmap(augment.augment_view, in_axes=(0, None))(keys(50), image))
    assert views.min() == 0.0 and views.max() == 1.5
    for view in views:
        inside = (view > 0) & (view < 1.5)
        contrast, brightness = np.polyfit(image[inside], view[inside], 1)
        np.testing.assert_allclose(view, np.clip(contrast * image + brightness, 0, 1.5), atol=1e-4)


def test_labelled_slices_are_not_clipped():
    image = np.full(SHAPE, 3.0, np.float32)
    images, _ = over_keys(image, np.zeros(SHAPE, np.int32), elastic_probability=0.0)
    assert (images[:, 12, 15] > 2).all()


# --- strong augmentation -------------------------------------------------------------------------

STILL = {
    "max_rotation_degrees": 0.0,
    "scale_range": (1.0, 1.0),
    "max_log_aspect": 0.0,
    "max_shift": 0.0,
    "coarse_sigma": 0.0,
    "fine_sigma": 0.0,
}
RIGID = {"probability": 1.0, "coarse_sigma": 0.0, "fine_sigma": 0.0}
SAME_INTENSITY = {
    "max_log_gamma": 0.0,
    "max_bias": 0.0,
    "max_log_contrast": 0.0,
    "max_brightness": 0.0,
    "blur_sigma_range": (1e-3, 1e-3),
    "max_zoom": 1.0,
    "max_noise": 0.0,
}


def strongly_moved(image, label, count=60, **options):
    one = functools.partial(augment.strong_geometry, **options)
    images, labels = jax.jit(jax.vmap(one, in_axes=(0, None, None)))(keys(count), image, label)
    return np.asarray(images), np.asarray(labels)


def strong_maps(monkeypatch, count=400, shape=SHAPE, **options):
    """[count, 2, H, W]: where each output pixel reads the input, (row, column)."""
    monkeypatch.setattr(augment, "warp", lambda image, label, coordinates: coordinates)
    one = functools.partial(augment.strong_geometry, **options)
    image, label = jnp.zeros(shape), jnp.zeros(shape, jnp.int32)
    return np.asarray(jax.jit(jax.vmap(one, in_axes=(0, None, None)))(keys(count), image, label))


def affine_parts(maps):
    """(matrix [n, 2, 2], shift [n, 2] of the centre) of affine maps, which these must be."""
    _, _, height, width = maps.shape
    offsets = np.indices((height, width)).reshape(2, -1).T - (np.array([height, width]) - 1) / 2
    system = np.hstack([offsets, np.ones((len(offsets), 1))])
    solved = [np.linalg.lstsq(system, m.reshape(2, -1).T, rcond=None)[0].T for m in maps]
    for m, found in zip(maps, solved, strict=True):
        np.testing.assert_allclose(found @ system.T, m.reshape(2, -1), atol=1e-3)
    solved = np.array(solved)
    return solved[..., :2], solved[..., 2] - (np.array([height, width]) - 1) / 2


def assert_fills(values, low, high):
    """Even draws of [low, high]: none outside, and the ends nearly reached."""
    margin = 0.03 * (high - low)
    assert low - 1e-3 <= np.min(values) < low + margin
    assert high - margin < np.max(values) <= high + 1e-3
    assert np.mean(values) == pytest.approx((low + high) / 2, abs=0.06 * (high - low))


@pytest.mark.parametrize("options", [STILL | {"probability": 1.0}, {"probability": 0.0}])
def test_strong_geometry_of_no_strength_changes_nothing(options):
    image, label = random_slice(SHAPE, dtype=np.uint8)
    images, labels = strongly_moved(image, label, count=5, **options)
    np.testing.assert_array_equal(images, np.broadcast_to(image, images.shape))
    np.testing.assert_array_equal(labels, np.broadcast_to(label, labels.shape))


def test_nine_slices_of_ten_are_moved_by_default():
    image, label = random_slice(SHAPE)
    images, _ = strongly_moved(image, label, count=400)
    moved = (images != image).any(axis=(1, 2))
    assert moved.mean() == pytest.approx(0.9, abs=0.06)


def test_strong_affine_maps_fill_their_ranges(monkeypatch):
    matrices, shifts = affine_parts(strong_maps(monkeypatch, **RIGID))
    magnification = 1 / np.linalg.norm(matrices, axis=1)  # of rows and of columns
    turns = matrices * magnification[:, None, :]
    np.testing.assert_allclose(np.linalg.det(turns), 1, atol=1e-3)  # no flip, no shear
    degrees = np.degrees(np.arctan2(turns[:, 0, 1], turns[:, 0, 0]))
    logs = np.log(magnification)
    assert_fills(degrees, -45, 45)
    assert_fills(logs.mean(axis=1), np.log(0.7), np.log(1.4))
    assert_fills(logs[:, 0] - logs[:, 1], -0.15, 0.15)
    for axis in (0, 1):
        bound = 0.0625 * SHAPE[axis]
        assert_fills(shifts[:, axis], -bound, bound)
    drawn = np.column_stack([degrees, logs, shifts])
    # Rows and columns are magnified nearly alike; all else is drawn on its own.
    assert np.abs(np.corrcoef(drawn[:, [0, 1, 3, 4]].T) - np.eye(4)).max() < 0.2


def test_any_orientation_adds_flips_and_quarter_turns(monkeypatch):
    options = RIGID | STILL | {"any_orientation": True}
    matrices, _ = affine_parts(strong_maps(monkeypatch, **options))
    whole = np.rint(matrices)
    np.testing.assert_allclose(matrices, whole, atol=1e-3)
    kinds, counts = np.unique(whole.reshape(-1, 4), axis=0, return_counts=True)
    assert len(kinds) == 8  # all symmetries of a square
    assert counts.min() > 25  # of 50 wanted
    assert np.abs(np.linalg.det(whole)) == pytest.approx(1)


def test_a_scan_with_an_orientation_is_never_flipped(monkeypatch):
    matrices, _ = affine_parts(strong_maps(monkeypatch, **RIGID))
    assert (np.linalg.det(matrices) > 0).all()


@pytest.mark.parametrize(("name", "nodes"), [("coarse_sigma", 3), ("fine_sigma", 7)])
def test_strong_elastic_nodes_have_the_stated_spread(monkeypatch, name, nodes):
    """In a slice of 3 x 5 pixels a tile, each node falls on a pixel."""
    shape = (3 * nodes, 5 * nodes)
    maps = strong_maps(
        monkeypatch, count=2000, shape=shape, **STILL | {"probability": 1.0, name: 0.01}
    )
    field = (maps - np.indices(shape)) / np.array(shape)[:, None, None]
    at_nodes = field[:, :, 1::3, 2::5].reshape(len(field), -1)
    assert at_nodes.shape[1] == 2 * nodes**2
    np.testing.assert_allclose(at_nodes.std(axis=0), 0.01, rtol=0.1)
    np.testing.assert_allclose(at_nodes.mean(axis=0), 0, atol=0.001)


def test_strong_fields_do_not_fold(monkeypatch):
    options = STILL | {"probability": 1.0, "coarse_sigma": 0.12, "fine_sigma": 0.06}

    def areas():
        maps = strong_maps(monkeypatch, count=40, shape=(64, 64), **options)
        return [least_area(m - np.indices((64, 64))) for m in maps]

    assert min(areas()) > 0.099
    unbounded(monkeypatch)
    assert min(areas()) < 0


def test_strong_geometry_moves_image_and_label_together():
    """The image shows the mask: wherever linear interpolation did not mix, it still does."""
    _, label = random_slice((8, 8), dtype=np.uint8)
    label = np.kron(label, np.ones((5, 5), np.uint8))
    images, labels = strongly_moved(label.astype(np.float32), label)
    assert labels.dtype == np.uint8 and images.dtype == np.float32
    assert set(np.unique(labels)) == {0, 1, 2, 3}
    whole = np.abs(images - np.rint(images)) < 1e-3
    assert whole.mean() > 0.4
    # A mixture of 1 and 3 may look like a 2.
    assert (np.rint(images[whole]) == labels[whole]).mean() > 0.995
    assert (labels != label).any(axis=(1, 2)).mean() > 0.7


@pytest.mark.parametrize("function", ["strong_geometry", "strong_intensity"])
def test_strong_draws_follow_the_key_of_the_slice_alone(function):
    """So they are the same however a batch is split over devices."""
    image, label = random_slice(SHAPE)

    def one(key):
        if function == "strong_geometry":
            return augment.strong_geometry(key, image, label)[0]
        return augment.strong_intensity(key, image)

    batch = np.asarray(jax.jit(jax.vmap(one))(keys(12)))
    part = np.asarray(jax.jit(jax.vmap(one))(keys(12)[7:10]))
    np.testing.assert_allclose(part, batch[7:10], atol=1e-4)
    np.testing.assert_allclose(jax.jit(one)(keys(12)[3]), batch[3], atol=1e-4)
    assert len({x.tobytes() for x in batch}) > 9  # one of ten slices stays


@functools.partial(jax.jit, static_argnames="count")
def _strongly_changed(image, options, count):
    one = functools.partial(augment.strong_intensity, **options)
    return jax.vmap(one, in_axes=(0, None))(keys(count), image)


def strongly_changed(image, count=400, **options):
    image = jnp.asarray(image, jnp.float32)
    return np.asarray(_strongly_changed(image, SAME_INTENSITY | options, count))


def test_strong_intensity_of_no_strength_changes_nothing():
    image = random_slice(SHAPE)[0] - 0.3  # negative values too
    found = strongly_changed(image, count=5)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.broadcast_to(image, found.shape), atol=1e-6)


def test_gamma_contrast_and_brightness_fill_their_ranges():
    image = np.full(SHAPE, 0.5)
    gamma = np.log(strongly_changed(image, max_log_gamma=0.45)[:, 3, 4]) / np.log(0.5)
    assert_fills(np.log(gamma), -0.45, 0.45)
    contrast = strongly_changed(image, max_log_contrast=0.4) / 0.5
    assert_fills(np.log(contrast[:, 3, 4]), -0.4, 0.4)
    brightness = strongly_changed(image, max_brightness=0.2) - image
    assert_fills(brightness[:, 3, 4], -0.2, 0.2)
    for found in (contrast, brightness):  # one draw a slice
        np.testing.assert_allclose(np.ptp(found, axis=(1, 2)), 0, atol=1e-5)


def test_gamma_keeps_signs():
    found = strongly_changed(np.full(SHAPE, -0.5), max_log_gamma=0.45)[:, 3, 4]
    assert_fills(np.log(np.log(-found) / np.log(0.5)), -0.45, 0.45)


def test_bias_field_is_smooth_and_drawn_at_nine_nodes():
    shape = (9, 15)
    field = strongly_changed(np.ones(shape), count=1500, max_bias=0.25) - 1
    for node in field[:, 1::3, 2::5].reshape(len(field), 9).T:
        assert_fills(node, -0.25, 0.25)
    rows, columns = keys_cubic_weights(9), keys_cubic_weights(15)
    for one in field[:3]:
        np.testing.assert_allclose(one, rows @ one[1::3, 2::5] @ columns.T, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{"blur_sigma_range": (1.0, 1.0)}, {"max_zoom": 2.0}, {"max_noise": 0.08}]
)
def test_blur_low_resolution_and_noise_are_each_for_half_of_the_slices(options):
    image = random_slice(SHAPE)[0]
    changed = np.abs(strongly_changed(image, **options) - image).max(axis=(1, 2)) > 1e-4
    assert changed.mean() == pytest.approx(0.5, abs=0.08)


def test_noise_fills_its_range_and_differs_in_every_pixel():
    found = strongly_changed(np.zeros((40, 41)), max_noise=0.08)
    sigma = found.std(axis=(1, 2))
    noisy = sigma > 0
    assert_fills(sigma[noisy] / 1.0, 0, 0.08 * 1.02)
    some = found[noisy][:2].reshape(2, -1)
    assert np.unique(some[0]).size > 0.99 * some[0].size
    assert abs(np.corrcoef(some)[0, 1]) < 0.1


@pytest.mark.parametrize("sigma", [0.3, 1.0, 1.5])
def test_blur_matches_scipy(sigma):
    image = random_slice(SHAPE)[0]
    expected = scipy.ndimage.gaussian_filter(image, sigma, mode="nearest", radius=4)
    np.testing.assert_allclose(augment.gaussian_blur(image, sigma), expected, atol=1e-5)


def test_low_resolution_by_hand():
    image = random_slice((12, 18))[0]
    np.testing.assert_allclose(augment.low_resolution(image, 1.0), image, atol=1e-6)
    blocks = image.reshape(6, 2, 9, 2).mean(axis=(1, 3))  # linear between its four pixels
    expected = np.kron(blocks, np.ones((2, 2)))
    np.testing.assert_allclose(augment.low_resolution(image, 2.0), expected, atol=1e-5)
    expected = np.kron(image[1::3, 1::3], np.ones((3, 3)))  # the middle of its nine
    np.testing.assert_allclose(augment.low_resolution(image, 3.0), expected, atol=1e-5)


def test_low_resolution_between_whole_zooms_has_fewer_rows():
    found = np.asarray(augment.low_resolution(random_slice((30, 30))[0], 1.5))
    assert len(np.unique(found, axis=0)) == len(np.unique(found, axis=1).T) == 20


def test_added_noise_is_normal_and_clipped():
    image = np.full((200, 200), 3, np.float32)
    noise = np.asarray(augment.add_noise(jax.random.key(0), image, sigma=0.1, bound=0.2)) - 3
    assert noise.dtype == np.float32
    assert np.abs(noise).max() == pytest.approx(0.2, abs=1e-5)
    share = np.mean(np.abs(noise) < 0.1)
    assert share == pytest.approx(0.683, abs=0.01)  # within one sigma
    assert np.mean(np.abs(noise) > 0.2 - 1e-5) == pytest.approx(0.0455, abs=0.005)
