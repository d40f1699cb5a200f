"""The U-Net of arXiv:2112.09645 with its segmentation and projection heads (METHOD: network).

Letters: B slices, H W pixels, C classes (background 0), E embedding, F filters.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lclseg.convolution import conv
from lclseg.random_keys import slice_keys

Array = jax.Array


def max_pool(x: Array) -> Array:
    """Pools the maximum of 2 x 2 blocks, [B, H, W, F] -> [B, H/2, W/2, F].

    Pairwise maxima instead of `nn.max_pool`: the gradient is a choice between two, no
    select-and-scatter; and no `max` over an axis, whose gradient divides by the number of entries
    equal to the maximum, which is 0 where the compiler computes an entry twice with other rounding.
    """
    b, h, w, f = x.shape
    x = x.reshape(b, h // 2, 2, w // 2, 2, f)
    x = jnp.maximum(x[:, :, 0], x[:, :, 1])
    return jnp.maximum(x[:, :, :, 0], x[:, :, :, 1])


def upsample_conv(x: Array, kernel: Array) -> Array:
    """Upsamples x 2 (nearest), then convolves 2 x 2, "SAME", at a quarter of the price.

    Args:
      x: [B, H, W, F].
      kernel: [2, 2, F, G].

    Returns:
      [B, 2H, 2W, G].

    All four pixels of an upsampled block are equal, so each kernel tap is multiplied once per
    *low*-resolution pixel, as one matrix product: out[2i + p, 2j + q] is the sum over taps (u, v)
    of w[u, v] x[i + p u, j + q v], with x = 0 beyond the end.
    """
    b, h, w, f = x.shape
    g = kernel.shape[-1]
    taps = x.reshape(-1, f) @ kernel.transpose(2, 0, 1, 3).reshape(f, 4 * g)
    taps = taps.reshape(b, h, w, 2, 2, g)

    def ahead(tap: Array, rows: int, columns: int) -> Array:
        return jnp.pad(tap, ((0, 0), (0, rows), (0, columns), (0, 0)))[:, rows:, columns:]

    def pixel(p: int, q: int) -> Array:
        parts = [ahead(taps[:, :, :, u, v], p * u, q * v) for u in (0, 1) for v in (0, 1)]
        return parts[0] + parts[1] + parts[2] + parts[3]

    rows = [jnp.stack([pixel(p, 0), pixel(p, 1)], axis=3) for p in (0, 1)]
    return jnp.stack(rows, axis=2).reshape(b, 2 * h, 2 * w, g)


BATCH_NORM_MOMENTUM = 0.99  # of the running statistics
BATCH_NORM_EPSILON = 1e-3  # added to the variance


class UpsampleConv(nn.Module):
    """Nearest upsampling x 2 and a 2 x 2 convolution without bias."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (2, 2, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        return upsample_conv(x.astype(self.dtype), kernel.astype(self.dtype))


class Conv(nn.Module):
    """Convolution with "SAME" padding, without bias."""

    features: int
    kernel_size: int = 3
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        return conv(x.astype(self.dtype), kernel.astype(self.dtype))


class BatchNorm(nn.Module):
    """Batch normalisation, [B, H, W, F] -> the same, as `nn.BatchNorm` has it, in one multiply-add.

    Flax subtracts the mean first and keeps the difference for the gradient, one more array of the
    size of x to write and read. Statistics and arithmetic are float32 at least.

    Attributes:
      axis_name: mapped axis over which the statistics are averaged in training.
      dtype: of the result.
    """

    axis_name: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        features = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, features)
        bias = self.param("bias", nn.initializers.zeros, features)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, features)
        running_var = self.variable("batch_stats", "var", jnp.ones, features)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if train and not self.is_initializing():
            moments = jnp.stack([jnp.mean(x, (0, 1, 2)), jnp.mean(jnp.square(x), (0, 1, 2))])
            if self.axis_name is not None:
                moments = jax.lax.pmean(moments, self.axis_name)
            mean = moments[0]
            var = jnp.maximum(moments[1] - jnp.square(mean), 0)
            keep = BATCH_NORM_MOMENTUM
            running_mean.value = keep * running_mean.value + (1 - keep) * mean
            running_var.value = keep * running_var.value + (1 - keep) * var
        else:
            mean, var = running_mean.value, running_var.value
        slope = scale * jax.lax.rsqrt(var + BATCH_NORM_EPSILON)
        offset = bias - mean * slope
        slope, offset = (v.reshape(1, 1, 1, -1) for v in (slope, offset))
        return (x * slope + offset).astype(self.dtype)


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
            x = Conv(self.features, self.kernel_size, dtype=self.dtype)(x)
        return nn.relu(BatchNorm(self.axis_name, dtype=self.dtype)(x, train=train))


