import itertools
import json
import math

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from lclseg import metrics

SPACING_MM = (3.0, 1.5, 0.7)


def box_mask(shape, *ranges):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(*r) for r in ranges)] = True
    return mask


def random_masks(seed, shape):
    """Two overlapping blobs with holes and ragged borders, some of them on the volume's border."""
    rng = np.random.default_rng(seed)
    centre = (np.array(shape) - 1) / 2
    axes = np.indices(shape).reshape(3, -1).T - centre
    masks = []
    for _ in range(2):
        radii = np.array(shape) * rng.uniform(0.45, 0.65, 3)
        shifted = (axes - np.array(shape) * rng.uniform(-0.15, 0.15, 3)) / radii
        inside = np.linalg.norm(shifted, axis=1) + rng.normal(0, 0.1, len(axes)) < 1
        masks.append(inside.reshape(shape))
    return masks


def slow_surface(mask):
    points = []
    for point in zip(*np.nonzero(mask), strict=True):
        for axis, step in itertools.product(range(mask.ndim), (-1, 1)):
            neighbour = list(point)
            neighbour[axis] += step
            outside = not 0 <= neighbour[axis] < mask.shape[axis]
            if outside or not mask[tuple(neighbour)]:
                points.append(point)
                break
    return np.array(points, float)


def slow_distances(prediction, truth, spacing_mm):
    p, t = slow_surface(prediction) * spacing_mm, slow_surface(truth) * spacing_mm
    pairs = np.sqrt(((p[:, None] - t[None]) ** 2).sum(-1))
    return pairs.min(1), pairs.min(0)


def slow_percentile95(values):
    values = sorted(values)
    rank = 0.95 * (len(values) - 1)
    low = math.floor(rank)
    high = min(low + 1, len(values) - 1)
    return values[low] + (rank - low) * (values[high] - values[low])


def to_sitk(mask, spacing_mm):
    image = sitk.GetImageFromArray(mask.astype(np.uint8))
    image.SetSpacing([float(s) for s in reversed(spacing_mm)])
    return image


# Masks


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_cube_shifted_by_two_voxels(axis):
    # 3 x 3 x 3 cubes; the other two spacings are so large that the nearest voxel lies straight
    # along the shift. Of the 26 surface voxels 9 are 2 steps away, 8 one step (the ninth of their
    # plane is the inner voxel) and 9 lie on the other surface: the mean is 26 / 26 steps, and the
    # 95th percentile falls among the 9.
    step_mm = 1.25
    spacing = [50.0, 40.0, 30.0]
    spacing[axis] = step_mm
    truth = box_mask((9, 9, 9), (2, 5), (2, 5), (2, 5))
    prediction = np.roll(truth, 2, axis)
    assert metrics.assd_mm(prediction, truth, spacing) == pytest.approx(step_mm)
    assert metrics.hausdorff95_mm(prediction, truth, spacing) == pytest.approx(2 * step_mm)
    assert metrics.dice(prediction, truth) == pytest.approx(1 / 3)


def test_line_overshooting_by_two_voxels():
    # 20 against 22 voxels in a row. Directed distances 20 zeros, and 20 zeros with 1 and 2 steps:
    # rank 0.95 x 21 = 19.95 lies 0.95 of the way from 0 to 1 step. Pooling both directions would
    # give 0, the maximum 2 steps; averaging the directed means 3 / 44 steps instead of 3 / 42.
    truth = box_mask((3, 3, 30), (1, 2), (1, 2), (2, 22))
    prediction = box_mask((3, 3, 30), (1, 2), (1, 2), (2, 24))
    assert metrics.hausdorff95_mm(prediction, truth, SPACING_MM) == pytest.approx(0.95 * 0.7)
    assert metrics.assd_mm(prediction, truth, SPACING_MM) == pytest.approx(3 * 0.7 / 42)
    assert metrics.dice(prediction, truth) == pytest.approx(40 / 42)


def test_single_voxels_are_apart_by_their_centres():
    truth = box_mask((5, 6, 7), (0, 1), (0, 1), (0, 1))
    prediction = box_mask((5, 6, 7), (3, 4), (4, 5), (6, 7))
    distance = math.sqrt((3 * 3.0) ** 2 + (4 * 1.5) ** 2 + (6 * 0.7) ** 2)
    result = metrics.class_metrics(prediction, truth, SPACING_MM)
    assert result == pytest.approx((0, distance, distance, False, False))


