"""One HTML page on runs: whole in itself, no scripts, readable offline, light or dark.

What comes from data, such as volume ids and class names, passes through `html.escape`: all of it
in `_text`, `_table` and `_keys`. Figures hold numbers and names of stages only.
"""

import datetime
import html
import itertools
import json
import os
import runpy
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from ml_collections import ConfigDict

from lclseg import figures, proposal, volumes
from lclseg.configuration import MACHINE_KEYS, differing_keys
from lclseg.figures import INK, MUTED, SERIES, Line
from lclseg.palette import PALETTE
from lclseg.prepared import PreparedSet, open_prepared
from lclseg.pseudo_labels import (
    PseudoLabelError,
    PseudoLabels,
    load_pseudo_labels,
    mean_foreground_dice,
)
from lclseg.run_files import read_json

CONFIGS = Path(__file__).parents[1] / "configs"
STYLE = Path(__file__).with_name("page.css")
MIN_PLACES = 3  # of a strip chart: narrower ones would be blown up to the width of the others
NUM_CHANGED = 3  # volumes shown whose pseudo-labels changed most
LOSSES = {"loss": INK, "segmentation_loss": SERIES[0], "pseudo_label_loss": SERIES[1]}


class RunError(ValueError):
    """A folder that holds no run; the message tells what is missing."""


class Run(NamedTuple):
    """A run as its workdir has it.

    Attributes:
      name: tells it from the other runs of a page.
      workdir: its folder.
      config: content of config.json.
      results: content of results.json; {} before a stage is finished.
      lines: of metrics.jsonl.
      prepared: the data set; None: no pictures of volumes.
      why_no_pictures: the reason, where `prepared` is None.
    """

    name: str
    workdir: Path
    config: dict
    results: dict
    lines: list[dict]
    prepared: PreparedSet | None
    why_no_pictures: str

    @property
    def stages(self) -> dict[str, dict]:
        """Results of the finished stages."""
        return self.results.get("results", {})

    @property
    def classes(self) -> list[str]:
        return self.results.get("class_names", [])

    @property
    def chosen(self) -> str:
        """The finished stage with the best validation Dice, the first of equals."""
        return max(self.stages, key=lambda s: self.stages[s]["best_validation_dice"])


def read_run(
    workdir: Path, name: str, prepared: PreparedSet | None = None, why_no_pictures: str = ""
) -> Run:
    """Reads a workdir, finished or not.

    Raises:
      RunError: there is no run in it.
    """
    config = read_json(workdir / "config.json")
    if config is None:
        raise RunError(f"{workdir} holds no run: there is no config.json; wanted a run's --workdir")
    results = read_json(workdir / "results.json") or {}
    lines = []
    path = workdir / "metrics.jsonl"
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:  # the last one of a run that goes on, or was ended, as it was written
            continue
    return Run(name, workdir, config, results, lines, prepared, why_no_pictures)


def find_prepared(config: dict) -> tuple[PreparedSet | None, str]:
    """The prepared set of a config read from JSON, or None and why; nothing is prepared."""
    keys = ("name", "image_size", "target_spacing_mm", "n4_shrink_factor", "data_dir", "manual_dir")
    data = config["data"]
    grid = {k: v for k, v in data.items() if k in keys}  # an old config may lack one
    try:
        options = proposal.builder_options(ConfigDict(data))
        return open_prepared(**grid, options=options, prepare=False), ""
    except volumes.VolumeError as error:
        return None, str(error)


def names_of(workdirs: Sequence[Path]) -> list[str]:
    """What tells the folders apart: their paths without the parts that all begin and end with."""
    parts = [w.parts for w in workdirs]
    if len(parts) == 1:
        return [workdirs[0].name]
    first = len(os.path.commonprefix(parts))
    last = len(os.path.commonprefix([p[first:][::-1] for p in parts]))
    return ["/".join(p[first : len(p) - last]) or p[-1] for p in parts]


def page(runs: Sequence[Run]) -> str:
    """The page: a run's sections; for several runs a comparison, then each run's sections."""
    if len(runs) == 1:
        title = _title(runs[0])
        body = [_head(runs[0], 1), *_sections(runs[0], 0, 2)]
    else:
        title = f"{len(runs)} runs"
        body = [f"<header><h1>{title} of lclseg</h1></header>", *_comparison(runs)]
        for number, run in enumerate(runs):
            body += [f'<article id="run-{number}">', _head(run, 2)]
            body += [*_sections(run, number, 3), "</article>"]
    return _PAGE.format(title=_text(title), style=STYLE.read_text(), body="\n".join(body))


