"""One stage of a run: steps, log lines, validations, checkpoints; `fit` is the story.

Letters: n slices, H W pixels, C classes.
"""

import contextlib
import errno
import logging
import math
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from lclseg import evaluation, steps
from lclseg.data import grid
from lclseg.data.batches import Pool, ground_truth_pool, records_of, sampler, select_slices
from lclseg.errors import ConfigError, NonFiniteLossError
from lclseg.label_stream import refresher
from lclseg.pseudo_labels import PseudoLabels
from lclseg.random_keys import named_key
from lclseg.run import checkpoint, devices, multihost, tensorboard
from lclseg.run.predictions import evaluate_state
from lclseg.run.programs import Programs, Stage
from lclseg.run.setup import Run
from lclseg.run.stage_files import open_stage_files
from lclseg.run.stopping import Interrupted
from lclseg.run.store import DeviceSlices, Labels
from lclseg.run.workdir import write_json

logger = logging.getLogger("lclseg")

ZEROS_TO_WARN = 5  # validations in a row


OVERLAYS = 2  # validation volumes shown in TensorBoard


class Best(NamedTuple):
    """A trained stage.

    Attributes:
      state: of the best checkpoint, by mean foreground 3-D Dice on the validation volumes; the
        last where there are none.
      last: the last state.
      validation_dice: of `state`; None without validation volumes.
      stage: which one.
      history: the validations.
      seconds: spent on "train", "validate" and "pseudo_labels", over all starts of the stage; and
        "device", the part of "train" in which the devices had work, see `Trained`.
    """

    state: steps.TrainState
    last: steps.TrainState
    validation_dice: float | None
    stage: Stage
    history: list[dict]
    seconds: dict[str, float]


def labels_of(run: Run, pseudo_labels: PseudoLabels | None) -> tuple[Labels, Pool]:
    """Gives what training may see: ground truth of labelled slices, pseudo-labels; and the pool."""
    labeled = records_of(run.prepared, run.split.labeled)
    if pseudo_labels is not None:
        drawn = pseudo_labels.drawn
        pool = Pool(pseudo_labels.records[drawn], pseudo_labels.class_pixels[drawn])
        return Labels(labeled, pseudo_labels.records, pseudo_labels.labels), pool
    records = records_of(run.prepared, run.split.unlabeled)
    size, classes = run.prepared.image_size, run.prepared.num_classes
    nothing = Labels(labeled, np.empty(0, int), np.empty((0, size, size), np.uint8))
    return nothing, Pool(records, np.zeros((len(records), classes), int))


def slices_of(run: Run, kind: str, pseudo_labels: PseudoLabels | None) -> DeviceSlices:
    """Gathers the slices that a stage draws, and how."""
    data, labeled = run.config.data, ground_truth_pool(run.prepared, run.split.labeled)
    records = select_slices(
        labeled, min_classes=data.min_classes, at_least=1, role="labelled batch"
    )
    labels, unlabeled = labels_of(run, pseudo_labels)
    draw, everything, sampled = None, records, run.programs[kind].method.sampler
    if sampled is not None:
        draw = sampled(labeled, unlabeled)
        # With the pool's slices that are not learnt from now: the store keeps its shape.
        everything = np.concatenate([labeled.records, unlabeled.records, labels.pseudo])
    draws = sampler(run.config.seed, records, data.labeled_batch_size, draw)
    return DeviceSlices(run.prepared, labels, draws, everything)


class Trained(NamedTuple):
    """What `run_steps` gives.

    Attributes:
      state: a copy per device.
      metrics: of the last step, or of all where one dispatch is a step.
      first: step, counted over the run, of the first of `metrics`.
      num_steps: how many were trained.
      device_seconds: how long the devices had work: from the return of the first dispatch to the
        end of the wait for the last step. The rest of the time of training is the host's alone:
        batches, the first dispatch (where a program is compiled), slices that are moved to the
        devices, files. Where steps are dispatched one by one, gaps between them are not seen.
    """

    state: steps.TrainState
    metrics: list[dict[str, float]]
    first: int
    num_steps: int
    device_seconds: float


