"""The whole run, tiny: two rounds on a few phantom volumes, stopped, resumed, refused."""

import dataclasses
import itertools
import json
import math
import runpy
import struct
import types
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from ml_collections import ConfigDict
from small_run import TIMES, logged
from tensorboardX.proto import event_pb2

from lclseg import report, test_time, train
from lclseg.crf import dense_crf, upsampled_dense_crf
from lclseg.data.batches import records_of
from lclseg.errors import ConfigError, NonFiniteLossError
from lclseg.evaluation import VolumePrediction
from lclseg.label_stream import predict_labels, refresher
from lclseg.losses import IGNORE
from lclseg.pseudo_labels import PseudoLabelError, label_of, load_pseudo_labels
from lclseg.run import checkpoint, devices, setup
from lclseg.run.predictions import evaluate_state, predictor
from lclseg.run.programs import stages
from lclseg.run.setup import initial_state, start_run
from lclseg.run.stage_files import StageFiles
from lclseg.run.start_from import take_over_baseline
from lclseg.run.stopping import Interrupted
from lclseg.run.workdir import read_json
from lclseg.stage import Mark, run_steps, slices_of
from lclseg.through_plane import smooth_across_slices

ROOT = Path(__file__).parents[1]


def tiny_config(data_dir):
    config = runpy.run_path(str(ROOT / "configs" / "phantom.py"))["get_config"]("local_contrastive")
    data = config.data
    data.data_dir = str(data_dir)
    data.image_size, data.target_spacing_mm = 32, 4.0
    data.unlabeled = ("phantom_010", "phantom_011", "phantom_013")
    data.test = ("phantom_044", "phantom_045")
    data.labeled_batch_size = 4
    config.method.pairs.update(labeled_self=1, pseudo_self=1, labeled_pseudo=1, pseudo_pseudo=1)
    config.method.view_min_classes = 1
    data.eval_batch_size = 16
    config.model.filters = (4, 8)
    config.rounds.update(baseline_steps=6, num_rounds=2, steps_per_round=4, eval_every=2)
    config.log.every = 2
    config.augment.strength = "paper"  # compiled in half the time
    return config


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    """(workdir, results) of an undisturbed run."""
    workdir = tmp_path_factory.mktemp("run") / "undisturbed"
    return workdir, train.train_and_evaluate(tiny_config(data_dir), workdir)


def final_params(workdir, stage):
    """Arrays of a stage's newest checkpoint, as stored."""
    with checkpoint.open_stage(workdir / "checkpoints" / stage) as manager:
        step = manager.latest_step()
        tree = manager.restore(
            step, args=checkpoint.ocp.args.Composite(state=checkpoint.ocp.args.StandardRestore())
        )
    return jax.tree.leaves(tree["state"])


def without_times(results):
    stages = {
        name: {k: v for k, v in stage.items() if k not in TIMES}
        for name, stage in results["results"].items()
    }
    return {**results, "results": stages}


