"""A model as a folder: it predicts as the run does, runs no code, and is refused where damaged."""

import json
import pickle
import shutil
import zipfile

import jax
import numpy as np
import pytest

from lclseg import export, model_files, predict
from lclseg.model_files import ModelError
from lclseg.run import devices


@pytest.fixture(scope="module")
def model(tiny_run):
    return model_files.load_run(tiny_run[0])


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "new" / "model"
    export.write_model(model, folder)
    return folder


@pytest.fixture
def copy(exported, tmp_path):
    """A folder that a test may damage."""
    return shutil.copytree(exported, tmp_path / "model")


def change(folder, **values):
    """Sets values of model.json, named by their path: `preprocessing__channel=3`."""
    path = folder / "model.json"
    content = json.loads(path.read_text())
    for name, value in values.items():
        *groups, key = name.split("__")
        inner = content
        for group in groups:
            inner = inner[group]
        inner[key] = value
    path.write_text(json.dumps(content))


def leaves_of(folder):
    with np.load(folder / "parameters.npz", allow_pickle=False) as file:
        return dict(file)


def test_folder_reads_back_to_the_bit(model, exported):
    assert sorted(p.name for p in exported.iterdir()) == [
        "README.md",
        "model.json",
        "parameters.npz",
    ]
    again = export.read_model(exported)
    assert again.preprocessing == model.preprocessing
    assert again.angles == model.angles == pytest.approx(np.deg2rad([15, -15]))
    assert again.crf == model.crf and model.crf["bilateral_sigma"] == 1.0
    assert again.crf_upsampling == model.crf_upsampling == 2
    assert again.through_plane_sigma == model.through_plane_sigma == 8.0
    assert (again.architecture, again.batch_size, again.facts) == (
        model.architecture,
        model.batch_size,
        model.facts,
    )
    assert_same_leaves(again.state, model.state)


