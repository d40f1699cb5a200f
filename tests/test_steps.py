"""Steps on 1, 2 and 4 CPU devices, against gradients written out for one, and by their effect."""

import functools
import math
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lclseg import losses, steps
from lclseg.losses import IGNORE
from lclseg.methods import local_contrastive, supervised
from lclseg.methods.base import base_of
from lclseg.methods.contract import Slices, Term
from lclseg.models import Net, UNet
from lclseg.random_keys import slice_keys

AXIS = "devices"
SIZE = 16  # px
KEY = jax.random.key(7)
LEARNING_RATE = 0.05
EMA_DECAY = 0.75
DEFAULT = Path(__file__).parents[1] / "configs" / "default.py"
CONTRASTIVE_WEIGHT, TEMPERATURE, PSEUDO_WEIGHT = 0.3, 0.5, 0.5


@functools.cache
def make_method(segmentation, **options):
    """The paper's method, the richest there is; its views are the slices as they are."""
    config = runpy.run_path(str(DEFAULT))["get_config"]()
    config.loss.segmentation = segmentation
    config.model.embedding_dim = 4
    config.method.update(contrastive_weight=CONTRASTIVE_WEIGHT, temperature=TEMPERATURE, **options)
    base = base_of(config, 3)
    return local_contrastive.make(config.method, base)._replace(views={})


# Between them, every option that changes how devices work together.
ANCHORS = make_method("dice_with_background")
BATCH = make_method(
    "batch_dice_and_cross_entropy",
    pixels_per_class=0,
    matching="batch",
    pseudo_label_weight=PSEUDO_WEIGHT,
)


def make_model(axis_name=None, dtype=jnp.float32):
    return UNet(3, filters=(4, 8), heads=ANCHORS.heads, dtype=dtype, axis_name=axis_name)


def make_state(seed=0, optimizer=None):
    optimizer = optimizer or optax.sgd(LEARNING_RATE)
    return steps.create_train_state(jax.random.key(seed), make_model(), optimizer, image_size=SIZE)