class Trunk(nn.Module):
    """Encoder and decoder: [B, H, W, 1] -> features of every decoder level, finest first.

    Level l has [B, H / 2**l, W / 2**l, filters[l]]; the last one is the bottom of the U.
    """

    filters: Sequence[int]
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self, x: Array, *, train: bool, keep: Sequence[Array] | None = None
    ) -> tuple[Array, ...]:
        """Runs both; `keep` [B, 1, 1, filters[l]] for each level l scales the encoder's features.

        That is UniMatch's feature dropout, arXiv:2208.09910: 0 drops a channel, 2 keeps it.
        """

        def block(features: int, x: Array, **kwargs) -> Array:
            layer = ConvBlock(features, dtype=self.dtype, axis_name=self.axis_name, **kwargs)
            return layer(x, train=train)

        encoded: list[Array] = []
        for level, features in enumerate(self.filters):
            if level > 0:
                x = max_pool(x)
            x = block(features, x)
            x = block(features, x)
            encoded.append(x)
        if keep is not None:
            encoded = [e * k.astype(e.dtype) for e, k in zip(encoded, keep, strict=True)]
        x = encoded[-1]
        levels = [x]
        for level in reversed(range(len(self.filters) - 1)):
            features = self.filters[level]
            x = block(features, x, upsample=True)
            x = jnp.concatenate([encoded[level], x], axis=-1)
            x = block(features, x)
            if level > 0:
                x = block(features, x)
            levels.insert(0, x)
        return tuple(levels)


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
        logits = Conv(self.num_classes, dtype=self.dtype)(x)
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
    """2-D U-Net with a segmentation head; about 2.1 M parameters with the default filters.

    Call `trunk` and `head` through `apply(..., method=...)`, so that each head runs only on the
    slices that its loss reads; `__call__` runs everything (initialisation).

    Example, a small one:

      >>> unet = UNet(num_classes=4, filters=(4, 8, 8))
      >>> images = jnp.zeros((2, 32, 32))
      >>> variables = unet.init(jax.random.key(0), images, train=False)
      >>> levels = unet.apply(variables, images, train=False, method="trunk")
      >>> unet.apply(variables, levels, "segmentation", train=False, method="head").shape
      (2, 32, 32, 4)

    Attributes:
      num_classes: C, background included.
      filters: per level, top to bottom; H and W must be multiples of 2 ** (len(filters) - 1).
      heads: modules beside the segmentation head by name, made by (dtype=, axis_name=) and called
        with the features of a level, `module.level` (default 0, the finest), and `train`.
      dtype: of the computation; parameters and the heads' outputs are float32 (but float64 leaves
        float64, with which tests tell rounding from faults).
      axis_name: mapped axis over which BatchNorm averages its statistics in training; shards must
        be equal.
    """

    num_classes: int
    filters: Sequence[int] = (16, 32, 64, 128, 128, 128)
    heads: Mapping[str, Callable[..., nn.Module]] = dataclasses.field(default_factory=dict)
    dtype: Any = jnp.float32
    axis_name: str | None = None

    def setup(self):
        shared = {"dtype": self.dtype, "axis_name": self.axis_name}
        self.unet_trunk = Trunk(self.filters, **shared)
        self.segmentation_head = SegmentationHead(self.num_classes, **shared)
        for name, make in self.heads.items():
            setattr(self, f"{name}_head", make(**shared))

    def trunk(
        self, images: Array, *, train: bool, keep: Sequence[Array] | None = None
    ) -> tuple[Array, ...]:
        """Maps [B, H, W] or [B, H, W, K] to features of each level; ValueError on a bad H or W."""
        multiple = 2 ** (len(self.filters) - 1)
        if images.shape[1] % multiple or images.shape[2] % multiple:
            raise ValueError(
                f"slices of {images.shape[1]} x {images.shape[2]} px do not fit this U-Net: with "
                f"{len(self.filters)} levels both sides must be multiples of {multiple}; "
                "change data.image_size or model.filters"
            )
        if images.ndim == 3:
            images = images[..., None]
        return self.unet_trunk(images.astype(self.dtype), train=train, keep=keep)

    def head(self, levels: Sequence[Array], name: str, *, train: bool) -> Array:
        """Applies a head, "segmentation" or one of `heads`: logits [B, H, W, C] float32."""
        module = getattr(self, f"{name}_head")
        level = getattr(module, "level", 0)
        if level >= len(levels):
            raise ValueError(
                f"model.filters has {len(levels)} levels; the {name} head reads level {level}, "
                f"counted from 0: wanted {level + 1} filters at least"
            )
        return module(levels[level], train=train)

    def __call__(self, images: Array, *, train: bool) -> dict[str, Array]:
        """[B, H, W] -> the output of every head by name."""
        levels = self.trunk(images, train=train)
        return {
            name: self.head(levels, name, train=train) for name in ("segmentation", *self.heads)
        }


