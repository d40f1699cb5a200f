"""Pseudo-labels of the unlabelled pool: predicted, stored per round, never changed afterwards."""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lclseg import evaluation, metrics
from lclseg.data import nifti
from lclseg.data.dataset import PreparedSet

logger = logging.getLogger("lclseg")
# A class is suspicious if the pool's volumes show it so many times more, or less, of it than the
# labelled ones do.
SUSPICIOUS_FACTOR = 4


# Label of pixels that are too uncertain to learn from: no class, so that no loss counts them.
IGNORE = nifti.IGNORED


class PseudoLabelError(ValueError):
    """No pseudo-labels to train on; the message tells why, and the way out."""


@dataclasses.dataclass(frozen=True)
class PseudoLabels:
    """Pseudo-labels of one round.

    Attributes:
      folder: holds labels.npy, report.json and the labels as NIfTI in native geometry.
      records: [n] record numbers of the slices, ascending.
      labels: [n, H, W] uint8 on the training grid, mapped from disk; `IGNORE` where uncertain.
      class_pixels: [n, C] pixels of each class per slice: the sampler's index table.
      report: statistics of the round, ready for JSON; names the volumes.
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
    labeled_ids: Sequence[str] = (),
    agreements: Mapping[str, float] | None = None,
    min_agreement: float = 0.0,
    min_confidence: float = 0.0,
    made_by: dict | None = None,
) -> PseudoLabels:
    """Predicts the pool and writes a new set of pseudo-labels into `folder`.

    Where no volume passes the gate, or a class has vanished from the whole pool, there is nothing
    to learn from: the pseudo-labels of the round before are kept, and the report says so.

    Args:
      predict: slices -> class probabilities.
      prepared: the data set.
      volume_ids: the unlabelled volumes.
      folder: of this round; report.json is written last and marks it complete.
      batch_size: slices per call of `predict`.
      previous: pseudo-labels of the round before.
      labeled_ids: volumes whose ground truth tells how large the classes are, for the warnings.
      agreements: of the volumes, see `consistency.agreement`; None: no gate.
      min_agreement: a volume passes the gate if its agreement is above this.
      min_confidence: pixels whose most probable class has a lower probability become `IGNORE`.
      made_by: names the state that `predict` belongs to, for the report.

    Raises:
      PseudoLabelError: no volume passes the gate, and there is no round before.
    """
    # Records ascending, so that `read` can search them.
    ids = sorted(volume_ids, key=lambda v: prepared.volumes[v].first_slice)
    gate = None
    if agreements is not None:
        rejected = [v for v in ids if not agreements[v] > min_agreement]
        gate = {
            "min_agreement": min_agreement,
            "agreement": {v: agreements[v] for v in ids},
            "rejected": rejected,
        }
        if rejected == ids:
            best = max(agreements.values())
            reason = f"no volume's agreement is above {min_agreement} (the best has {best:.3f})"
            return _keep_previous(previous, folder, prepared, reason, gate, made_by)
        ids = [v for v in ids if v not in rejected]

    records = _records(prepared, ids)
    folder.mkdir(parents=True, exist_ok=True)
    # A report of earlier labels must not stand beside half-written ones.
    (folder / "report.json").unlink(missing_ok=True)
    size = prepared.image_size
    labels = np.lib.format.open_memmap(
        folder / "labels.npy", mode="w+", dtype=np.uint8, shape=(len(records), size, size)
    )
    # A page that finds the disk full would kill the process; this raises OSError.
    with (folder / "labels.npy").open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    confidence, ignored, agreement, true_metrics, empty = [], [], [], {}, []
    predictions = evaluation.predict_volumes(predict, prepared, ids, batch_size=batch_size)
    row = 0
    for prediction in tqdm(predictions, "pseudo-labels", len(ids), disable=None, leave=False):
        volume_id, probs = prediction.volume_id, prediction.probs
        label, certainty = probs.argmax(axis=-1).astype(np.uint8), probs.max(axis=-1)
        label[certainty < min_confidence] = IGNORE
        ignored.append(float(np.mean(label == IGNORE)))
        rows = slice(row, row + len(label))
        labels[rows] = label
        row += len(label)
        confidence.append(float(certainty.mean()))
        if not np.any((label > 0) & (label != IGNORE)):
            empty.append(volume_id)
        if previous is not None and volume_id in previous.report["volume_ids"]:
            before = previous.read(records[rows])
            agreement.append(mean_foreground_dice(label, before, prepared.num_classes))
        native = prepared.read_native(volume_id)
        native_label = evaluation.to_native_label(prepared, volume_id, probs)
        path = folder / f"{volume_id}.nii.gz"
        nifti.write_label(
            path, native_label, native.affine, native.spacing_mm, turn=native.orientation
        )
        if native.label is not None:  # hidden from training; tells how good the pseudo-labels are
            true_metrics[volume_id] = metrics.volume_metrics(
                *evaluation.without_ignored(native_label, native.label),
                native.spacing_mm,
                class_names=prepared.class_names,
                with_distances=False,
            )
    labels.flush()
    voxels = _mean_voxels(_count_classes(labels, prepared.num_classes), len(ids), prepared)
    vanished = [name for name, count in voxels.items() if count == 0]
    if vanished and previous is not None:
        reason = f"no volume shows {', '.join(vanished)} any more"
        return _keep_previous(previous, folder, prepared, reason, gate, made_by)
    summary = metrics.summarize(true_metrics, class_names=prepared.class_names)
    report = {
        "made_by": made_by,
        "volume_ids": ids,
        "num_volumes": len(ids),
        "gate": gate,
        "kept_previous": None,
        "mean_voxels_per_class": voxels,
        "empty_volumes": empty,
        "mean_confidence": float(np.mean(confidence)),
        "ignored_fraction": float(np.mean(ignored)),
        "dice_with_previous_round": float(np.nanmean(agreement)) if agreement else None,
        "true_mean_dice": summary["mean_dice"],
        "true_dice_per_class": summary["dice_per_class"],
        "warnings": _warnings(voxels, empty, len(ids), prepared, labeled_ids),
    }
    return _finish(folder, prepared, report)


def load_pseudo_labels(folder: Path, prepared: PreparedSet) -> PseudoLabels:
    """Opens what `make_pseudo_labels` wrote.

    Raises:
      PseudoLabelError: the labels are not those of the report.
    """
    report = json.loads((folder / "report.json").read_text())
    path = folder / "labels.npy"
    if not path.exists() or _sha256(path) != report["labels_sha256"]:
        raise PseudoLabelError(
            f"{path} is missing or not what was written, by its digest in report.json; remove the "
            "folder to predict these pseudo-labels anew"
        )
    labels = np.load(path, mmap_mode="r", allow_pickle=False)
    return PseudoLabels(
        folder=folder,
        records=_records(prepared, report["volume_ids"]),
        labels=labels,
        class_pixels=_count_classes(labels, prepared.num_classes),
        report=report,
    )


def _finish(folder: Path, prepared: PreparedSet, report: dict) -> PseudoLabels:
    """Writes the report, which completes the round, and tells what is odd about it."""
    for warning in report["warnings"]:
        logger.warning("pseudo-labels in %s: %s", folder.name, warning)
    report = report | {"labels_sha256": _sha256(folder / "labels.npy")}
    partial = folder / "report.partial"
    partial.write_text(json.dumps(report, indent=2) + "\n")
    os.replace(partial, folder / "report.json")
    return load_pseudo_labels(folder, prepared)


def _keep_previous(
    previous: PseudoLabels | None,
    folder: Path,
    prepared: PreparedSet,
    reason: str,
    gate: dict | None,
    made_by: dict | None,
) -> PseudoLabels:
    """Copies the pseudo-labels of the round before, with a report that says why."""
    if previous is None:
        raise PseudoLabelError(
            f"pseudo-labels: {reason}, and there is no round before to fall back on; lower "
            "pseudo_labels.min_agreement, or train the baseline longer"
        )
    if folder.exists():
        shutil.rmtree(folder)
    shutil.copytree(previous.folder, folder, ignore=shutil.ignore_patterns("report.json"))
    changes = {
        "made_by": made_by,
        "gate": gate,
        "kept_previous": reason,
        "dice_with_previous_round": 1.0,
        "warnings": [f"{reason}; those of the round before are kept"],
    }
    return _finish(folder, prepared, previous.report | changes)


def _warnings(
    voxels: Mapping[str, float],
    empty: Sequence[str],
    num_volumes: int,
    prepared: PreparedSet,
    labeled_ids: Sequence[str],
) -> list[str]:
    """What looks like a collapse: most volumes empty, a class gone or far off its usual size."""
    warnings = []
    if 2 * len(empty) > num_volumes:
        warnings.append(f"{len(empty)} of {num_volumes} volumes are empty")
    if not labeled_ids:
        return warnings
    counts = np.concatenate([prepared.volumes[v].class_pixels for v in labeled_ids])
    for name, usual in _mean_voxels(counts, len(labeled_ids), prepared).items():
        if not usual / SUSPICIOUS_FACTOR <= voxels[name] <= usual * SUSPICIOUS_FACTOR:
            warnings.append(
                f"{name} has {voxels[name]:.0f} voxels a volume, in the labelled volumes "
                f"{usual:.0f}"
            )
    return warnings


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _records(prepared: PreparedSet, volume_ids: Sequence[str]) -> np.ndarray:
    return np.concatenate([np.asarray(prepared.volumes[v].slices) for v in volume_ids])


def _mean_voxels(
    class_pixels: np.ndarray, num_volumes: int, prepared: PreparedSet
) -> dict[str, float]:
    """Foreground voxels a volume on the training grid, by class name, from counts [n, C]."""
    means = class_pixels.sum(axis=0) / num_volumes
    return {name: float(means[k]) for k, name in enumerate(prepared.class_names, start=1)}


def _count_classes(labels: np.ndarray, num_classes: int) -> np.ndarray:
    counts = [np.bincount(s.ravel(), minlength=num_classes)[:num_classes] for s in labels]
    return np.stack(counts)


def mean_foreground_dice(label: np.ndarray, other: np.ndarray, num_classes: int) -> float:
    """Mean Dice of two labellings over the classes that either shows; 1.0 where there is none."""
    scores = [metrics.dice(label == k, other == k) for k in range(1, num_classes)]
    return float(np.nanmean(scores)) if not np.isnan(scores).all() else 1.0
