"""One program on every device: pmap, and the processes' set-up of JAX.

This is the only module that maps steps over devices; `steps` knows the name of the axis alone.
"""

import functools
import logging
import threading
from collections.abc import Callable
from pathlib import Path

import absl.logging
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lclseg import steps
from lclseg.data.grid import first_channel
from lclseg.evaluation import Predict
from lclseg.models import UNet
from lclseg.run import multihost
from lclseg.run.stopping import Interrupted

AXIS = "devices"
logger = logging.getLogger("lclseg")


def set_up_jax(num_cpu_devices: int) -> None:
    """Logging, the compilation cache and CPU devices; runs before JAX's first computation."""
    # Orbax and TFDS log by the page, and raise what they log as errors.
    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    threading.excepthook = tell_of_thread
    logger.setLevel(logging.INFO)
    cache = Path("~/.cache/lclseg/xla").expanduser()
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_num_cpu_devices", num_cpu_devices)


def tell_of_thread(failed: threading.ExceptHookArgs) -> None:
    """One line where the disk stopped a thread (TensorBoard's), instead of a traceback."""
    if issubclass(failed.exc_type, OSError):
        logger.warning("a thread that writes files stopped: %s", failed.exc_value)
    else:
        threading.__excepthook__(failed)


def over_devices(step: Callable, *, donate_state: bool) -> Callable:
    """step(state, batch, key), compiled; state and batch have a leading axis of local devices.

    `donate_state`: the state's memory is used again, and the state given cannot be.
    """
    return jax.pmap(
        step,
        axis_name=AXIS,
        in_axes=(0, 0, None),
        devices=multihost.devices(),
        donate_argnums=(0,) if donate_state else (),
    )


def replicate(state: steps.TrainState) -> steps.TrainState:
    """One copy per device of this process, placed as the compiled steps return it.

    `flax.jax_utils.replicate` names its device axis differently: the second step would be compiled
    anew.
    """
    devices = jax.local_devices()
    sharding = NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec(AXIS))

    def place(x):
        return jax.device_put(np.broadcast_to(np.asarray(x), (len(devices), *x.shape)), sharding)

    return jax.tree.map(place, state)


def compiled_predict(model: UNet) -> Callable:
    """(replicated state, images [N, M, H, W]) -> probabilities [N, M, H, W, C]."""
    devices = jax.local_devices()
    return jax.pmap(functools.partial(steps.predict_step, model=model), devices=devices)


def batched_predictor(
    compiled: Callable,
    state: steps.TrainState,
    *,
    batch_size: int,
    refine: Callable | None = None,
    stop_asked: Callable[[], bool] = lambda: False,
) -> Predict:
    """Maps any number of slices [M, H, W] or [M, H, W, K] to probabilities [M, H, W, C].

    One compiled shape, of this process' devices; a part of it that M does not fill is padding.

    Args:
      compiled: see `compiled_predict`.
      state: whose averaged weights and statistics predict.
      batch_size: slices at once, over these devices; rounded up to a multiple of their number.
      refine: maps (slices [M, H, W], of the first channel, probabilities) to the probabilities
        returned.
      stop_asked: where it gives True, `Interrupted` is raised.
    """
    num_devices = jax.local_device_count()
    per_device = -(-batch_size // num_devices)
    capacity = per_device * num_devices
    replicated = replicate(state)

    def forward(images: np.ndarray) -> np.ndarray:
        shape = images.shape[1:]
        probs = compiled(replicated, images.reshape(num_devices, per_device, *shape))
        return np.asarray(probs).reshape(*images.shape[:3], -1)

    def predict_chunk(images: np.ndarray) -> np.ndarray:
        padding = np.zeros((capacity - len(images), *images.shape[1:]), images.dtype)
        full = np.concatenate([images, padding])
        probs = forward(full)
        if refine is not None:
            probs = np.asarray(refine(first_channel(full), probs))
        return probs[: len(images)]

    def predict(images: np.ndarray) -> np.ndarray:
        if stop_asked():
            raise Interrupted("stopped while predicting volumes, which starts anew")
        chunks = [images[i : i + capacity] for i in range(0, len(images), capacity)]
        return np.concatenate([predict_chunk(chunk) for chunk in chunks])

    return predict
