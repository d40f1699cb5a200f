"""What stays the same throughout a run: config, data, workdir, model and compiled programs."""

import dataclasses
import functools
import json
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import jax
import optax
from ml_collections import ConfigDict

from lclseg import evaluation, steps
from lclseg.cores import usable_cores
from lclseg.data import own_data, preprocess
from lclseg.data.dataset import PreparedSet, open_builder, open_prepared, preprocessing_of
from lclseg.data.splits import Split, resolve_split
from lclseg.methods import supervised
from lclseg.methods.base import base_of, method_of
from lclseg.methods.contract import Method
from lclseg.models import Net, UNet
from lclseg.random_keys import named_key
from lclseg.run import devices, multihost, start_from
from lclseg.run.config_checks import (
    ConfigError,
    check_classes,
    check_config,
    units_per_batch,
)
from lclseg.run.stored_config import (
    MACHINE_KEYS,
    as_now,
    baseline_differences,
    differing_keys,
    refused_changes,
    to_store,
)
from lclseg.run.workdir import LOCK, lock, read_json, write_json

logger = logging.getLogger("lclseg")


class Stage(NamedTuple):
    """A stretch of training with one loss, which ends in a test.

    Attributes:
      name: "baseline", "round_<k>", or "joint" where a method stores no pseudo-labels.
      kind: "first" or "joint".
      first_step: counted over the run.
      num_steps: of the stage.
    """

    name: str
    kind: str
    first_step: int
    num_steps: int


class Programs(NamedTuple):
    """What one kind of stage runs on the devices.

    Attributes:
      optimizer: of the stage.
      train: compiled over devices: `steps.train_step`, or `steps.train_steps` where one dispatch
        takes several.
      statistics: compiled `steps.batch_statistics`.
    """

    optimizer: optax.GradientTransformation
    train: Callable
    statistics: Callable


@dataclasses.dataclass(frozen=True)
class Run:
    """What stays the same throughout a run.

    Attributes:
      config: resolved and frozen.
      workdir: everything is written below it.
      prepared: the data set.
      split: volume ids by role.
      model: the U-Net.
      method: what is trained after the first stage; its contract: `methods.contract.Method`.
      key: the run's random key; `random_keys.named_key` gives each purpose its own.
      programs: by kind of stage, "first" and "joint".
      predict: (replicated state, images [N, M, H, W]) -> probs [N, M, H, W, C], compiled.
      stop_asked: whether the run shall stop as soon as nothing is lost.
      lock: holds the workdir against other runs until it is closed, see `workdir.lock`.
    """

    config: ConfigDict
    workdir: Path
    prepared: PreparedSet
    split: Split
    model: UNet
    method: Method
    key: jax.Array
    programs: dict[str, Programs]
    predict: Callable
    stop_asked: Callable[[], bool]
    lock: TextIO


