"""Cross pseudo supervision (CPS): two networks, each learns from the other's hard labels.

L = L_seg(A) + L_seg(B) + weight x r(t) x [CE(p_A(u), argmax p_B(u)) + CE(p_B(u), argmax p_A(u))]

A and B have the same architecture and other initial values; both see the same slices, and u is a
moved unlabelled one. arXiv:2106.01226 (Chen et al.).

Settings that matter: the weight, 0.1, and its ramp r, those of the usual program for medical
slices; the paper's own is 1.5 or 6 by data set, without a ramp. Every pixel counts: no threshold.

The first stage is supervised training of both. Evaluated is the first network alone, by its
averaged weights. Parameters and statistics have a leading axis of 2.
"""

from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp

from lclseg import losses
from lclseg.methods.contract import (
    Base,
    Method,
    Term,
    ramp_up,
    segment,
    segmentation_term,
    unlabeled_sampler,
)
from lclseg.rules import NOT_NEGATIVE

RULES = {"weight": NOT_NEGATIVE}


def make(options: Any, base: Base) -> Method:
    """Makes the method; `options` has `weight`, see configs/methods/cps.py."""

    def segment_by_both(net, params, state, images):
        """Computes logits [2, n, H, W, C] by group, and both networks' statistics.

        One network after the other: `vmap` would make grouped convolutions of both, which are slow
        on CPUs.
        """
        weights = (params, state.batch_stats)
        networks = [jax.tree.map(itemgetter(number), weights) for number in range(2)]
        each = [segment(net, *network, images) for network in networks]
        return jax.tree.map(lambda *both: jnp.stack(both), *each)

    def supervised_term(net, logits, label):
        each = [segmentation_term(base, one, label, net.axis_name) for one in logits]
        return Term(each[0].total + each[1].total, each[0].number)

    def cross_entropy(logits, label):
        each = losses.cross_entropy_loss(
            logits, label, class_weights=jnp.ones(base.num_classes, logits.dtype)
        )
        return jnp.sum(each)

    def first_terms(net, params, state, batch, key):
        labeled = batch["labeled"]
        logits, batch_stats = segment_by_both(net, params, state, {"labeled": labeled.image})
        found = {"segmentation_loss": supervised_term(net, logits["labeled"], labeled.label)}
        return found, batch_stats

    def terms(net, params, state, batch, key):
        images = {name: batch[name].image for name in ("labeled", "unlabeled")}
        logits, batch_stats = segment_by_both(net, params, state, images)
        of_a, of_b = logits["unlabeled"]
        by_a, by_b = jnp.argmax(logits["unlabeled"], axis=-1)
        return {
            "segmentation_loss": supervised_term(net, logits["labeled"], batch["labeled"].label),
            "pseudo_label_loss": Term(
                cross_entropy(of_a, by_b) + cross_entropy(of_b, by_a),
                jnp.asarray(len(by_a)),
                options.weight * ramp_up(state.progress),
            ),
        }, batch_stats

    labeled_view = {"labeled": ("labeled", base.labeled_view)}
    return Method(
        terms=terms,
        views={**labeled_view, "unlabeled": ("unlabeled", base.move)},
        sampler=unlabeled_sampler(base),
        networks=2,
        pretraining=(first_terms, labeled_view),
    )
