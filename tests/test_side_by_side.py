"""Commands side by side, one a device."""

import sys

from lclseg.run import side_by_side
from lclseg.run.side_by_side import Job, run_side_by_side


def python(text):
    return [sys.executable, "-c", text]


def test_two_at_a_time_each_on_a_device_of_its_own(tmp_path):
    """Each job waits until another one has begun, which only a job beside it can do."""
    text = """
import pathlib, sys, time
here = pathlib.Path(sys.argv[1])
here.touch()
for _ in range(600):
    if pathlib.Path(sys.argv[2]).exists():
        break
    time.sleep(0.05)
else:
    sys.exit(3)
"""
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    jobs = [
        Job("a", [*python(text), a, b], tmp_path / "a.log"),
        Job("b", [*python(text), b, a], tmp_path / "b.log"),
    ]
    assert run_side_by_side(jobs, platform="gpu", num_devices=2) == {"a": 0, "b": 0}


def test_never_more_than_there_are_devices(tmp_path):
    text = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    jobs = [Job(str(i), python(text), tmp_path / f"{i}.log") for i in range(3)]
    order = []
    run_side_by_side(
        jobs, platform="gpu", num_devices=1, ended=lambda name, status: order.append(name)
    )
    assert order == ["0", "1", "2"]
    assert {(tmp_path / f"{i}.log").read_text() for i in range(3)} == {"0\n"}


def test_visible_devices_of_the_parent_are_kept(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert side_by_side.environment("gpu", 1) == {"CUDA_VISIBLE_DEVICES": "6"}


def test_a_failure_does_not_end_the_others_and_those_after_it_still_run(tmp_path):
    jobs = [
        Job("bad", python("import sys; print('why'); sys.exit(4)"), tmp_path / "bad.log"),
        Job("next", python(""), tmp_path / "next.log", after=["bad"]),
        Job("good", python(""), tmp_path / "good.log"),
    ]
    status = run_side_by_side(jobs, platform="gpu", num_devices=2)
    assert status == {"bad": 4, "next": 0, "good": 0}
    assert (tmp_path / "bad.log").read_text() == "why\n"


def test_a_stop_reaches_what_runs_and_begins_nothing(tmp_path):
    text = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
print("ready", flush=True)
time.sleep(60)
"""
    jobs = [Job(n, python(text), tmp_path / f"{n}.log") for n in ("first", "second")]
    log = tmp_path / "first.log"
    status = run_side_by_side(
        jobs,
        platform="gpu",
        num_devices=1,
        stop_asked=lambda: log.exists() and "ready" in log.read_text(),
    )
    assert status == {"first": 7}
    assert not (tmp_path / "second.log").exists()
