"""Slices -> volumes -> native geometry -> metrics. Letters: S slices, H W pixels, C classes."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lclseg import metrics, volumes
from lclseg.prepared import PreparedSet

# Maps slices [M, H, W] to class probabilities [M, H, W, C], for any M.
Predict = Callable[[np.ndarray], np.ndarray]


class VolumePrediction(NamedTuple):
    """Network output for one volume: image [S, H, W] and probs [S, H, W, C], training grid."""

    volume_id: str
    image: np.ndarray
    probs: np.ndarray


def predict_volumes(
    predict: Predict, prepared: PreparedSet, volume_ids: Sequence[str], *, batch_size: int
) -> Iterator[VolumePrediction]:
    """Predicts volumes one after the other, in full batches that run across volume borders."""
    records = [r for v in volume_ids for r in prepared.volumes[v].slices]
    chunks = (records[i : i + batch_size] for i in range(0, len(records), batch_size))
    images: list[np.ndarray] = []
    probs: list[np.ndarray] = []
    for volume_id in volume_ids:
        num_slices = len(prepared.volumes[volume_id].slices)
        while len(images) < num_slices:
            batch, _ = prepared.read_slices(next(chunks))
            images.extend(batch)
            probs.extend(predict(batch))
        yield VolumePrediction(
            volume_id, np.stack(images[:num_slices]), np.stack(probs[:num_slices])
        )
        del images[:num_slices], probs[:num_slices]


def to_native_label(prepared: PreparedSet, volume_id: str, probs: np.ndarray) -> np.ndarray:
    """Probabilities [S, H, W, C] -> native label [X, Y, S] uint8."""
    native = prepared.read_native(volume_id)
    return volumes.probs_to_native_label(
        probs, native.spacing_mm, native.shape[:2], target_spacing_mm=prepared.target_spacing_mm
    )


def evaluate(
    predict: Predict,
    prepared: PreparedSet,
    volume_ids: Sequence[str],
    *,
    batch_size: int,
    with_distances: bool,
    save_to: Path | None = None,
) -> dict:
    """3-D metrics of labelled volumes in native geometry; see `metrics.summarize`.

    Args:
      predict: slices -> class probabilities.
      prepared: the data set.
      volume_ids: volumes with ground truth.
      batch_size: slices per call of `predict`.
      with_distances: compute HD95 and ASSD too (slow; for the test set).
      save_to: folder for the predicted labels as NIfTI, <volume_id>.nii.gz.
    """
    records = {}
    for prediction in predict_volumes(predict, prepared, volume_ids, batch_size=batch_size):
        native = prepared.read_native(prediction.volume_id)
        label = to_native_label(prepared, prediction.volume_id, prediction.probs)
        if save_to is not None:
            path = save_to / f"{prediction.volume_id}.nii.gz"
            volumes.write_label(
                path, label, native.affine, native.spacing_mm, slice_axis=prepared.slice_axis
            )
        records[prediction.volume_id] = metrics.volume_metrics(
            label,
            native.label,
            native.spacing_mm,
            class_names=prepared.class_names,
            with_distances=with_distances,
        )
    return metrics.summarize(records, class_names=prepared.class_names)
