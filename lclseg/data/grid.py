"""The training grid: intensities to [0, 1], and the maps between native and training geometry.

Letters: X Y S native volume (slices on the last axis), H W training grid.

One map per in-plane axis does resampling and crop-or-pad together: training pixel o lies at the
native index (o - H // 2) * target / spacing + X // 2. The middle pixels of both grids coincide and
both spacings are kept exactly. The way back is the same map solved for o.

Middle pixels, not centres: of an odd and an even size the centres lie half a pixel apart. A grid
about the native centre would then blur the image of a volume that needs no resampling, and its
label, which has no half pixels, would lie half a pixel beside the image.
"""

from collections.abc import Iterator

import numpy as np

PERCENTILES = (1, 99)  # of a volume's intensities, mapped to 0 and 1
# What intensities are then held within: far from nearly all voxels of ordinary images, and near
# enough that a voxel of 1e30, of a division by nearly 0, outweighs no other.
CLIP = (-1.0, 3.0)


def first_channel(images: np.ndarray) -> np.ndarray:
    """Takes slices [S, H, W] of [S, H, W] or [S, H, W, K]: what is shown, and what the CRF sees."""
    return images[..., 0] if images.ndim == 4 else images


def intensity_range(image: np.ndarray) -> tuple[float, float]:
    """Finds the intensities that become 0 and 1: the volume's 1st and 99th percentile.

    Where these two coincide (a nearly empty volume), minimum and maximum take their place.
    """
    low, high = (float(v) for v in np.percentile(image, PERCENTILES))
    return (low, high) if high > low else (float(image.min()), float(image.max()))


def relative_median(image: np.ndarray) -> float:
    """Finds the median intensity, as `normalize_intensity` has it: about 0 where most is dark."""
    low, high = intensity_range(image)
    return float((np.median(image) - low) / (high - low))


def without_outliers(image: np.ndarray) -> np.ndarray:
    """Cuts off, of an image of any shape, what `normalize_intensity` would clip; same type."""
    low, high = intensity_range(image)
    return np.clip(image, *(low + np.multiply(CLIP, high - low)).astype(image.dtype))


def normalize_intensity(image: np.ndarray) -> np.ndarray:
    """Maps the volume's 1st percentile to 0 and its 99th to 1, held within `CLIP`; float32."""
    low, high = intensity_range(image)
    return np.clip((image - low) / (high - low), *CLIP).astype(np.float32)


def window_intensity(image: np.ndarray, low: float, high: float) -> np.ndarray:
    """Maps `low` to 0 and `high` to 1, and holds intensities within them; float32.

    For CT, whose numbers mean the same in every scan: what is worth telling apart lies between.
    """
    return np.clip((image - low) / (high - low), 0, 1).astype(np.float32)


