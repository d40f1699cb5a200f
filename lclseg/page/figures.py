"""Figures of the report page, each an SVG to stand in an HTML page.

Arrays and plain values in, text out. Colours of the charts are CSS variables (--ink, --muted,
--rule, --paper, --c0 ... --c6), so that one figure reads on light and on dark ground; text takes
the page's font (--font). Figures may share ids: `elements.document` tells them apart.
"""

import io
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from lclseg.palette import PALETTE

# Stand-ins that are replaced by the CSS variables: the page's style sheet has versions of the
# palette for charts on light and on dark ground.
INK, MUTED, RULE, PAPER = "#101112", "#606162", "#d0d1d2", "#f0f1f2"
SERIES = tuple(f"#20212{k}" for k in range(len(PALETTE)))
_VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule", PAPER: "paper"}
_VARIABLES |= {color: f"c{k}" for k, color in enumerate(SERIES)}
_STYLE: dict[Any, Any] = {  # the stub knows each key by name
    "svg.fonttype": "none",
    "svg.hashsalt": "lclseg",
    "text.parse_math": False,
    "text.color": INK,
    "font.size": 10,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
}


def series(number: int) -> list[str]:
    """Gives colours of so many classes or runs; beyond `len(SERIES)` they come again."""
    return list(itertools.islice(itertools.cycle(SERIES), number))


def css(color: str) -> str:
    """Writes a colour as CSS: that of a chart changes with the theme."""
    return f"var(--{_VARIABLES[color]})" if color in _VARIABLES else color


class Line(NamedTuple):
    """A line of a chart: x, y [n]; a colour, INK, MUTED or of SERIES; width in points."""

    name: str
    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray
    color: str
    width: float = 1.5
    dashed: bool = False
    dots: bool = False  # points in place of the line


def line_chart(
    lines: Sequence[Line],
    *,
    marks: Sequence[tuple[float, str]] = (),
    y_limits: tuple[float | None, float | None] = (None, None),
) -> str:
    """Draws lines over steps, with upright rules at `marks` (x, text)."""

    def draw(figure):
        axes = figure.subplots()
        for x, text in marks:
            axes.axvline(x, color=MUTED, linewidth=0.8, dashes=(2, 2))
            # Above the axes, where no line runs.
            above = axes.get_xaxis_transform()
            axes.text(x, 1.02, f" {text}", transform=above, color=MUTED, fontsize=8)
        for line in lines:
            shape = (
                {"marker": "o", "markersize": 5, "linestyle": ""}
                if line.dots
                else {"linestyle": (0, (4, 2)) if line.dashed else "-"}
            )
            axes.plot(line.x, line.y, color=line.color, linewidth=line.width, **shape)
        axes.set_xlabel("step")
        axes.set_ylim(*y_limits)
        axes.margins(x=0.02)

    return _svg((4.0, 2.5), draw)


def strip_chart(
    columns: Mapping[str, Sequence[float | None]],
    *,
    y_limits: tuple[float, float],
    num_places: int,
    color: str = MUTED,
) -> str:
    """Draws values as points in columns, each over its name, a bar and a number at each mean.

    The n-th values of the columns are of one thing, and joined by a thin line. None: no point.
    Charts with the same `num_places`, for columns, are drawn to the same scale.
    """

    def draw(figure):
        axes = figure.subplots()
        values = np.array(
            [[np.nan if v is None else v for v in c] for c in columns.values()], float
        )
        num = values.shape[1]
        # Spread evenly in a shuffled order: the same place in each column, and the same each time.
        shift = 0.2 * (np.random.default_rng(0).permutation(num) + 0.5) / max(num, 1) - 0.1
        x = np.arange(len(columns))[:, None] + shift
        axes.plot(x, values, color=RULE, linewidth=0.8)
        dots = {"color": color, "markersize": 3.6, "alpha": 0.7, "markeredgewidth": 0}
        axes.plot(x.ravel(), values.ravel(), "o", **dots)
        for column, own in enumerate(values):
            if np.isnan(own).all():
                continue
            mean = np.nanmean(own)
            axes.plot([column - 0.2, column + 0.2], [mean, mean], color=INK, linewidth=2)
            ground = {"facecolor": PAPER, "edgecolor": "none", "pad": 0.5}  # no line through it
            axes.text(column + 0.26, mean, f"{mean:.2f}", va="center", fontsize=9, bbox=ground)
        axes.set_xticks(range(len(columns)), list(columns))
        axes.tick_params(length=0, labelsize=9)
        axes.set_xlim(-0.4, num_places - 0.35)
        axes.set_ylim(*y_limits)

    return _svg((0.6 + 0.6 * num_places, 2.3), draw)


