"""python -m lclseg.predict --workdir=RUN --input=FILE_OR_FOLDER --output=FOLDER

Segments volumes of any size, spacing and orientation with the best model of a run, that of a
--stage, or a model that lclseg.export wrote; several --workdir: with the mean of their
probabilities. Results lie on the input, in the label values of the data set.
"""

import argparse
import collections
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from lclseg import evaluation, export, metrics, model_files
from lclseg.class_groups import Kind, names_of
from lclseg.components import largest_component
from lclseg.cores import usable_cores
from lclseg.data import grid, nifti, orientation, preprocess
from lclseg.data.layouts import (
    FOREIGN,
    KNOWN,
    Files,
    group_channels,
    is_label,
    is_volume,
    stem,
    volumes_of,
)
from lclseg.data.nifti import VolumeError
from lclseg.data.preprocess import Preprocessing
from lclseg.errors import in_words
from lclseg.model_files import ModelError, TrainedModel, kept_largest
from lclseg.page import tables
from lclseg.run import devices, progress
from lclseg.run.workdir import write_json

# Where a label of NAME may be: the ways of ACDC, nnU-Net and MM-WHS among them.
LABEL_NAMES: tuple[Callable[[str], str], ...] = (
    lambda name: name,
    lambda name: f"{name}_gt",
    lambda name: name.removesuffix("_0000"),
    lambda name: name.removesuffix("_image") + "_label",
)


# Of each class the largest connected component: as the run says, of all classes, of none.
LARGEST_COMPONENT = ("run", "yes", "no")
FAR = 3.0  # times the spacings seen in training: told
FAR_MEDIAN = 0.25  # of the range of intensities, beyond the medians seen in training: told


class Outputs(NamedTuple):
    """Files to write: `labels` and `probabilities` by case id; `metrics` None where not asked."""

    labels: dict[str, Path]
    probabilities: dict[str, Path]
    metrics: Path | None


def find_cases(source: Path, labels: Path | None = None) -> list[Files]:
    """Finds the images to segment, by id, each with its label where a folder of labels is given.

    Args:
      source: a volume, or a folder of them, see `layouts.SUFFIXES`; NAME_0000, NAME_0001, ... are
        the channels of NAME. Folders below are not looked at, nor is NAME_gt beside NAME.
      labels: folder; see `LABEL_NAMES`.

    Raises:
      VolumeError: no image, two of one id, an image without label.
    """
    if source.is_dir():
        found = volumes_of(source)
        names = {stem(p) for p in found}
        found = [p for p in found if not (is_label(p) and stem(p).removesuffix("_gt") in names)]
        if not found:
            there = sorted({p.suffix for p in source.iterdir() if p.is_file()})
            hints = sorted({FOREIGN[s.lower()] for s in there if s.lower() in FOREIGN})
            raise VolumeError(
                f"{source}: no volume in it, found {' '.join(there) or 'no file'}; wanted {KNOWN}"
                f"{': ' if hints else ''}{'; '.join(hints)}"
            )
    elif not source.exists() and not source.is_symlink():
        raise VolumeError(f"{source}: no such file or folder")
    elif not is_volume(source):
        raise VolumeError(f"{source}: wanted a folder, or a file called {KNOWN}")
    else:
        found = [source]
    cases = group_channels(found, {})
    by_id = collections.defaultdict(list)
    for case in cases:
        by_id[case.case_id].append(case.image)
    problems = [
        f"{' and '.join(map(str, paths))} would have the same result, {case_id}.nii.gz; rename or "
        "move all but one"
        for case_id, paths in by_id.items()
        if len(paths) > 1
    ]
    if labels is not None and not labels.is_dir():
        problems.append(f"{labels}: no such folder; wanted one with a label for each image")
    if problems:
        raise VolumeError("\n".join(problems))
    if labels is not None:
        cases = [c._replace(label=_label_of(c.image, labels)) for c in cases]
    missing = [c for c in cases if labels is not None and c.label is None]
    if missing:
        raise VolumeError(
            "\n".join(
                f"{labels}: no label of {c.image}; wanted {c.case_id}.nii.gz or "
                f"{c.case_id}_gt.nii.gz"
                for c in missing
            )
        )
    return cases


def _label_of(image: Path, folder: Path) -> Path | None:
    files = {stem(p): p for p in volumes_of(folder) if not p.samefile(image)}
    for name_of in LABEL_NAMES:
        if name_of(stem(image)) in files:
            return files[name_of(stem(image))]
    return None


