"""Steps on 1, 2 and 4 CPU devices, against gradients written out for one, and by their effect."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lclseg import losses, steps
from lclseg.models import UNet

AXIS = "devices"
SIZE = 16  # px
KEY = jax.random.key(7)
LEARNING_RATE = 0.05
EMA_DECAY = 0.75

LOSS = steps.LossOptions(
    segmentation="dice_with_background",
    class_weights=(),
    contrastive_weight=0.3,
    temperature=0.5,
    pixels_per_class=3,
    matching="inter",
    include_background=False,
    pseudo_label_weight=0.0,
)
# Between them, every option that changes how devices work together.
ANCHORS = LOSS
BATCH = LOSS._replace(
    pixels_per_class=0,
    matching="batch",
    pseudo_label_weight=0.5,
    segmentation="batch_dice_and_cross_entropy",
)
EVERY_PIXEL = LOSS._replace(pixels_per_class=0, pseudo_label_weight=0.5)

AUGMENT = steps.AugmentOptions(
    max_rotation_degrees=15.0,
    scale_range=(0.95, 1.05),
    elastic_probability=0.5,
    elastic_sigma=0.125,
    contrast_range=(0.8, 1.2),
    max_brightness=0.1,
    view_contrast_range=(0.7, 1.3),
    view_max_brightness=0.3,
    view_clip=(0.0, 1.5),
    view_geometry=False,
)


def make_model(axis_name=None):
    return UNet(num_classes=3, filters=(4, 8), embedding_dim=4, axis_name=axis_name)


def make_state(seed=0, optimizer=None):
    optimizer = optimizer or optax.sgd(LEARNING_RATE)
    return steps.create_train_state(jax.random.key(seed), make_model(), optimizer, image_size=SIZE)


def make_batch(pairs=True):
    """8 labelled slices and 4 pairs, of which the first shows no class at all.

    So two devices hold 1 and 2 valid pairs, four devices 0, 1, 1 and 1; the last pair has a class
    in one image only.
    """
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, (8, SIZE // 4, SIZE // 4)).astype(np.uint8)
    pair_label = rng.integers(0, 3, (4, 2, SIZE // 4, SIZE // 4)).astype(np.uint8)
    pair_label[0] = 0
    pair_label[2, 0] = 0
    pair_label[3, 0][pair_label[3, 0] == 2] = 0

    def enlarged(y):
        return np.repeat(np.repeat(y, 4, axis=-1), 4, axis=-2)

    def image(y):
        return (y / 2 + rng.normal(0, 0.3, y.shape)).astype(np.float32)

    label, pair_label = enlarged(label), enlarged(pair_label)
    batch = {"image": image(label), "label": label}
    if pairs:
        batch |= {"pair_image": image(pair_label), "pair_label": pair_label}
    return batch


def shard(batch, num_devices):
    return {k: v.reshape(num_devices, -1, *v.shape[1:]) for k, v in batch.items()}


def replicate(state, num_devices):
    """One copy per device, placed as pmap places its outputs; otherwise it compiles twice."""
    mesh = Mesh(np.array(jax.local_devices()[:num_devices]), (AXIS,))
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))

    def copies(x):
        return jax.device_put(np.broadcast_to(x, (num_devices, *np.shape(x))), sharding)

    return jax.tree.map(copies, state)


def unreplicate(tree):
    """The first device's copy, after a check that all devices hold the same."""
    for leaf in jax.tree.leaves(tree):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
    return jax.tree.map(lambda x: np.asarray(x[0]), tree)


def one_contrast(key, batch, options, axis_name):
    """Stands in for the augmentation where `options` is a range; its compilation takes seconds."""
    if options is None:
        return batch
    contrast = jax.random.uniform(key, (), minval=options[0], maxval=options[1])
    return {k: v * contrast if "image" in k else v for k, v in batch.items()}


class Compiled:
    """A step over devices that counts how often it is traced."""

    def __init__(self, loss_options, num_devices, optimizer, contrast):
        self.num_traces = 0
        self.num_devices = num_devices

        def step(state, batch, key):
            self.num_traces += 1
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(steps, "augment_batch", one_contrast)
                return steps.train_step(
                    state,
                    batch,
                    key,
                    model=make_model(AXIS),
                    optimizer=optimizer,
                    loss_options=loss_options,
                    augment_options=contrast,
                    ema_decay=EMA_DECAY,
                    axis_name=AXIS,
                )

        self.step = jax.pmap(
            step,
            axis_name=AXIS,
            in_axes=(0, 0, None),
            donate_argnums=(0,),
            devices=jax.local_devices()[:num_devices],
        )

    def __call__(self, state, batch, num_steps=1):
        """(state, metrics of each step) after steps on one batch."""
        state = replicate(state, self.num_devices)
        history = []
        for _ in range(num_steps):
            state, metrics = self.step(state, shard(batch, self.num_devices), KEY)
            history.append(unreplicate(metrics))
        return unreplicate(state), history