def make_batch():
    """8 labelled slices and 4 pairs, of which the first shows no class at all: (store, rows).

    So two devices hold 1 and 2 valid pairs, four devices 0, 1, 1 and 1; the last pair has a class
    in one image only. One slice of the third pair has ground truth, the others pseudo-labels.
    """
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, (16, SIZE // 4, SIZE // 4)).astype(np.uint8)
    label[8:10] = 0
    label[12] = 0
    label[14][label[14] == 2] = 0
    label = np.repeat(np.repeat(label, 4, axis=-1), 4, axis=-2)
    image = (label / 2 + rng.normal(0, 0.3, label.shape)).astype(np.float32)
    is_labeled = np.arange(16) < 8
    is_labeled[13] = True
    rows = {"labeled": np.arange(8), "pairs": np.arange(8, 16)}
    return steps.Store(image, label, is_labeled), rows


def shard(rows, num_devices):
    return {g: r.reshape(num_devices, -1).astype(np.int32) for g, r in rows.items()}


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


def one_contrast(key, image, label):
    """Stands in for the augmentation, whose compilation takes seconds."""
    return image * jax.random.uniform(key, (), minval=0.8, maxval=1.2), label


CONTRAST = {"labeled": ("labeled", one_contrast), "pairs": ("pairs", one_contrast)}


class Compiled:
    """A step over devices that counts how often it is traced."""

    def __init__(self, method, num_devices, optimizer, views):
        self.num_traces = 0
        self.num_devices = num_devices

        def step(state, store, rows, key):
            self.num_traces += 1
            return steps.train_step(
                state,
                store,
                rows,
                key,
                net=Net(make_model(AXIS)),
                terms=method.terms,
                views=views,
                optimizer=optimizer,
                ema_decay=EMA_DECAY,
            )

        self.step = jax.pmap(
            step,
            axis_name=AXIS,
            in_axes=(0, None, 0, None),
            donate_argnums=(0,),
            devices=jax.local_devices()[:num_devices],
        )

    def __call__(self, state, batch, num_steps=1):
        """(state, metrics of each step) after steps on one batch."""
        state = replicate(state, self.num_devices)
        store, rows = batch
        history = []
        for _ in range(num_steps):
            state, metrics = self.step(state, store, shard(rows, self.num_devices), KEY)
            history.append(unreplicate(metrics))
        return unreplicate(state), history


COMPILED: dict = {}


def compiled(method, num_devices, optimizer="sgd", *, views=None):
    """The program of a method on so many devices, compiled once for all tests."""
    name = (id(method), num_devices, optimizer, bool(views))
    if name not in COMPILED:
        make = {"sgd": optax.sgd, "adam": optax.adam}[optimizer]
        COMPILED[name] = Compiled(method, num_devices, make(LEARNING_RATE), views or {})
    return COMPILED[name]


def assert_trees_close(a, b, **tolerance):
    paths = jax.tree_util.tree_leaves_with_path(a)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(paths, jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **tolerance, err_msg=jax.tree_util.keystr(path))


def assert_trees_equal(a, b):
    assert_trees_close(a, b, rtol=0, atol=0)


def weights(state):
    return {"params": state.params, "ema": state.ema_params, "statistics": state.batch_stats}


@pytest.mark.parametrize("num_devices", [2, 4])
def test_several_devices_train_like_one(num_devices):
    """With augmentation and random anchors, which must not depend on the devices either."""
    (one, one_history), (several, history) = (
        compiled(ANCHORS, n, views=CONTRAST)(make_state(), make_batch(), 4)
        for n in (1, num_devices)
    )
    # Float32 sums in another order. SGD hands the rounding on; Adam would make a step of full
    # length from a gradient next to nothing, whose sign rounding decides. After the first step
    # rounding may also turn the sign of a ReLU's input.
    for step, (a, b) in enumerate(zip(one_history, history, strict=True)):
        assert a.keys() == b.keys()
        for name in a:
            tolerance = 2e-5 if step == 0 else 5e-4
            np.testing.assert_allclose(a[name], b[name], rtol=tolerance, err_msg=name)
    assert_trees_close(weights(one), weights(several), rtol=1e-5, atol=2e-5)
    assert one.step == several.step == 4


def batch_dice_and_cross_entropy(logits, labels):
    """Dice of all slices stacked to one tall image, and optax's cross-entropy."""
    tall = (1, -1, labels.shape[-1])
    dice = losses.dice_loss(logits.reshape(*tall, 3), labels.reshape(tall))[0]
    integers = jnp.asarray(labels, int)
    return dice + jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, integers))


def reference_loss(params, batch_stats, store):
    """The loss of the global batch, written pair by pair; one BatchNorm, all pixels as anchors."""
    model = make_model()

    def run(method, *arguments):
        variables = {"params": params, "batch_stats": batch_stats}
        return model.apply(
            variables, *arguments, train=True, mutable=["batch_stats"], method=method
        )[0]

    levels = run("trunk", store.image)
    logits = run("head", levels, "segmentation")
    embeddings = run("head", tuple(x[8:] for x in levels), "projection")
    segmentation = batch_dice_and_cross_entropy(logits[:8], store.label[:8])
    is_pseudo = [i for i in range(8, 16) if not store.is_labeled[i]]
    pseudo = batch_dice_and_cross_entropy(logits[np.array(is_pseudo)], store.label[is_pseudo])
    pairs = embeddings.reshape(4, 2, *embeddings.shape[1:])
    pair_labels = store.label[8:].reshape(4, 2, SIZE, SIZE)

    def pair_losses(z, y):
        return losses.local_contrastive_loss(
            z,
            y,
            None,
            num_classes=3,
            temperature=TEMPERATURE,
            matching="batch",
            axis_name="pairs",
        )

    each = jax.vmap(pair_losses, axis_name="pairs")(pairs, pair_labels)
    valid = [y.any() for y in pair_labels]
    contrastive = sum(each[i] for i, v in enumerate(valid) if v) / sum(valid)
    return segmentation + CONTRASTIVE_WEIGHT * contrastive + PSEUDO_WEIGHT * pseudo


