"""Rectified contrastive pseudo supervision (RCPS): two views agree with the clean slice, the less
the more they differ from it, and their embeddings with each other.

  L = L_seg(labelled) + r [c (rectified + agreement) + contrastive_weight x contrast]

  rectified  mean exp(-KL) CE(P, p_v) + mean KL;  P = softmax(z / sharpening), Q = softmax(z) of the
             clean slice, both without gradient; KL = sum_k Q_k log(Q_k / p_vk) keeps its own
  agreement  mean 1 - cosine(p_1, p_2), over classes
  contrast   InfoNCE: a cell of view 1 against the same cell of view 2, and the K most confident
             cells of the other stream's clean slices whose predicted class differs; and with the
             views exchanged. Streams are the labelled and the unlabelled slices.

arXiv:2301.05500. Views v = 1, 2 differ from the clean slice in intensity only: a I + b mean(I),
then for half of them noise. Clean slices and views go through the network in one pass. Cells have a
quarter of the resolution, and the class that is most probable in their mean.

Settings that matter: contrastive_weight 0.1, c 0.1 to 0.2, K 100 to 400. Our reading: means run
over views and streams; the gradient flows into negatives too; what is clean of a labelled slice is
its augmented view, of an unlabelled one its moved view. Left out: deep supervision.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lclseg.losses import EXACT, LENGTH_EPSILON
from lclseg.methods.contract import (
    Base,
    Method,
    mean_of,
    ramp_up,
    segmentation_term,
    unlabeled_sampler,
)
from lclseg.rules import ABOVE_0, FACTORS, NOT_NEGATIVE, whole

Array = jax.Array
STREAMS = ("labeled", "unlabeled")
RULES = {
    "consistency_weight": NOT_NEGATIVE,
    "contrastive_weight": NOT_NEGATIVE,
    "temperature": ABOVE_0,
    "num_negatives": whole(1),
    "sharpening": ABOVE_0,
    "embedding_dim": whole(1),
    "contrast_range": FACTORS,
    "max_brightness": NOT_NEGATIVE,
    "max_noise": NOT_NEGATIVE,
}
MASKED = -1e9  # a similarity; finite, so that no gradient becomes NaN


class EmbeddingHead(nn.Module):
    """1 x 1 convolution, PReLU, 1 x 1 convolution; at a quarter of the resolution."""

    features: int
    level: int = 2
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        # Few pixels, so float32: in bfloat16 the gradients of biases and slope would be sums in it.
        dtype = jnp.promote_types(self.dtype, jnp.float32)
        x = nn.Dense(self.features, dtype=dtype)(x)
        # The slope starts at PReLU's 0.25; a parameter "scale" starts at 1.
        slope = 0.25 * self.param("scale", nn.initializers.ones, (1,))
        x = jnp.where(x >= 0, x, slope.reshape(1, 1, 1, 1) * x)
        return nn.Dense(self.features, dtype=dtype)(x)


def rectified_loss(clean: Array, view: Array, *, sharpening: float) -> Array:
    """Computes the rectified loss of logits [..., C] by those of the clean slice: [...]."""
    clean = jax.lax.stop_gradient(clean)
    log_view = jax.nn.log_softmax(view)
    divergence = jnp.sum(jax.nn.softmax(clean) * (jax.nn.log_softmax(clean) - log_view), axis=-1)
    cross_entropy = -jnp.sum(jax.nn.softmax(clean / sharpening) * log_view, axis=-1)
    return jnp.exp(-divergence) * cross_entropy + divergence


def agreement_loss(first: Array, second: Array) -> Array:
    """Computes 1 - cosine of the probabilities of two logits [..., C]: [...]."""
    return 1 - jnp.sum(unit(jax.nn.softmax(first)) * unit(jax.nn.softmax(second)), axis=-1)


def unit(vectors: Array) -> Array:
    """Scales vectors to length 1 along the last axis; a zero vector stays zero."""
    squares = jnp.sum(vectors**2, axis=-1, keepdims=True)
    return vectors * jax.lax.rsqrt(squares + LENGTH_EPSILON)


def cell_probs(logits: Array, cells: tuple[int, int]) -> Array:
    """Averages probabilities in the cells of logits [n, H, W, C]: [n, h, w, C]; no gradient."""
    n, height, width, classes = logits.shape
    rows, columns = cells
    probs = jax.nn.softmax(jax.lax.stop_gradient(logits))
    blocks = probs.reshape(n, rows, height // rows, columns, width // columns, classes)
    return jnp.mean(blocks, axis=(2, 4))


def most_confident(
    embeddings: Array, probs: Array, *, number: int, axis_name: str | None
) -> tuple[Array, Array]:
    """Takes for each class c its anchors' negatives: cells of others, most confident first.

    Args:
      embeddings: [n, h, w, E] of length 1.
      probs: [n, h, w, C] of the cells.
      number: K; fewer where there are fewer cells.
      axis_name: the mapped device axis; negatives are those of the global batch.

    Returns:
      [C, K, E], and [C, K] bool: whether it is a negative at all.
    """
    num_classes = probs.shape[-1]
    cells = (
        embeddings.reshape(-1, embeddings.shape[-1]),
        jnp.argmax(probs, axis=-1).ravel(),
        jnp.max(probs, axis=-1).ravel(),
    )
    if axis_name is not None:
        cells = jax.lax.all_gather(cells, axis_name, tiled=True)
    vectors, predicted, confidence = cells

    def of_class(c):
        candidates = jnp.where(predicted != c, confidence, 0)
        found, places = jax.lax.top_k(candidates, min(number, len(candidates)))
        return vectors[places], found > 0

    return jax.vmap(of_class)(jnp.arange(num_classes))


def contrastive_loss(
    anchor: Array,
    positive: Array,
    onehot: Array,
    negatives: Array,
    is_negative: Array,
    *,
    temperature: float,
) -> Array:
    """Computes InfoNCE of each cell, [n, h, w].

    Args:
      anchor, positive: [n, h, w, E] of length 1.
      onehot: [n, h, w, C], the predicted class of the anchor.
      negatives, is_negative: see `most_confident`.
      temperature: scales the cosines.
    """
    similarity = jnp.einsum("nhwe,cke->nhwck", anchor, negatives, precision=EXACT) / temperature
    similarity = jnp.where(is_negative[None, None, None], similarity, MASKED)
    against = jnp.sum(onehot * jax.nn.logsumexp(similarity, axis=-1), axis=-1)
    own = jnp.sum(anchor * positive, axis=-1) / temperature
    return jnp.logaddexp(own, against) - own


def make(options: Any, base: Base) -> Method:
    """Makes the method; options: see configs/methods/rcps.py."""

    def view(key, image, label):
        number_key, apply_key, noise_key = jax.random.split(key, 3)
        low = jnp.array([options.contrast_range[0], -options.max_brightness, 0.0])
        high = jnp.array([options.contrast_range[1], options.max_brightness, options.max_noise])
        contrast, brightness, sigma = jax.random.uniform(number_key, (3,), minval=low, maxval=high)
        sigma = jnp.where(jax.random.bernoulli(apply_key), sigma, 0)
        noise = sigma * jax.random.normal(noise_key, image.shape)
        changed = contrast * image + brightness * jnp.mean(image) + noise
        return changed.astype(image.dtype), label

    def terms(net, params, state, batch, key):
        names = [f"{s}{v}" for s in STREAMS for v in ("", "_1", "_2")]
        images = {name: batch[name].image for name in names}
        heads = {name: ("segmentation", "embedding") for name in names}
        out, batch_stats = net(params, state.batch_stats, images, heads)
        logits = {name: out[name]["segmentation"] for name in names}
        embeddings = {name: unit(out[name]["embedding"]) for name in names}
        cells = embeddings["labeled"].shape[1:3]
        probs = {s: cell_probs(logits[s], cells) for s in STREAMS}

        rectified, agreement, contrast = [], [], []
        for stream, other in (STREAMS, STREAMS[::-1]):
            first, second = f"{stream}_1", f"{stream}_2"
            rectified += [
                rectified_loss(logits[stream], logits[v], sharpening=options.sharpening)
                for v in (first, second)
            ]
            agreement.append(agreement_loss(logits[first], logits[second]))
            negatives, is_negative = most_confident(
                embeddings[other],
                probs[other],
                number=options.num_negatives,
                axis_name=net.axis_name,
            )
            predicted = jnp.argmax(probs[stream], axis=-1)
            onehot = jax.nn.one_hot(predicted, base.num_classes, dtype=negatives.dtype)
            contrast += [
                contrastive_loss(
                    embeddings[anchor],
                    embeddings[positive],
                    onehot,
                    negatives,
                    is_negative,
                    temperature=options.temperature,
                )
                for anchor, positive in ((first, second), (second, first))
            ]

        def mean(parts, weight):
            values = jnp.concatenate(parts)
            return mean_of(values, jnp.ones(values.shape, bool), ramp_up(state.progress) * weight)

        return {
            "segmentation_loss": segmentation_term(
                base, logits["labeled"], batch["labeled"].label, net.axis_name
            ),
            "rectified_loss": mean(rectified, options.consistency_weight),
            "agreement_loss": mean(agreement, options.consistency_weight),
            "contrastive_loss": mean(contrast, options.contrastive_weight),
        }, batch_stats

    clean = {"labeled": ("labeled", base.labeled_view), "unlabeled": ("unlabeled", base.move)}
    return Method(
        terms=terms,
        views=clean | {f"{s}_{v}": (s, view) for s in STREAMS for v in (1, 2)},
        sampler=unlabeled_sampler(base),
        heads={"embedding": functools.partial(EmbeddingHead, options.embedding_dim)},
    )
