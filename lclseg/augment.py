"""Random transforms of one slice, for use inside the compiled step (arXiv:2112.09645).

Everything here handles a single [H, W] slice; the caller vmaps with one key per slice, so that
the draw of a slice does not depend on how the batch is split over devices. Coordinate maps run
backwards: at each output pixel they name the (row, column), in pixels, to read in the input.
"""

import functools

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates


def augment_slice(
    key,
    image,
    label,
    *,
    max_rotation_degrees=15.0,
    scale_range=(0.95, 1.05),
    elastic_probability=0.5,
    elastic_sigma_px=5.0,
    contrast_range=(0.8, 1.2),
    max_brightness=0.1,
):
    """Moves image and label together, then jitters the intensity of the image.

    One affine transform (see `affine_matrix`), then, with `elastic_probability`, an elastic one.
    Both compose into one coordinate map, so image and label are each interpolated once.

    Args:
      key: a single random key.
      image: [H, W] or [H, W, K] float.
      label: [H, W] integers, background 0.
      max_rotation_degrees: bound of the small rotation, either way.
      scale_range: (low, high) of the magnification; 1.05 enlarges by 5 %.
      elastic_probability: chance of an elastic deformation.
      elastic_sigma_px: standard deviation, in pixels, of the displacement of a grid node.
      contrast_range: (low, high) of the factor on the image.
      max_brightness: bound of the offset on the image, either way.

    Returns:
      (image, label) of the shapes and dtypes given. What comes from outside the slice is
      background: label 0, and image 0 before the intensity jitter.

    Raises:
      ValueError: image and label have not the same [H, W].
      TypeError: the label is not an integer array.
    """
    if label.ndim != 2 or image.ndim > 3 or image.shape[:2] != label.shape:
        raise ValueError(
            f"image is {image.shape} and label {label.shape}, both must be the same [H, W], the "
            "image may be [H, W, K]: vmap over the batch"
        )
    if not jnp.issubdtype(label.dtype, jnp.integer):
        raise TypeError(
            f"label has dtype {label.dtype}, must be an integer class map: cast it, or take the "
            "argmax of a one-hot label"
        )
    affine_key, elastic_key, intensity_key = jax.random.split(key, 3)
    matrix = affine_matrix(
        affine_key,
        max_rotation_degrees=max_rotation_degrees,
        scale_range=scale_range,
    )
    displacement = elastic_displacement(
        elastic_key, label.shape, sigma_px=elastic_sigma_px, probability=elastic_probability
    )
    image, label = warp(image, label, warp_coordinates(matrix, displacement))
    image = jitter_intensity(
        intensity_key, image, contrast_range=contrast_range, max_brightness=max_brightness
    )
    return image, label


def augment_view(key, image, *, contrast_range=(0.7, 1.3), max_brightness=0.3, clip=(0.0, 1.5)):
    """Makes a contrastive view: intensity only, since its mask has to stay in place.

    Args:
      key: a single random key.
      image: [H, W] or [H, W, K] float.
      contrast_range: (low, high) of the factor.
      max_brightness: bound of the offset, either way.
      clip: (low, high) of the result.

    Returns:
      As `image`, within `clip`.
    """
    return jitter_intensity(
        key, image, contrast_range=contrast_range, max_brightness=max_brightness, clip=clip
    )


def affine_matrix(key, *, max_rotation_degrees, scale_range):
    """Draws, uniformly, one of: small rotation, scaling, flip, k x 45 degrees, nothing.

    The flip itself happens with probability 0.5 and k is uniform on 0..7. Returns [2, 2] float32,
    taking output to input (row, column) offsets from the centre.
    """
    max_angle = jnp.deg2rad(max_rotation_degrees)
    # One draw in place of five: each costs compile time in the training step.
    kind, angle, scale, flip, turn = jax.random.uniform(
        key,
        (5,),
        minval=jnp.array([0.0, -max_angle, scale_range[0], 0.0, 0.0]),
        maxval=jnp.array([5.0, max_angle, scale_range[1], 1.0, 8.0]),
    )
    identity = jnp.eye(2)
    # Indexing five finished 2 x 2 matrices costs less than a switch, which vmap would turn into
    # computing them all anyway.
    kinds = jnp.stack(
        [
            rotation_matrix(angle),
            scaling_matrix(scale),
            jnp.where(flip < 0.5, flip_matrix(), identity),
            rotation_matrix(jnp.floor(turn) * (jnp.pi / 4)),
            identity,
        ]
    )
    return kinds[kind.astype(jnp.int32)]