def test_gradient_on_four_devices_is_that_of_the_whole_batch_on_one():
    state, batch = make_state(), make_batch()
    loss, grad = jax.jit(
        lambda p: jax.value_and_grad(reference_loss)(p, state.batch_stats, batch[0])
    )(state.params)
    after, (metrics,) = compiled(BATCH, 4)(state, batch)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["gradient_norm"], optax.tree.norm(grad), rtol=1e-4)
    stepped = jax.tree.map(lambda p, g: p - LEARNING_RATE * g, state.params, grad)
    assert_trees_close(after.params, stepped, rtol=1e-5, atol=1e-6)
    assert metrics["loss"] == pytest.approx(
        metrics["segmentation_loss"]
        + CONTRASTIVE_WEIGHT * metrics["contrastive_loss"]
        + PSEUDO_WEIGHT * metrics["pseudo_label_loss"],
        rel=1e-5,
    )


def test_in_float64_device_counts_differ_by_rounding_only():
    """Where float32 turns the sign of a ReLU's input, gradients differ by per cents; not here."""

    def double(x):
        return np.asarray(x, np.float64 if np.asarray(x).dtype == np.float32 else None)

    def stepped(num_devices):
        step = functools.partial(
            steps.train_step,
            net=Net(make_model(AXIS, jnp.float64)),
            terms=BATCH.terms,
            views={},
            optimizer=optax.sgd(1.0),
            ema_decay=0.0,
        )
        devices = jax.local_devices()[:num_devices]
        step = jax.pmap(step, axis_name=AXIS, in_axes=(0, None, 0, None), devices=devices)
        state = replicate(jax.tree.map(double, make_state()), num_devices)
        store, rows = make_batch()
        store = store._replace(image=double(store.image))
        return unreplicate(step(state, store, shard(rows, num_devices), KEY))

    with jax.enable_x64(True):
        (one, metrics), (four, _) = stepped(1), stepped(4)
    assert one.params["unet_trunk"]["ConvBlock_0"]["Conv_0"]["kernel"].dtype == np.float64
    assert metrics["gradient_norm"] > 0.01
    assert_trees_close(weights(one), weights(four), rtol=0, atol=1e-12)


def test_step_compiles_once_for_fresh_states_and_across_stages():
    step, optimizer, batch = compiled(BATCH, 2, "adam"), optax.adam(LEARNING_RATE), make_batch()
    state, _ = step(make_state(optimizer=optimizer), batch, 3)
    state = steps.warm_start(state, make_state(1, optimizer), fresh_heads=True)
    state = steps.restart(state, optimizer, first_step=int(state.step), num_steps=9)
    state, _ = step(state, batch, 2)
    assert state.step == 5
    assert step.num_traces == 1


def test_given_state_is_donated():
    state, (store, rows) = replicate(make_state(), 1), make_batch()
    compiled(ANCHORS, 1, views=CONTRAST).step(state, store, shard(rows, 1), KEY)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_one_batch_is_learnt():
    state = make_state(optimizer=optax.adam(LEARNING_RATE))
    _, history = compiled(BATCH, 2, "adam")(state, make_batch(), 30)
    for name in ("loss", "segmentation_loss", "contrastive_loss", "pseudo_label_loss"):
        assert history[-1][name] < 0.8 * history[0][name], name


def test_a_step_that_runs_no_projection_leaves_its_head_alone():
    before = jax.tree.map(np.asarray, make_state())
    config = runpy.run_path(str(DEFAULT))["get_config"]("supervised")
    method = supervised.make(None, base_of(config, 3))
    store, rows = make_batch()
    after, history = compiled(method, 1)(make_state(), (store, {"labeled": rows["labeled"]}), 2)
    assert set(history[0]) == {"loss", "segmentation_loss", "gradient_norm"}
    for now, then in ((after.params, before.params), (after.batch_stats, before.batch_stats)):
        assert_trees_equal(now["projection_head"], then["projection_head"])
    for name in ("unet_trunk", "segmentation_head"):
        first = after.params[name]["ConvBlock_0"]["Conv_0"]["kernel"]
        assert np.any(first != before.params[name]["ConvBlock_0"]["Conv_0"]["kernel"])


