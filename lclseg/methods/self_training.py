"""Self-training: the segmentation loss on stored pseudo-labels, made anew from round to round.

L = L_seg(labelled) + weight x L_seg(pseudo-labelled)

Labelled slices are not counted in the second term, and both are means of their own slices.
Pseudo-labelled slices are augmented as labelled ones are, their masks with them.
"""

from typing import Any

from lclseg.methods.contract import Base, Method, draw_from, segmentation_term


def make(options: Any, base: Base) -> Method:
    """The method; `options` has `weight`, see configs/methods/self_training.py."""

    def sampler(labeled, unlabeled):
        return lambda rng: {
            "unlabeled": draw_from(unlabeled.records, rng, base.unlabeled_batch_size)
        }

    def terms(net, params, state, batch, key):
        images = {name: batch[name].image for name in ("labeled", "unlabeled")}
        heads = {name: ("segmentation",) for name in images}
        out, batch_stats = net(params, state.batch_stats, images, heads)

        def term(name, weight):
            logits = out[name]["segmentation"]
            return segmentation_term(base, logits, batch[name].label, net.axis_name, weight)

        return {
            "segmentation_loss": term("labeled", 1.0),
            "pseudo_label_loss": term("unlabeled", options.weight),
        }, batch_stats

    views = {name: (name, base.labeled_view) for name in ("labeled", "unlabeled")}
    return Method(terms=terms, views=views, sampler=sampler, offline=True)