@functools.cache  # by the arguments as written: pass the first two by position
def compiled(loss_options, num_devices, optimizer="sgd", *, contrast=None):
    make = {"sgd": optax.sgd, "adam": optax.adam}[optimizer]
    return Compiled(loss_options, num_devices, make(LEARNING_RATE), contrast)


def assert_trees_close(a, b, **tolerance):
    paths = jax.tree_util.tree_leaves_with_path(a)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(paths, jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **tolerance, err_msg=jax.tree_util.keystr(path))


def assert_trees_equal(a, b):
    assert_trees_close(a, b, rtol=0, atol=0)


def weights(state):
    return {"params": state.params, "ema": state.ema_params, "statistics": state.batch_stats}


CONTRAST = (0.8, 1.2)


def test_four_devices_train_like_one():
    (one, one_history), (four, four_history) = (
        compiled(ANCHORS, n, contrast=CONTRAST)(make_state(), make_batch(), 4) for n in (1, 4)
    )
    # Float32 sums in another order; SGD hands the rounding on without making it larger.
    for a, b in zip(one_history, four_history, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=2e-5, err_msg=name)
    assert_trees_close(weights(one), weights(four), rtol=1e-5, atol=3e-6)
    assert one.step == four.step == 4


def test_two_devices_train_like_one_with_adam():
    (one, one_history), (two, two_history) = (
        compiled(EVERY_PIXEL, n, "adam")(make_state(optimizer=optax.adam(1.0)), make_batch(), 3)
        for n in (1, 2)
    )
    for a, b in zip(one_history, two_history, strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-3)
    np.testing.assert_allclose(one_history[0]["loss"], two_history[0]["loss"], rtol=1e-5)
    # Adam's first steps are about learning rate x sign of the gradient: where the gradient is next
    # to nothing, rounding decides the sign. So most parameters agree closely, and none is further
    # off than steps in opposite directions can take it.
    difference = np.concatenate(
        [
            np.abs(a - b).ravel()
            for a, b in zip(*map(jax.tree.leaves, (one.params, two.params)), strict=True)
        ]
    )
    assert np.quantile(difference, 0.9) < 0.01 * LEARNING_RATE
    assert difference.max() <= 2 * 3 * LEARNING_RATE


def batch_dice_and_cross_entropy(logits, labels):
    """Dice of all slices stacked to one tall image, and optax's cross-entropy."""
    tall = (1, -1, labels.shape[-1])
    dice = losses.dice_loss(logits.reshape(*tall, 3), labels.reshape(tall))[0]
    integers = jnp.asarray(labels, int)
    return dice + jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, integers))


def reference_loss(params, batch_stats, batch, options):
    """The loss of the global batch, written pair by pair; one BatchNorm, all pixels as anchors."""
    model, num_labeled = make_model(), len(batch["image"])
    views = batch["pair_image"].reshape(-1, SIZE, SIZE)

    def run(method, x):
        variables = {"params": params, "batch_stats": batch_stats}
        return model.apply(variables, x, train=True, mutable=["batch_stats"], method=method)[0]

    features = run("trunk", jnp.concatenate([batch["image"], views]))
    logits = run("segment", features)
    embeddings = run("project", features[num_labeled:])
    segmentation = batch_dice_and_cross_entropy(logits[:num_labeled], batch["label"])
    view_labels = batch["pair_label"].reshape(-1, SIZE, SIZE)
    pseudo = batch_dice_and_cross_entropy(logits[num_labeled:], view_labels)
    embeddings = embeddings.reshape(-1, 2, *embeddings.shape[1:])

    def pair_losses(z, y):
        return losses.local_contrastive_loss(
            z,
            y,
            None,
            num_classes=3,
            temperature=options.temperature,
            matching=options.matching,
            axis_name="pairs",
        )

    each = jax.vmap(pair_losses, axis_name="pairs")(embeddings, batch["pair_label"])
    valid = [y.any() for y in batch["pair_label"]]
    contrastive = sum(each[i] for i, v in enumerate(valid) if v) / sum(valid)
    return (
        segmentation
        + options.contrastive_weight * contrastive
        + options.pseudo_label_weight * pseudo
    )


