"""Which slices make up a batch, as a pure function of (seed, step).

No iterator holds state: any batch of any run can be recomputed from its number. Letters: n slices
of a pool or group, C classes.
"""

import logging
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from lclseg.data.dataset import PreparedSet
from lclseg.data.splits import SplitError

LABELED_STREAM, METHOD_STREAM, REFRESH_STREAM = 0, 1, 2  # of random numbers, beside seed and step
logger = logging.getLogger("lclseg")


class Pool(NamedTuple):
    """Slices to draw from: record numbers [n], and pixels of each class [n, C].

    The counts are those of the labels that training may see: ground truth or pseudo-labels; zeros
    where there are none.
    """

    records: np.ndarray
    class_pixels: np.ndarray


def records_of(prepared: PreparedSet, volume_ids) -> np.ndarray:
    """Lists the record numbers of all slices of the given volumes, [n]."""
    slices = [prepared.volumes[v].slices for v in volume_ids]
    return np.concatenate([np.arange(s.start, s.stop) for s in slices] or [np.empty(0, int)])


def ground_truth_pool(prepared: PreparedSet, volume_ids) -> Pool:
    """Takes all slices of the given volumes, with ground-truth class counts."""
    entries = [prepared.volumes[v] for v in volume_ids]
    return Pool(
        records=np.concatenate([np.arange(e.slices.start, e.slices.stop) for e in entries]),
        class_pixels=np.concatenate([e.class_pixels for e in entries]),
    )


def select_slices(pool: Pool, *, min_classes: int, at_least: int, role: str) -> np.ndarray:
    """Finds the records of slices that show at least `min_classes` classes, background included.

    Where fewer than `at_least` do, the demand is relaxed class by class, down to none, and this is
    logged: a small pool never starves the training silently.

    Raises:
      SplitError: the pool holds fewer than `at_least` slices.
    """
    if len(pool.records) < at_least:
        raise SplitError(
            f"{role}: found {len(pool.records)} slices to draw from; wanted at least {at_least}: "
            "name more patients in data.labeled or data.unlabeled, or lower "
            "pseudo_labels.min_agreement, which leaves volumes out"
        )
    num_present = (pool.class_pixels > 0).sum(axis=1)
    for wanted in range(min_classes, -1, -1):
        found = pool.records[num_present >= wanted]
        if len(found) >= at_least:
            break
    if wanted < min_classes:
        logger.warning(
            "%s: fewer than %d of %d slices show %d classes; drawing from the %d that show %d",
            role,
            at_least,
            len(pool.records),
            min_classes,
            len(found),
            wanted,
        )
    return found


def sampler(
    seed: int,
    labeled: np.ndarray,
    labeled_batch_size: int,
    draw: Callable[[np.random.Generator], Mapping[str, np.ndarray]] | None,
) -> Callable[[int], dict[str, np.ndarray]]:
    """Makes step -> record numbers [n] of each group of its global batch.

    The group "labeled" is drawn here, the same for every method; without replacement where there
    are enough slices.

    Args:
      seed: of the run.
      labeled: records to draw labelled slices from.
      labeled_batch_size: their number.
      draw: generator -> the other groups; see `methods.contract.Method`.
    """
    replace = len(labeled) < labeled_batch_size

    def groups(step: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((seed, step, LABELED_STREAM))
        found = {"labeled": rng.choice(labeled, labeled_batch_size, replace=replace)}
        if draw is not None:
            found |= draw(np.random.default_rng((seed, step, METHOD_STREAM)))
        return found

    return groups
