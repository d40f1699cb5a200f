"""Alternate diverse teaching (AD-MT): two teachers, averaged in turns from a student whose slices
are perturbed in two ways, in turns too.

  L = L_seg(labelled) + weight x r x Dice(p(s(u)), y)
  q = (w_1 q_1 + w_2 q_2) / (w_1 + w_2),  w_j = exp(-entropy of q_j), pixel by pixel
  y = argmax q where max q >= threshold, else not counted; r the ramp-up

arXiv:2311.17325. q_j is teacher j's prediction of the weak view of u. While teacher 1 is updated
the student sees changed intensities, s = `Base.change`; while teacher 2 is, CutMix: into the weak
view a box of the next unlabelled slice, its pseudo-label with it. Dice is that of the batch.

Settings that matter: weight 2, threshold 0.95, teacher_decay 0.99. The paper's phases have random
lengths; ours are as random, the same in each run: of two phases, 2 x `period` steps together, the
first has half to one and a half `period`. What evaluates are, as for all methods, the averaged
weights of the student.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lclseg.methods.contract import (
    Base,
    Method,
    batch_dice_term,
    confident_label,
    ramp_up,
    segment,
    segmentation_term,
    teacher_probs,
    unlabeled_sampler,
)
from lclseg.mixing import cutmix_mask, mix, next_slices
from lclseg.random_keys import named_key, slice_keys
from lclseg.rules import NOT_NEGATIVE, PROBABILITY, SHARE_BELOW_1, span, whole

Array = jax.Array

# What each option must be.
RULES = {
    "weight": NOT_NEGATIVE,
    "threshold": SHARE_BELOW_1,
    "teacher_decay": SHARE_BELOW_1,
    "period": whole(1),
    "box_probability": PROBABILITY,
    "box_area": span(lambda low, high: 0 < low <= high < 1, "(low, high) with 0 < low <= high < 1"),
    "box_aspect": span(lambda low, high: 0 < low <= high, "(low, high) with 0 < low <= high"),
}


def in_second_phase(step: Array, period: int) -> Array:
    """Tells whether a step, counted over the run, is of the second teacher; bool."""
    pair = jax.random.fold_in(jax.random.key(0), step // (2 * period))
    first = jax.random.randint(pair, (), period // 2, period + (period + 1) // 2 + 1)
    return step % (2 * period) >= first


def combined(first: Array, second: Array) -> Array:
    """Averages two predictions [n, H, W, C], the more certain one counting more."""

    def weight(probs):
        return jnp.exp(jnp.sum(jax.scipy.special.xlogy(probs, probs), axis=-1, keepdims=True))

    total = weight(first) + weight(second)
    return (weight(first) * first + weight(second) * second) / total


def make(options: Any, base: Base) -> Method:
    """Makes the method; options: see configs/methods/ad_mt.py."""

    def terms(net, params, state, batch, key):
        labeled, weak, changed = (batch[v] for v in ("labeled", "unlabeled", "changed"))
        first, second = (
            teacher_probs(net, teacher, state.batch_stats, {"weak": weak.image})["weak"]
            for teacher in state.memory
        )
        pseudo = confident_label(combined(first, second), options.threshold)

        def box(key):
            return cutmix_mask(
                key,
                weak.label.shape[1:],
                probability=options.box_probability,
                area_range=options.box_area,
                aspect_range=options.box_aspect,
            )

        keys = slice_keys(named_key(key, "boxes"), len(weak.image), net.axis_name)
        second_phase = in_second_phase(state.step, options.period)
        # In the first phase nothing of another slice is shown.
        own = jax.vmap(box)(keys) | ~second_phase
        image = jnp.where(second_phase, weak.image, changed.image)
        image = mix(own, image, next_slices(image, net.axis_name))
        pseudo = mix(own, pseudo, next_slices(pseudo, net.axis_name))

        images = {"labeled": labeled.image, "strong": image}
        logits, batch_stats = segment(net, params, state.batch_stats, images)
        weight = options.weight * ramp_up(state.progress)
        return {
            "segmentation_loss": segmentation_term(
                base, logits["labeled"], labeled.label, net.axis_name
            ),
            "pseudo_label_loss": batch_dice_term(logits["strong"], pseudo, net.axis_name, weight),
        }, batch_stats

    def remember(teachers, params, step):
        second_phase = in_second_phase(step, options.period)

        def updated(teacher, is_own_phase):
            rate = jnp.where(is_own_phase, 1 - options.teacher_decay, 0)
            return optax.incremental_update(params, teacher, rate)

        first, second = teachers
        return updated(first, ~second_phase), updated(second, second_phase)

    return Method(
        terms=terms,
        views={
            "labeled": ("labeled", base.labeled_view),
            "unlabeled": ("unlabeled", base.move),
            "changed": ("unlabeled", base.change),
        },
        sampler=unlabeled_sampler(base),
        init_memory=lambda params: (
            jax.tree.map(jnp.copy, params),
            jax.tree.map(jnp.copy, params),
        ),
        remember=remember,
    )
