"""Pure training and prediction steps: functions of a TrainState, ready for jit or pmap.

The steps know only the name of the device axis; `parallel.py` maps them over devices. Letters: B
local labelled slices, P local pairs, H W pixels, C classes.

Gradients over devices: each device differentiates its local *sum* divided by the global count, then
gradients are summed over devices. BatchNorm averages its statistics over devices inside the forward
pass, and the reverse of that average is part of the gradient: N devices give the gradient of one.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from lclseg import augment, losses
from lclseg.models import BATCH_NORM_MOMENTUM, UNet

Array = jax.Array


class TrainState(flax.struct.PyTreeNode):
    """What training changes; a step maps one to the next.

    Attributes:
      step: int32 scalar, counts over all stages of a run; with the seed it names every random draw.
      params: of the U-Net and both heads, float32.
      batch_stats: BatchNorm's running statistics.
      opt_state: of the optimiser; fresh in each stage.
      ema_params: exponential moving average of `params`; what evaluation and pseudo-labels use.
    """

    step: Array
    params: Any
    batch_stats: Any
    opt_state: Any
    ema_params: Any


class LossOptions(NamedTuple):
    """Values of `config.loss`; see configs/default.py."""

    segmentation: str
    class_weights: Sequence[float]
    contrastive_weight: float
    temperature: float
    pixels_per_class: int | None  # None or 0: every pixel
    matching: str
    include_background: bool
    pseudo_label_weight: float
    separate_batch_norm: bool


class AugmentOptions(NamedTuple):
    """Values of `config.augment`; see configs/default.py."""

    max_rotation_degrees: float
    scale_range: tuple[float, float]
    elastic_probability: float
    elastic_sigma_px: float
    contrast_range: tuple[float, float]
    max_brightness: float
    view_contrast_range: tuple[float, float]
    view_max_brightness: float
    view_clip: tuple[float, float]
    view_geometry: bool


def create_train_state(
    key: Array,
    model: UNet,
    optimizer: optax.GradientTransformation,
    *,
    image_size: int,
    num_channels: int = 1,
) -> TrainState:
    """A state at step 0; raises ValueError if the image size does not fit the model.

    Kernels are He-normal (normal truncated at 2 sigma, variance 2 / fan_in, as Flax has it),
    BatchNorm starts as the identity. All kernels come from one draw: Flax's own initialisation
    compiles a random-number program for each, ten seconds in all.
    """
    slices = jax.ShapeDtypeStruct((1, image_size, image_size, num_channels), jnp.float32)
    shapes = jax.eval_shape(functools.partial(model.init, train=False), key, slices)
    leaves = jax.tree_util.tree_leaves_with_path(shapes["params"])
    kernels = [leaf for path, leaf in leaves if path[-1].key == "kernel"]
    # 0.8796 is the standard deviation of a normal truncated at 2 sigma.
    draw = jax.jit(lambda k: jax.random.truncated_normal(k, -2, 2, (sum(map(_size, kernels)),)))
    values = np.asarray(draw(key)) / 0.87962566103423978
    offset = 0

    def initial(path, leaf):
        nonlocal offset
        match path[-1].key:
            case "kernel":
                size = _size(leaf)
                value = values[offset : offset + size].reshape(leaf.shape)
                offset += size
                return jnp.asarray(value * np.sqrt(2 / _size(leaf, exclude_last=True)))
            case "scale" | "var":
                return jnp.ones(leaf.shape, leaf.dtype)
            case "bias" | "mean":
                return jnp.zeros(leaf.shape, leaf.dtype)
        raise AssertionError(f"no rule to initialise {jax.tree_util.keystr(path)}")

    params = jax.tree_util.tree_map_with_path(initial, shapes["params"])
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=jax.tree_util.tree_map_with_path(initial, shapes["batch_stats"]),
        opt_state=optimizer.init(params),
        ema_params=jax.tree.map(jnp.copy, params),
    )


def _size(leaf, exclude_last: bool = False) -> int:
    return math.prod(leaf.shape[:-1] if exclude_last else leaf.shape)


def warm_start(state: TrainState, fresh: TrainState) -> TrainState:
    """Takes the trunk and its BatchNorm statistics from `state`, both heads from `fresh`.

    The trunk is that of `state.ema_params`, the weights that validation chose.
    """
    trunk = "unet_trunk"
    return state.replace(
        ema_params={**fresh.params, trunk: state.ema_params[trunk]},
        batch_stats={**fresh.batch_stats, trunk: state.batch_stats[trunk]},
    )


def restart(state: TrainState, optimizer: optax.GradientTransformation, *, step: int) -> TrainState:
    """Starts a stage at `step` from the averaged weights of `state`, with a fresh optimiser."""
    params = jax.tree.map(jnp.copy, state.ema_params)
    return state.replace(
        step=jnp.asarray(step, jnp.int32), params=params, opt_state=optimizer.init(params)
    )


def segmentation_loss(
    logits: Array, labels: Array, options: LossOptions, axis_name: str | None = None
) -> Array:
    """The segmentation loss of the config, per image: [B, H, W, C], [B, H, W] -> [B].

    Its mean over the global batch is the loss; a term of the whole batch counts the same in each.
    """
    match options.segmentation:
        case "batch_dice_and_cross_entropy":
            equal = jnp.ones(logits.shape[-1])
            cross_entropy = losses.cross_entropy_loss(logits, labels, class_weights=equal)
            return cross_entropy + losses.batch_dice_loss(logits, labels, axis_name=axis_name)
        case "dice_with_background":
            return losses.dice_loss(logits, labels)
        case "dice_foreground":
            return losses.dice_loss(logits, labels, include_background=False)
        case "cross_entropy":
            weights = jnp.asarray(options.class_weights or (1.0,) * logits.shape[-1])
            if weights.shape != logits.shape[-1:]:
                raise ValueError(
                    f"loss.class_weights has {weights.size} values; wanted {logits.shape[-1]}, one "
                    "per class with the background first, or () for equal weights"
                )
            return losses.cross_entropy_loss(logits, labels, class_weights=weights)
    raise ValueError(
        f"loss.segmentation is {options.segmentation!r}; wanted dice_with_background, "
        "dice_foreground, cross_entropy or batch_dice_and_cross_entropy"
    )


def _axis(axis_name: str | None) -> tuple[Array | int, int]:
    """(this device's index, number of devices) along the mapped axis."""
    if axis_name is None:
        return 0, 1
    return jax.lax.axis_index(axis_name), jax.lax.axis_size(axis_name)


def _sum_over(x, axis_name: str | None):
    return x if axis_name is None else jax.lax.psum(x, axis_name)


def _slice_keys(key: Array, num_local: int, axis_name: str | None) -> Array:
    """One key per local slice, named by its place in the *global* batch: no device count in it."""
    index, _ = _axis(axis_name)
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index * num_local + jnp.arange(num_local))