def test_results_tell_the_whole_run(finished):
    workdir, results = finished
    assert json.loads((workdir / "results.json").read_text()) == results
    assert list(results["results"]) == ["baseline", "round_1", "round_2"]
    assert results["dataset"] == "phantom" and results["class_names"] == ["RV", "MYO", "LV"]
    assert results["volumes"]["test"] == ["phantom_044", "phantom_045"]
    assert {"jax", "python"} <= results["versions"].keys()
    for name, stage in results["results"].items():
        test = stage["test"]
        assert set(test["per_volume"]) == {"phantom_044", "phantom_045"}
        steps = [h["step"] for h in stage["validation"]]
        assert steps == ([2, 4, 6] if name == "baseline" else [2, 4])
        assert stage["best_validation_dice"] == max(h["mean_dice"] for h in stage["validation"])
        assert (stage["pseudo_labels"] is None) == (name == "baseline")
    best = max(results["results"].values(), key=lambda r: r["best_validation_dice"])
    chosen = results["results"][results["chosen"]]
    assert chosen["best_validation_dice"] == best["best_validation_dice"]


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("no", []),
        ("yes", ["RV", "MYO", "LV"]),
        ("by_masks", ["MYO"]),
        ("together_by_masks", ["RV + MYO + LV", "MYO"]),
    ],
)
def test_the_choice_of_largest_components_is_written(
    choice, names, data_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr(setup, "classes_in_one_piece", lambda prepared, ids: ((1, 2, 3), 2))
    config = tiny_config(data_dir)
    config.predictions.largest_component = choice
    with start_run(config, tmp_path / "run").lock:
        found = json.loads((tmp_path / "run" / "postprocessing.json").read_text())
    assert found == {"largest_component": names}


def test_chosen_and_last_weights_are_tested(finished, data_dir):
    """The last ones, of each stage, as its newest checkpoint tests; once where both are one."""
    workdir, results = finished
    run = start_run(tiny_config(data_dir), workdir)
    for stage, result in results["results"].items():
        with checkpoint.open_stage(workdir / "checkpoints" / stage, read_only=True) as manager:
            newest = checkpoint.latest_step(manager)
            kind = "first" if stage == "baseline" else "joint"
            state, _ = checkpoint.restore(manager, newest, initial_state(run, kind))
        assert newest == result["num_steps"]
        found = evaluate_state(
            run,
            devices.replicate(state),
            run.split.test,
            stoppable=False,
            with_distances=True,
            one_piece=run.one_piece,
        )
        assert found == result["test_last"] and "largest_component" in found
        best = max(result["validation"], key=lambda h: h["mean_dice"])
        if best["step"] == newest:
            assert result["test"] == result["test_last"]
    dice = [h["mean_dice"] for h in results["results"]["baseline"]["validation"]]
    assert len(set(dice)) > 1  # or the best would not tell from the last


def test_speed_and_what_a_stage_took(finished):
    """In every log line, and for each stage, beside the slices that went through the network."""
    workdir, results = finished
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    for taken in (*lines, *results["results"].values()):
        assert taken["steps_per_second"] > 0 and 0 < taken["device_busy"] < 1
    (path,) = (workdir / "tensorboard" / "round_1").iterdir()
    tags = {value.tag for event in events(path) for value in event.summary.value}
    assert {"steps_per_second", "device_busy", "loss"} <= tags
    # 4 labelled slices; in rounds two views of each of 4 pairs, too.
    slices = {name: stage["slices"] for name, stage in results["results"].items()}
    assert slices == {"baseline": 6 * 4, "round_1": 4 * (4 + 8), "round_2": 4 * (4 + 8)}


def test_a_mark_tells_the_speed_since_another_one():
    """30 steps in 6 s; the devices had work for 4.5 s of them."""
    speed = Mark(50, 10.0, 5.5).since(Mark(20, 4.0, 1.0))
    assert speed == {"steps_per_second": 5.0, "device_busy": 0.75}


def test_one_dispatch_and_one_wait_a_log_line(finished, data_dir, tmp_path, monkeypatch):
    """As on GPUs and TPUs, where they take all steps of a line; the run is the one step by step."""
    _, expected = finished
    calls, over_devices, get = [], devices.over_devices, jax.device_get

    def counted(step, **options):
        program = over_devices(step, **options)
        if not options["donate_state"]:
            return program

        def dispatch(*arguments):
            calls.append("dispatch")
            return program(*arguments)

        return dispatch

    def waited(x):
        calls.append("wait")
        return get(x)

    monkeypatch.setattr(devices, "steps_per_dispatch", lambda log_every: log_every)
    monkeypatch.setattr(devices, "over_devices", counted)
    monkeypatch.setattr(jax, "device_get", waited)
    config = tiny_config(data_dir)
    config.rounds.update(num_rounds=0, eval_every=10)
    config.log.every = 4
    results = train.train_and_evaluate(config, tmp_path / "run")
    lines = [line for line in logged(tmp_path / "run") if "loss" in line]
    assert [line["step"] for line in lines] == [4, 6]
    assert calls == ["dispatch", "wait"] * len(lines)
    by_one = [x for x in logged(finished[0]) if x["stage"] == "baseline" and "loss" in x]
    assert [x["loss"] for x in lines] == pytest.approx(
        [x["loss"] for x in by_one if x["step"] in (4, 6)], rel=1e-4
    )
    ours, theirs = (r["results"]["baseline"]["validation"][-1] for r in (results, expected))
    assert ours["mean_dice"] == pytest.approx(theirs["mean_dice"], abs=0.01)


class _Unread:
    """What is on the device: any look at it but `jax.device_get` raises TypeError."""


def test_steps_look_at_nothing_on_the_device_before_they_are_done(monkeypatch):
    """Of the line's only dispatch; the state is handed on as it comes."""
    after, metrics, waits = _Unread(), {"loss": _Unread(), "first_not_finite": _Unread()}, []

    def get(x):
        waits.append(x)
        return {"loss": np.array([0.5]), "first_not_finite": np.array([3])}

    monkeypatch.setattr(devices, "steps_per_dispatch", lambda log_every: 4)
    monkeypatch.setattr(jax, "device_get", get)
    config = ConfigDict({"log": {"every": 4}})
    slices = mock.Mock(store="store", rows=lambda todo: {"labeled": np.zeros((1, len(todo), 2))})
    programs = mock.Mock()
    programs.train.return_value = after, metrics
    trained = run_steps(mock.Mock(config=config), programs, "state", slices, range(7, 10), "key")
    assert waits == [metrics] and programs.train.call_count == 1
    state, store, rows, number, key = programs.train.call_args.args
    assert (state, store, number, key) == ("state", "store", 3, "key")
    assert rows["labeled"].shape == (1, 4, 2)  # one program, whatever the number
    assert trained.state is after and trained.metrics == [{"loss": 0.5}]
    assert (trained.first, trained.num_steps) == (9, 3)


def test_files_of_a_run(finished, data_dir):
    workdir, _ = finished
    for stage in ("baseline", "round_1", "round_2"):
        assert sorted(p.name for p in (workdir / "predictions" / stage).iterdir()) == [
            "phantom_044.nii.gz",
            "phantom_045.nii.gz",
        ]
    # Pseudo-labels of round 3 would be used by it; they are the pool's segmentation by the end.
    for number in (1, 2, 3):
        names = {p.name for p in (workdir / "pseudo_labels" / f"round_{number}").iterdir()}
        assert names == {
            "labels.npy",
            "report.json",
            "seconds.json",
            *(f"phantom_{i:03d}.nii.gz" for i in (10, 11, 13)),
        }
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines} == {"baseline", "round_1", "round_2"}
    joint = [line for line in lines if line["stage"] == "round_1" and "loss" in line]
    assert [line["step"] for line in joint] == [2, 4]
    for line in joint:
        expected = line["segmentation_loss"] + 0.02 * line["contrastive_loss"]
        expected += 0.25 * line["pseudo_label_loss"]  # of the short configs
        assert math.isclose(line["loss"], expected, rel_tol=1e-5)
    assert json.loads((workdir / "config.json").read_text())["model"]["filters"] == [4, 8]
    page = (workdir / "report.html").read_text()
    assert "Best: phantom_04" in page and "Changed most between rounds" in page


