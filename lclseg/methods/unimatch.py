"""UniMatch: the weak view teaches two strong views, and itself with features dropped.

L = 1/2 L_seg(labelled) + 1/2 [1/4 D(s1, y1) + 1/4 D(s2, y2) + 1/2 D(dropout(w(u)), y)]

  y = argmax p(w(u)) where max p(w(u)) >= threshold, and no label elsewhere
  s1, s2: two changes of the weak view w(u), each then with a box of the same change of another
    unlabelled slice v pasted in (CutMix); y1, y2 are y with the box of v's own y

p is the softmax of the network itself, without gradient: no averaged weights, no ramp. D is the
soft Dice loss of the batch on the pixels with a label; dropout drops half of the encoder's
channels. arXiv:2208.09910 (Yang et al.).

Settings that matter: the threshold, 0.95; both perturbations; CutMix boxes of 2 to 40 % of the
slice, half of the time; the strength of the changes, `augment.strength`.

Our reading: a strong view is the config's own change of intensities, shared by all methods, not
UniMatch's; v's labels come from a pass with the statistics of its batch; and L_seg is the config's.
"""

from typing import Any

import jax

from lclseg.methods.contract import (
    Base,
    Method,
    Term,
    batch_dice_term,
    confident_label,
    draw_from,
    segment,
    segmentation_term,
    teacher_probs,
)
from lclseg.mixing import cutmix_mask, mix
from lclseg.random_keys import named_key, slice_keys
from lclseg.rules import PROBABILITY, SHARE_BELOW_1, span

STRONG = ("strong_1", "strong_2")
RULES = {
    "threshold": SHARE_BELOW_1,
    "cutmix_probability": PROBABILITY,
    "cutmix_area_range": span(
        lambda low, high: 0 < low <= high < 1, "(low, high) with 0 < low <= high < 1"
    ),
    "cutmix_aspect_range": span(
        lambda low, high: 0 < low <= high, "(low, high) with 0 < low <= high"
    ),
}


def make(options: Any, base: Base) -> Method:
    """Makes the method; options: see configs/methods/unimatch.py."""

    def sampler(labeled, unlabeled):
        # Slice 2 i is learnt from, slice 2 i + 1 is its partner in CutMix: a pair stays together,
        # however many devices share the batch.
        size = 2 * base.unlabeled_batch_size
        return lambda rng: {"unlabeled": draw_from(unlabeled.records, rng, size)}

    def masks(key, slices, axis_name):
        """Draws where a slice shows, and not its partner."""

        def one(key):
            return cutmix_mask(
                key,
                slices.shape[1:3],
                probability=options.cutmix_probability,
                area_range=options.cutmix_area_range,
                aspect_range=options.cutmix_aspect_range,
            )

        return jax.vmap(one)(slice_keys(key, len(slices), axis_name))

    def terms(net, params, state, batch, key):
        weak, partner = batch["unlabeled"].image[::2], batch["unlabeled"].image[1::2]
        mask = {name: masks(named_key(key, name), weak, net.axis_name) for name in STRONG}
        images = {"labeled": batch["labeled"].image, "weak": weak, "dropped": weak}
        for name in STRONG:
            strong = batch[name].image
            images[name] = mix(mask[name], strong[::2], strong[1::2])
        logits, batch_stats = segment(
            net, params, state.batch_stats, images, dropout={"dropped": named_key(key, "dropout")}
        )
        label = confident_label(jax.nn.softmax(logits["weak"]), options.threshold)
        partner_probs = teacher_probs(net, params, state.batch_stats, {"partner": partner})
        partner_label = confident_label(partner_probs["partner"], options.threshold)
        dropped = batch_dice_term(logits["dropped"], label, net.axis_name, 1 / 4)
        first, second = (
            batch_dice_term(logits[name], mix(mask[name], label, partner_label), net.axis_name)
            for name in STRONG
        )
        return {
            "segmentation_loss": segmentation_term(
                base, logits["labeled"], batch["labeled"].label, net.axis_name, 1 / 2
            ),
            "strong_view_loss": Term(first.total + second.total, 2 * first.number, 1 / 4),
            "feature_dropout_loss": dropped,
        }, batch_stats

    views = {
        "labeled": ("labeled", base.labeled_view),
        "unlabeled": ("unlabeled", base.move),
        **{name: ("unlabeled", base.change) for name in STRONG},
    }
    return Method(terms=terms, views=views, sampler=sampler)
