"""Fully connected CRF with Potts labels, by mean field, on a batch of slices.

On their own grid, or on a finer one, whose edges lie closer to those of the organ.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MIN_PROB = 1e-5  # log(0) has no place in a unary
MIN_EIGENVALUE = 1e-7  # of the spatial kernel, whose largest is 1: float32 rounding
WINDOW_SIGMAS = 4  # pairs farther apart than this weigh below exp(-8) = 3.4e-4: left out


def dense_crf(
    image: jax.Array,
    probs: jax.Array,
    *,
    spatial_sigma: float,
    spatial_weight: float,
    bilateral_sigma: float,
    intensity_sigma: float,
    bilateral_weight: float,
    num_steps: int,
) -> jax.Array:
    """Refines class probabilities so that near (and similar) pixels agree.

    Mean field on pixels i, j of one slice, with p the position and I the intensity::

        Q <- softmax(log probs + spatial_weight * S Q + bilateral_weight * T Q)
        S = D^-1/2 K D^-1/2,  D = diag(row sums of K),  T likewise from L
        K_ij = exp(-|p_i - p_j|^2 / (2 spatial_sigma^2))
        L_ij = exp(-|p_i - p_j|^2 / (2 bilateral_sigma^2)
                   - (I_i - I_j)^2 / (2 intensity_sigma^2))

    which is Krahenbuhl and Koltun, arXiv:1210.5644, except that the sums include j = i, as the
    common permutohedral implementation does: with a bilateral_sigma far below one pixel T is the
    identity, a self-feedback that keeps a strong S from erasing small organs.

    K is exact to float32 rounding. L is exact for pairs up to 4 bilateral_sigma apart and 0
    beyond: each dropped pair weighs under 3.4e-4 of a pixel's weight on itself, and on an even
    image they add up to 0.04 % of a row. Time grows with bilateral_sigma^2 (about 1250 shifts of
    the slice per step at 5 px) until the window holds the whole slice; memory does not grow.

    Args:
      image: [B, H, W], any real dtype, in the units of `intensity_sigma`.
      probs: [B, H, W, C], class probabilities; clipped to [1e-5, 1].
      spatial_sigma: pixels, > 0.
      spatial_weight: >= 0.
      bilateral_sigma: pixels, > 0.
      intensity_sigma: in units of the image, > 0.
      bilateral_weight: >= 0; at 0 the bilateral sums are not computed.
      num_steps: mean-field updates, >= 0, all pixels at once, from Q = probs.

    Returns:
      Marginals [B, H, W, C], float32. The numbers are static: new values compile anew.

    Example: a lone pixel that disagrees with all its neighbours gives in.

      >>> labels = np.zeros((1, 9, 9), int)
      >>> labels[0, 4, 4] = 1
      >>> refined = dense_crf(
      ...     jnp.ones((1, 9, 9)),
      ...     0.6 * jax.nn.one_hot(labels, 2) + 0.2,
      ...     spatial_sigma=2.0,
      ...     spatial_weight=5.0,
      ...     bilateral_sigma=0.01,
      ...     intensity_sigma=0.5,
      ...     bilateral_weight=0.5,
      ...     num_steps=10,
      ... )
      >>> int(labels.sum()), int(refined.argmax(-1).sum())
      (1, 0)

    Raises:
      ValueError: a shape that does not fit, a sigma <= 0, a weight or num_steps < 0.
    """
    if image.ndim != 3 or probs.ndim != 4 or probs.shape[:3] != image.shape:
        raise ValueError(
            f"found image {image.shape} and probs {probs.shape}, wanted [B, H, W] and "
            "[B, H, W, C] with the same B, H, W: drop the image's channel axis, keep the classes"
        )
    sigmas = {
        "spatial_sigma": spatial_sigma,
        "bilateral_sigma": bilateral_sigma,
        "intensity_sigma": intensity_sigma,
    }
    for name, value in sigmas.items():
        if not 0 < value < np.inf:
            raise ValueError(
                f"found {name}={value}, wanted a finite number > 0: to switch a kernel off, "
                "set its weight to 0"
            )
    weights = {"spatial_weight": spatial_weight, "bilateral_weight": bilateral_weight}
    for name, value in (weights | {"num_steps": num_steps}).items():
        if not 0 <= value < np.inf:
            raise ValueError(
                f"found {name}={value}, wanted a finite number >= 0: 0 switches it off"
            )
    return _mean_field(image, probs, **sigmas, **weights, num_steps=num_steps)


def upsampled_dense_crf(
    image: jax.Array, probs: jax.Array, *, upsampling: int, **settings: Any
) -> jax.Array:
    """Refines class probabilities by `dense_crf` on a grid so many times as fine.

    Between pixels an interpolated image tells where an edge is; probabilities that a CRF has
    refined, which are near 0 or 1, do not: interpolated, they put every edge midway.

    Image and probabilities are interpolated linearly. The middle pixels, n // 2 of n, lie on each
    other, as `data.grid` has them; beyond the outermost pixels all is as at these.

    Args:
      image: [B, H, W], as for `dense_crf`.
      probs: [B, H, W, C].
      upsampling: f >= 1; operations grow with f^4: f^2 pixels with f^2 neighbours each.
      **settings: of `dense_crf`; its sigmas in pixels of the coarse grid.

    Returns:
      Marginals [B, f H, f W, C], float32; with f = 1 what `dense_crf` gives.

    Raises:
      ValueError: see `dense_crf`.
    """
    in_pixels = {
        name: value * upsampling if name in ("spatial_sigma", "bilateral_sigma") else value
        for name, value in settings.items()
    }
    if upsampling > 1:
        rows, columns = (_linear_weights(size, upsampling) for size in image.shape[1:])
        finer = functools.partial(jnp.einsum, "yh,bhw...,xw->byx...", precision="highest")
        image, probs = finer(rows, image, columns), finer(rows, probs, columns)
    return dense_crf(image, probs, **in_pixels)


@functools.partial(
    jax.jit,
    static_argnames=(
        "spatial_sigma",
        "spatial_weight",
        "bilateral_sigma",
        "intensity_sigma",
        "bilateral_weight",
        "num_steps",
    ),
)
def _mean_field(
    image,
    probs,
    *,
    spatial_sigma,
    spatial_weight,
    bilateral_sigma,
    intensity_sigma,
    bilateral_weight,
    num_steps,
):
    # Classes before rows and columns: the last axis is then long, for vector units and BLAS.
    probs = jnp.moveaxis(probs.astype(jnp.float32), -1, 1)  # [B, C, H, W]
    log_probs = jnp.log(jnp.clip(probs, MIN_PROB, 1.0))
    height, width = image.shape[1:]
    rows, columns = (_gaussian_factor(size, spatial_sigma) for size in (height, width))

    scaled_image = image.astype(jnp.float32)[:, None] / intensity_sigma  # [B, 1, H, W]
    if bilateral_weight:
        row_sums = _bilateral_sum(scaled_image, jnp.ones_like(scaled_image), bilateral_sigma)
        scale = jax.lax.rsqrt(row_sums)

    def step(_, q):
        # Full float32: the weights would amplify the rounding of accelerators' faster products.
        spatial = jnp.einsum(
            "yk,hk,bchw,wl,xl->bcyx", rows, rows, q, columns, columns, precision="highest"
        )
        energy = log_probs + spatial_weight * spatial
        if bilateral_weight:
            bilateral = scale * _bilateral_sum(scaled_image, scale * q, bilateral_sigma)
            energy += bilateral_weight * bilateral
        return jax.nn.softmax(energy, axis=1)

    q = jax.lax.fori_loop(0, num_steps, step, jax.nn.softmax(log_probs, axis=1))
    return jnp.moveaxis(q, 1, -1)


def _linear_weights(size: int, upsampling: int) -> np.ndarray:
    """[upsampling * size, size] float32: how much each pixel counts for each of the finer ones."""
    fine = size * upsampling
    position = (np.arange(fine) - fine // 2) / upsampling + size // 2
    distance = np.abs(np.clip(position, 0, size - 1)[:, None] - np.arange(size))
    return np.maximum(0, 1 - distance).astype(np.float32)


def _gaussian_factor(size: int, sigma: float) -> np.ndarray:
    """F [size, rank] with F F^T = D^-1/2 K D^-1/2 for the Gaussian K over positions 0..size-1.

    A 2-D Gaussian is the product of one over rows and one over columns, and so are its row sums:
    normalising each normalises the product. A smooth kernel has few eigenvalues above float32
    rounding (35 of 192 at sigma 10), and products with F cost that much less.
    """
    position = np.arange(size)
    kernel = np.exp(-0.5 * ((position[:, None] - position) / sigma) ** 2)
    scale = kernel.sum(axis=1) ** -0.5
    values, vectors = np.linalg.eigh(scale[:, None] * kernel * scale)
    keep = values > MIN_EIGENVALUE  # the largest is 1, on the vector sqrt(row sums)
    return (vectors[:, keep] * np.sqrt(values[keep])).astype(np.float32)


def _bilateral_sum(scaled_image, values, sigma):
    """Sums `values` [B, C, H, W] with weights from [B, 1, H, W] over a disc around each pixel."""
    height, width = scaled_image.shape[2:]
    radius = WINDOW_SIGMAS * sigma
    reach_y, reach_x = min(int(radius), height - 1), min(int(radius), width - 1)
    shifts = np.mgrid[-reach_y : reach_y + 1, -reach_x : reach_x + 1].reshape(2, -1).T
    distance2 = (shifts**2).sum(axis=1)
    inside = distance2 <= radius**2
    starts = (shifts + [reach_y, reach_x])[inside]
    spatial = np.exp(-0.5 * distance2[inside] / sigma**2).astype(np.float32)

    # Zero values outside the slice, so whatever weight falls there adds nothing.
    padding = ((0, 0), (0, 0), (reach_y, reach_y), (reach_x, reach_x))
    padded_image, padded_values = jnp.pad(scaled_image, padding), jnp.pad(values, padding)

    def add_shift(total, shift):
        (top, left), weight = shift
        neighbour = jax.lax.dynamic_slice(padded_image, (0, 0, top, left), scaled_image.shape)
        value = jax.lax.dynamic_slice(padded_values, (0, 0, top, left), values.shape)
        return total + weight * jnp.exp(-0.5 * (scaled_image - neighbour) ** 2) * value, None

    return jax.lax.scan(add_shift, jnp.zeros_like(values), (starts, spatial))[0]
