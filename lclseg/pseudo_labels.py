"""Pseudo-labels of the unlabelled pool: predicted, stored per round, never changed afterwards."""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lclseg import evaluation, metrics
from lclseg.class_groups import Kind
from lclseg.components import largest_component
from lclseg.data import nifti
from lclseg.data.dataset import PreparedSet
from lclseg.errors import UserError
from lclseg.losses import IGNORE
from lclseg.run import progress

logger = logging.getLogger("lclseg")
# A class is suspicious if the pool's volumes show it so many times more, or less, of it than the
# labelled ones do.
SUSPICIOUS_FACTOR = 4
UNCERTAIN = 128  # what `label_bytes` adds to a class; classes are fewer


class PseudoLabelError(UserError):
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
      drawn: rows of `records` that are learnt from.
    """

    folder: Path
    records: np.ndarray
    labels: np.ndarray
    class_pixels: np.ndarray
    report: dict
    # A slice is no default by itself: before Python 3.12 it cannot be hashed.
    drawn: slice | np.ndarray = dataclasses.field(default_factory=lambda: slice(None))

    def read(self, records: np.ndarray) -> np.ndarray:
        """Reads labels [B, H, W] of the given records; raises KeyError if one has none."""
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
    refine: evaluation.Refine | None = None,
    previous: PseudoLabels | None,
    labeled_ids: Sequence[str] = (),
    agreements: Mapping[str, float] | None = None,
    min_agreement: float = 0.0,
    min_confidence: float = 0.0,
    keep_largest: Sequence[Kind] = (),
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
      refine: see `evaluation.refiner`.
      previous: pseudo-labels of the round before.
      labeled_ids: volumes whose ground truth tells how large the classes are, for the warnings.
      agreements: of the volumes, see `quality_gate.agreement`; None: no gate.
      min_agreement: a volume passes the gate if its agreement is above this.
      min_confidence: pixels become `IGNORE` where the network's most probable class, before
        refinement, has a lower probability.
      keep_largest: classes of which the largest component in a volume stays, and the rest goes.
      made_by: names the state that `predict` belongs to, for the report.

    Raises:
      PseudoLabelError: no volume passes the gate, and there is no round before.
    """
    # Records ascending, so that `read` can search them.
    ids = sorted(volume_ids, key=lambda v: prepared.volumes[v].first_slice)
    gate = None
    if agreements is not None:
        ids, gate = _pass_gate(ids, agreements, min_agreement)
        if not ids:
            best = max(agreements.values())
            reason = f"no volume's agreement is above {min_agreement} (the best has {best:.3f})"
            return _keep_previous(previous, folder, prepared, reason, gate, made_by)
    labels = _create_labels(folder, len(_records(prepared, ids)), prepared.image_size)
    predictions = evaluation.predict_volumes(
        predict, prepared, ids, batch_size=batch_size, refine=refine
    )
    told, row = {}, 0
    for prediction in progress.each(predictions, "pseudo-labels", len(ids), leave=False):
        label, about = _write_volume(
            prediction, prepared, folder, previous, min_confidence, keep_largest
        )
        labels[row : row + len(label)] = label
        row += len(label)
        told[prediction.volume_id] = about
    labels.flush()
    voxels = _mean_voxels(count_classes(labels, prepared.num_classes), len(ids), prepared)
    vanished = [name for name, count in voxels.items() if count == 0]
    if vanished and previous is not None:
        reason = f"no volume shows {', '.join(vanished)} any more"
        return _keep_previous(previous, folder, prepared, reason, gate, made_by)
    report = {"made_by": made_by, "gate": gate, **_report(told, voxels, prepared, labeled_ids)}
    return _finish(folder, prepared, report)


def _pass_gate(
    ids: Sequence[str], agreements: Mapping[str, float], min_agreement: float
) -> tuple[list[str], dict]:
    """The volumes that pass, and what the report says on the gate."""
    passed = [v for v in ids if agreements[v] > min_agreement]
    return passed, {
        "min_agreement": min_agreement,
        "agreement": {v: agreements[v] for v in ids},
        "rejected": [v for v in ids if v not in passed],
    }


def _reserve(path: Path) -> None:
    """Gives the whole of a sparse file its place on disk; raises OSError where that is full.

    A mapped page that finds the disk full would kill the process.
    """
    with path.open("r+b") as file:
        number, size = file.fileno(), path.stat().st_size
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(number, 0, size)
            return
        for start in range(0, size, 2**20):  # macOS: what is read, zeros too, is written
            os.pwrite(number, os.pread(number, 2**20, start), start)


def label_of(
    prediction: evaluation.VolumePrediction,
    *,
    min_confidence: float,
    keep_largest: Sequence[Kind],
) -> np.ndarray:
    """Makes the pseudo-label [S, H, W] uint8 of a volume.

    The most probable class by the refined probabilities, of the classes `keep_largest` the largest
    component; `IGNORE` where the network's own probability is below `min_confidence`.
    """
    label = prediction.probs.argmax(axis=-1).astype(np.uint8)
    return _finished(label, prediction.network.max(axis=-1) < min_confidence, keep_largest)


def _finished(label: np.ndarray, uncertain: np.ndarray, keep_largest: Sequence[Kind]) -> np.ndarray:
    label = largest_component(label, keep_largest)  # before pixels are taken out of it
    label[uncertain] = IGNORE
    return label


