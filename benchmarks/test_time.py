"""python -m benchmarks.test_time --workdir RUN [--workdir RUN2 ...] --degrees 45 90

Tells what test-time augmentation is worth to finished runs: mean Dice of a role's volumes as
predicted, and as the mean with copies turned by so many degrees either way, the largest component
kept as the run has it. Over several runs the mean difference with a 95 % interval.

By the pool's masks, which training does not see (--role=unlabeled), an angle may be chosen.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from lclseg import evaluation, model_files, predict
from lclseg.cores import usable_cores
from lclseg.data.splits import ROLES
from lclseg.page import tables
from lclseg.page.recorded import find_prepared
from lclseg.run import devices
from lclseg.run.stored_config import as_now
from lclseg.run.workdir import read_json
from lclseg.sweep import mean_and_interval


def dice_of(workdir: Path, role: str, stage: str | None, degrees: Sequence[float]) -> list[float]:
    """Mean Dice of a run's volumes: as predicted, then for each angle with copies turned by it.

    Raises:
      ModelError: no such run or stage.
      SystemExit: the prepared set is not here, or no volume of the role has a mask.
    """
    prepared, why = find_prepared(as_now(read_json(workdir / "config.json")))
    if prepared is None:
        raise SystemExit(why)
    ids = [v for v in read_json(workdir / "splits.json")[role] if prepared.volumes[v].has_label]
    if not ids:
        raise SystemExit(f"{workdir}: found no {role} volume with a mask; wanted some")
    model = model_files.load_run(workdir, stage)
    found = []
    for angles in [(), *((math.radians(d), -math.radians(d)) for d in degrees)]:
        summary = evaluation.evaluate(
            predict.mean_predictor([model._replace(angles=angles)]),
            prepared,
            ids,
            batch_size=model.batch_size,
            with_distances=False,
            one_piece=model.largest_component,
        )
        found.append(summary.get("largest_component", summary)["mean_dice"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser("benchmarks.test_time", description=__doc__)
    parser.add_argument("--workdir", action="append", type=Path, required=True)
    parser.add_argument("--stage", default=model_files.LAST, help="see lclseg.predict; last")
    parser.add_argument("--role", choices=ROLES, default="test", help="whose volumes; test")
    parser.add_argument("--degrees", type=float, nargs="+", required=True)
    options = parser.parse_args()
    devices.set_up_jax(usable_cores())
    rows = [["run", "as predicted", *(f"turned by {d:g}" for d in options.degrees)]]
    gains: list[list[float]] = [[] for _ in options.degrees]
    for workdir in (w.expanduser().absolute() for w in options.workdir):
        plain, *turned = dice_of(workdir, options.role, options.stage, options.degrees)
        for gain, dice in zip(gains, turned, strict=True):
            gain.append(dice - plain)
        name = "/".join(workdir.parts[-2:])
        rows.append([name, *(f"{dice:.4f}" for dice in (plain, *turned))])
    if len(options.workdir) > 1:
        found = [mean_and_interval(gain) for gain in gains]
        rows.append(["gain", "", *(f"{mean:+.4f} ± {half:.4f}" for mean, half in found)])
    print(tables.aligned(rows))


if __name__ == "__main__":
    main()
