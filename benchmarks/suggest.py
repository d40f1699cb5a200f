"""python -m benchmarks.suggest --workdir RUN [--workdir RUN2 ...]

Tells how well lclseg.suggest knows a pool whose truth is hidden (ACDC, hippocampus, phantom):
Spearman's and Pearson's correlation of expected and true Dice over the run's unlabelled volumes,
and the mean difference of the two, by the number of draws.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from lclseg import evaluation, metrics, model_files, predict, quality_gate, suggest
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
) -> tuple[float, dict[int, float]]:
    """True Dice of a volume, and its expected one, see `suggest.look`, by the number of draws."""
    native = prepared.read_native(volume_id)
    image, _ = prepared.read_slices(prepared.volumes[volume_id].slices)
    record = metrics.volume_metrics(
        evaluation.to_native_label(network(image), native, prepared),
        native.label,
        native.spacing_mm,
        class_names=prepared.class_names,
        with_distances=False,
    )
    expected = {n: suggest.look(network, prepared, volume_id, draws=n, flips=flips) for n in draws}
    return record["mean_dice"], expected


def correlations(true: np.ndarray, found: Sequence[dict[int, float]]) -> list[list[str]]:
    """A row for each number of draws: Spearman, Pearson, mean difference, mean absolute one."""
    rows = []
    for n in found[0]:
        expected = np.array([values[n] for values in found])
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


def main() -> None:
    parser = argparse.ArgumentParser("benchmarks.suggest", description=__doc__)
    parser.add_argument("--workdir", action="append", type=Path, required=True)
    parser.add_argument("--stage", help="see lclseg.predict")
    parser.add_argument(
        "--draws", type=int, nargs="+", default=[suggest.DRAWS], help="pairs of predictions"
    )
    options = parser.parse_args()
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


if __name__ == "__main__":
    main()