class Mark(NamedTuple):
    """How far a stage has come.

    Attributes:
      steps: done.
      train: seconds of training steps.
      device: seconds of those in which the devices had work.
    """

    steps: int
    train: float
    device: float

    def since(self, before: "Mark") -> dict[str, float]:
        """Computes the speed since a mark: `steps_per_second`, and `device_busy`, a share of 1."""
        seconds = self.train - before.train
        return {
            "steps_per_second": round((self.steps - before.steps) / seconds, 3),
            "device_busy": round((self.device - before.device) / seconds, 4),
        }


def run_steps(
    run: Run,
    programs: Programs,
    state: steps.TrainState,
    slices: DeviceSlices,
    todo: range,
    key: jax.Array,
) -> Trained:
    """Trains the steps `todo`, counted over the run, at most `log.every` of them.

    Where one dispatch takes all of them (see `devices.steps_per_dispatch`) that is all that the
    device is given; and there is one wait for it, here at the end. Ends early where a stop is asked
    for, if steps are dispatched one by one and no other process would wait.
    """
    rows = slices.rows(todo)
    length = devices.steps_per_dispatch(run.config.log.every)
    if length > 1:
        missing = length - len(todo)
        padded = {g: np.pad(r, ((0, 0), (0, missing), (0, 0))) for g, r in rows.items()}
        number = np.int32(len(todo))
        state, found = programs.train(state, slices.store, padded, number, key)
        started = time.monotonic()
        last = {k: float(v[0]) for k, v in jax.device_get(found).items()}
        bad = int(last.pop("first_not_finite"))
        first = todo[min(bad, len(todo) - 1)]
        return Trained(state, [last], first, len(todo), time.monotonic() - started)
    waiting, started = [], math.inf
    for i in range(len(todo)):
        step_rows = {g: r[:, i] for g, r in rows.items()}
        state, found = programs.train(state, slices.store, step_rows, key)
        started = min(started, time.monotonic())
        waiting.append(found)
        if not multihost.several() and run.stop_asked():
            break
    metrics = [{k: float(v[0]) for k, v in m.items()} for m in jax.device_get(waiting)]
    return Trained(state, metrics, todo[0], len(waiting), time.monotonic() - started)


def fit(
    run: Run,
    stage: Stage,
    state: steps.TrainState,
    pseudo_labels: PseudoLabels | None,
) -> Best:
    """Trains one stage and returns its best checkpoint.

    Goes on from the stage's newest checkpoint if there is one.

    Raises:
      NonFiniteLossError: the loss is not finite.
    """
    programs, num_steps = run.programs[stage.kind], stage.num_steps
    with contextlib.ExitStack() as stack:
        folder = run.workdir / "checkpoints" / stage.name
        manager = stack.enter_context(checkpoint.open_stage(folder))
        state, done, history, seconds = resume(manager, stage, state, pseudo_labels)
        files = stack.enter_context(open_stage_files(run, stage, done))
        replicated, number, loaded_until = devices.replicate(state), done, done
        labels, refresh = pseudo_labels, None
        if pseudo_labels is not None:
            labels, made_at, refresh = refresher(run, stage, pseudo_labels, done)
            # They are not there where the stage was to end here, and has become longer since.
            if made_at < done and due_at(run, stage, done, stop=False).refresh:
                with timed(seconds, "pseudo_labels"):
                    labels = refresh(replicated, done, done)
        slices = slices_of(run, stage.kind, labels)
        logged, key = mark_of(done, seconds), named_key(run.key, "steps")
        while number < num_steps:
            with timed(seconds, "train"):
                end = next_stop(number, num_steps, run.config)
                if loaded_until < end:
                    first = stage.first_step
                    loaded_until = slices.load(first + number, first + num_steps) - first
                    end = min(end, loaded_until)
                todo = range(stage.first_step + number, stage.first_step + end)
                trained = run_steps(run, programs, replicated, slices, todo, key)
                replicated = trained.state
                scalars = check_finite(run, stage, trained, slices)
                number += trained.num_steps
                files.advance(number, scalars["loss"])
                due = due_at(run, stage, number, run.stop_asked())
            seconds["device"] = seconds.get("device", 0.0) + trained.device_seconds
            if due.log:
                now = mark_of(number, seconds)
                with timed(seconds, "train"):
                    files.log(number, scalars | now.since(logged))
                logged = now
            if not (due.validation or due.stop or due.refresh):
                continue
            with timed(seconds, "validate"):
                current = calibrate(run, programs, replicated, slices, stage, number)
            if due.refresh and refresh is not None:
                with timed(seconds, "pseudo_labels"):
                    labels = refresh(current, number, checkpoint.latest_step(manager))
                    slices, loaded_until = slices_of(run, stage.kind, labels), number
            score = None
            if due.validation and run.split.validation:
                with timed(seconds, "validate"):
                    dice, pictures = validate(run, current)
                score = dice["mean_dice"]
                history.append({"step": number, **dice})
                files.log(number, {"validation_dice": score}, pictures)
                warn_of_zeros(stage.name, history)
            if due.validation or due.stop:
                progress = progress_of(pseudo_labels, history, seconds)
                save(run, manager, number, current, progress, score)
            if due.stop and number < num_steps:
                checkpoint.finish(manager)
                raise Interrupted(f"stopped in {stage.name} after step {number} of {num_steps}")
        return outcome(manager, stage, state)


