"""Random transforms of one slice, for use inside the compiled step (arXiv:2112.09645).

Everything here handles a single [H, W] slice; the caller vmaps with one key per slice, so that
the draw of a slice does not depend on how the batch is split over devices. Coordinate maps run
backwards: at each output pixel they name the (row, column), in pixels, to read in the input.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates

# Of a moved square pixel, as a part of its area: the least that an elastic field leaves of it.
MIN_AREA = 0.1


def augment_slice(
    key,
    image,
    label,
    *,
    max_rotation_degrees=15.0,
    scale_range=(0.95, 1.05),
    elastic_probability=0.5,
    elastic_sigma=0.026,
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
      elastic_sigma: standard deviation of the displacement of a grid node along each axis, as a
        share of the slice's side; 0.026 is 5 px at 192 px.
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
        elastic_key, label.shape, sigma=elastic_sigma, probability=elastic_probability
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


def elastic_displacement(key, shape, *, sigma, probability):
    """Draws a smooth displacement field, or with 1 - `probability` a field of zeros.

    The nodes of a 3 x 3 grid move by normal(0, sigma * side) along each axis; Keys' cubic
    interpolation takes them to (H, W). As when an image is resized, nodes are the centres of the
    nine equal tiles of the slice. A field that would fold the slice is scaled down as a whole, see
    `unfolded`: none of 40,000 draws at a sigma of 0.026, 3 % at 0.052, a third at 0.078.

    Args:
      key: a single random key.
      shape: (H, W).
      sigma: as a share of the side: of H for rows, of W for columns.
      probability: chance of a field that is not zero.

    Returns:
      [2, H, W] float32, pixels, rows first.
    """
    field_key, apply_key = jax.random.split(key)
    sides = jnp.array(shape, jnp.float32)[:, None, None]
    nodes = sigma * sides * jax.random.normal(field_key, (2, 3, 3))
    field = unfolded(jax.image.resize(nodes, (2, *shape), method="cubic"))
    return jnp.where(jax.random.bernoulli(apply_key, probability), field, 0.0)


def unfolded(displacement):
    """Scales a displacement field down, as little as keeps the slice from folding over.

    The map p -> p + t d(p) takes the square between four pixels to a quadrilateral. Bilinear
    between them, its Jacobian determinant is linear along each side, hence least at a corner, where
    it is that of the differences along the two sides that meet there:

      det(I + t D) = 1 + t trace D + t^2 det D,  D the differences of d

    t is the largest number up to 1 with which all of them are at least `MIN_AREA`.

    Args:
      displacement: [2, H, W] d, pixels, rows first.

    Returns:
      t d, [2, H, W]; d itself, to the bit, where it does not fold.
    """
    by_row = displacement[:, 1:] - displacement[:, :-1]  # [2, H-1, W]
    by_column = displacement[:, :, 1:] - displacement[:, :, :-1]  # [2, H, W-1]
    rows = by_row[:, :, :-1], by_row[:, :, 1:]
    columns = by_column[:, :-1], by_column[:, 1:]
    # A corner reaches MIN_AREA first at the t with 1 / t = (-b + sqrt(b^2 - 4 a c)) / (2 c). With
    # no such t > 0 this is negative, or the root is not real. c > 0, so that 1 / t is finite.
    c = 1 - MIN_AREA
    inverse = jnp.ones(())
    for row in rows:
        for column in columns:
            a = row[0] * column[1] - row[1] * column[0]
            b = row[0] + column[1]
            root2 = b**2 - 4 * a * c
            first = (jnp.sqrt(jnp.maximum(root2, 0)) - b) / (2 * c)
            inverse = jnp.maximum(inverse, jnp.max(jnp.where(root2 >= 0, first, 0), initial=0))
    return displacement / inverse


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


def read_linear(image, coordinates):
    """Reads an image [H, W] or [H, W, K] at `coordinates` [2, H', W'], linearly; 0 outside."""
    read = functools.partial(
        map_coordinates, coordinates=coordinates, order=1, mode="constant", cval=0
    )
    return read(image) if image.ndim == 2 else jax.vmap(read, in_axes=-1, out_axes=-1)(image)


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
    image = read_linear(image, coordinates)
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


def strong_geometry(
    key,
    image,
    label,
    *,
    probability=0.9,
    max_rotation_degrees=45.0,
    scale_range=(0.7, 1.4),
    max_log_aspect=0.15,
    max_shift=0.0625,
    coarse_sigma=0.042,
    fine_sigma=0.0156,
    any_orientation=False,
):
    """Moves image and label together, much further than `augment_slice` does.

    Rotation, scale, aspect and shift at once, then elastic fields of 3 x 3 and 7 x 7 nodes. What
    nnU-Net teaches (arXiv:1904.08128): with few labels augmentation is worth more than a loss.

    Args:
      key: a single random key.
      image: [H, W] or [H, W, K] float.
      label: [H, W] integers, background 0.
      probability: chance that the slice is moved at all.
      max_rotation_degrees: bound, either way.
      scale_range: (low, high) of the magnification, drawn evenly in its logarithm.
      max_log_aspect: bound of log(height / width) of the magnification, either way.
      max_shift: bound along each axis, as a share of the side, either way.
      coarse_sigma, fine_sigma: standard deviation of a node of the 3 x 3 and of the 7 x 7 grid, as
        a share of the side. A field that would fold is scaled down, see `unfolded`.
      any_orientation: flips and whole turns too, for scans without a fixed orientation.

    Returns:
      (image, label) of the shapes and dtypes given; what comes from outside the slice is 0.
    """
    apply_key, affine_key, turn_key, *node_keys = jax.random.split(key, 5)
    bound = jnp.array(
        [math.radians(max_rotation_degrees), 1.0, max_log_aspect, max_shift, max_shift]
    )
    angle, level, aspect, down, right = jax.random.uniform(
        affine_key, (5,), minval=-bound, maxval=bound
    )
    low, high = (math.log(s) for s in scale_range)
    scale = (low + high) / 2 + level * (high - low) / 2
    magnify = jnp.exp(jnp.array([scale + aspect / 2, scale - aspect / 2]))
    matrix = rotation_matrix(angle) / magnify[None]
    if any_orientation:
        flip, turn = jax.random.uniform(turn_key, (2,))
        turned = rotation_matrix(jnp.floor(4 * turn) * (jnp.pi / 2))
        turned = turned * jnp.where(flip < 0.5, jnp.array([[1.0, -1.0]]), 1.0)
        matrix = jnp.stack(  # written out, as in `warp_coordinates`
            [turned[i, 0] * matrix[0] + turned[i, 1] * matrix[1] for i in (0, 1)]
        )
    sides = jnp.array(label.shape, jnp.float32)[:, None, None]
    field = jnp.zeros((2, *label.shape))
    for node_key, nodes, sigma in zip(node_keys, (3, 7), (coarse_sigma, fine_sigma), strict=True):
        drawn = sigma * sides * jax.random.normal(node_key, (2, nodes, nodes))
        field += jax.image.resize(drawn, field.shape, method="cubic")
    coordinates = warp_coordinates(matrix, unfolded(field))
    coordinates += jnp.stack([down, right])[:, None, None] * sides
    moved = jax.random.bernoulli(apply_key, probability)
    still = warp_coordinates(jnp.eye(2), jnp.zeros_like(field))
    return warp(image, label, jnp.where(moved, coordinates, still))


def strong_intensity(
    key,
    image,
    *,
    max_log_gamma=0.45,
    max_bias=0.25,
    max_log_contrast=0.4,
    max_brightness=0.2,
    blur_sigma_range=(0.3, 1.5),
    max_zoom=2.0,
    max_noise=0.08,
):
    """Changes the intensities of a slice much further than `jitter_intensity` does.

    Gamma, a smooth bias field, contrast, brightness; blur, low resolution and noise each for half
    of the slices. The label stays as it is. Each of several channels is changed by itself.

    Args:
      key: a single random key.
      image: [H, W] or [H, W, K] float, tissue at 0 to 1.
      max_log_gamma: bound of the logarithm of the exponent, either way; signs are kept.
      max_bias: bound of the bias field's nodes, 3 x 3; the image is multiplied by 1 + field.
      max_log_contrast: bound of the logarithm of the factor, either way.
      max_brightness: bound of the offset, either way.
      blur_sigma_range: (low, high) of the Gaussian blur, pixels.
      max_zoom: pixels that one pixel of low resolution covers along each axis, at most.
      max_noise: highest standard deviation of Gaussian noise.

    Returns:
      As `image`.
    """
    if image.ndim == 3:
        of_channel = functools.partial(
            strong_intensity,
            max_log_gamma=max_log_gamma,
            max_bias=max_bias,
            max_log_contrast=max_log_contrast,
            max_brightness=max_brightness,
            blur_sigma_range=blur_sigma_range,
            max_zoom=max_zoom,
            max_noise=max_noise,
        )
        keys = jax.random.split(key, image.shape[2])
        return jax.vmap(of_channel, in_axes=(0, -1), out_axes=-1)(keys, image)
    number_key, bias_key, noise_key, apply_key = jax.random.split(key, 4)
    gamma, contrast, brightness, sigma, zoom, noise = jax.random.uniform(
        number_key,
        (6,),
        minval=jnp.array(
            [-max_log_gamma, -max_log_contrast, -max_brightness, blur_sigma_range[0], 1.0, 0.0]
        ),
        maxval=jnp.array(
            [
                max_log_gamma,
                max_log_contrast,
                max_brightness,
                blur_sigma_range[1],
                max_zoom,
                max_noise,
            ]
        ),
    )
    does_blur, does_zoom, does_noise = jax.random.bernoulli(apply_key, 0.5, (3,))
    found = jnp.sign(image) * jnp.abs(image) ** jnp.exp(gamma)
    nodes = jax.random.uniform(bias_key, (3, 3), minval=-max_bias, maxval=max_bias)
    found *= 1 + jax.image.resize(nodes, image.shape, method="cubic")
    found = found * jnp.exp(contrast) + brightness
    found = jnp.where(does_blur, gaussian_blur(found, sigma), found)
    found = jnp.where(does_zoom, low_resolution(found, zoom), found)
    found += jnp.where(does_noise, noise, 0) * jax.random.normal(noise_key, image.shape)
    return found.astype(image.dtype)


def add_noise(key, image, *, sigma=0.1, bound=0.2):
    """Adds to each pixel of [H, W] a draw of normal(0, sigma), clipped to +-bound."""
    noise = sigma * jax.random.normal(key, image.shape, image.dtype)
    return image + jnp.clip(noise, -bound, bound)


def gaussian_blur(image, sigma, *, radius=4):
    """Blurs [H, W] by a Gaussian of `sigma` pixels, cut at `radius`; edges are repeated."""
    offsets = jnp.arange(-radius, radius + 1)
    weights = jnp.exp(-0.5 * (offsets / sigma) ** 2)
    weights /= jnp.sum(weights)
    for axis in (0, 1):
        widths = [(radius, radius) if a == axis else (0, 0) for a in (0, 1)]
        padded = jnp.pad(image, widths, mode="edge")
        size = image.shape[axis]
        image = sum(
            weights[i] * jax.lax.slice_in_dim(padded, i, i + size, axis=axis)
            for i in range(2 * radius + 1)
        )
    return image


def low_resolution(image, zoom):
    """Blurs [H, W] as if one pixel had covered `zoom` x `zoom` of its pixels, `zoom` at least 1."""
    rows, columns = (
        jnp.clip((jnp.floor(jnp.arange(n) / zoom) + 0.5) * zoom - 0.5, 0, n - 1)
        for n in image.shape
    )
    coordinates = jnp.meshgrid(rows, columns, indexing="ij")
    return map_coordinates(image, list(coordinates), order=1, mode="nearest")
