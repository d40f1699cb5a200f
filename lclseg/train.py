"""The run: baseline, then rounds of pseudo-labelling and joint training (arXiv:2112.09645).

`train_and_evaluate` is the whole story; `run_round` maps (best state, pseudo-labels) to the next.
"""

import contextlib
import errno
import functools
import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import flax.jax_utils
import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from lclseg import evaluation, quality_gate, report, steps
from lclseg.crf import dense_crf
from lclseg.data import batches, grid, own_data
from lclseg.pseudo_labels import PseudoLabels, load_pseudo_labels, make_pseudo_labels
from lclseg.run import checkpoint, devices, multihost, tensorboard
from lclseg.run.config_checks import ConfigError
from lclseg.run.setup import (
    Run,
    evaluate_state,
    initial_state,
    predictor,
    start_run,
    take_over_baseline,
)
from lclseg.run.stopping import Interrupted
from lclseg.run.workdir import forget_lines, new_results, read_json, write_json, write_text

ZEROS_TO_WARN = 5  # validations in a row
OVERLAYS = 2  # validation volumes shown in TensorBoard
logger = logging.getLogger("lclseg")


class Best(NamedTuple):
    """The best checkpoint of a stage, by mean foreground 3-D Dice on the validation volumes."""

    state: steps.TrainState
    validation_dice: float
    stage: str


def batch_drawer(run: Run, pseudo_labels: PseudoLabels | None) -> Callable[[int], batches.Draw]:
    """step -> which slices: labelled ones, and in the joint stage (with pseudo-labels) pairs."""
    data, seed = run.config.data, run.config.seed
    labeled = batches.ground_truth_pool(run.prepared, run.split.labeled)
    labeled_records = batches.select_slices(
        labeled, min_classes=data.min_classes, at_least=1, role="labelled batch"
    )
    if pseudo_labels is not None:
        composition = batches.PairComposition(**data.pairs)
        view_classes = data.view_min_classes or run.prepared.num_classes
        labeled_views = batches.select_slices(
            labeled, min_classes=view_classes, at_least=1, role="labelled views"
        )
        pseudo_views = batches.select_slices(
            batches.Pool(pseudo_labels.records, pseudo_labels.class_pixels),
            min_classes=view_classes,
            at_least=2,
            role="pseudo-labelled views",
        )

    def draw(step: int) -> batches.Draw:
        records = batches.draw_labeled(seed, step, labeled_records, data.labeled_batch_size)
        if pseudo_labels is None:
            return batches.Draw(records)
        pairs, is_pseudo = batches.draw_pairs(seed, step, labeled_views, pseudo_views, composition)
        return batches.Draw(records, pairs, is_pseudo)

    return draw


def read_batch(run: Run, pseudo_labels: PseudoLabels | None, draw: batches.Draw) -> dict:
    """Reads this process' share of the slices of a draw: a batch, sharded over its devices."""
    draw = batches.Draw(*map(multihost.share, draw))
    batch = batches.read_labeled(run.prepared, draw.labeled)
    if pseudo_labels is not None:
        batch |= batches.read_pairs(run.prepared, pseudo_labels, draw.pairs, draw.is_pseudo)
    return batches.shard(batch, jax.local_device_count())


