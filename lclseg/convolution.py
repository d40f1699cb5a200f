"""The U-Net's convolution, whose kernel gradient is computed block by block on CPUs.

Letters: B slices, H W pixels, K kernel size (odd), F input channels, G output channels.
"""

import functools

import jax
import jax.numpy as jnp

Array = jax.Array

# Pixels of a block: its K x K shifted copies stay in a core's cache.
BLOCK_PIXELS = 512


def _convolution(x: Array, kernel: Array) -> Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)


@jax.custom_vjp
def conv(x: Array, kernel: Array) -> Array:
    """Convolves, "SAME" padding: [B, H, W, F] and [K, K, F, G], of one dtype -> [B, H, W, G].

    XLA computes a kernel's gradient as a convolution with an image-sized window. On CPUs it copies
    whole batches into another order for it, and at 192 px took a third of the step; there, and only
    there, `blocked_kernel_gradient` takes its place. It has no forward-mode derivative.
    """
    return _convolution(x, kernel)


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _convolution(x, kernel), (x, kernel)


def _backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = saved
    (d_x,) = jax.linear_transpose(lambda x: _convolution(x, kernel), x)(dy)
    size = kernel.shape[0]
    d_kernel = jax.lax.platform_dependent(
        x,
        dy,
        cpu=functools.partial(blocked_kernel_gradient, kernel_size=size),
        default=functools.partial(kernel_gradient, kernel_size=size),
    )
    return d_x, d_kernel


conv.defvjp(_forward, _backward)


def kernel_gradient(x: Array, dy: Array, *, kernel_size: int) -> Array:
    """Computes what `blocked_kernel_gradient` does, by XLA's own transpose of the convolution."""
    shape = (kernel_size, kernel_size, x.shape[-1], dy.shape[-1])
    kernel = jax.ShapeDtypeStruct(shape, x.dtype)
    return jax.linear_transpose(lambda kernel: _convolution(x, kernel), kernel)(dy)[0]


def blocked_kernel_gradient(x: Array, dy: Array, *, kernel_size: int) -> Array:
    """Computes the gradient of the sum of dy * conv(x, kernel) by the kernel.

    Args:
      x: [B, H, W, F].
      dy: [B, H, W, G], of the same dtype.

    Returns:
      [K, K, F, G], summed in float32 at least.

    d_kernel[u, v] = sum over pixels of x[., i + u - K // 2, j + v - K // 2, :]^T dy[., i, j, :]:
    for all (u, v) one matrix product per block of pixels.
    """
    b, h, w, f = x.shape
    g, k, border = dy.shape[-1], kernel_size, kernel_size // 2
    rows = _largest_divisor(h, at_most=BLOCK_PIXELS // w)
    slices = _largest_divisor(b, at_most=BLOCK_PIXELS // (h * w)) if rows == h else 1
    sum_type = jnp.promote_types(x.dtype, jnp.float32)
    window = min(rows + 2 * border, h)

    def add_block(total: Array, block: Array) -> tuple[Array, None]:
        first, top = block // (h // rows) * slices, block % (h // rows) * rows
        # Padded here, in the cache, not as a whole; at an edge the window stays inside the image.
        start = jnp.clip(top - border, 0, h - window)
        xs = jax.lax.dynamic_slice(x, (first, start, 0, 0), (slices, window, w, f))
        xs = jnp.pad(xs, ((0, 0), (border, border), (border, border), (0, 0)))
        xs = jax.lax.dynamic_slice_in_dim(xs, top - start, rows + 2 * border, axis=1)
        dys = jax.lax.dynamic_slice(dy, (first, top, 0, 0), (slices, rows, w, g))
        shifted = [xs[:, u : u + rows, v : v + w] for u in range(k) for v in range(k)]
        patches = jnp.concatenate(shifted, axis=-1).reshape(-1, k * k * f)
        # G x KKF, not KKF x G: XLA's product is faster with the long side last.
        product = jnp.matmul(dys.reshape(-1, g).T, patches, preferred_element_type=sum_type)
        return total + product, None

    num_blocks = b // slices * (h // rows)
    total, _ = jax.lax.scan(add_block, jnp.zeros((g, k * k * f), sum_type), jnp.arange(num_blocks))
    return total.reshape(g, k, k, f).transpose(1, 2, 3, 0).astype(x.dtype)


def _largest_divisor(n: int, *, at_most: int) -> int:
    return max(d for d in range(1, n + 1) if n % d == 0 and d <= max(at_most, 1))