def augment_batch(
    key: Array, batch: dict[str, Array], options: AugmentOptions, axis_name: str | None
) -> dict[str, Array]:
    """Augments labelled slices, and contrastive views with their masks.

    Labelled slices are moved and their intensities jittered; views are jittered, and with
    `view_geometry` moved as well, each with its own mask.
    """
    label_key, view_key = jax.random.split(key)

    def move(k, image, label, contrast_range, max_brightness):
        return augment.augment_slice(
            k,
            image,
            label,
            max_rotation_degrees=options.max_rotation_degrees,
            scale_range=options.scale_range,
            elastic_probability=options.elastic_probability,
            elastic_sigma_px=options.elastic_sigma_px,
            contrast_range=contrast_range,
            max_brightness=max_brightness,
        )

    def labeled(k, image, label):
        return move(k, image, label, options.contrast_range, options.max_brightness)

    def view(k, image, label):
        if options.view_geometry:
            geometry_key, k = jax.random.split(k)
            image, label = move(geometry_key, image, label, (1.0, 1.0), 0.0)
        image = augment.augment_view(
            k,
            image,
            contrast_range=options.view_contrast_range,
            max_brightness=options.view_max_brightness,
            clip=options.view_clip,
        )
        return image, label

    keys = _slice_keys(label_key, batch["image"].shape[0], axis_name)
    image, label = jax.vmap(labeled)(keys, batch["image"], batch["label"])
    out = {**batch, "image": image, "label": label}
    if "pair_image" in batch:
        pairs, labels = batch["pair_image"], batch["pair_label"]
        keys = _slice_keys(view_key, 2 * pairs.shape[0], axis_name)
        views, masks = jax.vmap(view)(
            keys, pairs.reshape(-1, *pairs.shape[2:]), labels.reshape(-1, *labels.shape[2:])
        )
        out |= {"pair_image": views.reshape(pairs.shape), "pair_label": masks.reshape(labels.shape)}
    return out


