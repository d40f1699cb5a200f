"""Bidirectional copy-paste: labelled slices pasted into unlabelled ones, and the other way round.

  z1 = M x1 + (1 - M) u1        z2 = M u2 + (1 - M) x2
  L = L_seg(pixels of x1, x2; ground truth) + unlabeled_weight x L_seg(pixels of u1, u2; q)

arXiv:2305.00673. M is 1 but for a box of 2/3 of each side, at a random place of its own for each
mixed slice. q is the label that the averaged weights give the weak view of u: the most probable
class, of each class the largest component. What is mixed are strong views, geometry as in the weak
one. Labelled slices at even places of the batch are x1, at odd ones x2; with more slices of one
kind than of the other each of the latter is mixed several times.

First stage (`pretraining`): M x + (1 - M) x', x' the next labelled slice of the batch.

Settings that matter: unlabeled_weight 0.5, optimizer.ema_decay 0.99. The paper's L_seg is (Dice +
cross-entropy) / 2, here that of the config; and it adds the means of the two directions, where ours
is one mean over both: half of it, which Adam does not notice.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lclseg.components_2d import largest_component_2d
from lclseg.losses import IGNORE
from lclseg.methods.contract import (
    Base,
    Method,
    segment,
    segmentation_term,
    teacher_probs,
    unlabeled_sampler,
)
from lclseg.mixing import copy_paste_mask, mix, next_slices, partners
from lclseg.random_keys import first_place, named_key, slice_keys
from lclseg.rules import AVERAGED, NOT_NEGATIVE, SHARE_BELOW_1, YES_NO

Array = jax.Array
RULES = {
    "unlabeled_weight": NOT_NEGATIVE,
    "box_share": SHARE_BELOW_1,
    "largest_component": YES_NO,
    "pretraining": YES_NO,
}
CONFIG_RULES = {"optimizer.ema_decay": AVERAGED}


def make(options: Any, base: Base) -> Method:
    """Makes the method; options: see configs/methods/bcp.py."""

    def boxes(key: Array, number: int, shape: tuple[int, int], axis_name: str | None) -> Array:
        keys = slice_keys(named_key(key, "boxes"), number, axis_name)
        return jax.vmap(lambda k: copy_paste_mask(k, shape, share=options.box_share))(keys)

    def pseudo_label(net, state, image: Array) -> Array:
        probs = teacher_probs(net, state.ema_params, state.batch_stats, {"weak": image})["weak"]
        label = jnp.argmax(probs, axis=-1).astype(jnp.uint8)
        if options.largest_component:
            cleaned = functools.partial(largest_component_2d, num_classes=base.num_classes)
            label = jax.vmap(cleaned)(label)
        return label

    def terms(net, params, state, batch, key):
        labeled, unlabeled = batch["labeled"], batch["strong"]
        x, u = partners(len(labeled.image), len(unlabeled.image))
        number = len(x)
        from_x = boxes(key, number, labeled.label.shape[1:], net.axis_name)
        is_first = (first_place(number, net.axis_name) + jnp.arange(number)) % 2 == 0
        from_x = jnp.where(is_first[:, None, None], from_x, ~from_x)
        image = mix(from_x, labeled.image[x], unlabeled.image[u])
        logits, batch_stats = segment(net, params, state.batch_stats, {"mixed": image})
        truth = mix(from_x, labeled.label[x], jnp.uint8(IGNORE))
        pseudo = pseudo_label(net, state, batch["unlabeled"].image)
        pseudo = mix(from_x, jnp.uint8(IGNORE), pseudo[u])
        weight = options.unlabeled_weight
        return {
            "segmentation_loss": segmentation_term(base, logits["mixed"], truth, net.axis_name),
            "pseudo_label_loss": segmentation_term(
                base, logits["mixed"], pseudo, net.axis_name, weight
            ),
        }, batch_stats

    def pretraining_terms(net, params, state, batch, key):
        labeled = batch["labeled"]
        axis_name = net.axis_name
        mask = boxes(key, len(labeled.image), labeled.label.shape[1:], axis_name)
        image, label = (
            mix(mask, own, next_slices(own, axis_name)) for own in (labeled.image, labeled.label)
        )
        logits, batch_stats = segment(net, params, state.batch_stats, {"mixed": image})
        return {
            "segmentation_loss": segmentation_term(base, logits["mixed"], label, axis_name)
        }, batch_stats

    labeled_view = {"labeled": ("labeled", base.labeled_view)}
    return Method(
        terms=terms,
        views={
            **labeled_view,
            "unlabeled": ("unlabeled", base.move),
            "strong": ("unlabeled", base.change),
        },
        sampler=unlabeled_sampler(base),
        pretraining=(pretraining_terms, labeled_view) if options.pretraining else None,
    )