# A model of three numbers, for what a step does whatever the network: it compiles at once.
def line_terms(net, params, state, batch, key):
    """Squared error of a line through each slice's mean, and a random draw per slice."""
    slices = batch["slices"]
    mean = jnp.mean(slices.image, axis=(1, 2))
    wanted = jnp.mean(jnp.where(slices.label == IGNORE, 0, slices.label), axis=(1, 2))
    noise = jax.vmap(jax.random.normal)(slice_keys(key, len(mean), net.axis_name))
    error = jnp.square(params["slope"] * mean + params["offset"] - wanted)
    counted = jnp.any(slices.label != IGNORE, axis=(1, 2))
    return {
        "error": Term(jnp.sum(jnp.where(counted, error, 0)), jnp.sum(counted)),
        "noise": Term(jnp.sum(params["noise"] * noise), len(mean), 0.5 * state.progress),
    }, {"seen": state.batch_stats["seen"] + 1}


def line_state(optimizer=None, **memory):
    optimizer = optimizer or optax.sgd(LEARNING_RATE)
    params = {"slope": jnp.array(0.3), "offset": jnp.array(-0.1), "noise": jnp.array(0.7)}
    state = steps.TrainState(
        step=jnp.array(12, jnp.int32),
        stage=jnp.array([10, 8], jnp.int32),
        params=params,
        batch_stats={"seen": jnp.array(0)},
        opt_state=optimizer.init(params),
        ema_params={k: v + 1 for k, v in params.items()},
    )
    return state.replace(**memory)


def line_store(num_slices=6):
    rng = np.random.default_rng(3)
    image = rng.random((num_slices, 2, 2), np.float32)
    label = rng.integers(0, 3, image.shape).astype(np.uint8)
    label[4] = IGNORE
    return steps.Store(image, label, np.arange(num_slices) < 3)


line_step = functools.partial(
    steps.train_step,
    net=Net(UNet(3)),
    terms=line_terms,
    views={},
    optimizer=optax.sgd(LEARNING_RATE),
    ema_decay=EMA_DECAY,
)
ROWS = {"slices": np.array([0, 2, 4, 5])}


def test_a_step_by_hand():
    """Loss, gradient, SGD and averaged weights, by NumPy; the fifth slice has no label."""
    state, store = line_state(), line_store()
    after, metrics = jax.jit(line_step)(state, store, ROWS, KEY)
    x, y = (np.asarray(a, np.float64)[[0, 2, 5]].mean((1, 2)) for a in store[:2])
    residual = 0.3 * x - 0.1 - y
    np.testing.assert_allclose(metrics["error"], np.mean(residual**2), rtol=1e-5)
    weight = 0.5 * (12 - 10) / 8
    np.testing.assert_allclose(
        metrics["loss"], metrics["error"] + weight * metrics["noise"], rtol=1e-5
    )
    grad = {
        "slope": np.mean(2 * residual * x),
        "offset": np.mean(2 * residual),
        "noise": weight * metrics["noise"] / 0.7,
    }
    norm = math.sqrt(sum(g**2 for g in grad.values()))
    np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-5)
    for name, value in state.params.items():
        moved = value - LEARNING_RATE * grad[name]
        np.testing.assert_allclose(after.params[name], moved, rtol=1e-5)
        averaged = EMA_DECAY * (value + 1) + (1 - EMA_DECAY) * moved
        np.testing.assert_allclose(after.ema_params[name], averaged, rtol=1e-5)
    assert (after.step, after.batch_stats["seen"]) == (13, 1)
    assert set(metrics) == {"loss", "gradient_norm", "error", "noise"}


def test_step_names_the_random_draws():
    def noise(number):
        state = line_state(step=jnp.asarray(number, jnp.int32))
        return float(jax.jit(line_step)(state, line_store(), ROWS, KEY)[1]["noise"])

    assert noise(5) == noise(5)
    assert noise(5) != noise(6)


