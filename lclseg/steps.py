"""Pure training and prediction steps: functions of a TrainState, ready for jit or pmap.

The steps know the name of the device axis, and a method by its contract only (methods/contract.py).
Letters: n local slices of a group, H W pixels, C classes, R stored slices.

Gradients over devices: each device differentiates its local *sum* divided by the global count, then
gradients are summed over devices. BatchNorm averages its statistics over devices inside the forward
pass, and the reverse of that average is part of the gradient: N devices give the gradient of one.
"""

import functools
import math
import operator
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import special

from lclseg import test_time
from lclseg.crf import upsampled_dense_crf
from lclseg.losses import IGNORE
from lclseg.methods.contract import Augment, Slices, Term
from lclseg.models import BATCH_NORM_MOMENTUM, Net, UNet
from lclseg.random_keys import named_key, slice_keys

Array = jax.Array


class TrainState(flax.struct.PyTreeNode):
    """What training changes; a step maps one to the next.

    Attributes:
      step: int32 scalar, counts over all stages of a run; with the seed it names every random draw.
      stage: [2] int32, first step of the stage and its number of steps: where a ramp-up stands.
      params: of the U-Net and its heads, float32; of several networks a leading axis.
      batch_stats: BatchNorm's running statistics, likewise.
      opt_state: of the optimiser; fresh in each stage.
      ema_params: exponential moving average of `params`; what evaluation and pseudo-labels use.
      memory: what the method keeps between steps.
    """

    step: Array
    stage: Array
    params: Any
    batch_stats: Any
    opt_state: Any
    ema_params: Any
    memory: Any = ()

    @property
    def progress(self) -> Array:
        """How much of the stage is done, float32 in [0, 1)."""
        return (self.step - self.stage[0]) / jnp.maximum(self.stage[1], 1)


class Store(NamedTuple):
    """All slices that training may draw, on the device; a batch is rows of it.

    Attributes:
      image: [R, H, W] float32.
      label: [R, H, W] uint8: ground truth of labelled slices, pseudo-labels, IGNORE elsewhere. The
        ground truth of unlabelled slices is not in it.
      is_labeled: [R] bool.
    """

    image: Array
    label: Array
    is_labeled: Array


def create_train_state(
    key: Array,
    model: UNet,
    optimizer: optax.GradientTransformation,
    *,
    image_size: int,
    networks: int = 1,
    num_channels: int = 1,
    init_memory: Callable[[Any], Any] = lambda params: (),
) -> TrainState:
    """Makes a state at step 0; raises ValueError if the image size does not fit the model.

    Kernels are He-normal (normal truncated at 2 sigma, variance 2 / fan_in, as Flax has it),
    BatchNorm starts as the identity. Each kernel is drawn by its own path, so that a further head
    moves no other one; and by NumPy: a random-number program a kernel compiles for ten seconds.

    Args:
      key: random key.
      model, optimizer: static.
      image_size: H = W.
      networks: above 1, so many independent networks along a leading axis.
      init_memory: of the method.
    """
    slices = jax.ShapeDtypeStruct((1, image_size, image_size, num_channels), jnp.float32)
    shapes = jax.eval_shape(functools.partial(model.init, train=False), key, slices)
    seed = jax.random.key_data(key).tolist()

    def initial(number, path, leaf):
        match path[-1].key:
            case "kernel":
                name = jax.tree_util.keystr(path) + (f" of {number}" if number else "")
                rng = np.random.default_rng([*seed, zlib.crc32(name.encode())])
                normal = truncated_normal(rng, leaf.shape)
                return jnp.asarray(normal * np.sqrt(2 / math.prod(leaf.shape[:-1])), leaf.dtype)
            case "scale" | "var":
                return jnp.ones(leaf.shape, leaf.dtype)
            case "bias" | "mean":
                return jnp.zeros(leaf.shape, leaf.dtype)
        raise AssertionError(f"no rule to initialise {jax.tree_util.keystr(path)}")

    def draw(tree):
        drawn = [
            jax.tree_util.tree_map_with_path(functools.partial(initial, number), tree)
            for number in range(networks)
        ]
        return drawn[0] if networks == 1 else jax.tree.map(lambda *x: jnp.stack(x), *drawn)

    params = draw(shapes["params"])
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        stage=jnp.zeros((2,), jnp.int32),
        params=params,
        batch_stats=draw(shapes["batch_stats"]),
        opt_state=optimizer.init(params),
        ema_params=jax.tree.map(jnp.copy, params),
        memory=init_memory(params),
    )


