"""Slices -> volumes -> native geometry -> metrics. Letters: S slices, H W pixels, C classes."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lclseg import metrics
from lclseg.class_groups import Kind
from lclseg.components import largest_component, one_piece
from lclseg.data import grid, nifti
from lclseg.data.dataset import NativeVolume, PreparedSet
from lclseg.data.preprocess import Preprocessing
from lclseg.through_plane import smooth_across_slices

# Maps slices [M, H, W] to class probabilities [M, H, W, C], for any M.
Predict = Callable[[np.ndarray], np.ndarray]
# Maps a volume's slices [S, H, W], its probabilities [S, H, W, C], and how far its slices lie
# apart, in mm, to refined probabilities [S, f H, f W, C] of the same field, f >= 1.
Refine = Callable[[np.ndarray, np.ndarray, float], np.ndarray]


class VolumePrediction(NamedTuple):
    """What is predicted for one volume, on the training grid, or one f times as fine.

    Attributes:
      volume_id: whose.
      image: [S, H, W], or [S, H, W, K].
      network: [S, H, W, C], the network's probabilities, which tell how sure it is.
      probs: [S, f H, f W, C], the refined ones, whose most probable class is the label; those of
        the network, f = 1, where nothing refines. Refining saturates (a dense CRF takes 0.4 to
        0.999), so that these tell nothing about certainty.
    """

    volume_id: str
    image: np.ndarray
    network: np.ndarray
    probs: np.ndarray

    def label(self) -> np.ndarray:
        """Chooses the most probable class of each pixel of the training grid, [S, H, W].

        Of a finer grid each f-th pixel lies on one of the training grid, the middle on the middle.
        """
        coarse, fine = self.image.shape[1], self.probs.shape[1]
        on_grid = slice(fine // 2 % (fine // coarse), None, fine // coarse)
        return self.probs[:, on_grid, on_grid].argmax(axis=-1)


def refiner(
    through_plane_sigma: float, crf: Callable[[np.ndarray, np.ndarray], np.ndarray] | None
) -> Refine | None:
    """Makes what refines a volume's probabilities; None where nothing does.

    They are smoothed across slices by `through_plane_sigma`, mm, see `through_plane`; then comes
    `crf`, which maps slices [M, H, W] and probabilities [M, H, W, C] to refined ones, maybe on a
    finer grid.
    """
    if not through_plane_sigma and crf is None:
        return None

    def refine(image: np.ndarray, probs: np.ndarray, slice_spacing_mm: float) -> np.ndarray:
        smoothed = smooth_across_slices(probs, slice_spacing_mm, through_plane_sigma)
        return smoothed if crf is None else crf(grid.first_channel(image), smoothed)

    return refine


def predict_volumes(
    predict: Predict,
    prepared: PreparedSet,
    volume_ids: Sequence[str],
    *,
    batch_size: int,
    refine: Refine | None = None,
) -> Iterator[VolumePrediction]:
    """Predicts volumes of a prepared set, see `predict_images`, and refines each."""
    images = ((v, prepared.read_slices(prepared.volumes[v].slices)[0]) for v in volume_ids)
    for found in predict_images(predict, images, batch_size=batch_size):
        if refine is not None:
            spacing_mm = prepared.read_slice_spacing(found.volume_id)
            found = found._replace(probs=refine(found.image, found.network, spacing_mm))
        yield found


def predict_images(
    predict: Predict, images: Iterable[tuple[str, np.ndarray]], *, batch_size: int
) -> Iterator[VolumePrediction]:
    """Predicts volumes one after the other, in full batches that run across volume borders.

    Nothing is refined.

    Args:
      predict: slices -> class probabilities.
      images: volume id and slices [S, H, W] of each volume, read when their turn comes.
      batch_size: slices per call of `predict`.
    """
    waiting: list[tuple[str, np.ndarray]] = []  # volumes not yielded yet
    slices: list[np.ndarray] = []  # not predicted yet
    probs: list[np.ndarray] = []  # of the volumes that wait, as far as predicted

    def complete() -> Iterator[VolumePrediction]:
        while waiting and len(waiting[0][1]) <= len(probs):
            volume_id, image = waiting.pop(0)
            network = np.stack(probs[: len(image)])
            yield VolumePrediction(volume_id, image, network, network)
            del probs[: len(image)]

    for volume_id, image in images:
        waiting.append((volume_id, image))
        slices.extend(image)
        while len(slices) >= batch_size:
            probs.extend(predict(np.stack(slices[:batch_size])))
            del slices[:batch_size]
        yield from complete()
    if slices:
        probs.extend(predict(np.stack(slices)))
    yield from complete()


def to_native_label(probs: np.ndarray, native: NativeVolume, prepared: PreparedSet) -> np.ndarray:
    """Maps probabilities [S, f H, f W, C] of a volume to its native label [X, Y, S] uint8."""
    return grid.probs_to_native_label(
        probs, native.spacing_mm, native.shape[:2], target_spacing_mm=spacing_of(probs, prepared)
    )


def spacing_of(probs: np.ndarray, prepared: PreparedSet | Preprocessing) -> float:
    """Computes in-plane spacing, mm, of a grid of probabilities [S, f H, f W, C], whatever f is."""
    return prepared.target_spacing_mm * (prepared.image_size / probs.shape[1])


def classes_in_one_piece(prepared: PreparedSet, volume_ids: Sequence[str]) -> tuple[Kind, ...]:
    """Finds what is one piece in the masks of all these volumes; see `one_piece`.

    All classes together, first, where there are several; then each class.
    """
    masks = (prepared.read_native(volume_id).label for volume_id in volume_ids)
    every = tuple(range(1, prepared.num_classes))
    together = [every] if len(every) > 1 else []
    return one_piece([m for m in masks if m is not None], [*together, *every])


def without_ignored(label: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Puts background in both wherever the truth is not known, so that nothing there counts."""
    ignored = truth == nifti.IGNORED
    return np.where(ignored, 0, label), np.where(ignored, 0, truth)


