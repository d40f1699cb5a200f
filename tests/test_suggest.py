"""The clinic's loop: train, ask which predictions are poor, correct a mask, train on."""

import csv
import html
import json
import runpy
import shlex
import shutil
from pathlib import Path
from unittest import mock

import jax
import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from lclseg import model_files, predict, quality_gate, suggest, train
from lclseg.crf import upsampled_dense_crf
from lclseg.data import own_data, preprocess, roles
from lclseg.data.dataset import PreparedSet
from lclseg.data.splits import SplitError
from lclseg.errors import ConfigError
from lclseg.evaluation import VolumePrediction
from lclseg.page import suggestions
from lclseg.page.recorded import RunError, find_prepared
from lclseg.run import devices, start_from
from lclseg.run.setup import start_run
from lclseg.through_plane import smooth_across_slices

ROOT = Path(__file__).parents[1]
VALUES = (3, 300)  # of the classes in the files: no class numbers, and no uint8
MASKED, CASES = 3, 6


def write_case(folder, number, *, with_mask):
    """Two bright boxes on noise; the masks hold `VALUES`. The slices lie along axis 0."""
    rng = np.random.default_rng(number)
    image = rng.normal(0, 0.1, (4, 30, 28)).astype(np.float32)
    label = np.zeros(image.shape, np.uint16)
    top = 4 + number
    for value, (x, y), brightness in ((VALUES[0], (top, 5), 1.0), (VALUES[1], (top, 15), 2.0)):
        label[1:3, x : x + 8, y : y + 8] = value
        image[1:3, x : x + 8, y : y + 8] += brightness
    affine = np.diag([4.0, 1.0, -1.0, 1.0])
    affine[:3, 3] = (number, -7, 11)
    for part, data in (("images", image), ("labels", label)):
        if part == "images" or with_mask:
            (folder / part).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(data, affine), folder / part / f"c{number}.nii.gz")


def config_of(folder, data_dir, **rounds):
    config = runpy.run_path(str(ROOT / "configs" / "nifti_folder.py"))["get_config"]()
    config.data.manual_dir, config.data.data_dir = str(folder), str(data_dir)
    config.data.update(labeled_batch_size=4, unlabeled_batch_size=4, num_labeled="1")
    config.model.filters = (4, 4)
    config.rounds.update(baseline_steps=12, steps_per_round=2, num_rounds=1, eval_every=6)
    config.rounds.batch_norm_batches = 1
    config.rounds.update(rounds)
    return config


@pytest.fixture(scope="module")
def loop(tmp_path_factory):
    """(folder of images and masks, prepared sets, workdir, what its run found)."""
    root = tmp_path_factory.mktemp("loop")
    for number in range(CASES):
        write_case(root / "files", number, with_mask=number < MASKED)
    workdir = root / "run"
    results = train.train_and_evaluate(config_of(root / "files", root / "prepared"), workdir)
    return root / "files", root / "prepared", workdir, results


@pytest.fixture(scope="module")
def suggested(loop, tmp_path_factory):
    output = tmp_path_factory.mktemp("suggested") / "new"
    return output, suggest.suggest(loop[2], output, count=2, draws=2)


def test_the_pool_is_ranked(loop, suggested):
    """The poorest first; the estimates are those of the gate's measure, made here by hand."""
    _, _, workdir, results = loop
    _, found = suggested
    assert sorted(s.volume_id for s in found) == sorted(results["volumes"]["unlabeled"])
    assert [s.rank for s in found] == [1, 2, 3]
    assert [bool(s.mask) for s in found] == [True, True, False]
    prepared, _ = find_prepared(json.loads((workdir / "config.json").read_text()))
    network = predict.mean_predictor([model_files.load_run(workdir)])
    wanted = {}
    for volume_id in results["volumes"]["unlabeled"]:
        entry = prepared.volumes[volume_id]
        image, _ = prepared.read_slices(entry.slices)
        rng = np.random.default_rng((0, entry.first_slice))
        values = [quality_gate.agreement(rng, network, image, flips=False) for _ in range(2)]
        wanted[volume_id] = sum(values) / 2
    assert {s.volume_id: s.expected_dice for s in found} == pytest.approx(wanted)
    assert [s.expected_dice for s in found] == sorted(wanted.values())


