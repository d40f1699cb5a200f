"""Losses of arXiv:2112.09645: Dice, weighted cross-entropy and the local contrastive loss.

Letters: B images, H W pixels, C classes (background 0), E embedding, K anchors per class and image.
Everything is a pure function of arrays, finite in value and gradient when classes are absent. A
pixel whose label is C or more (`IGNORE`) belongs to no class, and no loss counts it: neither in a
sum nor in a divisor. Where nothing is counted the loss is 0, and so is its gradient.
"""

import jax
import jax.numpy as jnp

Array = jax.Array

IGNORE = 255  # the label of a pixel of no class
MATCHINGS = ("intra", "inter", "batch")
# A vector much shorter than the root of this, 1e-4, has no direction: the gradient of 1 / length,
# which grows as the vector shrinks, stays below 1e4. Embeddings have a length of about 1.
LENGTH_EPSILON = 1e-8
# Similarities are divided by a temperature of 0.1, which would amplify the rounding of the faster
# products that are the default on accelerators: 10 bits on GPUs (TF32), 8 on TPUs (bfloat16).
EXACT = jax.lax.Precision.HIGHEST


def _check_segmentation(logits: Array, labels: Array) -> None:
    if logits.ndim != 4 or labels.shape != logits.shape[:3]:
        raise ValueError(
            f"found logits {logits.shape} and labels {labels.shape}; wanted [B, H, W, C] and "
            "[B, H, W] with the same B, H, W: labels are class numbers, not one-hot"
        )


def _known_probs(logits: Array, labels: Array) -> Array:
    """Softmax, zero where the label is no class: there neither loss nor gradient."""
    probs = jax.nn.softmax(logits, axis=-1)
    return jnp.where((labels < logits.shape[-1])[..., None], probs, 0)


def dice_loss(
    logits: Array, labels: Array, *, include_background: bool = True, epsilon: float = 1e-5
) -> Array:
    """Computes the soft Dice loss of each image, averaged over classes.

    loss_b = 1 - mean_c (2 sum_i p_ic g_ic + epsilon) / (sum_i p_ic + sum_i g_ic + epsilon)

    Args:
      logits: [B, H, W, C] float.
      labels: [B, H, W] int; 0..C-1, or `IGNORE`.
      include_background: average over class 0 too (`dice_with_background`), or over 1..C-1 only
        (`dice_foreground`).
      epsilon: makes a class that is absent from label and prediction count as Dice 1.

    Returns:
      [B] float32 in [0, 1].

    Raises:
      ValueError: the shapes do not fit together.
    """
    _check_segmentation(logits, labels)
    probs = _known_probs(logits, labels)
    onehot = jax.nn.one_hot(labels, logits.shape[-1], dtype=probs.dtype)
    overlap = jnp.sum(probs * onehot, axis=(1, 2))
    total = jnp.sum(probs + onehot, axis=(1, 2))
    dice = (2 * overlap + epsilon) / (total + epsilon)
    return 1 - jnp.mean(dice if include_background else dice[:, 1:], axis=-1)


def cross_entropy_loss(logits: Array, labels: Array, *, class_weights: Array) -> Array:
    """Computes weighted cross-entropy of each image: mean_i -w[y_i] log softmax(logits_i)[y_i].

    The mean runs over the counted pixels: its divisor is their *number*, whatever their weights.
    So the weights are factors of the loss, and equal ones of 2 double it.

    Args:
      logits: [B, H, W, C] float.
      labels: [B, H, W] int; 0..C-1, or `IGNORE`.
      class_weights: [C] float.

    Returns:
      [B] float32; 0 for an image without a counted pixel.

    Raises:
      ValueError: the shapes do not fit together.
    """
    _check_segmentation(logits, labels)
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    class_weights = jnp.asarray(class_weights, log_probs.dtype)
    num_classes = logits.shape[-1]
    if class_weights.shape != (num_classes,):
        raise ValueError(
            f"found class_weights {class_weights.shape}; wanted [{num_classes}], one per class of "
            "the logits with the background first"
        )
    onehot = jax.nn.one_hot(labels, num_classes, dtype=log_probs.dtype)
    weighted = jnp.sum(onehot * class_weights[None, None, None] * log_probs, axis=(1, 2, 3))
    return -weighted / jnp.maximum(jnp.sum(onehot, axis=(1, 2, 3)), 1)


