"""Pseudo-labels of the unlabelled pool: predicted, stored per round, never changed afterwards."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lclseg import evaluation, metrics, volumes
from lclseg.prepared import PreparedSet


@dataclasses.dataclass(frozen=True)
class PseudoLabels:
    """Pseudo-labels of one round.

    Attributes:
      folder: holds labels.npy, report.json and the labels as NIfTI in native geometry.
      records: [n] record numbers of the slices, ascending.
      labels: [n, H, W] uint8 on the training grid, mapped from disk.
      class_pixels: [n, C] pixels of each class per slice: the sampler's index table.
      report: statistics of the round, ready for JSON.
    """

    folder: Path
    records: np.ndarray
    labels: np.ndarray
    class_pixels: np.ndarray
    report: dict

    def read(self, records: np.ndarray) -> np.ndarray:
        """Labels [B, H, W] of the given records; raises KeyError if one has none."""
        rows = np.searchsorted(self.records, records)
        rows = np.minimum(rows, len(self.records) - 1)
        if not np.array_equal(self.records[rows], records):
            raise KeyError(f"no pseudo-label for some of the slices {sorted(set(records))}")
        return np.asarray(self.labels[rows])


def make_pseudo_labels(
    predict: evaluation.Predict,
    prepared: PreparedSet,
    volume_ids: Sequence[str],
    folder: Path,
    *,
    batch_size: int,
    previous: PseudoLabels | None,
) -> PseudoLabels:
    """Predicts the pool and writes a new set of pseudo-labels into `folder`.

    Args:
      predict: slices -> class probabilities.
      prepared: the data set.
      volume_ids: the unlabelled volumes.
      folder: of this round; report.json is written last and marks it complete.
      batch_size: slices per call of `predict`.
      previous: pseudo-labels of the round before, for the agreement in the report.
    """
    # Records ascending, so that `read` can search them.
    ids = sorted(volume_ids, key=lambda v: prepared.volumes[v].first_slice)
    records = np.concatenate([np.asarray(prepared.volumes[v].slices) for v in ids])
    folder.mkdir(parents=True, exist_ok=True)
    size = prepared.image_size
    labels = np.lib.format.open_memmap(
        folder / "labels.npy", mode="w+", dtype=np.uint8, shape=(len(records), size, size)
    )
    confidence, agreement, true_metrics, empty = [], [], {}, []
    predictions = evaluation.predict_volumes(predict, prepared, ids, batch_size=batch_size)
    row = 0
    for prediction in tqdm(predictions, "pseudo-labels", len(ids), disable=None, leave=False):
        volume_id, probs = prediction.volume_id, prediction.probs
        label = probs.argmax(axis=-1).astype(np.uint8)
        rows = slice(row, row + len(label))
        labels[rows] = label
        row += len(label)
        confidence.append(float(probs.max(axis=-1).mean()))
        if not label.any():
            empty.append(volume_id)
        if previous is not None:
            before = previous.read(records[rows])
            agreement.append(_mean_foreground_dice(label, before, prepared.num_classes))
        native = prepared.read_native(volume_id)
        native_label = evaluation.to_native_label(prepared, volume_id, probs)
        path = folder / f"{volume_id}.nii.gz"
        volumes.write_label(path, native_label, native.affine, native.spacing_mm)
        if native.label is not None:  # hidden from training; tells how good the pseudo-labels are
            true_metrics[volume_id] = metrics.volume_metrics(
                native_label,
                native.label,
                native.spacing_mm,
                class_names=prepared.class_names,
                with_distances=False,
            )
    labels.flush()
    class_pixels = _count_classes(labels, prepared.num_classes)
    summary = metrics.summarize(true_metrics, class_names=prepared.class_names)
    report = {
        "num_volumes": len(ids),
        "mean_voxels_per_class": {
            name: float(class_pixels[:, k].sum() / len(ids))
            for k, name in enumerate(prepared.class_names, start=1)
        },
        "empty_volumes": empty,
        "mean_confidence": float(np.mean(confidence)),
        "dice_with_previous_round": float(np.nanmean(agreement)) if agreement else None,
        "true_mean_dice": summary["mean_dice"],
        "true_dice_per_class": summary["dice_per_class"],
    }
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return load_pseudo_labels(folder, prepared, volume_ids)


def load_pseudo_labels(
    folder: Path, prepared: PreparedSet, volume_ids: Sequence[str]
) -> PseudoLabels:
    """Opens what `make_pseudo_labels` wrote for the same volumes."""
    ids = sorted(volume_ids, key=lambda v: prepared.volumes[v].first_slice)
    labels = np.load(folder / "labels.npy", mmap_mode="r", allow_pickle=False)
    return PseudoLabels(
        folder=folder,
        records=np.concatenate([np.asarray(prepared.volumes[v].slices) for v in ids]),
        labels=labels,
        class_pixels=_count_classes(labels, prepared.num_classes),
        report=json.loads((folder / "report.json").read_text()),
    )


def _count_classes(labels: np.ndarray, num_classes: int) -> np.ndarray:
    return np.stack([np.bincount(s.ravel(), minlength=num_classes) for s in labels])


def _mean_foreground_dice(label: np.ndarray, other: np.ndarray, num_classes: int) -> float:
    scores = [metrics.dice(label == k, other == k) for k in range(1, num_classes)]
    return float(np.nanmean(scores)) if not np.isnan(scores).all() else 1.0
