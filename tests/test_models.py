"""The U-Net against METHOD's numbers, Flax layers and plain convolutions."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lclseg import models

PROJECTION = {"projection": functools.partial(models.ProjectionHead, 6)}
TINY = {"num_classes": 3, "filters": (4, 8), "heads": PROJECTION}
DEEPER = TINY | {"filters": (4, 8, 8)}


def random_images(shape=(2, 16, 16), seed=0):
    return np.random.default_rng(seed).random(shape, np.float32)


def shapes_of(model, image_size):
    images = jax.ShapeDtypeStruct((2, image_size, image_size), jnp.float32)
    variables = jax.eval_shape(
        functools.partial(model.init, train=False), jax.random.key(0), images
    )
    outputs = jax.eval_shape(functools.partial(model.apply, train=False), variables, images)
    return variables, outputs


def random_variables(model):
    """Made by NumPy: compiling Flax's initialisation takes longer than all the rest."""
    rng = np.random.default_rng(0)

    def initial(path, leaf):
        if path[-1].key == "kernel":
            fan_in = math.prod(leaf.shape[:-1])
            return rng.normal(0, math.sqrt(2 / fan_in), leaf.shape).astype(np.float32)
        return np.full(leaf.shape, path[-1].key in ("scale", "var"), np.float32)

    shapes, _ = shapes_of(model, 16)
    return jax.tree_util.tree_map_with_path(initial, shapes)


