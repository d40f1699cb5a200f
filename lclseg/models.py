"""The U-Net of arXiv:2112.09645 with its segmentation and projection heads (METHOD: network).

Letters: B slices, H W pixels, C classes (background 0), E embedding, F filters.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array


def max_pool(x: Array) -> Array:
    """Max over 2 x 2 blocks, [B, H, W, F] -> [B, H/2, W/2, F].

    Pairwise maxima instead of `nn.max_pool`: the gradient is a choice between two, no
    select-and-scatter; and no `max` over an axis, whose gradient divides by the number of entries
    equal to the maximum, which is 0 where the compiler computes an entry twice with other rounding.
    """
    b, h, w, f = x.shape
    x = x.reshape(b, h // 2, 2, w // 2, 2, f)
    x = jnp.maximum(x[:, :, 0], x[:, :, 1])
    return jnp.maximum(x[:, :, :, 0], x[:, :, :, 1])


def upsample_conv(x: Array, kernel: Array) -> Array:
    """Nearest upsampling x 2 followed by a 2 x 2 "SAME" convolution, at a quarter of its price.

    Args:
      x: [B, H, W, F].
      kernel: [2, 2, F, G].

    Returns:
      [B, 2H, 2W, G].

    All four pixels of an upsampled block are equal, so each kernel tap is multiplied once per
    *low*-resolution pixel, as one matrix product; the even and odd output rows and columns are sums
    of these products: out[2i] = w0 x[i] + w1 x[i], out[2i+1] = w0 x[i] + w1 x[i+1], with x = 0
    beyond the end.
    """
    b, h, w, f = x.shape
    g = kernel.shape[-1]
    taps = jnp.einsum("bhwf,uvfg->uvbhwg", x, kernel)

    def interleave(near: Array, far: Array, axis: int) -> Array:
        after = jnp.roll(far, -1, axis)
        last = jax.lax.broadcasted_iota(jnp.int32, far.shape, axis) == far.shape[axis] - 1
        odd = near + jnp.where(last, 0, after)
        return jnp.stack([near + far, odd], axis=axis + 1)

    rows = [interleave(taps[0, v], taps[1, v], axis=1) for v in range(2)]
    rows = [r.reshape(b, 2 * h, w, g) for r in rows]
    return interleave(rows[0], rows[1], axis=2).reshape(b, 2 * h, 2 * w, g)


BATCH_NORM_MOMENTUM = 0.99  # of the running statistics


class UpsampleConv(nn.Module):
    """Nearest upsampling x 2 and a 2 x 2 convolution without bias."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (2, 2, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        return upsample_conv(x.astype(self.dtype), kernel.astype(self.dtype))


class ConvBlock(nn.Module):
    """Convolution, BatchNorm, ReLU. The convolution has no bias: BatchNorm would cancel it."""

    features: int
    kernel_size: int = 3
    upsample: bool = False
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        if self.upsample:
            x = UpsampleConv(self.features, dtype=self.dtype)(x)
        else:
            x = nn.Conv(
                self.features,
                (self.kernel_size, self.kernel_size),
                use_bias=False,
                kernel_init=nn.initializers.he_normal(),
                dtype=self.dtype,
            )(x)
        x = nn.BatchNorm(
            use_running_average=not train,
            momentum=BATCH_NORM_MOMENTUM,
            epsilon=1e-3,
            dtype=self.dtype,
            # During initialisation there is no device axis to average over.
            axis_name=None if self.is_initializing() else self.axis_name,
        )(x)
        return nn.relu(x)


class Trunk(nn.Module):
    """Encoder and decoder: [B, H, W, 1] -> full-resolution features [B, H, W, filters[0]]."""

    filters: Sequence[int]
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        def block(features: int, x: Array, **kwargs) -> Array:
            layer = ConvBlock(features, dtype=self.dtype, axis_name=self.axis_name, **kwargs)
            return layer(x, train=train)

        skips = []
        for level, features in enumerate(self.filters):
            if level > 0:
                skips.append(x)
                x = max_pool(x)
            x = block(features, x)
            x = block(features, x)
        for level in reversed(range(len(self.filters) - 1)):
            features = self.filters[level]
            x = block(features, x, upsample=True)
            x = jnp.concatenate([skips[level], x], axis=-1)
            x = block(features, x)
            if level > 0:
                x = block(features, x)
        return x