def test_tensorboard_holds_the_scalars_and_pictures(finished):
    workdir, _ = finished
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    first_steps = {"baseline": 0, "round_1": 6, "round_2": 10}
    for stage, first in first_steps.items():
        (path,) = (workdir / "tensorboard" / stage).iterdir()
        values = [value for event in events(path) for value in event.summary.value]
        found = [v.simple_value for v in values if v.tag == "validation_dice"]
        wanted = [x["validation_dice"] for x in lines if x["stage"] == stage and len(x) == 3]
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
        pictures = [v for v in values if v.HasField("image")]
        assert [v.tag for v in pictures] == ["phantom_012", "phantom_028"] * len(found)
        assert {v.image.width for v in pictures} == {96}
        assert max(event.step for event in events(path)) == first + (6 if first == 0 else 4)


def events(path):
    """Events of a TensorBoard file: records of length, its checksum, content, its checksum."""
    content = path.read_bytes()
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        yield event_pb2.Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]


def test_predictions_lie_in_native_geometry(finished):
    from tfds_builders.phantom import synthesis

    workdir, _ = finished
    volume = synthesis.make_volume(44)
    prediction = nib.load(workdir / "predictions" / "round_2" / "phantom_044.nii.gz")
    assert prediction.shape == volume.image.shape
    np.testing.assert_allclose(prediction.header.get_zooms(), volume.spacing_mm, rtol=1e-6)


