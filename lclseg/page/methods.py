"""The page of a sweep: rows side by side over all pairs, their differences, and worst volumes."""

from collections.abc import Iterator, Mapping, Sequence

from lclseg.page.elements import document, figure, note, section, table, text
from lclseg.page.figures import row_chart
from lclseg.page.pictures import side_by_side
from lclseg.page.recorded import RecordedRun
from lclseg.page.tables import number

NUM_WORST = 3  # volumes listed and shown


def page(
    title: str,
    head: Sequence[str],
    cells: Sequence[Sequence[str]],
    dice: Mapping[str, Sequence[Mapping[str, float | None]]],
    runs: Mapping[str, RecordedRun],
) -> str:
    """Makes the page.

    Args:
      title: plain text.
      head, cells: the sweep's table, as plain text.
      dice: by row, of each run the Dice of its test volumes.
      runs: by row, the run of the first pair, whose predictions are shown; {}: no pictures.
    """
    chart = row_chart({row: [list(run.values()) for run in own] for row, own in dice.items()})
    caption = (
        "Large points: runs, a pair of split and seed each. Small points: their test volumes. "
        "Bar and number: mean of the runs. Last weights, largest component kept."
    )
    body = [
        f"<header><h1>{text(title)}</h1></header>",
        section(2, "Methods", table(head, cells, marked=[0], kind="runs")),
        section(2, "Test Dice", figure(chart, caption)),
        section(2, "Worst volumes", *_worst(dice, runs)),
    ]
    return document(title, body)


def worst_volumes(own: Sequence[Mapping[str, float | None]]) -> list[tuple[str, float]]:
    """Finds the test volumes of the lowest Dice, mean over the runs that tested it; worst first."""
    found: dict[str, list[float]] = {}
    for run in own:
        for volume_id, value in run.items():
            if value is not None:
                found.setdefault(volume_id, []).append(value)
    means = {volume_id: sum(values) / len(values) for volume_id, values in found.items()}
    return sorted(means.items(), key=lambda item: item[1])[:NUM_WORST]


def _worst(
    dice: Mapping[str, Sequence[Mapping[str, float | None]]], runs: Mapping[str, RecordedRun]
) -> Iterator[str]:
    yield "<p>Of each row the volumes of the lowest Dice, mean over its runs.</p>"
    worst = {row: worst_volumes(own) for row, own in dice.items()}
    rows = [
        [row, *(f"{volume_id} {number(value, '.2f')}" for volume_id, value in volumes)]
        for row, volumes in worst.items()
    ]
    yield table(["row", *(f"{n}." for n in range(1, NUM_WORST + 1))], rows, kind="text")
    if not runs:
        yield note("No pictures: the runs' folders are not here.")
        return
    yield "<p>The worst volumes of the first row, by every row, on the first pair; every component "
    yield "is shown and counted:</p>"
    for volume_id, _ in next(iter(worst.values())):
        yield f"<h4>{text(volume_id)}</h4>"
        yield from side_by_side(runs, volume_id)
