"""The page that compares runs: what holds all of them, then each run's own sections."""

from collections.abc import Iterator, Sequence

from lclseg.page import one_run
from lclseg.page.charts import line_chart, line_key, strip_charts
from lclseg.page.elements import details, document, legend, note, section, table, text
from lclseg.page.figures import SERIES, Line, series
from lclseg.page.recorded import RecordedRun, named
from lclseg.page.tables import gain, number, score_cells
from lclseg.run.stored_config import MACHINE_KEYS, as_now, differing_keys


def page(runs: Sequence[RecordedRun]) -> str:
    """Makes the page that compares runs, as HTML."""
    title = f"{len(runs)} runs compared"
    of_what = "; ".join(dict.fromkeys(run.title for run in runs))
    body = [
        f"<header><h1>{title}</h1><p>{text(of_what)}</p></header>",
        section(2, "Summary", *_summary(runs)),
        section(2, "Learning curves", *_curves(runs)),
    ]
    colored = zip(runs, series(len(runs)), strict=True)
    strips = [(run.name, run.test_dice(), color) for run, color in colored if run.stages]
    if strips:
        body.append(section(2, "Dice of each test volume", strip_charts(strips)))
    for place, run in enumerate(runs):
        heading = f"<h2>{text(run.name)}</h2><p>{text(run.title)}</p>"
        body += [f'<article id="run-{place}">', one_run.header(run, heading)]
        body += [*one_run.sections(run, 3), "</article>"]
    return document(title, body)


def _summary(runs: Sequence[RecordedRun]) -> Iterator[str]:
    stages = list(dict.fromkeys(s for run in runs for s in run.stages))
    classes = list(dict.fromkeys(c for run in runs for c in run.classes))
    head = ["run", *map(named, stages), "chosen", "its test Dice", "gain"]
    head += [*(f"{c} Dice" for c in classes), "HD95 mm", "ASSD mm"]
    rows = []
    for run in runs:
        if not run.stages:
            begun = [run.name, *("-" for _ in stages), "no stage is finished"]
            rows.append(begun + [""] * (len(head) - len(begun)))
            continue
        dice = {stage: number(r["test"]["mean_dice"], ".3f") for stage, r in run.stages.items()}
        rows.append(
            [
                run.name,
                *(dice.get(stage, "") for stage in stages),
                named(run.chosen) + ("" if "chosen" in run.results else ", so far"),
                dice[run.chosen],
                gain(run.stages, run.chosen, ".3f"),
                *score_cells(run.stages[run.chosen]["test"], classes, ".3f"),
            ]
        )
    yield table(head, rows, kind="runs")
    yield (
        "<p>Test Dice stage by stage; then of the stage that is best on validation volumes: Dice, "
        "gain over the run’s baseline, Dice by class, distances.</p>"
    )
    yield _differences(runs)


def _differences(runs: Sequence[RecordedRun]) -> str:
    """Values in which the runs' configs differ; places on the machine are none of them."""
    configs = [as_now(run.config) for run in runs]
    keys = {key for config in configs[1:] for key in differing_keys(configs[0], config)}
    keys -= {*MACHINE_KEYS, "rounds.baseline_from"}
    if not keys:
        return note("The configs do not differ.")
    rows = [
        [run.name, *(_value(config, key) for key in sorted(keys))]
        for run, config in zip(runs, configs, strict=True)
    ]
    head = ["run", *sorted(keys)]
    return details("What differs in the configs", table(head, rows, kind="text"))


def _value(config: dict, key: str) -> str:
    """Of a dotted key, as text of at most 60 characters."""
    value = config
    for part in key.split("."):
        value = value.get(part, "-") if isinstance(value, dict) else "-"
    shown = str(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _curves(runs: Sequence[RecordedRun]) -> Iterator[str]:
    begins = sorted({(first, stage) for run in runs for stage, first in run.first_steps.items()})
    marks = [(first, named(stage)) for first, stage in begins if first]
    if len({name for _, name in marks}) < len(marks):
        marks = []  # rounds that begin at different steps: a mark would not say whose
    losses, dice = [], []
    for place, (run, color) in enumerate(zip(runs, series(len(runs)), strict=True)):
        dashed = place >= len(SERIES)
        losses.append(Line(run.name, *run.logged("loss"), color, dashed=dashed))
        dice.append(Line(run.name, *run.validation_dice(), color, dashed=dashed))
    yield legend(line_key(line, f"#run-{place}") for place, line in enumerate(losses))
    shown = [
        line_chart("Training loss", losses, marks, y_limits=(0, None), has_legend=False),
        line_chart("Validation Dice", dice, marks, y_limits=(None, 1.02), has_legend=False),
    ]
    yield f'<div class="charts">{"".join(shown)}</div>'