def fit(
    run: Run,
    stage: str,
    state: steps.TrainState,
    num_steps: int,
    pseudo_labels: PseudoLabels | None,
) -> tuple[Best, list[dict]]:
    """Trains one stage and returns its best checkpoint and its validation history.

    Goes on from the stage's newest checkpoint if there is one.

    Raises:
      FloatingPointError: the loss is not finite.
    """
    rounds = run.config.rounds
    train_step = run.train_steps["baseline" if pseudo_labels is None else "joint"]
    draw = batch_drawer(run, pseudo_labels)
    first_step = int(state.step)  # the stage's first step, counted over the whole run
    digest = pseudo_labels.report["labels_sha256"] if pseudo_labels else None
    history: list[dict] = []
    with contextlib.ExitStack() as stack:
        folder = run.workdir / "checkpoints" / stage
        manager = stack.enter_context(checkpoint.open_stage(folder))
        done = checkpoint.latest_step(manager)
        if done:
            latest, progress = checkpoint.restore(manager, done, state)
            if pseudo_labels and progress["labels_sha256"] != digest:
                raise ConfigError(
                    f"{folder}: training was begun on other pseudo-labels than those in "
                    f"{pseudo_labels.folder}; remove the checkpoint folder to train this round anew"
                )
            history = progress["validation"]
            logger.info("%s: going on from step %d of %d", stage, done, num_steps)
        else:
            latest = state

        def read(step):
            return read_batch(run, pseudo_labels, draw(step))

        def save(dice):
            if not (run.workdir / "config.json").exists():  # Orbax would make the folder anew
                raise FileNotFoundError(errno.ENOENT, "removed under way", str(run.workdir))
            progress = {"validation": history, "labels_sha256": digest}
            checkpoint.save(manager, number, current, progress, dice)

        forget_lines(run.workdir / "metrics.jsonl", stage, after_step=done)
        writer = stack.enter_context(
            tensorboard.open_writer(
                run.workdir / "tensorboard" / stage, after_step=first_step + done
            )
        )

        def log(scalars):
            log_scalars(run, stage, number, scalars)
            for name, value in scalars.items():
                writer.add_scalar(name, value, first_step + number)

        replicated = devices.replicate(latest)
        loaded = batches.read_ahead(read, first_step + done, first_step + num_steps)
        bar = tqdm(loaded, stage, num_steps, initial=done, unit="step", disable=None)
        unchecked = {}  # step: metrics, still on the device
        for number, batch in enumerate(bar, start=done + 1):
            replicated, unchecked[number] = train_step(replicated, batch, run.key)
            log_now = number % run.config.log.every == 0 or number == num_steps
            validate_now = number % rounds.eval_every == 0 or number == num_steps
            # Several processes agree on it where they wait for the devices anyway.
            stop_now = (log_now or validate_now or not multihost.several()) and run.stop_asked()
            if log_now or validate_now or stop_now:
                scalars = check_finite(run, stage, unchecked, lambda n: draw(first_step + n - 1))
                unchecked = {}
            if log_now:
                log(scalars)
                bar.set_postfix(loss=f"{scalars['loss']:.3f}", refresh=False)
            if not (validate_now or stop_now):
                continue
            current = flax.jax_utils.unreplicate(replicated)
            if validate_now and rounds.calibration_batches:
                last = first_step + number
                some = range(max(first_step, last - rounds.calibration_batches), last)
                current = calibrate(run, replicated, {s: read(s) for s in some})
            if validate_now:
                dice, pictures = validate(run, current)
                history.append({"step": number, **dice})
                log({"validation_dice": dice["mean_dice"]})
                for volume_id, picture in pictures.items():
                    writer.add_image(volume_id, picture, first_step + number, dataformats="HWC")
                warn_of_zeros(stage, history)
            save(dice["mean_dice"] if validate_now else None)
            if stop_now and number < num_steps:
                checkpoint.finish(manager)
                raise Interrupted(f"stopped in {stage} after step {number} of {num_steps}")
        checkpoint.finish(manager)
        best_step, score = checkpoint.best(manager)
        best, _ = checkpoint.restore(manager, best_step, state)
    logger.info("%s: best validation Dice %.4f at step %d", stage, score, best_step)
    return Best(best, score, stage), history


def calibrate(run: Run, replicated: steps.TrainState, batches: dict[int, dict]) -> steps.TrainState:
    """The state with BatchNorm's statistics re-estimated from batches (by step), unreplicated."""
    # One at a time: two runs at once may each hold a core and wait for their other device for ever.
    found = [
        jax.block_until_ready(
            run.batch_statistics(replicated, batch, jax.random.fold_in(run.key, step))
        )
        for step, batch in batches.items()
    ]
    mean = jax.tree.map(lambda *x: sum(x) / len(x), *found)
    return flax.jax_utils.unreplicate(replicated.replace(batch_stats=mean))


def check_finite(
    run: Run,
    stage: str,
    unchecked: dict[int, dict],
    draw: Callable[[int], batches.Draw],
) -> dict:
    """Scalars of the last of the steps, when those of all are finite.

    Raises:
      FloatingPointError: naming the first step that is not, and the file that lists its slices.
    """
    for number, metrics in unchecked.items():
        scalars = {k: float(v[0]) for k, v in metrics.items()}
        if all(map(math.isfinite, scalars.values())):
            continue
        path = run.workdir / "non_finite.json"
        slices = {
            role: [run.prepared.slice_name(r) for r in records.ravel()]
            for role, records in (("labeled", draw(number).labeled), ("pairs", draw(number).pairs))
            if records.size
        }
        values = {k: str(v) for k, v in scalars.items()}
        write_json(path, {"stage": stage, "step": number, "metrics": values, **slices})
        raise FloatingPointError(
            f"{stage}, step {number}: {values}; {path} lists the slices of its batch. Look at "
            "their intensities, or try a lower optimizer.learning_rate or loss.contrastive_weight"
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
    """Validation Dice, {"mean_dice": float, "dice_per_class": {name: float}}, and pictures.

    The pictures are of the first volumes, by id: the slice of each that shows most foreground.
    """
    pictures: dict[str, np.ndarray] = {}

    def draw(prediction: evaluation.VolumePrediction) -> None:
        if len(pictures) == OVERLAYS:
            return
        entry = run.prepared.volumes[prediction.volume_id]
        number = int(entry.class_pixels[:, 1:].sum(axis=1).argmax())
        _, truth = run.prepared.read_slices([entry.slices[number]])
        found = prediction.probs[number].argmax(axis=-1)
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


def log_scalars(run: Run, stage: str, step: int, scalars: dict[str, float]) -> None:
    """Appends a line to metrics.jsonl."""
    with (run.workdir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"stage": stage, "step": step, **scalars}) + "\n")