def batch_dice_loss(
    logits: Array, labels: Array, *, epsilon: float = 1e-5, axis_name: str | None = None
) -> Array:
    """Computes the soft Dice loss of the whole batch taken as one image, background included.

    loss = 1 - mean_c (2 sum_bi p_bic g_bic + epsilon) / (sum_bi p_bic + sum_bi g_bic + epsilon)

    A false positive in a slice without the class lowers it; in `dice_loss` such a slice has a
    constant loss (nearly) and teaches nothing.

    Args:
      logits: [B, H, W, C] float.
      labels: [B, H, W] int; 0..C-1, or `IGNORE`.
      epsilon: makes a class that is absent from labels and predictions count as Dice 1.
      axis_name: mapped axis over whose slices the sums run too; None: these are the whole batch.

    Returns:
      Scalar in [0, 1], the same on every device of the axis.

    Raises:
      ValueError: the shapes do not fit together.
    """
    _check_segmentation(logits, labels)
    probs = _known_probs(logits, labels)
    onehot = jax.nn.one_hot(labels, logits.shape[-1], dtype=probs.dtype)
    sums = jnp.sum(probs * onehot, axis=(0, 1, 2)), jnp.sum(probs + onehot, axis=(0, 1, 2))
    overlap, total = sums if axis_name is None else jax.lax.psum(sums, axis_name)
    return 1 - jnp.mean((2 * overlap + epsilon) / (total + epsilon))


def _inverse_length(vectors: Array) -> Array:
    """1 / length along the last axis, which becomes 1; finite, gradient too, for a zero vector."""
    return jax.lax.rsqrt(jnp.sum(vectors**2, axis=-1, keepdims=True) + LENGTH_EPSILON)


def _unit(vectors: Array) -> Array:
    """Vectors of length 1 along the last axis; a zero vector stays zero."""
    return vectors * _inverse_length(vectors)


def class_means(embeddings: Array, labels: Array, *, num_classes: int) -> tuple[Array, Array]:
    """Computes mean embedding m_k(x) of each class k of an image, not normalised before averaging.

    Args:
      embeddings: [H, W, E] float.
      labels: [H, W] int.
      num_classes: C.

    Returns:
      means [C, E] (zero where the class is absent) and present [C] bool.

    Raises:
      ValueError: the shapes do not fit together.
    """
    if embeddings.ndim != 3 or labels.shape != embeddings.shape[:2]:
        raise ValueError(
            f"found embeddings {embeddings.shape} and labels {labels.shape}; wanted [H, W, E] and "
            "[H, W] of one image (vmap over images)"
        )
    onehot = jax.nn.one_hot(labels.reshape(-1), num_classes, dtype=embeddings.dtype)
    counts = jnp.sum(onehot, axis=0)
    vectors = embeddings.reshape(-1, embeddings.shape[-1])
    sums = jnp.matmul(onehot.T, vectors, precision=EXACT)
    return sums / jnp.maximum(counts, 1)[:, None], counts > 0


