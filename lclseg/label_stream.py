"""Pseudo-labels as a stream: within a stage, the pool's labels are made anew every n steps.

No test and no NIfTI files each time; the labels alone are stored, so that a stage that goes on
after an interruption does so with the very same ones. Rounds are the case n = steps of a round.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from lclseg import evaluation
from lclseg.data.batches import REFRESH_STREAM
from lclseg.losses import IGNORE
from lclseg.pseudo_labels import (
    UNCERTAIN,
    PseudoLabels,
    count_classes,
    label_bytes,
    label_of,
    label_of_bytes,
)
from lclseg.run import devices, multihost
from lclseg.run.predictions import predictor, refinement
from lclseg.run.programs import Stage
from lclseg.run.setup import Run


class StoredLabels:
    """The files of one stage's refreshed labels, `refreshed_<step>.npz`."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, number: int) -> Path:
        return self.folder / f"refreshed_{number:07d}.npz"

    def newest(self, done: int) -> int:
        """Finds the last step up to `done` at which labels were made; 0 where there is none."""
        numbers = [int(p.stem.rpartition("_")[2]) for p in self.folder.glob("refreshed_*.npz")]
        return multihost.json_from_first(max([n for n in numbers if n <= done], default=0))

    def read(self, number: int) -> np.ndarray:
        """Reads labels, [n, H, W] uint8."""
        multihost.file_from_first(self.path(number))
        with np.load(self.path(number), allow_pickle=False) as content:
            return content["labels"]

    def write(self, number: int, labels: np.ndarray, checkpointed: int) -> None:
        """Adds labels, and removes those that no checkpoint needs any more."""
        if not multihost.is_first():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / ".refreshed.partial.npz"
        np.savez_compressed(partial, labels=labels)
        partial.replace(self.path(number))
        needed = self.newest(checkpointed)
        for path in self.folder.glob("refreshed_*.npz"):
            if int(path.stem.rpartition("_")[2]) < needed:
                path.unlink()


@functools.cache
def _as_bytes(min_confidence: float) -> Callable:
    return devices.on_each(lambda probs: label_bytes(probs, min_confidence))


def draw_volumes(rng: np.random.Generator, num_slices: Mapping[str, int], wanted: int) -> list[str]:
    """Draws volumes in random order, until they have so many slices together; 0: all."""
    ids = list(num_slices)
    if not wanted:
        return ids
    shuffled = [ids[k] for k in rng.permutation(len(ids))]
    total = np.cumsum([num_slices[v] for v in shuffled])
    return shuffled[: int(np.searchsorted(total, wanted)) + 1]


def predict_labels(run: Run, replicated, volume_ids: Sequence[str]) -> np.ndarray:
    """Predicts labels [n, H, W] uint8 of volumes, in the order of their records, by a state.

    As for a round: smoothed across slices, refined by the CRF, the largest component kept,
    uncertain pixels `IGNORE`, each as the config has it. The state is a copy per device.
    """
    options = run.config.pseudo_labels
    keep_largest = run.classes_in_one_piece(options.largest_component)
    refine = refinement(run.config, options)
    finish = None
    if refine is None and run.prepared.num_classes <= UNCERTAIN:
        finish = _as_bytes(options.min_confidence)  # a byte a pixel; the probabilities are many

    def label(found: evaluation.VolumePrediction) -> np.ndarray:
        if finish is not None:
            return label_of_bytes(found.probs, keep_largest=keep_largest)
        return label_of(found, min_confidence=options.min_confidence, keep_largest=keep_largest)

    predictions = evaluation.predict_volumes(
        # Not stoppable: it belongs to the step before it.
        predictor(
            run,
            replicated,
            test_time_augmentation=options.test_time_augmentation,
            finish=finish,
            stoppable=False,
        ),
        run.prepared,
        sorted(volume_ids, key=lambda v: run.prepared.volumes[v].first_slice),
        batch_size=run.config.data.eval_batch_size,
        refine=refine,
    )
    return np.concatenate([label(found) for found in predictions])


def refresher(
    run: Run, stage: Stage, pseudo_labels: PseudoLabels, done: int
) -> tuple[PseudoLabels, int, Callable[..., PseudoLabels]]:
    """Gives the labels that a stage goes on with after step `done`, and what makes them anew.

    Of a large pool a part: volumes with `rounds.refresh_slices` slices, drawn each time, which
    alone are learnt from until the next time. So the time that it takes does not grow with the
    pool, and no label that is learnt from is older than `rounds.refresh_every` steps.

    Returns:
      The labels; the step of the stage at which they were made, 0 for the round's own; and (state,
      a copy per device; step of the stage; newest step with a checkpoint) -> labels, which are
      stored.
    """
    stored = StoredLabels(run.workdir / "pseudo_labels" / stage.name)

    volumes = run.prepared.volumes
    num_slices = {v: len(volumes[v].slices) for v in pseudo_labels.report["volume_ids"]}

    def drawn_at(number: int) -> tuple[list[str], np.ndarray]:
        rng = np.random.default_rng((run.config.seed, stage.first_step + number, REFRESH_STREAM))
        ids = draw_volumes(rng, num_slices, run.config.rounds.refresh_slices)
        records = np.sort(np.concatenate([volumes[v].slices for v in ids]))
        return ids, np.searchsorted(pseudo_labels.records, records)

    def replaced(rows: np.ndarray, labels: np.ndarray) -> PseudoLabels:
        every = np.full(pseudo_labels.labels.shape, IGNORE, np.uint8)
        every[rows] = labels
        counts = count_classes(every, run.prepared.num_classes)
        return dataclasses.replace(pseudo_labels, labels=every, class_pixels=counts, drawn=rows)

    def refresh(replicated, number: int, checkpointed: int) -> PseudoLabels:
        ids, rows = drawn_at(number)
        labels = predict_labels(run, replicated, ids)
        stored.write(number, labels, checkpointed)
        return replaced(rows, labels)

    if newest := stored.newest(done):
        _, rows = drawn_at(newest)
        return replaced(rows, stored.read(newest)), newest, refresh
    return pseudo_labels, 0, refresh
