"""Smoothing across slices: what the network, which sees one slice at a time, cannot do.

Neighbouring slices of thin ones show nearly the same; where their predictions disagree, one errs.
"""

import numpy as np
from scipy import ndimage


def smooth_across_slices(probs: np.ndarray, slice_spacing_mm: float, sigma_mm: float) -> np.ndarray:
    """Averages probabilities over neighbouring slices, with the weights of a Gaussian.

    q_s = sum_t g(s - t) p_t,  g(k) ~ exp(-(k d)^2 / (2 sigma^2)),  sum_k g(k) = 1

    d is the distance between slices; beyond the first and the last slice these two repeat. So thick
    slices, d >> sigma, stay as they are. The sum ends 4 sigma away.

    Args:
      probs: [S, ...] of a volume's slices, in order; what follows is averaged element by element.
      slice_spacing_mm: d, > 0.
      sigma_mm: >= 0; 0: nothing is averaged.

    Returns:
      [S, ...] of the same dtype; it sums to 1 over whatever `probs` sums to 1 over.

    Example: a slice that its neighbours outvote.

      >>> probs = np.array([[0.9, 0.1], [0.9, 0.1], [0.3, 0.7], [0.9, 0.1]])
      >>> smooth_across_slices(probs, slice_spacing_mm=1.0, sigma_mm=1.0).argmax(axis=-1)
      array([0, 0, 0, 0])
    """
    if not sigma_mm:
        return probs
    return ndimage.gaussian_filter1d(probs, sigma_mm / slice_spacing_mm, axis=0, mode="nearest")
