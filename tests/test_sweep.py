"""Sweeps: which runs they hold, what is run again, and the table, worked by hand."""

import functools
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from small_run import Program, end_of, newest_state
from sweep_results import fake_result

from lclseg import sweep as sweeps
from lclseg import train
from lclseg.cores import usable_cores
from lclseg.errors import NonFiniteLossError
from lclseg.run import side_by_side
from lclseg.run.stored_config import differing_keys, to_store
from lclseg.sweep_table import markdown

ROOT = Path(__file__).parents[1]
SWEEP = """
CONFIG = "phantom.py"
PAIRS = (("c1", 0), ("c2", 7))
BASE = {"log.every": 5}
ROWS = {
    "supervised": {"method": "supervised"},
    "inter, 3 anchors": {"method": "local_contrastive", "method.pixels_per_class": 3},
    "every pixel": {"method": "local_contrastive", "method.contrastive_weight": 1.0},
    "other batch": {"data.labeled_batch_size": 4},
}
"""


@pytest.fixture
def sweep(tmp_path):
    shutil.copytree(ROOT / "configs", tmp_path, dirs_exist_ok=True)
    (tmp_path / "sweep.py").write_text(SWEEP)
    return sweeps.load_sweep(tmp_path / "sweep.py")


def test_experiments_are_rows_times_pairs(sweep):
    found = list(sweeps.experiments(sweep))
    assert [(e.split, e.seed) for e in found] == [("c1", 0)] * 4 + [("c2", 7)] * 4
    assert [e.row for e in found[:4]] == list(sweep.rows)
    assert all((e.config.data.split, e.config.seed) == (e.split, e.seed) for e in found)
    supervised, plain, every, other = found[4:]
    names = [e.config.method.name for e in (supervised, plain, every, other)]
    assert names == ["supervised", "local_contrastive", "local_contrastive", "self_training"]
    assert plain.config.method.pixels_per_class == 3
    assert plain.config.rounds == sweep.config.rounds  # a row leaves no trace in the next one
    assert (every.config.method.pixels_per_class, every.config.method.contrastive_weight) == (
        0,
        1.0,
    )
    assert plain.config.log.every == every.config.log.every == 5
    assert str(plain.path) == "inter_3_anchors/c2_seed7"


def test_an_unknown_key_in_a_row_is_refused(sweep):
    with pytest.raises(sweeps.SweepError, match="contrastive_wait"):
        list(sweeps.experiments(sweep._replace(rows={"a": {"method.contrastive_wait": 1.0}})))


def test_a_sweep_file_that_is_none(tmp_path):
    with pytest.raises(sweeps.SweepError, match="no file"):
        sweeps.load_sweep(tmp_path / "sweep.py")
    (tmp_path / "sweep.py").write_text("CONFIG = 'phantom.py'; ROWS = {}")
    with pytest.raises(sweeps.SweepError, match="does not define PAIRS, BASE"):
        sweeps.load_sweep(tmp_path / "sweep.py")


@pytest.fixture
def trained(monkeypatch):
    """Replaces training; lists (row and pair, taken-over baseline) of what was run."""
    runs = []

    def train_and_evaluate(config, workdir, stop_asked):
        source = config.rounds.baseline_from
        runs.append((f"{workdir.parent.name}/{workdir.name}", source and Path(source).parent.name))
        workdir.mkdir(parents=True)
        (workdir / "config.json").write_text(config.to_json_best_effort())
        (workdir / "results.json").write_text('{"chosen": "round_1"}')
        return fake_result(0.5, 0.6)

    monkeypatch.setattr(train, "train_and_evaluate", train_and_evaluate)
    return runs