def set_up_process(config: ConfigDict) -> None:
    """Logging, the compilation cache, CPU devices, and the other processes of a cluster.

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
    """The data set, prepared where it was not yet, and its volumes by role.

    Raises:
      ConfigError, SplitError, VolumeError: before any work is lost.
    """
    grid: dict[str, Any] = {
        "image_size": config.data.image_size,
        "target_spacing_mm": config.data.target_spacing_mm,
        "n4_shrink_factor": config.data.n4_shrink_factor,
        "data_dir": config.data.data_dir,
        "options": own_data.builder_options(config.data),
    }
    # The builder knows the classes before it has prepared a volume.
    builder = open_builder(config.data.name, **grid)
    check_classes(config, preprocessing_of(builder).class_names)
    with multihost.first_goes_first():
        prepared = open_prepared(config.data.name, manual_dir=config.data.manual_dir, **grid)
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
    base = base_of(config, prepared.num_classes)
    pretraining = supervised.make(None, base)
    terms, views = method.pretraining or (pretraining.terms, pretraining.views)
    programs = {
        "first": compile_programs(config, model, terms, views, method, first.num_steps),
        "joint": compile_programs(
            config, model, method.terms, method.views, method, joint.num_steps
        ),
    }
    held = claim_workdir(config, workdir)
    # With it a prediction needs neither the prepared set nor the code that made it.
    how = preprocess.to_json(prepared.preprocessing)
    write_json(workdir / "preprocessing.json", how)
    write_json(workdir / "splits.json", split._asdict())
    return Run(
        config=config,
        workdir=workdir,
        prepared=prepared,
        split=split,
        model=model,
        method=method,
        key=jax.random.key(config.seed),
        programs=programs,
        predict=devices.compiled_predict(model),
        stop_asked=lambda: multihost.any_process(stop_asked()),
        lock=held,
    )


def stages(config: ConfigDict, method: Method) -> list[Stage]:
    """The stages of a run, in order: the first one, then rounds, or all their steps as one stage.

    A method without a sampler learns from labelled slices alone: all steps are its first stage.
    """
    first, number, each = (
        config.rounds.baseline_steps,
        config.rounds.num_rounds,
        config.rounds.steps_per_round,
    )
    if method.sampler is None:
        return [Stage("baseline", "first", 0, first + number * each)]
    found = [Stage("baseline", "first", 0, first)]
    if method.offline:
        for k in range(number):
            found.append(Stage(f"round_{k + 1}", "joint", first + k * each, each))
    elif number:
        found.append(Stage("joint", "joint", first, number * each))
    return found


def compile_programs(
    config: ConfigDict, model: UNet, terms: Callable, views: Any, method: Method, num_steps: int
) -> Programs:
    """The programs of one kind of stage; XLA compiles each when it is first called."""
    optimizer = make_optimizer(config.optimizer, num_steps)
    net = Net(model)
    step = functools.partial(
        steps.train_step,
        net=net,
        terms=terms,
        views=views,
        optimizer=optimizer,
        ema_decay=config.optimizer.ema_decay,
        remember=method.remember,
    )
    if devices.steps_per_dispatch(config.log.every) > 1:
        step = functools.partial(steps.train_steps, step=step)
    statistics = functools.partial(steps.batch_statistics, net=net, terms=terms, views=views)
    return Programs(
        optimizer=optimizer,
        train=devices.over_devices(step, donate_state=True),
        statistics=devices.over_devices(statistics, donate_state=False),
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


def claim_workdir(config: ConfigDict, workdir: Path) -> TextIO:
    """Creates the workdir with the config in it, or checks that its run can go on with this config.

    A run may be longer than it was, and go on elsewhere or on other devices; see `refused_changes`.

    Returns:
      The lock on the workdir; closing it, or the end of the process, gives the folder free.

    Raises:
      ConfigError: the folder holds something else, or a run that cannot go on with this config.
      WorkdirError: another process has it.
    """
    path = workdir / "config.json"
    ours = {"config.partial", LOCK}  # of a run that ended before it began
    if workdir.exists() and not path.exists():
        if any(p.name not in ours for p in workdir.iterdir()):
            raise ConfigError(f"{workdir} is not empty and no lclseg run; choose another --workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    held = lock(workdir)
    content = to_store(config)
    before = read_json(path)
    if before is not None:
        begun = [p.name for p in (workdir / "checkpoints").glob("*")]
        keys = refused_changes(as_now(before), content, begun)
        if keys:
            held.close()
            raise ConfigError(
                f"{workdir} holds a run with other values of {', '.join(keys[:8])}; go on with its "
                "config, or choose another --workdir"
            )
    write_json(path, content)
    return held


def take_over_baseline(run: Run, results: dict) -> None:
    """Copies the finished baseline of `rounds.baseline_from`, another workdir, into this run.

    Raises:
      ConfigError: no finished baseline there, or one of another config.
    """
    source = Path(run.config.rounds.baseline_from).expanduser()
    theirs = read_json(source / "results.json")
    if theirs is None or "baseline" not in theirs["results"]:
        raise ConfigError(f"rounds.baseline_from: no finished baseline in {source}")
    stored = json.loads((source / "config.json").read_text())
    keys = baseline_differences(
        as_now(stored), to_store(run.config), by_method=run.method.pretraining is not None
    )
    if keys:
        raise ConfigError(
            f"rounds.baseline_from: the baseline in {source} has other values of "
            f"{', '.join(keys[:8])}"
        )
    found = theirs["results"]["baseline"]["num_steps"]
    wanted = stages(run.config, run.method)[0].num_steps
    if found != wanted:  # without unlabelled slices the steps of the rounds are the baseline's
        raise ConfigError(
            f"rounds.baseline_from: the baseline in {source} has {found} steps; wanted {wanted}"
        )
    for folder in ("checkpoints/baseline", "predictions/baseline"):
        if not (source / folder).exists():  # predictions, where there is nothing to test on
            continue
        shutil.copytree(source / folder, run.workdir / folder, dirs_exist_ok=True)
    results["results"]["baseline"] = theirs["results"]["baseline"]
    write_json(run.workdir / "results.json", results)


def initial_state(run: Run, number: int) -> steps.TrainState:
    """A fresh state; number 0 starts the first stage, number k gives round k its heads."""
    return steps.create_train_state(
        jax.random.fold_in(named_key(run.key, "initial values"), number),
        run.model,
        run.programs["first"].optimizer,
        image_size=run.config.data.image_size,
        networks=run.method.networks,
        init_memory=run.method.init_memory,
    )


def predictor(
    run: Run,
    replicated: steps.TrainState,
    *,
    refine: Callable | None = None,
    stoppable: bool = True,
) -> evaluation.Predict:
    """A state's `batched_predictor`; of several processes, each predicts its part of the slices.

    It stops when asked to, if `stoppable`: not in validation, which belongs to the step before it.
    """
    if run.method.networks > 1:
        replicated = jax.vmap(steps.first_network)(replicated)
    predict = devices.batched_predictor(
        run.predict,
        replicated,
        batch_size=-(-run.config.data.eval_batch_size // jax.process_count()),
        refine=refine,
        stop_asked=run.stop_asked if stoppable else lambda: False,
    )
    return multihost.predict_together(predict)


def evaluate_state(
    run: Run, replicated: steps.TrainState, volume_ids, *, stoppable: bool, **kwargs
) -> dict:
    """Metrics of a state, a copy per device, on volumes; see `evaluation.evaluate`."""
    return evaluation.evaluate(
        predictor(run, replicated, stoppable=stoppable),
        run.prepared,
        volume_ids,
        batch_size=run.config.data.eval_batch_size,
        **kwargs,
    )