class Net(NamedTuple):
    """One pass of the U-Net over named groups of slices, for the terms of a method.

    Attributes:
      model: the U-Net.
    """

    model: UNet

    @property
    def axis_name(self) -> str | None:
        """The mapped device axis, None on a single device."""
        return self.model.axis_name

    def __call__(
        self,
        params: Any,
        batch_stats: Any,
        images: Mapping[str, Array],
        heads: Mapping[str, Sequence[str]],
        *,
        dropout: Mapping[str, Array] | None = None,
    ) -> tuple[dict[str, dict[str, Array]], Any]:
        """Runs all groups in one pass, so that BatchNorm sees them together.

        Args:
          params, batch_stats: of the model.
          images: [n, H, W] by group.
          heads: names of the heads to run on each group.
          dropout: random keys by group: half of the encoder's channels of its slices are dropped.

        Returns:
          Outputs by group and head, and BatchNorm's statistics after this batch; those of a head
          that did not run are the given ones.
        """
        groups = list(images)
        sizes = [len(images[g]) for g in groups]
        starts = dict(zip(groups, np.cumsum([0, *sizes[:-1]]).tolist(), strict=True))
        names = {name: [g for g in groups if name in heads[g]] for g in groups for name in heads[g]}
        keep = None
        if dropout:
            parts = [self._keep(dropout.get(g), n) for g, n in zip(groups, sizes, strict=True)]
            keep = [jnp.concatenate(level) for level in zip(*parts, strict=True)]

        def run(module, x):
            levels = module.trunk(x, train=True, keep=keep)
            outputs = {}
            for name, own in names.items():
                rows = _rows(levels, [(starts[g], len(images[g])) for g in own])
                outputs[name] = module.head(rows, name, train=True)
            return outputs

        variables = {"params": params, "batch_stats": batch_stats}
        apply = nn.apply(run, self.model, mutable=["batch_stats"])
        x = jnp.concatenate([images[g] for g in groups])
        outputs, updates = apply(variables, x)
        found: dict[str, dict[str, Array]] = {g: {} for g in groups}
        for name, own in names.items():
            ends = np.cumsum([len(images[g]) for g in own])[:-1].tolist()
            for g, part in zip(own, jnp.split(outputs[name], ends), strict=True):
                found[g][name] = part
        ran = ("unet_trunk", *(f"{name}_head" for name in names))
        return found, {
            k: updates["batch_stats"][k] if k in ran else v for k, v in batch_stats.items()
        }

    def _keep(self, key: Array | None, num_slices: int) -> list[Array]:
        """For each level [n, 1, 1, F]: 0 or 2, each with a chance of a half; 1 without a key."""
        filters = self.model.filters
        if key is None:
            return [jnp.ones((num_slices, 1, 1, f)) for f in filters]
        keys = slice_keys(key, num_slices, self.axis_name)
        draws = jax.vmap(lambda k: jax.random.bernoulli(k, 0.5, (sum(filters),)))(keys)
        parts = jnp.split(2.0 * draws, np.cumsum(filters)[:-1].tolist(), axis=1)
        return [part[:, None, None] for part in parts]


def _rows(levels: Sequence[Array], spans: Sequence[tuple[int, int]]) -> tuple[Array, ...]:
    """The rows of some groups, (first, number) each, of every level."""
    merged: list[tuple[int, int]] = []
    for start, size in spans:
        if merged and sum(merged[-1]) == start:
            merged[-1] = (merged[-1][0], merged[-1][1] + size)
        else:
            merged.append((start, size))
    if merged == [(0, len(levels[0]))]:
        return tuple(levels)
    cut = [[x[a : a + n] for a, n in merged] for x in levels]
    return tuple(parts[0] if len(parts) == 1 else jnp.concatenate(parts) for parts in cut)
