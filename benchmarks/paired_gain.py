"""python -m benchmarks.paired_gain results/acdc_4000/recipe results/acdc_long/recipe

Tells how much higher the test Dice of one row of a sweep is than that of another, pair by pair,
with a 95 % interval (Student's t). The rows may be of two sweeps, as long as both test the same
volumes; `--splits` takes some of the pairs. No times.
"""

import argparse
import json
from collections.abc import Collection, Mapping
from pathlib import Path

from lclseg.sweep_table import chosen_dice, every_component_dice, final_dice, mean_and_interval

MEASURES = {
    "last weights, largest component": final_dice,
    "last weights, every component": every_component_dice,
    "chosen weights, largest component": chosen_dice,
}


def runs_of(folder: Path, splits: Collection[str]) -> dict[str, dict]:
    """Reads the finished runs of a row by "<split>_seed<seed>"; of `splits`, where there are any.

    Raises:
      ValueError: there is none, or none of one of the splits.
    """
    runs = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    found = {pair: pair.split("_seed")[0] for pair in runs}
    missing = [split for split in splits if split not in found.values()]
    if missing or not runs:
        of = f" of {', '.join(missing)}" if missing else ""
        raise ValueError(f"{folder} holds no run{of}; it has {', '.join(sorted(found)) or 'none'}")
    return {pair: run for pair, run in runs.items() if not splits or found[pair] in splits}


def lines(one: Mapping[str, dict], other: Mapping[str, dict]) -> list[str]:
    """Makes a Markdown table: a line per measure, the gains by pair and their mean.

    Raises:
      ValueError: no pair is in both rows, or its runs have tested other volumes.
    """
    pairs = sorted(one.keys() & other.keys(), key=lambda p: (len(p), p))  # c2 before c10
    if not pairs:
        raise ValueError(f"no pair in common: {', '.join(one)}, and {', '.join(other)}")
    for pair in pairs:
        tested = [sorted(row[pair]["volumes"]["test"]) for row in (one, other)]
        if tested[0] != tested[1]:
            raise ValueError(f"{pair}: the rows have tested other volumes; they do not compare")
    cells = [["gain", *pairs, "mean"], ["---"] * (len(pairs) + 2)]
    for measure, dice in MEASURES.items():
        gains = [dice(one[pair]) - dice(other[pair]) for pair in pairs]
        mean, half = mean_and_interval(gains)
        interval = "" if half is None else f" ± {half:.3f}"
        cells.append([measure, *(f"{g:+.3f}" for g in gains), f"{mean:+.3f}{interval}"])
    return [f"| {' | '.join(some)} |" for some in cells]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("row", type=Path, help="folder of a row's results")
    parser.add_argument("reference", type=Path, help="folder of the row that the gain is over")
    parser.add_argument("--splits", nargs="+", default=[], help="default: all that both have")
    args = parser.parse_args()
    try:
        found = lines(runs_of(args.row, args.splits), runs_of(args.reference, args.splits))
    except ValueError as error:
        parser.error(str(error))
    print("\n".join(found))


if __name__ == "__main__":
    main()
