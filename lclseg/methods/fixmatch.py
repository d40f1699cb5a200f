"""FixMatch: confident labels of the weak view teach the strong view of the same slice.

L = L_seg(labelled) + weight x L_seg(s(w(u)), y)

  y = argmax q(w(u)) where max q(w(u)) >= threshold, and no label elsewhere

w moves an unlabelled slice u, s changes its intensities. arXiv:2001.07685 (Sohn et al.).

Settings that matter: the threshold, 0.95; the strength of s, `augment.strength`; no ramp.

Our reading: q is the softmax of the *averaged weights*, a teacher without gradient, and not of the
network itself as in the paper, which `optimizer.ema_decay=0` gives; and the loss is the config's
supervised one (the paper's is cross-entropy over all pixels, those without a label as zeros) over
the confident pixels alone.
"""

from typing import Any

from lclseg.methods.contract import (
    Base,
    Method,
    confident_label,
    segment,
    segmentation_term,
    teacher_probs,
    unlabeled_sampler,
)
from lclseg.rules import NOT_NEGATIVE, SHARE_BELOW_1

RULES = {"weight": NOT_NEGATIVE, "threshold": SHARE_BELOW_1}


def make(options: Any, base: Base) -> Method:
    """Makes the method; options: see configs/methods/fixmatch.py."""

    def terms(net, params, state, batch, key):
        weak = {"weak": batch["weak"].image}
        teacher = teacher_probs(net, state.ema_params, state.batch_stats, weak)["weak"]
        images = {name: batch[name].image for name in ("labeled", "strong")}
        logits, batch_stats = segment(net, params, state.batch_stats, images)

        def term(name, label, weight):
            return segmentation_term(base, logits[name], label, net.axis_name, weight)

        label = confident_label(teacher, options.threshold)
        return {
            "segmentation_loss": term("labeled", batch["labeled"].label, 1.0),
            "pseudo_label_loss": term("strong", label, options.weight),
        }, batch_stats

    views = {
        "labeled": ("labeled", base.labeled_view),
        "weak": ("unlabeled", base.move),
        "strong": ("weak", base.change),
    }
    return Method(terms=terms, views=views, sampler=unlabeled_sampler(base))