def assert_same_end(workdir, undisturbed):
    for name in ("baseline", "round_1", "round_2"):
        for ours, theirs in zip(
            final_params(workdir, name), final_params(undisturbed, name), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)
    assert logged(workdir) == logged(undisturbed)
    report = "pseudo_labels/round_2/report.json"
    assert (workdir / report).read_text() == (undisturbed / report).read_text()


@pytest.mark.parametrize("stage, number", [("baseline", 3), ("round_2", 3)])
def test_killed_run_goes_on_to_the_same_end(
    finished, data_dir, tmp_path, monkeypatch, stage, number
):
    """Ended without notice, and half a line written."""
    undisturbed, expected = finished
    save_line = StageFiles.log
    workdir = tmp_path / "run"

    def stop(files, step, *written):
        save_line(files, step, *written)
        if files.stage.name == stage and step >= number:
            with (workdir / "metrics.jsonl").open("a") as file:
                file.write('{"stage": "base')
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StageFiles, "log", stop)
        train.train_and_evaluate(tiny_config(data_dir), workdir)
    resumed = train.train_and_evaluate(tiny_config(data_dir), workdir)
    assert without_times(resumed) == without_times(expected)
    assert_same_end(workdir, undisturbed)


def test_run_asked_to_stop_again_and_again_goes_on_to_the_same_end(finished, data_dir, tmp_path):
    """Between validations, at one, between stages, while pseudo-labels are predicted."""
    undisturbed, expected = finished
    log, places = tmp_path / "run" / "metrics.jsonl", []

    def on_call(number):
        asked = itertools.count(1)
        return lambda: next(asked) >= number

    def in_round_1():
        return '"round_1"' in log.read_text()

    # Once after every step, and after every two, which are logged; then before every prediction.
    for stop_asked in (on_call(4), on_call(5), in_round_1, on_call(3)):
        with pytest.raises(Interrupted) as stop:
            train.train_and_evaluate(tiny_config(data_dir), tmp_path / "run", stop_asked)
        places.append(str(stop.value))
    predicting = "stopped while predicting volumes, which starts anew"
    assert places == [
        "stopped in baseline after step 3 of 6",
        predicting,
        "stopped in round_1 after step 3 of 4",
        predicting,
    ]
    resumed = train.train_and_evaluate(tiny_config(data_dir), tmp_path / "run")
    assert without_times(resumed) == without_times(expected)
    assert_same_end(tmp_path / "run", undisturbed)


def test_a_run_may_become_longer(finished, data_dir, tmp_path):
    """One round, then more baseline is refused, then the second round: as if asked for at once."""
    undisturbed, expected = finished
    config = tiny_config(data_dir)
    config.rounds.num_rounds = 1
    workdir = tmp_path / "run"
    train.train_and_evaluate(config, workdir)
    config.rounds.baseline_steps = 8
    with pytest.raises(ConfigError, match=r"rounds\.baseline_steps"):
        train.train_and_evaluate(config, workdir)
    extended = train.train_and_evaluate(tiny_config(data_dir), workdir)
    assert without_times(extended) == without_times(expected)
    assert_same_end(workdir, undisturbed)


def test_a_longer_baseline_makes_its_pseudo_labels_anew(data_dir, tmp_path):
    config = tiny_config(data_dir)
    config.rounds.num_rounds = 0
    workdir = tmp_path / "run"
    first = train.train_and_evaluate(config, workdir)
    config.rounds.update(baseline_steps=8, num_rounds=1)
    longer = train.train_and_evaluate(config, workdir)
    assert [s["results"]["baseline"]["num_steps"] for s in (first, longer)] == [6, 8]
    assert [h["step"] for h in longer["results"]["baseline"]["validation"]] == [2, 4, 6, 8]
    (workdir / "pseudo_labels" / "round_1" / "labels.npy").write_bytes(b"something else")
    with pytest.raises(PseudoLabelError, match="digest"):
        train.train_and_evaluate(config, workdir)


def test_finished_run_is_reported_not_repeated(finished, data_dir, monkeypatch):
    workdir, results = finished
    before = (workdir / "metrics.jsonl").read_text()
    assert train.train_and_evaluate(tiny_config(data_dir), workdir) == results
    assert (workdir / "metrics.jsonl").read_text() == before