def test_gradient_on_four_devices_is_that_of_the_whole_batch_on_one():
    state, batch = make_state(), make_batch()
    loss, grad = jax.jit(
        lambda p: jax.value_and_grad(reference_loss)(p, state.batch_stats, batch, BATCH)
    )(state.params)
    after, (metrics,) = compiled(BATCH, 4)(state, batch)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["gradient_norm"], optax.tree.norm(grad), rtol=1e-4)
    stepped = jax.tree.map(lambda p, g: p - LEARNING_RATE * g, state.params, grad)
    assert_trees_close(after.params, stepped, rtol=1e-5, atol=1e-6)


def test_in_float64_device_counts_differ_by_rounding_only():
    """Where float32 turns the sign of a ReLU's input, gradients differ by per cents; not here."""

    def double(x):
        return np.asarray(x, np.float64 if np.asarray(x).dtype == np.float32 else None)

    def stepped(num_devices):
        def step(state, batch, key):
            return steps.train_step(
                state,
                batch,
                key,
                model=UNet(3, filters=(4, 8), embedding_dim=4, dtype=jnp.float64, axis_name=AXIS),
                optimizer=optax.sgd(1.0),
                loss_options=BATCH,
                augment_options=None,
                ema_decay=0.0,
                axis_name=AXIS,
            )

        devices = jax.local_devices()[:num_devices]
        step = jax.pmap(step, axis_name=AXIS, in_axes=(0, 0, None), devices=devices)
        state = replicate(jax.tree.map(double, make_state()), num_devices)
        batch = shard({k: double(v) for k, v in make_batch().items()}, num_devices)
        return unreplicate(step(state, batch, KEY))

    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "augment_batch", one_contrast)
        (one, metrics), (four, _) = stepped(1), stepped(4)
    assert one.params["unet_trunk"]["ConvBlock_0"]["Conv_0"]["kernel"].dtype == np.float64
    assert metrics["gradient_norm"] > 0.01
    assert_trees_close(weights(one), weights(four), rtol=0, atol=1e-12)


def test_metrics_add_up_to_the_loss():
    _, (metrics,) = compiled(BATCH, 4)(make_state(), make_batch())
    assert metrics["loss"] == pytest.approx(
        metrics["segmentation_loss"]
        + BATCH.contrastive_weight * metrics["contrastive_loss"]
        + BATCH.pseudo_label_weight * metrics["pseudo_label_loss"],
        rel=1e-5,
    )


def test_averaged_weights_follow_their_formula():
    state = make_state()
    state = state.replace(ema_params=jax.tree.map(lambda p: p + 1, state.params))
    before = jax.tree.map(np.asarray, state)
    after, _ = compiled(ANCHORS, 1, contrast=CONTRAST)(state, make_batch())
    expected = jax.tree.map(
        lambda old, new: EMA_DECAY * old + (1 - EMA_DECAY) * new, before.ema_params, after.params
    )
    assert_trees_close(after.ema_params, expected, rtol=1e-5, atol=1e-6)


def test_step_counts_and_names_the_random_draws():
    step, batch = compiled(ANCHORS, 1, contrast=CONTRAST), make_batch()

    def segmentation_loss(number):
        state = make_state().replace(step=jnp.asarray(number, jnp.int32))
        after, (metrics,) = step(state, batch)
        assert after.step == number + 1
        return metrics["segmentation_loss"]

    assert segmentation_loss(5) == segmentation_loss(5)
    assert segmentation_loss(5) != segmentation_loss(6)


def test_step_compiles_once_for_fresh_states_and_across_rounds():
    step, optimizer, batch = (
        compiled(EVERY_PIXEL, 2, "adam"),
        optax.adam(LEARNING_RATE),
        make_batch(),
    )
    state, _ = step(make_state(optimizer=optimizer), batch, 3)
    state = steps.warm_start(state, make_state(1, optimizer))
    state, _ = step(steps.restart(state, optimizer, step=int(state.step)), batch, 2)
    assert state.step == 5
    assert step.num_traces == 1