def test_copies_are_flipped_where_training_flips(loop, tmp_path, monkeypatch):
    """By the config that lies in the workdir."""
    workdir = tmp_path / "run"
    shutil.copytree(loop[2], workdir)
    config = json.loads((workdir / "config.json").read_text())
    seen = []

    def agreement(rng, predict, image, *, flips):
        seen.append(flips)
        return 0.5

    monkeypatch.setattr(quality_gate, "agreement", agreement)
    for strength in ("strong", "paper"):
        config["augment"]["strength"] = strength
        (workdir / "config.json").write_text(json.dumps(config))
        suggest.suggest(workdir, tmp_path / strength, count=1, draws=1)
    assert seen == [False] * 3 + [True] * 3  # three volumes in the pool


def test_masks_to_start_from_are_predictions_on_their_images(loop, suggested, tmp_path):
    folder, _, workdir, _ = loop
    output, found = suggested
    names = {f"{s.volume_id}.nii.gz" for s in found[:2]}
    assert {p.name for p in (output / "masks").iterdir()} == names
    predict.predict_files([workdir], folder / "images", tmp_path / "out")
    for name in names:
        mask, image = nib.load(output / "masks" / name), nib.load(folder / "images" / name)
        assert mask.shape == image.shape
        np.testing.assert_allclose(mask.affine, image.affine)
        values = np.asarray(mask.dataobj)
        assert set(np.unique(values)) <= {0, *VALUES} and values.any()
        np.testing.assert_array_equal(values, np.asarray(nib.load(tmp_path / "out" / name).dataobj))


