import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from sweep_results import fake_result

from benchmarks import accelerator, grid_limit, test_time

ROOT = Path(__file__).parents[1]
MODULES = sorted(p.stem for p in (ROOT / "benchmarks").glob("*.py") if p.stem != "__init__")


@pytest.mark.parametrize("name", MODULES)
def test_every_benchmark_can_be_imported(name):
    if name == "torch_peer":
        pytest.importorskip("torch")
    importlib.import_module(f"benchmarks.{name}")


def run(*arguments, timeout=300):
    command = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_floor_counts_more_work_for_more_pixels(tmp_path):
    run("benchmarks.floor", "--sizes", 32, 64, "--json", tmp_path / "floor.json")
    rows = json.loads((tmp_path / "floor.json").read_text())["rows"]
    flops = {row["px"]: row["Gflop"] for row in rows}
    # Convolutions are all that multiplies much, and their work goes with the pixels.
    assert flops[64] / flops[32] == pytest.approx(4, rel=0.02)


def test_a_grid_costs_what_its_pixels_are_too_coarse_for():
    label = np.zeros((6, 6, 1), np.uint8)
    label[2:4, 2:4] = 1

    def dice(image_size, target_spacing_mm):
        return grid_limit.round_trip_dice(
            label, (1.0, 1.0, 5.0), image_size=image_size, target_spacing_mm=target_spacing_mm
        )

    assert dice(6, 1.0) == 1.0
    # Of 2 x 2 pixels the grid holds two rows and columns, the middle and the one before it.
    assert dice(2, 1.0) == 1.0
    label[2:4, 0:2] = 1  # 2 x 4 pixels, of which the same grid holds 2 x 2: 2 x 4 / (4 + 8)
    assert dice(2, 1.0) == pytest.approx(2 / 3)
    # Pixels of 2 mm lie over rows and columns 1, 3 and 5; a tie between two goes to the background.
    # So of the 2 x 2 pixels 2..3 the one at 3, 3 comes back.
    label[:] = 0
    label[2:4, 2:4] = 1
    assert dice(3, 2.0) == pytest.approx(2 * 1 / (1 + 4))


def test_chosen_weights_are_compared_with_the_last_over_all_sweeps(tmp_path):
    # Of the first stage, which is chosen, the fake has 0.05 less, of the last weights 0.02 more.
    sweeps = {"one": (0.70, 0.74), "two": (0.80, 0.68), "three": (0.755, 0.68)}
    for sweep, dices in sweeps.items():
        path = tmp_path / sweep / "row" / "c1_seed0.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(fake_result(*dices, chosen="baseline")))
    # -0.11, 0.05 and 0.005: their standard deviation is 0.0825, and that over the root of 3 is
    # the error.
    assert run("benchmarks.chosen_or_last", "--results", tmp_path) == (
        "3 runs: the chosen weights have -0.0183, standard error 0.0476; "
        "more than 0.01 better in 1, more than 0.01 worse in 1\n"
    )


def test_a_row_gains_over_one_of_another_sweep_pair_by_pair(tmp_path):
    def write(row, split, dice, *, tested=("v1", "v2"), **more):
        path = tmp_path / row / f"{split}_seed0.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        result = fake_result(0.5, dice, **more) | {"volumes": {"test": tested}}
        path.write_text(json.dumps(result))

    # Last weights: 0.1, 0.2 and 0.3 more with every component. With the largest one alone c2 gains
    # 0.04 less. The chosen ones have 0.05 less than the last, and of c10 are the first stage's.
    for split, dice in (("c1", 0.7), ("c2", 0.8), ("c10", 0.9)):
        write("long/one", split, dice, chosen="baseline" if split == "c10" else "round_1")
        component = 0.06 if split == "c2" else 0.02
        write("short/other", split, 0.6, chosen="round_1", component=component)
    write("short/other", "c3", 0.6)  # long/one has none
    write("short/strangers", "c1", 0.6, tested=("v1", "v3"))

    def printed(*arguments):
        return run("benchmarks.paired_gain", *arguments)

    one, other = tmp_path / "long/one", tmp_path / "short/other"
    # 0.1, 0.2 and 0.3 have a standard deviation of 0.1; t of two degrees of freedom is 4.303, and
    # 4.303 x 0.1 / sqrt(3) = 0.248. The others likewise.
    assert printed(one, other).splitlines() == [
        f"| gain over {other} | c1 | c2 | c10 | mean | every component counted | chosen |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        f"| {one} | +0.100 | +0.160 | +0.300 | +0.187 ± 0.255 | +0.200 ± 0.248 | +0.067 ± 0.379 |",
    ]
    assert "| +0.300 | +0.300 | +0.300 | -0.100 |" in printed(one, other, "--splits", "c10")
    for arguments, message in (
        ((one, other, "--splits", "c1", "c3"), "one holds no run of c3; it has c1, c10, c2"),
        ((one, tmp_path / "short"), "short holds no run; it has none"),
        ((one, tmp_path / "short/strangers"), "c1, seed 0: the rows have tested other volumes"),
    ):
        with pytest.raises(AssertionError, match=message):
            printed(*arguments)


