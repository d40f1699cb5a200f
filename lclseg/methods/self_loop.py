"""Self-Loop uncertainty, in OUR READING: a puzzle trains the encoder, and encoders along the way
give a slice without ground truth its soft label and how far to trust it.

  L = L_seg(labelled) + uncertainty_weight x L_UG + permutation_weight x L_SS

  L_SS  cross-entropy of the permutation of the 3 x 3 tiles of u, predicted from the bottom of the U
  L_UG  mean of exp(-spread_penalty x s) (p(u) - m)^2 over pixels and classes
  m, s  mean and standard deviation (of all classes together) of Q predictions

arXiv:2007.09854 (Li, Chen, Xie, Ma, Zheng). The paper's full text was not at hand, no program of
its authors is known to us: the pretext, the encoders that arise along the way, mean and spread are
the paper's; K, Q, the form of L_UG and what follows are ours. Prediction j = 1 ... Q: each slice is
permuted anew, the encoder of prediction j - 1 (at first the network's own) takes one gradient step
of L_SS, of rate `encoder_learning_rate`, and the network with it predicts the permuted slice, whose
tiles are then put back. These encoders are dropped after the step. m and s have no gradient.

The K permutations are far from each other. Of a side that is no multiple of 3 the last pixels, one
or two, stay in place. Tiles need not be a multiple of the network's stride: slices keep their size.
"""

import functools
import itertools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lclseg.methods.contract import (
    Base,
    Method,
    mean_of,
    segmentation_term,
    teacher_probs,
    unlabeled_sampler,
)
from lclseg.random_keys import named_key, slice_keys
from lclseg.rules import ABOVE_0, NOT_NEGATIVE, whole

Array = jax.Array
TRUNK = "unet_trunk"
RULES = {
    "uncertainty_weight": NOT_NEGATIVE,
    "permutation_weight": NOT_NEGATIVE,
    "num_permutations": whole(2, math.factorial(9)),  # of 9 tiles
    "num_encoders": whole(1),
    "encoder_learning_rate": ABOVE_0,
    "spread_penalty": NOT_NEGATIVE,
}


@functools.cache
def distant_permutations(number: int, num_tiles: int = 9) -> np.ndarray:
    """Chooses permutations, [number, num_tiles] uint8, the same in every run.

    From the identity on, each is the one whose smallest Hamming distance to those before is
    largest; of several the first in alphabetical order.

    Raises:
      ValueError: there are not so many permutations.
    """
    everything = np.array(list(itertools.permutations(range(num_tiles))), np.uint8)
    if not 2 <= number <= len(everything):
        raise ValueError(
            f"method.num_permutations is {number}; wanted 2 to {len(everything)}, all of "
            f"{num_tiles} tiles"
        )
    chosen = [0]
    nearest = np.full(len(everything), num_tiles + 1)
    while len(chosen) < number:
        distance = (everything != everything[chosen[-1]]).sum(axis=1)
        nearest = np.minimum(nearest, distance)
        chosen.append(int(nearest.argmax()))
    return everything[chosen]