def plan_outputs(
    cases: Sequence[Files], folder: Path, *, with_probabilities: bool, with_metrics: bool
) -> Outputs:
    """Names the files to write, none of which may exist.

    Raises:
      VolumeError: one does, or two results would have the same name.
    """
    if folder.exists() and not folder.is_dir():
        raise VolumeError(f"{folder}: found a file; wanted a folder, or a name that is free")
    ids = [c.case_id for c in cases]
    outputs = Outputs(
        {i: folder / f"{i}.nii.gz" for i in ids},
        {i: folder / f"{i}_probabilities.nii.gz" for i in ids if with_probabilities},
        folder / "metrics.json" if with_metrics else None,
    )
    files = [*outputs.labels.values(), *outputs.probabilities.values()]
    repeated = sorted({str(p) for p in files if files.count(p) > 1})
    if repeated:
        raise VolumeError(
            f"{', '.join(repeated)} would be written twice, as labels and as probabilities; rename "
            "the image"
        )
    files += [outputs.metrics] if outputs.metrics else []
    existing = [str(p) for p in files if os.path.lexists(p)]
    if existing:
        shown = ", ".join(existing[:8]) + (", ..." if len(existing) > 8 else "")
        raise VolumeError(
            f"{len(existing)} result(s) exist already: {shown}; move them away, or choose another "
            "--output"
        )
    return outputs


def load_models(folders: Sequence[Path], stage: str | None = None) -> list[TrainedModel]:
    """Opens runs and exported models, which must agree in classes and preprocessing.

    Args:
      folders: of runs and of exported models.
      stage: of the runs, see `model_files.load_run`; None: their best. Exported models have one.

    Raises:
      ModelError: one cannot be loaded, or what differs between them.
    """
    models = []
    for folder in folders:
        if not (folder / export.MODEL_FILE).exists():
            models.append(model_files.load_run(folder, stage))
            continue
        models.append(export.read_model(folder))
        if stage is not None and stage != models[-1].facts["stage"]:
            raise ModelError(
                f"{folder}: an exported model of the stage {models[-1].facts['stage']!r}; found "
                f"--stage={stage}: leave it out, or give the run that the model comes from"
            )
    first = models[0]
    for other in models[1:]:
        differing = [
            f"{field} is {getattr(first.preprocessing, field)} and "
            f"{getattr(other.preprocessing, field)}"
            for field in Preprocessing._fields
            if not field.startswith("seen_")
            if getattr(first.preprocessing, field) != getattr(other.preprocessing, field)
        ]
        if differing:
            raise ModelError(
                f"{first.source} and {other.source} cannot be averaged: {'; '.join(differing)}; "
                "give runs of the same classes and preprocessing"
            )
    return models


def classes_to_clean(models: Sequence[TrainedModel], choice: str) -> tuple[Kind, ...]:
    """Finds the classes of which predictions keep the largest component, by `LARGEST_COMPONENT`.

    Raises:
      ModelError: by "run", where the models say different things.
    """
    first = models[0]
    if choice != "run":
        return tuple(range(1, len(first.preprocessing.class_names) + 1)) if choice == "yes" else ()
    for other in models[1:]:
        if other.largest_component != first.largest_component:
            of_first, of_other = (", ".join(kept_largest(m)) or "no class" for m in (first, other))
            raise ModelError(
                f"{first.source} keeps the largest component of {of_first}, {other.source} of "
                f"{of_other}; wanted one rule for their mean: set --largest_component=yes (of all "
                "classes) or no"
            )
    return first.largest_component


def refiner(models: Sequence[TrainedModel]) -> evaluation.Refine | None:
    """Makes what refines the mean of the models' probabilities; see `evaluation.refiner`.

    Raises:
      ModelError: they say different things.
    """
    first = models[0]
    for other in models[1:]:
        for field in ("through_plane_sigma", "crf", "crf_upsampling"):
            ours, theirs = getattr(first, field), getattr(other, field)
            if ours != theirs:
                raise ModelError(
                    f"{first.source} has a {field} of {ours or 'none'}, {other.source} of "
                    f"{theirs or 'none'}; wanted the same for their mean: give runs whose "
                    "predictions are refined in one way"
                )
    crf = None
    if first.crf:
        crf = devices.batched_crf(**first.crf, upsampling=first.crf_upsampling)
    return evaluation.refiner(first.through_plane_sigma, crf)