def test_a_sweep_shares_baselines_and_skips_what_is_finished(sweep, trained, tmp_path):
    workdir, folder = tmp_path / "runs", tmp_path / "results"
    sweeps.run_missing(sweep, workdir, folder)
    one_pair = [
        ("supervised", ""),  # other steps: a baseline of its own
        ("inter_3_anchors", ""),
        ("every_pixel", "inter_3_anchors"),
        ("other_batch", ""),  # other batches: likewise
    ]
    expected = [(f"{row}/{pair}", b) for pair in ("c1_seed0", "c2_seed7") for row, b in one_pair]
    assert trained == expected
    assert (folder / "README.md").read_text().count("| every pixel") == 5  # in four tables

    trained.clear()
    sweeps.run_missing(sweep, workdir, folder)
    assert trained == []
    (folder / "every_pixel" / "c2_seed7.json").unlink()
    more = sweep._replace(pairs=(*sweep.pairs, ("c3", 1)), rows={**sweep.rows, "copy": {}})
    for path in sorted((workdir / "every_pixel" / "c2_seed7").iterdir()):
        path.unlink()
    (workdir / "every_pixel" / "c2_seed7").rmdir()
    sweeps.run_missing(more, workdir, folder)
    assert ("copy/c1_seed0", "inter_3_anchors") in trained
    assert ("every_pixel/c2_seed7", "inter_3_anchors") in trained
    assert ("every_pixel/c3_seed1", "inter_3_anchors") in trained
    assert len(trained) == 1 + 2 + 5


def test_one_after_the_other_a_run_that_fails_does_not_end_the_others(
    sweep, trained, tmp_path, monkeypatch
):
    train_and_evaluate = train.train_and_evaluate

    def failing(config, workdir, stop_asked):
        if workdir.name == "c1_seed0" and workdir.parent.name == "every_pixel":
            raise NonFiniteLossError("step 3")
        return train_and_evaluate(config, workdir, stop_asked)

    monkeypatch.setattr(train, "train_and_evaluate", failing)
    workdir, folder = tmp_path / "runs", tmp_path / "results"
    assert sweeps.run_missing(sweep, workdir, folder) == ["every_pixel/c1_seed0: step 3"]
    assert len(trained) == 7
    monkeypatch.setattr(train, "train_and_evaluate", train_and_evaluate)
    assert sweeps.run_missing(sweep, workdir, folder) == []
    assert trained[7:] == [("every_pixel/c1_seed0", "inter_3_anchors")]


WORKER = """
import pathlib, shutil, sys
result, target, failing = map(pathlib.Path, sys.argv[1:])
if failing.exists():
    sys.exit(4)
target.parent.mkdir(parents=True, exist_ok=True)
shutil.copy(result, target)
"""


def test_side_by_side_a_run_that_fails_does_not_end_the_others(sweep, tmp_path, monkeypatch):
    """What is finished is not begun again; processes here write a result that is ready."""
    workdir, folder = tmp_path / "runs", tmp_path / "results"
    failing, begun = tmp_path / "failing", []
    failing.touch()
    for experiment in sweeps.experiments(sweep):
        ready = tmp_path / "ready" / experiment.path.with_suffix(".json")
        ready.parent.mkdir(parents=True, exist_ok=True)
        config = sweeps.of_result(sweeps.to_store(experiment.config))
        ready.write_text(json.dumps({"config": config, **fake_result(0.5, 0.6)}))

    def job(name, log, *flags, after=()):
        begun.append(name)
        command = [sys.executable, "-c", ""]
        if name != sweeps.PREPARE:
            file = f"{name}.json"
            fails = failing if name == "every_pixel/c1_seed0" else tmp_path / "nothing"
            paths = (tmp_path / "ready" / file, folder / file, fails)
            command = [sys.executable, "-c", WORKER, *map(str, paths)]
        return side_by_side.Job(name, command, log, after)

    monkeypatch.setattr(sweeps, "_job", job)
    run = functools.partial(
        sweeps.run_side_by_side, sweep, workdir, folder, platform="gpu", num_devices=2
    )
    (line,) = run()
    assert line == f"every_pixel/c1_seed0: see {workdir / 'every_pixel/c1_seed0.log'}"
    assert len(begun) == 9 and len(sweeps.read_results(folder, sweep)) == 7
    assert "| every pixel | 1 |" in (folder / "README.md").read_text()
    failing.unlink()
    begun.clear()
    assert run() == []
    assert begun == [sweeps.PREPARE, "every_pixel/c1_seed0"]
    assert "| every pixel | 2 |" in (folder / "README.md").read_text()
    begun.clear()
    assert run() == [] and begun == [sweeps.PREPARE]  # which is not run


