"""A small run killed without notice, again and again, ends as if nothing had happened.

Slow (minutes): ./run.sh test tests/test_kill.py --slow
"""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONFIG = """
import runpy

def get_config():
    config = runpy.run_path({phantom!r})["get_config"]()
    data = config.data
    data.data_dir = {data_dir!r}
    data.image_size, data.target_spacing_mm = 32, 4.0
    data.unlabeled = ("phantom_010", "phantom_011", "phantom_012")
    data.test = ("phantom_044", "phantom_045")
    data.labeled_batch_size = 4
    data.pairs.update(labeled_self=1, pseudo_self=1, labeled_pseudo=1, pseudo_pseudo=1)
    data.view_min_classes = 1
    config.model.filters = (4, 8)
    config.num_cpu_devices = 1
    config.rounds.update(baseline_steps=60, num_rounds=2, steps_per_round=40, eval_every=10)
    return config
"""
# What has just come to be when the kill comes.
BOUNDARIES = (
    "config.json",
    "checkpoints/baseline/10",
    "checkpoints/baseline/60",
    "predictions/baseline/phantom_044.nii.gz",
    "results.json",
    "pseudo_labels/round_1/labels.npy",
    "pseudo_labels/round_1/report.json",
    "checkpoints/round_1/40",
    "pseudo_labels/round_2/phantom_011.nii.gz",
    "checkpoints/round_2/20",
)
NUM_RANDOM = 20

pytestmark = pytest.mark.slow


class Program:
    """`python -m lclseg.main` on the small config."""

    def __init__(self, folder):
        self.config = folder / "small.py"
        text = CONFIG.format(
            phantom=str(ROOT / "configs" / "phantom.py"), data_dir=str(folder / "data")
        )
        self.config.write_text(text)

    def start(self, workdir):
        command = [sys.executable, "-m", "lclseg.main", f"--config={self.config}"]
        return subprocess.Popen(
            [*command, f"--workdir={workdir}"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, workdir):
        process = self.start(workdir)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return Program(tmp_path_factory.mktemp("kill"))


@pytest.fixture(scope="module")
def undisturbed(program, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    program.finish(workdir)
    return end_of(workdir)


def end_of(workdir):
    """What a run leaves, times aside, as text."""
    results = json.loads((workdir / "results.json").read_text())
    for stage in results["results"].values():
        del stage["seconds"]
    logs = (workdir / "metrics.jsonl").read_text()
    reports = [p.read_text() for p in sorted((workdir / "pseudo_labels").glob("*/report.json"))]
    return [json.dumps(results, sort_keys=True), logs, *reports]


@pytest.mark.parametrize("path", BOUNDARIES)
def test_killed_at_a_boundary(program, undisturbed, tmp_path, path):
    workdir = tmp_path / "run"
    process = program.start(workdir)
    while not (workdir / path).exists():
        assert process.poll() is None, f"ended before {path} came to be: {process.stdout.read()}"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    program.finish(workdir)
    assert end_of(workdir) == undisturbed


def test_killed_at_random_moments(program, undisturbed, tmp_path):
    """Run after run, each killed until it has finished, `NUM_RANDOM` kills in all."""
    rng = random.Random(0)
    kills = runs = 0
    while kills < NUM_RANDOM:
        runs += 1
        workdir = tmp_path / f"run{runs}"
        while kills < NUM_RANDOM:
            process = program.start(workdir)
            try:
                output, _ = process.communicate(timeout=rng.uniform(3, 25))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                kills += 1
            else:
                assert process.returncode == 0, output
                break
        program.finish(workdir)
        assert end_of(workdir) == undisturbed
    print(f"{kills} kills over {runs} runs")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop(program, undisturbed, tmp_path, number):
    """Exit code 0, and a line that tells how to go on."""
    workdir = tmp_path / "run"
    process = program.start(workdir)
    while not (workdir / "checkpoints" / "baseline" / "10").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "stopped in baseline after step" in output
    assert "the same command goes on from there" in output
    program.finish(workdir)
    assert end_of(workdir) == undisturbed
