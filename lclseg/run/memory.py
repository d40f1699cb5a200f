"""How much memory a training step takes, told before any work is lost."""

import os
from pathlib import Path

import jax
from ml_collections import ConfigDict

from lclseg.run.config_checks import ConfigError

# Bytes for each slice, pixel and filter of the U-Net's first level, in float32: what XLA lays out
# for a step of the default model on CPU (96 and 192 px, 4 to 12 slices: 88 to 97), and for a
# prediction (18). The levels below the first add the same share at every size.
STEP_BYTES, PREDICTION_BYTES = 97, 18
CGROUP = Path("/sys/fs/cgroup/memory.max")
GIB = 2**30


def step_bytes(config: ConfigDict) -> int:
    """Measures bytes over all devices of the larger one of a joint step and a prediction."""
    data = config.data
    pixels = data.image_size**2 * config.model.filters[0]
    unlabeled = data.unlabeled_batch_size
    if "pairs" in config.method:
        unlabeled = 2 * sum(config.method.pairs.values())
    views = unlabeled if config.rounds.num_rounds else 0
    step = (data.labeled_batch_size + views) * pixels * STEP_BYTES
    prediction = data.eval_batch_size * pixels * PREDICTION_BYTES
    return max(step, prediction) // (2 if config.model.dtype == "bfloat16" else 1)


def available_bytes() -> int:
    """Reads the memory of all devices; of CPUs the machine's, or what it grants this process."""
    devices = jax.devices()
    limits = [(d.memory_stats() or {}).get("bytes_limit") for d in jax.local_devices()]
    if devices[0].platform != "cpu" and all(limits):
        return len(devices) * min(limit for limit in limits if limit)
    own = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    granted = CGROUP.read_text().strip() if CGROUP.is_file() else "max"
    own = own if granted == "max" else min(own, int(granted))
    return own * jax.process_count()


def check_memory(config: ConfigDict, available: int) -> None:
    """Raises ConfigError where a step takes more bytes than there are."""
    needed = step_bytes(config)
    if needed > available:
        data = config.data
        raise ConfigError(
            f"a step takes about {needed / GIB:.1f} GiB, with data.image_size={data.image_size}, "
            f"data.labeled_batch_size={data.labeled_batch_size} and its unlabelled slices; wanted "
            f"at most the {available / GIB:.1f} GiB of "
            f"{jax.device_count()} {jax.devices()[0].platform} device(s): take smaller batches "
            "(data.labeled_batch_size, data.unlabeled_batch_size or method.pairs, "
            "data.eval_batch_size), a coarser grid "
            "(data.target_spacing_mm with data.image_size), or more devices"
        )
