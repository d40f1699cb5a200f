"""Overlap and surface distances of one volume, and their means over volumes.

Everything here is NumPy on the host, in the geometry of the arrays it is given: hand over whole
volumes in native geometry, with the spacing of their header.

Empty masks. Both empty: the class says nothing about the prediction, so the pair is left out of
every mean and counted as excluded. Exactly one empty: Dice 0, both distances the diagonal of the
volume, counted as missed; a missed organ therefore lowers the score and never drops out of it.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage

MEASURES = ("dice", "hausdorff95_mm", "assd_mm")


class ClassMetrics(NamedTuple):
    """Metrics of one class in one volume; nan where undefined or not computed."""

    dice: float
    hausdorff95_mm: float
    assd_mm: float
    excluded: bool
    missed: bool


def dice(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Computes the Dice coefficient 2 |P & T| / (|P| + |T|) in [0, 1]; nan where both are empty.

    prediction, truth: boolean masks of one shape. Raises ValueError for other dtypes, since `&` on
    label maps would silently mix their bits, and for unequal shapes.

      >>> labels = np.array([0, 1, 1, 2])
      >>> print(dice(labels == 1, labels > 0))
      0.8
    """
    _check_masks(prediction, truth)
    size = np.count_nonzero(prediction) + np.count_nonzero(truth)
    return 2 * np.count_nonzero(prediction & truth) / size if size else float("nan")