def _source_index(num_out, spacing_out, num_in, spacing_in) -> np.ndarray:
    """Index in a line of `num_in` samples under each of `num_out`, middles aligned; [num_out]."""
    millimetres = (np.arange(num_out) - num_out // 2) * spacing_out
    # Rounded, so that what lies on a sample, or midway between two, is told exactly.
    return np.round(millimetres / spacing_in + num_in // 2, 6)


def _linear_index(
    num_out: int, spacing_out: float, num_in: int, spacing_in: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(sample before, sample after, share of the one after, whether inside); each [num_out].

    Middles are aligned. Up to half a sample beyond the outermost ones is inside and repeats them.
    """
    index = _source_index(num_out, spacing_out, num_in, spacing_in)
    inside = (index >= -0.5) & (index <= num_in - 0.5)
    index = np.clip(index, 0, num_in - 1)
    low = np.minimum(np.floor(index).astype(int), max(num_in - 2, 0))
    high = np.minimum(low + 1, num_in - 1)
    return low, high, (index - low).astype(np.float32), inside


def linear_matrix(num_out: int, spacing_out: float, num_in: int, spacing_in: float) -> np.ndarray:
    """Makes weights [num_out, num_in] of linear interpolation along an axis, middles aligned.

    They are float32. Rows beyond the outermost input samples by up to half a sample repeat the
    outermost; further out they are zero (padding).
    """
    low, high, share, inside = _linear_index(num_out, spacing_out, num_in, spacing_in)
    matrix = np.zeros((num_out, num_in), np.float32)
    rows = np.arange(num_out)
    np.add.at(matrix, (rows, low), 1 - share)
    np.add.at(matrix, (rows, high), share)
    return matrix * inside[:, None]


def _nearest_index(num_out, spacing_out, num_in, spacing_in) -> tuple[np.ndarray, np.ndarray]:
    index = _source_index(num_out, spacing_out, num_in, spacing_in)
    inside = (index >= -0.5) & (index < num_in - 0.5)
    # rint takes what is midway to the even one: labels move to neither side on the whole.
    return np.clip(np.rint(index).astype(int), 0, num_in - 1), inside


def image_to_grid(image, spacing_mm, *, image_size: int, target_spacing_mm: float) -> np.ndarray:
    """Resamples linearly and crops or zero-pads about the middle: [X, Y, S] -> [S, H, W] float32.

    Args:
      image: [X, Y, S] float.
      spacing_mm: native (x, y, ...) spacing.
      image_size: H = W.
      target_spacing_mm: in-plane spacing of the training grid. Through-plane stays as it is.
    """
    grid = np.asarray(image, np.float32).T  # [S, Y, X], the order of the file
    for axis, spacing in ((1, spacing_mm[1]), (2, spacing_mm[0])):
        # Not by `linear_matrix`: nearly all of it is zero, and volumes are prepared in threads that
        # those of a matrix product would disturb.
        low, high, share, inside = _linear_index(
            image_size, target_spacing_mm, grid.shape[axis], spacing
        )
        shape = [1, 1, 1]
        shape[axis] = image_size
        share, inside = share.reshape(shape), inside.reshape(shape)
        before, after = grid.take(low, axis), grid.take(high, axis)
        grid = (before + (after - before) * share) * inside
    return grid.swapaxes(1, 2)


def label_to_grid(label, spacing_mm, *, image_size: int, target_spacing_mm: float) -> np.ndarray:
    """Resamples labels, nearest neighbour, background outside: [X, Y, S] int -> [S, H, W].

    Arguments as of `image_to_grid`.
    """
    x, y = label.shape[:2]
    rows, row_inside = _nearest_index(image_size, target_spacing_mm, x, spacing_mm[0])
    columns, column_inside = _nearest_index(image_size, target_spacing_mm, y, spacing_mm[1])
    slices = np.moveaxis(label, 2, 0)[:, rows[:, None], columns[None, :]]
    return np.where(row_inside[:, None] & column_inside[None, :], slices, 0).astype(label.dtype)


def _native_maps(probs, spacing_mm, shape, target_spacing_mm) -> tuple[np.ndarray, np.ndarray]:
    """Interpolation along X [X, H] and Y [Y, W]: zero in rows outside the training grid."""
    height, width = probs.shape[1:3]
    return (
        linear_matrix(shape[0], spacing_mm[0], height, target_spacing_mm),
        linear_matrix(shape[1], spacing_mm[1], width, target_spacing_mm),
    )


def _native_slices(probs, rows, columns) -> Iterator[np.ndarray]:
    """Yields the probabilities [C, X, Y] of each slice, all zero outside the training grid."""
    for grid in probs:
        yield rows @ np.moveaxis(grid, 2, 0).astype(np.float32) @ columns.T


def probs_to_native_label(probs, spacing_mm, shape, *, target_spacing_mm: float) -> np.ndarray:
    """Inverts `image_to_grid` for class probabilities, followed by argmax.

    Args:
      probs: [S, H, W, C] float.
      spacing_mm: native spacing.
      shape: native (X, Y).
      target_spacing_mm: spacing of the grid that `probs` live on.

    Returns:
      [X, Y, S] uint8. Native pixels outside the training grid are background.
    """
    rows, columns = _native_maps(probs, spacing_mm, shape, target_spacing_mm)
    label = np.empty((shape[0], shape[1], len(probs)), np.uint8)
    for s, native in enumerate(_native_slices(probs, rows, columns)):
        label[..., s] = native.argmax(axis=0)  # all zero outside the grid: argmax gives class 0
    return label


def probs_to_native(probs, spacing_mm, shape, *, target_spacing_mm: float) -> np.ndarray:
    """Maps to the probabilities whose argmax is `probs_to_native_label`; arguments as there.

    Returns:
      [X, Y, S, C] float32. Native pixels outside the training grid are background, with
      probability 1.
    """
    rows, columns = _native_maps(probs, spacing_mm, shape, target_spacing_mm)
    native = np.empty((shape[0], shape[1], len(probs), probs.shape[3]), np.float32)
    for s, of_slice in enumerate(_native_slices(probs, rows, columns)):
        native[:, :, s] = np.moveaxis(of_slice, 0, 2)
    native[~(rows.any(axis=1, keepdims=True) & columns.any(axis=1)), :, 0] = 1
    return native