def mean_predictor(models: Sequence[TrainedModel]) -> evaluation.Predict:
    """Maps slices [M, H, W] to the mean of the models' probabilities [M, H, W, C]."""
    predictors = [
        devices.batched_predictor(
            devices.compiled_predict(model_files.unet(m.preprocessing, m.architecture), m.angles),
            devices.replicate(m.state),
            batch_size=-(-m.batch_size // (1 + len(m.angles))),
        )
        for m in models
    ]

    def predict(images: np.ndarray) -> np.ndarray:
        total = predictors[0](images)
        for other in predictors[1:]:
            total = total + other(images)
        return total / len(predictors)

    return predict


def read_case(case: Files, how: Preprocessing) -> nifti.Volume:
    """Reads a case on the axes of the model, its label [X, Y, S] uint8 where it has one.

    Raises:
      VolumeError: whatever keeps the case from being predicted or compared.
    """
    volume, others = preprocess.read_case(case, how)
    # Only others: labels of another data set, or classes in place of its values.
    known = volume.label is not None and (volume.label > 0).any()
    if others and not (how.others_are_background and known):
        raise VolumeError(
            f"{case.label}: found label values {', '.join(f'{v:g}' for v in others)}; wanted 0 "
            f"and the classes' {', '.join(map(str, how.label_values))}: give labels of the data "
            "set that the model was trained on, or map their values"
        )
    return nifti.oriented(volume, how.orientation)


def check_cases(cases: Sequence[Files], how: Preprocessing) -> list[str]:
    """Looks at every case before anything is predicted.

    Returns:
      Warnings of what is unlike the volumes that the model was trained on, a line each.

    Raises:
      VolumeError: a line for each problem of any case.
    """
    problems: list[str] = []
    warnings: list[str] = []
    for case in tqdm(cases, "checking", disable=None, leave=False):
        try:
            volume = read_case(case, how)
        except VolumeError as error:
            problems += str(error).splitlines()
        else:
            warnings += unlike_training(case, volume, how)
    if problems:
        raise VolumeError("\n".join(problems))
    return warnings


def unlike_training(case: Files, volume: nifti.Volume, how: Preprocessing) -> Iterator[str]:
    """Yields warnings where spacing or intensities are far from those of the prepared volumes."""
    yield from nifti.read_geometry(case.image).warnings if how.channel is None else ()
    if how.seen_spacing_mm:
        odd = [
            (spacing, low, high)
            for spacing, (low, high) in zip(volume.spacing_mm, how.seen_spacing_mm, strict=True)
            if not low / FAR <= spacing <= high * FAR
        ]
        for spacing, low, high in odd[:1]:
            yield (
                f"{case.image}: voxels of {spacing:.4g} mm, in training {low:.4g} to {high:.4g} mm "
                "along that axis; is the header right? Expect a poor result"
            )
    if how.seen_median:
        image = volume.image
        median = grid.relative_median(image if image.ndim == 3 else image[..., 0])
        low, high = how.seen_median
        if not low - FAR_MEDIAN <= median <= high + FAR_MEDIAN:
            yield (
                f"{case.image}: median intensity {median:.2f} of its range, in training {low:.2f} "
                f"to {high:.2f}; is it an image of the same kind? Expect a poor result"
            )


def _slices(volume: nifti.Volume, how: Preprocessing) -> np.ndarray:
    """What the network sees of a volume: [S, H, W] float32, or [S, H, W, K]."""
    return preprocess.to_slices(
        volume.image,
        volume.spacing_mm,
        image_size=how.image_size,
        target_spacing_mm=how.target_spacing_mm,
        n4_shrink_factor=how.n4_shrink_factor,
        windows=how.windows,
    )


def segment(
    predict: evaluation.Predict,
    how: Preprocessing,
    cases: Sequence[Files],
    outputs: Outputs,
    *,
    batch_size: int,
    refine: evaluation.Refine | None = None,
    keep_largest: Sequence[Kind] = (),
) -> dict:
    """Predicts cases and writes the results.

    Args:
      predict: slices -> class probabilities.
      how: preprocessing, classes and label values.
      cases: what to segment.
      outputs: see `plan_outputs`.
      batch_size: slices per call of `predict`.
      refine: see `refiner`.
      keep_largest: classes of which a label keeps the largest component alone; probabilities stay
        as they are.

    Returns:
      Metrics of the cases with a label, see `metrics.summarize`.
    """
    values = np.array((0, *how.label_values), np.min_scalar_type(max(how.label_values)))
    image_of = {case.case_id: case.image for case in cases}
    native: dict[str, nifti.Volume] = {}  # of the volumes under way
    records = {}

    def read() -> Iterator[tuple[str, np.ndarray]]:
        for case in cases:
            volume = read_case(case, how)
            native[case.case_id] = volume
            yield case.case_id, _slices(volume, how)

    predictions = evaluation.predict_images(predict, read(), batch_size=batch_size)
    seen = progress.each(predictions, "segmenting", len(cases), leave=False, say=progress.to_stderr)
    for case_id, image, _, probs in seen:
        volume = native.pop(case_id)
        spacing_mm, turn = volume.spacing_mm, volume.orientation
        if refine is not None:
            probs = refine(image, probs, spacing_mm[2])
        back: dict[str, Any] = {
            "shape": volume.image.shape[:2],
            "target_spacing_mm": evaluation.spacing_of(probs, how),
        }
        label = grid.probs_to_native_label(probs, spacing_mm, **back)
        label = largest_component(label, keep_largest)
        if outputs.probabilities:
            native_probs = grid.probs_to_native(probs, spacing_mm, **back)
            filed = orientation.to_file(native_probs, turn)
            nifti.write_like(outputs.probabilities[case_id], filed, image_of[case_id])
        filed = orientation.to_file(values[label], turn)
        nifti.write_like(outputs.labels[case_id], filed, image_of[case_id])
        if volume.label is not None:
            records[case_id] = metrics.volume_metrics(
                *evaluation.without_ignored(label, volume.label),
                spacing_mm,
                class_names=how.class_names,
            )
    return metrics.summarize(records, class_names=how.class_names)


def table(summary: dict) -> str:
    """Shows Dice, HD95 and ASSD of each volume and class, then the means, as aligned text."""
    rows = [["volume", "class", "Dice", "HD95 mm", "ASSD mm", ""]]
    specs = (".4f", ".2f", ".2f")  # of `metrics.MEASURES`

    def cells(values: Iterable[float | None]) -> list[str]:
        return [tables.number(v, spec) for v, spec in zip(values, specs, strict=True)]

    for volume_id, record in summary["per_volume"].items():
        for name in record["dice"]:
            note = [k for k in ("excluded", "missed") if name in record[k]]
            values = cells(record[m][name] for m in metrics.MEASURES)
            rows.append([volume_id, name, *values, *(note or [""])])
    for name in summary["dice_per_class"]:
        values = cells(summary[f"{m}_per_class"][name] for m in metrics.MEASURES)
        rows.append(["mean", name, *values, ""])
    rows.append(["mean", "all", *cells(summary[f"mean_{m}"] for m in metrics.MEASURES), ""])
    return tables.aligned(rows)


def predict_files(
    folders: Sequence[Path],
    source: Path,
    output: Path,
    *,
    with_probabilities: bool = False,
    labels: Path | None = None,
    stage: str | None = None,
    largest: str = "run",
) -> dict | None:
    """Checks everything, predicts, writes, and returns metrics if asked for: the whole command.

    Raises:
      ModelError, VolumeError: before the first volume is predicted.
    """
    cases = find_cases(source, labels)
    outputs = plan_outputs(
        cases, output, with_probabilities=with_probabilities, with_metrics=labels is not None
    )
    models = load_models(folders, stage)
    how = models[0].preprocessing
    cleaned = classes_to_clean(models, largest)
    refine = refiner(models)
    names = names_of(cleaned, how.class_names)
    for warning in check_cases(cases, how):
        print(f"lclseg: WARNING: {warning}", file=sys.stderr)
    if names:
        told = f"lclseg: of {', '.join(names)} the largest component is kept"
        print(f"{told}; --largest_component=no keeps all", file=sys.stderr)
    summary = segment(
        mean_predictor(models),
        how,
        cases,
        outputs,
        batch_size=models[0].batch_size,
        refine=refine,
        keep_largest=cleaned,
    )
    if outputs.metrics is None:
        return None
    described = [
        {"source": str(m.source)}
        | {k: m.facts[k] for k in ("dataset", "stage", "step", "validation_dice")}
        for m in models
    ]
    write_json(outputs.metrics, {"models": described, "largest_component": names, **summary})
    return summary


@in_words()
def main(argv: Sequence[str] | None = None) -> None:
    # Not absl's flags: those of all modules of a process share their names.
    parser = argparse.ArgumentParser("lclseg.predict", allow_abbrev=False, description=__doc__)
    add = parser.add_argument
    add("--workdir", action="append", type=Path, required=True, help="run or exported model")
    add("--stage", help="baseline, joint, round_1, ...: its best model; last: the newest weights")
    add(
        "--input",
        type=Path,
        required=True,
        help="volume (NIfTI, MetaImage, NRRD), or folder of them",
    )
    add("--output", type=Path, required=True, help="folder for NAME.nii.gz")
    add(
        "--largest_component",
        choices=LARGEST_COMPONENT,
        default="run",
        help="keep of each class the largest connected component alone: as the run says, which is "
        "of classes that are one piece in all masks learnt from; yes: of all classes; no",
    )
    add("--probabilities", action="store_true", help="write NAME_probabilities.nii.gz, too")
    add("--labels", type=Path, help="folder of labels: Dice, HD95 and ASSD are computed")
    options = parser.parse_args(argv)
    devices.set_up_jax(usable_cores())
    summary = predict_files(
        [p.expanduser().absolute() for p in options.workdir],
        options.input.expanduser(),
        options.output.expanduser(),
        with_probabilities=options.probabilities,
        labels=options.labels and options.labels.expanduser(),
        stage=options.stage,
        largest=options.largest_component,
    )
    if summary is not None:
        print(table(summary))
    print(options.output)


if __name__ == "__main__":
    main()
