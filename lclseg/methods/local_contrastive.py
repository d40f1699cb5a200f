"""The paper's method: local contrastive loss with pseudo-label based self-training.

L = L_seg(labelled) + contrastive_weight x L_local(pairs) [+ pseudo_label_weight x L_seg(pseudo)]

arXiv:2112.09645, section 3. A pair is two slices, labelled or pseudo-labelled, or two views of one
slice; `losses.local_contrastive_loss` pulls the pixels of a class to the class' mean embedding in
both slices, and away from the means of the other classes. Labelled slices and pairs go through the
network in one pass. The last term is plain self-training on the pseudo-labelled views; the paper's
own program has none (weight 0).

Letters: P local pairs, H W pixels, E embedding.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lclseg import losses
from lclseg.augment import augment_view
from lclseg.data.batches import Pool, select_slices
from lclseg.losses import IGNORE
from lclseg.methods.contract import Base, Method, Slices, Term, segmentation_term
from lclseg.models import ProjectionHead
from lclseg.random_keys import slice_keys
from lclseg.rules import ABOVE_0, FACTORS, INTERVAL, NOT_NEGATIVE, YES_NO, one_of, whole

Array = jax.Array


RULES = {
    "contrastive_weight": NOT_NEGATIVE,
    "temperature": ABOVE_0,
    "pixels_per_class": whole(0),
    "matching": one_of(*losses.MATCHINGS),
    "include_background": YES_NO,
    "pseudo_label_weight": NOT_NEGATIVE,
    "pairs.labeled_self": whole(0),
    "pairs.pseudo_self": whole(0),
    "pairs.labeled_pseudo": whole(0),
    "pairs.pseudo_pseudo": whole(0),
    "view_min_classes": whole(0),
    "view_contrast_range": FACTORS,
    "view_max_brightness": NOT_NEGATIVE,
    "view_clip": INTERVAL,
    "view_geometry": YES_NO,
}


class Pairs(NamedTuple):
    """How many pairs of each kind make up a global batch (METHOD: batches).

    Attributes:
      labeled_self: a labelled slice against a second view of itself.
      pseudo_self: likewise, pseudo-labelled.
      labeled_pseudo: a labelled slice with a pseudo-labelled one.
      pseudo_pseudo: a pseudo-labelled slice with another one.
    """

    labeled_self: int
    pseudo_self: int
    labeled_pseudo: int
    pseudo_pseudo: int


def draw_pairs(
    rng: np.random.Generator, labeled: np.ndarray, pseudo: np.ndarray, composition: Pairs
) -> np.ndarray:
    """Draws record numbers [2 P], pair after pair, of labelled and pseudo-labelled slices."""
    pairs = []
    for _ in range(composition.labeled_self):
        pairs.append([rng.choice(labeled)] * 2)
    for _ in range(composition.pseudo_self):
        pairs.append([rng.choice(pseudo)] * 2)
    for _ in range(composition.labeled_pseudo):
        pairs.append([rng.choice(labeled), rng.choice(pseudo)])
    for _ in range(composition.pseudo_pseudo):
        pairs.append(list(rng.choice(pseudo, 2, replace=False)))
    return np.asarray(pairs).ravel()


def contrastive_term(
    key: Array, embeddings: Array, labels: Array, options: Any, *, num_classes: int, axis_name
) -> Term:
    """Averages over the pairs that show any of the classes; embeddings [2 P, H, W, E].

    Labels [2 P, H, W]; slices 2 i and 2 i + 1 are a pair.
    """
    embeddings = embeddings.reshape(-1, 2, *embeddings.shape[1:])
    labels = labels.reshape(-1, 2, *labels.shape[1:])
    mapped = ("pairs",) if axis_name is None else (axis_name, "pairs")
    shared = {"num_classes": num_classes, "include_background": options.include_background}

    def one_pair(k, z, y):
        anchors = None
        if options.pixels_per_class:
            anchors = losses.sample_anchors(
                k, y, pixels_per_class=options.pixels_per_class, **shared
            )
        return losses.local_contrastive_loss(
            z,
            y,
            anchors,
            temperature=options.temperature,
            matching=options.matching,
            axis_name=mapped,
            **shared,
        )

    keys = slice_keys(key, len(labels), axis_name)
    each = jax.vmap(one_pair, axis_name="pairs")(keys, embeddings, labels)
    lowest = 0 if options.include_background else 1
    valid = jnp.any((labels >= lowest) & (labels < num_classes), axis=(1, 2, 3))
    return Term(jnp.sum(each), jnp.sum(valid), options.contrastive_weight)


def make(options: Any, base: Base) -> Method:
    """Makes the method; options: see configs/methods/local_contrastive.py."""
    classes = options.view_min_classes or base.num_classes

    def sampler(labeled: Pool, unlabeled: Pool):
        labeled_views = select_slices(
            labeled, min_classes=classes, at_least=1, role="labelled views"
        )
        pseudo_views = select_slices(
            unlabeled, min_classes=classes, at_least=2, role="pseudo-labelled views"
        )
        composition = Pairs(**options.pairs)
        return lambda rng: {"pairs": draw_pairs(rng, labeled_views, pseudo_views, composition)}

    def view(key, image, label):
        if options.view_geometry:
            move_key, key = jax.random.split(key)
            image, label = base.move(move_key, image, label)
        image = augment_view(
            key,
            image,
            contrast_range=options.view_contrast_range,
            max_brightness=options.view_max_brightness,
            clip=options.view_clip,
        )
        return image, label

    def terms(net, params, state, batch: dict[str, Slices], key):
        labeled, pairs = batch["labeled"], batch["pairs"]
        with_pseudo = options.pseudo_label_weight > 0
        heads = {
            "labeled": ("segmentation",),
            "pairs": ("segmentation", "projection") if with_pseudo else ("projection",),
        }
        images = {"labeled": labeled.image, "pairs": pairs.image}
        out, batch_stats = net(params, state.batch_stats, images, heads)
        logits = out["labeled"]["segmentation"]
        found = {
            "segmentation_loss": segmentation_term(base, logits, labeled.label, net.axis_name),
            "contrastive_loss": contrastive_term(
                key,
                out["pairs"]["projection"],
                pairs.label,
                options,
                num_classes=base.num_classes,
                axis_name=net.axis_name,
            ),
        }
        if with_pseudo:
            pseudo = jnp.where(pairs.is_labeled[:, None, None], IGNORE, pairs.label)
            found["pseudo_label_loss"] = segmentation_term(
                base,
                out["pairs"]["segmentation"],
                pseudo,
                net.axis_name,
                options.pseudo_label_weight,
            )
        return found, batch_stats

    return Method(
        terms=terms,
        views={"labeled": ("labeled", base.labeled_view), "pairs": ("pairs", view)},
        sampler=sampler,
        heads={"projection": functools.partial(ProjectionHead, base.embedding_dim)},
        offline=True,
    )