def reproducing_command(config: dict) -> str | None:
    """The command that gives this config, by the config files as they are now; None: there is none.

    Values other than those of `configs/<data set>.py` become overrides.
    """
    name = config["data"]["name"]
    path = CONFIGS / f"{name}.py"
    if not name.isidentifier() or not path.exists():  # it is run: of this folder only
        return None
    stored = runpy.run_path(str(path))["get_config"]()
    defaults = json.loads(stored.to_json_best_effort())
    overrides = []
    for key in differing_keys(defaults, config):
        *groups, name = key.split(".")
        theirs, ours = defaults, config
        for group in groups:
            theirs, ours = theirs.get(group, {}), ours.get(group, {})
        # A key of one side only, or patient lists of another version: no override gives these.
        if name not in theirs or name not in ours or key.startswith("data.splits."):
            return None
        value = ours[name]
        if value is None:  # no flag can say so
            return None
        text = str(tuple(value) if isinstance(value, list) else value)
        overrides.append(shlex.quote(f"--config.{key}={text}"))
    return " ".join(["python -m lclseg.main", f"--config=configs/{path.name}", *overrides])


def _text(value: object) -> str:
    return html.escape(str(value))


def _number(value: float | None, spec: str = ".3f") -> str:
    return "–" if value is None else format(value, spec)


def _named(stage: str) -> str:
    return stage.replace("_", " ")


def _table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    marked: Sequence[int] = (),
    kind: str = "",
) -> str:
    """A table of plain text cells; the first of each row is its head, `marked` rows stand out.

    `kind` "runs" has room for runs' names, "text" likewise, for cells of words.
    """
    lines = [f'<div class="scroll"><table class="{kind}"><thead><tr>']
    lines += [f'<th scope="col">{_text(cell)}</th>' for cell in head]
    lines.append("</tr></thead><tbody>")
    for number, (first, *cells) in enumerate(rows):
        lines.append('<tr class="marked">' if number in marked else "<tr>")
        lines.append(f'<th scope="row">{_text(first)}</th>')
        lines += [f"<td>{_text(cell)}</td>" for cell in cells]
        lines.append("</tr>")
    return "".join([*lines, "</tbody></table></div>"])


def _keys(names: Iterable[str], colors: Iterable[str], shape: str = "line") -> str:
    """A legend: a patch of colour before each name."""
    items = (
        f'<span class="key"><i class="{shape}" style="--key: {c}"></i>{_text(n)}</span>'
        for n, c in zip(names, colors, strict=False)
    )
    return f'<p class="keys">{"".join(items)}</p>'


def _variables() -> Iterator[str]:
    """CSS colours of the classes, or runs, in charts."""
    return itertools.cycle(f"var(--c{k})" for k in range(len(SERIES)))


