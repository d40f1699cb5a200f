"""python -m benchmarks.suggest --workdir RUN [--workdir RUN2 ...] [--label 3 --output FOLDER]

Tells how well lclseg.suggest knows a pool whose truth is hidden (ACDC, hippocampus, phantom):
Spearman's and Pearson's correlation of expected and true Dice over the run's unlabelled volumes,
and the mean difference of the two, by the number of draws.

With --label N it trains on, too: from the run's weights, supervised, once with a mask of the
suggested volume more and N times with one of a random volume more, and prints the test Dice of
each. FOLDER takes these runs; started again, finished ones are read. The suggestion is made with
the first of --draws.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from scipy import stats

from lclseg import evaluation, metrics, model_files, predict, quality_gate, suggest, train
from lclseg.cores import usable_cores
from lclseg.data.dataset import PreparedSet
from lclseg.page import tables
from lclseg.page.recorded import find_prepared
from lclseg.run import devices, progress
from lclseg.run.stored_config import as_now
from lclseg.run.workdir import read_json


def look_at(
    network: evaluation.Predict,
    prepared: PreparedSet,
    volume_id: str,
    *,
    draws: Sequence[int],
    flips: bool,
) -> tuple[float, dict[int, suggest.Looked]]:
    """True Dice of a volume, and what `suggest.look` gives, by the number of draws."""
    native = prepared.read_native(volume_id)
    image, _ = prepared.read_slices(prepared.volumes[volume_id].slices)
    record = metrics.volume_metrics(
        evaluation.to_native_label(prepared, volume_id, network(image)),
        native.label,
        native.spacing_mm,
        class_names=prepared.class_names,
        with_distances=False,
    )
    looked = {n: suggest.look(network, prepared, volume_id, draws=n, flips=flips) for n in draws}
    return record["mean_dice"], looked


def correlations(true: np.ndarray, found: Sequence[dict[int, suggest.Looked]]) -> list[list[str]]:
    """A row for each number of draws: Spearman, Pearson, mean difference, mean absolute one."""
    rows = []
    for n in found[0]:
        expected = np.array([looked[n].expected_dice for looked in found])
        rows.append(
            [
                str(n),
                f"{stats.spearmanr(expected, true).statistic:.3f}",
                f"{stats.pearsonr(expected, true).statistic:.3f}",
                f"{np.mean(expected - true):+.3f}",
                f"{np.mean(abs(expected - true)):.3f}",
            ]
        )
    return rows


def test_dice(config: ConfigDict, workdir: Path, volume_id: str, prepared, roles) -> float:
    """Test Dice of supervised training from the run's weights with one mask more."""
    config = config.copy_and_resolve_references()
    patient = {v: prepared.volumes[v].patient_id for v in prepared.volumes}
    labeled = [*roles["labeled"], volume_id]
    unlabeled = [v for v in roles["unlabeled"] if patient[v] not in {patient[x] for x in labeled}]
    lists = {**roles, "labeled": labeled, "unlabeled": unlabeled}
    lists = {role: tuple(dict.fromkeys(patient[v] for v in ids)) for role, ids in lists.items()}
    config.data.update(lists)
    # A stored config has the lists only.
    config.data.update({"splits": {}, "pool": lists["unlabeled"], "test_patients": lists["test"]})
    config.rounds.update({"num_rounds": 0, "baseline_from": ""})
    results = train.train_and_evaluate(config, workdir / volume_id)
    return results["results"]["baseline"]["test_last"]["mean_dice"]


def main() -> None:
    parser = argparse.ArgumentParser("benchmarks.suggest", description=__doc__)
    parser.add_argument("--workdir", action="append", type=Path, required=True)
    parser.add_argument("--stage", help="see lclseg.predict")
    parser.add_argument(
        "--draws", type=int, nargs="+", default=[suggest.DRAWS], help="pairs of predictions"
    )
    parser.add_argument("--label", type=int, default=0, help="random volumes to compare with")
    parser.add_argument("--output", type=Path, help="folder for the runs of --label")
    options = parser.parse_args()
    if options.label and not options.output:
        parser.error("--label needs --output")
    devices.set_up_jax(usable_cores())
    for workdir in (w.expanduser().absolute() for w in options.workdir):
        config = as_now(read_json(workdir / "config.json"))
        roles = read_json(workdir / "splits.json")
        prepared, why = find_prepared(config)
        if prepared is None:
            parser.error(why)
        network = predict.mean_predictor([model_files.load_run(workdir, options.stage)])
        ids = [v for v in roles["unlabeled"] if prepared.volumes[v].has_label]
        seen = progress.each(ids, "looking at the pool", len(ids), say=progress.to_stderr)
        how = {"draws": options.draws, "flips": quality_gate.has_seen_flips(config["augment"])}
        true, found = zip(*(look_at(network, prepared, v, **how) for v in seen), strict=True)
        print(
            f"{workdir}: {len(ids)} volumes, true Dice {np.mean(true):.3f}, sd {np.std(true):.3f}"
        )
        head = ["draws", "Spearman", "Pearson", "too high by", "off by"]
        print(tables.aligned([head, *correlations(np.array(true), found)]))
        if not options.label:
            continue
        pool = {v: looked[options.draws[0]] for v, looked in zip(ids, found, strict=True)}
        labelled = [
            suggest.look(network, prepared, v, draws=0, flips=False) for v in roles["labeled"]
        ]
        first = suggest.rank(pool, labelled, 1, {})[0].volume_id
        rng = np.random.default_rng(0)
        others = rng.permutation([v for v in ids if v != first])[: options.label]
        start = ConfigDict(config)
        start.rounds.start_from = str(workdir)
        folder = options.output.expanduser().absolute() / workdir.name
        dice = [test_dice(start, folder, v, prepared, roles) for v in [first, *map(str, others)]]
        mean = np.mean(dice[1:])
        print(f"one mask more: suggested {first} {dice[0]:.3f}; random, mean of ", end="")
        print(f"{len(others)}: {mean:.3f}; suggested is better by {dice[0] - mean:+.3f}")


if __name__ == "__main__":
    main()