def _forward(
    model: UNet, params, batch_stats, batch: dict[str, Array], options: LossOptions
) -> tuple[Array, Array | None, Any]:
    """Logits, embeddings of the pairs [P, 2, H, W, E] or None, and new BatchNorm statistics.

    One pass over labelled and contrastive slices; the logits are those of the labelled slices,
    followed by those of the pairs where the pseudo-label term reads them.
    """
    segments_pairs = options.pseudo_label_weight > 0
    num_labeled = batch["image"].shape[0]

    def run(module, images):
        features = module.trunk(images, train=True)
        logits = module.segment(features if segments_pairs else features[:num_labeled], train=True)
        if images.shape[0] == num_labeled:
            return logits, None
        return logits, module.project(features[num_labeled:], train=True)

    def run_pairs(module, images):
        features = module.trunk(images, train=True)
        logits = module.segment(features, train=True) if segments_pairs else None
        return logits, module.project(features, train=True)

    variables = {"params": params, "batch_stats": batch_stats}
    apply = nn.apply(run, model, mutable=["batch_stats"])
    if "pair_image" not in batch:
        (logits, _), updates = apply(variables, batch["image"])
        return logits, None, updates["batch_stats"]
    pairs = batch["pair_image"]
    views = pairs.reshape(-1, *pairs.shape[2:])
    if options.separate_batch_norm:
        # The views' statistics normalise the views only; the running ones are the labelled slices'.
        (logits, _), updates = apply(variables, batch["image"])
        apply_pairs = nn.apply(run_pairs, model, mutable=["batch_stats"])
        (pair_logits, embeddings), _ = apply_pairs(variables, views)
        if segments_pairs:
            logits = jnp.concatenate([logits, pair_logits])
    else:
        (logits, embeddings), updates = apply(variables, jnp.concatenate([batch["image"], views]))
    return logits, embeddings.reshape(*pairs.shape[:4], -1), updates["batch_stats"]


def _contrastive_sum(
    key: Array,
    embeddings: Array,
    labels: Array,
    *,
    num_classes: int,
    options: LossOptions,
    axis_name: str | None,
) -> tuple[Array, Array]:
    """Sum of the pairs' losses and number of valid pairs, local.

    embeddings [P, 2, H, W, E], labels [P, 2, H, W]; a pair is valid if it shows any of the classes.
    """
    pair_axis = "pairs"
    mapped = (pair_axis,) if axis_name is None else (axis_name, pair_axis)
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

    keys = _slice_keys(key, labels.shape[0], axis_name)
    pair_losses = jax.vmap(one_pair, axis_name=pair_axis)(keys, embeddings, labels)
    lowest = 0 if options.include_background else 1
    valid = jnp.any((labels >= lowest) & (labels < num_classes), axis=(1, 2, 3))
    return jnp.sum(pair_losses), jnp.sum(valid)


