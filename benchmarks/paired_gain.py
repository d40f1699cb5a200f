"""python -m benchmarks.paired_gain results/acdc_4000/recipe results/acdc_long/recipe

Tells how much higher the test Dice of one row of a sweep is than that of another, pair by pair,
with 95 % intervals; see `sweep_table.gains_by_pair`. The rows may be of two sweeps, as long as both
test the same volumes; `--splits` takes some of the pairs. No times.
"""

import argparse
import json
from collections.abc import Collection, Mapping
from pathlib import Path

from lclseg.sweep_table import gains_by_pair, in_markdown


def read_row(folder: Path, splits: Collection[str]) -> dict[tuple[str, str, int], dict]:
    """Reads the finished runs of a row by (folder, split, seed); of `splits`, where there are any.

    Raises:
      ValueError: there is none, or none of one of the splits.
    """
    runs = {}
    for path in sorted(folder.glob("*.json")):
        split, _, seed = path.stem.rpartition("_seed")
        runs[str(folder), split, int(seed)] = json.loads(path.read_text())
    there = {split for _, split, _ in runs}
    missing = [split for split in splits if split not in there]
    if missing or not runs:
        of = f" of {', '.join(missing)}" if missing else ""
        raise ValueError(f"{folder} holds no run{of}; it has {', '.join(sorted(there)) or 'none'}")
    return {key: run for key, run in runs.items() if not splits or key[1] in splits}


def table(row: Mapping, reference: Mapping) -> str:
    """Makes the Markdown table of two rows, both as `read_row` gives them.

    Raises:
      ValueError: no pair is in both, or its runs have tested other volumes.
    """
    names = [next(iter(runs))[0] for runs in (row, reference)]
    pairs = {key[1:] for key in row} & {key[1:] for key in reference}
    if not pairs:
        raise ValueError(f"{' and '.join(names)} have no pair of split and seed in common")
    for split, seed in pairs:
        runs = (row[names[0], split, seed], reference[names[1], split, seed])
        tested = [sorted(run["volumes"]["test"]) for run in runs]
        if tested[0] != tested[1]:
            raise ValueError(f"{split}, seed {seed}: the rows have tested other volumes")
    in_order = sorted(pairs, key=lambda pair: (len(pair[0]), pair))  # c2 before c10
    return in_markdown(*gains_by_pair([names[0]], in_order, {**row, **reference}, names[1]))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("row", type=Path, help="folder of a row's results")
    parser.add_argument("reference", type=Path, help="folder of the row that the gain is over")
    parser.add_argument("--splits", nargs="+", default=[], help="default: all that both have")
    args = parser.parse_args()
    try:
        print(table(read_row(args.row, args.splits), read_row(args.reference, args.splits)))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
