"""What stays the same throughout a run: config, data, workdir, model and compiled programs."""

import dataclasses
import functools
import json
import logging
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from lclseg import evaluation, steps
from lclseg.data import own_data, preprocess
from lclseg.data.dataset import PreparedSet, open_prepared
from lclseg.data.nifti import VolumeError
from lclseg.data.splits import Split, SplitError, resolve_split
from lclseg.models import UNet
from lclseg.pseudo_labels import PseudoLabelError
from lclseg.run import devices, memory, multihost
from lclseg.run.config_checks import (
    JOINT_ONLY,
    MACHINE_KEYS,
    ConfigError,
    check_config,
    differing_keys,
    refused_changes,
)
from lclseg.run.workdir import read_json, write_json, write_text

# What the user can mend; a program shows the message and no traceback.
USER_ERRORS = (ConfigError, SplitError, VolumeError, PseudoLabelError, FloatingPointError)
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
      key: the run's random key.
      optimizers: by stage kind, "baseline" and "joint".
      train_steps: likewise, compiled over devices: (state, batch, key) -> (state, metrics).
      batch_statistics: (replicated state, batch, key) -> statistics, compiled.
      predict: (replicated state, images [N, M, H, W]) -> probs [N, M, H, W, C], compiled.
      stop_asked: whether the run shall stop as soon as nothing is lost.
    """

    config: ConfigDict
    workdir: Path
    prepared: PreparedSet
    split: Split
    model: UNet
    key: jax.Array
    optimizers: dict[str, optax.GradientTransformation]
    train_steps: dict[str, Callable]
    batch_statistics: Callable
    predict: Callable
    stop_asked: Callable[[], bool]


def set_up_process(config: ConfigDict) -> None:
    """Logging, the compilation cache, CPU devices, and the other processes of a cluster.

    Runs before JAX's first computation. The CPU becomes one JAX device per core, as far as the
    batch divides among them: XLA's CPU gradients hardly use threads; several devices do. No effect
    on GPU and TPU.
    """
    cluster = multihost.settings()
    cores = len(os.sched_getaffinity(0))
    common = math.gcd(config.data.labeled_batch_size, sum(config.data.pairs.values()))
    common = max(1, common // cluster.get("num_processes", 1))
    auto = max(n for n in range(1, cores + 1) if common % n == 0)
    devices.set_up_jax(config.num_cpu_devices or auto)
    multihost.connect(**cluster)
    logger.setLevel(logging.INFO if multihost.is_first() else logging.ERROR)


def open_data(config: ConfigDict) -> tuple[PreparedSet, Split]:
    """The data set, prepared where it was not yet, and its volumes by role.

    Raises:
      ConfigError, SplitError, VolumeError: before any work is lost.
    """
    with multihost.first_goes_first():
        prepared = open_prepared(
            config.data.name,
            image_size=config.data.image_size,
            target_spacing_mm=config.data.target_spacing_mm,
            n4_shrink_factor=config.data.n4_shrink_factor,
            data_dir=config.data.data_dir,
            manual_dir=config.data.manual_dir,
            options=own_data.builder_options(config.data),
        )
    # Own data may be a mask to learn from, one to choose the checkpoint by, and no more.
    own = config.data.name == own_data.NAME
    split = resolve_split(config.data, prepared.volumes, may_lack_test=own)
    if config.rounds.num_rounds and not split.unlabeled:
        raise ConfigError(
            "there is no unlabelled volume to run rounds on; set rounds.num_rounds=0, or give some "
            "in data.unlabeled"
        )
    return prepared, split


def prepare(config: ConfigDict) -> str:
    """Prepares the data set where it was not yet, on any machine; returns what there is, as text.

    Raises:
      ConfigError, SplitError, VolumeError: as a run would.
    """
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
    prepared, split = open_data(config)
    check_processes_agree(config, prepared)
    model = UNet(
        num_classes=prepared.num_classes,
        filters=tuple(config.model.filters),
        embedding_dim=config.model.embedding_dim,
        dtype=config.model.dtype,
        axis_name=devices.AXIS,
    )
    optimizers = {
        "baseline": make_optimizer(config.optimizer, config.rounds.baseline_steps),
        "joint": make_optimizer(config.optimizer, config.rounds.steps_per_round),
    }
    options: dict[str, Any] = {
        "model": model,
        "loss_options": steps.LossOptions(**config.loss),
        "augment_options": steps.AugmentOptions(**config.augment),
        "axis_name": devices.AXIS,
    }

    def compiled(optimizer):
        step = functools.partial(
            steps.train_step,
            optimizer=optimizer,
            ema_decay=config.optimizer.ema_decay,
            **options,
        )
        return devices.over_devices(step, donate_state=True)

    claim_workdir(config, workdir)
    # With it a prediction needs neither the prepared set nor the code that made it.
    how = preprocess.to_json(prepared.preprocessing)
    write_json(workdir / "preprocessing.json", how)
    write_json(workdir / "splits.json", split._asdict())
    statistics = functools.partial(steps.batch_statistics, **options)
    return Run(
        config=config,
        workdir=workdir,
        prepared=prepared,
        split=split,
        model=model,
        key=jax.random.key(config.seed),
        optimizers=optimizers,
        train_steps={kind: compiled(o) for kind, o in optimizers.items()},
        batch_statistics=devices.over_devices(statistics, donate_state=False),
        predict=devices.compiled_predict(model),
        stop_asked=lambda: multihost.any_process(stop_asked()),
    )


def make_optimizer(config: ConfigDict, num_steps: int) -> optax.GradientTransformation:
    """Adam, with the config's learning rate, constant or decaying to 0 over the stage."""
    rate = config.learning_rate
    if config.schedule == "cosine":
        rate = optax.cosine_decay_schedule(rate, num_steps)
    return optax.adam(rate)


