"""A small run killed without notice, again and again, ends as if nothing had happened.

Slow (minutes): ./run.sh test tests/test_kill.py --slow
"""

import random
import signal
import subprocess
import time

import pytest
from small_run import Program, end_of

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


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return Program(tmp_path_factory.mktemp("kill"))


@pytest.fixture(scope="module")
def undisturbed(program, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    program.finish(workdir)
    return end_of(workdir)


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
