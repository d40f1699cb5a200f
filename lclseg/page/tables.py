"""Results as cells of tables, and tables as aligned text."""

from collections.abc import Mapping, Sequence


def number(value: float | None, spec: str) -> str:
    """Formats a number; "-" for None."""
    return "-" if value is None else format(value, spec)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Aligns rows of cells as columns, a rule under the first row."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], ["-" * w for w in widths], *rows[1:]]
    lines = ("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in rows)
    return "\n".join(line.rstrip() for line in lines)


def gain(stages: Mapping[str, dict], stage: str, spec: str) -> str:
    """Subtracts the baseline's mean test Dice from a stage's; "" for the baseline."""
    if stage == "baseline":
        return ""
    dice, before = (stages[name]["test"]["mean_dice"] for name in (stage, "baseline"))
    return number(None if None in (dice, before) else dice - before, f"+{spec}")


def score_cells(test: Mapping, classes: Sequence[str], spec: str) -> list[str]:
    """Shows a stage's test: Dice of each class, mean HD95 and ASSD in mm."""
    return [
        *(number(test["dice_per_class"].get(name), spec) for name in classes),
        number(test["mean_hausdorff95_mm"], ".2f"),
        number(test["mean_assd_mm"], ".2f"),
    ]


def stage_cells(
    stages: Mapping[str, dict], stage: str, classes: Sequence[str], spec: str
) -> list[str]:
    """Shows validation Dice; test Dice, its gain, by class; HD95, ASSD; missed; last.

    The last is the test Dice of the stage's last weights, as against those that validation chose.
    """
    result = stages[stage]
    return [
        number(result["best_validation_dice"], spec),
        number(result["test"]["mean_dice"], spec),
        gain(stages, stage, spec),
        *score_cells(result["test"], classes, spec),
        str(result["test"]["n_missed"]),
        # Runs of earlier versions tested the chosen weights only.
        number(result.get("test_last", {}).get("mean_dice"), spec),
    ]


def largest_component_cell(result: Mapping, spec: str) -> str:
    """Shows mean test Dice of a stage where the largest component is kept; "-" where none is."""
    return number(result["test"].get("largest_component", {}).get("mean_dice"), spec)


def pseudo_label_cells(report: Mapping, spec: str) -> list[str]:
    """Counts volumes, rejected, empty; shows confidence, Dice with the last round and the truth."""
    return [
        str(report["num_volumes"]),
        str(len(report["gate"]["rejected"])) if report["gate"] else "-",
        str(len(report["empty_volumes"])),
        number(report["mean_confidence"], ".3f"),
        number(report["dice_with_previous_round"], spec),
        number(report["true_mean_dice"], spec),
    ]