def sample_anchors(
    key: Array,
    labels: Array,
    *,
    num_classes: int,
    pixels_per_class: int,
    include_background: bool = False,
) -> Array:
    """Draws K anchor pixels per class and image, uniformly and with replacement.

    Args:
      key: random key.
      labels: [2, H, W] int.
      num_classes: C.
      pixels_per_class: K.
      include_background: draw for class 0 too.

    Returns:
      [2, C-1, K, 2] int32 (row, column), or [2, C, K, 2] with the background. The anchors of an
      absent class point at an arbitrary pixel of the image; the loss gives them no weight.

    Raises:
      ValueError: labels that are not of one pair, or pixels_per_class below 1.
    """
    if labels.ndim != 3 or labels.shape[0] != 2:
        raise ValueError(
            f"wanted labels [2, H, W] of one pair (vmap over pairs); found {labels.shape}"
        )
    if pixels_per_class < 1:
        raise ValueError(
            f"pixels_per_class is {pixels_per_class}; wanted 1 or more: to take every pixel, give "
            "anchors=None to local_contrastive_loss"
        )
    height, width = labels.shape[1:]
    classes = jnp.arange(0 if include_background else 1, num_classes)
    masks = labels.reshape(2, 1, -1) == classes[None, :, None]
    cumulative = jnp.cumsum(masks.astype(jnp.int32), axis=-1)
    uniform = jax.random.uniform(key, (2, classes.size, pixels_per_class))
    counts = cumulative[..., -1:]
    # The r-th pixel of a class is the first one at which its cumulative count exceeds r.
    ranks = jnp.minimum(jnp.floor(uniform * counts), jnp.maximum(counts - 1, 0)).astype(jnp.int32)
    search = jax.vmap(jax.vmap(lambda c, r: jnp.searchsorted(c, r, side="right")))
    pixels = jnp.minimum(search(cumulative, ranks), height * width - 1).astype(jnp.int32)
    return jnp.stack([pixels // width, pixels % width], axis=-1)


def _anchored(
    embeddings: Array, labels: Array, anchors: Array | None, present: Array, *, first: int
) -> tuple[Array, Array]:
    """Anchors z [2, A, E] and their weights [2, c, A]: for each class present they sum to 1.

    The c classes are `first`, first + 1, ...; of `present` [2, c].
    """
    num_anchored = present.shape[1]
    if anchors is None:
        z = embeddings.reshape(2, -1, embeddings.shape[-1])
        classes = first + jnp.arange(num_anchored)
        onehot = (labels.reshape(2, 1, -1) == classes[None, :, None]).astype(z.dtype)
        return z, onehot / jnp.maximum(jnp.sum(onehot, axis=2, keepdims=True), 1)
    num_pixels = anchors.shape[2]
    z = jax.vmap(lambda e, a: e[a[..., 0], a[..., 1]])(embeddings, anchors)
    z = z.reshape(2, num_anchored * num_pixels, -1)
    weights = jnp.repeat(jnp.eye(num_anchored, dtype=z.dtype), num_pixels, axis=1) / num_pixels
    return z, weights[None] * present[:, :, None]


def _gather(tree, axis_name: str | tuple[str, ...]):
    """Arrays [2, ...] of every pair along the mapped axes, as [M, ...]."""
    axes = (axis_name,) if isinstance(axis_name, str) else axis_name
    # One axis at a time, innermost first: a vmapped and a device axis cannot gather as one.
    for axis in reversed(axes):
        tree = jax.lax.all_gather(tree, axis, tiled=True)
    return tree


def local_contrastive_loss(
    embeddings: Array,
    labels: Array,
    anchors: Array | None,
    *,
    num_classes: int,
    temperature: float = 0.1,
    matching: str = "inter",
    include_background: bool = False,
    axis_name: str | tuple[str, ...] | None = None,
) -> Array:
    """Computes the local contrastive loss of one image pair (x, x'), arXiv:2112.09645 section 3.

    With s(a, b) = cosine(a, b) / temperature, m_k(x) the mean embedding of class k in x, and an
    anchor z_i of class c in image x:

      intra  term(z_i, m_c(x)) = -s(z_i, m_c(x)) + log sum_k exp s(z_i, m_k(x))
      inter  two terms, against m_c(x) and m_c(x'), that share one denominator:
             -s(z_i, m_c(.)) + log sum_k [exp s(z_i, m_k(x)) + exp s(z_i, m_k(x'))]
      batch  as inter, with the class means of every image of the batch

    where k runs over the classes present. Anchors of x' likewise. vmap it over pairs.

    Args:
      embeddings: [2, H, W, E] float, not normalised.
      labels: [2, H, W] int, ground truth or pseudo-label.
      anchors: [2, C-1, K, 2] int (row, column): K pixels of each foreground class of each image
        ([2, C, K, 2] with the background); their class is their place in the array. None: every
        pixel is an anchor, each class counting the same, which is the exact expectation of the
        loss over uniformly drawn anchors.
      num_classes: C.
      temperature: scales the cosines.
      matching: "intra", "inter" or "batch".
      include_background: treat class 0 as a class like any other.
      axis_name: for "batch", which needs it, the mapped axes (vmap and pmap) that together hold the
        batch's pairs; the others do without.

    Returns:
      Scalar: mean over all valid terms; 0 when the pair shows none of the classes. A class absent
      from an image contributes no anchor, no positive and no negative.

    Example: embeddings that tell the two classes apart have nearly no loss; equal ones have the
    logarithm of the number of means in the denominator, two images times two classes.

      >>> import functools
      >>> labels = jnp.array([[[1, 1, 2, 2]], [[1, 2, 2, 0]]])
      >>> apart = jax.nn.one_hot(labels, 3)
      >>> loss = functools.partial(
      ...     local_contrastive_loss, labels=labels, anchors=None, num_classes=3
      ... )
      >>> print(f"{loss(apart):.4f} {loss(jnp.ones_like(apart)):.4f}")
      0.6932 1.3863

    Raises:
      ValueError: on an unknown matching, on "batch" without an axis_name, or on arrays whose shapes
        do not fit together.
    """
    if matching not in MATCHINGS:
        raise ValueError(f"matching is {matching!r}; wanted one of {', '.join(MATCHINGS)}")
    if matching == "batch" and not axis_name:
        raise ValueError(
            'matching="batch" takes the class means of all pairs, and found no axis_name to gather '
            'them along; map the loss over pairs with jax.vmap(loss, axis_name="pairs") and give '
            'axis_name="pairs" to the loss too, or choose matching="inter"'
        )
    if embeddings.ndim != 4 or embeddings.shape[0] != 2 or labels.shape != embeddings.shape[:3]:
        raise ValueError(
            "wanted embeddings [2, H, W, E] and labels [2, H, W] of one pair (vmap over pairs); "
            f"found {embeddings.shape} and {labels.shape}"
        )
    first = 0 if include_background else 1
    num_anchored = num_classes - first
    if anchors is not None and (
        anchors.shape[:2] != (2, num_anchored) or anchors.shape[3:] != (2,)
    ):
        raise ValueError(f"wanted anchors [2, {num_anchored}, K, 2]; found {anchors.shape}")

    means, present = jax.vmap(lambda z, y: class_means(z, y, num_classes=num_classes))(
        embeddings, labels
    )
    means, present = means[:, first:], present[:, first:]  # [2, c, E], [2, c]

    z, weights = _anchored(embeddings, labels, anchors, present, first=first)
    references, references_present = means, present  # [M, c, E], [M, c]: positives and negatives
    if matching == "batch":
        references, references_present = _gather((means, present), axis_name or ())
    num_references = references.shape[0]
    visible = jnp.eye(2, dtype=bool) if matching == "intra" else jnp.ones((2, num_references), bool)
    mask = visible[:, :, None] & references_present[None]  # [2, M, c]

    # Products first, lengths after, and anchors last: of A x E numbers there is z alone, and the
    # rest is computed many anchors at a time.
    similarity = jnp.einsum("mce,nae->nmca", _unit(references), z, precision=EXACT) / temperature
    similarity *= _inverse_length(z)[:, None, None, :, 0]
    # Finite instead of -inf: with no mean visible at all the gradient must not become NaN.
    masked = jnp.where(mask[..., None], similarity, -1e9)
    log_denominator = jax.nn.logsumexp(masked, axis=(1, 2))  # [2, A]
    class_log_denominator = jnp.einsum("nca,na->nc", weights, log_denominator, precision=EXACT)
    attraction = jnp.sum(weights[:, None] * similarity, axis=-1)  # [2, M, c]
    terms = class_log_denominator[:, None, :] - attraction  # [2, M, c]
    valid = mask & present[:, None, :]
    return jnp.sum(jnp.where(valid, terms, 0)) / jnp.maximum(jnp.sum(valid), 1)