def test_identical_masks():
    mask = random_masks(0, (6, 9, 8))[0]
    assert metrics.class_metrics(mask, mask.copy(), SPACING_MM) == (1, 0, 0, False, False)


@pytest.mark.parametrize("shape", [(7, 9, 8), (2, 11, 10), (1, 8, 9)])
@pytest.mark.parametrize("seed", range(4))
def test_equals_all_pairs_of_surface_voxels(seed, shape):
    prediction, truth = random_masks(seed, shape)
    to_truth, to_prediction = metrics.surface_distances_mm(prediction, truth, SPACING_MM)
    slow_to_truth, slow_to_prediction = slow_distances(prediction, truth, SPACING_MM)
    np.testing.assert_allclose(to_truth, slow_to_truth, rtol=1e-12)
    np.testing.assert_allclose(to_prediction, slow_to_prediction, rtol=1e-12)
    assert metrics.hausdorff95_mm(prediction, truth, SPACING_MM) == pytest.approx(
        max(slow_percentile95(slow_to_truth), slow_percentile95(slow_to_prediction))
    )
    assert metrics.assd_mm(prediction, truth, SPACING_MM) == pytest.approx(
        np.concatenate([slow_to_truth, slow_to_prediction]).mean()
    )


def test_masks_filling_the_volume_have_a_surface_on_its_border():
    # Of 5 x 5 x 5 voxels all but the inner 3 x 3 x 3 are surface. Against the middle voxel: the 6
    # nearest surface voxels (the middles of the faces) are 2 steps away.
    truth = np.ones((5, 5, 5), bool)
    prediction = box_mask((5, 5, 5), (2, 3), (2, 3), (2, 3))
    to_truth, to_prediction = metrics.surface_distances_mm(prediction, truth, (1, 1, 1))
    assert to_truth == pytest.approx([2])
    assert len(to_prediction) == 125 - 27
    assert to_prediction.max() == pytest.approx(math.sqrt(12))


def test_position_in_the_volume_does_not_matter():
    prediction, truth = random_masks(1, (6, 9, 8))
    assert prediction[:, 0].any() or truth[:, 0].any(), "wants masks on the border"
    inside = [np.pad(mask, ((3, 1), (0, 5), (4, 2))) for mask in (prediction, truth)]
    assert metrics.class_metrics(*inside, SPACING_MM) == metrics.class_metrics(
        prediction, truth, SPACING_MM
    )


def test_two_slice_volume_is_all_surface():
    truth = box_mask((2, 12, 12), (0, 2), (2, 7), (2, 7))
    prediction = box_mask((2, 12, 12), (0, 2), (2, 7), (3, 8))
    to_truth, to_prediction = metrics.surface_distances_mm(prediction, truth, SPACING_MM)
    # Every voxel is surface, so only the 2 x 5 that the other mask lacks are off, by one step.
    for distances in (to_truth, to_prediction):
        assert sorted(distances) == pytest.approx([0] * 40 + [0.7] * 10)


@pytest.mark.parametrize("seed", range(3))
def test_symmetric_in_its_arguments(seed):
    prediction, truth = random_masks(seed, (6, 9, 8))
    one, other = (
        metrics.class_metrics(*masks, SPACING_MM)
        for masks in ((prediction, truth), (truth, prediction))
    )
    assert one == pytest.approx(other, rel=1e-12)
    assert one.assd_mm > 0


@pytest.mark.parametrize("axes", list(itertools.permutations(range(3)))[1:])
def test_axes_may_be_permuted_with_their_spacing(axes):
    prediction, truth = random_masks(2, (5, 9, 8))
    permuted = [mask.transpose(axes) for mask in (prediction, truth)]
    spacing = [SPACING_MM[a] for a in axes]
    expected = metrics.class_metrics(prediction, truth, SPACING_MM)
    assert metrics.class_metrics(*permuted, spacing) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_dice_equals_simpleitk(seed):
    prediction, truth = random_masks(seed, (7, 12, 11))
    overlap = sitk.LabelOverlapMeasuresImageFilter()
    overlap.Execute(to_sitk(prediction, SPACING_MM), to_sitk(truth, SPACING_MM))
    assert metrics.dice(prediction, truth) == pytest.approx(overlap.GetDiceCoefficient())


