"""What a semi-supervised method is: the contract between one file of `methods/` and training.

A method adds to supervised training which slices make up a batch, how they are augmented, and what
is minimised. Everything else (optimiser, averaged weights, validation, files) is the same for all.
Letters: n slices of a group, H W pixels, C classes, R stored slices.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lclseg import losses
from lclseg.data.batches import Pool
from lclseg.losses import IGNORE

Array = jax.Array


class Slices(NamedTuple):
    """Slices of one group of a batch, on the device.

    Attributes:
      image: [n, H, W] float32.
      label: [n, H, W] uint8: ground truth, pseudo-label, or `IGNORE` where the pixel has neither.
      is_labeled: [n] bool: whether the label is ground truth.
    """

    image: Array
    label: Array
    is_labeled: Array


class Term(NamedTuple):
    """One term of the loss: weight x (total over all devices) / (number over all devices).

    Attributes:
      total: sum of losses, scalar of this device.
      number: of losses in it, scalar of this device; where it is 0 on all, the term is 0.
      weight: number, or scalar of the step (ramp-up); the same on all devices.
    """

    total: Array
    number: Array
    weight: Array | float = 1.0


# Maps a random key and one slice's image [H, W] and label [H, W] to both, augmented.
Augment = Callable[[Array, Array, Array], tuple[Array, Array]]
# Maps a NumPy generator to the record numbers [n] of each group.
Draw = Callable[[np.random.Generator], dict[str, np.ndarray]]


class Base(NamedTuple):
    """What all methods build on, made from the config once.

    Attributes:
      num_classes: C, background included.
      segmentation: (logits [n, H, W, C], label [n, H, W], axis_name) -> losses [n] of the config's
        supervised loss; pixels of `IGNORE` do not count.
      labeled_view: the augmentation of labelled slices, in the config's strength.
      move: its geometry alone: the weak view of an unlabelled slice.
      change: its intensity alone: what makes a weak view a strong one.
      unlabeled_batch_size: slices without ground truth in a global batch.
      embedding_dim: E of the projection head.
    """

    num_classes: int
    segmentation: Callable[[Array, Array, str | None], Array]
    labeled_view: Augment
    move: Augment
    change: Augment
    unlabeled_batch_size: int
    embedding_dim: int


class Method(NamedTuple):
    """What a semi-supervised method adds to supervised training. Every field is pure.

    Attributes:
      terms: (net, params, state, batch, key) -> (terms by name, BatchNorm's statistics), on one
        device. `batch` has `Slices` by view; the statistics are those of one pass of `net`.
      views: the views of a step by name, made in this order: (group or earlier view, how each
        slice is augmented). A view may take its group's name.
      sampler: (labelled pool, unlabelled pool) -> `Draw` of the groups beside "labeled", which
        training draws itself, the same for all methods. Called again when pseudo-labels change.
      heads: modules beside the segmentation head, by name; see `models.Network`.
      networks: independently initialised copies, a leading axis of all parameters; several need a
        `pretraining` of their own.
      offline: trains in rounds with stored pseudo-labels; else one stage of as many steps.
      pretraining: (terms, views) of the first stage, where it is not supervised training.
      init_memory: params -> what the method keeps between steps, a pytree.
      remember: (memory, new params, step) -> memory.
    """

    terms: Callable[..., tuple[dict[str, Term], Any]]
    views: Mapping[str, tuple[str, Augment]]
    sampler: Callable[[Pool, Pool], Draw] | None = None
    heads: Mapping[str, Callable[..., nn.Module]] = {}
    networks: int = 1
    offline: bool = False
    pretraining: tuple[Callable, Mapping[str, tuple[str, Augment]]] | None = None
    init_memory: Callable[[Any], Any] = lambda params: ()
    remember: Callable[[Any, Any, Array], Any] = lambda memory, params, step: memory


def mean_of(values: Array, is_counted: Array, weight: Array | float = 1.0) -> Term:
    """Makes the term that is the mean of the losses counted, of slices [n] or pixels [n, H, W].

    Args:
      values: the losses.
      is_counted: bool of the same shape.
      weight: of the term.
    """
    return Term(jnp.sum(jnp.where(is_counted, values, 0)), jnp.sum(is_counted), weight)


def segmentation_term(
    base: Base, logits: Array, label: Array, axis_name: str | None, weight: Array | float = 1.0
) -> Term:
    """Makes the config's loss on all pixels with a label; slices without one do not count."""
    counted = jnp.any(label != IGNORE, axis=(1, 2))
    return mean_of(base.segmentation(logits, label, axis_name), counted, weight)


def batch_dice_term(
    logits: Array, label: Array, axis_name: str | None, weight: Array | float = 1.0
) -> Term:
    """Makes the soft Dice loss of all devices' slices as one image; `IGNORE` does not count.

    Args:
      logits: [n, H, W, C].
      label: [n, H, W].
      axis_name: the mapped device axis.
      weight: of the term.
    """
    loss = losses.batch_dice_loss(logits, label, axis_name=axis_name)
    # Each slice counts the batch's loss, so that the devices' shares add up to it.
    return Term(len(label) * loss, jnp.asarray(len(label)), weight)


def draw_from(records: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
    """Draws record numbers [size]; without replacement where there are enough slices."""
    return rng.choice(records, size, replace=len(records) < size)


def unlabeled_sampler(base: Base) -> Callable[[Pool, Pool], Draw]:
    """Makes the sampler of one group, "unlabeled": slices of the pool, whatever they show."""

    def sampler(labeled: Pool, unlabeled: Pool) -> Draw:
        return lambda rng: {
            "unlabeled": draw_from(unlabeled.records, rng, base.unlabeled_batch_size)
        }

    return sampler


def ramp_up(progress: Array) -> Array:
    """Computes exp(-5 (1 - t)^2), t in [0, 1] the part of the stage done (arXiv:1610.02242)."""
    return jnp.exp(-5 * (1 - progress) ** 2)


def confident_label(probs: Array, threshold: float) -> Array:
    """Chooses the most probable class of [n, H, W, C], `IGNORE` below the threshold; uint8."""
    label = jnp.argmax(probs, axis=-1).astype(jnp.uint8)
    return jnp.where(jnp.max(probs, axis=-1) >= threshold, label, IGNORE)


def segment(
    net, params: Any, batch_stats: Any, images: Mapping[str, Array], **kwargs
) -> tuple[dict[str, Array], Any]:
    """Computes logits [n, H, W, C] by group in one pass, and BatchNorm's statistics after it."""
    heads = {group: ("segmentation",) for group in images}
    out, batch_stats = net(params, batch_stats, images, heads, **kwargs)
    return {group: found["segmentation"] for group, found in out.items()}, batch_stats


def teacher_probs(
    net, params: Any, batch_stats: Any, images: Mapping[str, Array]
) -> dict[str, Array]:
    """Predicts class probabilities [n, H, W, C] by group, by other weights than those trained.

    BatchNorm normalises by these slices, as in training; no gradient flows, and the statistics of
    this pass are not kept.
    """
    logits, _ = segment(net, jax.lax.stop_gradient(params), batch_stats, images)
    return {group: jax.nn.softmax(found) for group, found in logits.items()}
