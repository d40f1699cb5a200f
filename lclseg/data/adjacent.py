"""Slices with those beside them as further channels: "2.5-D" input of a network for slices.

Channels: of the slice itself first, then of the one below and the one above, then of the next two.
At either end of a volume its last slice stands for those that are not there. No JAX in here.
"""

import numpy as np


def numbers_beside(
    number: np.ndarray, first: np.ndarray | int, last: np.ndarray | int, adjacent_slices: int
) -> np.ndarray:
    """Finds which slices make up the channels of each slice.

    Args:
      number: [B] int, of the slices.
      first, last: of the volume of each, [B] int or one for all.
      adjacent_slices: n, on either side.

    Returns:
      [B, 1 + 2 n] int: number, number - 1, number + 1, number - 2, ..., within the volume.
    """
    offsets = [0, *(sign * k for k in range(1, adjacent_slices + 1) for sign in (-1, 1))]
    shifted = np.asarray(number)[:, None] + np.array(offsets)
    bounds = (np.broadcast_to(bound, np.shape(number))[:, None] for bound in (first, last))
    return np.clip(shifted, *bounds)


def to_channels(images: np.ndarray) -> np.ndarray:
    """Makes channels [B, H, W, N K] of N slices each, [B, N, H, W] or [B, N, H, W, K]."""
    if images.ndim == 4:
        images = images[..., None]
    moved = np.moveaxis(images, 1, 3)
    return moved.reshape(*moved.shape[:3], -1)


def of_volume(images: np.ndarray, adjacent_slices: int) -> np.ndarray:
    """Adds to the slices of a volume, [S, H, W] or [S, H, W, K], those beside them.

    Returns [S, H, W, (1 + 2 n) K] of the same dtype; with n = 0 the slices as they are.
    """
    if adjacent_slices == 0:
        return images
    numbers = np.arange(len(images))
    return to_channels(images[numbers_beside(numbers, 0, len(images) - 1, adjacent_slices)])
