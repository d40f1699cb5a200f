"""TensorBoard files of a stage: scalars, and truth beside prediction on validation slices."""

from pathlib import Path

import numpy as np
from tensorboardX import SummaryWriter

from lclseg.palette import PALETTE

COLOURS = np.array([tuple(bytes.fromhex(colour[1:])) for colour in PALETTE])
OPACITY = 0.5


def open_writer(folder: Path, *, after_step: int) -> SummaryWriter:
    """Opens a stage's writer, a context manager. What is there after `after_step` is void."""
    return SummaryWriter(str(folder), purge_step=after_step + 1)


def overlay(image: np.ndarray, truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Puts slice, truth and prediction side by side.

    image: [H, W] float, black at 0 and white at 1. truth, prediction: [H, W] int, background 0.
    Returns [H, 3 W, 3] uint8.
    """
    grey = np.repeat(np.clip(255 * image, 0, 255)[..., None], 3, axis=-1)

    def painted(labels):
        colour = COLOURS[(labels.astype(int) - 1) % len(COLOURS)]
        mixed = (1 - OPACITY) * grey + OPACITY * colour
        return np.where(labels[..., None] > 0, mixed, grey)

    return np.concatenate([grey, painted(truth), painted(prediction)], axis=1).astype(np.uint8)
