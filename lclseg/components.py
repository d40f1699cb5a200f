"""Connected components of label maps. NumPy and SciPy only."""

import numpy as np
from scipy import ndimage


def largest_component(label: np.ndarray, num_classes: int) -> np.ndarray:
    """Keeps of each foreground class its largest connected component; the rest is background.

    Args:
      label: [S, H, W] or [H, W] integers; touching by a corner counts as connected. Of components
        of one size the first in memory order stays.
      num_classes: C; labels of C and more are left alone.

    Returns:
      A new array of the same shape and dtype.
    """
    kept = label.copy()
    structure = np.ones((3,) * label.ndim)
    for k in range(1, num_classes):
        parts, number = ndimage.label(label == k, structure)
        if number > 1:
            sizes = np.bincount(parts.ravel())[1:]
            kept[(parts > 0) & (parts != 1 + sizes.argmax())] = 0
    return kept