def evaluate(
    predict: Predict,
    prepared: PreparedSet,
    volume_ids: Sequence[str],
    *,
    batch_size: int,
    refine: Refine | None = None,
    with_distances: bool,
    save_to: Path | None = None,
    one_piece: Sequence[Kind] = (),
    on_prediction: Callable[[VolumePrediction], None] = lambda prediction: None,
) -> dict:
    """Computes 3-D metrics of labelled volumes in native geometry; see `metrics.summarize`.

    Args:
      predict: slices -> class probabilities.
      prepared: the data set.
      volume_ids: volumes with ground truth.
      batch_size: slices per call of `predict`.
      refine: see `refiner`.
      with_distances: compute HD95 and ASSD too (slow; for the test set).
      save_to: folder for the predicted labels as NIfTI, <volume_id>.nii.gz.
      one_piece: classes of which the largest component is kept in a second evaluation, whose
        summary is "largest_component" in the first one's.
      on_prediction: called with each prediction, in the order of the ids.

    Raises:
      ValueError: a volume has no ground truth.
    """
    records, cleaned = {}, {}
    predictions = predict_volumes(
        predict, prepared, volume_ids, batch_size=batch_size, refine=refine
    )
    for prediction in predictions:
        on_prediction(prediction)
        native = prepared.read_native(prediction.volume_id)
        if native.label is None:
            raise ValueError(f"{prediction.volume_id}: found no ground truth; wanted one")
        label = to_native_label(prediction.probs, native, prepared)
        if save_to is not None:
            path = save_to / f"{prediction.volume_id}.nii.gz"
            nifti.write_label(
                path, label, native.affine, native.spacing_mm, turn=native.orientation
            )
        measure = functools.partial(
            metrics.volume_metrics,
            spacing_mm=native.spacing_mm,
            class_names=prepared.class_names,
            with_distances=with_distances,
        )
        found = measure(*without_ignored(label, native.label))
        records[prediction.volume_id] = cleaned[prediction.volume_id] = found
        kept = largest_component(label, one_piece)
        if not np.array_equal(kept, label):
            cleaned[prediction.volume_id] = measure(*without_ignored(kept, native.label))
    summary = metrics.summarize(records, class_names=prepared.class_names)
    if one_piece:
        of_cleaned = metrics.summarize(cleaned, class_names=prepared.class_names)
        summary["largest_component"] = of_cleaned
    return summary