@pytest.mark.parametrize("seed", range(3))
def test_surface_distances_equal_simpleitk(seed):
    # Padded, since SimpleITK's contour does not count what lies beyond the image as outside. Its
    # distances are float32.
    padded = [np.pad(mask, 1) for mask in random_masks(seed, (7, 12, 11))]
    contours = [sitk.LabelContour(to_sitk(mask, SPACING_MM)) for mask in padded]
    distance_maps = [
        np.abs(
            sitk.GetArrayFromImage(
                sitk.SignedMaurerDistanceMap(c, squaredDistance=False, useImageSpacing=True)
            )
        )
        for c in contours
    ]
    surfaces = [sitk.GetArrayFromImage(c) > 0 for c in contours]
    to_truth, to_prediction = metrics.surface_distances_mm(*padded, SPACING_MM)
    np.testing.assert_allclose(to_truth, distance_maps[1][surfaces[0]], atol=1e-5)
    np.testing.assert_allclose(to_prediction, distance_maps[0][surfaces[1]], atol=1e-5)


@pytest.mark.parametrize("offset", [(0, 0, 6), (4, 0, 7), (3, 6, 2)])
def test_largest_distance_of_disjoint_boxes_equals_simpleitk(offset):
    # SimpleITK measures from all voxels of a mask to the other mask, not from surface to surface.
    # Both agree for disjoint convex masks, whose farthest voxels are corners.
    truth = box_mask((10, 16, 18), (1, 5), (1, 6), (1, 6))
    prediction = np.roll(box_mask((10, 16, 18), (1, 4), (1, 7), (1, 7)), offset, (0, 1, 2))
    assert not (prediction & truth).any()
    hausdorff = sitk.HausdorffDistanceImageFilter()
    hausdorff.Execute(to_sitk(prediction, SPACING_MM), to_sitk(truth, SPACING_MM))
    largest = max(d.max() for d in metrics.surface_distances_mm(prediction, truth, SPACING_MM))
    assert largest == pytest.approx(hausdorff.GetHausdorffDistance(), rel=1e-5)


# Empty masks

SHAPE = (2, 3, 6)
DIAGONAL_MM = math.sqrt((2 * 3.0) ** 2 + (3 * 1.5) ** 2 + (6 * 0.7) ** 2)
EMPTY = np.zeros(SHAPE, bool)
ORGAN = box_mask(SHAPE, (0, 1), (1, 3), (2, 5))


def test_dice_of_two_empty_masks_is_nan():
    assert math.isnan(metrics.dice(EMPTY, EMPTY))


def test_dice_of_an_empty_prediction_is_zero():
    assert metrics.dice(EMPTY, ORGAN) == 0


def test_dice_of_an_empty_truth_is_zero():
    assert metrics.dice(ORGAN, EMPTY) == 0


def test_both_empty_is_excluded():
    result = metrics.class_metrics(EMPTY, EMPTY, SPACING_MM)
    assert result == pytest.approx((math.nan, math.nan, math.nan, True, False), nan_ok=True)


def test_empty_prediction_is_missed():
    result = metrics.class_metrics(EMPTY, ORGAN, SPACING_MM)
    assert result == pytest.approx((0, DIAGONAL_MM, DIAGONAL_MM, False, True))


def test_empty_truth_is_missed():
    result = metrics.class_metrics(ORGAN, EMPTY, SPACING_MM)
    assert result == pytest.approx((0, DIAGONAL_MM, DIAGONAL_MM, False, True))


def test_empty_prediction_without_distances_is_still_missed():
    result = metrics.class_metrics(EMPTY, ORGAN, SPACING_MM, with_distances=False)
    assert result == pytest.approx((0, math.nan, math.nan, False, True), nan_ok=True)


def test_without_distances_only_dice_is_computed():
    result = metrics.class_metrics(ORGAN, ORGAN, SPACING_MM, with_distances=False)
    assert result == pytest.approx((1, math.nan, math.nan, False, False), nan_ok=True)