def test_a_method_remembers_the_new_weights():
    state = line_state(memory={"sum": jnp.array(1.0), "last": jnp.array(0)})

    def remember(memory, params, step):
        return {"sum": memory["sum"] + params["slope"], "last": step}

    after, _ = jax.jit(functools.partial(line_step, remember=remember))(
        state, line_store(), ROWS, KEY
    )
    assert after.memory["sum"] == 1 + after.params["slope"]
    assert after.memory["last"] == 12


def test_terms_are_divided_by_their_counts_over_all_devices():
    """By hand; a term that counts nothing is 0, and its gradient is finite."""

    def share(w, total, number):
        terms = {
            "some": Term(w * total, number, 2.0),
            "none": Term(0.0 * w, jnp.zeros_like(number), 5.0),
        }
        loss, parts = steps.total_loss(terms, AXIS)
        return loss, parts

    totals, numbers = jnp.array([3.0, 0.0, 5.0]), jnp.array([1, 0, 3])
    grad, parts = jax.vmap(jax.grad(share, has_aux=True), in_axes=(None, 0, 0), axis_name=AXIS)(
        1.5, totals, numbers
    )
    assert parts["some"].sum() == 1.5 * 8 / 4
    assert parts["none"].tolist() == [0, 0, 0]
    assert grad.sum() == 2 * 8 / 4


def many_steps():
    """`train_steps` of the line, compiled, and the list of its traces."""
    traces = []

    def step(*arguments):
        traces.append(1)
        return line_step(*arguments)

    return jax.jit(functools.partial(steps.train_steps, step=step)), traces


def test_many_steps_in_one_dispatch_are_as_many_steps():
    """Of any number, by one program; what lies behind the number is not touched."""
    rng = np.random.default_rng(0)
    rows = {"slices": rng.integers(0, 6, (5, 4)).astype(np.int32)}
    store, (dispatch, traces) = line_store(), many_steps()
    expected, after = line_state(), {}
    for number in range(1, 6):
        expected, metrics = jax.jit(line_step)(
            expected, store, {"slices": rows["slices"][number - 1]}, KEY
        )
        after[number] = (expected, metrics)
    for number in (3, 5, 1):
        rows_given = {"slices": rows["slices"].copy()}
        rows_given["slices"][number:] = 0
        state, metrics = dispatch(line_state(), store, rows_given, np.int32(number), KEY)
        if number == 3:
            num_traces = len(traces)
        assert_trees_close(state, after[number][0], rtol=1e-6)
        assert metrics.pop("first_not_finite") == number
        assert_trees_close(metrics, after[number][1], rtol=1e-6)
    assert len(traces) == num_traces


def test_many_steps_tell_which_was_the_first_that_is_not_finite():
    """And its metrics, not those of a later step."""
    store = line_store()
    image = store.image.copy()
    image[4] = np.inf
    store = store._replace(image=image)

    def step(state, store, rows, key):
        state, metrics = line_step(state, store, rows, key)
        return state, {**metrics, "brightness": jnp.sum(store.image[rows["slices"]])}

    rows = {"slices": np.array([[0, 1], [4, 1], [2, 3], [4, 4]])}
    dispatch = jax.jit(functools.partial(steps.train_steps, step=step))
    for number, first in ((1, 1), (2, 1), (3, 1), (4, 1)):
        _, metrics = dispatch(line_state(), store, rows, np.int32(number), KEY)
        assert metrics["first_not_finite"] == first
        assert np.isinf(metrics["brightness"]) == (number > 1)


def test_views_are_made_in_order_and_say_where_they_come_from():
    groups = steps.gather(line_store(), {"a": np.array([1, 4]), "b": np.array([5, 0, 2])})
    assert groups["b"].is_labeled.tolist() == [False, True, True]

    def twice(key, image, label):
        return 2 * image, label

    def with_border(key, image, label):
        return image + 1, label.at[0].set(0)

    views = {"weak": ("a", twice), "strong": ("weak", with_border), "a": ("a", with_border)}
    found = steps.make_views(KEY, groups, views, None)
    image, label = np.asarray(groups["a"].image), np.asarray(groups["a"].label)
    assert set(found) == {"a", "b", "weak", "strong"}
    np.testing.assert_array_equal(found["weak"].image, 2 * image)
    np.testing.assert_array_equal(found["strong"].image, 2 * image + 1)
    np.testing.assert_array_equal(found["a"].image, image + 1)
    assert_trees_equal(found["b"], groups["b"])
    for name in ("strong", "a"):
        # What a move brings in is background where there are labels, and nothing elsewhere.
        assert found[name].label[0, 0].tolist() == [0, 0]
        np.testing.assert_array_equal(found[name].label[0, 1:], label[0, 1:])
        assert np.all(found[name].label[1] == IGNORE)
        assert found[name].is_labeled.tolist() == [True, False]


