"""What all methods build on, made from a config; and the method that a config names."""

import functools
import importlib

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from lclseg import augment, losses
from lclseg.methods.contract import Augment, Base, Method


def method_of(config: ConfigDict, num_classes: int) -> Method:
    """Makes the method `config.method.name`, a module of this folder, with its options."""
    module = importlib.import_module(f"lclseg.methods.{config.method.name}")
    return module.make(config.method, base_of(config, num_classes))


def base_of(config: ConfigDict, num_classes: int) -> Base:
    """Makes supervised loss, augmentation and sizes of a config.

    Args:
      config: complete.
      num_classes: C, background included.
    """
    labeled_view, move, change = augmentation(config.augment)

    def segmentation(logits, label, axis_name):
        return segmentation_loss(
            logits,
            label,
            kind=config.loss.segmentation,
            class_weights=config.loss.class_weights,
            axis_name=axis_name,
        )

    return Base(
        num_classes=num_classes,
        segmentation=segmentation,
        labeled_view=labeled_view,
        move=move,
        change=change,
        unlabeled_batch_size=config.data.unlabeled_batch_size,
        embedding_dim=config.model.embedding_dim,
    )


def augmentation(options: ConfigDict) -> tuple[Augment, Augment, Augment]:
    """Makes what is done to a labelled slice; its geometry alone; its intensities alone."""
    if options.strength == "strong":

        def move(key, image, label):
            return augment.strong_geometry(
                key,
                image,
                label,
                max_rotation_degrees=options.strong_rotation_degrees,
                any_orientation=options.any_orientation,
            )

        def change(key, image, label):
            return augment.strong_intensity(key, image), label

        def both(key, image, label):
            move_key, change_key = jax.random.split(key)
            return change(change_key, *move(move_key, image, label))

        return both, move, change

    jitter = {"contrast_range": options.contrast_range, "max_brightness": options.max_brightness}
    slightly = functools.partial(
        augment.augment_slice,
        max_rotation_degrees=options.max_rotation_degrees,
        scale_range=options.scale_range,
        elastic_probability=options.elastic_probability,
        elastic_sigma=options.elastic_sigma,
    )
    return (
        functools.partial(slightly, **jitter),
        functools.partial(slightly, contrast_range=(1.0, 1.0), max_brightness=0.0),
        lambda key, image, label: (augment.jitter_intensity(key, image, **jitter), label),
    )


def segmentation_loss(logits, labels, *, kind, class_weights, axis_name=None):
    """Makes the supervised loss of each image: [n, H, W, C], [n, H, W] -> [n].

    Its mean over the images of the global batch is the loss; a term of the whole batch counts the
    same in each. Pixels of `losses.IGNORE` do not count.

    Args:
      logits, labels: of a group of slices.
      kind: dice_with_background, dice_foreground, cross_entropy or batch_dice_and_cross_entropy.
      class_weights: [C] of cross_entropy, or () for equal ones.
      axis_name: the mapped device axis.
    """
    match kind:
        case "batch_dice_and_cross_entropy":
            equal = jnp.ones(logits.shape[-1])
            cross_entropy = losses.cross_entropy_loss(logits, labels, class_weights=equal)
            return cross_entropy + losses.batch_dice_loss(logits, labels, axis_name=axis_name)
        case "dice_with_background":
            return losses.dice_loss(logits, labels)
        case "dice_foreground":
            return losses.dice_loss(logits, labels, include_background=False)
        case "cross_entropy":
            weights = jnp.asarray(class_weights or (1.0,) * logits.shape[-1])
            return losses.cross_entropy_loss(logits, labels, class_weights=weights)
    raise ValueError(
        f"loss.segmentation is {kind!r}; wanted dice_with_background, dice_foreground, "
        "cross_entropy or batch_dice_and_cross_entropy"
    )
