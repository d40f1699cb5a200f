"""What a workdir records of its run, and what the page's tables and charts take from it."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from lclseg.data.builder_options import options_of
from lclseg.data.dataset import PreparedSet, open_prepared
from lclseg.data.nifti import VolumeError
from lclseg.errors import UserError
from lclseg.run.workdir import chosen_stage, read_json

Curve = tuple[list[int], np.ndarray]  # steps over the whole run, values; NaN between stages


class RunError(UserError):
    """A folder that holds no run; the message tells what is missing."""


def named(stage: str) -> str:
    """Names a stage in words, such as "round 1"."""
    return stage.replace("_", " ")


class RecordedRun(NamedTuple):
    """A run, finished or not, as its workdir has it."""

    name: str  # tells it from the other runs of a page
    workdir: Path
    config: dict  # of config.json
    results: dict  # of results.json; {} before a stage is finished
    lines: list[dict]  # of metrics.jsonl
    prepared: PreparedSet | None  # the data set; None: no pictures of volumes
    why_no_pictures: str  # where `prepared` is None

    @property
    def title(self) -> str:
        data = self.config["data"]
        roles = f"{data['num_labeled']} labelled, split {data['split']}"
        return f"{data['name']}, {roles}, seed {self.config['seed']}"

    @property
    def stages(self) -> dict[str, dict]:
        """Results of the finished stages."""
        return self.results.get("results", {})

    @property
    def classes(self) -> list[str]:
        return self.results.get("class_names", [])

    @property
    def chosen(self) -> str:
        """The finished stage that the run would hand out."""
        return chosen_stage(self.stages)

    @property
    def keeps_largest(self) -> list[str]:
        """Names of the classes of which what is handed out keeps the largest component alone."""
        content = read_json(self.workdir / "postprocessing.json") or {}
        return content.get("largest_component", [])

    @property
    def first_steps(self) -> dict[str, int]:
        """Steps before each stage that the run has begun, counted over the whole run."""
        rounds = self.config["rounds"]
        begun = {*self.stages, *(line["stage"] for line in self.lines)}
        steps = {"baseline": 0, "joint": rounds["baseline_steps"]} | {
            f"round_{k}": rounds["baseline_steps"] + (k - 1) * rounds["steps_per_round"]
            for k in range(1, rounds["num_rounds"] + 1)
        }
        return {stage: step for stage, step in steps.items() if stage in begun}

    @property
    def loss_terms(self) -> list[str]:
        """Keys of metrics.jsonl that are terms of the loss, in the order in which they come."""
        keys = dict.fromkeys(key for line in self.lines for key in line)
        return [key for key in keys if key.endswith("_loss")]

    def logged(self, key: str) -> Curve:
        """Reads the values of a key of metrics.jsonl."""
        return self._joined(lambda stage: self._lines_of(stage, key))

    def validation_dice(self, class_name: str | None = None) -> Curve:
        """Reads validation Dice, of a class or the mean; of a stage in progress the mean only."""

        def points(stage: str) -> list[tuple[int, float | None]]:
            if stage not in self.stages:
                return [] if class_name else self._lines_of(stage, "validation_dice")
            return [
                (e["step"], e["dice_per_class"][class_name] if class_name else e["mean_dice"])
                for e in self.stages[stage]["validation"]
            ]

        return self._joined(points)

    def best_validation_dice(self) -> Curve:
        """Reads the best mean of each finished stage."""
        best = {
            s: max(r["validation"], key=lambda e: e["mean_dice"])
            for s, r in self.stages.items()
            if r["validation"]
        }
        x = [self.first_steps[stage] + entry["step"] for stage, entry in best.items()]
        return x, np.array([entry["mean_dice"] for entry in best.values()])

    def _lines_of(self, stage: str, key: str) -> list[tuple[int, float | None]]:
        lines = (line for line in self.lines if line["stage"] == stage and key in line)
        return [(line["step"], line[key]) for line in lines]

    def _joined(self, points: Callable[[str], list[tuple[int, float | None]]]) -> Curve:
        """One curve of each stage's points (step in the stage, value)."""
        x, y = [], []
        for stage, first in self.first_steps.items():
            for step, value in [*points(stage), (0, None)]:  # None breaks the line between stages
                x.append(first + step)
                y.append(value)
        return x, np.array(y, float)

    def test_dice(self, class_name: str | None = None) -> dict[str, list[float | None]]:
        """Reads, by finished stage, in words: the test volumes' Dice, of a class or the mean."""
        return {
            named(stage): [
                record["dice"][class_name] if class_name else record["mean_dice"]
                for record in result["test"]["per_volume"].values()
            ]
            for stage, result in self.stages.items()
        }

    def pseudo_label_reports(self) -> dict[str, dict]:
        """Reads, by round, what is reported on the pseudo-labels that it trains on.

        One more than there are rounds, once the finished model has segmented the pool.
        """
        reports = {}
        for number in range(1, self.config["rounds"]["num_rounds"] + 2):
            name = f"round_{number}"
            report = read_json(self.workdir / "pseudo_labels" / name / "report.json")
            # The folder may be elsewhere by now.
            report = report or self.stages.get(name, {}).get("pseudo_labels")
            if report:
                reports[name] = report
        return reports

    def used_by(self, name: str) -> str:
        """Tells who trains on a round's pseudo-labels, in words; none on the final ones."""
        rounds = self.config["rounds"]["num_rounds"]
        return f"after round {rounds}" if name == f"round_{rounds + 1}" else named(name)


def read_run(
    workdir: Path, name: str, prepared: PreparedSet | None = None, why_no_pictures: str = ""
) -> RecordedRun:
    """Reads a workdir.

    Raises:
      RunError: there is no run in it.
    """
    config = read_json(workdir / "config.json")
    if config is None:
        raise RunError(f"{workdir} holds no run: there is no config.json; wanted a run's --workdir")
    results = read_json(workdir / "results.json") or {}
    lines = []
    path = workdir / "metrics.jsonl"
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:  # the last one of a run that goes on, or was ended, as it was written
            continue
    return RecordedRun(name, workdir, config, results, lines, prepared, why_no_pictures)


def find_prepared(config: dict) -> tuple[PreparedSet | None, str]:
    """Finds the prepared set of a config read from JSON, or None and why; prepares nothing."""
    keys = ("name", "image_size", "target_spacing_mm", "n4_shrink_factor", "data_dir", "manual_dir")
    data = config["data"]
    grid = {k: v for k, v in data.items() if k in keys}  # an old config may lack one
    try:
        return open_prepared(**grid, options=options_of(ConfigDict(data)), prepare=False), ""
    except VolumeError as error:
        return None, str(error)


def names_of(workdirs: Sequence[Path]) -> list[str]:
    """Names folders by what differs: paths without the parts that all begin and end with."""
    parts = [w.parts for w in workdirs]
    if len(parts) == 1:
        return [workdirs[0].name]
    first = len(os.path.commonprefix(parts))
    last = len(os.path.commonprefix([p[first:][::-1] for p in parts]))
    return ["/".join(p[first : len(p) - last]) or p[-1] for p in parts]