def rotation_matrix(radians):
    """Turns the picture counter-clockwise, rows pointing down; [2, 2], output to input."""
    cos, sin = jnp.cos(radians), jnp.sin(radians)
    return jnp.array([[cos, sin], [-sin, cos]])


def scaling_matrix(factor):
    """Magnifies the picture by `factor`; [2, 2], output to input, hence 1 / factor."""
    return jnp.eye(2) / factor


def flip_matrix():
    """Mirrors the picture left to right; [2, 2]."""
    return jnp.diag(jnp.array([1.0, -1.0]))


def elastic_displacement(key, shape, *, sigma_px, probability):
    """Draws a smooth displacement field, or with 1 - `probability` a field of zeros.

    The nodes of a 3 x 3 grid move by normal(0, sigma_px) along each axis; Keys' cubic
    interpolation takes them to (H, W). As when an image is resized, nodes are the centres of the
    nine equal tiles of the slice. Returns [2, H, W] float32, pixels, rows first.
    """
    field_key, apply_key = jax.random.split(key)
    nodes = sigma_px * jax.random.normal(field_key, (2, 3, 3))
    field = jax.image.resize(nodes, (2, *shape), method="cubic")
    return jnp.where(jax.random.bernoulli(apply_key, probability), field, 0.0)


def warp_coordinates(matrix, displacement):
    """Composes the affine map about the slice's centre with a displacement after it.

    An output pixel p reads the input at A (p + d(p) - centre) + centre, which is what warping by
    A first and by d second would give, with one interpolation in place of two.

    Args:
      matrix: [2, 2] A, output to input.
      displacement: [2, H, W] d, pixels.

    Returns:
      [2, H, W] (row, column) to read, pixels; the centre is ((H-1)/2, (W-1)/2).
    """
    _, height, width = displacement.shape
    centre_row, centre_column = (height - 1) / 2, (width - 1) / 2
    rows, columns = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")
    rows = rows - centre_row + displacement[0]
    columns = columns - centre_column + displacement[1]
    # Written out: accelerators may round the operands of a matrix product to 10 bits.
    return jnp.stack(
        [
            matrix[0, 0] * rows + matrix[0, 1] * columns + centre_row,
            matrix[1, 0] * rows + matrix[1, 1] * columns + centre_column,
        ]
    )


def warp(image, label, coordinates):
    """Reads image (linear) and label (nearest) at `coordinates`; 0 outside the slice.

    Args:
      image: [H, W] or [H, W, K] float.
      label: [H, W] integers.
      coordinates: [2, H', W'] (row, column), pixels.

    Returns:
      (image, label), [H', W'] each, the image [H', W', K] where it was, dtypes kept. Over the first
      pixel beyond an edge the image fades linearly to 0; the label becomes 0 half a pixel beyond
      it.
    """
    read = functools.partial(
        map_coordinates, coordinates=coordinates, order=1, mode="constant", cval=0
    )
    image = read(image) if image.ndim == 2 else jax.vmap(read, in_axes=-1, out_axes=-1)(image)
    label = map_coordinates(label, coordinates, order=0, mode="constant", cval=0)
    return image, label


def jitter_intensity(key, image, *, contrast_range, max_brightness, clip=None):
    """Returns image * contrast + brightness, both uniform draws, one pair per slice and channel.

    Args:
      key: a single random key.
      image: [H, W] or [H, W, K] float.
      contrast_range: (low, high) of the factor.
      max_brightness: bound of the offset, either way.
      clip: None, or (low, high) of the result.

    Returns:
      As `image`.
    """
    low, high = contrast_range
    channels = (1,) * (image.ndim - 2)
    contrast, brightness = jax.random.uniform(
        key,
        (2, *image.shape[2:]),
        dtype=image.dtype,
        minval=jnp.array([low, -max_brightness], image.dtype).reshape(2, *channels),
        maxval=jnp.array([high, max_brightness], image.dtype).reshape(2, *channels),
    )
    if image.ndim == 3:
        contrast, brightness = contrast[None, None], brightness[None, None]
    image = image * contrast + brightness
    return image if clip is None else jnp.clip(image, *clip)
