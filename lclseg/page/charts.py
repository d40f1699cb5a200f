"""Charts with their captions, as HTML."""

from collections.abc import Mapping, Sequence

import numpy as np

from lclseg.page import figures
from lclseg.page.elements import figure, key, legend, text
from lclseg.page.figures import Line

MIN_PLACES = 3  # of a strip chart: narrower ones would be blown up to the width of the others


def line_key(line: Line, link: str = "") -> str:
    """Makes the entry of a line in a chart's legend."""
    shape = "dot" if line.dots else "line dashed" if line.dashed else "line"
    return key(line.name, figures.css(line.color), shape, link)


def line_chart(
    title: str,
    lines: Sequence[Line],
    marks: Sequence[tuple[float, str]],
    *,
    y_limits: tuple[float | None, float | None] = (None, None),
    has_legend: bool = True,
) -> str:
    """Draws lines over steps, those that have a value; "" where none has."""
    lines = [line for line in lines if not np.isnan(line.y).all()]
    if not lines:
        return ""
    svg = figures.line_chart(lines, marks=marks, y_limits=y_limits)
    keys = legend(map(line_key, lines)) if has_legend else ""
    return figure(svg, f"<b>{title}</b>{keys}")


def strip_charts(
    charts: Sequence[tuple[str, Mapping[str, Sequence[float | None]], str]],
) -> str:
    """Draws charts of Dice, each a plain text title, columns and a colour, to one scale."""
    every = [columns for _, columns, _ in charts]
    values = [v for columns in every for c in columns.values() for v in c if v is not None]
    lowest = min(values, default=0.0)
    # Room for whole points at 0 and at 1.
    y_limits = (-0.03 if lowest < 0.3 else np.floor(10 * lowest - 0.3) / 10), 1.02
    num_places = max(MIN_PLACES, *map(len, every))
    shown = [
        figure(
            figures.strip_chart(columns, y_limits=y_limits, num_places=num_places, color=color),
            f"<b>{text(title)}</b>",
        )
        for title, columns, color in charts
    ]
    return f'<div class="charts small">{"".join(shown)}</div>'