def test_augmentation_does_not_depend_on_the_number_of_devices():
    """All slices alike: what each becomes is its own draw, by its place in the global batch."""
    group = Slices(np.ones((8, 2, 2), np.float32), np.ones((8, 2, 2), np.uint8), np.ones(8, bool))
    views = {"weak": ("all", one_contrast), "strong": ("all", one_contrast)}

    def made(group, axis_name):
        return steps.make_views(KEY, {"all": group}, views, axis_name)

    one = made(group, None)
    four = jax.vmap(lambda g: made(g, AXIS), axis_name=AXIS)(
        jax.tree.map(lambda x: x.reshape(4, 2, *x.shape[1:]), group)
    )
    for name in views:
        ours = np.asarray(one[name].image)
        np.testing.assert_array_equal(np.asarray(four[name].image).reshape(ours.shape), ours)
        assert len(np.unique(ours)) == 8
    assert np.all(one["weak"].image != one["strong"].image)


def test_initial_kernels_are_he_normal_and_truncated():
    model = UNet(num_classes=3, filters=(16, 32, 64), heads=ANCHORS.heads)
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


def test_a_further_head_or_network_moves_no_other_kernel():
    def state(model, **options):
        return steps.create_train_state(
            jax.random.key(3), model, optax.sgd(0.1), image_size=SIZE, **options
        )

    plain, more = state(make_model().clone(heads={})), state(make_model())
    assert set(more.params) == {*plain.params, "projection_head"}
    for name in plain.params:
        assert_trees_equal(more.params[name], plain.params[name])
    two = state(make_model(), networks=2, init_memory=lambda params: jax.tree.map(jnp.sum, params))
    for tree, one in ((two.params, more.params), (two.batch_stats, more.batch_stats)):
        assert_trees_equal(jax.tree.map(lambda x: x[0], tree), one)
    for path, leaf in jax.tree_util.tree_leaves_with_path(two.params):
        assert np.any(leaf[0] != leaf[1]) == (path[-1].key == "kernel")
    assert_trees_equal(two.memory, jax.tree.map(jnp.sum, two.params))
    first = steps.first_network(two)
    assert_trees_equal(first.ema_params, more.ema_params)
    assert_trees_equal(first.batch_stats, more.batch_stats)


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


def restart(state, optimizer, **options):
    return steps.restart(state, optimizer, first_step=40, num_steps=7, **options)


def test_warm_start_keeps_the_averaged_trunk_and_its_statistics_and_renews_all_heads():
    state, fresh = trained_looking_state(), make_state(1)
    started = restart(steps.warm_start(state, fresh, fresh_heads=True), optax.sgd(0.1))
    for params in (started.params, started.ema_params):
        assert_trees_equal(params["unet_trunk"], state.ema_params["unet_trunk"])
        for head in ("segmentation_head", "projection_head"):
            assert_trees_equal(params[head], fresh.params[head])
    assert_trees_equal(started.batch_stats["unet_trunk"], state.batch_stats["unet_trunk"])
    for head in ("segmentation_head", "projection_head"):
        assert_trees_equal(started.batch_stats[head], fresh.batch_stats[head])


def test_warm_start_draws_only_the_heads_that_are_lacking():
    state, fresh = trained_looking_state(), make_state(1)
    trees = (state.ema_params, state.batch_stats)
    ema_params, batch_stats = ({k: v for k, v in t.items() if "projection" not in k} for t in trees)
    before = state.replace(ema_params=ema_params, batch_stats=batch_stats)
    started = steps.warm_start(before, fresh, fresh_heads=False)
    for part in ("unet_trunk", "segmentation_head"):
        assert_trees_equal(started.ema_params[part], state.ema_params[part])
        assert_trees_equal(started.batch_stats[part], state.batch_stats[part])
    assert_trees_equal(started.ema_params["projection_head"], fresh.params["projection_head"])


