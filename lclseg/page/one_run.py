"""The page on one run."""

import datetime
import json
from collections.abc import Iterator

from lclseg.data.own_data import warnings_in
from lclseg.page import tables
from lclseg.page.charts import line_chart, strip_charts
from lclseg.page.command import reproducing_command
from lclseg.page.elements import details, document, note, section, table, text
from lclseg.page.figures import INK, MUTED, Line, series
from lclseg.page.pictures import changed_pictures, test_pictures
from lclseg.page.recorded import RecordedRun, named

ROLES = {"labeled": "labelled", "unlabeled": "unlabelled", "validation": "validation"}


def page(run: RecordedRun) -> str:
    """Makes the page of one run, as HTML."""
    heading = f"<h1>{text(run.title)}</h1>"
    return document(run.title, [header(run, heading), *sections(run, 2)])


def header(run: RecordedRun, heading: str) -> str:
    """Tells what the run is of, and, where it is not finished, how far it has come."""
    lines = [heading]
    roles = run.results.get("volumes")
    if roles:
        counts = ", ".join(f"{len(ids)} {ROLES.get(role, role)}" for role, ids in roles.items())
        lines.append(f"<p>{text(run.results['description'])}</p><p>{counts} volumes.</p>")
    if "chosen" not in run.results:
        done = ", ".join(map(named, run.stages)) or "no stage"
        last = [f", last step {line['step']} of {named(line['stage'])}" for line in run.lines[-1:]]
        lines.append(
            f'<p class="warning">Not finished: {text(done)} done, wanted the baseline and '
            f"{run.config['rounds']['num_rounds']} rounds{text(''.join(last))}. The command that "
            "began it goes on from there.</p>"
        )
    proposal = run.workdir / "proposal.txt"  # of own data; see `own_data.complete`
    for warning in warnings_in(proposal.read_text()) if proposal.exists() else ():
        lines.append(f'<p class="warning">{text(warning)}</p>')
    return "\n".join(["<header>", *lines, "</header>"])


def sections(run: RecordedRun, level: int) -> Iterator[str]:
    """Shows all on one run, under headings of a level."""
    if run.stages:
        yield section(level, "Summary", *_summary(run))
    yield section(level, "Learning curves", *_curves(run))
    if _is_tested(run):
        yield section(level, "Dice of each test volume", *_test_volumes(run))
        yield section(level, "Test volumes: truth and prediction", *test_pictures(run))
    yield section(level, "Pseudo-labels", *_pseudo_labels(run))
    yield section(level, "Origin", *_origin(run))


def _is_tested(run: RecordedRun) -> bool:
    """Of own data with few masks none may be left to test on."""
    return any(result["test"]["per_volume"] for result in run.stages.values())


def _summary(run: RecordedRun) -> Iterator[str]:
    stages, classes = run.stages, run.classes
    marked = [list(stages).index(run.chosen)]
    validated = stages[run.chosen]["best_validation_dice"] is not None
    why = "the best on validation volumes" if validated else "the last, since no volume validates"
    if not _is_tested(run):
        dice = [[named(s), tables.stage_cells(stages, s, (), ".3f")[0]] for s in stages]
        yield table(["stage", "validation Dice"], dice, marked)
        yield (
            "<p>Mean over validation volumes, in native geometry. "
            f"Marked: {text(named(run.chosen))}, {why}. "
            "There are no test volumes, so nobody knows how good it is on others.</p>"
        )
        return
    head = ["stage", "validation Dice", "test Dice", "gain", *(f"{c} Dice" for c in classes)]
    head += ["HD95 mm", "ASSD mm", "missed", "last weights’ Dice"]
    rows = [[named(s), *tables.stage_cells(stages, s, classes, ".3f")] for s in stages]
    tried = any("largest_component" in result["test"] for result in stages.values())
    if tried:
        head.append("one-piece Dice")
        for row, result in zip(rows, stages.values(), strict=True):
            row.append(tables.largest_component_cell(result, ".3f"))
    yield table(head, rows, marked)
    yield (
        "<p>Means over test volumes, in native geometry. "
        f"Marked: {text(named(run.chosen))}, {why}. "
        "Gain: test Dice over the baseline’s. Missed: pairs of volume and class where only the "
        "truth or only the prediction is empty; they count as Dice 0 and the volume’s diagonal. "
        "Last weights’ Dice: test Dice after the stage’s last step, whatever validation says."
        f"{_largest_component(run) if tried else ''}</p>"
    )
    measures = (("HD95 mm", "hausdorff95_mm_per_class"), ("ASSD mm", "assd_mm_per_class"))
    columns = [(f"{c} {measure}", key, c) for measure, key in measures for c in classes]
    rows = [
        [named(stage), *(tables.number(result["test"][key][c], ".2f") for _, key, c in columns)]
        for stage, result in stages.items()
    ]
    head = ["stage", *(name for name, _, _ in columns)]
    yield details("Distances by class", table(head, rows, marked))


def _largest_component(run: RecordedRun) -> str:
    """What the column of that name shows, and whether it is what is handed out."""
    kept = run.keeps_largest
    if kept:
        return (
            f" One-piece Dice: test Dice where of {text(', '.join(kept))} the largest "
            "connected component alone is kept, as lclseg.predict does; all else is without."
        )
    return (
        " One-piece Dice: test Dice if of classes that are one piece in all labelled "
        "masks the largest connected component alone were kept; for this run lclseg.predict keeps "
        "every one."
    )


