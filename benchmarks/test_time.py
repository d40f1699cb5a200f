"""python -m benchmarks.test_time --workdir RUN [--workdir ...] --degrees 90 --crf 1.5 0.05 3

Tells what is gained from finished runs after training: mean Dice of a role's volumes as predicted;
as the mean with copies turned by so many degrees either way; each of these smoothed across slices
by so many mm (--through_plane); and each refined, after that, by a dense CRF of so many pixels, so
much of the intensities' range, and such a weight, on the training grid or one so many times as fine
(--upsampling). The largest component is kept as the run has it.
Over several runs the mean difference with a 95 % interval.

By the pool's masks, which training does not see (--role=unlabeled), an angle, a CRF or a
smoothing may be chosen.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lclseg import evaluation, model_files, predict
from lclseg.cores import usable_cores
from lclseg.data.splits import ROLES
from lclseg.page import tables
from lclseg.page.recorded import find_prepared
from lclseg.run import devices
from lclseg.run.stored_config import as_now
from lclseg.run.workdir import read_json
from lclseg.sweep_table import mean_and_interval

CRF_STEPS = 3  # of mean field


class Variant(NamedTuple):
    """How a run predicts: `angles` of the copies, radians, and the rest, see `TrainedModel`."""

    name: str
    angles: tuple[float, ...]
    crf: dict[str, float]
    crf_upsampling: int
    through_plane_sigma: float


def variants(
    degrees: Sequence[float],
    crfs: Sequence[Sequence[float]],
    sigmas: Sequence[float],
    upsamplings: Sequence[int],
) -> list[Variant]:
    """Every combination of no copies, or copies, no CRF, or one on a grid, no smoothing, or one."""
    copies = [
        ("", ()),
        *((f"turned by {d:g}", (math.radians(d), -math.radians(d))) for d in degrees),
    ]
    refined: list[tuple[str, dict, int]] = [("", {}, 1)]
    for sigma, intensity, weight in crfs:
        settings = {
            "bilateral_sigma": sigma,
            "intensity_sigma": intensity,
            "bilateral_weight": weight,
        }
        name = f"CRF {sigma:g} {intensity:g} {weight:g}"
        # A weight of 0: the kernel that sees no intensities is left out.
        settings |= {"num_steps": CRF_STEPS, "spatial_sigma": 1.0, "spatial_weight": 0.0}
        for finer in upsamplings:
            refined.append((f"{name}, {finer}x" if finer > 1 else name, settings, finer))
    smoothed = [("", 0.0), *((f"smoothed by {sigma:g} mm", sigma) for sigma in sigmas)]
    return [
        Variant(
            ", ".join(filter(None, (of_copies, of_sigma, of_crf))) or "as predicted",
            angles,
            crf,
            finer,
            sigma,
        )
        for of_sigma, sigma in smoothed
        for of_crf, crf, finer in refined
        for of_copies, angles in copies
    ]


def dice_of(workdir: Path, role: str, stage: str | None, how: Sequence[Variant]) -> list[float]:
    """Mean Dice of a run's volumes, predicted in each of these ways.

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
    for variant in how:
        changed = model._replace(
            angles=variant.angles,
            crf=variant.crf,
            crf_upsampling=variant.crf_upsampling,
            through_plane_sigma=variant.through_plane_sigma,
        )
        summary = evaluation.evaluate(
            predict.mean_predictor([changed]),
            prepared,
            ids,
            batch_size=model.batch_size,
            refine=predict.refiner([changed]),
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
    parser.add_argument("--degrees", type=float, nargs="+", default=[])
    parser.add_argument(
        "--crf",
        type=float,
        nargs=3,
        action="append",
        default=[],
        metavar=("PIXELS", "INTENSITY", "WEIGHT"),
        help=f"of crf.dense_crf's second kernel, {CRF_STEPS} steps; may be given several times",
    )
    parser.add_argument(
        "--upsampling",
        type=int,
        nargs="+",
        default=[1],
        metavar="FACTOR",
        help="of the CRF's grid, see crf.upsampled_dense_crf; 1",
    )
    parser.add_argument(
        "--through_plane",
        type=float,
        nargs="+",
        default=[],
        metavar="MM",
        help="see lclseg/through_plane.py",
    )
    options = parser.parse_args()
    devices.set_up_jax(usable_cores())
    how = variants(options.degrees, options.crf, options.through_plane, options.upsampling)
    rows = [["run", *(variant.name for variant in how)]]
    gains: list[list[float]] = [[] for _ in how[1:]]
    for workdir in (w.expanduser().absolute() for w in options.workdir):
        plain, *others = dice_of(workdir, options.role, options.stage, how)
        for gain, dice in zip(gains, others, strict=True):
            gain.append(dice - plain)
        name = "/".join(workdir.parts[-2:])
        rows.append([name, *(f"{dice:.4f}" for dice in (plain, *others))])
    if len(options.workdir) > 1:
        found = [mean_and_interval(gain) for gain in gains]
        rows.append(["gain", "", *(f"{mean:+.4f} ± {half:.4f}" for mean, half in found)])
    print(tables.aligned(rows))


if __name__ == "__main__":
    main()
