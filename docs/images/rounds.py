"""python docs/images/rounds.py --workdir RUN --output docs/images/rounds.svg

Draws the picture of the README: two volumes of a run's pool, their hidden truth, and what the
baseline, the first and the last round made of them. The pool's truth must be known (phantom, ACDC).
"""

import argparse
import re
from pathlib import Path

import numpy as np

from lclseg.metrics import mean_foreground_dice
from lclseg.page import figures, pictures
from lclseg.page.elements import text
from lclseg.page.recorded import find_prepared, read_run
from lclseg.palette import PALETTE
from lclseg.pseudo_labels import load_pseudo_labels

SIDE, GAP, HEAD, LEFT = 200, 12, 34, 0  # px
GREY = "#7b8189"  # read on light and on dark ground
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"


def words(x: float, y: float, content: str, *, size: int = 19, weight: int = 400) -> str:
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" font-weight="{weight}" fill="{GREY}">'
        f"{text(content)}</text>"
    )


def picture(number: int, x: float, y: float, svg: str) -> str:
    """An SVG of `figures` at a place of another one; its ids get a number before them."""
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>f{number}-", svg)
    return svg.replace("<svg", f'<svg x="{x}" y="{y}" width="{SIDE}" height="{SIDE}"', 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    run = read_run(options.workdir.absolute(), "")
    prepared, why = find_prepared(run.config)
    if prepared is None:
        parser.error(why)
    rounds = [
        load_pseudo_labels(run.workdir / "pseudo_labels" / r, prepared)
        for r in run.pseudo_label_reports()
    ]
    shown = {"baseline": rounds[0], "after round 1": rounds[1]}
    shown[f"after round {len(rounds) - 1}"] = rounds[-1]
    dice, labels = {}, {}
    for volume_id in rounds[0].report["volume_ids"]:
        slices = prepared.volumes[volume_id].slices
        _, truth = prepared.read_slices(slices)
        labels[volume_id] = [stage.read(np.asarray(slices)) for stage in shown.values()]
        dice[volume_id] = [
            mean_foreground_dice(label, truth, prepared.num_classes) for label in labels[volume_id]
        ]
    ranked = sorted(dice, key=lambda v: dice[v][-1] - dice[v][0])
    rows = {"gained most": ranked[-1], "median gain": ranked[len(ranked) // 2]}
    parts, number = [], 0
    for column, name in enumerate(["image", "hidden truth", *shown]):
        parts.append(words(LEFT + column * (SIDE + GAP), 22, name, weight=600))
    for row, (name, volume_id) in enumerate(rows.items()):
        image, truth = prepared.read_slices(prepared.volumes[volume_id].slices)
        at = int(np.count_nonzero(truth, axis=(1, 2)).argmax())
        box = pictures.box([truth[at], *(label[at] for label in labels[volume_id])])
        y = HEAD + row * (SIDE + 46)
        parts.append(words(0, y + SIDE + 22, name))
        for column, label in enumerate([None, truth, *labels[volume_id]]):
            drawn = None if label is None else label[at][box]
            svg = figures.overlay(image[at][box], filled=drawn, outlined=None)
            x = LEFT + column * (SIDE + GAP)
            parts.append(picture(number, x, y, svg))
            number += 1
            if column >= 2:
                parts.append(words(x, y + SIDE + 22, f"Dice {dice[volume_id][column - 2]:.2f}"))
    width = LEFT + 5 * (SIDE + GAP) - GAP
    height = HEAD + 2 * (SIDE + 46) - 10
    for place, (name, color) in enumerate(zip(prepared.class_names, PALETTE, strict=False)):
        x, y = SIDE + GAP + place * 76, HEAD + 2 * SIDE + 54
        parts.append(f'<rect x="{x}" y="{y}" width="14" height="14" rx="2" fill="{color}"/>')
        parts.append(words(x + 19, y + 14, name, size=16))
    options.output.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}" font-family="{FONT}">\n' + "\n".join(parts) + "\n</svg>\n"
    )
    print(options.output, {name: dice[v] for name, v in rows.items()})


if __name__ == "__main__":
    main()