def train_step(
    state: TrainState,
    batch: dict[str, Array],
    key: Array,
    *,
    model: UNet,
    optimizer: optax.GradientTransformation,
    loss_options: LossOptions,
    augment_options: AugmentOptions,
    ema_decay: float,
    axis_name: str | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """One optimiser step: augmentation, one forward pass, losses, gradients, Adam.

    Args:
      state: the state before the step.
      batch: `image` [B, H, W] or [B, H, W, K] float and `label` [B, H, W] int; in the joint stage
        also `pair_image` [P, 2, H, W] or [P, 2, H, W, K] and `pair_label` [P, 2, H, W]. Equal
        shares of the global batch per device.
      key: the run's key, the same at every step; the state's step is folded in.
      model, optimizer, loss_options, augment_options: static.
      ema_decay: of the averaged weights; 0 makes them equal to the weights.
      axis_name: the mapped device axis, or None on a single device.

    Returns:
      The new state and scalar metrics of the global batch: `loss`, `segmentation_loss`,
      `gradient_norm`, and in the joint stage `contrastive_loss` (and `pseudo_label_loss`).

    The loss is L_seg + contrastive_weight L_local + pseudo_label_weight L_seg(pseudo-labels); the
    last term is self-training (off in the paper's method).
    """
    augment_key, anchor_key = jax.random.split(jax.random.fold_in(key, state.step))
    batch = augment_batch(augment_key, batch, augment_options, axis_name)
    _, num_devices = _axis(axis_name)
    num_labeled = batch["image"].shape[0]

    def loss_fn(params):
        logits, embeddings, batch_stats = _forward(
            model, params, state.batch_stats, batch, loss_options
        )
        per_image = segmentation_loss(logits[:num_labeled], batch["label"], loss_options, axis_name)
        parts = {"segmentation_loss": jnp.sum(per_image) / (num_labeled * num_devices)}
        loss = parts["segmentation_loss"]
        if embeddings is not None:
            pair_labels = batch["pair_label"]
            total, count = _contrastive_sum(
                anchor_key,
                embeddings,
                pair_labels,
                num_classes=model.num_classes,
                options=loss_options,
                axis_name=axis_name,
            )
            parts["contrastive_loss"] = total / jnp.maximum(_sum_over(count, axis_name), 1)
            loss += loss_options.contrastive_weight * parts["contrastive_loss"]
        if embeddings is not None and loss_options.pseudo_label_weight > 0:
            pair_labels = pair_labels.reshape(-1, *pair_labels.shape[2:])
            per_view = segmentation_loss(logits[num_labeled:], pair_labels, loss_options, axis_name)
            parts["pseudo_label_loss"] = jnp.sum(per_view) / (per_view.size * num_devices)
            loss += loss_options.pseudo_label_weight * parts["pseudo_label_loss"]
        return loss, ({"loss": loss, **parts}, batch_stats)

    grads, (metrics, batch_stats) = jax.grad(loss_fn, has_aux=True)(state.params)
    grads, metrics = _sum_over((grads, metrics), axis_name)
    metrics["gradient_norm"] = optax.tree.norm(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema_params = optax.incremental_update(params, state.ema_params, 1 - ema_decay)
    new_state = TrainState(
        step=state.step + 1,
        params=params,
        batch_stats=batch_stats,
        opt_state=opt_state,
        ema_params=ema_params,
    )
    return new_state, metrics


def batch_statistics(
    state: TrainState,
    batch: dict[str, Array],
    key: Array,
    *,
    model: UNet,
    loss_options: LossOptions,
    augment_options: AugmentOptions,
    axis_name: str | None = None,
) -> Any:
    """BatchNorm's statistics of one training batch under the averaged weights.

    Their mean over some batches takes the place of the running statistics, which lag behind by 100
    steps and were gathered under other weights (Izmailov et al., *Averaging weights leads to wider
    optima*, 2018: an average of weights needs statistics of its own).

    Args:
      state, batch, model, loss_options, augment_options, axis_name: as in `train_step`.
      key: of the batch's augmentation.

    Returns:
      A tree like `state.batch_stats`; what the batch does not reach is that of `state`.
    """
    batch = augment_batch(key, batch, augment_options, axis_name)
    zeros = jax.tree.map(jnp.zeros_like, state.batch_stats)
    _, _, updated = _forward(model, state.ema_params, zeros, batch, loss_options)
    # From zero, a running statistic has moved by 1 - momentum of the batch's.
    found = jax.tree.map(lambda x: x / (1 - BATCH_NORM_MOMENTUM), updated)
    return found if "pair_image" in batch else {**found, **_projection(state.batch_stats)}


def _projection(tree: dict) -> dict:
    return {k: v for k, v in tree.items() if k == "projection_head"}


def predict_step(state: TrainState, images: Array, *, model: UNet) -> Array:
    """Class probabilities [B, H, W, C] of slices [B, H, W], by the averaged weights."""

    def run(module, x):
        return module.segment(module.trunk(x, train=False), train=False)

    variables = {"params": state.ema_params, "batch_stats": state.batch_stats}
    return jax.nn.softmax(nn.apply(run, model)(variables, images), axis=-1)
