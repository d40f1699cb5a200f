"""The table at the end of a run."""


def table(results: dict) -> str:
    """What a run found, as aligned text: stages on the test volumes, then pseudo-labels by round.

    Stages: validation and test Dice, gain over the baseline, Dice per class, HD95 and ASSD in mm,
    class-volume pairs missed. Pseudo-labels: volumes used, rejected by the gate, empty; mean
    confidence; Dice with the round before and, where ground truth is hidden, with the truth.
    """
    classes = results["class_names"]
    stages = [
        ["stage", "val Dice", "test Dice", "gain", *classes, "HD95 mm", "ASSD mm", "missed"],
    ]
    pseudo = [
        ["trained on", "volumes", "rejected", "empty", "confidence", "Dice before", "true Dice"],
    ]
    notes = []
    baseline = results["results"]["baseline"]["test"]["mean_dice"]
    for stage, result in results["results"].items():
        test = result["test"]
        stages.append(
            [
                stage + (" *" if stage == results.get("chosen") else ""),
                _number(result["best_validation_dice"], ".4f"),
                _number(test["mean_dice"], ".4f"),
                "" if stage == "baseline" else _number(test["mean_dice"] - baseline, "+.4f"),
                *(_number(test["dice_per_class"][c], ".4f") for c in classes),
                _number(test["mean_hausdorff95_mm"], ".2f"),
                _number(test["mean_assd_mm"], ".2f"),
                str(test["n_missed"]),
            ]
        )
        labels = result["pseudo_labels"]
        if labels is None:
            continue
        pseudo.append(
            [
                stage,
                str(labels["num_volumes"]),
                str(len(labels["gate"]["rejected"])) if labels["gate"] else "-",
                str(len(labels["empty_volumes"])),
                _number(labels["mean_confidence"], ".3f"),
                _number(labels["dice_with_previous_round"], ".4f"),
                _number(labels["true_mean_dice"], ".4f"),
            ]
        )
        notes += [f"{stage}: {warning}" for warning in labels["warnings"]]
    volumes = results["volumes"]
    caption = (
        f"{results['dataset']}: {len(volumes['labeled'])} labelled, {len(volumes['unlabeled'])} "
        f"unlabelled, {len(volumes['validation'])} validation, {len(volumes['test'])} test "
        f"volumes; split {results['split']}, seed {results['seed']}; * best on validation"
    )
    parts = [f"{results['description']}\n{caption}", _aligned(stages)]
    if len(pseudo) > 1:
        parts.append("\n".join(["Pseudo-labels", _aligned(pseudo), *notes]))
    return "\n\n".join(parts)


def _aligned(rows: list[list[str]]) -> str:
    """Rows of cells as columns, a rule under the first row."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], ["-" * w for w in widths], *rows[1:]]
    lines = ("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in rows)
    return "\n".join(line.rstrip() for line in lines)


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