def surface_distances_mm(
    prediction: np.ndarray, truth: np.ndarray, spacing_mm: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Computes the distance of every surface voxel of one mask to the other's nearest.

    The surface of a mask is the mask minus its erosion by the face neighbours (6 in 3-D), and what
    lies outside the volume is background. Distances are between voxel centres.

    prediction, truth: boolean masks of one shape, neither empty. spacing_mm: one entry per axis.
    Returns (prediction to truth, truth to prediction), float64 [number of surface voxels], in mm.
    Raises ValueError for an empty mask, mismatched shapes or a spacing that is not positive.
    """
    _check_masks(prediction, truth)
    spacing = _check_spacing(spacing_mm, prediction.shape)
    for name, mask in (("prediction", prediction), ("truth", truth)):
        if not mask.any():
            raise ValueError(
                f"{name} has 0 voxels set, want at least 1: the distance to an empty mask is "
                "undefined; class_metrics scores empty masks"
            )
    # Surfaces and their distances depend on the masks alone, so the box around both is enough. Its
    # margin is background: mask voxels at the border of the volume are surface voxels.
    box = ndimage.find_objects((prediction | truth).view(np.uint8))[0]
    prediction_surface, truth_surface = (
        mask & ~ndimage.binary_erosion(mask)
        for mask in (np.pad(prediction[box], 1), np.pad(truth[box], 1))
    )
    to_truth = ndimage.distance_transform_edt(~truth_surface, sampling=spacing)
    to_prediction = ndimage.distance_transform_edt(~prediction_surface, sampling=spacing)
    return to_truth[prediction_surface], to_prediction[truth_surface]


def hausdorff95_mm(prediction: np.ndarray, truth: np.ndarray, spacing_mm: Sequence[float]) -> float:
    """Computes the 95th-percentile Hausdorff distance, mm: the larger of the two directed ones.

    As in DeepMind's surface-distance and in MONAI; the percentile interpolates linearly between
    surface voxels, each counting the same (MONAI; surface-distance weighs them by area). MedPy
    takes one percentile of both directions pooled, so its values are not comparable.
    Arguments and errors as for `surface_distances_mm`.
    """
    return _hausdorff95(*surface_distances_mm(prediction, truth, spacing_mm))


def assd_mm(prediction: np.ndarray, truth: np.ndarray, spacing_mm: Sequence[float]) -> float:
    """Computes the average symmetric surface distance, mm: over surface voxels of both masks.

    (sum of d(p, T) over p + sum of d(t, P) over t) / (number of p + number of t), as in Heimann et
    al., IEEE TMI 28(8), 2009. MedPy averages the two directed means instead.
    Arguments and errors as for `surface_distances_mm`.
    """
    return _assd(*surface_distances_mm(prediction, truth, spacing_mm))


def class_metrics(
    prediction: np.ndarray,
    truth: np.ndarray,
    spacing_mm: Sequence[float],
    *,
    with_distances: bool = True,
) -> ClassMetrics:
    """Computes all metrics of a class in a volume, empty masks included (rule: head of module).

    prediction, truth: boolean masks of one shape; spacing_mm: one entry per axis. Without
    `with_distances` both distances are nan, which saves nearly all of the time.
    Raises ValueError for mismatched shapes or a spacing that is not positive.
    """
    overlap = dice(prediction, truth)
    spacing = _check_spacing(spacing_mm, prediction.shape)
    nan = float("nan")
    excluded = not (prediction.any() or truth.any())
    missed = not excluded and not (prediction.any() and truth.any())
    if excluded or not with_distances:
        return ClassMetrics(overlap, nan, nan, excluded, missed)
    if missed:
        diagonal_mm = float(np.linalg.norm(prediction.shape * spacing))
        return ClassMetrics(overlap, diagonal_mm, diagonal_mm, excluded, missed)
    distances = surface_distances_mm(prediction, truth, spacing)
    return ClassMetrics(overlap, _hausdorff95(*distances), _assd(*distances), excluded, missed)


def mean_foreground_dice(label: np.ndarray, other: np.ndarray, num_classes: int) -> float | None:
    """Computes the mean Dice of two label maps over the foreground classes that either shows.

    None where that is no class at all: then there is nothing to compare, and what that means (as
    good as it can be, or nothing to trust) is for the caller to say.
    """
    scores = [dice(label == k, other == k) for k in range(1, num_classes)]
    return _mean(_none_if_nan(score) for score in scores)


def volume_metrics(
    prediction: np.ndarray,
    truth: np.ndarray,
    spacing_mm: Sequence[float],
    *,
    class_names: Sequence[str],
    with_distances: bool = True,
) -> dict[str, Any]:
    """Records one volume, for JSON: each measure per class, and its mean over the classes.

    prediction, truth: integer label maps of one 3-D shape, 0 is background and label k + 1 is
    class_names[k]. spacing_mm: three entries.
    Keys: "dice", "hausdorff95_mm", "assd_mm", each {class: value or None}; "mean_dice",
    "mean_hausdorff95_mm", "mean_assd_mm", over the classes that are not excluded, None where there
    is none; "excluded" and "missed", lists of class names.
    Raises ValueError for mismatched or not 3-D shapes, a spacing that is not positive, labels that
    are not integers or have no class name.
    """
    _check_labels(prediction, truth, class_names)
    metrics = {
        name: class_metrics(
            prediction == label, truth == label, spacing_mm, with_distances=with_distances
        )
        for label, name in enumerate(class_names, start=1)
    }
    record: dict[str, Any] = {
        measure: {name: _none_if_nan(getattr(metrics[name], measure)) for name in class_names}
        for measure in MEASURES
    }
    for measure in MEASURES:
        record[f"mean_{measure}"] = _mean(record[measure].values())
    record["excluded"] = [name for name in class_names if metrics[name].excluded]
    record["missed"] = [name for name in class_names if metrics[name].missed]
    return record


def summarize(
    records: Mapping[str, Mapping[str, Any]], *, class_names: Sequence[str]
) -> dict[str, Any]:
    """Averages over volumes what `volume_metrics` gave, which stays below the means; for JSON.

    records: volume_id -> record, all with or all without distances.
    Keys: "mean_dice", "mean_hausdorff95_mm", "mean_assd_mm", the mean over volumes of the mean over
    foreground classes (a volume with every class excluded is not in it); "dice_per_class",
    "hausdorff95_mm_per_class", "assd_mm_per_class", {class: mean over the volumes where it is not
    excluded}; "n_volumes", all of them; "n_excluded" and "n_missed", pairs of class and volume;
    "per_volume", the records. A mean over nothing is None.
    Raises ValueError for a record of other classes.
    """
    for volume_id, record in records.items():
        if set(record["dice"]) != set(class_names):
            raise ValueError(
                f"record of volume {volume_id!r} has classes {sorted(record['dice'])}, want "
                f"{sorted(class_names)}: pass the class_names it was made with"
            )
    volumes = records.values()
    summary: dict[str, Any] = {}
    for measure in MEASURES:
        summary[f"mean_{measure}"] = _mean(v[f"mean_{measure}"] for v in volumes)
    for measure in MEASURES:
        summary[f"{measure}_per_class"] = {
            name: _mean(v[measure][name] for v in volumes) for name in class_names
        }
    summary["n_volumes"] = len(records)
    summary["n_excluded"] = sum(len(v["excluded"]) for v in volumes)
    summary["n_missed"] = sum(len(v["missed"]) for v in volumes)
    summary["per_volume"] = dict(records)
    return summary


def _hausdorff95(to_truth, to_prediction):
    return float(max(np.percentile(to_truth, 95), np.percentile(to_prediction, 95)))


def _assd(to_truth, to_prediction):
    return float((to_truth.sum() + to_prediction.sum()) / (to_truth.size + to_prediction.size))


def _none_if_nan(value):
    return None if np.isnan(value) else value


def _mean(values):
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _check_masks(prediction, truth):
    for name, mask in (("prediction", prediction), ("truth", truth)):
        if mask.dtype != bool:
            raise ValueError(
                f"{name} has dtype {mask.dtype}, want bool: compare a label map with one label"
            )
    _check_shapes(prediction, truth)


def _check_shapes(prediction, truth):
    if prediction.shape != truth.shape:
        raise ValueError(
            f"prediction has shape {prediction.shape}, want that of truth, {truth.shape}: bring "
            "the prediction back to native geometry first"
        )


def _check_spacing(spacing_mm, shape):
    spacing = np.asarray(spacing_mm, np.float64)
    if spacing.shape != (len(shape),):
        raise ValueError(
            f"spacing_mm is {spacing_mm}, want one entry for each of the {len(shape)} axes of "
            f"shape {shape}"
        )
    if not (np.isfinite(spacing) & (spacing > 0)).all():
        raise ValueError(
            f"spacing_mm is {spacing_mm}, want positive finite millimetres: check the image header"
        )
    return spacing


def _check_labels(prediction, truth, class_names):
    _check_shapes(prediction, truth)
    if truth.ndim != 3:
        raise ValueError(
            f"label maps have shape {truth.shape}, want 3 axes: metrics are of volumes, not slices"
        )
    for name, label in (("prediction", prediction), ("truth", truth)):
        if not np.issubdtype(label.dtype, np.integer):
            raise ValueError(
                f"{name} has dtype {label.dtype}, want integer labels: take argmax or cast first"
            )
        if label.size and not 0 <= label.min() <= label.max() <= len(class_names):
            raise ValueError(
                f"{name} has labels {label.min()} to {label.max()}, want 0 to {len(class_names)} "
                f"for classes {list(class_names)}: map the raw labels first"
            )
