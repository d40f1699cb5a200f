"""python -m benchmarks.chosen_or_last [--results=results]

Tells what validation's choice of a checkpoint is worth: the test Dice of the chosen weights, less
that of the last weights, over every run that a folder of sweeps' results holds. The largest
component is kept. No times.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.harness import ROOT
from lclseg.sweep_table import chosen_dice, final_dice

MUCH = 0.01  # Dice


def summary(differences: Sequence[float]) -> str:
    """Describes differences of Dice: their mean, its standard error, and how many are large."""
    some = np.asarray(differences)
    error = some.std(ddof=1) / np.sqrt(some.size)
    better, worse = (int((sign * some > MUCH).sum()) for sign in (1, -1))
    return (
        f"{some.size} runs: the chosen weights have {some.mean():+.4f}, "
        f"standard error {error:.4f}; more than {MUCH} better in {better}, "
        f"more than {MUCH} worse in {worse}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    folder = parser.parse_args().results
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("*/*/*.json"))]
    if len(runs) < 2:
        parser.error(f"--results: {folder} holds {len(runs)} runs, at least 2 are needed")
    print(summary([chosen_dice(run) - final_dice(run) for run in runs]))


if __name__ == "__main__":
    main()
