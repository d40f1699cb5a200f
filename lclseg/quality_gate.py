"""The quality gate of pseudo-labels: does a prediction survive a change of view?

As in arXiv:2112.09645: two augmented copies of a volume are predicted, each prediction is moved
back, and the volume's pseudo-label is trusted if both agree. Copies are changed only in ways that
training has shown the network: one that has never seen a flipped slice fails on it, and how badly
it fails says nothing on the volume. NumPy and SciPy only.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from scipy import ndimage

from lclseg import metrics

# Either way. Weaker maps would be next to none, and two of those agree on anything.
ROTATION_DEGREES = (10.0, 30.0)
SCALING = (1 / 30, 1 / 10)


def _either_way(rng: np.random.Generator, strength: tuple[float, float]) -> float:
    return rng.choice([-1, 1]) * rng.uniform(*strength)


def rotation(rng: np.random.Generator) -> np.ndarray:
    """Draws a [2, 2] in-plane map, output to input: by `ROTATION_DEGREES` either way."""
    angle = np.deg2rad(_either_way(rng, ROTATION_DEGREES))
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, -sin], [sin, cos]])


def scaling(rng: np.random.Generator) -> np.ndarray:
    """Draws [2, 2], output to input: larger or smaller by `SCALING`."""
    return np.eye(2) / (1 + _either_way(rng, SCALING))


def flip(rng: np.random.Generator) -> np.ndarray:
    """Gives [2, 2], output to input: left to right; draws nothing."""
    return np.diag([1.0, -1.0])


def has_seen_flips(augment: Mapping[str, Any]) -> bool:
    """Tells whether training with these options (`config.augment`) flips slices."""
    return augment["strength"] == "paper" or augment["any_orientation"]


def draw_matrices(rng: np.random.Generator, *, flips: bool) -> tuple[np.ndarray, np.ndarray]:
    """Draws two maps [2, 2] of different kinds, each pair equally likely, in either order.

    Of one kind the two may be nearly or, as flips, exactly the same map: then whatever the network
    says agrees with itself, and the gate passes it unseen.

    Args:
      rng: draws kinds and maps.
      flips: whether a flip is one of the kinds, as in the paper, beside rotation and scaling.
    """
    kinds = (rotation, scaling, flip) if flips else (rotation, scaling)
    first, second = rng.permutation(len(kinds))[:2]
    return kinds[first](rng), kinds[second](rng)


def move_slices(slices: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Reads [S, H, W, ...] slices at A (p - centre) + centre, linearly, 0 outside; same shape.

    Moving by the inverse of `matrix` undoes it, but for what left the slice and what linear
    interpolation smooths.
    """
    centre = (np.array(slices.shape[1:3]) - 1) / 2
    full = np.eye(slices.ndim)
    full[1:3, 1:3] = matrix
    offset = np.zeros(slices.ndim)
    offset[1:3] = centre - matrix @ centre
    return ndimage.affine_transform(slices, full, offset, order=1, mode="constant")


def agreement(
    rng: np.random.Generator,
    predict: Callable[[np.ndarray], np.ndarray],
    image: np.ndarray,
    *,
    flips: bool,
) -> float:
    """Computes mean foreground Dice between the predictions of two augmented copies of a volume.

    Args:
      rng: draws the two augmentations, see `draw_matrices`.
      predict: slices [S, H, W] -> class probabilities [S, H, W, C].
      image: [S, H, W] or [S, H, W, K].
      flips: see `draw_matrices` and `has_seen_flips`.

    Returns:
      In 0..1. A class that neither prediction shows does not count; where that is all of them
      there is nothing to trust, and the agreement is 0.
    """
    labels = []
    for matrix in draw_matrices(rng, flips=flips):
        probs = predict(move_slices(image, matrix))
        back = [move_slices(probs[..., k], np.linalg.inv(matrix)) for k in range(probs.shape[-1])]
        # What left the slice is zero in every class: argmax makes it background.
        labels.append(np.argmax(back, axis=0))
    first, second = labels
    return metrics.mean_foreground_dice(first, second, probs.shape[-1]) or 0.0


def expected_dice(
    rng: np.random.Generator,
    predict: Callable[[np.ndarray], np.ndarray],
    image: np.ndarray,
    *,
    draws: int,
    flips: bool,
) -> float:
    """Estimates how good a volume's prediction is, without its truth.

    The mean of `draws` agreements, see `agreement`. It ranks volumes; as a number it is too high
    where the network errs the same way twice.

    Args:
      rng: draws the augmentations.
      predict: slices [S, H, W] -> class probabilities [S, H, W, C].
      image: [S, H, W] or [S, H, W, K].
      draws: pairs of augmented predictions, above 0.
      flips: see `draw_matrices` and `has_seen_flips`.

    Returns:
      In 0..1.
    """
    return float(np.mean([agreement(rng, predict, image, flips=flips) for _ in range(draws)]))