def test_baseline_is_taken_over(finished, data_dir, tmp_path):
    source, theirs = finished
    config = tiny_config(data_dir)
    config.rounds.update(num_rounds=1, baseline_from=str(source))
    config.method.contrastive_weight = 0.5
    results = train.train_and_evaluate(config, tmp_path / "run")
    assert results["results"]["baseline"] == theirs["results"]["baseline"]
    assert list(results["results"]) == ["baseline", "round_1"]

    config.optimizer.learning_rate = 0.1
    with pytest.raises(ConfigError, match=r"optimizer\.learning_rate"):
        train.train_and_evaluate(config, tmp_path / "other")


def test_a_baseline_of_other_steps_is_not_taken_over(finished, data_dir, tmp_path):
    """Of a method without rounds all steps are the baseline's; no key that differs tells so."""
    source, _ = finished
    config = tiny_config(data_dir)
    config.method = ConfigDict({"name": "supervised"})
    config.rounds.baseline_from = str(source)
    with pytest.raises(ConfigError, match=r"other values of method\.name"):
        take_over_baseline(config, tmp_path / "run", {"results": {}})
    assert not (tmp_path / "run").exists()


def test_workdir_of_another_config_is_refused(finished, data_dir):
    workdir, _ = finished
    config = tiny_config(data_dir)
    config.method.temperature = 0.5
    with pytest.raises(ConfigError, match=r"other values of method\.temperature"):
        train.train_and_evaluate(config, workdir)


def test_foreign_folder_is_not_written_into(data_dir, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="not empty and no lclseg run"):
        train.train_and_evaluate(tiny_config(data_dir), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    "key, value, message",
    [
        (
            "data.labeled_batch_size",
            6,
            r"data\.labeled_batch_size is 6; wanted a multiple of the 4 devices",
        ),
        ("method.pairs.labeled_self", 2, r"the sum of method\.pairs is 5"),
        ("model.dtype", "float12", r"model\.dtype is 'float12'"),
        ("method.matching", "outer", r"matching is 'outer'"),
        ("loss.segmentation", "dise", r"loss\.segmentation is 'dise'"),
        ("data.image_size", 31, r"wanted a multiple of 2"),
        ("rounds.eval_every", 0, r"rounds\.eval_every is 0"),
        ("crf.num_steps", -1, r"crf\.num_steps is -1"),
        ("method.pixels_per_class", -1, r"method\.pixels_per_class is -1"),
    ],
)
def test_bad_values_are_refused_before_anything_is_written(data_dir, tmp_path, key, value, message):
    config = tiny_config(data_dir)
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ConfigError, match=message):
        train.train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_rounds_without_unlabelled_volumes_are_refused(data_dir, tmp_path):
    config = tiny_config(data_dir)
    config.data.num_labeled = "all"
    config.data.unlabeled = ()
    with pytest.raises(ConfigError, match=r"rounds\.num_rounds=0"):
        train.train_and_evaluate(config, tmp_path / "run")


def test_non_finite_loss_stops_the_run(data_dir, tmp_path):
    config = tiny_config(data_dir)
    config.optimizer.learning_rate = 1e30
    with pytest.raises(NonFiniteLossError, match=r"baseline, step 2: .*optimizer\.learning_rate"):
        train.train_and_evaluate(config, tmp_path / "run")
    # The batch of the step by name, as the pipeline draws it.
    record = json.loads((tmp_path / "run" / "non_finite.json").read_text())
    assert record["step"] == 2 and len(record["labeled"]) == 4
    run = start_run(config, tmp_path / "run")
    records = slices_of(run, "first", None).sampler(1)["labeled"]
    first = run.prepared.volumes["phantom_000"].first_slice
    assert record["labeled"] == [f"phantom_000, slice {r - first}" for r in records]
    assert not list((tmp_path / "run" / "checkpoints" / "baseline").glob("[0-9]*"))