@contextlib.contextmanager
def timed(seconds: dict[str, float], kind: str) -> Iterator[None]:
    """Adds the block's seconds to those of a kind of work."""
    started = time.monotonic()
    yield
    seconds[kind] = seconds.get(kind, 0.0) + time.monotonic() - started


def mark_of(number: int, seconds: dict[str, float]) -> Mark:
    """Marks where a stage stands after `number` steps."""
    return Mark(number, seconds.get("train", 0.0), seconds.get("device", 0.0))


def progress_of(
    pseudo_labels: PseudoLabels | None, history: list[dict], seconds: dict[str, float]
) -> dict:
    """Gathers what a checkpoint tells beside the state; see `resume`."""
    digest = pseudo_labels.report["labels_sha256"] if pseudo_labels else None
    return {"validation": history, "labels_sha256": digest, "seconds": seconds}


def resume(
    manager, stage: Stage, state: steps.TrainState, pseudo_labels: PseudoLabels | None
) -> tuple[steps.TrainState, int, list[dict], dict[str, float]]:
    """Finds where a stage goes on: state, steps done, validations, seconds by kind of work.

    Raises:
      ConfigError: the stage was begun on other pseudo-labels.
    """
    done = checkpoint.latest_step(manager)
    if not done:
        return state, 0, [], {}
    state, progress = checkpoint.restore(manager, done, state)
    if progress["labels_sha256"] != progress_of(pseudo_labels, [], {})["labels_sha256"]:
        raise ConfigError(
            f"checkpoints of {stage.name}: training was begun on other pseudo-labels than those in "
            f"{pseudo_labels and pseudo_labels.folder}; remove the checkpoint folder to train this "
            "round anew"
        )
    logger.info("%s: going on from step %d of %d", stage.name, done, stage.num_steps)
    # It may be longer now than when it was begun.
    state = state.replace(stage=np.asarray([stage.first_step, stage.num_steps], np.int32))
    return state, done, progress["validation"], progress["seconds"]


class Due(NamedTuple):
    """What is to be done after a step."""

    log: bool
    validation: bool
    refresh: bool
    stop: bool


def due_at(run: Run, stage: Stage, number: int, stop: bool) -> Due:
    """Finds what is due after `number` steps of a stage."""
    rounds, last = run.config.rounds, number == stage.num_steps
    return Due(
        log=last or number % run.config.log.every == 0,
        validation=last or number % rounds.eval_every == 0,
        refresh=not last and rounds.refresh_every > 0 and number % rounds.refresh_every == 0,
        stop=stop,
    )


def save(
    run: Run,
    manager,
    number: int,
    replicated: steps.TrainState,
    progress: dict,
    score: float | None,
) -> None:
    """Writes a checkpoint; raises FileNotFoundError where the workdir was removed under way."""
    if not (run.workdir / "config.json").exists():  # Orbax would make the folder anew
        raise FileNotFoundError(errno.ENOENT, "removed under way", str(run.workdir))
    checkpoint.save(manager, number, devices.unreplicate(replicated), progress, score)


def outcome(manager, stage: Stage, like: steps.TrainState) -> Best:
    """Restores the best and the last checkpoint of a stage that is done."""
    checkpoint.finish(manager)
    step, score = checkpoint.chosen(manager)
    best, _ = checkpoint.restore(manager, step, like)
    last, progress = checkpoint.restore(manager, stage.num_steps, like)
    if score is None:
        logger.info("%s: step %d, the last; none was validated", stage.name, step)
    else:
        logger.info("%s: best validation Dice %.4f at step %d", stage.name, score, step)
    return Best(best, last, score, stage, progress["validation"], progress["seconds"])