REAL = """
CONFIG = {config!r}
PAIRS = (("c1", 0),)
BASE = {{
    "rounds.baseline_steps": 6,
    "rounds.num_rounds": 1,
    "rounds.steps_per_round": 4,
    "rounds.eval_every": 2,
    "log.every": 2,
    "num_cpu_devices": 0,
}}
ROWS = {{
    "plain": {{}},
    "slower": {{"optimizer.learning_rate": 1e-4}},
    "broken": {{"optimizer.learning_rate": 1e30}},
}}
"""


@pytest.mark.slow
@pytest.mark.skipif(usable_cores() < 2, reason="one core is one device")
def test_a_sweep_on_two_devices_gives_what_each_run_gives_alone(tmp_path):
    """To the bit, though it was stopped on the way; and one of its runs fails."""
    program = Program(tmp_path)
    cores = sorted(os.sched_getaffinity(0))[:2]
    (tmp_path / "sweep.py").write_text(REAL.format(config=str(program.config)))
    options = {"sweep": "sweep.py", "workdir": "runs", "results": "results"}
    command = [sys.executable, "-m", "lclseg.sweep"]
    command += [f"--{name}={tmp_path / value}" for name, value in options.items()]

    def start(command, cores):
        return subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )

    log = tmp_path / "runs" / "plain" / "c1_seed0" / "metrics.jsonl"
    process = start(command, cores)
    while not log.exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "goes on from there" in output, output
    assert not (tmp_path / "results" / "plain").exists()
    process = start(command, cores)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 1 and "1 runs failed:\n  broken/c1_seed0: see" in output, output
    assert "2 at a time, one cpu each" in output
    for row in ("plain", "slower"):
        alone, own = tmp_path / "alone" / row, tmp_path / "runs" / row / "c1_seed0"
        values = {
            "data.split": "c1",
            "seed": 0,
            **runpy.run_path(str(tmp_path / "sweep.py"))["BASE"],
        }
        values |= runpy.run_path(str(tmp_path / "sweep.py"))["ROWS"][row]
        flags = [f"--config.{key}={value}" for key, value in values.items()]
        process = start(program.command(alone, *flags), cores[:1])
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        assert end_of(own) == end_of(alone)
        for ours, theirs in zip(
            newest_state(own, "round_1"), newest_state(alone, "round_1"), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)
        stored = json.loads((tmp_path / "results" / row / "c1_seed0.json").read_text())
        assert (
            stored["results"]["round_1"]["test"]
            == json.loads((alone / "results.json").read_text())["results"]["round_1"]["test"]
        )


def test_a_result_holds_no_path_of_the_machine(sweep, trained, tmp_path):
    sweep.config.data.manual_dir = "/somewhere/private"
    sweeps.run_missing(sweep, tmp_path / "runs", tmp_path / "results")
    for path in (tmp_path / "results").rglob("*.json"):
        text = path.read_text()
        assert "private" not in text and str(tmp_path) not in text
        assert json.loads(text)["config"]["data"]["name"] == "phantom"


def test_results_of_another_config_are_refused(sweep, trained, tmp_path):
    folder = tmp_path / "results"
    sweeps.run_missing(sweep, tmp_path / "runs", folder)
    other = {"method": "local_contrastive", "method.temperature": 0.5}
    changed = sweep._replace(rows={**sweep.rows, "every pixel": other})
    with pytest.raises(sweeps.SweepError, match=r"every_pixel/c1.* method\.contrast"):
        sweeps.read_results(folder, changed)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "sweeps").glob("*.py")), ids=str)
