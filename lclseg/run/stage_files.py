"""What a stage writes while it trains: metrics.jsonl, TensorBoard, and how far it has come."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from tensorboardX import SummaryWriter

from lclseg.run import progress, tensorboard
from lclseg.run.programs import Stage
from lclseg.run.setup import Run
from lclseg.run.workdir import forget_lines


class StageFiles(NamedTuple):
    """Open files of one stage; see `open_stage_files`."""

    run: Run
    stage: Stage
    writer: SummaryWriter
    progress: progress.Progress

    def advance(self, number: int, loss: float) -> None:
        """Tells that `number` steps of the stage are done."""
        self.progress.update(number, loss=loss)

    def log(
        self,
        number: int,
        scalars: Mapping[str, float],
        pictures: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Writes scalars and pictures [H, W, 3] of a step of the stage."""
        line = {"stage": self.stage.name, "step": number, **scalars}
        with (self.run.workdir / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        step = self.stage.first_step + number
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)
        for name, picture in (pictures or {}).items():
            self.writer.add_image(name, picture, step, dataformats="HWC")
        if "validation_dice" in scalars:
            self.progress.tell(validation_dice=scalars["validation_dice"])


@contextlib.contextmanager
def open_stage_files(run: Run, stage: Stage, done: int) -> Iterator[StageFiles]:
    """Opens the files of a stage that goes on after `done` steps; what lies after them goes."""
    forget_lines(run.workdir / "metrics.jsonl", stage.name, after_step=done)
    folder = run.workdir / "tensorboard" / stage.name
    with (
        tensorboard.open_writer(folder, after_step=stage.first_step + done) as writer,
        progress.steps(stage.name, done, stage.num_steps) as told,
    ):
        yield StageFiles(run, stage, writer, told)
