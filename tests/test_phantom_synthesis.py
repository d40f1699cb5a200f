import hashlib
import subprocess
import sys

import numpy as np
import pytest
from scipy import ndimage

from tfds_builders.phantom import synthesis
from tfds_builders.phantom.synthesis import make_volume

RV, MYO, LV = 1, 2, 3
NUM_SUBJECTS = 60


@pytest.fixture(scope="module")
def volumes():
    return [make_volume(index) for index in range(NUM_SUBJECTS)]


def _digest(index):
    image, label, spacing_mm = make_volume(index)
    content = image.tobytes() + label.tobytes() + np.array(spacing_mm).tobytes()
    return hashlib.sha256(content).hexdigest()


def _neighbours(mask):
    """Pixels outside `mask` [X, Y] that share an edge with it."""
    return ndimage.binary_dilation(mask) & ~mask


def _mid_slices(label):
    """Above the lowest third of the slices with a cavity and below the (perhaps open) last one."""
    with_cavity = np.flatnonzero((label == LV).any(axis=(0, 1)))
    return [s for s in with_cavity[len(with_cavity) // 3 :] if s < label.shape[2] - 1]


def test_same_bits_again_whatever_was_drawn_before():
    first = _digest(7)
    make_volume(3)
    np.random.default_rng(0).normal(size=5)
    np.random.seed(1)
    assert _digest(7) == first
    assert _digest(8) != first


def test_same_bits_in_a_fresh_process():
    # A hash seed of its own and no earlier draw: nothing may hang on the state of this process.
    code = f"import sys; sys.path = {sys.path!r}; import {__name__} as t; print(t._digest(7))"
    env = {"PYTHONHASHSEED": "123", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == _digest(7), done.stderr


def test_negative_index_is_refused():
    with pytest.raises(ValueError, match="-1"):
        make_volume(-1)


def test_shapes_types_and_spacing(volumes):
    for image, label, spacing_mm in volumes:
        assert image.dtype == np.float32 and label.dtype == np.uint8
        assert image.shape == label.shape
        assert 60 <= min(image.shape[:2]) and max(image.shape[:2]) <= 100
        assert 5 <= image.shape[2] <= 10
        assert np.isfinite(image).all() and image.min() >= 0
        assert all(type(d) is float for d in spacing_mm)
        assert all(1.6 <= d <= 2.6 for d in spacing_mm[:2]) and 8 <= spacing_mm[2] <= 10
    assert len({v.image.shape[2] for v in volumes}) >= 4
    assert any(v.image.shape[0] != v.image.shape[1] for v in volumes)


def test_labels_are_the_four_classes_and_grow_from_apex_to_base(volumes):
    for _, label, _ in volumes:
        assert set(np.unique(label)) == {0, RV, MYO, LV}
        assert set(np.unique(label[..., -1])) == {0, RV, MYO, LV}
        assert (label[..., 0] > 0).sum() < 0.75 * (label[..., -1] > 0).sum()
    assert any(not (v.label[..., 0] == RV).any() for v in volumes)


def test_a_few_volumes_have_pixels_that_are_not_square(volumes):
    count = sum(v.spacing_mm[0] != v.spacing_mm[1] for v in volumes)
    assert 2 <= count <= 0.3 * NUM_SUBJECTS


def test_heart_lies_in_the_central_128_mm(volumes):
    for _, label, spacing_mm in volumes:
        for axis in (0, 1):
            where = np.nonzero(label)[axis]
            from_centre = (where - (label.shape[axis] - 1) / 2) * spacing_mm[axis]
            # The whole pixel, not its centre only.
            assert np.abs(from_centre).max() + spacing_mm[axis] / 2 <= 64.0


def test_geometry_is_in_millimetres(volumes):
    # A heart drawn in pixels would be long in mm just where the pixels are.
    stretched, round_ = [], []
    for _, label, (dx, dy, _) in volumes:
        if dx != dy:
            cavity = (label[..., _mid_slices(label)[-1]] == LV).nonzero()
            stretched.append(np.log(dx / dy))
            round_.append(np.log(np.ptp(cavity[0]) * dx / (np.ptp(cavity[1]) * dy)))
    slope = np.dot(stretched, round_) / np.dot(stretched, stretched)
    assert abs(slope) < 0.5  # 1 if drawn in pixels


def test_myocardium_separates_the_cavity(volumes):
    for index, (_, label, _) in enumerate(volumes):
        slices = _mid_slices(label)
        assert slices, index
        for s in slices:
            touching = label[..., s][_neighbours(label[..., s] == LV)]
            assert (touching == MYO).all(), (index, s)


def test_wall_is_thick_enough_to_be_drawn_at_2_mm(volumes):
    for index, (_, label, (dx, dy, _)) in enumerate(volumes):
        for s in _mid_slices(label):
            cavity, wall = label[..., s] == LV, label[..., s] == MYO
            from_cavity = ndimage.distance_transform_edt(~cavity, sampling=(dx, dy))
            rim = wall & _neighbours(~(wall | cavity))
            assert 7.0 <= np.median(from_cavity[rim]) <= 16.0, (index, s)


def test_right_ventricle_lies_on_one_side(volumes):
    directions = []
    for _, label, spacing_mm in volumes:
        mid = label[..., _mid_slices(label)[-1]]
        rv, lv = (np.argwhere(mid == k) * spacing_mm[:2] for k in (RV, LV))
        offset = rv.mean(axis=0) - lv.mean(axis=0)
        # Not a ring around the LV: its centre is off by more than the cavity's radius.
        assert np.hypot(*offset) > np.sqrt(len(lv) * np.prod(spacing_mm[:2]) / np.pi)
        assert (mid == MYO)[_neighbours(mid == RV)].any()
        directions.append(np.exp(1j * np.arctan2(*offset)))
    assert abs(np.mean(directions)) < 0.9


def test_blood_is_brighter_than_myocardium_where_they_meet(volumes):
    for index, (image, label, _) in enumerate(volumes):
        blood, wall = image[label == LV], image[label == MYO]
        assert blood.mean() > wall.mean(), index
        # Within a slice, since the coil shades along the stack too; the spread holds the noise,
        # the shading, the blur and the papillary muscles.
        separation = []
        for s in _mid_slices(label):
            blood, wall = (image[..., s][label[..., s] == k] for k in (LV, MYO))
            separation.append((np.median(blood) - np.median(wall)) / wall.std())
        assert np.median(separation) > 0.8, index


def test_appearance_varies_between_subjects(volumes):
    scale = [np.median(v.image) for v in volumes]
    assert max(scale) / min(scale) > 100
    blood, wall = [], []
    for image, label, _ in volumes:
        low, high = np.percentile(image, (1, 99))
        image = (image - low) / (high - low)
        blood.append(image[label == LV].mean())
        wall.append(image[label == MYO].mean())
    # One threshold for all cannot part blood from wall: the brightest walls outshine the dimmest
    # blood by more than one subject on either side.
    assert np.sort(wall)[-2] > np.sort(blood)[1]


def test_geometry_varies_between_subjects(volumes):
    areas, volumes_ml = [], []
    for _, label, spacing_mm in volumes[:30]:
        areas.append((label[..., _mid_slices(label)[-1]] == LV).sum() * np.prod(spacing_mm[:2]))
        volumes_ml.append((label == RV).sum() * np.prod(spacing_mm) / 1000)
    assert np.std(areas) / np.mean(areas) > 0.15
    assert np.std(volumes_ml) / np.mean(volumes_ml) > 0.25


@pytest.mark.parametrize(("tissue", "bound"), [(MYO, 1.3), (LV, 0.75)])
def test_surroundings_hold_as_much_that_looks_like_the_heart(volumes, tissue, bound):
    # Otherwise brightness alone would find it.
    ratios = []
    for image, label, (dx, dy, _) in volumes:
        x, y = (np.abs(np.arange(n) - (n - 1) / 2) for n in image.shape[:2])
        seen = (x[:, None, None] * dx < 64) & (y[None, :, None] * dy < 64) & (label == 0)
        low, high = np.percentile(image[label == tissue], (10, 90))
        ratios.append((seen & (image > low) & (image < high)).sum() / (label == tissue).sum())
    assert np.median(ratios) > bound


def test_partial_volume_is_the_mean_over_the_samples():
    fine = np.arange(36.0).reshape(6, 6)
    k = synthesis.SUPERSAMPLING
    assert k == 3
    expected = [
        [fine[:3, :3].mean(), fine[:3, 3:].mean()],
        [fine[3:, :3].mean(), fine[3:, 3:].mean()],
    ]
    np.testing.assert_allclose(synthesis._block_mean(fine), expected)