def row_chart(rows: Mapping[str, Sequence[Sequence[float | None]]]) -> str:
    """Draws rows of points along an axis: a small one a value, a large one for each list's mean.

    A bar and a number stand at the mean of the means.

    Args:
      rows: by name, lists of values: of Dice, of a run's volumes.
    """

    def draw(figure):
        axes = figure.subplots()
        rng = np.random.default_rng(0)
        for place, lists in enumerate(rows.values()):
            means = []
            for own in lists:
                values = np.array([v for v in own if v is not None], float)
                shift = rng.uniform(-0.28, 0.28, len(values))
                axes.plot(values, place + shift, "o", color=MUTED, markersize=1.8, alpha=0.3)
                if len(values):
                    means.append(values.mean())
            if not means:
                continue
            axes.plot(means, np.full(len(means), place), "o", color=SERIES[0], markersize=5)
            mean = float(np.mean(means))
            axes.plot([mean, mean], [place - 0.32, place + 0.32], color=INK, linewidth=2)
            axes.text(1.015, place, f"{mean:.3f}", va="center", fontsize=9, clip_on=False)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.tick_params(length=0, labelsize=9)
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(None, 1.01)
        axes.set_xlabel("Dice")

    return _svg((7.5, 0.6 + 0.32 * len(rows)), draw)


def overlay(image: np.ndarray, *, filled: np.ndarray | None, outlined: np.ndarray | None) -> str:
    """Draws a slice with one labelling as areas and one as outlines, class k in colour k - 1.

    Args:
      image: [X, Y] in [0, 1], clipped; X goes right, Y up.
      filled, outlined: [X, Y] labels, 0 is background; None: not drawn. 255 is no class.
    """

    def draw(figure):
        figure.set_layout_engine("none")
        axes = figure.add_axes((0, 0, 1, 1))
        axes.axis("off")
        axes.imshow(image.T, cmap="gray", vmin=0, vmax=1, origin="lower", interpolation="none")
        for label, is_filled in ((filled, True), (outlined, False)):
            for value in () if label is None else np.unique(label[(label > 0) & (label < 255)]):
                mask = (label == value).T.astype(float)
                color = np.array(to_rgb(PALETTE[(value - 1) % len(PALETTE)]))
                if is_filled:
                    axes.contourf(mask, [0.5, 2], colors=[color], alpha=0.35)
                else:
                    # On a dark seam: seen on the area of its own class, too.
                    axes.contour(mask, [0.5], colors=["black"], linewidths=2.6, alpha=0.6)
                    axes.contour(mask, [0.5], colors=[color], linewidths=1.3)

    width, height = image.shape
    return _svg((2.4, 2.4 * height / width), draw)


def _svg(size: tuple[float, float], draw: Callable[[Figure], None]) -> str:
    """The SVG element of a figure of some size, in inches, that `draw` has drawn on."""
    text = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure = Figure(size, layout="constrained")
        draw(figure)
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    # Matplotlib's name and licence terms; a style sheet that would hold for the whole page.
    svg = re.sub(r"\s*<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg[^>]*( viewBox="[^"]*")[^>]*>', r'<svg\1 aria-hidden="true">', svg, count=1)
    # Some versions write `font: 10px FAMILIES`, others `font-size: 10px; font-family: FAMILIES`.
    svg = re.sub(r"(font: [\d.]+px|font-family:) [^;\"]*", r"\1 var(--font)", svg)
    for color in _VARIABLES:
        svg = svg.replace(color, css(color))
    return svg