def test_prepare_only(tmp_path):
    """Says what there is; after it a run needs no files to prepare from."""
    config = tiny_config(tmp_path / "data")
    text = setup.prepare(config)
    assert "32 px of 4 mm, are prepared; 1 labeled, 3 unlabeled, 2 validation, 2 test" in text
    assert [p.name for p in tmp_path.iterdir()] == ["data"]
    with mock.patch("lclseg.data.dataset._prepare", side_effect=AssertionError):
        setup.open_data(config)
    config.data.validation = ("phantom_010",)  # in the unlabelled pool, too
    with pytest.raises(ConfigError, match="phantom_010 is in|holds phantom_010"):
        setup.prepare(config)


def test_cpu_devices_divide_the_batches(monkeypatch):
    chosen = {}
    monkeypatch.setattr(devices.threading, "excepthook", devices.threading.excepthook)
    monkeypatch.setattr(jax.config, "update", lambda name, value: chosen.update({name: value}))
    monkeypatch.setattr(setup, "usable_cores", lambda: 8)
    monkeypatch.setattr(setup.multihost, "connect", lambda **cluster: None)
    config = runpy.run_path(str(ROOT / "configs" / "acdc.py"))["get_config"]()
    setup.set_up_process(config)  # 20 slices and 10 pairs on 8 cores
    assert chosen["jax_num_cpu_devices"] == 5
    config.num_cpu_devices = 2
    setup.set_up_process(config)
    assert chosen["jax_num_cpu_devices"] == 2
    config.num_cpu_devices = 0
    cluster = {"num_processes": 2}  # 10 and 5 are left for each
    monkeypatch.setattr(setup.multihost, "settings", lambda: cluster)
    setup.set_up_process(config)
    assert chosen["jax_num_cpu_devices"] == 5


def test_table_shows_each_stage(finished):
    _, results = finished
    text = report.table(results)
    lines = text.splitlines()
    assert lines[0].startswith("SYNTHETIC")
    assert "1 labelled, 3 unlabelled, 2 validation, 2 test volumes" in lines[1]
    assert [line.split()[0] for line in lines[5:8]] == ["baseline", "round_1", "round_2"]
    for line, stage in zip(lines[5:8], results["results"].values(), strict=True):
        assert f"{stage['test']['mean_dice']:.4f}" in line
        assert line.endswith(f"{stage['test_last']['mean_dice']:.4f}")
    assert lines[9] == "Pseudo-labels"
    for line, name in zip(lines[12:14], ("round_1", "round_2"), strict=True):
        labels = labels_of(results, name)
        assert line.split()[:3] == [name, "3", "-"]
        assert line.endswith(f"{labels['true_mean_dice']:.4f}")
    warnings = [w for s in ("round_1", "round_2") for w in labels_of(results, s)["warnings"]]
    assert lines[14:] and len(lines[14:]) == len(warnings)


def labels_of(results, stage):
    return results["results"][stage]["pseudo_labels"]


def test_gate_in_a_run(data_dir, tmp_path, monkeypatch):
    config = tiny_config(data_dir)
    config.rounds.num_rounds = 1
    config.pseudo_labels.min_agreement = 0.9
    seen = []

    def agreement(rng, predict, image, *, flips):
        assert flips  # the paper's augmentation has shown them to the network
        assert predict(image).shape == (*image.shape, 4)
        seen.append(rng.random())
        return agreements[len(seen) - 1]

    monkeypatch.setattr(train.quality_gate, "agreement", agreement)
    agreements = [0.1, 0.9, 0.2]
    with pytest.raises(PseudoLabelError, match=r"above 0\.9 .*pseudo_labels\.min_agreement"):
        train.train_and_evaluate(config, tmp_path / "run")
    assert len(set(seen)) == 3  # each volume draws for itself
    assert list(read_json(tmp_path / "run" / "results.json")["results"]) == ["baseline"]
    # Predicted anew by the same command.
    seen.clear()
    agreements = [0.1, 0.95, 0.91, 0.5, 0.5, 0.5]
    results = train.train_and_evaluate(config, tmp_path / "run")
    labels = labels_of(results, "round_1")
    assert labels["volume_ids"] == ["phantom_011", "phantom_013"]
    assert labels["gate"]["rejected"] == ["phantom_010"]
    # The finished model's own: none passes, so these stay.
    after = read_json(tmp_path / "run" / "pseudo_labels" / "round_2" / "report.json")
    assert after["volume_ids"] == labels["volume_ids"]
    assert "above 0.9" in after["kept_previous"]


