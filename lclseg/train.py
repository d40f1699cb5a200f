"""The run: baseline, then rounds of pseudo-labelling and joint training (arXiv:2112.09645).

`train_and_evaluate` is the whole story; `run_round` maps (best state, pseudo-labels) to the next.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from lclseg import model_files, passes, quality_gate, report, steps
from lclseg.data import own_data
from lclseg.pseudo_labels import PseudoLabels, load_pseudo_labels, make_pseudo_labels
from lclseg.run import devices, multihost, progress
from lclseg.run.config_checks import check_config
from lclseg.run.predictions import evaluate_state, predictor, refinement
from lclseg.run.programs import Stage, stages
from lclseg.run.setup import Run, initial_state, start_run
from lclseg.run.start_from import take_over_baseline
from lclseg.run.workdir import chosen_stage, new_results, read_json, write_json, write_text
from lclseg.stage import Best, fit, mark_of, slices_of

SECONDS = "seconds.json"  # of making pseudo-labels, beside them
logger = logging.getLogger("lclseg")


def finish_stage(run: Run, results: dict, best: Best, pseudo_labels: PseudoLabels | None) -> None:
    """Tests a stage's best checkpoint and its last weights, and writes results.json.

    Once for a number of steps. And report.html, for who follows the run; its pictures of volumes
    come at the end.
    """
    num_steps, name = best.stage.num_steps, best.stage.name
    if results["results"].get(name, {}).get("num_steps") == num_steps:
        return
    started = time.monotonic()
    choice = run.config.predictions.largest_component

    def test(state, folder):
        return evaluate_state(
            run,
            devices.replicate(state),
            run.split.test,
            stoppable=True,
            with_distances=True,
            # Tested with and without, also where every component is handed out.
            one_piece=run.classes_in_one_piece("by_masks" if choice == "no" else choice),
            save_to=run.workdir / folder / name if multihost.is_first() else None,
        )

    chosen = test(best.state, "predictions")
    same = int(best.state.step) == int(best.last.step)
    last = chosen if same else test(best.last, "predictions_last")
    seconds = {**best.seconds, "test": time.monotonic() - started}
    seconds.pop("device", None)  # a part of "train"; see `cost`
    if pseudo_labels is not None:
        made = read_json(pseudo_labels.folder / SECONDS) or {}
        spent = seconds.get("pseudo_labels", 0.0) + made.get("seconds", 0.0)
        seconds["pseudo_labels"] = spent
    results["results"][name] = {
        "test": chosen,
        "test_last": last,
        "num_steps": num_steps,
        "best_validation_dice": best.validation_dice,
        "validation": best.history,
        "pseudo_labels": pseudo_labels.report if pseudo_labels else None,
        "seconds": {k: round(v, 1) for k, v in seconds.items()},
        **cost(run, best, pseudo_labels),
    }
    write_json(run.workdir / "results.json", results)
    if multihost.is_first():
        report.write_own_page(run.workdir, None)


def cost(run: Run, best: Best, pseudo_labels: PseudoLabels | None) -> dict:
    """Measures what the training of a stage took.

    Slices that went through the network in its steps, steps a second, the share of that time in
    which the devices had work, and the most memory that a device held.
    """
    stage, how = best.stage, run.prepared.preprocessing
    groups = slices_of(run, stage.kind, pseudo_labels).sampler(stage.first_step)
    channels = (how.num_channels,) if how.num_channels > 1 else ()
    slices = passes.slices_in_step(
        run.model,
        run.programs[stage.kind].method,
        best.state,
        {group: len(records) for group, records in groups.items()},
        (how.image_size, how.image_size, *channels),
    )
    return {
        "slices": slices * stage.num_steps,
        **mark_of(stage.num_steps, best.seconds).since(mark_of(0, {})),
        "peak_memory_bytes": devices.peak_memory_bytes(),
    }


def pseudo_label_pool(
    run: Run, best: Best, round_number: int, previous: PseudoLabels | None
) -> PseudoLabels:
    """Makes pseudo-labels for a round: predicted by the best state, refined by the CRF, gated.

    Read from disk where they are complete and this state's. The time that they took stands in a
    file of its own: their report is the same for the same labels.
    """
    started = time.monotonic()
    folder = run.workdir / "pseudo_labels" / f"round_{round_number}"
    made_by = {"stage": best.stage.name, "step": int(best.state.step)}
    stored = read_json(folder / "report.json") or {}
    if multihost.json_from_first(stored.get("made_by")) == made_by:
        for name in ("labels.npy", "report.json"):
            multihost.file_from_first(folder / name)
        return load_pseudo_labels(folder, run.prepared)
    options = run.config.pseudo_labels
    replicated = devices.replicate(best.state)
    agreements = None
    if options.min_agreement > 0:
        predict = predictor(run, replicated)
        agreements = {
            volume_id: quality_gate.agreement(
                np.random.default_rng((run.config.seed, round_number, entry.first_slice)),
                predict,
                run.prepared.read_slices(entry.slices)[0],
                flips=quality_gate.has_seen_flips(run.config.augment),
            )
            for volume_id in progress.each(
                run.split.unlabeled, "quality gate", len(run.split.unlabeled), leave=False
            )
            for entry in [run.prepared.volumes[volume_id]]
        }
    # Probabilities come to the host, not labels: reports and NIfTI files are in each volume's own
    # geometry, to which probabilities are resampled.
    made = make_pseudo_labels(
        predictor(
            run,
            replicated,
            test_time_augmentation=options.test_time_augmentation,
        ),
        run.prepared,
        run.split.unlabeled,
        folder,
        batch_size=run.config.data.eval_batch_size,
        refine=refinement(run.config, options),
        previous=previous,
        labeled_ids=run.split.labeled,
        agreements=agreements,
        min_agreement=options.min_agreement,
        min_confidence=options.min_confidence,
        keep_largest=run.classes_in_one_piece(options.largest_component),
        made_by=made_by,
    )
    write_json(folder / SECONDS, {"seconds": round(time.monotonic() - started, 1)})
    return made


def first_state(run: Run) -> steps.TrainState:
    """Makes the state that the first stage starts from: drawn weights, or another run's best.

    Heads that the other run does not have are drawn.
    """
    fresh = initial_state(run, "first")
    if not run.config.rounds.start_from:
        return fresh
    source = model_files.load_run(Path(run.config.rounds.start_from).expanduser().absolute())
    logger.info("starting from the weights of %s, %s", source.source, source.facts["stage"])
    params, statistics = source.state.ema_params, source.state.batch_stats
    return fresh.replace(
        ema_params={k: params.get(k, v) for k, v in fresh.params.items()},
        batch_stats={k: statistics.get(k, v) for k, v in fresh.batch_stats.items()},
    )


def run_stage(
    run: Run, results: dict, stage: Stage, before: Best | None, pseudo_labels: PseudoLabels | None
) -> Best:
    """Trains and tests one stage.

    The first one starts from drawn weights, or from those of another run; the next from the best
    state of the one before, with fresh heads where the config wants them.
    """
    if before is None:
        state = first_state(run)
    elif before.stage.kind == "first":
        fresh_heads = run.config.rounds.fresh_heads
        fresh = initial_state(run, stage.kind, fresh_heads=fresh_heads)
        state = steps.warm_start(before.state, fresh, fresh_heads=fresh_heads)
    else:
        state = before.state
    state = steps.restart(
        state,
        run.programs[stage.kind].optimizer,
        first_step=stage.first_step,
        num_steps=stage.num_steps,
        init_memory=run.programs[stage.kind].method.init_memory,
    )
    best = fit(run, stage, state, pseudo_labels)
    finish_stage(run, results, best, pseudo_labels)
    return best


def train_and_evaluate(
    config: ConfigDict, workdir: Path, stop_asked: Callable[[], bool] = lambda: False
) -> dict:
    """Runs all stages, writes everything below `workdir`, returns results.json's content.

    Started again with the same config and workdir, it goes on where it stopped.

    Raises:
      Interrupted: `stop_asked` gave True; everything is saved.
    """
    check_config(config, num_devices=jax.device_count())
    config, proposed = own_data.complete(config)
    if proposed:
        logger.info("\n%s", proposed)
    run = start_run(config, workdir, stop_asked)
    with run.lock:
        if proposed and multihost.is_first():
            write_text(workdir / "proposal.txt", proposed + "\n")  # with its warnings, for the page
        return train_stages(run)


def train_stages(run: Run) -> dict:
    """Does what `train_and_evaluate` does, in a workdir that is this run's."""
    config, workdir = run.config, run.workdir
    results = read_json(workdir / "results.json") or new_results(config, run.prepared, run.split)
    if config.rounds.baseline_from and "baseline" not in results["results"]:
        if multihost.is_first():
            take_over_baseline(run.config, run.workdir, results)
    results = multihost.json_from_first(results)
    first, *others = stages(config, run.method)
    best, pseudo_labels = run_stage(run, results, first, None, None), None
    for number, stage in enumerate(others, start=1):
        if run.method.offline:
            pseudo_labels = pseudo_label_pool(run, best, number, pseudo_labels)
        best = run_stage(run, results, stage, best, pseudo_labels)
    if others and run.method.offline:
        pseudo_label_pool(run, best, len(others) + 1, pseudo_labels)
    results["chosen"] = chosen_stage(results["results"])
    write_json(workdir / "results.json", results)
    if multihost.is_first():
        report.write_own_page(workdir, run.prepared)
    return results