def number_of(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def count_by_hand(num_classes):
    def conv(size, inputs, outputs):
        return size * size * inputs * outputs

    def block(size, inputs, outputs):  # convolution without bias; BatchNorm's scale and bias
        return conv(size, inputs, outputs) + 2 * outputs

    filters = (16, 32, 64, 128, 128, 128)
    encoder = sum(
        block(3, i, o) + block(3, o, o) for i, o in zip((1, *filters[:-1]), filters, strict=True)
    )
    decoder = 0
    for level in (4, 3, 2, 1, 0):
        below, here = filters[level + 1], filters[level]
        decoder += block(2, below, here)
        decoder += block(3, 2 * here, here)
        decoder += block(3, here, here) if level > 0 else 0
    segmentation = 2 * block(3, 16, 16) + conv(3, 16, num_classes)
    projection = block(1, 16, 16) + conv(1, 16, 16)
    return encoder + decoder + segmentation + projection


@pytest.mark.parametrize("image_size", [64, 192])
@pytest.mark.parametrize("num_classes", [3, 8])
def test_parameter_count_and_shapes(image_size, num_classes):
    heads = {"projection": functools.partial(models.ProjectionHead, 16)}
    variables, outputs = shapes_of(models.UNet(num_classes, heads=heads), image_size)
    assert number_of(variables["params"]) == count_by_hand(num_classes)
    assert set(outputs) == {"segmentation", "projection"}
    assert outputs["segmentation"].shape == (2, image_size, image_size, num_classes)
    assert outputs["projection"].shape == (2, image_size, image_size, 16)


def test_levels_are_the_features_of_the_decoder_finest_first():
    model = models.UNet(3, filters=(4, 6, 8))
    variables, _ = shapes_of(model, 32)
    images = jax.ShapeDtypeStruct((2, 32, 32), jnp.float32)
    trunk = functools.partial(model.apply, train=False, method="trunk")
    levels = jax.eval_shape(trunk, variables, images)
    assert [x.shape for x in levels] == [(2, 32, 32, 4), (2, 16, 16, 6), (2, 8, 8, 8)]
    # Two channels, of which one may be a distance: the first convolution has as many inputs.
    images = jax.ShapeDtypeStruct((2, 32, 32, 2), jnp.float32)
    init = functools.partial(model.init, train=False)
    params = jax.eval_shape(init, jax.random.key(0), images)["params"]
    assert params["unet_trunk"]["ConvBlock_0"]["Conv_0"]["kernel"].shape == (3, 3, 2, 4)


class MeanOfLevel(nn.Module):
    """A head without parameters: each slice's mean at the level that it asks for."""

    level: int = 1
    dtype: object = None
    axis_name: str | None = None

    def __call__(self, x, *, train):
        return jnp.mean(x, axis=(1, 2))


def test_a_head_reads_the_level_that_it_names():
    model, images = models.UNet(3, filters=(4, 8), heads={"mean": MeanOfLevel}), random_images()
    variables = random_variables(model)
    levels = model.apply(variables, images, train=False, method="trunk")
    outputs = model.apply(variables, images, train=False)
    assert set(outputs) == {"segmentation", "mean"}
    np.testing.assert_allclose(outputs["mean"], np.mean(levels[1], axis=(1, 2)), rtol=1e-5)


def test_parameter_count_is_about_two_million():
    assert count_by_hand(num_classes=3) == 2_094_048


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_and_outputs_are_float32_whatever_the_computation(dtype):
    variables, outputs = shapes_of(models.UNet(**TINY, dtype=dtype), 16)
    assert {leaf.dtype for leaf in jax.tree.leaves((variables, outputs))} == {jnp.dtype("float32")}
    model = models.UNet(**TINY, dtype=dtype)
    features = jax.eval_shape(
        functools.partial(model.apply, train=False, method="trunk"), variables, random_images()
    )
    assert {level.dtype for level in features} == {jnp.dtype(dtype)}


@pytest.mark.parametrize(("height", "width"), [(18, 16), (16, 18)])
def test_a_slice_that_cannot_be_halved_often_enough_is_refused(height, width):
    images = jax.ShapeDtypeStruct((1, height, width), jnp.float32)
    with pytest.raises(ValueError, match=f"{height} x {width} px.*3 levels.*multiples of 4"):
        jax.eval_shape(
            functools.partial(models.UNet(**DEEPER).init, train=False), jax.random.key(0), images
        )


def test_each_loss_reaches_the_trunk_and_its_own_head_only():
    model, images = models.UNet(**TINY), random_images()
    variables = random_variables(model)

    @jax.jit
    def grads(params):
        def loss(params, which):
            outputs, _ = model.apply(
                {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
            )
            return jnp.sum(jnp.sin(outputs[which]))

        return [jax.grad(loss)(params, which) for which in heads]

    heads = ("segmentation", "projection")
    for name, grad in zip(heads, grads(variables["params"]), strict=True):
        for path, leaf in jax.tree_util.tree_leaves_with_path(grad):
            reached = path[0].key in ("unet_trunk", f"{name}_head")
            assert np.isfinite(leaf).all()
            assert np.any(leaf) == reached, jax.tree_util.keystr(path)


def test_trunk_looks_as_far_as_its_levels_say():
    # What a change of pixel 32 reaches. Down: two convolutions 30..34, pooled 15..17, two more
    # 13..19, pooled 6..9, two at the bottom 4..11. Up: repeated 8..23, the 2 x 2 convolution also
    # reads one pixel ahead 7..23, two convolutions 5..25, repeated 10..51, 9..51, the last 8..52.
    model = models.UNet(**DEEPER)
    variables = random_variables(model)
    trunk = jax.jit(functools.partial(model.apply, train=False, method="trunk"))
    images = random_images((1, 64, 64))
    touched = images.copy()
    touched[0, 32, 32] += 10
    changed = np.any(
        np.asarray(trunk(variables, images)[0] != trunk(variables, touched)[0]), axis=-1
    )
    for places in np.nonzero(changed[0]):
        assert (places.min(), places.max()) == (8, 52)


def test_max_pool_equals_flax_in_value_and_gradient():
    x = random_images((2, 6, 8, 3))
    upstream = random_images((2, 3, 4, 3), seed=1)

    def flax_pool(x):
        return nn.max_pool(x, (2, 2), strides=(2, 2))

    np.testing.assert_array_equal(models.max_pool(x), flax_pool(x))
    grads = [
        jax.grad(lambda x, f=f: jnp.sum(f(x) * upstream))(x) for f in (models.max_pool, flax_pool)
    ]
    np.testing.assert_array_equal(*grads)


def test_max_pool_shares_the_gradient_among_equal_pixels():
    grad = jax.grad(lambda x: jnp.sum(models.max_pool(x)))(jnp.zeros((1, 2, 4, 1)))
    np.testing.assert_allclose(grad, np.full((1, 2, 4, 1), 0.25))


def test_gradient_is_finite_when_the_compiler_computes_a_pooled_pixel_twice():
    # A compiler is free to compute x once for the maximum and once more for its gradient, rounded
    # differently; asking which x equals the maximum then finds none. XLA's lowest level does that.
    model, images = models.UNet(**TINY), random_images()
    variables = random_variables(model)

    def loss(params):
        outputs, _ = model.apply(
            {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
        )
        return jnp.sum(jnp.sin(outputs["segmentation"]))

    # Away from scale 1 and bias 0, with which BatchNorm rounds nothing.
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: p + rng.normal(0, 0.1, p.shape).astype(np.float32), variables["params"]
    )
    lowest = {"xla_backend_optimization_level": 0}
    grad = jax.jit(jax.grad(loss), compiler_options=lowest)(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grad))


def test_upsample_conv_equals_repeating_pixels_and_convolving():
    x = random_images((2, 3, 5, 4))
    kernel = random_images((2, 2, 4, 6), seed=1)
    upstream = random_images((2, 6, 10, 6), seed=2)

    def plain(x, kernel):
        repeated = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        return jax.lax.conv_general_dilated(
            repeated, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def value_and_grads(f):
        value, pullback = jax.vjp(f, x, kernel)
        return value, *pullback(upstream)

    for ours, theirs in zip(*map(value_and_grads, (models.upsample_conv, plain)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_conv_block_is_convolution_batch_norm_and_relu():
    x = random_images((2, 4, 4, 3))
    block = models.ConvBlock(5)
    variables = block.init(jax.random.key(0), x, train=False)
    scale, bias = np.linspace(0.5, 2, 5), np.linspace(-1, 1, 5)
    params = variables["params"] | {"BatchNorm_0": {"scale": scale, "bias": bias}}
    mean, var = np.linspace(-1, 1, 5), np.linspace(0, 2e-3, 5)  # small, so that epsilon shows
    statistics = {"BatchNorm_0": {"mean": mean, "var": var}}

    convolved = np.asarray(
        jax.lax.conv_general_dilated(
            x,
            params["Conv_0"]["kernel"],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        ),
        np.float64,
    )

    def expected(mean, var):
        return np.maximum((convolved - mean) / np.sqrt(var + 1e-3) * scale + bias, 0)

    variables = {"params": params, "batch_stats": statistics}
    at_rest, unchanged = block.apply(variables, x, train=False, mutable=["batch_stats"])
    np.testing.assert_allclose(at_rest, expected(mean, var), rtol=1e-4, atol=1e-4)
    for leaf, before in zip(
        *map(jax.tree.leaves, (unchanged["batch_stats"], statistics)), strict=True
    ):
        np.testing.assert_array_equal(leaf, before)

    axes = (0, 1, 2)
    in_training, updated = block.apply(variables, x, train=True, mutable=["batch_stats"])
    batch_mean, batch_var = convolved.mean(axes), convolved.var(axes)
    np.testing.assert_allclose(in_training, expected(batch_mean, batch_var), rtol=1e-4, atol=1e-4)
    updated = updated["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(updated["mean"], 0.99 * mean + 0.01 * batch_mean, atol=1e-6)
    np.testing.assert_allclose(updated["var"], 0.99 * var + 0.01 * batch_var, atol=1e-6)


@pytest.mark.parametrize("train", [False, True])
def test_batch_norm_equals_flax_in_value_statistics_and_gradients(train):
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, (4, 5, 6, 3)).astype(np.float32)
    upstream = rng.normal(size=x.shape).astype(np.float32)
    params = {"scale": np.array([0.5, 1, 2], "f"), "bias": np.array([-1, 0, 1], "f")}
    statistics = {"mean": np.array([3, 1, 0], "f"), "var": np.array([4, 1, 1e-4], "f")}
    flax_layer = nn.BatchNorm(momentum=0.99, epsilon=1e-3, use_running_average=not train)
    ours = functools.partial(models.BatchNorm().apply, train=train)

    def results(apply):
        def value(x, params):
            variables = {"params": params, "batch_stats": statistics}
            y, updated = apply(variables, x, mutable=["batch_stats"])
            return jnp.sum(y * upstream), (y, updated["batch_stats"])

        return jax.grad(value, argnums=(0, 1), has_aux=True)(x, params)

    for a, b in zip(*map(jax.tree.leaves, map(results, (ours, flax_layer.apply))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_batch_norm_averages_over_the_device_axis():
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 4, 5)).astype(np.float32)
    variables = models.BatchNorm().init(jax.random.key(0), x[0], train=True)
    apart = models.BatchNorm(axis_name="devices")
    apply = functools.partial(apart.apply, variables, train=True, mutable=["batch_stats"])
    y, updated = jax.vmap(apply, axis_name="devices")(x)
    whole, expected = models.BatchNorm().apply(
        variables, x.reshape(6, 4, 4, 5), train=True, mutable=["batch_stats"]
    )
    np.testing.assert_allclose(y.reshape(whole.shape), whole, atol=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (updated, expected)), strict=True):
        np.testing.assert_allclose(a, np.stack([b, b]), atol=1e-6)


def test_every_batch_norm_of_the_network_averages_over_the_devices():
    model, images = models.UNet(**TINY, axis_name="devices"), jnp.asarray(random_images())
    found = []

    def record(next_function, arguments, options, context):
        assert not isinstance(context.module, nn.BatchNorm)
        if isinstance(context.module, models.BatchNorm) and context.method_name == "__call__":
            found.append(context.module.axis_name)
        return next_function(*arguments, **options)

    with nn.intercept_methods(record):
        jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)
    # Two convolutions per level down, two up to the last level, two and one in the heads.
    assert found == ["devices"] * (2 * 2 + 2 + 2 + 1)


def test_prediction_leaves_the_statistics_alone_and_training_changes_all_of_them():
    model, images = models.UNet(**TINY), random_images()
    variables = random_variables(model)
    before = jax.tree.leaves(variables["batch_stats"])
    for train in (False, True):
        apply = jax.jit(functools.partial(model.apply, train=train, mutable=["batch_stats"]))
        _, updated = apply(variables, images)
        for a, b in zip(before, jax.tree.leaves(updated["batch_stats"]), strict=True):
            assert np.any(np.asarray(a != b)) == train


GROUPS = {"a": 2, "b": 3, "c": 1}
HEADS = {"a": ("segmentation",), "b": ("projection", "segmentation"), "c": ("projection",)}


def grouped_images():
    images, first = random_images((6, 16, 16)), 0
    found = {}
    for group, number in GROUPS.items():
        found[group] = images[first : first + number]
        first += number
    return images, found


def test_net_is_one_pass_over_all_groups():
    """Outputs and statistics are those of the model on all slices together, as one batch."""
    model = models.UNet(**TINY)
    variables = random_variables(model)
    images, groups = grouped_images()
    out, statistics = jax.jit(lambda v, x: models.Net(model)(*v, x, HEADS))(
        (variables["params"], variables["batch_stats"]), groups
    )
    assert {group: set(heads) for group, heads in out.items()} == {
        group: set(names) for group, names in HEADS.items()
    }

    def by_hand(variables, images):
        run = functools.partial(model.apply, variables, train=True, mutable=["batch_stats"])
        levels, updates = run(images, method="trunk")
        own = {"segmentation": slice(0, 5), "projection": slice(2, 6)}
        found = {}
        for name, rows in own.items():
            found[name], updated = run(tuple(x[rows] for x in levels), name, method="head")
            updates["batch_stats"][f"{name}_head"] = updated["batch_stats"][f"{name}_head"]
        return found, updates["batch_stats"]

    expected, expected_statistics = jax.jit(by_hand)(variables, images)
    parts = {
        "segmentation": {"a": slice(0, 2), "b": slice(2, 5)},
        "projection": {"b": slice(0, 3), "c": slice(3, 4)},
    }
    for name, rows in parts.items():
        for group, own in rows.items():
            np.testing.assert_allclose(out[group][name], expected[name][own], rtol=1e-4, atol=1e-5)
    assert jax.tree.structure(statistics) == jax.tree.structure(variables["batch_stats"])
    for a, b in zip(
        *map(jax.tree.leaves, (statistics, {k: expected_statistics[k] for k in statistics})),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_head_that_does_not_run_keeps_its_statistics():
    model = models.UNet(**TINY)
    variables = random_variables(model)
    images = {"a": random_images()}
    _, statistics = models.Net(model)(
        variables["params"], variables["batch_stats"], images, {"a": ("segmentation",)}
    )
    before = variables["batch_stats"]
    assert statistics["projection_head"] is before["projection_head"]
    for name in ("unet_trunk", "segmentation_head"):
        first = [tree[name]["ConvBlock_0"]["BatchNorm_0"]["mean"] for tree in (statistics, before)]
        assert np.any(first[0] != first[1])


def kept(axis_name=None):
    """`Net`'s factors [n, 1, 1, F] by level, of n slices on one device."""
    net = models.Net(models.UNet(3, filters=(64, 32), axis_name=axis_name))
    return lambda key, number: net._keep(key, number)


def test_dropout_drops_half_of_each_slice_s_channels_and_doubles_the_rest():
    factors = kept()(jax.random.key(0), 50)
    assert [f.shape for f in factors] == [(50, 1, 1, 64), (50, 1, 1, 32)]
    for factor in factors:
        assert set(np.unique(factor)) == {0.0, 2.0}
        # A fair coin: five standard deviations about 1, of 3200 and 1600 tosses.
        assert abs(np.mean(factor) - 1) < 5 / np.sqrt(factor.size)
        assert len(np.unique(np.asarray(factor)[:, 0, 0], axis=0)) == 50  # each slice its own
    assert all(np.all(f == 1) for f in kept()(None, 3))


def test_dropout_does_not_depend_on_the_number_of_devices():
    one = kept()(jax.random.key(4), 8)
    four = jax.vmap(lambda _: kept("devices")(jax.random.key(4), 2), axis_name="devices")(
        jnp.arange(4)
    )
    # vmap in_axes None would hide a key without the device in it.
    for a, b in zip(one, four, strict=True):
        np.testing.assert_array_equal(np.asarray(b).reshape(a.shape), a)


def test_dropout_reaches_the_groups_that_ask_for_it():
    """Those without a key are as without dropout, but for BatchNorm, which sees all together."""
    model = models.UNet(3, filters=(4, 8))
    variables = random_variables(model)
    seen = []

    def record(next_function, arguments, options, context):
        if isinstance(context.module, models.Trunk) and context.method_name == "__call__":
            seen.append(options["keep"])
        return next_function(*arguments, **options)

    images = {"a": random_images(), "b": random_images((3, 16, 16))}
    heads = {group: ("segmentation",) for group in images}
    with nn.intercept_methods(record):
        plain, _ = models.Net(model)(*map(variables.get, ("params", "batch_stats")), images, heads)
        dropped, _ = models.Net(model)(
            *map(variables.get, ("params", "batch_stats")),
            images,
            heads,
            dropout={"b": jax.random.key(0)},
        )
    assert seen[0] is None
    for factor in seen[1]:
        assert np.all(factor[:2] == 1) and set(np.unique(factor[2:])) == {0.0, 2.0}
    assert np.any(plain["b"]["segmentation"] != dropped["b"]["segmentation"])


def test_encoder_features_are_scaled_by_the_given_factors():
    """All 1: as without. All 0: no image reaches any level, so all slices come out alike."""
    model = models.UNet(3, filters=(4, 8))
    variables = random_variables(model)
    trunk = functools.partial(model.apply, variables, train=False, method="trunk")
    images = random_images()
    ones = [np.ones((2, 1, 1, f), np.float32) for f in (4, 8)]
    for a, b in zip(trunk(images, keep=ones), trunk(images), strict=True):
        np.testing.assert_array_equal(a, b)
    for level in trunk(images, keep=[0 * f for f in ones]):
        np.testing.assert_array_equal(level[0], level[1])
    # Dropped in one slice, kept in the other.
    half = [f * np.array([0, 1], np.float32).reshape(2, 1, 1, 1) for f in ones]
    for a, b, c in zip(
        trunk(images, keep=half), trunk(images), trunk(images[::-1], keep=half), strict=True
    ):
        np.testing.assert_array_equal(a[1], b[1])
        np.testing.assert_array_equal(a[0], c[0])