def test_sweeps_of_the_repository(path):
    """Each row can be run, and trains for as many steps as every other."""
    from lclseg.run.config_checks import check_config

    sweep = sweeps.load_sweep(path)
    assert len(set(sweep.pairs)) == len(sweep.pairs) >= 3
    steps = set()
    for experiment in sweeps.experiments(sweep):
        check_config(experiment.config, num_devices=2)
        rounds = experiment.config.rounds
        steps.add(rounds.baseline_steps + rounds.num_rounds * rounds.steps_per_round)
        runpy.run_path(str(path.parent / runpy.run_path(str(path))["CONFIG"]))
    assert len(steps) == 1


@pytest.mark.parametrize(
    ("name", "row", "method"),
    [
        ("acdc", "recipe", "self_training"),
        ("acdc", "supervised, by the recipe's rules", "supervised"),
        ("acdc", "local contrastive, by the recipe's rules", "local_contrastive"),
        ("hippocampus", "recipe", "self_training"),
        ("hippocampus_2", "recipe", "self_training"),
    ],
)
def test_rows_of_the_recipe_are_the_config(name, row, method):
    """But for the volumes, and numbers of a kernel that has no weight."""
    path = ROOT / "configs" / "sweeps" / f"{name}.py"
    sweep = sweeps.load_sweep(path)
    of_row = next(e.config for e in sweeps.experiments(sweep) if e.row == row)
    get_config = runpy.run_path(str(path.parent / runpy.run_path(str(path))["CONFIG"]))[
        "get_config"
    ]
    differing = differing_keys(to_store(get_config(method)), to_store(of_row))
    assert [key for key in differing if not key.startswith("data.")] == []


def test_gains_over_another_row_are_printed_and_not_stored(tmp_path):
    command = [sys.executable, "-m", "lclseg.sweep", "--sweep=configs/sweeps/acdc_2.py"]
    stored = ROOT / "results" / "acdc_2"
    shutil.copytree(stored, tmp_path / "results")
    command += [f"--results={tmp_path / 'results'}", f"--workdir={tmp_path}", "--table_only"]
    command.append("--gain_over=recipe, without CRF")
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0 and "gain over recipe, without CRF" in ended.stdout
    assert (tmp_path / "results" / "README.md").read_text() == (stored / "README.md").read_text()
    command[-1] = "--gain_over=superb"
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode != 0 and "no row 'superb'; it has supervised," in ended.stderr


def test_tables_are_written_though_nobody_reads_what_is_printed(tmp_path):
    """As where the command prints to `head`."""
    stored = ROOT / "results" / "acdc_2"
    shutil.copytree(stored, tmp_path / "results")
    (tmp_path / "results" / "README.md").unlink()
    command = [sys.executable, "-m", "lclseg.sweep", "--sweep=configs/sweeps/acdc_2.py"]
    command += [f"--results={tmp_path / 'results'}", f"--workdir={tmp_path}", "--table_only"]
    read, write = os.pipe()
    os.close(read)
    subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.DEVNULL, timeout=120)
    os.close(write)
    assert (tmp_path / "results" / "README.md").read_text() == (stored / "README.md").read_text()


# Of these docs/results.md has the table by pair, too.
SHOWN_BY_PAIR = ("acdc", "acdc_2", "acdc_long", "hippocampus", "hippocampus_2")
STORED = sorted(path.name for path in (ROOT / "results").iterdir())


@pytest.mark.parametrize("name", STORED)
def test_tables_of_the_repository_are_made_from_its_runs(name):
    """The runs are those of the sweep as it is; a page of docs/ shows their tables."""
    sweep = sweeps.load_sweep(ROOT / "configs" / "sweeps" / f"{name}.py")
    folder = ROOT / "results" / name
    results = sweeps.read_results(folder, sweep)
    assert len(results) == len(list(folder.glob("*/*.json"))) > 0
    table = markdown(sweep.rows, sweep.pairs, results, sweep.reference)
    assert (folder / "README.md").read_text() == table + "\n"
    page = "recipe.md" if name.startswith("recipe") else "results.md"
    means, by_pair, *_ = table.split("\n\n")
    text = (ROOT / "docs" / page).read_text()
    assert means in text
    assert by_pair in text or name not in SHOWN_BY_PAIR