class SegmentationHead(nn.Module):
    """Two 3 x 3 conv(16)-BN-ReLU, then a 3 x 3 convolution to C logits, no bias."""

    num_classes: int
    features: int = 16
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        for _ in range(2):
            x = ConvBlock(self.features, dtype=self.dtype, axis_name=self.axis_name)(x, train=train)
        logits = nn.Conv(
            self.num_classes,
            (3, 3),
            use_bias=False,
            kernel_init=nn.initializers.he_normal(),
            dtype=self.dtype,
        )(x)
        return logits.astype(jnp.promote_types(self.dtype, jnp.float32))


class ProjectionHead(nn.Module):
    """1 x 1 conv(E)-BN-ReLU, then a linear 1 x 1 convolution to E, no bias."""

    embedding_dim: int
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        x = ConvBlock(
            self.embedding_dim, kernel_size=1, dtype=self.dtype, axis_name=self.axis_name
        )(x, train=train)
        x = nn.Dense(
            self.embedding_dim,
            use_bias=False,
            kernel_init=nn.initializers.he_normal(),
            dtype=self.dtype,
        )(x)
        return x.astype(jnp.promote_types(self.dtype, jnp.float32))


class UNet(nn.Module):
    """2-D U-Net; about 2.1 M parameters with the default filters.

    Call `trunk`, `segment` and `project` through `apply(..., method=...)`, so that each head runs
    on the slices its loss reads only; `__call__` runs everything (initialisation, export).

    Example, a small one:

      >>> unet = UNet(num_classes=4, filters=(4, 8, 8))
      >>> images = jnp.zeros((2, 32, 32))
      >>> variables = unet.init(jax.random.key(0), images, train=False)
      >>> features = unet.apply(variables, images, train=False, method="trunk")
      >>> unet.apply(variables, features, train=False, method="segment").shape
      (2, 32, 32, 4)

    Attributes:
      num_classes: C, background included.
      filters: per level, top to bottom; H and W must be multiples of 2 ** (len(filters) - 1).
      embedding_dim: E.
      dtype: of the computation; parameters, logits and embeddings are float32 (but float64 leaves
        float64, with which tests tell rounding from faults).
      axis_name: mapped axis over which BatchNorm averages its statistics in training; shards must
        be equal.
    """

    num_classes: int
    filters: Sequence[int] = (16, 32, 64, 128, 128, 128)
    embedding_dim: int = 16
    dtype: Any = jnp.float32
    axis_name: str | None = None

    def setup(self):
        shared = {"dtype": self.dtype, "axis_name": self.axis_name}
        self.unet_trunk = Trunk(self.filters, **shared)
        self.segmentation_head = SegmentationHead(self.num_classes, **shared)
        self.projection_head = ProjectionHead(self.embedding_dim, **shared)

    def trunk(self, images: Array, *, train: bool) -> Array:
        """[B, H, W] float -> features [B, H, W, filters[0]]. Raises ValueError on a bad H or W."""
        multiple = 2 ** (len(self.filters) - 1)
        if images.shape[1] % multiple or images.shape[2] % multiple:
            raise ValueError(
                f"slices of {images.shape[1]} x {images.shape[2]} px do not fit this U-Net: with "
                f"{len(self.filters)} levels both sides must be multiples of {multiple}; "
                "change data.image_size or model.filters"
            )
        return self.unet_trunk(images[..., None].astype(self.dtype), train=train)

    def segment(self, features: Array, *, train: bool) -> Array:
        """Features -> logits [B, H, W, C] float32."""
        return self.segmentation_head(features, train=train)

    def project(self, features: Array, *, train: bool) -> Array:
        """Features -> embeddings [B, H, W, E] float32, not normalised."""
        return self.projection_head(features, train=train)

    def __call__(self, images: Array, *, train: bool) -> tuple[Array, Array]:
        """[B, H, W] -> (logits [B, H, W, C], embeddings [B, H, W, E])."""
        features = self.trunk(images, train=train)
        return self.segment(features, train=train), self.project(features, train=train)
