"""What stays the same throughout a run: config, data, workdir, model and compiled programs."""

import dataclasses
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import jax
from ml_collections import ConfigDict

from lclseg import steps
from lclseg.class_groups import Kind, names_of
from lclseg.cores import usable_cores
from lclseg.data import case_files, own_data, preprocess
from lclseg.data.builder_options import options_of
from lclseg.data.dataset import PreparedSet, open_builder, open_prepared, preprocessing_of
from lclseg.data.splits import Split, resolve_split
from lclseg.errors import ConfigError
from lclseg.evaluation import classes_in_one_piece
from lclseg.methods.base import base_of, method_of
from lclseg.methods.contract import Method
from lclseg.models import UNet
from lclseg.random_keys import named_key
from lclseg.run import devices, memory, multihost, start_from
from lclseg.run.config_checks import (
    check_classes,
    check_config,
    units_per_batch,
)
from lclseg.run.programs import Programs, compile_programs, copy_angles, first_method, stages
from lclseg.run.stored_config import (
    MACHINE_KEYS,
    differing_keys,
    to_store,
)
from lclseg.run.workdir import claim_workdir, write_json

MIN_POOL = 2  # slices: views of pairs are drawn from so many at least
logger = logging.getLogger("lclseg")


@dataclasses.dataclass(frozen=True)
class Run:
    """What stays the same throughout a run.

    Attributes:
      config: resolved and frozen.
      workdir: everything is written below it.
      prepared: the data set.
      split: volume ids by role.
      model: the U-Net.
      one_piece: classes that are one piece in all masks of labelled volumes, and first all of them
        together, where these are.
      method: what is trained after the first stage; its contract: `methods.contract.Method`.
      key: the run's random key; `random_keys.named_key` gives each purpose its own.
      programs: by kind of stage, "first" and "joint".
      predict: (replicated state, images [N, M, H, W]) -> probs [N, M, H, W, C], compiled.
      predict_mean: the same, as the mean over turned copies of each slice.
      stop_asked: whether the run shall stop as soon as nothing is lost.
      lock: holds the workdir against other runs until it is closed, see `workdir.lock`.
    """

    config: ConfigDict
    workdir: Path
    prepared: PreparedSet
    split: Split
    one_piece: tuple[Kind, ...]
    model: UNet
    method: Method
    key: jax.Array
    programs: dict[str, Programs]
    predict: Callable
    predict_mean: Callable
    stop_asked: Callable[[], bool]
    lock: TextIO

    def classes_in_one_piece(self, choice: str) -> tuple[Kind, ...]:
        """Finds the classes of which the largest component is kept, by a config's choice."""
        return {
            "no": (),
            "yes": tuple(range(1, self.prepared.num_classes)),
            "by_masks": tuple(k for k in self.one_piece if not isinstance(k, tuple)),
            "together_by_masks": self.one_piece,
        }[choice]


