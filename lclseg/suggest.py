"""python -m lclseg.suggest --workdir=RUN

Estimates how good the prediction of each unlabelled volume of a run is, lists the poorest first,
and writes masks of these to start from. Correct them in ITK-SNAP or 3D Slicer, put them beside your
other masks, and train again with --config.rounds.start_from=RUN.
"""

import argparse
import csv
import functools
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from lclseg import evaluation, model_files, predict, quality_gate
from lclseg.components import largest_component
from lclseg.cores import usable_cores
from lclseg.data import case_files, nifti
from lclseg.data.dataset import PreparedSet
from lclseg.data.layouts import Files
from lclseg.errors import in_words
from lclseg.model_files import TrainedModel
from lclseg.page import suggestions, tables
from lclseg.page.recorded import RunError, find_prepared
from lclseg.page.suggestions import Suggestion
from lclseg.run import devices, progress
from lclseg.run.stored_config import as_now
from lclseg.run.workdir import read_json, write_json, write_text

DRAWS = 4  # pairs of augmented predictions of a volume


def look(
    network: evaluation.Predict,
    prepared: PreparedSet,
    volume_id: str,
    *,
    draws: int,
    flips: bool,
) -> float:
    """Estimates a volume's Dice, the same each time; see `quality_gate.expected_dice`."""
    entry = prepared.volumes[volume_id]
    image, _ = prepared.read_slices(entry.slices)
    rng = np.random.default_rng((0, entry.first_slice))
    return quality_gate.expected_dice(rng, network, image, draws=draws, flips=flips)


def find_images(config: dict) -> dict[str, Files]:
    """Finds files of own data by volume id; {} of other data sets, or where they are gone."""
    data = ConfigDict(config["data"])
    if data.name != case_files.NAME:
        return {}
    try:
        cases = case_files.find_cases(Path(data.manual_dir).expanduser(), data.get("exclude", ()))
    except nifti.VolumeError:
        return {}
    return {case.case_id: case._replace(label=None) for case in cases}


def predict_volume(
    network: evaluation.Predict, model: TrainedModel, prepared: PreparedSet, volume_id: str
) -> evaluation.VolumePrediction:
    """Predicts a volume of the run's data set as the model hands it out."""
    (found,) = evaluation.predict_volumes(
        network,
        prepared,
        [volume_id],
        batch_size=model.batch_size,
        refine=predict.refiner([model]),
    )
    return found


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
            refine=predict.refiner([model]),
            keep_largest=model.largest_component,
        )
    for volume_id in volume_ids:
        if volume_id in files:
            continue
        native = prepared.read_native(volume_id)
        probs = predict_volume(network, model, prepared, volume_id).probs
        label = evaluation.to_native_label(probs, native, prepared)
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
    """Looks at the pool, ranks it, writes table, page and masks: the whole command.

    Args:
      workdir: of a run, finished or under way, with its prepared data set on this machine.
      output: folder that is not there yet, or is empty.
      stage: see `model_files.load_run`.
      count: volumes to show and to write masks of.
      draws: see `quality_gate.expected_dice`.

    Returns:
      The volumes of the pool, the lowest expected Dice first.

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
        raise RunError(f"{workdir}: the run has no unlabelled volumes; there is none to look at")
    prepared, why = find_prepared(config)
    if prepared is None:
        raise RunError(f"{why}; wanted it here: copy it, or train where it is")
    network = predict.mean_predictor([model])
    # Its agreement is between single copies, as the network has them: a mean over copies agrees
    # with itself, and so would what is smoothed, or follows the image's edges.
    single = model._replace(angles=())
    plain = predict.mean_predictor([single]) if model.angles else network
    flips = quality_gate.has_seen_flips(as_now(config)["augment"])
    ids = roles["unlabeled"]
    seen = progress.each(ids, "looking at the pool", len(ids), leave=False, say=progress.to_stderr)
    expected = {v: look(plain, prepared, v, draws=draws, flips=flips) for v in seen}
    files = find_images(config)
    ranked = [
        Suggestion(
            rank=rank,
            volume_id=volume_id,
            expected_dice=expected[volume_id],
            image=str(files[volume_id].image) if volume_id in files else "",
            mask=f"masks/{volume_id}.nii.gz" if rank <= count else "",
        )
        for rank, volume_id in enumerate(sorted(expected, key=lambda v: expected[v]), start=1)
    ]
    chosen = [s.volume_id for s in ranked[:count]]
    write_masks(network, model, prepared, chosen, files, output / "masks")
    write_text(output / "suggestions.csv", as_csv(ranked))
    about = {"workdir": str(workdir), "stage": model.facts["stage"], "step": model.facts["step"]}
    volumes = [s._asdict() for s in ranked]
    write_json(output / "suggestions.json", {"model": about, "volumes": volumes})
    html = suggestions.page(
        config,
        about,
        prepared,
        functools.partial(predict_volume, network, model, prepared),
        ranked,
        keep_largest=model.largest_component,
    )
    write_text(output / "suggestions.html", html)
    return ranked


def as_csv(ranked: Sequence[Suggestion]) -> str:
    """Makes CSV of the table, with a line of names."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Suggestion._fields)
    for s in ranked:
        writer.writerow([s.rank, s.volume_id, f"{s.expected_dice:.4f}", s.image, s.mask])
    return text.getvalue()


@in_words()
def main(argv: Sequence[str] | None = None) -> None:
    # Not absl's flags: those of all modules of a process share their names.
    parser = argparse.ArgumentParser("lclseg.suggest", allow_abbrev=False, description=__doc__)
    add = parser.add_argument
    add("--workdir", type=Path, required=True, help="of the run")
    add("--output", type=Path, help="new folder; default: suggestions/ in the workdir")
    add("--stage", help="baseline, round_1, ...: its best model; last: the newest weights")
    add("--count", type=int, default=3, help="volumes to show and to write masks of (3)")
    add("--draws", type=int, default=DRAWS, help=f"pairs of augmented predictions ({DRAWS})")
    options = parser.parse_args(argv)
    for name in ("count", "draws"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; wanted 1 or more")
    devices.set_up_jax(usable_cores())
    workdir = options.workdir.expanduser().absolute()
    output = (options.output or workdir / "suggestions").expanduser()
    ranked = suggest(workdir, output, stage=options.stage, count=options.count, draws=options.draws)
    rows = [["", "volume", "expected Dice"]]
    rows += [[str(s.rank), s.volume_id, f"{s.expected_dice:.3f}"] for s in ranked[: options.count]]
    print(f"{tables.aligned(rows)}\n\n{output}/suggestions.html")


if __name__ == "__main__":
    main()
