"""A real run of lclseg on synthetic volumes, stopped where training would begin.

Everything is what `python -m lclseg.main` would use: config, prepared set, compiled steps, slices.
The pseudo-labels are the ground truth, written as a round's would be.
"""

import runpy
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks import harness
from lclseg.pseudo_labels import PseudoLabels
from lclseg.random_keys import named_key
from lclseg.run import devices
from lclseg.run.setup import Run, start_run
from lclseg.run.store import DeviceSlices
from lclseg.stage import slices_of
from lclseg.steps import Store, TrainState

FIELD_MM = 128  # of the grid, in-plane


def config(
    folder: Path,
    *,
    size: int,
    num_volumes: int,
    num_cpu_devices: int,
    method: str = "local_contrastive",
) -> ConfigDict:
    """The paper's model, losses and batches on `num_volumes` phantoms at `size` px.

    One volume each is labelled, for validation and for the test; the rest is the unlabelled pool.
    """
    result = runpy.run_path(str(harness.ROOT / "configs" / "default.py"))["get_config"](method)
    result.num_cpu_devices = num_cpu_devices
    data = result.data
    data.name, data.data_dir = "phantom", str(folder / "data")
    data.image_size, data.target_spacing_mm = size, FIELD_MM / size
    ids = [f"phantom_{i:03d}" for i in range(num_volumes)]
    data.labeled, data.validation, data.test = (ids[0],), (ids[1],), (ids[2],)
    data.unlabeled = tuple(ids[3:])
    return result


def set_num_volumes(num_volumes: int) -> None:
    """The phantom builder makes so many volumes from here on."""
    from tfds_builders.phantom import phantom_dataset_builder as builder

    cases = builder.find_cases(num_volumes)
    builder.find_cases = lambda: cases


def start(config: ConfigDict, workdir: Path, *, num_volumes: int) -> tuple[Run, DeviceSlices]:
    """A run, and the slices that its last stage draws; `DeviceSlices.load` them before a step."""
    set_num_volumes(num_volumes)
    run = start_run(config, workdir)
    pseudo_labels = truth_of_pool(run) if run.method.offline else None
    return run, slices_of(run, last_kind(run), pseudo_labels)


def last_kind(run: Run) -> str:
    """Of the last stage: supervised training has the first alone."""
    return "joint" if run.method.sampler else "first"


class Steps:
    """Training steps of the last stage, each from the weights that the one before it left.

    All take the same slices, `store` and `rows`, of `DeviceSlices.batch`. `metrics` holds those of
    the last step, of each device.
    """

    def __init__(self, run: Run, state: TrainState, store: Store, rows: Mapping[str, np.ndarray]):
        self._program = run.programs[last_kind(run)]
        self._state = devices.replicate(state)
        self._inputs = store, rows, named_key(run.key, "steps")

    def take(self, num_steps: int) -> float:
        """Takes `num_steps` steps; returns the seconds of one."""

        def work():
            for _ in range(num_steps):
                self._state, self.metrics = self._program.train(self._state, *self._inputs)
            jax.block_until_ready((self._state, self.metrics))

        return harness.timed(work) / num_steps


def truth_of_pool(run: Run) -> PseudoLabels:
    """The pool's ground truth, as pseudo-labels of a round."""
    entries = [run.prepared.volumes[v] for v in run.split.unlabeled]
    entries.sort(key=lambda e: e.first_slice)  # records ascending, as a round's are
    records = np.concatenate([np.asarray(e.slices) for e in entries])
    size = run.config.data.image_size
    path = run.workdir / "labels.npy"
    if not path.exists():
        labels = np.lib.format.open_memmap(
            path, mode="w+", dtype=np.uint8, shape=(len(records), size, size)
        )
        row = 0
        for entry in entries:  # volume by volume: memory must not grow with the set
            labels[row : row + len(entry.slices)] = run.prepared.read_slices(entry.slices)[1]
            row += len(entry.slices)
        labels.flush()
    return PseudoLabels(
        folder=run.workdir,
        records=records,
        labels=np.load(path, mmap_mode="r"),
        class_pixels=np.concatenate([e.class_pixels for e in entries]),
        report={},
    )
