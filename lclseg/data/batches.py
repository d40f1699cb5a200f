"""Which slices make up a batch, as a pure function of (seed, step), and reading them ahead.

No iterator holds state: any batch of any run can be recomputed from its number. Letters: B labelled
slices and P pairs of the *global* batch, n slices of a pool, C classes.
"""

import concurrent.futures
import logging
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from lclseg.data.dataset import PreparedSet
from lclseg.pseudo_labels import PseudoLabels

LABELED_STREAM, PAIR_STREAM = 0, 1
logger = logging.getLogger("lclseg")
PREFETCH = 2  # batches read ahead of the step


class Pool(NamedTuple):
    """Slices to draw from: record numbers [n] and pixels of each class [n, C]."""

    records: np.ndarray
    class_pixels: np.ndarray


class PairComposition(NamedTuple):
    """How many pairs of each kind make up a contrastive batch (METHOD: batches).

    Attributes:
      labeled_self: a labelled slice against a second view of itself.
      pseudo_self: likewise, pseudo-labelled.
      labeled_pseudo: a labelled slice with a pseudo-labelled one.
      pseudo_pseudo: a pseudo-labelled slice with another one.
    """

    labeled_self: int
    pseudo_self: int
    labeled_pseudo: int
    pseudo_pseudo: int


class Draw(NamedTuple):
    """The slices of a global batch: record numbers [B], of pairs [P, 2], and which are pseudo."""

    labeled: np.ndarray
    pairs: np.ndarray = np.empty((0, 2), int)
    is_pseudo: np.ndarray = np.empty((0, 2), bool)


def ground_truth_pool(prepared: PreparedSet, volume_ids) -> Pool:
    """All slices of the given volumes, with ground-truth class counts."""
    entries = [prepared.volumes[v] for v in volume_ids]
    return Pool(
        records=np.concatenate([np.arange(e.slices.start, e.slices.stop) for e in entries]),
        class_pixels=np.concatenate([e.class_pixels for e in entries]),
    )


def select_slices(pool: Pool, *, min_classes: int, at_least: int, role: str) -> np.ndarray:
    """Records of the slices that show at least `min_classes` classes, background included.

    Where fewer than `at_least` do, the demand is relaxed class by class, and this is logged: a
    small pool never starves the training silently.

    Raises:
      ValueError: the pool holds fewer than `at_least` slices.
    """
    if len(pool.records) < at_least:
        raise ValueError(f"{role}: {len(pool.records)} slices; wanted at least {at_least}")
    num_present = (pool.class_pixels > 0).sum(axis=1)
    for wanted in range(min_classes, 0, -1):
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


def _rng(seed: int, step: int, stream: int) -> np.random.Generator:
    return np.random.default_rng((seed, step, stream))


def draw_labeled(seed: int, step: int, records: np.ndarray, batch_size: int) -> np.ndarray:
    """Record numbers [B]; without replacement where there are enough slices."""
    replace = len(records) < batch_size
    return _rng(seed, step, LABELED_STREAM).choice(records, batch_size, replace=replace)


def draw_pairs(
    seed: int,
    step: int,
    labeled_records: np.ndarray,
    pseudo_records: np.ndarray,
    composition: PairComposition,
) -> tuple[np.ndarray, np.ndarray]:
    """Record numbers [P, 2] of the pairs, and [P, 2] bool: is the slice pseudo-labelled?"""
    rng = _rng(seed, step, PAIR_STREAM)
    pairs, is_pseudo = [], []
    for _ in range(composition.labeled_self):
        pairs.append([rng.choice(labeled_records)] * 2)
        is_pseudo.append((False, False))
    for _ in range(composition.pseudo_self):
        pairs.append([rng.choice(pseudo_records)] * 2)
        is_pseudo.append((True, True))
    for _ in range(composition.labeled_pseudo):
        pairs.append([rng.choice(labeled_records), rng.choice(pseudo_records)])
        is_pseudo.append((False, True))
    for _ in range(composition.pseudo_pseudo):
        pairs.append(list(rng.choice(pseudo_records, 2, replace=False)))
        is_pseudo.append((True, True))
    return np.asarray(pairs), np.asarray(is_pseudo)


def read_labeled(prepared: PreparedSet, records: np.ndarray) -> dict[str, np.ndarray]:
    """`image` [B, H, W] float32 and `label` [B, H, W] uint8."""
    image, label = prepared.read_slices(records)
    return {"image": image, "label": label}


def read_pairs(
    prepared: PreparedSet, pseudo_labels: PseudoLabels, pairs: np.ndarray, is_pseudo: np.ndarray
) -> dict[str, np.ndarray]:
    """`pair_image` [P, 2, H, W] float32 and `pair_label` [P, 2, H, W] uint8.

    The ground truth of a slice marked pseudo is never used, whether or not the set holds it.
    """
    image, label = prepared.read_slices(pairs.ravel())
    pseudo = is_pseudo.ravel()
    label[pseudo] = pseudo_labels.read(pairs.ravel()[pseudo])
    return {
        "pair_image": image.reshape(*pairs.shape, *image.shape[1:]),
        "pair_label": label.reshape(*pairs.shape, *label.shape[1:]),
    }


def shard(batch: dict[str, np.ndarray], num_devices: int) -> dict[str, np.ndarray]:
    """[B, ...] -> [N, B / N, ...], device n taking the n-th share."""
    return {k: v.reshape(num_devices, -1, *v.shape[1:]) for k, v in batch.items()}


def read_ahead(make_batch: Callable[[int], dict], first: int, last: int) -> Iterator[dict]:
    """Yields make_batch(step) for first <= step < last, made in a thread `PREFETCH` ahead."""
    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as pool:
        waiting = [pool.submit(make_batch, s) for s in range(first, min(first + PREFETCH, last))]
        for step in range(first, last):
            batch = waiting.pop(0).result()
            if step + PREFETCH < last:
                waiting.append(pool.submit(make_batch, step + PREFETCH))
            yield batch