def assert_same_leaves(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


def test_folders_of_older_versions_stay_readable(copy):
    """Version 6 knows one grid for the CRF, version 5 no smoothing, 4 no CRF, and so on."""
    path = copy / "model.json"
    content = json.loads(path.read_text())
    assert content.pop("crf_upsampling") == 2
    path.write_text(json.dumps(content | {"version": 6}))
    model = export.read_model(copy)
    assert model.crf_upsampling == 1 and model.crf and model.through_plane_sigma == 8
    assert content.pop("through_plane_sigma") == 8
    path.write_text(json.dumps(content | {"version": 5}))
    model = export.read_model(copy)
    assert model.through_plane_sigma == 0 and model.crf
    assert content.pop("crf")
    path.write_text(json.dumps(content | {"version": 4}))
    model = export.read_model(copy)
    assert model.crf == {} and len(model.angles) == 2
    assert content.pop("angles")
    path.write_text(json.dumps(content | {"version": 3}))
    model = export.read_model(copy)
    assert model.angles == () and export.kept_largest(model) == content["largest_component"] != []
    del content["largest_component"]
    path.write_text(json.dumps(content | {"version": 2}))
    assert export.read_model(copy).largest_component == ()


def test_largest_components_are_read_back(model, tmp_path):
    """All together, then MYO, which the run itself does not choose."""
    export.write_model(model._replace(largest_component=((1, 2, 3), 2)), tmp_path / "model")
    content = json.loads((tmp_path / "model" / "model.json").read_text())
    assert content["largest_component"] == ["RV + MYO + LV", "MYO"]
    assert export.read_model(tmp_path / "model").largest_component == ((1, 2, 3), 2)


def test_only_what_predicts_is_exported(exported):
    """The run's method, the paper's, has a projection head."""
    parts = {tuple(name.split("/")[:2]) for name in leaves_of(exported)}
    kinds, modules = ("params", "batch_stats"), ("unet_trunk", "segmentation_head")
    assert parts == {(kind, module) for kind in kinds for module in modules}


def test_it_predicts_as_the_run_does(model, exported):
    (loaded,) = predict.load_models([exported])
    images = np.random.default_rng(0).random((5, 32, 32), np.float32)
    np.testing.assert_array_equal(
        predict.mean_predictor([loaded])(images), predict.mean_predictor([model])(images)
    )


def test_run_and_export_together(tiny_run, exported):
    assert len(predict.load_models([tiny_run[0], exported])) == 2


def test_it_needs_nothing_of_the_run(exported, tmp_path):
    """Neither its folder nor patients' ids are in it."""
    text = (exported / "model.json").read_text() + (exported / "README.md").read_text()
    assert "phantom_0" not in text and str(tmp_path.parent) not in text
    assert not any(value.dtype.hasobject for value in leaves_of(exported).values())


def test_model_card(tiny_run, model, exported):
    card = (exported / "README.md").read_text()
    test = tiny_run[1]["results"][model.facts["stage"]]["test"]
    assert "SYNTHETIC" in card and "1 labelled" in card and "2 validation volumes" in card
    assert f"Validation Dice {model.facts['validation_dice']:.4f}" in card
    assert f"Test, 2 volumes, 3-D, native geometry: mean Dice {test['mean_dice']:.4f}" in card
    # Each with and without, as this run keeps the largest component.
    kept = test["largest_component"]
    assert model_files.kept_largest(model)
    assert f"largest component of {', '.join(model_files.kept_largest(model))}: mean Dice" in card
    for k, (name, value) in enumerate(test["dice_per_class"].items(), start=1):
        assert f"| {name} | {k} | {value:.4f} | {kept['dice_per_class'][name]:.4f} |\n" in card
    assert "copies of it, turned by\n15, -15 degrees." in card
    assert "copies" not in export.model_card(model._replace(angles=()))
    assert "CRF" in card and "CRF" not in export.model_card(model._replace(crf={}))
    assert "smoothed across slices, by a Gaussian of 8 mm." in card
    assert "smoothed" not in export.model_card(model._replace(through_plane_sigma=0.0))
    for heading in ("Intended use", "Limits", "Licence"):
        assert f"## {heading}" in card


def test_model_card_of_an_untested_model(model):
    facts = model.facts | {"test": None, "num_volumes": None, "stage": "baseline"}
    how = model.preprocessing._replace(channel=1, n4_shrink_factor=4)
    card = export.model_card(model._replace(facts=facts, preprocessing=how))
    assert "has not been tested" in card
    assert "* channel 1 of 4-D files\n* N4 bias-field correction\n* intensities" in card
    assert "trained by lclseg, supervised." in card


def test_model_card_of_a_model_that_keeps_every_component(model):
    """The run has tested largest components, too; that is not how this model predicts."""
    card = export.model_card(model._replace(largest_component=()))
    assert "largest component" not in card and model.facts["test"]["largest_component"]
    value = model.facts["test"]["dice_per_class"]["RV"]
    assert "| class | label value | test Dice |\n|" in card
    assert f"| RV | 1 | {value:.4f} |\n" in card


@pytest.mark.parametrize(
    "values, message",
    [
        ({"format": "other"}, "format is 'other'"),
        ({"version": 8, "news": 1}, r"version is 8; wanted 2 to 7"),
        ({"version": 1}, r"version is 1; wanted 2 to 7"),
        ({"version": True}, "version is True"),
        ({"news": 1}, "found 'news', which this version does not know"),
        ({"batch_size": 10**9}, r"batch_size is 1000000000; wanted 1\.\.4096"),
        ({"largest_component": "RV"}, "largest_component is 'RV'; wanted a list"),
        ({"largest_component": ["RV", "LA"]}, "wanted a list of some of the classes RV, MYO, LV"),
        ({"largest_component": ["RV", "RV"]}, r"largest_component is \['RV', 'RV'\]"),
        ({"largest_component": [1]}, r"largest_component is \[1\]; wanted a list of some"),
        ({"angles": [1, "2"]}, r"angles is \[1, '2'\]; wanted a list of up to 64 numbers"),
        ({"angles": [0.0] * 65}, "angles is"),
        ({"crf": []}, r"crf is \[\]; wanted {}, or an object of num_steps, spatial_sigma, "),
        ({"crf": {"num_steps": 1}}, "crf is {'num_steps': 1}; wanted"),
        ({"crf__num_steps": 10**9}, "crf is "),
        ({"crf__num_steps": 1.5}, "crf is "),
        ({"crf__intensity_sigma": 0}, "crf is "),
        ({"crf__spatial_weight": "1"}, "crf is "),
        ({"crf_upsampling": 0}, "crf_upsampling is 0; wanted 1 to 8, whole"),
        ({"crf_upsampling": 10**9}, "crf_upsampling is 1000000000"),
        ({"through_plane_sigma": -1}, "through_plane_sigma is -1; wanted a number of mm, 0 to"),
        ({"through_plane_sigma": "1"}, "through_plane_sigma is '1'"),
        ({"through_plane_sigma": 10**9}, "through_plane_sigma is 1000000000"),
        ({"facts": {}}, "facts is {}"),
        ({"architecture__filters": [4, "8"]}, r"filters is \[4, '8'\]"),
        ({"architecture__filters": [4] * 7}, "wanted a multiple of 64"),
        ({"architecture__dtype": "object"}, "dtype is 'object'; wanted float32 or bfloat16"),
        ({"preprocessing__orientation": "RRS"}, "orientation is 'RRS'; wanted three letters"),
        ({"preprocessing__percentiles": [0, 100]}, "percentiles is"),
        ({"preprocessing__image_size": -32}, "image_size is -32"),
        ({"preprocessing__target_spacing_mm": float("nan")}, "target_spacing_mm is nan"),
        ({"preprocessing__label_values": [1, 2]}, "3 class_names and 2 label_values"),
        ({"preprocessing__label_values": [1, 2, 2]}, "label_values is"),
        ({"preprocessing__class_names": ["RV", "MYO", 3]}, "class_names is"),
        ({"preprocessing": []}, r"preprocessing is \[\]; wanted an object"),
    ],
    ids=str,
)
def test_values_that_are_refused(copy, values, message):
    change(copy, **values)
    with pytest.raises(ModelError, match=message) as error:
        export.read_model(copy)
    assert str(error.value).startswith(str(copy / "model.json"))


@pytest.mark.parametrize(
    "key",
    [
        "version",
        "batch_size",
        "preprocessing",
        "architecture",
        "angles",
        "crf",
        "crf_upsampling",
        "through_plane_sigma",
    ],
)
def test_values_that_are_missing(copy, key):
    path = copy / "model.json"
    content = json.loads(path.read_text())
    del content[key]
    path.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=f"{key} is missing"):
        export.read_model(copy)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "[" * 100_000, " " * 2**21])
