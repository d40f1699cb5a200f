"""The JSON and text files of a workdir; each is whole at any moment."""

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path

import jax
from ml_collections import ConfigDict

from lclseg.data.dataset import PreparedSet
from lclseg.data.splits import Split

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


def chosen_stage(stages: Mapping[str, dict]) -> str:
    """The stage that a run hands out, of results.json's `results`.

    The best by validation Dice, the first of equals; the last where no volume validates.
    """
    dice = {stage: result["best_validation_dice"] for stage, result in stages.items()}
    if None in dice.values():
        return list(stages)[-1]
    return max(dice, key=dice.__getitem__)


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
