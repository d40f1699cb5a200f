"""What the disk may do to a run: one line that names the folder, status 1, nothing finished lost.

Slow (minutes): ./run.sh test tests/test_faults.py --slow
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from small_run import ROOT, SHORT, STAGES, Program, end_of, newest_state, without_times

SIZES_KB = (20, 250, 500, 700, 900, 1100, 1300, 1600, 1900, 2200, 3000, 64000)
# Runs "$@" on a disk that is full, larger, and larger again, until it ends well.
ON_A_SMALL_DISK = """
disk=$1; log=$2; sizes=$3; shift 3
mount -t tmpfs -o size=4k tmpfs "$disk" || exit 99
for size in $sizes; do
  mount -o remount,size=${size}k "$disk"
  "$@" >"$log.$size" 2>&1
  status=$?
  echo "$size $status"
  [ $status -eq 0 ] && cp -r "$disk/run" "$log.run" && exit 0
  cp "$disk/run/results.json" "$log.$size.json" 2>/dev/null
done
exit 1
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return Program(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def undisturbed(program, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    program.finish(workdir, *SHORT)
    return workdir


def failed(process, *words):
    """Output of a process that ended with one line of ours, and no traceback."""
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    assert "Traceback" not in output, output
    lines = [line for line in output.splitlines() if line.startswith("lclseg: ")]
    assert len(lines) == 1 and all(w in lines[0] for w in words), output
    return output


def test_same_seed_same_bits(program, undisturbed, tmp_path):
    """Two runs through main, each in a process with its own hash seed: files and weights agree."""
    program.finish(tmp_path / "run", *SHORT, env={"PYTHONHASHSEED": "7"})
    assert end_of(tmp_path / "run") == end_of(undisturbed)
    for stage in STAGES:
        for a, b in zip(
            newest_state(tmp_path / "run", stage), newest_state(undisturbed, stage), strict=True
        ):
            np.testing.assert_array_equal(a, b)


def test_full_disk(program, undisturbed, tmp_path):
    """The disk fills up at one place after the other; the run goes on each time there is more."""
    disk = tmp_path / "disk"
    disk.mkdir()
    log = tmp_path / "log"
    script = [
        *("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", ON_A_SMALL_DISK, "sh"),
        *(str(disk), str(log), " ".join(map(str, SIZES_KB))),
    ]
    command = program.command(disk / "run", *SHORT)
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare to mount a small disk with")
    ended = subprocess.run(
        [*script, *command], cwd=ROOT, capture_output=True, text=True, timeout=560
    )
    if ended.returncode in (1, 99) and not ended.stdout:
        pytest.skip(f"may not mount a disk here: {ended.stderr}")
    statuses = [line.split() for line in ended.stdout.splitlines()]
    print(ended.stdout)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert len(statuses) > 4 and {s for _, s in statuses[:-1]} == {"1"}
    for size, _ in statuses[:-1]:
        output = (tmp_path / f"log.{size}").read_text()
        assert "Traceback" not in output, output
        line = output.splitlines()[-1]
        print(line.split(". The run")[0].replace(str(disk), ""))
        assert line.startswith("lclseg: No space left on device: ") and str(disk) in line
    assert end_of(tmp_path / "log.run") == end_of(undisturbed)
    # What was finished was not done again: its seconds are still there.
    final = json.loads((tmp_path / "log.run" / "results.json").read_text())["results"]
    found = [json.loads(p.read_text())["results"] for p in tmp_path.glob("log.*.json")]
    assert found
    for results in found:
        assert results == {stage: final[stage] for stage in results}


def test_workdir_that_may_not_be_written(program, tmp_path):
    (tmp_path / "file").write_text("")
    failed(program.start(tmp_path / "file" / "run"), "Not a directory", str(tmp_path / "file"))


@pytest.fixture
def bound_by_permissions():
    """Command prefix; where the tests run as root, it takes away what lets root write anywhere."""
    if os.geteuid() != 0:
        return ()
    if shutil.which("setpriv") is None:
        pytest.skip("the tests run as root, and there is no setpriv to do without its rights")
    return ("setpriv", "--bounding-set", "-dac_override,-dac_read_search")


def test_workdir_without_permission(program, bound_by_permissions, tmp_path):
    folder = tmp_path / "closed"
    folder.mkdir()
    folder.chmod(0o555)
    process = program.start(folder / "run", prefix=bound_by_permissions)
    failed(process, "Permission denied", str(folder))
    assert not list(folder.iterdir())


def test_prepared_set_may_be_read_only(program, undisturbed, bound_by_permissions, tmp_path):
    data_dir = tmp_path / "data"
    shutil.copytree(program.data_dir, data_dir)
    before = [data_dir, *sorted(data_dir.rglob("*"))]
    for path in before:
        path.chmod(0o555 if path.is_dir() else 0o444)
    options = (*SHORT, f"--config.data.data_dir={data_dir}")
    program.finish(tmp_path / "run", *options, prefix=bound_by_permissions)
    assert [data_dir, *sorted(data_dir.rglob("*"))] == before
    assert without_times(tmp_path / "run") == without_times(undisturbed)
    for path in before:  # so that pytest can remove them
        path.chmod(0o755)


def test_workdir_removed_under_way(program, tmp_path):
    workdir = tmp_path / "run"
    process = program.start(workdir, "--config.rounds.baseline_steps=100000")
    while not (workdir / "checkpoints" / "baseline" / "10").exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    workdir.rename(tmp_path / "elsewhere")
    failed(process, str(workdir))
    assert json.loads((tmp_path / "elsewhere" / "config.json").read_text())


def test_remote_workdir_is_refused(program, tmp_path):
    failed(program.start("gs://bucket/run"), "gs://bucket/run; wanted a folder")


def test_a_sweep_asked_to_stop_goes_on(program, tmp_path):
    """SIGTERM in the first run: exit status 0, no result yet; started again, the table is made."""
    text = (
        f"CONFIG = {str(program.config)!r}\nPAIRS = (('c1', 0),)\n"
        "BASE = {'rounds.baseline_steps': 40, 'rounds.num_rounds': 0, 'log.every': 2}\n"
        "ROWS = {'plain': {}}\n"
    )
    (tmp_path / "sweep.py").write_text(text)
    options = [f"--{n}={tmp_path / n}" for n in ("workdir", "results")]
    options += [f"--sweep={tmp_path / 'sweep.py'}", f"--data_dir={program.data_dir}"]
    command = [sys.executable, "-m", "lclseg.sweep", *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
    process = subprocess.Popen(command, **pipes)
    workdir = tmp_path / "workdir" / "plain" / "c1_seed0"
    newest = workdir / "checkpoints" / "baseline" / "10"
    while not newest.exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    log = workdir.with_suffix(".log")
    assert process.returncode == 0, output
    assert "plain/c1_seed0: stopped, see" in output and "same command" in output
    assert "failed" not in output
    assert "stopped in baseline after step" in log.read_text()
    assert not list((tmp_path / "results").rglob("*.json"))
    ended = subprocess.run(command, **pipes, timeout=120)
    assert ended.returncode == 0, ended.stdout
    assert (tmp_path / "results" / "plain" / "c1_seed0.json").exists()
    assert "going on from step" in log.read_text()