def test_given_state_is_donated():
    state = replicate(make_state(), 1)
    compiled(ANCHORS, 1, contrast=CONTRAST).step(state, shard(make_batch(), 1), KEY)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_one_batch_is_learnt():
    state = make_state(optimizer=optax.adam(LEARNING_RATE))
    _, history = compiled(EVERY_PIXEL, 2, "adam")(state, make_batch(), 30)
    for name in ("loss", "segmentation_loss", "contrastive_loss", "pseudo_label_loss"):
        assert history[-1][name] < 0.7 * history[0][name], name


def test_baseline_batch_and_weight_zero_leave_the_projection_head_alone():
    before = jax.tree.map(np.asarray, make_state())
    options = EVERY_PIXEL._replace(contrastive_weight=0.0, pseudo_label_weight=0.0)
    step = compiled(options, 1)
    baseline, baseline_history = step(make_state(), make_batch(pairs=False), 2)
    joint, _ = step(make_state(), make_batch(), 2)
    assert set(baseline_history[0]) == {"loss", "segmentation_loss", "gradient_norm"}
    for tree in (baseline.params, baseline.batch_stats, joint.params):
        head = before.params if "Dense_0" in tree["projection_head"] else before.batch_stats
        assert_trees_equal(tree["projection_head"], head["projection_head"])
    for name in ("unet_trunk", "segmentation_head"):
        assert np.any(
            baseline.params[name]["ConvBlock_0"]["Conv_0"]["kernel"]
            != before.params[name]["ConvBlock_0"]["Conv_0"]["kernel"]
        )


def test_augmentation_does_not_depend_on_the_number_of_devices():
    batch, key = make_batch(), jax.random.key(3)
    # All slices alike, all views alike.
    batch["image"][:], batch["label"][:] = batch["image"][0], batch["label"][0]
    batch["pair_image"][:] = 0.5
    one = jax.jit(lambda b: steps.augment_batch(key, b, AUGMENT, None))(batch)
    four = jax.pmap(
        lambda b: steps.augment_batch(key, b, AUGMENT, AXIS),
        axis_name=AXIS,
        devices=jax.local_devices()[:4],
    )(shard(batch, 4))
    for name in batch:
        assert one[name].shape == batch[name].shape
        assert one[name].dtype == batch[name].dtype
        np.testing.assert_allclose(
            np.asarray(four[name]).reshape(batch[name].shape), one[name], atol=1e-5
        )
    # Each draws for itself; the masks of views stay, the labels of the others move.
    for name, count in (("image", 8), ("pair_image", 8)):
        assert len(np.unique(one[name].reshape(count, -1), axis=0)) == count
    np.testing.assert_array_equal(one["pair_label"], batch["pair_label"])
    assert np.any(one["label"] != batch["label"])


def test_views_may_be_moved_with_their_masks():
    """The image shows the mask: wherever linear interpolation did not mix, it still does."""
    batch, key = make_batch(), jax.random.key(3)
    # Of one class: between 0 and 2 a mixture may be a 1.
    batch["pair_label"] = np.minimum(batch["pair_label"], 1)
    batch["pair_image"] = batch["pair_label"].astype(np.float32)
    options = AUGMENT._replace(
        view_geometry=True,
        view_contrast_range=(1.0, 1.0),
        view_max_brightness=0.0,
        view_clip=(0, 9),
    )
    moved = jax.jit(lambda b: steps.augment_batch(key, b, options, None))(batch)
    image, mask = np.asarray(moved["pair_image"]), np.asarray(moved["pair_label"])
    assert mask.dtype == np.uint8
    whole = np.abs(image - np.rint(image)) < 1e-3
    assert whole.mean() > 0.3
    np.testing.assert_array_equal(np.rint(image[whole]), mask[whole])
    still = [np.array_equal(a, b) for a, b in zip(mask, batch["pair_label"], strict=True)]
    assert sum(still) < 3  # one of them is empty
    # The two views of a pair move apart.
    batch["pair_label"][:, 1] = batch["pair_label"][:, 0]
    batch["pair_image"] = batch["pair_label"].astype(np.float32)
    moved = jax.jit(lambda b: steps.augment_batch(key, b, options, None))(batch)
    assert np.any(moved["pair_label"][:, 0] != moved["pair_label"][:, 1])


