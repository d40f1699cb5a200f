"""One program on every device: pmap, and the processes' set-up of JAX.

This is the only module that maps steps over devices; `steps` knows the name of the axis alone.
"""

import functools
import inspect
import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import absl.logging
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lclseg import steps
from lclseg.evaluation import Predict
from lclseg.models import UNet
from lclseg.run import multihost
from lclseg.run.stopping import Interrupted

AXIS = "devices"
logger = logging.getLogger("lclseg")


def set_up_jax(num_cpu_devices: int) -> None:
    """Sets up logging, compilation cache and CPU devices; runs before JAX's first computation."""
    # Orbax and TFDS log by the page, and raise what they log as errors.
    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    threading.excepthook = tell_of_thread
    logger.setLevel(logging.INFO)
    cache = Path("~/.cache/lclseg/xla").expanduser()
    jax.config.update("jax_compilation_cache_dir", str(cache))
    # By default what compiles in a second is not kept; the many small programs take several.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_num_cpu_devices", num_cpu_devices)


def tell_of_thread(failed: threading.ExceptHookArgs) -> None:
    """Prints one line where the disk stopped a thread (TensorBoard's), instead of a traceback."""
    if issubclass(failed.exc_type, OSError):
        logger.warning("a thread that writes files stopped: %s", failed.exc_value)
    else:
        threading.__excepthook__(failed)


def over_devices(step: Callable, *, donate_state: bool) -> Callable:
    """Compiles step(state, store, rows, ..., key); all but what follows the rows is per device.

    State, store and rows have a leading axis of local devices; what follows is the same on all.
    `donate_state`: the state's memory is used again, and the state given cannot be.
    """
    kinds = [p.kind for p in inspect.signature(step).parameters.values()]
    num_shared = kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD) - 3
    return jax.pmap(
        step,
        axis_name=AXIS,
        in_axes=(0, 0, 0, *([None] * num_shared)),
        devices=multihost.devices(),
        donate_argnums=(0,) if donate_state else (),
    )


def steps_per_dispatch(log_every: int) -> int:
    """Chooses how many steps one dispatch takes: all up to the next log line; on CPUs one.

    XLA's convolutions on CPUs are several times slower within a loop (jax-ml/jax#12868).
    """
    return 1 if jax.default_backend() == "cpu" else log_every


def replicate(tree: Any) -> Any:
    """Makes one copy per device of this process, placed as the compiled steps return it.

    `flax.jax_utils.replicate` names its device axis differently: the second step would be compiled
    anew.
    """
    devices = jax.local_devices()
    sharding = NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec(AXIS))

    def place(x):
        return jax.device_put(np.broadcast_to(np.asarray(x), (len(devices), *x.shape)), sharding)

    return jax.tree.map(place, tree)


def unreplicate(tree: Any) -> Any:
    """Takes the first local device's copy.

    Not `x[0]`, which is an all-reduce over the devices for each leaf: many of them at once may each
    hold a core, and wait for their other devices for ever.
    """
    return jax.tree.map(lambda x: x.addressable_data(0)[0], tree)


def share(records: np.ndarray) -> np.ndarray:
    """Takes this process' share of rows [..., n]: [devices, ..., n / all devices]."""
    own = np.split(records, jax.process_count(), axis=-1)[jax.process_index()]
    return np.stack(np.split(own, jax.local_device_count(), axis=-1)).astype(np.int32)


def memory_bytes() -> int:
    """Reads the memory of one local device; on CPUs, where it is the host's, takes 2 GiB."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit", 2**31)


def peak_memory_bytes() -> int | None:
    """Reads the most that one local device has held; None where the backend does not count."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use")


def on_each(function: Callable) -> Callable:
    """Compiles a function of arrays; all arguments have a leading axis of local devices."""
    return jax.pmap(function, devices=jax.local_devices())


def compiled_predict(model: UNet, angles: Sequence[float] = ()) -> Callable:
    """Compiles (replicated state, images [N, M, H, W]) -> probabilities [N, M, H, W, C].

    With `angles`, radians, means over turned copies; see `test_time.mean_over_copies`.
    """
    return on_each(functools.partial(steps.predict_step, model=model, angles=angles))


@functools.cache  # or each would compile its own
def _compiled_crf(**settings) -> Callable:
    return on_each(functools.partial(steps.refine_step, **settings))


def batched_crf(**settings) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Maps slices [M, H, W] and probabilities [M, H, W, C], for any M, to refined probabilities.

    By this process' devices; see `crf.upsampled_dense_crf` for the settings, and for the result,
    [M, f H, f W, C].
    """
    # A volume may have ten slices. On CPUs what pads a batch takes as long as they do; an
    # accelerator does all at once.
    at_once = 4 if jax.default_backend() == "cpu" else 16
    return _in_batches(_compiled_crf(**settings), at_once)


def batched_predictor(
    compiled: Callable,
    replicated: steps.TrainState,
    *,
    batch_size: int,
    finish: Callable | None = None,
    stop_asked: Callable[[], bool] = lambda: False,
) -> Predict:
    """Maps any number of slices [M, H, W] or [M, H, W, K] to probabilities [M, H, W, C].

    Or to what `finish` makes of them. One compiled shape, of this process' devices; a part of it
    that M does not fill is padding.

    Args:
      compiled: see `compiled_predict`.
      replicated: state whose averaged weights and statistics predict, a copy per device.
      batch_size: slices at once, over these devices; rounded up to a multiple of their number.
      finish: maps probabilities [N, M, H, W, C] to what comes to the host instead, [N, M, ...];
        see `on_each`.
      stop_asked: where it gives True, `Interrupted` is raised.
    """

    def run(images: jax.Array) -> jax.Array:
        found = compiled(replicated, images)
        return found if finish is None else finish(found)

    in_batches = _in_batches(run, batch_size)

    def predict(images: np.ndarray) -> np.ndarray:
        if stop_asked():
            raise Interrupted("stopped while predicting volumes, which starts anew")
        return in_batches(images)

    return predict


def _in_batches(compiled: Callable, batch_size: int) -> Callable[..., np.ndarray]:
    """A function of arrays [N, M, ...], one compiled shape, as one of arrays [any number, ...]."""
    num_devices = jax.local_device_count()
    per_device = -(-batch_size // num_devices)
    capacity = per_device * num_devices

    def shared(array: np.ndarray) -> np.ndarray:
        padding = np.zeros((capacity - len(array), *array.shape[1:]), array.dtype)
        return np.concatenate([array, padding]).reshape(num_devices, per_device, *array.shape[1:])

    def one_batch(*arrays: np.ndarray) -> np.ndarray:
        found = compiled(*map(shared, arrays))
        return np.asarray(found).reshape(capacity, *found.shape[2:])[: len(arrays[0])]

    def every_batch(*arrays: np.ndarray) -> np.ndarray:
        starts = range(0, len(arrays[0]), capacity)
        return np.concatenate([one_batch(*(a[i : i + capacity] for a in arrays)) for i in starts])

    return every_batch
