"""Self-training: the segmentation loss on stored pseudo-labels, made anew from time to time.

L = L_seg(labelled) + weight x L_seg(pseudo-labelled)

Labelled slices are not counted in the second term. Pseudo-labelled slices are augmented as labelled
ones are, their masks with them. The pool's labels are predicted before each round, and within one
every `rounds.refresh_every` steps.

With `copy_paste`, slices are mixed before they go through the network, as bidirectional copy-paste
does it (BCP, arXiv:2305.00673). Slice x is labelled, u pseudo-labelled, and M [H, W] is 1 but for a
box of 2/3 of each side at a random place:

  x M + u (1 - M)  and  u M + x (1 - M),  labels mixed alike

The first term then counts the pixels of x, the second those of u.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lclseg.losses import IGNORE
from lclseg.methods.contract import Base, Method, Slices, draw_from, segmentation_term
from lclseg.mixing import copy_paste_mask, mix, partners
from lclseg.random_keys import slice_keys
from lclseg.rules import NOT_NEGATIVE, YES_NO

Array = jax.Array


RULES = {"weight": NOT_NEGATIVE, "copy_paste": YES_NO}


def copy_paste(
    key: Array, first: Slices, second: Slices, axis_name: str | None
) -> tuple[Array, Array, Array]:
    """Makes both mixtures of each pair of slices; n pairs, 2 n mixtures.

    Args:
      key: of the boxes.
      first, second: n slices of one, n or fewer of the other; see `mixing.partners`.
      axis_name: the mapped device axis.

    Returns:
      image and label [2 n, H, W], and is_first [2 n, H, W] bool: where `first` shows.
    """
    x, u = partners(len(first.image), len(second.image))
    keys = slice_keys(key, len(x), axis_name)
    _, height, width = first.label.shape
    mask = jax.vmap(lambda k: copy_paste_mask(k, (height, width)))(keys)
    is_first = jnp.concatenate([mask, ~mask])

    def mixed(a: Array, b: Array) -> Array:
        return mix(is_first, jnp.concatenate([a[x], a[x]]), jnp.concatenate([b[u], b[u]]))

    return mixed(first.image, second.image), mixed(first.label, second.label), is_first


def make(options: Any, base: Base) -> Method:
    """Makes the method; options: see configs/methods/self_training.py."""

    def sampler(labeled, unlabeled):
        return lambda rng: {
            "unlabeled": draw_from(unlabeled.records, rng, base.unlabeled_batch_size)
        }

    def terms(net, params, state, batch, key):
        images = {name: batch[name].image for name in ("labeled", "unlabeled")}
        labels = {name: batch[name].label for name in images}
        if options.copy_paste:
            image, label, is_labeled = copy_paste(
                key, batch["labeled"], batch["unlabeled"], net.axis_name
            )
            images = {"mixed": image}
            labels = {
                "labeled": jnp.where(is_labeled, label, IGNORE),
                "unlabeled": jnp.where(is_labeled, IGNORE, label),
            }
        heads = {name: ("segmentation",) for name in images}
        out, batch_stats = net(params, state.batch_stats, images, heads)

        def term(name, weight):
            logits = out["mixed" if options.copy_paste else name]["segmentation"]
            return segmentation_term(base, logits, labels[name], net.axis_name, weight)

        return {
            "segmentation_loss": term("labeled", 1.0),
            "pseudo_label_loss": term("unlabeled", options.weight),
        }, batch_stats

    views = {name: (name, base.labeled_view) for name in ("labeled", "unlabeled")}
    return Method(terms=terms, views=views, sampler=sampler, offline=True)
