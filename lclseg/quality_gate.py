"""The quality gate of pseudo-labels: does a prediction survive a change of view?

METHOD of arXiv:2112.09645: two augmented copies of a volume are predicted, each prediction is moved
back, and the volume's pseudo-label is trusted if both agree. NumPy and SciPy only.
"""

from collections.abc import Callable

import numpy as np
from scipy import ndimage

from lclseg import metrics

MAX_ROTATION_DEGREES = 30.0
SCALE_RANGE = (0.9, 1.1)


def draw_matrix(rng: np.random.Generator) -> np.ndarray:
    """[2, 2] in-plane map, output to input: a rotation, a scaling or a flip, equally likely."""
    match rng.integers(3):
        case 0:
            angle = np.deg2rad(rng.uniform(-MAX_ROTATION_DEGREES, MAX_ROTATION_DEGREES))
            cos, sin = np.cos(angle), np.sin(angle)
            return np.array([[cos, -sin], [sin, cos]])
        case 1:
            return np.eye(2) / rng.uniform(*SCALE_RANGE)
        case _:
            return np.diag([1.0, -1.0])


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
    rng: np.random.Generator, predict: Callable[[np.ndarray], np.ndarray], image: np.ndarray
) -> float:
    """Mean foreground Dice of the predictions of two augmented copies of a volume.

    Args:
      rng: draws the two augmentations.
      predict: slices [S, H, W] -> class probabilities [S, H, W, C].
      image: [S, H, W] or [S, H, W, K].

    Returns:
      In 0..1. A class that neither prediction shows does not count; where that is all of them
      there is nothing to trust, and the agreement is 0.
    """
    labels = []
    for _ in range(2):
        matrix = draw_matrix(rng)
        probs = predict(move_slices(image, matrix))
        back = [move_slices(probs[..., k], np.linalg.inv(matrix)) for k in range(probs.shape[-1])]
        # What left the slice is zero in every class: argmax makes it background.
        labels.append(np.argmax(back, axis=0))
    scores = [metrics.dice(*(label == k for label in labels)) for k in range(1, probs.shape[-1])]
    return 0.0 if np.isnan(scores).all() else float(np.nanmean(scores))