def truncated_normal(rng: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
    """Draws normal numbers, none beyond 2 sigma, scaled to a standard deviation of 1; float64."""
    low, high = special.ndtr([-2.0, 2.0])
    # 0.8796 is the standard deviation of a normal truncated at 2 sigma.
    return special.ndtri(rng.uniform(low, high, shape)) / 0.87962566103423978


def warm_start(state: TrainState, fresh: TrainState, *, fresh_heads: bool) -> TrainState:
    """Takes weights and BatchNorm statistics from `state`; what it lacks from `fresh`.

    The weights are `state.ema_params`, those that validation chose.

    Args:
      state: of the stage before.
      fresh: with all heads of the stage to come.
      fresh_heads: take the trunk alone from `state`, and all heads from `fresh`.
    """
    taken = [n for n in state.ema_params if n == "unet_trunk" or not fresh_heads]
    return state.replace(
        ema_params={**fresh.params, **{n: state.ema_params[n] for n in taken}},
        batch_stats={**fresh.batch_stats, **{n: state.batch_stats[n] for n in taken}},
    )


def restart(
    state: TrainState,
    optimizer: optax.GradientTransformation,
    *,
    first_step: int,
    num_steps: int,
    init_memory: Callable[[Any], Any] = lambda params: (),
) -> TrainState:
    """Starts a stage at `first_step` from the averaged weights of `state`, all else fresh."""
    params = jax.tree.map(jnp.copy, state.ema_params)
    return state.replace(
        step=jnp.asarray(first_step, jnp.int32),
        stage=jnp.asarray([first_step, num_steps], jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        memory=init_memory(params),
    )


def gather(store: Store, rows: Mapping[str, Array]) -> dict[str, Slices]:
    """Gathers the groups of a batch: rows [n] of the store by group."""
    return {
        group: Slices(store.image[r], store.label[r], store.is_labeled[r])
        for group, r in rows.items()
    }


def make_views(
    key: Array,
    groups: Mapping[str, Slices],
    views: Mapping[str, tuple[str, Augment]],
    axis_name: str | None,
) -> dict[str, Slices]:
    """Augments the groups of a batch into the views of a method; see `Method.views`.

    A slice without any label has none after it either: what a move brings in is no background.
    """
    found = dict(groups)
    for name, (source, augment) in views.items():
        slices = found[source]
        keys = slice_keys(named_key(key, name), len(slices.image), axis_name)
        image, label = jax.vmap(augment)(keys, slices.image, slices.label)
        has_label = jnp.any(slices.label != IGNORE, axis=(1, 2), keepdims=True)
        label = jnp.where(has_label, label, IGNORE)
        found[name] = Slices(image, label, slices.is_labeled)
    return found


def _sum_over(x, axis_name: str | None):
    return x if axis_name is None else jax.lax.psum(x, axis_name)


def total_loss(terms: Mapping[str, Term], axis_name: str | None) -> tuple[Array, dict[str, Array]]:
    """Computes this device's share of the loss, and of each term before its weight.

    loss = sum over terms of weight x total / number, total and number over all devices.
    """
    numbers = _sum_over({name: term.number for name, term in terms.items()}, axis_name)
    parts = {name: term.total / jnp.maximum(numbers[name], 1) for name, term in terms.items()}
    weighted = [term.weight * parts[name] for name, term in terms.items()]
    return functools.reduce(operator.add, weighted), parts


def train_step(
    state: TrainState,
    store: Store,
    rows: Mapping[str, Array],
    key: Array,
    *,
    net: Net,
    terms: Callable,
    views: Mapping[str, tuple[str, Augment]],
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    remember: Callable[[Any, Any, Array], Any] = lambda memory, params, step: memory,
) -> tuple[TrainState, dict[str, Array]]:
    """Does one step: gather, augment, the method's terms, gradients, Adam, averaged weights.

    Args:
      state: the state before the step.
      store: the slices.
      rows: [n] int32 by group: this device's share of the global batch.
      key: the key of all steps of the run; the state's step is folded in.
      net, optimizer: static.
      terms, views, remember: of the method; see `methods.contract.Method`.
      ema_decay: of the averaged weights; 0 makes them equal to the weights.

    Returns:
      The new state and scalar metrics of the global batch: `loss`, `gradient_norm` and each term.
    """
    axis_name = net.axis_name
    key = jax.random.fold_in(key, state.step)
    batch = make_views(named_key(key, "views"), gather(store, rows), views, axis_name)

    def loss_fn(params):
        found, batch_stats = terms(net, params, state, batch, named_key(key, "terms"))
        loss, parts = total_loss(found, axis_name)
        return loss, ({"loss": loss, **parts}, batch_stats)

    grads, (metrics, batch_stats) = jax.grad(loss_fn, has_aux=True)(state.params)
    grads, metrics = _sum_over((grads, metrics), axis_name)
    metrics["gradient_norm"] = optax.tree.norm(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    new_state = state.replace(
        step=state.step + 1,
        params=params,
        batch_stats=batch_stats,
        opt_state=opt_state,
        ema_params=optax.incremental_update(params, state.ema_params, 1 - ema_decay),
        memory=remember(state.memory, params, state.step),
    )
    return new_state, metrics


def train_steps(
    state: TrainState,
    store: Store,
    rows: Mapping[str, Array],
    num_steps: Array,
    key: Array,
    *,
    step: Callable,
) -> tuple[TrainState, dict[str, Array]]:
    """Does many steps in one dispatch.

    Args:
      state, store, key: as in `train_step`.
      rows: [L, n] by group; L steps at most.
      num_steps: int32 scalar in 1..L; any number runs the same program.
      step: `train_step` with all that is static.

    Returns:
      The new state, and the metrics of the last step, or of the first one with a metric that is
      not finite; `first_not_finite` is its place, from 0, and `num_steps` where there is none.
    """
    shapes = jax.eval_shape(step, state, store, {g: r[0] for g, r in rows.items()}, key)[1]
    metrics = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def body(i, carry):
        state, kept, first = carry
        state, metrics = step(state, store, {g: r[i] for g, r in rows.items()}, key)
        finite = jnp.all(jnp.array([jnp.isfinite(m) for m in metrics.values()]))
        found = first < num_steps
        metrics = jax.tree.map(functools.partial(jnp.where, found), kept, metrics)
        return state, metrics, jnp.where(finite | found, first, i)

    carry = (state, metrics, num_steps)
    state, metrics, first = jax.lax.fori_loop(0, num_steps, body, carry)
    return state, {**metrics, "first_not_finite": first}


def batch_statistics(
    state: TrainState,
    store: Store,
    rows: Mapping[str, Array],
    key: Array,
    *,
    net: Net,
    terms: Callable,
    views: Mapping[str, tuple[str, Augment]],
) -> Any:
    """Computes BatchNorm's statistics of one training batch under the averaged weights.

    Their mean over some batches takes the place of the running statistics, which lag behind by 100
    steps and were gathered under other weights (Izmailov et al., *Averaging weights leads to wider
    optima*, 2018: an average of weights needs statistics of its own).

    Args:
      state, store, rows, net, terms, views: as in `train_step`.
      key: of the batch.

    Returns:
      A tree like `state.batch_stats`; what the batch does not reach is that of `state`.
    """
    batch = make_views(named_key(key, "views"), gather(store, rows), views, net.axis_name)
    zeros = jax.tree.map(jnp.zeros_like, state.batch_stats)
    from_zero = state.replace(batch_stats=zeros)
    _, updated = terms(net, state.ema_params, from_zero, batch, named_key(key, "terms"))
    # From zero, a running statistic has moved by 1 - momentum of the batch's. What no pass reached
    # is handed through, as the very object.
    return {
        name: state.batch_stats[name]
        if updated[name] is zeros[name]
        else jax.tree.map(lambda x: x / (1 - BATCH_NORM_MOMENTUM), updated[name])
        for name in zeros
    }


def predict_step(
    state: TrainState, images: Array, *, model: UNet, angles: Sequence[float] = ()
) -> Array:
    """Predicts class probabilities [B, H, W, C] of slices [B, H, W], by the averaged weights.

    With `angles`, radians, the mean over turned copies; see `test_time.mean_over_copies`.
    """

    def run(module, x):
        return module.head(module.trunk(x, train=False), "segmentation", train=False)

    def predict(x):
        return jax.nn.softmax(nn.apply(run, model)(variables, x), axis=-1)

    variables = {"params": state.ema_params, "batch_stats": state.batch_stats}
    return test_time.mean_over_copies(predict, images, angles)


def refine_step(images: Array, probs: Array, **settings) -> Array:
    """Refines class probabilities [B, H, W, C] by slices [B, H, W]; see `upsampled_dense_crf`."""
    return upsampled_dense_crf(images, probs, **settings)


def first_network(state: TrainState) -> TrainState:
    """Takes of several networks the first one, ready to predict."""
    first = functools.partial(jax.tree.map, lambda x: x[0])
    return state.replace(
        params={},
        ema_params=first(state.ema_params),
        batch_stats=first(state.batch_stats),
        opt_state=(),
        memory=(),
    )
