"""A workdir has one writer at a time, and is free as soon as that one has ended, however."""

import importlib.metadata
import os
import platform
import runpy
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

import lclseg
from lclseg.data.splits import Split
from lclseg.errors import ConfigError
from lclseg.page.recorded import read_run
from lclseg.run import workdir as workdirs
from lclseg.run.workdir import WorkdirError, chosen_stage, claim_workdir, lock

ROOT = Path(__file__).parents[1]
HOLD = """
import sys, time
from pathlib import Path
from lclseg.run.workdir import lock
held = lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has the lock on tmp_path."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def config():
    return runpy.run_path(str(ROOT / "configs" / "phantom.py"))["get_config"]("local_contrastive")


def test_a_checkout_need_not_be_installed(monkeypatch):
    def version(package):
        if package == "lclseg":
            raise importlib.metadata.PackageNotFoundError(package)
        return f"{package}'s"

    monkeypatch.setattr(importlib.metadata, "version", version)
    prepared = types.SimpleNamespace(
        name="n", description="d", class_names=(), image_size=8, target_spacing_mm=1.0
    )
    split = Split(labeled=(), unlabeled=(), validation=(), test=())
    versions = workdirs.new_results(config(), prepared, split)["versions"]
    assert versions["lclseg"] == lclseg.__version__ and versions["jax"] == "jax's"


def test_a_second_writer_is_told_who_the_first_is(holder, tmp_path):
    with pytest.raises(WorkdirError) as caught:
        claim_workdir(config(), tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message and "another --workdir" in message
    assert f"process {holder.pid} on {platform.node()}" in message
    assert not (tmp_path / "config.json").exists()


def test_a_killed_writer_leaves_the_folder_free_at_once(holder, tmp_path):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with lock(tmp_path):
        assert (tmp_path / "lock").read_text() == f"process {os.getpid()} on {platform.node()}\n"


def test_a_run_that_has_ended_leaves_the_folder_free(tmp_path):
    with lock(tmp_path), pytest.raises(WorkdirError):
        lock(tmp_path)
    lock(tmp_path).close()


def test_what_a_live_run_has_written_can_be_read(holder, tmp_path):
    (tmp_path / "config.json").write_text(config().to_json_best_effort())
    assert read_run(tmp_path, "x").title.startswith("phantom")


def test_refused_for_its_config_a_run_holds_nothing(tmp_path):
    claim_workdir(config(), tmp_path).close()
    other = config()
    other.seed = 3
    with pytest.raises(ConfigError, match="other values of seed") as caught:
        claim_workdir(other, tmp_path)
    claim_workdir(config(), tmp_path).close()
    assert caught.tb  # which would keep a file open that nobody closed


def test_a_disk_without_locks_is_told_of_and_used(tmp_path, monkeypatch, caplog):
    def flock(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(workdirs.fcntl, "flock", flock)
    lock(tmp_path).close()
    assert "does not lock files (Operation not supported)" in caplog.text


def test_the_stage_that_a_run_hands_out():
    def stages(**dice):
        return {name: {"best_validation_dice": d} for name, d in dice.items()}

    assert chosen_stage(stages(baseline=0.5, round_1=0.7, round_2=0.7)) == "round_1"
    assert chosen_stage(stages(baseline=None, round_1=None)) == "round_1"