def test_a_folder_is_measured_whatever_its_label_values(tmp_path):
    def save(name, data):
        nib.save(nib.Nifti1Image(data, np.diag([1.0, 1, 5, 1])), tmp_path / name)

    rng = np.random.default_rng(0)
    label = np.zeros((6, 6, 1), np.int16)
    label[2:4, 2:4] = 7  # comes back from pixels of 1 mm alone; see above
    label[0, 0] = 300  # lies at the edge, which neither row nor column 1, 3 or 5 touches
    for case in "abc":
        save(f"{case}.nii.gz", rng.normal(size=label.shape).astype(np.float32))
    save("a_gt.nii.gz", label)
    save("b_gt.nii.gz", np.zeros_like(label))  # shows nothing; c has no mask
    fine, coarse = grid_limit.measure(tmp_path, [(6, 1.0), (3, 2.0)])
    assert (fine["masks"], fine["mean Dice"], fine["least"]) == (1, 1.0, 1.0)
    assert coarse["mean Dice"] == pytest.approx((2 / 5 + 0) / 2)


@pytest.mark.parametrize("text", ["96", "x2", "96x", "0x1", "96x-1", "96xnan"])
def test_a_grid_is_pixels_and_millimetres(text):
    assert grid_limit.grid_of("96x2.5") == (96, 2.5)
    with pytest.raises(argparse.ArgumentTypeError, match=f"found '{text}'; wanted px x mm"):
        grid_limit.grid_of(text)


# What a benchmark that times peers is given, for as little work as it can do.
SMALL = {
    "contrastive_loss": ("--size", 32, "--pairs", 2),
    "dense_crf": ("--size", 32, "--slices", 2),
    "host_work": ("--sizes", 32, "--volumes", 5, "--lines", 2),
    "methods": ("--methods", "bcp", "--size", 32, "--steps", 1),
    "preprocess": ("--volumes", 2, "--size", 64),
    "scaling": ("--size", 32, "--steps", 1),
    "startup": ("--size", 32),
    "sweep": ("--size", 32, "--steps", 4),
    "train_step": ("--sizes", 32, "--steps", 1),
}
PEERS = {
    "contrastive_loss": "torch",
    "dense_crf": "pydensecrf",
    "preprocess": "skimage",
    "train_step": "torch",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_benchmark_of_peers_prints_its_table(name, tmp_path):
    """They agree, where they compute the same: a benchmark ends where they do not."""
    if name in PEERS:
        pytest.importorskip(PEERS[name])
    path = tmp_path / "table.json"
    run(f"benchmarks.{name}", *SMALL[name], "--repeats", 1, "--json", path, timeout=900)
    assert json.loads(path.read_text())["rows"]


@pytest.mark.slow
def test_the_accelerator_benchmark_runs_and_agrees_with_the_golden_values(tmp_path):
    path = tmp_path / "lines.jsonl"
    # Minutes that are enough on a busy machine, too.
    printed = run("benchmarks.accelerator", "--tiny", "--minutes", 20, "--json", path, timeout=1500)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(printed.splitlines()) == len(lines)
    assert not [line for line in lines if "error" in line or "left out" in line]
    assert {line["part"] for line in lines} == {
        *("device", "golden loss", "step", "PyTorch", "scan", "seeds", "CRF", "prediction"),
        "phantom",
    }
    for line in lines:
        if line["part"] == "golden loss":
            assert line["loss, relative"] < 1e-5 and line["gradient, of the largest"] < 1e-5
    (end,) = [line["run"] for line in lines if "run" in line]
    assert end == "done"
    assert [line["stage"] for line in lines if "stage" in line] == ["baseline", "round_1"]


def test_a_measurement_that_no_longer_fits_is_not_begun(monkeypatch):
    """Nor are repeats, once the minutes are over; each call takes 10 s here."""
    now = [0.0]
    monkeypatch.setattr(accelerator.time, "monotonic", lambda: now[0])
    calls = []

    def call():
        calls.append(1)
        now[0] += 10

    clock = accelerator.Clock(minutes=1)
    clock.seconds_of(call, 2)
    assert len(calls) == 3 and clock.longest == 30 == clock.left()
    clock.seconds_of(call, 9)  # ends with the minutes
    assert len(calls) == 6
    with pytest.raises(accelerator.OutOfTimeError, match="0 s are left, the longest .* took 30 s"):
        clock.seconds_of(call, 1)
    assert len(calls) == 6


def test_what_is_gained_after_training(tiny_run):
    """The run was tested with copies turned by 15 degrees, smoothed by 8 mm, and refined."""
    workdir, results = tiny_run
    how = test_time.variants([15.0], [(1.0, 0.1, 1.0)], [8.0], [2])
    plain = ["as predicted", "turned by 15", "CRF 1 0.1 1, 2x", "turned by 15, CRF 1 0.1 1, 2x"]
    smoothed = [
        "smoothed by 8 mm",
        "turned by 15, smoothed by 8 mm",
        "smoothed by 8 mm, CRF 1 0.1 1, 2x",
        "turned by 15, smoothed by 8 mm, CRF 1 0.1 1, 2x",
    ]
    assert [variant.name for variant in how] == [*plain, *smoothed]
    how[-1].crf.update(num_steps=2, spatial_weight=0.5)  # as tests/conftest.py has it
    found = test_time.dice_of(workdir, "test", "last", how)
    tested = list(results["results"].values())[-1]["test_last"]
    assert found[-1] == pytest.approx(tested["largest_component"]["mean_dice"], abs=1e-6)
    assert len(set(found)) == 8
