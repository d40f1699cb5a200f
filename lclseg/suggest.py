"""python -m lclseg.suggest --workdir=RUN

Tells which unlabelled volumes of a run are worth a mask next: it ranks them by what their masks
would teach, shows how good the prediction of each is expected to be, and writes masks to start
from. Correct these in ITK-SNAP or 3D Slicer, put them beside your other masks, and train again with
--config.rounds.start_from=RUN.
"""

import argparse
import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from lclseg import evaluation, model_files, next_volume, predict, quality_gate
from lclseg.components import largest_component
from lclseg.cores import usable_cores
from lclseg.data import nifti, own_data
from lclseg.data.dataset import PreparedSet
from lclseg.data.layouts import Files
from lclseg.errors import in_words
from lclseg.model_files import TrainedModel
from lclseg.page import tables
from lclseg.page.recorded import RunError, find_prepared
from lclseg.run import devices, progress
from lclseg.run.stored_config import as_now
from lclseg.run.workdir import read_json, write_json, write_text

DRAWS = 4  # pairs of augmented predictions of a volume


class Looked(NamedTuple):
    """What the network makes of a volume.

    Attributes:
      expected_dice: see `next_volume.expected_dice`; None for a labelled volume.
      features: [F], see `next_volume.describe`.
    """

    expected_dice: float | None
    features: np.ndarray


class Suggestion(NamedTuple):
    """A volume of the pool, as the table tells of it.

    Attributes:
      rank: 1, 2, ... of those suggested; None of the others.
      volume_id: as in the run's files.
      expected_dice: in 0..1.
      distance: to the nearest labelled volume, in spreads of the features.
      gain: see `next_volume.Choice`; None of those not suggested.
      image, mask: paths, "" where there is none.
    """

    rank: int | None
    volume_id: str
    expected_dice: float
    distance: float
    gain: float | None
    image: str
    mask: str


def look(
    network: evaluation.Predict,
    prepared: PreparedSet,
    volume_id: str,
    *,
    draws: int,
    flips: bool,
    seed: int = 0,
) -> Looked:
    """Predicts a volume, plain and, with `draws` above 0, augmented; see `Looked`.

    `flips`: see `quality_gate.has_seen_flips`.
    """
    entry = prepared.volumes[volume_id]
    image, _ = prepared.read_slices(entry.slices)
    features = next_volume.describe(image, network(image))
    if not draws:
        return Looked(None, features)
    rng = np.random.default_rng((seed, entry.first_slice))
    expected = next_volume.expected_dice(rng, network, image, draws=draws, flips=flips)
    return Looked(expected, features)


def rank(
    pool: dict[str, Looked], labelled: Sequence[Looked], count: int, images: dict[str, str]
) -> list[Suggestion]:
    """The volumes of the pool: `count` suggested ones, then the others, lowest quality first."""
    ids = list(pool)
    quality = np.array([pool[v].expected_dice for v in ids])
    within, to_labelled = next_volume.distances(
        np.stack([pool[v].features for v in ids]), np.stack([x.features for x in labelled])
    )
    choices = next_volume.choose(quality, within, to_labelled, count)
    chosen = {c.number: (place, c.gain) for place, c in enumerate(choices, start=1)}
    others = [n for n in np.argsort(quality, kind="stable") if n not in chosen]
    return [
        Suggestion(
            rank=chosen[n][0] if n in chosen else None,
            volume_id=ids[n],
            expected_dice=float(quality[n]),
            distance=float(to_labelled[n].min()),
            gain=chosen[n][1] if n in chosen else None,
            image=images.get(ids[n], ""),
            mask=f"masks/{ids[n]}.nii.gz" if n in chosen else "",
        )
        for n in [*chosen, *others]
    ]


def find_images(config: dict) -> dict[str, Files]:
    """Files of own data by volume id; {} of other data sets, or where they are gone."""
    data = ConfigDict(config["data"])
    if data.name != own_data.NAME:
        return {}
    try:
        cases = own_data.find_cases(Path(data.manual_dir).expanduser(), data.get("exclude", ()))
    except nifti.VolumeError:
        return {}
    return {case.case_id: case._replace(label=None) for case in cases}


def write_masks(
    network: evaluation.Predict,
    model: TrainedModel,
    prepared: PreparedSet,
    volume_ids: Sequence[str],
    files: dict[str, Files],
    folder: Path,
) -> None:
    """Writes NAME.nii.gz, the prediction of each volume in its native geometry.

    Of own data it has the header of its image and the label values of the other masks, as
    `lclseg.predict` writes it. Of other data sets it has class numbers, as all that a run writes.
    The largest component is kept of the classes that the run says.
    """
    cases = [files[v] for v in volume_ids if v in files]
    outputs = predict.plan_outputs(cases, folder, with_probabilities=False, with_metrics=False)
    if cases:
        predict.segment(
            network,
            model.preprocessing,
            cases,
            outputs,
            batch_size=model.batch_size,
            keep_largest=model.largest_component,
        )
    for volume_id in volume_ids:
        if volume_id in files:
            continue
        image, _ = prepared.read_slices(prepared.volumes[volume_id].slices)
        native = prepared.read_native(volume_id)
        label = evaluation.to_native_label(prepared, volume_id, network(image))
        label = largest_component(label, model.largest_component)
        nifti.write_label(
            folder / f"{volume_id}.nii.gz",
            label,
            native.affine,
            native.spacing_mm,
            turn=native.orientation,
        )


