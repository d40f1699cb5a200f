"""docs/extending.md: every block of its code works as it stands."""

import importlib
import re
import runpy
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest

import lclseg.methods
import tfds_builders
from lclseg import losses, train
from lclseg.data.dataset import open_prepared

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)


def block(title):
    """The block of code that begins with a comment of this title."""
    (found,) = [b for b in BLOCKS if b.startswith(f"# {title}")]
    return found


def test_every_block_is_tested_here():
    titles = sorted(b.splitlines()[0] for b in BLOCKS)
    assert [t.removeprefix("# ").split(",")[0] for t in titles] == [
        "configs/methods/entropy.py",
        "focal loss",
        "lclseg/methods/entropy.py",
        "tfds_builders/toy/toy_dataset_builder.py",
    ]


@pytest.fixture
def entropy_configs(tmp_path, monkeypatch):
    """A copy of configs/ with the new method; the method itself is importable."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "configs" / "methods" / "entropy.py").write_text(block("configs/methods/entropy"))
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "entropy.py").write_text(block("lclseg/methods/entropy"))
    monkeypatch.setattr(
        lclseg.methods, "__path__", [*lclseg.methods.__path__, str(tmp_path / "methods")]
    )
    return tmp_path / "configs"


def test_the_new_method_trains(entropy_configs, tmp_path, monkeypatch):
    from tfds_builders.phantom import phantom_dataset_builder as phantom

    config = runpy.run_path(str(entropy_configs / "phantom.py"))["get_config"]("entropy")
    data = config.data
    data.data_dir = str(tmp_path / "data")
    data.image_size, data.target_spacing_mm = 32, 4.0
    data.labeled, data.unlabeled = ("phantom_000",), ("phantom_001",)
    data.validation, data.test = ("phantom_002",), ("phantom_003",)
    data.labeled_batch_size = data.unlabeled_batch_size = 4
    config.model.filters = (4, 8)
    config.augment.strength = "paper"  # compiled in half the time
    config.log.every = 2
    config.rounds.update(baseline_steps=2, num_rounds=2, steps_per_round=2, eval_every=4)
    cases = phantom.find_cases(4)
    monkeypatch.setattr(phantom, "find_cases", lambda: cases)
    results = train.train_and_evaluate(config, tmp_path / "run")["results"]
    assert list(results) == ["baseline", "joint"]
    assert results["joint"]["num_steps"] == 4
    assert '"entropy":' in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_the_entropy_is_what_it_says(entropy_configs):
    module = importlib.import_module("lclseg.methods.entropy")
    even, sure = jnp.zeros((1, 2, 2, 4)), jnp.full((1, 2, 2, 4), 0.0).at[..., 1].set(50.0)
    np.testing.assert_allclose(
        module.entropy(jnp.concatenate([even, sure])), [np.log(4), 0.0], atol=1e-6
    )


def test_the_new_loss():
    content = {}
    exec(block("focal loss"), content)
    focal_loss = content["focal_loss"]
    key = jax.random.key(0)
    logits = jax.random.normal(key, (2, 4, 4, 3))
    labels = jax.random.randint(key, (2, 4, 4), 0, 3).at[0, 0].set(losses.IGNORE)
    plain = losses.cross_entropy_loss(logits, labels, class_weights=jnp.ones(3))
    np.testing.assert_allclose(focal_loss(logits, labels, gamma=0.0), plain, rtol=1e-5)
    assert (focal_loss(logits, labels) < plain).all()
    nothing = jnp.full_like(labels, losses.IGNORE)
    assert not focal_loss(logits, nothing).any()
    assert np.isfinite(jax.grad(lambda z: focal_loss(z, nothing).sum())(logits)).all()


def test_the_new_data_set(tmp_path, monkeypatch):
    package = tmp_path / "builders" / "toy"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "toy_dataset_builder.py").write_text(block("tfds_builders/toy"))
    monkeypatch.setattr(
        tfds_builders, "__path__", [*tfds_builders.__path__, str(tmp_path / "builders")]
    )
    files = tmp_path / "files"
    files.mkdir()
    rng = np.random.default_rng(0)
    affine = np.diag([1.0, 1.0, 5.0, 1.0])
    for case in ("a", "b"):
        label = np.zeros((20, 20, 3), np.uint8)
        label[5:15, 6:14] = 1
        image = (label * 100 + rng.normal(0, 5, label.shape)).astype(np.float32)
        nib.save(nib.Nifti1Image(image, affine), files / f"{case}.nii.gz")
        nib.save(nib.Nifti1Image(label, affine), files / f"{case}_gt.nii.gz")
    prepared = open_prepared(
        "toy",
        image_size=32,
        target_spacing_mm=1.0,
        data_dir=str(tmp_path / "data"),
        manual_dir=str(files),
    )
    assert list(prepared.volumes) == ["a", "b"]
    assert prepared.class_names == ("organ",)
    _, label = prepared.read_slices([0])
    assert label.sum() == 80