def test_initial_kernels_are_he_normal_and_truncated():
    model = UNet(num_classes=3, filters=(16, 32, 64))
    state = steps.create_train_state(jax.random.key(0), model, optax.sgd(0.1), image_size=16)
    kernels = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        assert leaf.dtype == jnp.float32
        match path[-1].key:
            case "kernel":
                kernels[jax.tree_util.keystr(path)] = np.asarray(leaf)
            case "scale":
                np.testing.assert_array_equal(leaf, 1)
            case "bias":
                np.testing.assert_array_equal(leaf, 0)
    for name, kernel in kernels.items():
        target = math.sqrt(2 / math.prod(kernel.shape[:-1]))
        # Four standard errors of a normal's deviation; a truncated normal's are smaller.
        error = 4 / math.sqrt(2 * kernel.size)
        assert np.std(kernel) == pytest.approx(target, rel=error), name
        assert abs(np.mean(kernel)) < 4 * target / math.sqrt(kernel.size), name
        assert np.abs(kernel).max() <= 2 * target / 0.8796, name
    values = np.concatenate([k.ravel() for k in kernels.values()])
    assert np.unique(values).size > 0.98 * values.size  # no kernel is cut from another's draw
    assert sum(k.size for k in kernels.values()) > 50_000


def test_initial_state_fits_flax_and_follows_the_key():
    first, again, other = (jax.tree.map(np.asarray, make_state(seed)) for seed in (0, 0, 1))
    images = jax.ShapeDtypeStruct((1, SIZE, SIZE), jnp.float32)
    init = functools.partial(make_model().init, train=False)
    expected = jax.eval_shape(init, jax.random.key(0), images)
    for name, tree in (("params", first.params), ("batch_stats", first.batch_stats)):
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype.name), tree)
        assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype.name), expected[name])
    for path, leaf in jax.tree_util.tree_leaves_with_path(first.batch_stats):
        np.testing.assert_array_equal(leaf, float(path[-1].key == "var"))
    assert_trees_equal(first, again)
    assert_trees_equal(first.params, first.ema_params)
    assert first.step == 0 and first.step.dtype == np.int32
    for path, leaf in jax.tree_util.tree_leaves_with_path(first.params):
        different = functools.reduce(lambda t, k: t[k.key], path, other.params)
        assert np.any(leaf != different) == (path[-1].key == "kernel")


def test_initial_state_refuses_an_image_that_does_not_fit():
    with pytest.raises(ValueError, match="15 x 15 px"):
        steps.create_train_state(jax.random.key(0), make_model(), optax.sgd(0.1), image_size=15)


def trained_looking_state():
    """Params, averaged params and statistics all different, and a step and momentum of its own."""
    optimizer = optax.sgd(0.1, momentum=0.9)
    state = make_state(0, optimizer)
    return state.replace(
        step=jnp.asarray(12, jnp.int32),
        ema_params=jax.tree.map(lambda p: p + 1, state.params),
        batch_stats=jax.tree.map(lambda s: s + 2, state.batch_stats),
        opt_state=jax.tree.map(lambda s: s + 3, state.opt_state),
    )


def test_warm_start_keeps_the_averaged_trunk_and_its_statistics_and_renews_both_heads():
    state, fresh = trained_looking_state(), make_state(1)
    started = steps.restart(steps.warm_start(state, fresh), optax.sgd(0.1), step=12)
    for params in (started.params, started.ema_params):
        assert_trees_equal(params["unet_trunk"], state.ema_params["unet_trunk"])
        for head in ("segmentation_head", "projection_head"):
            assert_trees_equal(params[head], fresh.params[head])
    assert_trees_equal(started.batch_stats["unet_trunk"], state.batch_stats["unet_trunk"])
    for head in ("segmentation_head", "projection_head"):
        assert_trees_equal(started.batch_stats[head], fresh.batch_stats[head])


def test_restart_sets_the_step_and_renews_the_optimiser():
    state, optimizer = trained_looking_state(), optax.sgd(0.1, momentum=0.9)
    started = steps.restart(state, optimizer, step=40)
    assert started.step == 40 and started.step.dtype == jnp.int32
    assert_trees_equal(started.params, state.ema_params)
    assert_trees_equal(started.ema_params, state.ema_params)
    assert_trees_equal(started.batch_stats, state.batch_stats)
    assert_trees_equal(started.opt_state, optimizer.init(started.params))
    # A donated state must not hold one array twice.
    for a, b in zip(*map(jax.tree.leaves, (started.params, started.ema_params)), strict=True):
        assert a is not b