def set_up_process(config: ConfigDict) -> None:
    """Sets up logging, the compilation cache, CPU devices, and other processes of a cluster.

    Runs before JAX's first computation. The CPU becomes one JAX device per core, as far as the
    batch divides among them: XLA's CPU gradients hardly use threads; several devices do. No effect
    on GPU and TPU.

    Raises:
      ConfigError: see `check_config` and `multihost.connect`.
    """
    check_config(config, num_devices=1)
    cluster = multihost.settings()
    cores = usable_cores()
    common = math.gcd(*units_per_batch(config).values())
    common = max(1, common // cluster.get("num_processes", 1))
    auto = max(n for n in range(1, cores + 1) if common % n == 0)
    devices.set_up_jax(config.num_cpu_devices or auto)
    multihost.connect(**cluster)
    logger.setLevel(logging.INFO if multihost.is_first() else logging.ERROR)


def open_data(config: ConfigDict) -> tuple[PreparedSet, Split]:
    """Opens the data set, prepared where it was not yet, and its volumes by role.

    Raises:
      ConfigError, SplitError, VolumeError: before any work is lost.
    """
    grid: dict[str, Any] = {
        "image_size": config.data.image_size,
        "target_spacing_mm": config.data.target_spacing_mm,
        "n4_shrink_factor": config.data.n4_shrink_factor,
        "data_dir": config.data.data_dir,
        "options": options_of(config.data),
    }
    # The builder knows the classes before it has prepared a volume.
    builder = open_builder(config.data.name, **grid)
    check_classes(config, preprocessing_of(builder).class_names)
    with multihost.first_goes_first():
        prepared = open_prepared(config.data.name, manual_dir=config.data.manual_dir, **grid)
    # Own data may be a mask to learn from, one to choose the checkpoint by, and no more.
    own = config.data.name == case_files.NAME
    split = resolve_split(config.data, prepared.volumes, may_lack_test=own)
    pool = sum(len(prepared.volumes[v].slices) for v in split.unlabeled)
    if config.rounds.num_rounds and pool < MIN_POOL:
        raise ConfigError(
            f"data.unlabeled: found {len(split.unlabeled)} volumes with {pool} slices to run "
            f"rounds on; wanted at least {MIN_POOL} slices: name more patients there, or set "
            "rounds.num_rounds=0"
        )
    return prepared, split


def prepare(config: ConfigDict) -> str:
    """Prepares the data set where it was not yet, on any machine; returns what there is, as text.

    Raises:
      ConfigError, SplitError, VolumeError: as a run would.
    """
    check_config(config, num_devices=1)
    config, proposed = own_data.complete(config)
    check_config(config, num_devices=1)
    prepared, split = open_data(config)
    roles = ", ".join(f"{len(ids)} {role}" for role, ids in split._asdict().items())
    ready = (
        f"{prepared.name}: {len(prepared.volumes)} volumes, {prepared.image_size} px of "
        f"{prepared.target_spacing_mm:g} mm, are prepared; {roles}"
    )
    return f"{proposed}\n{ready}".strip()


def start_run(
    config: ConfigDict, workdir: Path, stop_asked: Callable[[], bool] = lambda: False
) -> Run:
    """Checks config and data, claims the workdir, and builds model and compiled steps.

    Raises:
      ConfigError, SplitError, VolumeError: before any work is lost.
    """
    check_config(config, num_devices=jax.device_count())
    memory.check_memory(config, memory.available_bytes())
    source = start_from.read_source(config)
    prepared, split = open_data(config)
    check_processes_agree(config, prepared)
    method = method_of(config, prepared.num_classes)
    start_from.check_source(source, prepared, split, networks=method.networks)
    model = UNet(
        num_classes=prepared.num_classes,
        filters=tuple(config.model.filters),
        heads=method.heads,
        dtype=config.model.dtype,
        axis_name=devices.AXIS,
    )
    first, joint = stages(config, method)[0], stages(config, method)[-1]
    trained_first = first_method(method, base_of(config, prepared.num_classes))
    programs = {
        "first": compile_programs(config, model, trained_first, first.num_steps),
        "joint": compile_programs(config, model, method, joint.num_steps),
    }
    held = claim_workdir(config, workdir)
    # With it a prediction needs neither the prepared set nor the code that made it.
    how = preprocess.to_json(prepared.preprocessing)
    write_json(workdir / "preprocessing.json", how)
    write_json(workdir / "splits.json", split._asdict())
    run = Run(
        config=config,
        workdir=workdir,
        prepared=prepared,
        split=split,
        one_piece=classes_in_one_piece(prepared, split.labeled),
        model=model,
        method=method,
        key=jax.random.key(config.seed),
        programs=programs,
        predict=devices.compiled_predict(model),
        predict_mean=devices.compiled_predict(model, copy_angles(config)),
        stop_asked=lambda: multihost.any_process(stop_asked()),
        lock=held,
    )
    kept = run.classes_in_one_piece(config.predictions.largest_component)
    names = names_of(kept, prepared.class_names)
    write_json(workdir / "postprocessing.json", {"largest_component": names})
    return run


def check_processes_agree(config: ConfigDict, prepared: PreparedSet) -> None:
    """Raises ConfigError where a process has another config or other data than the first."""
    if jax.device_count() != jax.process_count() * jax.local_device_count():
        raise ConfigError(
            f"this process has {jax.local_device_count()} of {jax.device_count()} devices; wanted "
            f"as many in each of the {jax.process_count()} processes"
        )
    own = to_store(config)
    first = multihost.json_from_first(own)
    keys = [k for k in differing_keys(first, own) if k not in MACHINE_KEYS]
    if keys:
        raise ConfigError(
            f"the first process has other values of {', '.join(keys[:8])}; start the same command "
            "everywhere"
        )
    counts = {v: e.class_pixels.tolist() for v, e in prepared.volumes.items()}
    if multihost.json_from_first(counts) != counts:
        raise ConfigError(
            f"the prepared set of {config.data.name} is not the first process' one; prepare it anew"
        )


def initial_state(run: Run, kind: str, *, fresh_heads: bool = False) -> steps.TrainState:
    """Makes a fresh state for a kind of stage, "first" or "joint", with the heads that it trains.

    With `fresh_heads` another one, so that no head is drawn as in the first stage.
    """
    programs = run.programs[kind]
    return steps.create_train_state(
        jax.random.fold_in(named_key(run.key, "initial values"), int(fresh_heads)),
        run.model.clone(heads=programs.method.heads),
        programs.optimizer,
        image_size=run.config.data.image_size,
        networks=programs.method.networks,
        init_memory=programs.method.init_memory,
        num_channels=run.prepared.preprocessing.num_channels,
    )