def finish_stage(
    run: Run,
    results: dict,
    best: Best,
    history: list[dict],
    started: float,
    pseudo_labels: PseudoLabels | None,
) -> None:
    """Tests a stage's best checkpoint, once for a number of steps, and writes results.json.

    And report.html, for who follows the run; its pictures of volumes come at the end.
    """
    num_steps = history[-1]["step"]
    if results["results"].get(best.stage, {}).get("num_steps") == num_steps:
        return
    test = evaluate_state(
        run,
        best.state,
        run.split.test,
        stoppable=True,
        with_distances=True,
        save_to=run.workdir / "predictions" / best.stage if multihost.is_first() else None,
    )
    results["results"][best.stage] = {
        "test": test,
        "num_steps": num_steps,
        "best_validation_dice": best.validation_dice,
        "validation": history,
        "pseudo_labels": pseudo_labels.report if pseudo_labels else None,
        "seconds": round(time.monotonic() - started, 1),
    }
    write_json(run.workdir / "results.json", results)
    if multihost.is_first():
        report.write_own_page(run.workdir, None)


def pseudo_label_pool(
    run: Run, best: Best, round_number: int, previous: PseudoLabels | None
) -> PseudoLabels:
    """Pseudo-labels for a round: predicted by the best state, refined by the CRF, gated.

    Read from disk where they are complete and this state's.
    """
    folder = run.workdir / "pseudo_labels" / f"round_{round_number}"
    made_by = {"stage": best.stage, "step": int(best.state.step)}
    stored = read_json(folder / "report.json") or {}
    if multihost.json_from_first(stored.get("made_by")) == made_by:
        for name in ("labels.npy", "report.json"):
            multihost.file_from_first(folder / name)
        return load_pseudo_labels(folder, run.prepared)
    options = run.config.pseudo_labels
    agreements = None
    if options.min_agreement > 0:
        predict = predictor(run, best.state)
        agreements = {
            volume_id: quality_gate.agreement(
                np.random.default_rng((run.config.seed, round_number, entry.first_slice)),
                predict,
                run.prepared.read_slices(entry.slices)[0],
            )
            for volume_id in tqdm(run.split.unlabeled, "gate", disable=None, leave=False)
            for entry in [run.prepared.volumes[volume_id]]
        }
    refine = functools.partial(dense_crf, **run.config.crf) if run.config.crf.num_steps else None
    return make_pseudo_labels(
        predictor(run, best.state, refine),
        run.prepared,
        run.split.unlabeled,
        folder,
        batch_size=run.config.data.eval_batch_size,
        previous=previous,
        labeled_ids=run.split.labeled,
        agreements=agreements,
        min_agreement=options.min_agreement,
        min_confidence=options.min_confidence,
        made_by=made_by,
    )


def run_round(
    run: Run, results: dict, round_number: int, best: Best, pseudo_labels: PseudoLabels
) -> tuple[Best, PseudoLabels]:
    """One round: joint training on the pseudo-labels, then new pseudo-labels by its best state.

    The round starts from the best state of the stage before: from the baseline with fresh heads,
    from an earlier round with that round's.
    """
    started = time.monotonic()
    rounds = run.config.rounds
    first_step = rounds.baseline_steps + (round_number - 1) * rounds.steps_per_round
    optimizer = run.optimizers["joint"]
    start = best.state
    if round_number == 1 and rounds.fresh_heads:
        start = steps.warm_start(start, initial_state(run, round_number))
    state = steps.restart(start, optimizer, step=first_step)
    best, history = fit(run, f"round_{round_number}", state, rounds.steps_per_round, pseudo_labels)
    finish_stage(run, results, best, history, started, pseudo_labels)
    return best, pseudo_label_pool(run, best, round_number + 1, pseudo_labels)


def train_and_evaluate(
    config: ConfigDict, workdir: Path, stop_asked: Callable[[], bool] = lambda: False
) -> dict:
    """Runs baseline and rounds, writes everything below `workdir`, returns results.json's content.

    Started again with the same config and workdir, it goes on where it stopped.

    Raises:
      Interrupted: `stop_asked` gave True; everything is saved.
    """
    started = time.monotonic()
    config, proposed = own_data.complete(config)
    if proposed:
        logger.info("\n%s", proposed)
    run = start_run(config, workdir, stop_asked)
    if proposed and multihost.is_first():
        write_text(workdir / "proposal.txt", proposed + "\n")  # with its warnings, for the page
    results = read_json(workdir / "results.json") or new_results(config, run.prepared, run.split)
    if config.rounds.baseline_from and "baseline" not in results["results"]:
        if multihost.is_first():
            take_over_baseline(run, results)
    results = multihost.json_from_first(results)
    best, history = fit(run, "baseline", initial_state(run, 0), config.rounds.baseline_steps, None)
    finish_stage(run, results, best, history, started, None)
    if config.rounds.num_rounds:
        pseudo_labels = pseudo_label_pool(run, best, 1, None)
    for round_number in range(1, config.rounds.num_rounds + 1):
        best, pseudo_labels = run_round(run, results, round_number, best, pseudo_labels)
    stages = results["results"]
    results["chosen"] = max(stages, key=lambda s: stages[s]["best_validation_dice"])
    write_json(workdir / "results.json", results)
    if multihost.is_first():
        report.write_own_page(workdir, run.prepared)
    return results
