"""Supervised training: the segmentation loss on labelled slices, and nothing else.

L = L_seg(labelled)

The honest zero of every comparison: same network, steps and augmentation, no unlabelled slice. It
is also the first stage of most methods.
"""

from typing import Any

from lclseg.methods.contract import Base, Method, segmentation_term
from lclseg.rules import Rule

RULES: dict[str, Rule] = {}


def make(options: Any, base: Base) -> Method:
    """Makes the method; it has no options."""

    def terms(net, params, state, batch, key):
        labeled = batch["labeled"]
        out, batch_stats = net(
            params, state.batch_stats, {"labeled": labeled.image}, {"labeled": ("segmentation",)}
        )
        logits = out["labeled"]["segmentation"]
        term = segmentation_term(base, logits, labeled.label, net.axis_name)
        return {"segmentation_loss": term}, batch_stats

    return Method(terms=terms, views={"labeled": ("labeled", base.labeled_view)})