def _curves(run: RecordedRun) -> Iterator[str]:
    marks = [(first, named(stage)) for stage, first in run.first_steps.items() if first]
    losses = [Line("loss", *run.logged("loss"), INK)]
    if marks:  # the loss of a baseline is its segmentation loss
        terms = [term for term in run.loss_terms if term != "contrastive_loss"]  # has its own chart
        colors = series(len(terms))
        losses += [Line(named(t), *run.logged(t), c) for t, c in zip(terms, colors, strict=True)]
    colors = series(len(run.classes))
    dice = [
        *(
            Line(c, *run.validation_dice(c), k, 1.0)
            for c, k in zip(run.classes, colors, strict=True)
        ),
        Line("mean", *run.validation_dice(), INK, 2.0),
        Line("best of a stage", *run.best_validation_dice(), INK, dots=True),
    ]
    contrastive = [Line("before its weight", *run.logged("contrastive_loss"), INK)]
    shown = [
        line_chart("Training loss", losses, marks, y_limits=(0, None)),
        line_chart("Validation Dice", dice, marks, y_limits=(None, 1.02)),
        line_chart("Local contrastive loss", contrastive, marks),
    ]
    if not any(shown):
        yield note("Nothing is logged yet.")
        return
    yield f'<div class="charts">{"".join(shown)}</div>'
    if "baseline" in run.stages and not any(line["stage"] == "baseline" for line in run.lines):
        source = run.config["rounds"].get("baseline_from")
        yield note(f"The baseline’s loss was logged where it was trained, in {source}.")


def _test_volumes(run: RecordedRun) -> Iterator[str]:
    names = [None, *run.classes]
    colors = [MUTED, *series(len(run.classes))]
    charts = [
        (name or "mean over classes", run.test_dice(name), color)
        for name, color in zip(names, colors, strict=True)
    ]
    yield strip_charts(charts)
    yield "<p>A point is a volume, a thin line joins one volume’s points, the bar is the mean.</p>"
    ids, dice = run.stages[run.chosen]["test"]["per_volume"], run.test_dice()
    rows = [
        [volume_id, *(tables.number(value, ".3f") for value in own)]
        for volume_id, *own in zip(ids, *dice.values(), strict=True)
    ]
    rows.sort(key=lambda row: row[-1])
    yield details("Mean Dice of each volume, lowest first", table(["volume", *dice], rows))


def _pseudo_labels(run: RecordedRun) -> Iterator[str]:
    reports = run.pseudo_label_reports()
    if not reports:
        none = run.config["rounds"]["num_rounds"] == 0
        yield note("A run without rounds makes none." if none else "None are made yet.")
        return
    classes = run.classes or list(next(iter(reports.values()))["true_dice_per_class"])
    rows = [
        [
            run.used_by(name),
            named(report["made_by"]["stage"]),
            *tables.pseudo_label_cells(report, ".3f"),
            *(tables.number(report["true_dice_per_class"].get(c), ".3f") for c in classes),
        ]
        for name, report in reports.items()
    ]
    head = ["used by", "made by", "volumes kept", "rejected", "empty", "confidence"]
    head += ["Dice with round before", "true Dice", *(f"{c} true Dice" for c in classes)]
    yield table(head, rows)
    yield (
        "<p>Rejected: by the quality gate (-: there is none). Empty: volumes without any class. "
        "Confidence: mean probability of the predicted class. True Dice: with the ground truth, "
        "which training does not see.</p>"
    )
    if all(report["true_mean_dice"] is None for report in reports.values()):
        yield note("No true Dice: the unlabelled volumes have no hidden ground truth.")
    warnings = [f"{named(name)}: {w}" for name, r in reports.items() for w in r["warnings"]]
    if warnings:
        yield f'<ul class="warning">{"".join(f"<li>{text(w)}</li>" for w in warnings)}</ul>'
    yield from changed_pictures(run)


def _time(stage: str, result: dict) -> str:
    """ "round 1 5.3 min (train 4.1, test 1.2)", of a stage's seconds by kind of work."""
    minutes = {kind: seconds / 60 for kind, seconds in result["seconds"].items()}
    parts = ", ".join(f"{kind.replace('_', ' ')} {m:.1f}" for kind, m in minutes.items())
    return f"{named(stage)} {sum(minutes.values()):.1f} min ({parts})"


def _origin(run: RecordedRun) -> Iterator[str]:
    """Where the numbers come from: versions, date, device, command, volumes, config."""
    seconds = max(path.stat().st_mtime for path in run.workdir.glob("*.json*"))
    last = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    facts = {"folder": run.workdir, "last change": f"{last:%Y-%m-%d %H:%M} UTC"}
    if run.results:
        versions, device = dict(run.results["versions"]), run.results["device"]
        facts["lclseg"] = versions.pop("lclseg")
        facts["with"] = ", ".join(f"{package} {version}" for package, version in versions.items())
        facts["device"] = f"{device['count']} x {device['kind']} ({device['platform']})"
    if run.stages:
        facts["time"] = ", ".join(_time(s, r) for s, r in run.stages.items())
    yield f"<dl>{''.join(f'<dt>{k}</dt><dd>{text(v)}</dd>' for k, v in facts.items())}</dl>"
    command = reproducing_command(run.config)
    if command:
        yield "<p>This command gives the same config, by the config files of the version that made "
        yield f"this page:</p><pre>{text(command)}</pre>"
    else:
        yield note("No command: the config files here cannot give this config; it is below.")
    for role, ids in run.results.get("volumes", {}).items():
        summary = f"Volumes, {ROLES.get(role, role)}: {len(ids)}"
        yield details(summary, f"<p>{text(', '.join(ids)) or 'none'}</p>")
    config = json.dumps(run.config, indent=2, sort_keys=True)
    yield details("Config", f"<pre>{text(config)}</pre>")