def label_bytes(probs: jax.Array, min_confidence: float) -> jax.Array:
    """Packs into a byte, on the device, all that `label_of` needs of probabilities [..., C].

    Returns [..., 1] uint8, the most probable class, plus `UNCERTAIN` where it has a probability
    below `min_confidence`.
    """
    label = jnp.argmax(probs, axis=-1, keepdims=True).astype(jnp.uint8)
    uncertain = jnp.max(probs, axis=-1, keepdims=True) < min_confidence
    return label + UNCERTAIN * uncertain.astype(jnp.uint8)


def label_of_bytes(found: np.ndarray, *, keep_largest: Sequence[Kind]) -> np.ndarray:
    """Does what `label_of` does, from `label_bytes` [S, H, W, 1]."""
    found = found[..., 0]
    return _finished(found % UNCERTAIN, found >= UNCERTAIN, keep_largest)


def _create_labels(folder: Path, num_slices: int, size: int) -> np.memmap:
    """labels.npy, [num_slices, size, size] uint8, to write to; raises OSError on a full disk."""
    folder.mkdir(parents=True, exist_ok=True)
    # A report of earlier labels must not stand beside half-written ones.
    (folder / "report.json").unlink(missing_ok=True)
    labels = np.lib.format.open_memmap(
        folder / "labels.npy", mode="w+", dtype=np.uint8, shape=(num_slices, size, size)
    )
    _reserve(folder / "labels.npy")
    return labels


class _About(NamedTuple):
    """What the report needs to know of a volume's pseudo-label.

    Attributes:
      confidence: mean over the pixels of the network's largest probability.
      ignored: share of `IGNORE`.
      is_empty: no pixel is of a foreground class.
      dice_with_previous: with the round before; None where that did not have the volume, or neither
        shows any class.
      true_metrics: see `metrics.volume_metrics`; None without ground truth.
    """

    confidence: float
    ignored: float
    is_empty: bool
    dice_with_previous: float | None
    true_metrics: dict | None


def _write_volume(
    prediction: evaluation.VolumePrediction,
    prepared: PreparedSet,
    folder: Path,
    previous: PseudoLabels | None,
    min_confidence: float,
    keep_largest: Sequence[Kind],
) -> tuple[np.ndarray, _About]:
    """The label [S, H, W] of a volume and what there is to tell; writes it as NIfTI."""
    volume_id = prediction.volume_id
    confidence = prediction.network.max(axis=-1)
    label = label_of(prediction, min_confidence=min_confidence, keep_largest=keep_largest)
    native = prepared.read_native(volume_id)
    native_label = evaluation.to_native_label(prediction.probs, native, prepared)
    native_label = largest_component(native_label, keep_largest)
    path = folder / f"{volume_id}.nii.gz"
    nifti.write_label(path, native_label, native.affine, native.spacing_mm, turn=native.orientation)
    dice_with_previous = true_metrics = None
    if previous is not None and volume_id in previous.report["volume_ids"]:
        before = previous.read(np.asarray(prepared.volumes[volume_id].slices))
        dice_with_previous = metrics.mean_foreground_dice(label, before, prepared.num_classes)
    if native.label is not None:  # hidden from training; tells how good the pseudo-labels are
        true_metrics = metrics.volume_metrics(
            *evaluation.without_ignored(native_label, native.label),
            native.spacing_mm,
            class_names=prepared.class_names,
            with_distances=False,
        )
    return label, _About(
        confidence=float(confidence.mean()),
        ignored=float(np.mean(label == IGNORE)),
        is_empty=not np.any((label > 0) & (label != IGNORE)),
        dice_with_previous=dice_with_previous,
        true_metrics=true_metrics,
    )


def _report(
    told: Mapping[str, _About],
    voxels: Mapping[str, float],
    prepared: PreparedSet,
    labeled_ids: Sequence[str],
) -> dict:
    """Statistics of a round's new pseudo-labels, from those of its volumes."""
    dices = [a.dice_with_previous for a in told.values() if a.dice_with_previous is not None]
    true_metrics = {v: a.true_metrics for v, a in told.items() if a.true_metrics is not None}
    summary = metrics.summarize(true_metrics, class_names=prepared.class_names)
    empty = [v for v, a in told.items() if a.is_empty]
    return {
        "volume_ids": list(told),
        "num_volumes": len(told),
        "kept_previous": None,
        "mean_voxels_per_class": voxels,
        "empty_volumes": empty,
        "mean_confidence": float(np.mean([a.confidence for a in told.values()])),
        "ignored_fraction": float(np.mean([a.ignored for a in told.values()])),
        "dice_with_previous_round": float(np.mean(dices)) if dices else None,
        "true_mean_dice": summary["mean_dice"],
        "true_dice_per_class": summary["dice_per_class"],
        "warnings": _warnings(voxels, empty, len(told), prepared, labeled_ids),
    }


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
        class_pixels=count_classes(labels, prepared.num_classes),
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


def count_classes(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts the pixels of each class per slice, [n, C], of labels [n, H, W]."""
    counts = [np.bincount(s.ravel(), minlength=num_classes)[:num_classes] for s in labels]
    return np.stack(counts)
