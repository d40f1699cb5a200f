"""Uncertainty-aware mean teacher: as mean teacher, where the teacher is certain.

L = L_seg(labelled) + weight x r(t) x mean over certain pixels of mean_c (p_c - q_c)^2

  certain: -sum_c m_c log m_c < (start + (1 - start) r(t)) log C
  m: mean of q over `passes` of the teacher, each on u with other noise

p is the softmax of the network at a moved unlabelled slice u, q that of the averaged weights (no
gradient) at u + noise, one more pass. arXiv:1907.07034 (Yu et al.).

Settings that matter: 8 passes; start 0.75, so that every pixel counts in the end; noise, weight and
`optimizer.ema_decay` as in mean_teacher.py. Our reading: the passes differ by their noise alone.
The published network has dropout too; this one has none.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lclseg import augment
from lclseg.methods.contract import (
    Base,
    Method,
    mean_of,
    ramp_up,
    segment,
    segmentation_term,
    teacher_probs,
    unlabeled_sampler,
)
from lclseg.random_keys import slice_keys
from lclseg.rules import AVERAGED, NOT_NEGATIVE, PROBABILITY, whole

Array = jax.Array
RULES = {
    "weight": NOT_NEGATIVE,
    "noise_sigma": NOT_NEGATIVE,
    "noise_bound": NOT_NEGATIVE,
    "passes": whole(1),
    "start": PROBABILITY,
}
CONFIG_RULES = {"optimizer.ema_decay": AVERAGED}


def entropy(probs: Array) -> Array:
    """Computes -sum_c p_c log p_c of [..., C]; 0 log 0 is 0."""
    return -jnp.sum(jax.scipy.special.xlogy(probs, probs), axis=-1)


def make(options: Any, base: Base) -> Method:
    """Makes the method; options: see configs/methods/uncertainty_aware_mean_teacher.py."""

    def with_noise(key, image):
        noise = {"sigma": options.noise_sigma, "bound": options.noise_bound}
        return augment.add_noise(key, image, **noise)

    def terms(net, params, state, batch, key):
        images = {name: batch[name].image for name in ("labeled", "unlabeled")}
        logits, batch_stats = segment(net, params, state.batch_stats, images)

        def teacher_pass(key):
            keys = slice_keys(key, len(images["unlabeled"]), net.axis_name)
            noisy = {"unlabeled": jax.vmap(with_noise)(keys, images["unlabeled"])}
            return teacher_probs(net, state.ema_params, state.batch_stats, noisy)["unlabeled"]

        # One after the other, so that memory and program are those of a single pass.
        passes = jax.lax.map(teacher_pass, jax.random.split(key, 1 + options.passes))
        teacher, uncertainty = passes[0], entropy(jnp.mean(passes[1:], axis=0))
        ramp = ramp_up(state.progress)
        threshold = (options.start + (1 - options.start) * ramp) * jnp.log(base.num_classes)
        is_certain = uncertainty < threshold
        squared = jnp.mean((jax.nn.softmax(logits["unlabeled"]) - teacher) ** 2, axis=-1)
        return {
            "segmentation_loss": segmentation_term(
                base, logits["labeled"], batch["labeled"].label, net.axis_name
            ),
            "consistency_loss": mean_of(squared, is_certain, options.weight * ramp),
        }, batch_stats

    views = {"labeled": ("labeled", base.labeled_view), "unlabeled": ("unlabeled", base.move)}
    return Method(terms=terms, views=views, sampler=unlabeled_sampler(base))
