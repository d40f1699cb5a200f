"""results.json and the table at the end of a run."""

import importlib.metadata
import json
import os
import platform
from pathlib import Path

import jax
from ml_collections import ConfigDict

from lclseg.prepared import PreparedSet
from lclseg.splits import Split

PACKAGES = ("lclseg", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def new_results(config: ConfigDict, prepared: PreparedSet, split: Split) -> dict:
    """The head of results.json; `results` is filled stage by stage."""
    device = jax.devices()[0]
    return {
        "dataset": prepared.name,
        "description": prepared.description,
        "class_names": list(prepared.class_names),
        "image_size": prepared.image_size,
        "target_spacing_mm": prepared.target_spacing_mm,
        "seed": config.seed,
        "num_labeled": config.data.num_labeled,
        "split": config.data.split,
        "volumes": {role: list(ids) for role, ids in split._asdict().items()},
        "versions": {p: importlib.metadata.version(p) for p in PACKAGES}
        | {"python": platform.python_version()},
        "device": {
            "kind": device.device_kind,
            "platform": device.platform,
            "count": len(jax.devices()),
        },
        "results": {},
    }


def write_json(path: Path, content: dict) -> None:
    """Writes JSON to a file that is whole at any moment."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file that is whole at any moment: a temporary one, then renamed."""
    temporary = path.with_suffix(".partial")
    temporary.write_text(text)
    os.replace(temporary, path)


def forget_lines(path: Path, stage: str, *, after_step: int) -> None:
    """Takes out of metrics.jsonl what a stage that goes on from `after_step` will write again.

    A line that was cut off while it was written goes, too.
    """
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    kept = []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry["stage"] != stage or entry["step"] <= after_step:
            kept.append(line)
    if kept != lines:
        write_text(path, "".join(kept))


def read_json(path: Path) -> dict | None:
    """The file's content, None where there is no file."""
    return json.loads(path.read_text()) if path.exists() else None


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
        known = None not in (test["mean_dice"], baseline)
        gain = test["mean_dice"] - baseline if known else None
        stages.append(
            [
                stage + (" *" if stage == results.get("chosen") else ""),
                _number(result["best_validation_dice"], ".4f"),
                _number(test["mean_dice"], ".4f"),
                "" if stage == "baseline" else _number(gain, "+.4f"),
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