@pytest.mark.parametrize("strength", ["paper", "strong"])
def test_the_gate_flips_copies_where_training_does(data_dir, tmp_path, monkeypatch, strength):
    """Strong augmentation turns slices, but does not flip them."""
    config = tiny_config(data_dir)
    config.augment.strength = strength
    config.pseudo_labels.min_agreement = 0.9

    class SeenError(Exception):
        pass

    def agreement(rng, predict, image, *, flips):
        raise SeenError(flips)

    monkeypatch.setattr(train.quality_gate, "agreement", agreement)
    run = start_run(config, tmp_path / "run")
    with run.lock, pytest.raises(SeenError) as seen:
        stage = types.SimpleNamespace(name="baseline")
        best = types.SimpleNamespace(stage=stage, state=initial_state(run, "first"))
        train.pseudo_label_pool(run, best, 1, None)
    assert seen.value.args == (strength == "paper",)


def test_predictions_pass_through_what_finishes_them(finished, data_dir, tmp_path):
    workdir, _ = finished
    run = start_run(tiny_config(data_dir), workdir)
    state = devices.replicate(initial_state(run, "first"))
    images, _ = run.prepared.read_slices(range(5))  # less than a batch: padded and cut again
    plain = predictor(run, state)(images)
    seen = []

    def swap_classes(probs):
        seen.append(probs.shape)
        return probs[..., ::-1]

    np.testing.assert_array_equal(
        predictor(run, state, finish=swap_classes)(images), plain[..., ::-1]
    )
    assert seen == [(4, 4, 32, 32, 4)]


