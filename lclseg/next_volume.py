"""Which unlabelled volume is worth a mask next: what is expected of it, what it looks like.

NumPy only. Letters: S slices, H W pixels, C classes (background 0), F features, n volumes of the
pool, m labelled volumes.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from lclseg import quality_gate


class Choice(NamedTuple):
    """A volume of the pool that a mask is worth having of.

    Attributes:
      number: its place in the pool.
      gain: how much of what the labelled volumes miss it makes up for, in 0..1; see `choose`.
    """

    number: int
    gain: float


def expected_dice(
    rng: np.random.Generator,
    predict: Callable[[np.ndarray], np.ndarray],
    image: np.ndarray,
    *,
    draws: int,
    flips: bool,
) -> float:
    """Estimates how good a volume's prediction is, without its truth.

    The mean of `draws` agreements of two augmented predictions each, the quality gate's measure.
    It ranks volumes; as a number it is too high where the network errs the same way twice.

    Args:
      rng: draws the augmentations.
      predict: slices [S, H, W] -> class probabilities [S, H, W, C].
      image: [S, H, W].
      draws: pairs of augmented predictions, above 0.
      flips: whether they may be of flipped slices; see `quality_gate.has_seen_flips`.

    Returns:
      In 0..1.
    """
    values = [quality_gate.agreement(rng, predict, image, flips=flips) for _ in range(draws)]
    return float(np.mean(values))


def describe(image: np.ndarray, probs: np.ndarray) -> np.ndarray:
    """Features of a volume: how large and how bright its classes are.

    Args:
      image: [S, H, W], or of K channels [S, H, W, K].
      probs: class probabilities [S, H, W, C].

    Returns:
      [F], F = C - 1 + 2 C K: log10 of (1 + pixels) of each foreground class, then, channel by
      channel, mean and standard deviation of the intensity in each class, weighted by its
      probability. A class that is nowhere has those of the whole volume.
    """
    weights = probs.reshape(-1, probs.shape[-1]).astype(np.float64)
    counts = weights.sum(axis=0)
    present = counts > 1e-6
    share = weights / np.where(present, counts, 1.0)
    features = [np.log10(1 + counts[1:])]
    for channel in image.reshape(len(weights), -1).T.astype(np.float64):
        values = channel[:, None]
        mean = np.where(present, (share * values).sum(axis=0), values.mean())
        spread = np.sqrt((share * np.square(values - mean)).sum(axis=0))
        features += [mean, np.where(present, spread, values.std())]
    return np.concatenate(features)


def distances(pool: np.ndarray, labelled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How unlike volumes are: Euclidean, each feature divided by its spread over all of them.

    Args:
      pool: features [n, F].
      labelled: features [m, F].

    Returns:
      Between the pool's volumes [n, n], and from the pool's to the labelled ones [n, m].
    """
    spread = np.concatenate([pool, labelled]).std(axis=0)
    scale = np.where(spread > 0, spread, 1.0) * np.sqrt(pool.shape[1])
    pool, labelled = pool / scale, labelled / scale
    return (
        np.linalg.norm(pool[:, None] - pool, axis=-1),
        np.linalg.norm(pool[:, None] - labelled, axis=-1),
    )


def choose(
    quality: Sequence[float] | np.ndarray, within: np.ndarray, to_labelled: np.ndarray, count: int
) -> list[Choice]:
    """Chooses the volumes whose masks teach most, one after the other.

    What a volume u misses is (1 - quality[u]) times its distance to the nearest labelled volume.
    To label v makes that distance at most the one from u to v. The gain of v is what all volumes
    of the pool miss less by it, as a share of what they miss now. So a volume ranks high whose
    prediction is poor, that many poorly predicted volumes are like, and no labelled one is. What
    is chosen counts as labelled for the choices after it: they do not repeat it.

    Args:
      quality: [n] in 0..1, see `expected_dice`.
      within: [n, n] distances in the pool.
      to_labelled: [n, m] distances to labelled volumes, m > 0.
      count: how many; no more than n.

    Returns:
      Choices, the best first.
    """
    doubt = 1 - np.asarray(quality, float)
    nearest = to_labelled.min(axis=1)
    missing = float(doubt @ nearest) or 1.0
    left = list(range(len(doubt)))
    chosen: list[Choice] = []
    for _ in range(min(count, len(doubt))):
        gains = doubt @ np.maximum(nearest[:, None] - within[:, left], 0) / missing
        best = int(gains.argmax())
        number = left.pop(best)
        chosen.append(Choice(number, float(gains[best])))
        nearest = np.minimum(nearest, within[:, number])
    return chosen
