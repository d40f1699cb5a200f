import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(p.stem for p in (ROOT / "benchmarks").glob("*.py") if p.stem != "__init__")


@pytest.mark.parametrize("name", MODULES)
def test_every_benchmark_can_be_imported(name):
    if name == "torch_peer":
        pytest.importorskip("torch")
    importlib.import_module(f"benchmarks.{name}")


def run(*arguments):
    command = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_floor_counts_more_work_for_more_pixels(tmp_path):
    run("benchmarks.floor", "--sizes", 32, 64, "--json", tmp_path / "floor.json")
    rows = json.loads((tmp_path / "floor.json").read_text())["rows"]
    flops = {row["px"]: row["Gflop"] for row in rows}
    # Convolutions are all that multiplies much, and their work goes with the pixels.
    assert flops[64] / flops[32] == pytest.approx(4, rel=0.02)


@pytest.mark.slow
def test_the_accelerator_benchmark_runs_and_agrees_with_the_golden_values(tmp_path):
    path = tmp_path / "lines.jsonl"
    printed = run("benchmarks.accelerator", "--tiny", "--json", path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(printed.splitlines()) == len(lines)
    assert not [line for line in lines if "error" in line or "left out" in line]
    assert {line["part"] for line in lines} == {
        *("device", "golden loss", "step", "scan", "seeds", "CRF", "prediction")
    }
    for line in lines:
        if line["part"] == "golden loss":
            assert line["loss, relative"] < 1e-5 and line["gradient, of the largest"] < 1e-5