def check_processes_agree(config: ConfigDict, prepared: PreparedSet) -> None:
    """Raises ConfigError where a process has another config or other data than the first."""
    if jax.device_count() != jax.process_count() * jax.local_device_count():
        raise ConfigError(
            f"this process has {jax.local_device_count()} of {jax.device_count()} devices; wanted "
            f"as many in each of the {jax.process_count()} processes"
        )
    own = json.loads(config.to_json_best_effort())
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


def claim_workdir(config: ConfigDict, workdir: Path) -> None:
    """Creates the workdir with the config in it, or checks that its run can go on with this config.

    A run may be longer than it was, and go on elsewhere or on other devices; see `refused_changes`.

    Raises:
      ConfigError: the folder holds something else, or a run that cannot go on with this config.
    """
    path = workdir / "config.json"
    text = config.to_json_best_effort(indent=2, sort_keys=True) + "\n"
    if path.exists():
        before = json.loads(path.read_text())
        begun = [p.name for p in (workdir / "checkpoints").glob("*")]
        keys = refused_changes(before, json.loads(text), begun)
        if keys:
            raise ConfigError(
                f"{workdir} holds a run with other values of {', '.join(keys[:8])}; go on with its "
                "config, or choose another --workdir"
            )
    elif workdir.exists() and any(p.name != "config.partial" for p in workdir.iterdir()):
        raise ConfigError(f"{workdir} is not empty and no lclseg run; choose another --workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def take_over_baseline(run: Run, results: dict) -> None:
    """Copies the finished baseline of `rounds.baseline_from`, another workdir, into this run.

    Raises:
      ConfigError: no finished baseline there, or one of another config.
    """
    source = Path(run.config.rounds.baseline_from).expanduser()
    theirs = read_json(source / "results.json")
    if theirs is None or "baseline" not in theirs["results"]:
        raise ConfigError(f"rounds.baseline_from: no finished baseline in {source}")
    ours = json.loads((run.workdir / "config.json").read_text())
    keys = differing_keys(json.loads((source / "config.json").read_text()), ours)
    keys = [k for k in keys if not k.startswith(JOINT_ONLY)]
    if keys:
        raise ConfigError(
            f"rounds.baseline_from: the baseline in {source} has other values of "
            f"{', '.join(keys[:8])}"
        )
    for folder in ("checkpoints/baseline", "predictions/baseline"):
        if not (source / folder).exists():  # predictions, where there is nothing to test on
            continue
        shutil.copytree(source / folder, run.workdir / folder, dirs_exist_ok=True)
    results["results"]["baseline"] = theirs["results"]["baseline"]
    write_json(run.workdir / "results.json", results)


def initial_state(run: Run, number: int) -> steps.TrainState:
    """A fresh state; number 0 starts the baseline, number k gives round k its heads."""
    return steps.create_train_state(
        jax.random.fold_in(run.key, number),
        run.model,
        run.optimizers["baseline"],
        image_size=run.config.data.image_size,
        num_channels=run.prepared.preprocessing.num_channels,
    )


def predictor(
    run: Run,
    state: steps.TrainState,
    refine: Callable | None = None,
    *,
    stoppable: bool = True,
) -> evaluation.Predict:
    """A state's `batched_predictor`; of several processes, each predicts its part of the slices.

    It stops when asked to, if `stoppable`: not in validation, which belongs to the step before it.
    """
    predict = devices.batched_predictor(
        run.predict,
        state,
        batch_size=-(-run.config.data.eval_batch_size // jax.process_count()),
        refine=refine,
        stop_asked=run.stop_asked if stoppable else lambda: False,
    )
    return multihost.predict_together(predict)


def evaluate_state(
    run: Run, state: steps.TrainState, volume_ids, *, stoppable: bool, **kwargs
) -> dict:
    """Metrics of a state on volumes; see `evaluation.evaluate`."""
    return evaluation.evaluate(
        predictor(run, state, stoppable=stoppable),
        run.prepared,
        volume_ids,
        batch_size=run.config.data.eval_batch_size,
        **kwargs,
    )
