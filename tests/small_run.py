"""A small run of `python -m lclseg.main` in processes of its own, for tests that end it early."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax

from lclseg.run import checkpoint

ROOT = Path(__file__).parents[1]
STAGES = ("baseline", "round_1", "round_2")
CONFIG = """
import runpy

def get_config():
    config = runpy.run_path({phantom!r})["get_config"]("local_contrastive")
    data = config.data
    data.data_dir = {data_dir!r}
    data.image_size, data.target_spacing_mm = 32, 4.0
    data.unlabeled = ("phantom_010", "phantom_011", "phantom_013")
    data.test = ("phantom_044", "phantom_045")
    data.labeled_batch_size = 4
    config.method.pairs.update(labeled_self=1, pseudo_self=1, labeled_pseudo=1, pseudo_pseudo=1)
    config.method.view_min_classes = 1
    config.model.filters = (4, 8)
    config.num_cpu_devices = 1
    config.rounds.update(baseline_steps=60, num_rounds=2, steps_per_round=40, eval_every=10)
    return config
"""
# Fewer steps, for what needs the whole run but no long one.
SHORT = (
    "--config.rounds.baseline_steps=6",
    "--config.rounds.steps_per_round=4",
    "--config.rounds.eval_every=2",
    "--config.log.every=2",
)


class Program:
    """`python -m lclseg.main` on the small config, or another module of the package."""

    def __init__(self, folder):
        self.config = folder / "small.py"
        self.data_dir = folder / "data"
        self.config.write_text(
            CONFIG.format(phantom=str(ROOT / "configs" / "phantom.py"), data_dir=str(self.data_dir))
        )

    def command(self, workdir, *options):
        command = [sys.executable, "-m", "lclseg.main", f"--config={self.config}"]
        return [*command, f"--workdir={workdir}", *options]

    def start(self, workdir, *options, env=None, prefix=()):
        return subprocess.Popen(
            [*prefix, *self.command(workdir, *options)],
            cwd=ROOT,
            env=os.environ | (env or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, workdir, *options, **kwargs):
        process = self.start(workdir, *options, **kwargs)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output


TIMES = ("seconds", "steps_per_second", "device_busy")


def without_times(workdir):
    """results.json, times aside."""
    results = json.loads((workdir / "results.json").read_text())
    for stage in results["results"].values():
        for name in TIMES:
            del stage[name]
    return results


def logged(workdir):
    """The lines of metrics.jsonl, times aside."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def end_of(workdir):
    """What a run leaves, times aside, as text."""
    results = json.dumps(without_times(workdir), sort_keys=True)
    reports = [p.read_text() for p in sorted((workdir / "pseudo_labels").glob("*/report.json"))]
    return [results, json.dumps(logged(workdir)), *reports]


def newest_state(workdir, stage):
    """Arrays of a stage's newest checkpoint, as stored."""
    with checkpoint.open_stage(workdir / "checkpoints" / stage) as manager:
        item = checkpoint.ocp.args.StandardRestore()
        tree = manager.restore(
            manager.latest_step(), args=checkpoint.ocp.args.Composite(state=item)
        )
    return jax.tree.leaves(tree["state"])
