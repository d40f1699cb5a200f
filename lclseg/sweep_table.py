"""The table of a sweep: what rows give over pairs of split and seed, and paired differences.

Results are those of finished runs, as `results.json` has them, by (row, split, seed).
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import numpy as np
from scipy import stats

Pair = tuple[str, int]
Results = Mapping[tuple[str, str, int], dict]


def mean_and_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Computes mean and half its 95 % interval (Student's t); None for a single value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    return mean, float(stats.t.ppf(0.975, len(values) - 1) * error)


def last_test(result: dict) -> dict:
    """Takes test metrics of the last weights of a run's last stage."""
    return list(result["results"].values())[-1]["test_last"]


def handed_out(test: dict) -> dict:
    """Takes the test with the largest component kept, where there are classes in one piece."""
    return test.get("largest_component", test)


def final_dice(result: dict) -> float:
    """Takes test Dice of a run's last weights, the largest component kept."""
    return handed_out(last_test(result))["mean_dice"]


def every_component_dice(result: dict) -> float:
    """Takes test Dice of a run's last weights, every component counted."""
    return last_test(result)["mean_dice"]


def chosen_dice(result: dict) -> float:
    """Takes test Dice of the checkpoint that validation chose, the largest component kept."""
    return handed_out(result["results"][result["chosen"]]["test"])["mean_dice"]


def runs_of(results: Results, row: str, pairs: Iterable[Pair]) -> dict[Pair, dict]:
    """Takes the finished runs of a row, by pair."""
    return {pair: results[row, *pair] for pair in pairs if (row, *pair) in results}


def table(
    rows: Collection[str], pairs: Sequence[Pair], results: Results, reference: str
) -> tuple[list[str], list[list[str]]]:
    """Makes the head and the cells of the table, a line per row that has a finished run.

    Columns: number of runs; test Dice of the last weights (mean over volumes of the mean over
    classes), mean over the runs with its 95 % interval; the same with the largest component kept;
    its gain over the row `reference`, pair by pair; the same of the checkpoint that validation
    chose; then of the last weights with the largest component Dice by class, and 95th-percentile
    Hausdorff distance in mm without and with it; seconds of training; thousands of slices trained
    on.
    """
    classes = next(iter(results.values()))["class_names"]
    head = ["row", "runs", "last weights", "largest component", f"gain over {reference}"]
    head += ["chosen", *classes, "HD95", "HD95, largest component", "seconds", "1000 slices"]
    lines = []
    for row in rows:
        own = runs_of(results, row, pairs)
        if not own:
            continue
        tests = [last_test(r) for r in own.values()]
        cleaned = list(map(handed_out, tests))
        gains = list(paired_gains(results, row, reference).values())
        distances = [[t["mean_hausdorff95_mm"] for t in some] for some in (tests, cleaned)]
        stages = [list(r["results"].values()) for r in own.values()]
        cells = [
            row,
            str(len(own)),
            _interval(list(map(every_component_dice, own.values()))),
            _interval(list(map(final_dice, own.values()))),
            _interval(gains, "+") if gains and row != reference else "",
            _interval(list(map(chosen_dice, own.values()))),
            *(f"{np.mean([t['dice_per_class'][c] for t in cleaned]):.3f}" for c in classes),
            *(f"{np.mean(some):.1f}" for some in distances),
            f"{np.mean([sum(s['seconds']['train'] for s in each) for each in stages]):.0f}",
            f"{np.mean([sum(s['slices'] for s in each) for each in stages]) / 1000:.1f}",
        ]
        lines.append(cells)
    return head, lines


def by_pair(
    rows: Collection[str], pairs: Sequence[Pair], results: Results
) -> tuple[list[str], list[list[str]]]:
    """Makes head and cells of a table of `final_dice`, a line per row, a column per pair.

    Pairs that no row has run are left out.
    """
    pairs = _have_run(pairs, results)
    head = ["row", *_names(pairs)]
    lines = []
    for row in rows:
        own = runs_of(results, row, pairs)
        if own:
            dices = [f"{final_dice(own[pair]):.3f}" if pair in own else "" for pair in pairs]
            lines.append([row, *dices])
    return head, lines


def gains_by_pair(
    rows: Collection[str], pairs: Sequence[Pair], results: Results, reference: str
) -> tuple[list[str], list[list[str]]]:
    """Makes head and cells of a table of gains over the row `reference`, a column per pair.

    After `final_dice` by pair come the means, with their 95 % intervals, of its gains and of those
    of `every_component_dice` and `chosen_dice`. Rows without a pair in common are left out.
    """
    pairs = _have_run(pairs, results)
    head = [f"gain over {reference}", *_names(pairs)]
    head += ["mean", "every component counted", "chosen"]
    lines = []
    for row in rows:
        gains = paired_gains(results, row, reference)
        if row != reference and gains:
            cells = [f"{gains[pair]:+.3f}" if pair in gains else "" for pair in pairs]
            for dice in (final_dice, every_component_dice, chosen_dice):
                values = paired_gains(results, row, reference, dice).values()
                cells.append(_interval(list(values), "+"))
            lines.append([row, *cells])
    return head, lines


def by_stage(
    rows: Collection[str], pairs: Sequence[Pair], results: Results
) -> tuple[list[str], list[list[str]]]:
    """Makes head and cells of a table of runs: test Dice of each stage, and the chosen stage.

    Of the last weights, the largest component kept.
    """
    head = ["row", "split", "seed", "last weights, largest component, by stage", "chosen"]
    lines = []
    for row in rows:
        for (split, seed), r in runs_of(results, row, pairs).items():
            tests = [handed_out(stage["test_last"]) for stage in r["results"].values()]
            dices = " -> ".join(f"{test['mean_dice']:.3f}" for test in tests)
            lines.append([row, split, str(seed), dices, r["chosen"]])
    return head, lines


def markdown(rows: Collection[str], pairs: Sequence[Pair], results: Results, reference: str) -> str:
    """Makes the four tables in Markdown, an empty line between them.

    Gains are over the row `reference`.
    """
    if not results:
        return "no finished run yet"
    tables = [
        table(rows, pairs, results, reference),
        by_pair(rows, pairs, results),
        gains_by_pair(rows, pairs, results, reference),
        by_stage(rows, pairs, results),
    ]
    return "\n\n".join(in_markdown(head, lines) for head, lines in tables)


def in_markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Makes one table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines))


def paired_gains(
    results: Results, row: str, reference: str, dice: Callable[[dict], float] = final_dice
) -> dict[Pair, float]:
    """Computes how much higher a row's Dice is, by pair (split, seed) that both rows have."""
    return {
        (split, seed): dice(result) - dice(results[reference, split, seed])
        for (name, split, seed), result in results.items()
        if name == row and (reference, split, seed) in results
    }


def _have_run(pairs: Iterable[Pair], results: Results) -> list[Pair]:
    """The pairs that any row has run."""
    return [pair for pair in pairs if any(key[1:] == pair for key in results)]


def _names(pairs: Sequence[Pair]) -> list[str]:
    """What pairs are called: by the split, and by the seed as well where splits repeat."""
    splits = [split for split, _ in pairs]
    repeat = len(set(splits)) < len(splits)
    return [f"{split}, seed {seed}" if repeat else split for split, seed in pairs]


def _interval(values: Sequence[float], sign: str = "") -> str:
    mean, half = mean_and_interval(values)
    return f"{mean:{sign}.3f}" + ("" if half is None else f" ± {half:.3f}")
