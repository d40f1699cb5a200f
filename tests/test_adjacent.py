"""Slices seen with those beside them: the channels, and a run, its export and its predictions."""

import json
import runpy
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest

from lclseg import augment, export, model_files, predict, train
from lclseg.data import adjacent, preprocess
from lclseg.data.dataset import PreparedSet, VolumeEntry
from lclseg.data.preprocess import Preprocessing
from lclseg.errors import ConfigError
from lclseg.run.start_from import Source, check_source

ROOT = Path(__file__).parents[1]
SHAPE = (32, 32, 4)
CHANNELS = 2
INPUTS = 3 * CHANNELS  # of a slice, the one below and the one above


def slow(images, n):
    """Slice by slice: [S, H, W, K] -> [S, H, W, (1 + 2 n) K]."""
    last = len(images) - 1
    found = []
    for s in range(len(images)):
        channels = [images[s]]
        for k in range(1, n + 1):
            channels += [images[max(s - k, 0)], images[min(s + k, last)]]
        found.append(np.concatenate(channels, axis=-1))
    return np.array(found)


@pytest.mark.parametrize("number", [1, 2, 5])
@pytest.mark.parametrize("slices", [1, 2, 7])
def test_a_slice_is_followed_by_those_below_and_above(slices, number):
    images = np.random.default_rng(0).random((slices, 5, 4, 2), np.float32)
    np.testing.assert_array_equal(adjacent.of_volume(images, number), slow(images, number))
    one = images[..., 0]
    np.testing.assert_array_equal(adjacent.of_volume(one, number), slow(one[..., None], number))
    assert adjacent.of_volume(one, 0) is one


def test_records_are_read_with_those_beside_them_in_their_volume():
    rng = np.random.default_rng(1)
    lengths = {"b": 3, "a": 1, "c": 4}  # in stored order
    images = rng.random((sum(lengths.values()), 4, 4), np.float32)
    entries, first = {}, 0
    for name, length in lengths.items():
        entries[name] = VolumeEntry(name, name, True, first, np.ones((length, 2), int))
        first += length

    def read(indices):
        return [{"image": images[i], "label": np.full((4, 4), i, np.uint8)} for i in indices]

    how = Preprocessing(("a",), (1,), False, 4, 1.0, 0, None, adjacent_slices=1)
    prepared = PreparedSet("fake", entries, types.SimpleNamespace(__getitems__=read), how)
    expected = np.concatenate(
        [slow(images[list(e.slices), ..., None], 1) for e in entries.values()]
    )
    for records in ([0], [7, 2, 2, 3, 4], range(8)):
        found, labels = prepared.read_slices(records)
        np.testing.assert_array_equal(found, expected[list(records)])
        np.testing.assert_array_equal(labels[:, 0, 0], list(records))