@pytest.mark.parametrize("function", [metrics.hausdorff95_mm, metrics.assd_mm])
def test_distance_to_an_empty_mask_raises(function):
    with pytest.raises(ValueError, match="prediction has 0 voxels.*class_metrics"):
        function(EMPTY, ORGAN, SPACING_MM)
    with pytest.raises(ValueError, match="truth has 0 voxels.*class_metrics"):
        function(ORGAN, EMPTY, SPACING_MM)


# Records

NAMES = ("RV", "MYO", "LV", "LA")


def label_maps():
    """RV right, MYO missed, LV one of two voxels hit, LA in neither; volume 2 x 4 x 4."""
    truth = np.zeros((2, 4, 4), np.uint8)
    truth[0, 0, 0] = 1
    truth[0, 2, 2] = 2
    truth[1, 3, 0:2] = 3
    prediction = np.zeros((2, 4, 4), np.int16)
    prediction[0, 0, 0] = 1
    prediction[1, 3, 1:3] = 3
    return prediction, truth


def test_volume_record_worked_by_hand():
    record = metrics.volume_metrics(*label_maps(), (2.0, 1.0, 0.5), class_names=NAMES)
    diagonal = math.sqrt(4**2 + 4**2 + 2**2)
    # LV: each direction has the distances 0 and 0.5 mm.
    expected = {
        "dice": {"RV": 1.0, "MYO": 0.0, "LV": 0.5, "LA": None},
        "hausdorff95_mm": {"RV": 0.0, "MYO": diagonal, "LV": 0.475, "LA": None},
        "assd_mm": {"RV": 0.0, "MYO": diagonal, "LV": 0.25, "LA": None},
    }
    for measure, values in expected.items():
        assert record[measure] == pytest.approx(values)
    assert record["mean_dice"] == pytest.approx(1.5 / 3)
    assert record["mean_hausdorff95_mm"] == pytest.approx((diagonal + 0.475) / 3)
    assert record["mean_assd_mm"] == pytest.approx((diagonal + 0.25) / 3)
    assert (record["excluded"], record["missed"]) == (["LA"], ["MYO"])
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_volume_record_without_distances():
    record = metrics.volume_metrics(
        *label_maps(), (2.0, 1.0, 0.5), class_names=NAMES, with_distances=False
    )
    assert record["mean_dice"] == pytest.approx(0.5)
    assert record["mean_hausdorff95_mm"] is record["mean_assd_mm"] is None
    assert set(record["assd_mm"].values()) == {None}
    assert record["missed"] == ["MYO"]


def record_of(dice_a, dice_b, *, excluded=(), missed=()):
    """A record whose HD95 is 10 x and whose ASSD is 2 x (1 - Dice), so that means follow."""
    scores = {"a": dice_a, "b": dice_b}
    record = {"excluded": list(excluded), "missed": list(missed)}
    for measure, value in (
        ("dice", lambda d: d),
        ("hausdorff95_mm", lambda d: 10 * (1 - d)),
        ("assd_mm", lambda d: 2 * (1 - d)),
    ):
        record[measure] = {k: None if d is None else value(d) for k, d in scores.items()}
        known = [x for x in record[measure].values() if x is not None]
        record[f"mean_{measure}"] = sum(known) / len(known) if known else None
    return record


def test_summary_worked_by_hand():
    records = {
        "case 1": record_of(0.8, 0.6),
        "case 2": record_of(0.4, None, excluded=["b"]),
        "case 3": record_of(None, None, excluded=["a", "b"]),
        "case 4": record_of(0.0, 0.8, missed=["a"]),
    }
    summary = metrics.summarize(records, class_names=("a", "b"))
    # Volumes 0.7, 0.4, none, 0.4; class a 0.8, 0.4, 0.0; class b 0.6, 0.8. The mean over all pairs
    # would be 0.52.
    assert summary.pop("per_volume") == records
    per_class = {
        key: summary.pop(key)
        for key in ("dice_per_class", "hausdorff95_mm_per_class", "assd_mm_per_class")
    }
    assert summary == pytest.approx(
        {
            "mean_dice": 0.5,
            "mean_hausdorff95_mm": 5.0,
            "mean_assd_mm": 1.0,
            "n_volumes": 4,
            "n_excluded": 3,
            "n_missed": 1,
        }
    )
    assert per_class["dice_per_class"] == pytest.approx({"a": 0.4, "b": 0.7})
    assert per_class["hausdorff95_mm_per_class"] == pytest.approx({"a": 6.0, "b": 3.0})
    assert per_class["assd_mm_per_class"] == pytest.approx({"a": 1.2, "b": 0.6})