def suggest(
    workdir: Path, output: Path, *, stage: str | None = None, count: int = 3, draws: int = DRAWS
) -> list[Suggestion]:
    """The whole command: looks at the pool, ranks it, writes table, page and masks.

    Args:
      workdir: of a run, finished or under way, with its prepared data set on this machine.
      output: folder that is not there yet, or is empty.
      stage: see `model_files.load_run`.
      count: volumes to suggest.
      draws: see `next_volume.expected_dice`.

    Returns:
      The volumes of the pool, the suggested ones first.

    Raises:
      ModelError, RunError: no run, no prepared set, no pool; the folder holds something.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RunError(
            f"{output} exists and is not an empty folder; corrected masks may lie there: choose "
            "another --output"
        )
    model = model_files.load_run(workdir, stage)
    config = read_json(workdir / "config.json") or {}
    roles = read_json(workdir / "splits.json") or {}
    if not roles.get("unlabeled"):
        raise RunError(f"{workdir}: the run has no unlabelled volumes; there is none to suggest")
    prepared, why = find_prepared(config)
    if prepared is None:
        raise RunError(f"{why}; wanted it here: copy it, or train where it is")
    network = predict.mean_predictor([model])
    flips = quality_gate.has_seen_flips(as_now(config)["augment"])

    def looked_at(ids: Sequence[str], what: str, draws: int) -> dict[str, Looked]:
        seen = progress.each(ids, what, len(ids), leave=False, say=progress.to_stderr)
        return {v: look(network, prepared, v, draws=draws, flips=flips) for v in seen}

    labelled = looked_at(roles["labeled"], "looking at labelled volumes", 0)
    pool = looked_at(roles["unlabeled"], "looking at the pool", draws)
    files = find_images(config)
    images = {v: str(case.image) for v, case in files.items()}
    suggestions = rank(pool, list(labelled.values()), count, images)
    chosen = [s.volume_id for s in suggestions if s.rank is not None]
    write_masks(network, model, prepared, chosen, files, output / "masks")
    write_text(output / "suggestions.csv", as_csv(suggestions))
    about = {"workdir": str(workdir), "stage": model.facts["stage"], "step": model.facts["step"]}
    volumes = [s._asdict() for s in suggestions]
    write_json(output / "suggestions.json", {"model": about, "volumes": volumes})
    from lclseg.page import suggestions as page  # here: matplotlib is slow to load

    html = page.page(
        config, about, prepared, network, suggestions, keep_largest=model.largest_component
    )
    write_text(output / "suggestions.html", html)
    return suggestions


def as_csv(suggestions: Sequence[Suggestion]) -> str:
    """The table as CSV, with a line of names; None is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Suggestion._fields)
    for s in suggestions:
        numbers = (f"{v:.4f}" if isinstance(v, float) else v for v in s)
        writer.writerow(["" if v is None else v for v in numbers])
    return text.getvalue()


@in_words()
def main(argv: Sequence[str] | None = None) -> None:
    # Not absl's flags: those of all modules of a process share their names.
    parser = argparse.ArgumentParser("lclseg.suggest", allow_abbrev=False, description=__doc__)
    add = parser.add_argument
    add("--workdir", type=Path, required=True, help="of the run")
    add("--output", type=Path, help="new folder; default: suggestions/ in the workdir")
    add("--stage", help="baseline, round_1, ...: its best model; last: the newest weights")
    add("--count", type=int, default=3, help="volumes to suggest (3)")
    add("--draws", type=int, default=DRAWS, help=f"pairs of augmented predictions ({DRAWS})")
    options = parser.parse_args(argv)
    for name in ("count", "draws"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; wanted 1 or more")
    devices.set_up_jax(usable_cores())
    workdir = options.workdir.expanduser().absolute()
    output = (options.output or workdir / "suggestions").expanduser()
    suggestions = suggest(
        workdir, output, stage=options.stage, count=options.count, draws=options.draws
    )
    rows = [["", "volume", "expected Dice", "gain"]]
    for s in suggestions[: options.count]:
        rows.append([str(s.rank), s.volume_id, f"{s.expected_dice:.3f}", f"{s.gain:.1%}"])
    print(f"{tables.aligned(rows)}\n\n{output}/suggestions.html")


if __name__ == "__main__":
    main()
