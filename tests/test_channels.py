"""Images of several channels: from the files to a run, its report, export and prediction."""

import json
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest

from lclseg import augment, export, model_files, predict, quality_gate, report, train
from lclseg.models import UNet

ROOT = Path(__file__).parents[1]
SHAPE = (32, 32, 3)


def write_case(root, name, seed, *, labelled):
    rng = np.random.default_rng(seed)
    label = np.zeros(SHAPE, np.uint8)
    label[10:20, 8 + seed : 18 + seed] = 1
    for number, sign in ((0, 1), (1, -1)):
        path = root / "imagesTr" / f"{name}_{number:04d}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = rng.normal(0, 1, SHAPE) + 3.0 * sign * label
        nib.save(nib.Nifti1Image(image.astype(np.float32), np.diag([1, 1, 4, 1.0])), path)
    if labelled:
        path = root / "labelsTr" / f"{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(label, np.diag([1, 1, 4, 1.0])), path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder of the data, workdir) of a finished run on two channels, with CRF and a round."""
    place = tmp_path_factory.mktemp("channels")
    for n, name in enumerate("abcde"):
        write_case(place / "data", name, n, labelled=n < 3)
    config = runpy.run_path(str(ROOT / "configs" / "nifti_folder.py"))["get_config"](
        "local_contrastive"
    )
    data = config.data
    data.update(manual_dir=str(place / "data"), data_dir=str(place / "sets"), num_labeled="1")
    data.labeled_batch_size = 4
    config.method.pairs.update(labeled_self=1, pseudo_self=1, labeled_pseudo=1, pseudo_pseudo=1)
    config.model.filters = (4, 8)
    config.augment.strength = "paper"  # compiled in half the time
    config.crf.num_steps = 1
    config.optimizer.update(ema_decay=0.0, learning_rate=0.01)
    config.rounds.update(baseline_steps=20, steps_per_round=2, num_rounds=1, eval_every=2)
    config.rounds.batch_norm_batches = 0
    train.train_and_evaluate(config, place / "run")
    return place / "data", place / "run"


def test_a_run_uses_both(run):
    model = model_files.load_run(run[1])
    assert model.preprocessing.channels == (0, 1)
    kernels = jax.tree.leaves(model.state.ema_params["unet_trunk"])
    assert any(k.ndim == 4 and k.shape[2] == 2 for k in kernels)
    images = np.random.default_rng(0).random((2, 32, 32, 2), np.float32)
    predicted = predict.mean_predictor([model])
    swapped = images.copy()
    swapped[..., 1] = 0
    assert np.abs(predicted(images) - predicted(swapped)).max() > 1e-4


def test_the_page_shows_the_first(run):
    report.write_own_page(run[1], None)
    page = (run[1] / "report.html").read_text()
    assert "Dice" in page and json.loads((run[1] / "preprocessing.json").read_text())["channels"]


def test_an_exported_model_takes_both(run, tmp_path):
    model = model_files.load_run(run[1])
    export.write_model(model, tmp_path / "model")
    read = export.read_model(tmp_path / "model")
    assert "* channels 0, 1 of a case" in (tmp_path / "model" / "README.md").read_text()
    images = np.random.default_rng(0).random((2, 32, 32, 2), np.float32)
    np.testing.assert_allclose(
        predict.mean_predictor([read])(images), predict.mean_predictor([model])(images), atol=1e-6
    )
    predict.predict_files([tmp_path / "model"], run[0] / "imagesTr", tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [f"{n}.nii.gz" for n in "abcde"]


def test_augmentation_moves_channels_alike_and_jitters_each():
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.random((24, 20, 2)), jnp.float32)
    label = jnp.asarray(rng.integers(0, 3, (24, 20)))
    still = {"contrast_range": (1.0, 1.0), "max_brightness": 0.0}
    key = jax.random.key(3)
    moved, mask = augment.augment_slice(key, image, label, **still)
    for k in range(2):
        alone, alone_mask = augment.augment_slice(key, image[..., k], label, **still)
        np.testing.assert_allclose(moved[..., k], alone, atol=1e-6)
        np.testing.assert_array_equal(mask, alone_mask)
    view = augment.augment_view(key, image, clip=(-9.0, 9.0))
    factors = [np.polyfit(np.ravel(image[..., k]), np.ravel(view[..., k]), 1)[0] for k in range(2)]
    assert abs(factors[0] - factors[1]) > 1e-3
    assert all(0.7 <= f <= 1.3 for f in factors)


def test_the_gate_moves_channels_alike():
    slices = np.random.default_rng(0).random((2, 9, 11, 2))
    matrix = np.array([[0.9, -0.3], [0.3, 0.9]])
    moved = quality_gate.move_slices(slices, matrix)
    for k in range(2):
        np.testing.assert_allclose(
            moved[..., k], quality_gate.move_slices(slices[..., k], matrix), atol=1e-12
        )


def test_one_channel_is_what_it_was():
    unet = UNet(num_classes=3, filters=(4, 8))
    images = jnp.asarray(np.random.default_rng(0).random((2, 16, 16)), jnp.float32)
    variables = unet.init(jax.random.key(0), images, train=False)
    logits = unet.apply(variables, images, train=False)["segmentation"]
    same = unet.apply(variables, images[..., None], train=False)["segmentation"]
    np.testing.assert_array_equal(logits, same)
