"""Pictures of volumes for the page: the truth and what a run made of it, stage by stage."""

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path

import nibabel as nib
import numpy as np

from lclseg.data import grid, orientation
from lclseg.data.dataset import PreparedSet
from lclseg.metrics import mean_foreground_dice
from lclseg.page import figures
from lclseg.page.elements import figure, key, legend, note, text
from lclseg.page.recorded import RecordedRun, named
from lclseg.page.tables import number
from lclseg.palette import PALETTE
from lclseg.pseudo_labels import PseudoLabelError, load_pseudo_labels

NUM_CHANGED = 3  # volumes shown whose pseudo-labels changed most


def test_pictures(run: RecordedRun) -> Iterator[str]:
    """Shows best, median and worst test volume of the chosen stage: by baseline, it and last."""
    if run.prepared is None:
        yield note(f"No pictures: {run.why_no_pictures}.")
        return
    records = run.stages[run.chosen]["test"]["per_volume"]
    dices = {v: r["mean_dice"] for v, r in records.items() if r["mean_dice"] is not None}
    if not dices:
        yield note("No test volume shows any class.")
        return
    yield _legend(run, "truth", "prediction")
    ranked = sorted(dices, key=lambda v: dices[v], reverse=True)
    last = len(ranked) - 1  # few volumes: one may be more than one of these
    picks = {last // 2: "Median", last: "Worst", 0: "Best"}
    groups = []
    for place, rank in sorted(picks.items()):
        volume_id = ranked[place]
        heading = f"<h4>{rank}: {text(volume_id)}</h4>"
        groups.append(f"<div>{heading}{''.join(_predictions(run, run.prepared, volume_id))}</div>")
    yield f'<div class="groups">{"".join(groups)}</div>'
    yield "<p>Of each volume the slice with most foreground, cut to it; Dice is the volume’s.</p>"


def _predictions(run: RecordedRun, prepared: PreparedSet, volume_id: str) -> Iterator[str]:
    """A test volume by the first, the chosen and the last stage."""
    if volume_id not in prepared.volumes:
        yield note("The prepared set does not hold this volume any more.")
        return
    image, truth = prepared.read_slices(prepared.volumes[volume_id].slices)
    image = grid.first_channel(image)
    stages = list(run.stages)
    labels, captions = [], []
    for stage in sorted({stages[0], run.chosen, stages[-1]}, key=stages.index):
        path = run.workdir / "predictions" / stage / f"{volume_id}.nii.gz"
        if not path.exists():
            yield note(f"There is no {path.relative_to(run.workdir)} any more.")
            continue
        labels.append(_read_prediction(prepared, volume_id, path))
        record = run.stages[stage]["test"]["per_volume"][volume_id]
        by_class = ", ".join(
            f"{c}\N{NO-BREAK SPACE}{number(record['dice'][c], '.2f')}" for c in run.classes
        )
        captions.append(
            f"<b>{text(named(stage))}</b> Dice {number(record['mean_dice'], '.2f')} "
            f"<small>{text(by_class)}</small>"
        )
    areas = truth if truth.any() or not labels else labels[0]
    shown = int(np.count_nonzero(areas, axis=(1, 2)).argmax())
    yield _overlays(image[shown], truth[shown], [label[shown] for label in labels], captions)


def side_by_side(runs: Mapping[str, RecordedRun], volume_id: str) -> Iterator[str]:
    """Shows a test volume by the last weights of several runs, each under its name."""
    run = next(iter(runs.values()))
    if run.prepared is None or volume_id not in run.prepared.volumes:
        yield note(f"No pictures: {run.why_no_pictures or 'the volume is not prepared'}.")
        return
    image, truth = run.prepared.read_slices(run.prepared.volumes[volume_id].slices)
    labels, captions = [], []
    for name, own in runs.items():
        stage = list(own.stages)[-1]
        folders = (own.workdir / folder / stage for folder in ("predictions_last", "predictions"))
        # The last weights are tested apart where they are not the chosen ones.
        path = next((p for f in folders if (p := f / f"{volume_id}.nii.gz").exists()), None)
        if path is None:
            continue
        labels.append(_read_prediction(run.prepared, volume_id, path))
        dice = own.stages[stage]["test_last"]["per_volume"][volume_id]["mean_dice"]
        captions.append(f"<b>{text(name)}</b> Dice {number(dice, '.2f')}")
    shown = int(np.count_nonzero(truth, axis=(1, 2)).argmax())
    yield _legend(run, "truth", "prediction")
    slices = [label[shown] for label in labels]
    yield _overlays(grid.first_channel(image)[shown], truth[shown], slices, captions)


def changed_pictures(run: RecordedRun) -> Iterator[str]:
    """Shows the volumes whose pseudo-labels changed most between rounds, by all rounds."""
    if run.prepared is None:
        yield note(f"No pictures: {run.why_no_pictures}.")
        return
    labels: dict[str, dict[str, np.ndarray]] = {}  # by volume, by round
    for name in run.pseudo_label_reports():
        folder = run.workdir / "pseudo_labels" / name
        if not (folder / "report.json").exists():
            continue
        try:
            stored = load_pseudo_labels(folder, run.prepared)
        except PseudoLabelError as error:
            yield note(str(error))
            continue
        for volume_id in stored.report["volume_ids"]:
            slices = np.asarray(run.prepared.volumes[volume_id].slices)
            labels.setdefault(volume_id, {})[name] = stored.read(slices)
    agreements: dict[str, dict[str, float]] = {}
    for volume_id, own in labels.items():
        for before, later in itertools.pairwise(own):
            dice = mean_foreground_dice(own[before], own[later], run.prepared.num_classes)
            if dice is not None:  # else both are empty: nothing has changed
                agreements.setdefault(volume_id, {})[later] = dice
    if not agreements:
        yield note("No picture: no volume has pseudo-labels of two rounds to compare yet.")
        return
    yield "<h4>Changed most between rounds</h4>"
    yield _legend(run, "hidden truth, where there is any", "pseudo-label")
    ranked = sorted(agreements, key=lambda v: min(agreements[v].values()))
    for volume_id in ranked[:NUM_CHANGED]:
        yield f"<h5>{text(volume_id)}</h5>"
        yield _rounds(run, run.prepared, volume_id, labels[volume_id], agreements[volume_id])
    yield "<p>Of each volume the slice where most pixels changed, cut to its foreground.</p>"


def _rounds(
    run: RecordedRun,
    prepared: PreparedSet,
    volume_id: str,
    labels: Mapping[str, np.ndarray],
    agreements: Mapping[str, float],
) -> str:
    """A volume's pseudo-labels round by round, with their Dice with those before."""
    entry = prepared.volumes[volume_id]
    image, truth = prepared.read_slices(entry.slices)
    image = grid.first_channel(image)
    pairs = itertools.pairwise(labels.values())
    changed = sum(np.count_nonzero(label != before, axis=(1, 2)) for before, label in pairs)
    shown = int(changed.argmax())
    captions = []
    for name in labels:
        caption = f"<b>{text(run.used_by(name))}</b>"
        if name in agreements:
            caption += f" <small>Dice with the round before {agreements[name]:.2f}</small>"
        captions.append(caption)
    return _overlays(
        image[shown],
        truth[shown] if entry.has_label else None,
        [label[shown] for label in labels.values()],
        captions,
    )


def _legend(run: RecordedRun, filled: str, outlined: str) -> str:
    colors = itertools.cycle(PALETTE)
    keys = (key(name, c, "area") for name, c in zip(run.classes, colors, strict=False))
    return legend(keys, f"<span>areas: {filled}, lines: {outlined}</span>")


def _overlays(
    image: np.ndarray, truth: np.ndarray | None, labels: list[np.ndarray], captions: list[str]
) -> str:
    """A slice [H, W] under its truth, once with each label, all cut to the same square."""
    square = box([*labels, truth] if truth is not None else labels)
    filled = None if truth is None else truth[square]
    shown = [
        figure(figures.overlay(image[square], filled=filled, outlined=label[square]), caption)
        for label, caption in zip(labels, captions, strict=True)
    ]
    return f'<div class="pictures">{"".join(shown)}</div>'


def _read_prediction(prepared: PreparedSet, volume_id: str, path: Path) -> np.ndarray:
    """A stored prediction on the training grid, where the image is: [S, H, W]."""
    label = np.asarray(nib.Nifti1Image.from_filename(path).dataobj).astype(np.uint8)
    native = prepared.read_native(volume_id)
    return grid.label_to_grid(
        orientation.to_volume(label, native.orientation),
        native.spacing_mm,
        image_size=prepared.image_size,
        target_spacing_mm=prepared.target_spacing_mm,
    )


def box(labels: list[np.ndarray]) -> tuple[slice, slice]:
    """Finds a square about the foreground of all labels [H, W], with a margin, within the slice."""
    size = labels[0].shape[0]
    foreground = np.any([(label > 0) & (label < 255) for label in labels], axis=0)
    if not foreground.any():
        return slice(None), slice(None)
    ends = [(np.flatnonzero(foreground.any(axis=a))[[0, -1]]) for a in (1, 0)]
    side = max(max(int(high - low) for low, high in ends) * 3 // 2 + 1, size // 3)
    side = min(side, size)
    top, left = (int(np.clip((low + high + 1 - side) // 2, 0, size - side)) for low, high in ends)
    return slice(top, top + side), slice(left, left + side)