def test_tables_and_page(loop, suggested):
    folder, _, workdir, _ = loop
    output, found = suggested
    with (output / "suggestions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [r["volume_id"] for r in rows] == [s.volume_id for s in found]
    assert rows[0]["image"] == str(folder / "images" / f"{found[0].volume_id}.nii.gz")
    assert (output / rows[0]["mask"]).exists() and rows[2]["mask"] == ""
    assert float(rows[1]["expected_dice"]) == pytest.approx(found[1].expected_dice, abs=1e-4)
    stored = json.loads((output / "suggestions.json").read_text())
    assert stored["volumes"][0]["expected_dice"] == found[0].expected_dice
    assert stored["model"]["workdir"] == str(workdir)
    page = (output / "suggestions.html").read_text()
    assert all(s.volume_id in page for s in found)
    assert f"--config.rounds.start_from={workdir}" in page and "itksnap" in page
    assert page.count("<svg") >= 4


@pytest.mark.parametrize("finer", [1, 2])
def test_the_page_shows_the_slice_that_the_network_doubts(finer):
    """Of refined probabilities, which are all certain, nothing could be told."""
    label = np.zeros((6, 8, 8), int)
    label[1, 2:6, 2:6] = label[2, 3:5, 3:5] = 1
    network = np.where(np.eye(2)[label] > 0, 0.95, 0.05)
    network[4] = 0.5
    fine = label.repeat(finer, axis=1).repeat(finer, axis=2)
    found = VolumePrediction("one", np.ones((6, 8, 8)), network, np.eye(2)[fine])
    chosen = [suggestions.Suggestion(1, "one", 0.5, None, "masks/one.nii.gz")]
    prepared = mock.Mock(class_names=("organ",))
    shown = "".join(suggestions._poorest(chosen, prepared, lambda _: found, ()))
    assert "slice 2 of 6: most foreground" in shown and "slice 5 of 6: least certain" in shown


def test_commands_of_the_page_take_names_with_blanks(tmp_path):
    config = {"data": {"name": "nifti_folder", "manual_dir": str(tmp_path / "my data")}}
    image = str(tmp_path / "my data" / "Pat 06.nii.gz")
    chosen = suggestions.Suggestion(1, "Pat 06", 0.5, image, "masks/Pat 06.nii.gz")
    shown = "".join(suggestions._how(config, {"workdir": "/runs/my run"}, [chosen]))
    lines = html.unescape(shown).replace("\\\n", "").replace("<", "\n").splitlines()
    (snap,) = [shlex.split(x.partition(">")[2]) for x in lines if ">itksnap" in x]
    assert snap == ["itksnap", "-g", image, "-s", "masks/Pat 06.nii.gz"]
    (train,) = [shlex.split(x.partition(">")[2]) for x in lines if ">python" in x]
    assert f"--config.data.manual_dir={tmp_path}/my data" in train
    assert "--config.rounds.start_from=/runs/my run" in train


def test_corrected_masks_are_never_overwritten(loop, suggested):
    with pytest.raises(RunError, match="corrected masks may lie there: choose another --output"):
        suggest.suggest(loop[2], suggested[0])


def test_the_command(loop, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(devices, "set_up_jax", lambda devices: None)
    output = tmp_path / "s"
    argv = ["--workdir", str(loop[2]), "--output", str(output), "--draws", "1", "--stage", "last"]
    suggest.main(argv)
    out = capsys.readouterr().out
    assert "expected Dice" in out and f"{output}/suggestions.html" in out
    with pytest.raises(SystemExit, match="not an empty folder"):
        suggest.main(argv)
    with pytest.raises(SystemExit):
        suggest.main([*argv, "--count", "0"])
    assert "--count is 0; wanted 1 or more" in capsys.readouterr().err


def test_other_data_sets_get_class_numbers(tiny_run, tmp_path):
    """The phantom has no files: its mask lies where the run's own pseudo-labels do."""
    workdir, results = tiny_run
    (volume_id,) = results["volumes"]["unlabeled"]
    (found,) = suggest.suggest(workdir, tmp_path / "s", draws=1)
    assert found.volume_id == volume_id
    mask = nib.load(tmp_path / "s" / "masks" / f"{volume_id}.nii.gz")
    theirs = nib.load(workdir / "pseudo_labels" / "round_1" / f"{volume_id}.nii.gz")
    np.testing.assert_allclose(mask.affine, theirs.affine)
    assert mask.shape == theirs.shape
    assert "takes no masks from outside" in (tmp_path / "s" / "suggestions.html").read_text()


def test_the_estimate_is_of_single_copies(tiny_run, tmp_path):
    """Also where a prediction is the mean over several, which agrees with itself."""
    workdir, _ = tiny_run
    (found,) = suggest.suggest(workdir, tmp_path / "s", draws=2)
    prepared, _ = find_prepared(json.loads((workdir / "config.json").read_text()))
    entry = prepared.volumes[found.volume_id]
    image, _ = prepared.read_slices(entry.slices)
    model = model_files.load_run(workdir)
    plain, averaged = (
        quality_gate.expected_dice(
            np.random.default_rng((0, entry.first_slice)),
            predict.mean_predictor([m]),
            image,
            draws=2,
            flips=True,
        )
        for m in (model._replace(angles=()), model)
    )
    assert found.expected_dice == pytest.approx(plain)
    assert averaged != pytest.approx(plain)


def test_volumes_are_predicted_as_the_model_says(tiny_run):
    workdir, results = tiny_run
    (volume_id,) = results["volumes"]["unlabeled"]
    model = model_files.load_run(workdir)
    prepared, _ = find_prepared(json.loads((workdir / "config.json").read_text()))
    network = predict.mean_predictor([model])
    image, _ = prepared.read_slices(prepared.volumes[volume_id].slices)
    plain, spacing_mm = network(image), prepared.read_native(volume_id).spacing_mm[2]
    found = suggest.predict_volume(network, model, prepared, volume_id)
    smoothed = smooth_across_slices(plain, spacing_mm, 8.0)
    expected = upsampled_dense_crf(image, smoothed, upsampling=2, **model.crf)
    np.testing.assert_allclose(found.probs, expected, atol=1e-5)
    assert np.abs(found.probs[:, ::2, ::2] - plain).max() > 0.01
    np.testing.assert_allclose(found.network, plain, atol=1e-6)


def test_masks_keep_the_largest_component(tiny_run, tmp_path):
    """Of the classes that the run says: RV here, not MYO; each in a corner, too."""
    workdir, results = tiny_run
    (volume_id,) = results["volumes"]["unlabeled"]
    model = model_files.load_run(workdir)._replace(largest_component=(1,))
    prepared, _ = find_prepared(json.loads((workdir / "config.json").read_text()))

    def network(images):
        label = np.zeros(images.shape, int)
        for k, row in ((1, 8), (2, 18)):
            label[:, row : row + 6, 10:20] = label[:, row : row + 3, 24:27] = k
        return np.eye(4, dtype=np.float32)[label]

    suggest.write_masks(network, model, prepared, [volume_id], {}, tmp_path)
    mask = np.asarray(nib.load(tmp_path / f"{volume_id}.nii.gz").dataobj)
    pieces = [ndimage.label(mask == k)[1] for k in (1, 2)]
    assert pieces == [1, 2]


def test_a_corrected_mask_is_learnt_from(loop, suggested, tmp_path):
    """The next run keeps every role, learns from the new mask and starts from the weights."""
    folder, data_dir, workdir, before = loop
    new = suggested[1][0].volume_id
    shutil.copytree(folder, tmp_path / "files", copy_function=shutil.copy2)
    shutil.copy(
        suggested[0] / "masks" / f"{new}.nii.gz", tmp_path / "files" / "labels" / f"{new}.nii.gz"
    )
    config = config_of(tmp_path / "files", data_dir, start_from=str(workdir), baseline_steps=2)
    whole, text = own_data.complete(config)
    assert f"1 new masks to learn from: {new}" in text
    run = start_run(whole, tmp_path / "run")
    with run.lock:
        state, source = train.first_state(run), model_files.load_run(workdir)
    for ours, theirs in (
        (state.ema_params, source.state.ema_params),
        (state.batch_stats, source.state.batch_stats),
    ):
        # What predicts; a model that is handed out has no other head.
        same = {name: ours[name] for name in theirs}
        jax.tree.map(np.testing.assert_array_equal, same, dict(theirs))

    results = train.train_and_evaluate(config, tmp_path / "run")
    volumes = results["volumes"]
    assert set(volumes["labeled"]) == {*before["volumes"]["labeled"], new}
    assert set(volumes["unlabeled"]) == {*before["volumes"]["unlabeled"]} - {new}
    for role in ("validation", "test"):
        assert volumes[role] == before["volumes"][role]


def write_source(folder, **data):
    folder.mkdir(parents=True)
    known = {"name": "nifti_folder", "labeled": ["a"], "validation": ["b"], "test": ["c"]}
    text = json.dumps({"data": known | {"with_mask": ["a", "b", "c", "d"]} | data})
    (folder / "config.json").write_text(text)
    return str(folder)


NONE_GIVEN = dict.fromkeys(("labeled", "unlabeled", "validation", "test"), ())


def test_roles_are_kept(tmp_path):
    """d had a mask before and learnt nothing; e has got one since."""
    source = write_source(tmp_path / "run")
    kept, notes = roles.keep_roles(source, set("abcde"), NONE_GIVEN, -1)
    assert kept == NONE_GIVEN | {"labeled": ("a", "e"), "validation": ("b",), "test": ("c",)}
    assert notes == [f"roles as in {source}; 1 new masks to learn from: e"]
    kept, _ = roles.keep_roles(source, set("abcde"), NONE_GIVEN | {"labeled": ("d",)}, 0)
    assert kept == NONE_GIVEN | {"labeled": ("d",), "test": ("c",)}
    for other in (
        write_source(tmp_path / "set", name="acdc"),
        write_source(tmp_path / "cases", test=["z"]),
        str(tmp_path / "nothing"),
        "",
    ):
        assert roles.keep_roles(other, set("abcde"), NONE_GIVEN, -1) == (NONE_GIVEN, [])


def test_roles_of_an_older_run(tmp_path):
    path = Path(write_source(tmp_path / "run")) / "config.json"
    content = json.loads(path.read_text())
    del content["data"]["with_mask"]
    path.write_text(json.dumps(content))
    with pytest.raises(SplitError, match=r"config\.json does not tell which cases had a mask"):
        roles.keep_roles(str(path.parent), set("abcde"), NONE_GIVEN, -1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.model.update(filters=(4, 8)), r"model.filters \[4, 4\], this one \[4, 8\]"),
        (lambda c: c.rounds.update(start_from="/nowhere"), "found no run in /nowhere"),
        (lambda c: c.rounds.update(baseline_from="/x"), "are both set; wanted one"),
        (lambda c: c.data.update(class_names=("x", "y")), "has the classes class_3, class_300"),
    ],
)
def test_weights_that_do_not_fit(loop, tmp_path, change, message):
    """Refused before the workdir is touched."""
    folder, data_dir, workdir, _ = loop
    config = config_of(folder, data_dir, start_from=str(workdir))
    change(config)
    with pytest.raises(ConfigError, match=message):
        train.train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_weights_for_images_of_more_channels(loop):
    folder, data_dir, workdir, _ = loop
    source = start_from.read_source(config_of(folder, data_dir, start_from=str(workdir)))
    prepared = PreparedSet("x", {}, None, preprocess.from_json(source.preprocessing, "x"))
    start_from.check_source(source, prepared, None, networks=1)
    two = source._replace(preprocessing=source.preprocessing | {"channels": [0, 1]})
    with pytest.raises(
        ConfigError, match=r"has images of 2 channel\(s\), this one of 1; wanted as"
    ):
        start_from.check_source(two, prepared, None, networks=1)


def test_no_volume_is_tested_on_that_the_weights_know(loop, tmp_path):
    folder, data_dir, workdir, results = loop
    volumes = results["volumes"]
    config = config_of(folder, data_dir, start_from=str(workdir))
    config.data.update(labeled=tuple(volumes["test"]), test=tuple(volumes["labeled"]))
    with pytest.raises(
        ConfigError, match=f"learnt from the masks of {volumes['labeled'][0]}.*test"
    ):
        train.train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