def test_restart_sets_the_step_and_renews_optimiser_and_memory():
    state, optimizer = trained_looking_state(), optax.sgd(0.1, momentum=0.9)
    started = restart(state, optimizer, init_memory=lambda params: jax.tree.map(jnp.sum, params))
    assert started.step == 40 and started.step.dtype == jnp.int32
    assert started.stage.tolist() == [40, 7] and started.progress == 0
    assert started.replace(step=42).progress == pytest.approx(2 / 7)
    assert_trees_equal(started.params, state.ema_params)
    assert_trees_equal(started.ema_params, state.ema_params)
    assert_trees_equal(started.batch_stats, state.batch_stats)
    assert_trees_equal(started.opt_state, optimizer.init(started.params))
    assert_trees_equal(started.memory, jax.tree.map(jnp.sum, state.ema_params))
    # A donated state must not hold one array twice.
    for a, b in zip(*map(jax.tree.leaves, (started.params, started.ema_params)), strict=True):
        assert a is not b


def test_prediction_is_by_the_averaged_weights_and_running_statistics():
    state, images = make_state(), make_batch()[0].image[:8]
    other = make_state(1)
    statistics = jax.tree.map(lambda s: 0.8 * s - 0.1, state.batch_stats)
    state = state.replace(params=other.params, batch_stats=statistics)
    probs = jax.jit(functools.partial(steps.predict_step, model=make_model()))(state, images)
    assert probs.shape == (8, SIZE, SIZE, 3)
    assert probs.dtype == jnp.float32
    np.testing.assert_allclose(np.sum(probs, axis=-1), 1, atol=1e-5)
    assert np.std(probs) > 0.05  # or any weights at all would pass
    variables = {"params": state.ema_params, "batch_stats": statistics}
    outputs = jax.jit(functools.partial(make_model().apply, train=False))(variables, images)
    logits = outputs["segmentation"]
    expected = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(probs, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_devices", [1, 4])
def test_batch_statistics_are_those_of_the_batch_under_the_averaged_weights(num_devices):
    """The first BatchNorm's, by NumPy: mean and variance of the first convolution's output.

    What the batch does not reach keeps what it had.
    """
    store, rows = make_batch()
    state = make_state().replace(ema_params=make_state(1).params)
    state = state.replace(batch_stats=jax.tree.map(lambda s: s + 2, state.batch_stats))

    def terms(net, params, state, batch, key):
        images = {group: slices.image for group, slices in batch.items()}
        heads = {group: ("segmentation",) for group in images}
        return {}, net(params, state.batch_stats, images, heads)[1]

    statistics = jax.pmap(
        functools.partial(steps.batch_statistics, net=Net(make_model(AXIS)), terms=terms, views={}),
        axis_name=AXIS,
        in_axes=(0, None, 0, None),
        devices=jax.local_devices()[:num_devices],
    )(replicate(state, num_devices), store, shard(rows, num_devices), KEY)
    statistics = unreplicate(statistics)
    assert jax.tree.structure(statistics) == jax.tree.structure(state.batch_stats)
    kernel = state.ema_params["unet_trunk"]["ConvBlock_0"]["Conv_0"]["kernel"]
    out = jax.lax.conv_general_dilated(
        store.image[..., None], kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    found = statistics["unet_trunk"]["ConvBlock_0"]["BatchNorm_0"]
    np.testing.assert_allclose(found["mean"], out.mean((0, 1, 2)), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found["var"], out.var((0, 1, 2)), rtol=1e-3, atol=1e-5)
    head = "projection_head"
    assert_trees_equal(statistics[head], jax.tree.map(np.asarray, state.batch_stats[head]))
    first = statistics["segmentation_head"]["ConvBlock_0"]["BatchNorm_0"]["mean"]
    assert np.abs(first).max() < 2  # not the state's, which are 2