def test_model_json_that_is_none(copy, text):
    (copy / "model.json").write_text(text)
    with pytest.raises(ModelError, match=r"model\.json: "):
        export.read_model(copy)


def without_leaf(leaves):
    del leaves["params/unet_trunk/ConvBlock_0/Conv_0/kernel"]


def with_leaf(leaves):
    leaves["params/extra"] = np.zeros(3, np.float32)


def with_shape(leaves):
    leaves["batch_stats/unet_trunk/ConvBlock_0/BatchNorm_0/mean"] = np.zeros((5,), np.float32)


def with_type(leaves):
    leaves["batch_stats/unet_trunk/ConvBlock_0/BatchNorm_0/mean"] = np.zeros((4,), np.float64)


def with_nan(leaves):
    leaves["batch_stats/unet_trunk/ConvBlock_0/BatchNorm_0/mean"][0] = np.nan


@pytest.mark.parametrize(
    "damage, message",
    [
        (without_leaf, r"params/unet_trunk/ConvBlock_0/Conv_0/kernel is missing"),
        (with_leaf, r"params/extra has no place"),
        (with_shape, r"mean is float32 of shape \(5,\); wanted float32 of shape \(4,\)"),
        (with_type, r"mean is float64 of shape \(4,\); wanted float32"),
        (with_nan, "mean has NaN or infinite"),
    ],
)
def test_leaves_that_are_refused(copy, damage, message):
    leaves = leaves_of(copy)
    damage(leaves)
    np.savez(copy / "parameters.npz", **leaves)
    with pytest.raises(ModelError, match=message):
        export.read_model(copy)


def test_weights_of_another_architecture(copy):
    change(copy, architecture__filters=[4, 16])
    with pytest.raises(ModelError, match="by the architecture in model.json"):
        export.read_model(copy)


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("code from the folder was run",)


def test_no_code_is_run(copy):
    """Pickles, as an object array among the leaves, as the leaf file, as another file."""
    leaves = leaves_of(copy)
    name = "batch_stats/unet_trunk/ConvBlock_0/BatchNorm_0/mean"
    leaves[name] = np.array([Bomb()] * 4, object)
    np.savez(copy / "parameters.npz", **leaves)
    (copy / "model.pkl").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ModelError, match="mean is object of shape"):
        export.read_model(copy)
    (copy / "parameters.npz").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ModelError, match="not readable"):
        export.read_model(copy)


def test_an_absurd_leaf_is_refused_unread(copy):
    """A header that asks for a terabyte."""
    path = copy / "parameters.npz"
    name = "batch_stats/unet_trunk/ConvBlock_0/BatchNorm_0/mean"
    leaves = leaves_of(copy)
    del leaves[name]
    np.savez(path, **leaves)
    with zipfile.ZipFile(path, "a") as archive, archive.open(f"{name}.npy", "w") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (2**38,)}
        np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(ModelError, match=r"of shape \(274877906944,\); wanted"):
        export.read_model(copy)


@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.99])
def test_truncated_weights(copy, kept):
    content = (copy / "parameters.npz").read_bytes()
    length = int(kept * len(content)) if isinstance(kept, float) else kept
    (copy / "parameters.npz").write_bytes(content[:length])
    with pytest.raises(ModelError, match=r"parameters\.npz: not readable"):
        export.read_model(copy)


def test_flipped_bits_are_noticed(copy):
    content = bytearray((copy / "parameters.npz").read_bytes())
    content[len(content) // 2] ^= 16
    (copy / "parameters.npz").write_bytes(content)
    with pytest.raises(ModelError, match=r"parameters\.npz"):
        export.read_model(copy)


def test_the_command(tiny_run, model, exported, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(devices, "set_up_jax", lambda devices: None)
    output = tmp_path / "model"
    export.main(["--workdir", str(tiny_run[0]), "--output", str(output)])
    assert str(output) in capsys.readouterr().out
    for name in ("model.json", "README.md"):
        assert (output / name).read_text() == (exported / name).read_text()
    for workdir, message in (
        (tiny_run[0], "not an empty folder; choose another"),
        (output, "is an exported model already"),
        (tmp_path / "nowhere", "neither config.json nor model.json"),
    ):
        with pytest.raises(SystemExit, match=message) as stop:
            export.main(["--workdir", str(workdir), "--output", str(output)])
        assert stop.value.code.startswith("lclseg: ")