def test_the_mean_over_turned_copies_on_all_devices(finished, data_dir):
    """The network applied to copies that are turned here; what a state is tested by, where asked.

    And no more slices at once than without copies.
    """
    workdir, _ = finished
    config = tiny_config(data_dir)
    run = start_run(config, workdir)
    state = devices.replicate(initial_state(run, "first"))
    images, _ = run.prepared.read_slices(run.prepared.volumes[run.split.test[0]].slices)
    plain, angle = predictor(run, state), np.deg2rad(config.augment.max_rotation_degrees)
    total = plain(images)
    for turn in (angle, -angle):
        copies = np.asarray(test_time.turned(jnp.asarray(images), turn))
        total = total + test_time.turned(jnp.asarray(plain(copies)), -turn)
    expected = np.asarray(total / total.sum(axis=-1, keepdims=True))
    assert np.abs(expected - plain(images)).max() > 0.01
    shapes = []

    def look(probs):
        shapes.append(probs.shape[:2])
        return probs

    found = predictor(run, state, test_time_augmentation=True, finish=look)(images)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert set(shapes) == {(4, -(-config.data.eval_batch_size // (3 * 4)))}
    config.predictions.test_time_augmentation = True
    np.testing.assert_allclose(probs_tested(run, config, state), expected, atol=1e-5)
    # Smoothed across slices, and by the CRF, where asked; in this order.
    spacing_mm = run.prepared.read_native(run.split.test[0]).spacing_mm[2]
    config.predictions.through_plane_sigma = spacing_mm
    smoothed = smooth_across_slices(expected, spacing_mm, spacing_mm)
    assert np.abs(smoothed - expected).max() > 0.01
    np.testing.assert_allclose(probs_tested(run, config, state), smoothed, atol=1e-5)
    config.predictions.crf = True
    config.crf.update(num_steps=2, bilateral_sigma=1.0, intensity_sigma=0.1)
    refined = dense_crf(images, smoothed, **config.crf)
    assert np.abs(refined - smoothed).max() > 0.01
    np.testing.assert_allclose(probs_tested(run, config, state), refined, atol=1e-4)
    config.predictions.crf_upsampling = 2
    refined = upsampled_dense_crf(images, smoothed, upsampling=2, **config.crf)
    np.testing.assert_allclose(probs_tested(run, config, state), refined, atol=1e-4)


def probs_tested(run, config, state):
    """Of the run's first test volume, [S, H, W, C]."""
    tested = []
    evaluate_state(
        dataclasses.replace(run, config=config),
        state,
        run.split.test[:1],
        stoppable=False,
        with_distances=False,
        on_prediction=tested.append,
    )
    return tested[0].probs


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("crf_steps, sigma", [(0, 0.0), (2, 0.0), (0, 8.0), (2, 8.0)])
def test_refreshed_labels_are_those_of_the_probabilities(
    finished, data_dir, tmp_path, crf_steps, sigma, averaged
):
    """A byte a pixel comes from the devices where that is all there is to know; the same labels."""
    workdir, _ = finished
    run = start_run(tiny_config(data_dir), workdir)
    state = devices.replicate(initial_state(run, "first"))
    stored = load_pseudo_labels(workdir / "pseudo_labels" / "round_1", run.prepared)
    config = run.config.copy_and_resolve_references()
    config.crf.num_steps = crf_steps
    config.pseudo_labels.update(
        largest_component="yes",
        min_confidence=0.3,
        test_time_augmentation=averaged,
        through_plane_sigma=sigma,
    )
    run = dataclasses.replace(run, config=config)
    images = run.prepared.read_slices(stored.records)[0]
    probs = predictor(run, state, test_time_augmentation=averaged)(images)
    expected, row = [], 0
    for volume_id in sorted(stored.report["volume_ids"]):
        end = row + len(run.prepared.volumes[volume_id].slices)
        spacing_mm = run.prepared.read_native(volume_id).spacing_mm[2]
        refined = smooth_across_slices(probs[row:end], spacing_mm, sigma)
        if crf_steps:
            refined = np.asarray(dense_crf(images[row:end], refined, **config.crf))
        own = VolumePrediction(volume_id, images[row:end], probs[row:end], refined)
        expected.append(label_of(own, min_confidence=0.3, keep_largest=(1, 2, 3)))
        row = end
    expected = np.concatenate(expected)
    assert 0 < np.mean(expected == IGNORE) < 1
    with mock.patch("lclseg.evaluation.VolumePrediction", wraps=VolumePrediction) as made:
        found = predict_labels(run, state, stored.report["volume_ids"])
    np.testing.assert_array_equal(found, expected)
    bytes_a_pixel = {
        np.asarray(call.args[2]).nbytes // call.args[1].size for call in made.mock_calls
    }
    assert bytes_a_pixel == ({4 * 4} if crf_steps or sigma else {1})
    # And those that a round begins with.
    best = mock.Mock(state=devices.unreplicate(state), stage=mock.Mock())
    best.stage.name = "baseline"
    made = train.pseudo_label_pool(dataclasses.replace(run, workdir=tmp_path), best, 1, None)
    np.testing.assert_array_equal(made.labels, expected)


def test_a_part_of_the_pool_is_labelled_anew(finished, data_dir, tmp_path):
    """One volume, drawn; it alone is learnt from. A resumed stage goes on with the same labels."""
    workdir, _ = finished
    run = start_run(tiny_config(data_dir), workdir)
    stored = load_pseudo_labels(workdir / "pseudo_labels" / "round_1", run.prepared)
    state = devices.replicate(initial_state(run, "first"))
    config = run.config.copy_and_resolve_references()
    config.rounds.refresh_slices = 1
    run = dataclasses.replace(run, config=config, workdir=tmp_path)
    stage = stages(config, run.method)[1]
    labels, made_at, refresh = refresher(run, stage, stored, done=0)
    assert labels is stored and made_at == 0
    drawn = set()
    for number in range(1, 9):
        labels = refresh(state, number, 0)
        (volume_id,) = (
            v
            for v in stored.report["volume_ids"]
            if list(stored.records[labels.drawn]) == list(run.prepared.volumes[v].slices)
        )
        drawn.add(volume_id)
        found = predict_labels(run, state, [volume_id])
        np.testing.assert_array_equal(labels.labels[labels.drawn], found)
        assert np.all(np.delete(labels.labels, labels.drawn, axis=0) == IGNORE)
        learnt = slices_of(run, "joint", labels).sampler(stage.first_step)["pairs"]
        assert set(learnt) <= {
            *stored.records[labels.drawn],
            *records_of(run.prepared, run.split.labeled),
        }
    assert len(drawn) > 1
    again, made_again, _ = refresher(run, stage, stored, done=8)
    assert made_again == 8
    np.testing.assert_array_equal(again.labels, labels.labels)
    np.testing.assert_array_equal(again.drawn, labels.drawn)