def test_summary_of_real_records_is_json():
    prediction, truth = label_maps()
    records = {
        "007": metrics.volume_metrics(prediction, truth, (2.0, 1.0, 0.5), class_names=NAMES),
        "008": metrics.volume_metrics(truth, truth, (2.0, 1.0, 0.5), class_names=NAMES),
    }
    summary = metrics.summarize(records, class_names=NAMES)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["mean_dice"] == pytest.approx((0.5 + 1) / 2)
    assert summary["dice_per_class"] == pytest.approx({"RV": 1, "MYO": 0.5, "LV": 0.75, "LA": None})
    assert (summary["n_excluded"], summary["n_missed"]) == (2, 1)


@pytest.mark.parametrize("records", [{}, {"x": record_of(None, None, excluded=["a", "b"])}])
def test_summary_of_nothing_has_no_nan(records):
    summary = metrics.summarize(records, class_names=("a", "b"))
    json.dumps(summary, allow_nan=False)
    assert summary["mean_dice"] is summary["mean_assd_mm"] is None
    assert summary["dice_per_class"] == {"a": None, "b": None}
    assert (summary["n_volumes"], summary["n_excluded"]) == (len(records), 2 * len(records))


# Errors


def test_mismatched_shapes_raise():
    other = np.zeros((2, 3, 5), bool)
    for call in (
        lambda: metrics.dice(other, ORGAN),
        lambda: metrics.assd_mm(other, ORGAN, SPACING_MM),
        lambda: metrics.class_metrics(other, ORGAN, SPACING_MM),
        lambda: metrics.volume_metrics(
            other.astype(int), ORGAN.astype(int), SPACING_MM, class_names=["a"]
        ),
    ):
        with pytest.raises(ValueError, match=r"\(2, 3, 5\).*\(2, 3, 6\)"):
            call()


@pytest.mark.parametrize(
    "spacing_mm", [(1, 0, 1), (1, -1, 1), (1, math.nan, 1), (math.inf, 1, 1), (1, 1), 1.0]
)
def test_bad_spacing_raises(spacing_mm):
    for call in (
        lambda: metrics.hausdorff95_mm(ORGAN, ORGAN, spacing_mm),
        lambda: metrics.class_metrics(EMPTY, EMPTY, spacing_mm, with_distances=False),
    ):
        with pytest.raises(ValueError, match="spacing_mm is .*want"):
            call()


def test_label_map_in_place_of_a_mask_raises():
    with pytest.raises(ValueError, match="truth has dtype int64, want bool"):
        metrics.dice(ORGAN, ORGAN.astype(np.int64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda label: label[0], "want 3 axes"),
        (lambda label: label.astype(np.float32), "dtype float32, want integer"),
        (lambda label: label * 2, "labels 0 to 6, want 0 to 4"),
        (lambda label: -label.astype(int), "labels -3 to 0, want 0 to 4"),
    ],
)
def test_bad_label_maps_raise(change, message):
    label = label_maps()[1]
    with pytest.raises(ValueError, match=message):
        metrics.volume_metrics(change(label), change(label), SPACING_MM, class_names=NAMES)


def test_record_of_other_classes_raises():
    with pytest.raises(ValueError, match=r"'case 1' has classes \['a', 'b'\].*\['a', 'c'\]"):
        metrics.summarize({"case 1": record_of(1, 1)}, class_names=("a", "c"))


def test_mean_foreground_dice_by_hand():
    """Class 1: 2 * 1 / (2 + 1); class 2, in one of them only: 0; class 3, in neither: left out."""
    one, two = np.array([0, 1, 1, 2]), np.array([0, 1, 0, 0])
    nothing = np.zeros(4, int)
    assert metrics.mean_foreground_dice(one, two, 4) == pytest.approx((2 / 3 + 0) / 2)
    assert metrics.mean_foreground_dice(two, two, 4) == 1
    assert metrics.mean_foreground_dice(nothing, one, 4) == 0
    assert metrics.mean_foreground_dice(nothing, nothing, 4) is None