@pytest.mark.parametrize(
    "change",
    [
        augment.strong_intensity,
        lambda *a, **k: augment.jitter_intensity(
            *a, contrast_range=(0.5, 2), max_brightness=1, **k
        ),
        lambda *a, **k: augment.augment_view(*a, clip=(-9.0, 9.0), **k),
    ],
    ids=["strong", "paper", "view"],
)
def test_slices_side_by_side_are_changed_alike_and_channels_are_not(change):
    slices = np.random.default_rng(2).random((1, 12, 12, CHANNELS)).astype(np.float32)
    slices[..., 1] = slices[..., 0]
    same = jnp.asarray(adjacent.of_volume(slices, 1)[0])  # six times one image
    found = np.asarray(change(jax.random.key(0), same, num_slices=3)).reshape(12, 12, 3, CHANNELS)
    for k in range(1, 3):
        np.testing.assert_allclose(found[:, :, k], found[:, :, 0], atol=1e-5)
    assert np.abs(found[:, :, 0, 0] - found[:, :, 0, 1]).max() > 0.05
    # As a slice alone is.
    alone = change(jax.random.key(0), jnp.asarray(slices[0]))
    np.testing.assert_allclose(found[:, :, 0], alone, atol=1e-5)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder of the data, workdir) of a finished run on two channels, one slice either side."""
    place = tmp_path_factory.mktemp("adjacent")
    rng = np.random.default_rng(3)
    for number, name in enumerate("abcde"):
        label = np.zeros(SHAPE, np.uint8)
        label[10:20, 8 + number : 18 + number] = 1
        affine = np.diag([1, 1, 2, 1.0])
        for channel in range(CHANNELS):
            path = place / "data" / "imagesTr" / f"{name}_{channel:04d}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = rng.normal(0, 1, SHAPE) + 2.0 * (1 - 2 * channel) * label
            nib.save(nib.Nifti1Image(image.astype(np.float32), affine), path)
        path = place / "data" / "labelsTr" / f"{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(label, affine), path)
    config = runpy.run_path(str(ROOT / "configs" / "nifti_folder.py"))["get_config"]()
    config.data.update(manual_dir=str(place / "data"), data_dir=str(place / "sets"))
    config.data.update(labeled=("a",), validation=("b",), test=("c", "d"), unlabeled=("e",))
    config.data.update(labeled_batch_size=4, unlabeled_batch_size=4, adjacent_slices=1)
    config.augment.strength = "paper"  # compiled in half the time
    config.model.filters = (4, 8)
    config.optimizer.update(ema_decay=0.0, learning_rate=0.01)
    config.rounds.update(baseline_steps=20, steps_per_round=4, refresh_every=2, eval_every=4)
    train.train_and_evaluate(config, place / "run")
    return place / "data", place / "run"


def test_a_run_sees_the_slices_beside(run):
    model = model_files.load_run(run[1])
    assert model.preprocessing.num_channels == INPUTS
    images = np.random.default_rng(0).random((4, 32, 32, INPUTS), np.float32)
    predicted = predict.mean_predictor([model])
    for k in range(INPUTS):
        other = images.copy()
        other[..., k] = 0
        assert np.abs(predicted(images) - predicted(other)).max() > 1e-4


def test_files_are_predicted_as_the_run_predicts_its_own(run, tmp_path):
    stage = model_files.load_run(run[1]).facts["stage"]
    inputs = tmp_path / "in"
    inputs.mkdir()
    for case in "cd":
        for channel in range(CHANNELS):
            path = run[0] / "imagesTr" / f"{case}_{channel:04d}.nii.gz"
            (inputs / path.name).symlink_to(path)
    export.write_model(model_files.load_run(run[1]), tmp_path / "model")
    assert "* each slice with 1 on either side" in (tmp_path / "model" / "README.md").read_text()
    for source in (run[1], tmp_path / "model"):
        out = tmp_path / f"of_{source.name}"
        predict.predict_files([source], inputs, out, largest="no")
        for case in "cd":
            found = nib.load(out / f"{case}.nii.gz").get_fdata()
            expected = nib.load(run[1] / "predictions" / stage / f"{case}.nii.gz").get_fdata()
            assert expected.any()
            np.testing.assert_array_equal(found, expected)


def test_a_run_of_before_has_no_slices_beside(run):
    path = run[1] / "preprocessing.json"
    content = json.loads(path.read_text())
    assert preprocess.from_json(content, "x").adjacent_slices == 1
    del content["adjacent_slices"]
    assert preprocess.from_json(content, "x").adjacent_slices == 0
    with pytest.raises(ValueError, match=r"x: adjacent_slices is -1; wanted 0\.\.8"):
        preprocess.from_json(content | {"adjacent_slices": -1}, "x")


def test_weights_of_a_network_for_other_channels_are_refused(run):
    content = json.loads((run[1] / "preprocessing.json").read_text())
    how = preprocess.from_json(content, "x")._replace(adjacent_slices=0)
    prepared = PreparedSet("fake", {}, None, how)
    source = Source(run[1], {"data": {"name": "nifti_folder"}}, content, {"labeled": []})
    with pytest.raises(ConfigError, match="has slices of 6 channels, this one of 2; wanted as"):
        check_source(source, prepared, None, networks=1)