def rearrange(slice_: Array, order: Array) -> Array:
    """Puts tile order[i] of [H, W, ...] in place of tile i; tiles are numbered row by row."""
    (height, width), rest = (side // 3 for side in slice_.shape[:2]), slice_.shape[2:]
    tiled = slice_[: 3 * height, : 3 * width]
    tiles = tiled.reshape(3, height, 3, width, *rest).swapaxes(1, 2)
    tiles = tiles.reshape(9, height, width, *rest)[order].reshape(3, 3, height, width, *rest)
    back = tiles.swapaxes(1, 2).reshape(tiled.shape)
    return slice_.at[: 3 * height, : 3 * width].set(back)


class PermutationHead(nn.Module):
    """Logits [B, K] of the permutation, linear in the mean of the bottom features."""

    num_permutations: int
    level: int = -1
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        # One vector a slice, so float32: in bfloat16 the bias' gradient would be a sum in it.
        dtype = jnp.promote_types(self.dtype, jnp.float32)
        x = jnp.mean(x.astype(dtype), axis=(1, 2))
        return nn.Dense(self.num_permutations, dtype=dtype)(x)


def index_loss(logits: Array, index: Array) -> Array:
    """Computes the cross-entropy [n] of logits [n, K] and the permutations' numbers [n]."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), index[:, None], axis=1)[:, 0]


def make(options: Any, base: Base) -> Method:
    """Makes the method; options: see configs/methods/self_loop.py."""
    permutations = jnp.asarray(distant_permutations(options.num_permutations))

    def permuted(key, image: Array, axis_name) -> tuple[Array, Array]:
        """Permutes each slice by one of its own: its number [n], and the slices [n, H, W]."""
        keys = slice_keys(key, len(image), axis_name)
        index = jax.vmap(lambda k: jax.random.randint(k, (), 0, options.num_permutations))(keys)
        return index, jax.vmap(rearrange)(image, permutations[index])

    def predictions(net, params, batch_stats, image: Array, key) -> Array:
        """Predicts by each of the Q encoders, [Q, n, H, W, C]."""
        params = jax.lax.stop_gradient(params)

        def loss(trunk, image, index):
            out, _ = net(
                {**params, TRUNK: trunk}, batch_stats, {"u": image}, {"u": ("permutation",)}
            )
            return jnp.mean(index_loss(out["u"]["permutation"], index))

        def move(weight, gradient):
            return weight - options.encoder_learning_rate * gradient

        trunk, found = params[TRUNK], []
        for number in range(options.num_encoders):
            index, shuffled = permuted(named_key(key, f"encoder {number}"), image, net.axis_name)
            gradient = jax.grad(loss)(trunk, shuffled, index)
            if net.axis_name is not None:
                gradient = jax.lax.pmean(gradient, net.axis_name)
            trunk = jax.tree.map(move, trunk, gradient)
            weights = {**params, TRUNK: trunk}
            probs = teacher_probs(net, weights, batch_stats, {"u": shuffled})["u"]
            found.append(jax.vmap(rearrange)(probs, jnp.argsort(permutations[index], axis=-1)))
        return jnp.stack(found)

    def terms(net, params, state, batch, key):
        image = batch["unlabeled"].image
        index, shuffled = permuted(named_key(key, "puzzle"), image, net.axis_name)
        images = {"labeled": batch["labeled"].image, "unlabeled": image, "shuffled": shuffled}
        heads = {name: ("segmentation",) for name in images} | {"shuffled": ("permutation",)}
        out, batch_stats = net(params, state.batch_stats, images, heads)

        each = predictions(net, params, state.batch_stats, image, key)
        mean = jnp.mean(each, axis=0)
        spread = jnp.sqrt(jnp.mean(jnp.sum((each - mean[None]) ** 2, axis=-1), axis=0))
        trust = jnp.exp(-options.spread_penalty * spread)
        squared = jnp.mean((jax.nn.softmax(out["unlabeled"]["segmentation"]) - mean) ** 2, axis=-1)
        puzzle = index_loss(out["shuffled"]["permutation"], index)
        return {
            "segmentation_loss": segmentation_term(
                base, out["labeled"]["segmentation"], batch["labeled"].label, net.axis_name
            ),
            "uncertainty_guided_loss": mean_of(
                trust * squared, jnp.ones(squared.shape, bool), options.uncertainty_weight
            ),
            "permutation_loss": mean_of(
                puzzle, jnp.ones(puzzle.shape, bool), options.permutation_weight
            ),
        }, batch_stats

    return Method(
        terms=terms,
        views={
            "labeled": ("labeled", base.labeled_view),
            "unlabeled": ("unlabeled", base.move),
        },
        sampler=unlabeled_sampler(base),
        heads={"permutation": functools.partial(PermutationHead, options.num_permutations)},
    )