def test_prediction_is_by_the_averaged_weights_and_running_statistics():
    state, images = make_state(), make_batch()["image"]
    other = make_state(1)
    statistics = jax.tree.map(lambda s: 0.8 * s - 0.1, state.batch_stats)
    state = state.replace(params=other.params, batch_stats=statistics)
    probs = jax.jit(functools.partial(steps.predict_step, model=make_model()))(state, images)
    assert probs.shape == (8, SIZE, SIZE, 3)
    assert probs.dtype == jnp.float32
    np.testing.assert_allclose(np.sum(probs, axis=-1), 1, atol=1e-5)
    assert np.std(probs) > 0.05  # or any weights at all would pass
    variables = {"params": state.ema_params, "batch_stats": statistics}
    logits, _ = jax.jit(functools.partial(make_model().apply, train=False))(variables, images)
    expected = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(probs, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, lambda z, y: losses.dice_loss(z, y)),
        (
            {"segmentation": "dice_foreground"},
            lambda z, y: losses.dice_loss(z, y, include_background=False),
        ),
        (
            {"segmentation": "cross_entropy"},
            lambda z, y: losses.cross_entropy_loss(z, y, class_weights=(1, 1, 1)),
        ),
        (
            {"segmentation": "cross_entropy", "class_weights": (0.1, 1.0, 2.0)},
            lambda z, y: losses.cross_entropy_loss(z, y, class_weights=(0.1, 1.0, 2.0)),
        ),
    ],
)
def test_segmentation_loss_is_the_named_one(options, expected):
    label = make_batch()["label"]
    logits = np.random.default_rng(1).normal(size=(*label.shape, 3)).astype(np.float32)
    loss = steps.segmentation_loss(logits, label, LOSS._replace(**options))
    assert loss.shape == (8,)
    np.testing.assert_array_equal(loss, expected(logits, label))


def test_a_loss_of_the_whole_batch_has_the_batch_loss_as_its_mean():
    label = make_batch()["label"]
    logits = np.random.default_rng(1).normal(size=(*label.shape, 3)).astype(np.float32)
    loss = steps.segmentation_loss(logits, label, BATCH)
    assert loss.shape == (8,)
    np.testing.assert_allclose(
        jnp.mean(loss), batch_dice_and_cross_entropy(logits, label), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segmentation": "focal"}, "'focal'.*dice_with_background, dice_foreground"),
        ({"segmentation": "cross_entropy", "class_weights": (1.0, 2.0)}, "2 values; wanted 3"),
    ],
)
def test_segmentation_loss_names_what_does_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        steps.segmentation_loss(
            jnp.zeros((1, 2, 2, 3)), jnp.zeros((1, 2, 2), int), LOSS._replace(**options)
        )


@pytest.mark.parametrize("num_devices", [1, 4])
def test_batch_statistics_are_those_of_the_batch(num_devices, monkeypatch):
    """The first BatchNorm's, by NumPy: mean and variance of the first convolution's output."""
    monkeypatch.setattr(steps, "augment_batch", one_contrast)
    state, batch = make_state(), make_batch()
    statistics = jax.pmap(
        functools.partial(
            steps.batch_statistics,
            model=make_model(AXIS),
            loss_options=LOSS,
            augment_options=None,
            axis_name=AXIS,
        ),
        axis_name=AXIS,
        in_axes=(0, 0, None),
        devices=jax.local_devices()[:num_devices],
    )(replicate(state, num_devices), shard(batch, num_devices), jax.random.key(0))
    assert jax.tree.structure(statistics) == jax.tree.structure(state.batch_stats)
    first, *_ = sorted(
        jax.tree_util.keystr(p) for p, _ in leaves_of(statistics) if "trunk" in str(p)
    )
    images = np.concatenate([batch["image"], batch["pair_image"].reshape(-1, SIZE, SIZE)])
    kernel = next(
        v for p, v in leaves_of(state.ema_params) if v.ndim == 4 and v.shape[:3] == (3, 3, 1)
    )
    out = jax.lax.conv_general_dilated(
        images[..., None], kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    found = {jax.tree_util.keystr(p): np.asarray(v[0]) for p, v in leaves_of(statistics)}
    key = first.rsplit("[", 1)[0]
    np.testing.assert_allclose(found[f"{key}['mean']"], out.mean((0, 1, 2)), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found[f"{key}['var']"], out.var((0, 1, 2)), rtol=1e-3, atol=1e-5)


def leaves_of(tree):
    return jax.tree_util.tree_leaves_with_path(tree)
