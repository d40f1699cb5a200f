"""Mean teacher: the network agrees with its averaged weights on slices without ground truth.

L = L_seg(labelled) + weight x r(t) x mean (p(u) - q(u + noise))^2

p is the softmax of the network, q that of the averaged weights (no gradient), u a moved unlabelled
slice; the mean runs over pixels and classes. arXiv:1703.01780 (Tarvainen and Valpola).

Settings that matter: the weight, 0.1, and its ramp r; noise = clip(normal(0, 0.1), +-0.2), added to
what the teacher sees alone; `optimizer.ema_decay`, 0.99 where it is published: 0, which would make
the teacher the network itself, is refused. These are the settings of the usual program for medical
slices; the paper itself gives student and teacher noise alike, and a weight of 100. Published
programs leave the term out at first; here a supervised stage comes first.
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
from lclseg.rules import AVERAGED, NOT_NEGATIVE

RULES = {"weight": NOT_NEGATIVE, "noise_sigma": NOT_NEGATIVE, "noise_bound": NOT_NEGATIVE}
CONFIG_RULES = {"optimizer.ema_decay": AVERAGED}


def make(options: Any, base: Base) -> Method:
    """Makes the method; options: see configs/methods/mean_teacher.py."""

    def with_noise(key, image, label):
        noise = {"sigma": options.noise_sigma, "bound": options.noise_bound}
        return augment.add_noise(key, image, **noise), label

    def terms(net, params, state, batch, key):
        images = {name: batch[name].image for name in ("labeled", "unlabeled")}
        logits, batch_stats = segment(net, params, state.batch_stats, images)
        noisy = {"unlabeled": batch["noisy"].image}
        teacher = teacher_probs(net, state.ema_params, state.batch_stats, noisy)["unlabeled"]
        squared = jnp.mean((jax.nn.softmax(logits["unlabeled"]) - teacher) ** 2, axis=-1)
        return {
            "segmentation_loss": segmentation_term(
                base, logits["labeled"], batch["labeled"].label, net.axis_name
            ),
            "consistency_loss": mean_of(
                squared, jnp.ones(squared.shape, bool), options.weight * ramp_up(state.progress)
            ),
        }, batch_stats

    views = {
        "labeled": ("labeled", base.labeled_view),
        "unlabeled": ("unlabeled", base.move),
        "noisy": ("unlabeled", with_noise),
    }
    return Method(terms=terms, views=views, sampler=unlabeled_sampler(base))