def _figure(svg: str, caption: str, told: str) -> str:
    """A figure; `caption` is HTML, `told` the text for who cannot see it."""
    return (
        f'<figure role="group" aria-label="{_text(told)}">{svg}'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _details(summary: str, content: str) -> str:
    return f"<details><summary>{summary}</summary>{content}</details>"


def _section(level: int, title: str, *content: str) -> str:
    return "\n".join(["<section>", f"<h{level}>{title}</h{level}>", *content, "</section>"])


def _note(text: str) -> str:
    return f'<p class="note">{_text(text)}</p>'


def _title(run: Run) -> str:
    data = run.config["data"]
    seed = run.config["seed"]
    return f"{data['name']}, {data['num_labeled']} labelled, split {data['split']}, seed {seed}"


def _head(run: Run, level: int) -> str:
    name = f'<p class="name">{_text(run.name)}</p>' if level > 1 else ""
    volumes_by_role = run.results.get("volumes")
    lines = [f"<header>{name}<h{level}>{_text(_title(run))}</h{level}>"]
    if volumes_by_role:
        counts = ", ".join(
            f"{len(volumes_by_role[role])} {text}"
            for role, text in (
                ("labeled", "labelled"),
                ("unlabeled", "unlabelled"),
                ("validation", "validation"),
                ("test", "test"),
            )
        )
        lines.append(f"<p>{_text(run.results['description'])}</p><p>{counts} volumes.</p>")
    rounds = run.config["rounds"]["num_rounds"]
    if "chosen" not in run.results:
        done = ", ".join(map(_named, run.stages)) or "no stage"
        last = "".join(
            f", last step {line['step']} of {_named(line['stage'])}" for line in run.lines[-1:]
        )
        lines.append(
            f'<p class="warning">Not finished: {_text(done)} done, wanted the baseline and '
            f"{rounds} rounds{_text(last)}. The command that began it goes on "
            "from there.</p>"
        )
    return "\n".join([*lines, "</header>"])


def _sections(run: Run, number: int, level: int) -> Iterator[str]:
    """All on one run; `number` keeps its figures' names apart from other runs'."""
    prefix = f"r{number}"
    if run.stages:
        yield _summary(run, level)
    yield _curves(run, prefix, level)
    if run.stages:
        yield _strips(run, prefix, level)
        yield _section(level, "Test volumes: truth and prediction", *_test_pictures(run, prefix))
    yield _section(level, "Pseudo-labels", *_pseudo_labels(run, prefix))
    yield _origin(run, level)


def _summary(run: Run, level: int) -> str:
    chosen = run.chosen
    baseline = run.stages.get("baseline")
    rows, distances = [], []
    for stage, result in run.stages.items():
        test = result["test"]
        has_gain = baseline and stage != "baseline"
        rows.append(
            [
                _named(stage),
                _number(result["best_validation_dice"]),
                _number(test["mean_dice"]),
                _number(_difference(test, baseline["test"]), "+.3f") if has_gain else "",
                *(_number(test["dice_per_class"][c]) for c in run.classes),
                _number(test["mean_hausdorff95_mm"], ".2f"),
                _number(test["mean_assd_mm"], ".2f"),
                str(test["n_missed"]),
            ]
        )
        cells = [
            _number(test[f"{measure}_mm_per_class"][c], ".2f")
            for measure in ("hausdorff95", "assd")
            for c in run.classes
        ]
        distances.append([_named(stage), *cells])
    head = ["stage", "validation Dice", "test Dice", "gain", *(f"{c} Dice" for c in run.classes)]
    marked = [list(run.stages).index(chosen)]
    measures = [f"{c} {m}" for m in ("HD95 mm", "ASSD mm") for c in run.classes]
    return _section(
        level,
        "Summary",
        _table([*head, "HD95 mm", "ASSD mm", "missed"], rows, marked),
        f"<p>Means over test volumes, in native geometry. Marked: {_text(_named(chosen))}, the "
        "best on validation volumes. Missed: class and volume where either truth or prediction is "
        "empty; these count as Dice 0 and the volume’s diagonal.</p>",
        _details("Distances by class", _table(["stage", *measures], distances, marked)),
    )


def _difference(test: Mapping, other: Mapping) -> float | None:
    if test["mean_dice"] is None or other["mean_dice"] is None:
        return None
    return test["mean_dice"] - other["mean_dice"]


def _starts(run: Run) -> dict[str, int]:
    """Steps before each stage that the run has begun, counted over the whole run."""
    rounds = run.config["rounds"]
    begun = {*run.stages, *(line["stage"] for line in run.lines)}
    starts = {"baseline": 0} | {
        f"round_{k}": rounds["baseline_steps"] + (k - 1) * rounds["steps_per_round"]
        for k in range(1, rounds["num_rounds"] + 1)
    }
    return {stage: start for stage, start in starts.items() if stage in begun}


def _logged(run: Run, key: str) -> tuple[list[int], list[float]]:
    """Steps over the whole run and values of a key of metrics.jsonl; NaN between stages."""
    x, y = [], []
    for stage, start in _starts(run).items():
        found = [line for line in run.lines if line["stage"] == stage and key in line]
        x += [start + line["step"] for line in found] + [start]
        y += [line[key] for line in found] + [float("nan")]
    return x, y


def _validation(run: Run, class_name: str | None) -> tuple[list[int], list[float]]:
    """Steps and validation Dice, of a class or the mean; of a stage in progress the mean only."""
    x, y = [], []
    for stage, start in _starts(run).items():
        if stage in run.stages:
            for entry in run.stages[stage]["validation"]:
                x.append(start + entry["step"])
                value = entry["dice_per_class"][class_name] if class_name else entry["mean_dice"]
                y.append(float("nan") if value is None else value)
        elif class_name is None:
            for line in run.lines:
                if line["stage"] == stage and "validation_dice" in line:
                    x.append(start + line["step"])
                    y.append(line["validation_dice"])
        x.append(start)
        y.append(float("nan"))
    return x, y


def _has_values(line: Line) -> bool:
    return not np.isnan(line.y).all()


def _curves(run: Run, prefix: str, level: int) -> str:
    marks = [(start, _named(stage)) for stage, start in _starts(run).items() if start]
    losses = {
        key: Line(*_logged(run, key), color, 1.6 if key == "loss" else 1.2)
        for key, color in LOSSES.items()
    }
    if not any(start for start in _starts(run).values()):  # a baseline: the loss is all there is
        losses = {"loss": losses["loss"]}
    losses = {key: line for key, line in losses.items() if _has_values(line)}
    contrastive = Line(*_logged(run, "contrastive_loss"), INK)
    classes = [
        Line(*_validation(run, name), color, 1.0)
        for name, color in zip(run.classes, itertools.cycle(SERIES), strict=False)
    ]
    best_x, best_y = [], []
    for stage, result in run.stages.items():
        best = max(result["validation"], key=lambda entry: entry["mean_dice"])
        best_x.append(_starts(run)[stage] + best["step"])
        best_y.append(best["mean_dice"])
    dice = [*classes, Line(*_validation(run, None), INK, 2.0), Line(best_x, best_y, INK, dots=True)]
    dice = [line for line in dice if line.x and _has_values(line)]
    shown = []
    if losses:
        svg = figures.line_chart(
            f"{prefix}-loss", losses.values(), x_label="step", marks=marks, y_limits=(0, None)
        )
        variables = [_css(line.color) for line in losses.values()]
        keys = _keys(map(_named, losses), variables)
        shown.append(_figure(svg, f"<b>Training loss</b>{keys}", "training loss over steps"))
    if dice:
        svg = figures.line_chart(
            f"{prefix}-dice", dice, x_label="step", marks=marks, y_limits=(None, 1.02)
        )
        keys = _keys(["mean, best at the dot", *run.classes], ["var(--ink)", *_class_colors(run)])
        caption = f"<b>Validation Dice</b>{keys}"
        shown.append(_figure(svg, caption, "validation Dice over steps"))
    if _has_values(contrastive):
        svg = figures.line_chart(f"{prefix}-pull", [contrastive], x_label="step", marks=marks)
        caption = "<b>Local contrastive loss</b>, before its weight"
        shown.append(_figure(svg, caption, "local contrastive loss over steps"))
    if not shown:
        return _section(level, "Learning curves", _note("Nothing is logged yet."))
    notes = []
    if "baseline" in run.stages and not any(line["stage"] == "baseline" for line in run.lines):
        source = run.config["rounds"].get("baseline_from")
        notes.append(_note(f"The baseline’s loss was logged where it was trained, in {source}."))
    return _section(level, "Learning curves", f'<div class="charts">{"".join(shown)}</div>', *notes)


def _css(color: str) -> str:
    return "var(--ink)" if color == INK else f"var(--c{SERIES.index(color)})"


def _class_colors(run: Run) -> list[str]:
    return [color for _, color in zip(run.classes, _variables(), strict=False)]


def _dices(run: Run, class_name: str | None) -> list[tuple[str, list[float | None]]]:
    """Per stage, its name and the test volumes' Dice, of a class or the mean."""
    ids = list(run.stages[run.chosen]["test"]["per_volume"])
    columns = []
    for stage, result in run.stages.items():
        records = result["test"]["per_volume"]
        found = [records.get(v) for v in ids]
        values = [r and (r["dice"][class_name] if class_name else r["mean_dice"]) for r in found]
        columns.append((_named(stage), values))
    return columns


def _limits(
    columns_of: Iterable[Sequence[tuple[str, Sequence[float | None]]]],
) -> tuple[float, float]:
    """Ends of a Dice axis; room for whole points at 0 and at 1."""
    values = [v for columns in columns_of for _, c in columns for v in c if v is not None]
    lowest = min(values, default=0.0)
    return (-0.03 if lowest < 0.3 else np.floor(10 * lowest - 0.3) / 10), 1.02


def _strips(run: Run, prefix: str, level: int) -> str:
    by_class = {name: _dices(run, name) for name in (None, *run.classes)}
    limits = _limits(by_class.values())
    shown = []
    colors = (MUTED, *itertools.islice(itertools.cycle(SERIES), len(run.classes)))
    for k, (name, columns) in enumerate(by_class.items()):
        svg = figures.strip_chart(
            f"{prefix}-strip{k}",
            columns,
            y_limits=limits,
            num_places=max(len(columns), MIN_PLACES),
            color=colors[k],
        )
        caption = f"<b>{_text(name or 'mean over classes')}</b>"
        shown.append(_figure(svg, caption, f"Dice of each test volume, {name or 'mean'}"))
    ids = list(run.stages[run.chosen]["test"]["per_volume"])
    columns = by_class[None]
    rows = [[v, *(_number(c[n]) for _, c in columns)] for n, v in enumerate(ids)]
    rows.sort(key=lambda row: row[-1])
    table = _table(["volume", *(name for name, _ in columns)], rows)
    return _section(
        level,
        "Dice of each test volume",
        f'<div class="charts small">{"".join(shown)}</div>',
        "<p>A point is a volume, a thin line joins one volume’s points, the bar is the mean.</p>",
        _details("Mean Dice of each volume, lowest first", table),
    )


def _test_pictures(run: Run, prefix: str) -> Iterator[str]:
    """Best, median and worst test volume of the chosen stage: by baseline, it and last stage."""
    if run.prepared is None:
        yield _note(f"No pictures: {run.why_no_pictures}.")
        return
    chosen = run.chosen
    records = run.stages[chosen]["test"]["per_volume"]
    ranked = sorted(
        (v for v in records if records[v]["mean_dice"] is not None),
        key=lambda v: records[v]["mean_dice"],
    )
    if not ranked:
        yield _note("No test volume shows any class.")
        return
    picks: dict[str, str] = {}  # few volumes: one may be more than one of these
    for rank, position in (("best", -1), ("worst", 0), ("median", len(ranked) // 2)):
        picks.setdefault(ranked[position], rank)
    ends = (next(iter(run.stages)), list(run.stages)[-1])
    yield _overlay_keys(run, "truth", "prediction")
    groups = []
    for volume_id, rank in sorted(picks.items(), key=lambda p: -ranked.index(p[0])):
        heading = f"<h4>{rank.capitalize()}: {_text(volume_id)}</h4>"
        if volume_id not in run.prepared.volumes:
            text = _note("The prepared set does not hold this volume any more.")
            groups.append(f"<div>{heading}{text}</div>")
            continue
        image, truth = run.prepared.read_slices(run.prepared.volumes[volume_id].slices)
        found, notes = {}, []
        for stage in [s for s in run.stages if s in (*ends, chosen)]:
            path = run.workdir / "predictions" / stage / f"{volume_id}.nii.gz"
            if path.exists():
                found[stage] = _read_prediction(run.prepared, volume_id, path)
            else:
                notes.append(_note(f"There is no {path.relative_to(run.workdir)} any more."))
        areas = truth if truth.any() else next(iter(found.values()), truth)
        number = int(np.count_nonzero(areas, axis=(1, 2)).argmax())
        box = _box([truth[number], *(label[number] for label in found.values())])
        shown = []
        for k, (stage, label) in enumerate(found.items()):
            svg = figures.overlay(
                f"{prefix}-{rank}{k}",
                image[number][box],
                filled=truth[number][box],
                outlined=label[number][box],
            )
            record = run.stages[stage]["test"]["per_volume"][volume_id]
            by_class = ", ".join(
                f"{c}\N{NO-BREAK SPACE}{_number(record['dice'][c], '.2f')}" for c in run.classes
            )
            caption = (
                f"<b>{_text(_named(stage))}</b> Dice {_number(record['mean_dice'], '.2f')} "
                f"<small>{_text(by_class)}</small>"
            )
            told = f"{rank} test volume, {_named(stage)}, slice {number}: truth and prediction"
            shown.append(_figure(svg, caption, told))
        pictures = f'<div class="pictures">{"".join(shown)}</div>'
        groups.append(f"<div>{heading}{pictures}{''.join(notes)}</div>")
    yield f'<div class="groups">{"".join(groups)}</div>'
    yield "<p>Of each volume the slice with most foreground, cut to it; Dice is the volume’s.</p>"


def _overlay_keys(run: Run, filled: str, outlined: str) -> str:
    how = f"areas: {filled}, lines: {outlined}"
    keys = _keys(run.classes, itertools.cycle(PALETTE), "area")
    return f'<div class="legend">{keys}<p>{_text(how)}</p></div>'


def _read_prediction(prepared: PreparedSet, volume_id: str, path: Path) -> np.ndarray:
    """A stored prediction on the training grid, where the image is: [S, H, W]."""
    label = np.asarray(nib.load(path).dataobj).astype(np.uint8)
    return volumes.label_to_grid(
        label,
        prepared.read_native(volume_id).spacing_mm,
        image_size=prepared.image_size,
        target_spacing_mm=prepared.target_spacing_mm,
    )


def _box(labels: Sequence[np.ndarray]) -> tuple[slice, slice]:
    """A square around the foreground of all labels [H, W], with a margin, inside the slice."""
    size = labels[0].shape[0]
    foreground = np.any([(label > 0) & (label < 255) for label in labels], axis=0)
    if not foreground.any():
        return slice(None), slice(None)
    ends = [(np.flatnonzero(foreground.any(axis=a))[[0, -1]]) for a in (1, 0)]
    side = max(max(int(high - low) for low, high in ends) * 3 // 2 + 1, size // 3)
    side = min(side, size)
    starts = [int(np.clip((low + high + 1 - side) // 2, 0, size - side)) for low, high in ends]
    return tuple(slice(start, start + side) for start in starts)


def _pseudo_labels(run: Run, prefix: str) -> Iterator[str]:
    found = [p.parent for p in (run.workdir / "pseudo_labels").glob("round_*/report.json")]
    numbers = {folder: folder.name.removeprefix("round_") for folder in found}
    folders = sorted((f for f in found if numbers[f].isdecimal()), key=lambda f: int(numbers[f]))
    reports = {folder.name: read_json(folder / "report.json") for folder in folders}
    for stage, result in run.stages.items():  # the folders may be elsewhere by now
        if result["pseudo_labels"]:
            reports.setdefault(stage, result["pseudo_labels"])
    if not reports:
        none = run.config["rounds"]["num_rounds"] == 0
        yield _note("A run without rounds makes none." if none else "None are made yet.")
        return
    rows, warnings = [], []
    for stage, report in reports.items():
        by_class = report["true_dice_per_class"]
        made_by = report.get("made_by") or {}
        gate = report.get("gate")
        rows.append(
            [
                _use_of(run, stage),
                _named(made_by.get("stage", "–")),
                str(report["num_volumes"]),
                str(len(gate["rejected"])) if gate else "no gate",
                str(len(report["empty_volumes"])),
                _number(report["mean_confidence"]),
                _number(report["dice_with_previous_round"]),
                _number(report["true_mean_dice"]),
                *(_number(by_class.get(c)) for c in run.classes or by_class),
            ]
        )
        warnings += [f"{_named(stage)}: {w}" for w in report.get("warnings", ())]
    classes = run.classes or list(next(iter(reports.values()))["true_dice_per_class"])
    head = ["used by", "made by", "volumes kept", "rejected", "empty", "confidence"]
    head += ["Dice with round before", "true Dice", *(f"{c} true Dice" for c in classes)]
    yield _table(head, rows)
    if all(report["true_mean_dice"] is None for report in reports.values()):
        yield _note("No true Dice: the unlabelled volumes have no hidden ground truth.")
    if warnings:
        items = "".join(f"<li>{_text(w)}</li>" for w in warnings)
        yield f'<ul class="warning">{items}</ul>'
    if run.prepared is None:
        yield _note(f"No pictures: {run.why_no_pictures}.")
        return
    sets, problems = {}, []
    for folder in folders:
        if "labels_sha256" not in reports[folder.name]:
            text = (
                f"No pictures of {folder.name}: its report.json, of an older lclseg, has no digest."
            )
            problems.append(_note(text))
            continue
        try:
            sets[folder.name] = load_pseudo_labels(folder, run.prepared)
        except PseudoLabelError as error:
            problems.append(_note(str(error)))
    yield from problems
    yield from _changed_pictures(run, sets, prefix)


def _use_of(run: Run, folder_name: str) -> str:
    """Such as "round 2"; "after round 2" where no round trains on the labels: the final ones."""
    rounds = run.config["rounds"]["num_rounds"]
    beyond = folder_name == f"round_{rounds + 1}"
    return f"after round {rounds}" if beyond else _named(folder_name)


def _changed_pictures(run: Run, sets: Mapping[str, PseudoLabels], prefix: str) -> Iterator[str]:
    """The volumes whose pseudo-labels changed most from one round to the next, all rounds."""
    entries = run.prepared.volumes
    labels: dict[str, dict[str, np.ndarray]] = {}  # by volume, by round
    for name, pseudo_labels in sets.items():
        for volume_id in pseudo_labels.report["volume_ids"]:
            read = pseudo_labels.read(np.asarray(entries[volume_id].slices))
            labels.setdefault(volume_id, {})[name] = read
    agreements = {
        volume_id: {
            later: mean_foreground_dice(own[earlier], own[later], run.prepared.num_classes)
            for earlier, later in itertools.pairwise(own)
        }
        for volume_id, own in labels.items()
        if len(own) > 1
    }
    if not agreements:
        yield _note("No picture: no volume has pseudo-labels of two rounds to compare yet.")
        return
    yield "<h4>Changed most between rounds</h4>"
    yield _overlay_keys(run, "hidden truth, where there is any", "pseudo-label")
    ranked = sorted(agreements, key=lambda v: min(agreements[v].values()))
    for place, volume_id in enumerate(ranked[:NUM_CHANGED]):
        own = labels[volume_id]
        image, truth = run.prepared.read_slices(entries[volume_id].slices)
        changed = sum(
            np.count_nonzero(own[a] != own[b], axis=(1, 2)) for a, b in itertools.pairwise(own)
        )
        number = int(changed.argmax())
        box = _box([truth[number], *(label[number] for label in own.values())])
        shown = []
        for k, (name, label) in enumerate(own.items()):
            svg = figures.overlay(
                f"{prefix}-changed{place}-{k}",
                image[number][box],
                filled=truth[number][box] if entries[volume_id].has_label else None,
                outlined=label[number][box],
            )
            dice = agreements[volume_id].get(name)
            with_before = "" if dice is None else f" Dice with the round before {dice:.2f}"
            caption = f"<b>{_text(_use_of(run, name))}</b>{with_before}"
            told = f"pseudo-label, {_use_of(run, name)}, slice {number}"
            shown.append(_figure(svg, caption, told))
        yield f'<h5>{_text(volume_id)}</h5><div class="pictures">{"".join(shown)}</div>'
    yield "<p>Of each volume the slice where most pixels changed, cut to its foreground.</p>"


def _origin(run: Run, level: int) -> str:
    """Where the numbers come from: command, versions, date, device, volumes, config."""
    command = reproducing_command(run.config)
    newest = [p for p in (run.workdir / "metrics.jsonl", run.workdir / "config.json") if p.exists()]
    last = datetime.datetime.fromtimestamp(newest[0].stat().st_mtime, datetime.UTC)
    facts = [("folder", str(run.workdir)), ("last step", f"{last:%Y-%m-%d %H:%M} UTC")]
    if run.results:
        versions, device = run.results["versions"], run.results["device"]
        facts.append(("lclseg", versions["lclseg"]))
        others = ", ".join(f"{p} {v}" for p, v in versions.items() if p != "lclseg")
        facts.append(("with", others))
        facts.append(("device", f"{device['count']} x {device['kind']} ({device['platform']})"))
    if run.stages:
        seconds = {s: r["seconds"] for s, r in run.stages.items() if "seconds" in r}
        times = ", ".join(f"{_named(s)} {t / 60:.1f} min" for s, t in seconds.items())
        facts.append(("time", times))
    content = [
        "<dl>" + "".join(f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in facts) + "</dl>"
    ]
    if command:
        content.append(
            "<p>This command gives the same config, by the config files of the version that made "
            f"this page:</p><pre>{_text(command)}</pre>"
        )
    else:
        content.append(
            _note("No command: the config files here cannot give this config; it is below in full.")
        )
    for role, ids in run.results.get("volumes", {}).items():
        words = {"labeled": "labelled", "unlabeled": "unlabelled"}.get(role, role)
        summary = f"{len(ids)} {_text(words)} volumes"
        content.append(_details(summary, f"<p>{_text(', '.join(ids)) or 'none'}</p>"))
    text = json.dumps(run.config, indent=2, sort_keys=True)
    content.append(_details("Config", f"<pre>{_text(text)}</pre>"))
    return _section(level, "Origin", *content)


def _comparison(runs: Sequence[Run]) -> Iterator[str]:
    """Tables and charts that hold all runs."""
    colors = [color for _, color in zip(runs, itertools.cycle(SERIES), strict=False)]
    links = "".join(
        f'<a class="key" href="#run-{k}"><i class="line{" dashed" if k >= len(SERIES) else ""}" '
        f'style="--key: {_css(color)}"></i>{_text(run.name)}</a>'
        for k, (run, color) in enumerate(zip(runs, colors, strict=True))
    )
    legend = f'<p class="keys">{links}</p>'
    stages = list(dict.fromkeys(s for run in runs for s in run.stages))
    classes = list(dict.fromkeys(c for run in runs for c in run.classes))
    rows = []
    for run in runs:
        if not run.stages:
            rows.append([run.name, *("–" for _ in stages), "no stage is finished"])
            continue
        test = run.stages[run.chosen]["test"]
        baseline = run.stages.get("baseline")
        has_gain = baseline and run.chosen != "baseline"
        gain = _number(_difference(test, baseline["test"]), "+.3f") if has_gain else ""
        rows.append(
            [
                run.name,
                *(
                    _number(run.stages[s]["test"]["mean_dice"]) if s in run.stages else ""
                    for s in stages
                ),
                _named(run.chosen) + ("" if "chosen" in run.results else ", so far"),
                _number(test["mean_dice"]),
                gain,
                *(_number(test["dice_per_class"].get(c)) for c in classes),
                _number(test["mean_hausdorff95_mm"], ".2f"),
                _number(test["mean_assd_mm"], ".2f"),
            ]
        )
    head = ["run", *map(_named, stages), "chosen", "its test Dice", "gain"]
    head += [*(f"{c} Dice" for c in classes), "HD95 mm", "ASSD mm"]
    rows = [row + [""] * (len(head) - len(row)) for row in rows]
    yield _section(
        2,
        "Summary",
        _table(head, rows, kind="runs"),
        "<p>Test Dice stage by stage; then of the stage that is best on validation volumes: Dice, "
        "gain over the run’s baseline, Dice by class, distances.</p>",
        *_differences(runs),
    )
    names: dict[int, set[str]] = {}
    for run in runs:
        for stage, start in _starts(run).items():
            names.setdefault(start, set()).add(_named(stage))
    # Runs may begin their rounds at different steps: then a mark has no name.
    marks = [(x, " ".join(n) if len(n) == 1 else "") for x, n in sorted(names.items()) if x]
    shown = []
    for name, title, data, limits in (
        ("loss", "Training loss", lambda r: _logged(r, "loss"), (0, None)),
        ("dice", "Validation Dice", lambda r: _validation(r, None), (None, 1.02)),
    ):
        lines = [
            Line(*data(run), color, dashed=k >= len(SERIES))
            for k, (run, color) in enumerate(zip(runs, colors, strict=True))
        ]
        lines = [line for line in lines if line.x and _has_values(line)]
        if lines:
            svg = figures.line_chart(
                f"all-{name}", lines, x_label="step", marks=marks, y_limits=limits
            )
            shown.append(_figure(svg, f"<b>{title}</b>", f"{title} of all runs over steps"))
    yield _section(2, "Learning curves", legend, f'<div class="charts">{"".join(shown)}</div>')
    tested = [(run, color) for run, color in zip(runs, colors, strict=True) if run.stages]
    if tested:
        columns = [_dices(run, None) for run, _ in tested]
        options = {
            "y_limits": _limits(columns),
            "num_places": max(MIN_PLACES, *map(len, columns)),
        }
        shown = [
            _figure(
                figures.strip_chart(f"all-strip{k}", columns[k], **options, color=color),
                f"<b>{_text(run.name)}</b>",
                f"Dice of each test volume, {run.name}",
            )
            for k, (run, color) in enumerate(tested)
        ]
        strips = f'<div class="charts small">{"".join(shown)}</div>'
        yield _section(2, "Dice of each test volume", strips)


def _differences(runs: Sequence[Run]) -> Iterator[str]:
    """Values in which the runs' configs differ; places on the machine are none of them."""
    skipped = (*MACHINE_KEYS, "rounds.baseline_from")
    keys = {k for run in runs[1:] for k in differing_keys(runs[0].config, run.config)}
    keys = sorted(k for k in keys if k not in skipped)
    if not keys:
        yield _note("The configs do not differ.")
        return
    rows = []
    for run in runs:
        values = []
        for key in keys:
            value = run.config
            for part in key.split("."):
                value = value.get(part, "–") if isinstance(value, dict) else "–"
            text = str(value)
            values.append(text if len(text) <= 60 else f"{text[:57]}...")
        rows.append([run.name, *values])
    yield _details("What differs in the configs", _table(["run", *keys], rows, kind="text"))


# The policy: should an escape be forgotten, nothing is run or fetched all the same.
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
