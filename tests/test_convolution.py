"""The convolution's gradients, for CPUs and others, against sums written out in NumPy and XLA's."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lclseg import convolution


def random(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def xla_convolution(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def gradient_by_hand(x, dy, kernel_size):
    """d_kernel[u, v] in float64, tap by tap."""
    border = kernel_size // 2
    padded = np.pad(x.astype(np.float64), ((0, 0), (border, border), (border, border), (0, 0)))
    height, width = x.shape[1:3]
    taps = itertools.product(range(kernel_size), repeat=2)
    windows = (padded[:, u : u + height, v : v + width] for u, v in taps)
    result = [np.einsum("bhwf,bhwg->fg", window, dy.astype(np.float64)) for window in windows]
    return np.reshape(result, (kernel_size, kernel_size, x.shape[-1], dy.shape[-1]))


@pytest.mark.parametrize(
    "gradient", [convolution.blocked_kernel_gradient, convolution.kernel_gradient]
)
@pytest.mark.parametrize(
    ("shape", "kernel_size"),
    [
        pytest.param((2, 64, 64), 3, id="blocks of rows"),
        pytest.param((6, 8, 8), 3, id="blocks of slices"),
        pytest.param((7, 16, 16), 3, id="slices that no block divides"),
        pytest.param((1, 37, 40), 3, id="rows that no block divides"),
        pytest.param((2, 3, 600), 3, id="rows longer than a block"),
        pytest.param((3, 2, 2), 3, id="smaller than the kernel"),
        pytest.param((2, 1, 1), 3, id="one pixel"),
        pytest.param((2, 6, 10), 5, id="5 x 5"),
        pytest.param((2, 64, 64), 1, id="1 x 1"),
    ],
)
def test_kernel_gradient_is_the_sum_over_all_pixels(gradient, shape, kernel_size):
    x, dy = random(*shape, 3), random(*shape, 2, seed=1)
    got = jax.jit(gradient, static_argnames="kernel_size")(x, dy, kernel_size=kernel_size)
    np.testing.assert_allclose(got, gradient_by_hand(x, dy, kernel_size), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_convolution_equals_xla_in_value_and_gradients(kernel_size):
    x, kernel = random(3, 8, 12, 4), random(kernel_size, kernel_size, 4, 5, seed=1)
    dy = random(3, 8, 12, 5, seed=2)

    def results(f):
        value, pull_back = jax.vjp(f, x, kernel)
        return value, *pull_back(dy)

    for ours, theirs in zip(*map(results, (convolution.conv, xla_convolution)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_blocks_are_for_cpus_only():
    # The scan over blocks is a while loop in the program; other devices get one convolution.
    x, kernel = random(8, 32, 32, 4), random(3, 3, 4, 5)
    gradient = jax.jit(jax.grad(lambda k: jnp.sum(convolution.conv(x, k))))
    loops = {
        platform: "while" in gradient.trace(kernel).lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "cuda", "tpu")
    }
    assert loops == {"cpu": True, "cuda": False, "tpu": False}


def test_bfloat16_gradient_is_summed_in_float32():
    # Seven blocks of rows add 1 to the 256 of the first: in bfloat16 each sum would be 256 again.
    x = jnp.zeros((1, 64, 64, 1), jnp.bfloat16).at[0, ::8, 0, 0].set(1).at[0, 0, 0, 0].set(256)
    dy = jnp.ones_like(x)
    got = convolution.blocked_kernel_gradient(x, dy, kernel_size=1)
    assert got.dtype == jnp.bfloat16
    assert float(got[0, 0, 0, 0]) == 264  # 263, as bfloat16 has it