def next_stop(number: int, num_steps: int, config: ConfigDict) -> int:
    """Finds the next step of a stage at which to log, validate or refresh."""
    every = [config.log.every, config.rounds.eval_every]
    if config.rounds.refresh_every:
        every.append(config.rounds.refresh_every)
    return min(num_steps, *((number // n + 1) * n for n in every))


def calibrate(
    run: Run,
    programs: Programs,
    replicated: steps.TrainState,
    slices: DeviceSlices,
    stage: Stage,
    number: int,
) -> steps.TrainState:
    """Re-estimates BatchNorm's statistics of a state from the stage's last batches.

    Of `rounds.batch_norm_batches` many; 0 leaves the running statistics.
    """
    key = named_key(run.key, "statistics")
    last = stage.first_step + number
    some = range(max(stage.first_step, last - run.config.rounds.batch_norm_batches), last)
    if not run.config.rounds.batch_norm_batches:
        return replicated
    found = []
    for step in some:
        store, rows = slices.batch(step)
        # One at a time: two runs at once may each hold a core and wait for their other device for
        # ever.
        found.append(
            jax.block_until_ready(
                programs.statistics(replicated, store, rows, jax.random.fold_in(key, step))
            )
        )
    mean = jax.tree.map(lambda *x: sum(x) / len(x), *found)
    return replicated.replace(batch_stats=mean)


def check_finite(run: Run, stage: Stage, trained: Trained, slices: DeviceSlices) -> dict:
    """Takes the scalars of the last step, when those of all are finite.

    Raises:
      NonFiniteLossError: naming the first step that is not, and the file that lists its slices.
    """
    for step, scalars in enumerate(trained.metrics, start=trained.first):
        if all(map(math.isfinite, scalars.values())):
            continue
        path = run.workdir / "non_finite.json"
        number = step - stage.first_step + 1
        drawn = {
            group: [run.prepared.slice_name(r) for r in records]
            for group, records in slices.sampler(step).items()
        }
        values = {k: str(v) for k, v in scalars.items()}
        write_json(path, {"stage": stage.name, "step": number, "metrics": values, **drawn})
        raise NonFiniteLossError(
            f"{stage.name}, step {number}: {values}; {path} lists the slices of its batch. Look at "
            "their intensities, or try a lower optimizer.learning_rate"
        )
    return scalars


def warn_of_zeros(stage: str, history: list[dict]) -> None:
    """Warns where the last `ZEROS_TO_WARN` validations gave a Dice of 0."""
    last = [h["mean_dice"] for h in history[-ZEROS_TO_WARN:]]
    if len(last) == ZEROS_TO_WARN and not any(last):
        logger.warning(
            "%s: the last %d validations gave a Dice of 0: the network finds nothing. A lower "
            "optimizer.learning_rate may help, or look whether labels lie on their images",
            stage,
            ZEROS_TO_WARN,
        )


def validate(run: Run, state: steps.TrainState) -> tuple[dict, dict[str, np.ndarray]]:
    """Computes validation Dice, {"mean_dice": float, "dice_per_class": {name: float}}; pictures.

    The pictures are of the first volumes, by id: the slice of each that shows most foreground.
    """
    pictures: dict[str, np.ndarray] = {}

    def draw(prediction: evaluation.VolumePrediction) -> None:
        if len(pictures) == OVERLAYS:
            return
        entry = run.prepared.volumes[prediction.volume_id]
        number = int(entry.class_pixels[:, 1:].sum(axis=1).argmax())
        _, truth = run.prepared.read_slices([entry.slices[number]])
        found = prediction.label()[number]
        picture = tensorboard.overlay(grid.first_channel(prediction.image)[number], truth[0], found)
        pictures[prediction.volume_id] = picture

    summary = evaluate_state(
        run,
        state,
        run.split.validation,
        stoppable=False,
        with_distances=False,
        on_prediction=draw,
    )
    if summary["mean_dice"] is None:
        raise ConfigError("the validation volumes show none of the classes; set data.validation")
    return {k: summary[k] for k in ("mean_dice", "dice_per_class")}, pictures
