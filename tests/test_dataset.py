"""Opening a prepared set and reading from it; the phantom, two volumes of it, is the set."""

import dataclasses
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader

import tfds_builders
from lclseg.data import grid
from lclseg.data.dataset import open_builder, open_prepared, preprocessing_of
from lclseg.data.nifti import VolumeError
from tfds_builders import slices
from tfds_builders.phantom import phantom_dataset_builder as phantom
from tfds_builders.phantom import synthesis

GRID = {"image_size": 40, "target_spacing_mm": 2.5}


def open_set(name, data_dir, manual_dir=""):
    return open_prepared(name, **GRID, data_dir=str(data_dir), manual_dir=str(manual_dir))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    cases = phantom.find_cases(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phantom, "find_cases", lambda: cases)
        return open_set("phantom", tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def truth():
    return {f"phantom_{i:03d}": synthesis.make_volume(i) for i in range(2)}


def test_what_the_set_says_of_itself(prepared):
    assert prepared.name == "phantom"
    assert prepared.class_names == ("RV", "MYO", "LV")
    assert prepared.num_classes == 4
    assert (prepared.image_size, prepared.target_spacing_mm) == (40, 2.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        prepared.volumes = {}


def test_index(prepared, truth):
    """Volumes in order, their slices one after the other without a gap."""
    assert list(prepared.volumes) == list(truth)
    first = 0
    for volume_id, volume in truth.items():
        entry = prepared.volumes[volume_id]
        assert entry.volume_id == entry.patient_id == volume_id
        assert entry.has_label is True
        assert entry.slices == range(first, first + volume.image.shape[2])
        first = entry.slices.stop
    assert len(prepared.source) == first


def test_read_slices(prepared, truth):
    """As `volumes` makes them, in the order asked for, across volumes, repeats included."""
    image, label = [], []
    for volume in truth.values():
        normalized = grid.normalize_intensity(volume.image)
        image.extend(grid.image_to_grid(normalized, volume.spacing_mm, **GRID))
        label.extend(grid.label_to_grid(volume.label, volume.spacing_mm, **GRID))
    last = len(image) - 1
    wanted = np.array([last, 0, 3, last, 1])
    got_image, got_label = prepared.read_slices(wanted)
    assert got_image.shape == got_label.shape == (5, 40, 40)
    assert got_image.dtype == np.float32 and got_label.dtype == np.uint8
    np.testing.assert_allclose(got_image, np.stack(image)[wanted], atol=1e-5)
    np.testing.assert_array_equal(got_label, np.stack(label)[wanted])
    for entry in prepared.volumes.values():
        for record, pixels in zip(entry.slices, entry.class_pixels, strict=True):
            assert pixels.tolist() == [(label[record] == k).sum() for k in range(4)]


def test_what_was_read_may_be_changed(prepared):
    """Batches are filled in place: with pseudo-labels, for one."""
    _, label = prepared.read_slices([2])
    before = label.copy()
    label[:] = 9
    np.testing.assert_array_equal(prepared.read_slices([2])[1], before)


def test_read_native(prepared, truth):
    for volume_id, volume in truth.items():
        native = prepared.read_native(volume_id)
        np.testing.assert_array_equal(native.label, volume.label)
        assert native.label.dtype == np.uint8
        assert native.shape == volume.label.shape
        np.testing.assert_allclose(native.spacing_mm, volume.spacing_mm)
        np.testing.assert_allclose(native.affine, np.diag([*volume.spacing_mm, 1]))
        assert native.affine.dtype == np.float64


def test_read_native_of_an_unknown_volume(prepared):
    with pytest.raises(KeyError, match="phantom_002"):
        prepared.read_native("phantom_002")


@pytest.mark.parametrize("name", ["cardiac", "", "phantom2"])
def test_unknown_data_set(tmp_path, name):
    with pytest.raises(VolumeError, match=f"data.name is '{name}', but there is no ") as caught:
        open_set(name, tmp_path)
    assert f"tfds_builders/{name}/{name}_dataset_builder.py" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_builder_that_lacks_a_dependency(tmp_path, monkeypatch):
    """Not taken for an unknown data set: the error names the module that is missing."""
    folder = tmp_path / "needy"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "needy_dataset_builder.py").write_text("import no_such_dependency\n")
    monkeypatch.setattr(tfds_builders, "__path__", [*tfds_builders.__path__, str(tmp_path)])
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        open_set("needy", tmp_path / "data")
    sys.modules.pop("tfds_builders.needy", None)


MANUAL = {"acdc": "humanheart-project", "hippocampus": "medicaldecathlon", "mmwhs": "zmiclab"}


@pytest.mark.parametrize("name", MANUAL)
def test_manual_dir_not_set(tmp_path, name):
    """The message says where the data are to be had, and which option takes their folder."""
    with pytest.raises(VolumeError, match="data.manual_dir is not set") as caught:
        open_set(name, tmp_path)
    message = str(caught.value)
    assert message.startswith(f"data set {name} is not prepared in {tmp_path}")
    assert MANUAL[name] in message
    assert "--config.data.manual_dir=PATH" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", MANUAL)
def test_manual_dir_missing(tmp_path, name):
    folder = tmp_path / "no" / "such"
    with pytest.raises(VolumeError, match=f"data.manual_dir: no folder {folder}") as caught:
        open_set(name, tmp_path / "data", folder)
    assert MANUAL[name] in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_manual_dir_empty(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(VolumeError, match="--config.data.manual_dir=PATH"):
        open_set("acdc", tmp_path / "data", tmp_path / "empty")


def test_manual_dir_is_a_file(tmp_path):
    path = tmp_path / "acdc.zip"
    path.write_bytes(b"PK")
    with pytest.raises(VolumeError, match=f"data.manual_dir: no folder {path}"):
        open_set("acdc", tmp_path / "data", path)


def test_manual_dir_below_home(tmp_path, monkeypatch):
    """~ is spelt out."""
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(VolumeError, match=f"data.manual_dir: no folder {tmp_path}/acdc"):
        open_set("acdc", tmp_path / "data", "~/acdc")


@pytest.mark.parametrize(
    "name, label_values, channel",
    [
        ("mmwhs", (205, 420, 500, 550, 600, 820, 850), None),
        ("prostate", (1, 2), 0),
        ("acdc", (1, 2, 3), None),
    ],
)
def test_preprocessing_is_known_before_a_set_is_prepared(tmp_path, name, label_values, channel):
    builder = open_builder(name, **GRID, n4_shrink_factor=4, data_dir=str(tmp_path))
    how = preprocessing_of(builder)
    assert (how.label_values, how.channel, len(how.class_names)) == (
        label_values,
        channel,
        len(label_values),
    )
    assert (how.image_size, how.target_spacing_mm, how.n4_shrink_factor) == (40, 2.5, 4)


def test_preprocessing_of_a_prepared_set(prepared):
    how = prepared.preprocessing
    assert how[:8] == (("RV", "MYO", "LV"), (1, 2, 3), False, 40, 2.5, 0, None, "RAS")
    assert how[8:11] == ((), (), None)
    assert len(how.seen_median) == 2
    natives = [prepared.read_native(v) for v in prepared.volumes]
    spacings = np.array([n.spacing_mm for n in natives])
    np.testing.assert_allclose(how.seen_spacing_mm, np.c_[spacings.min(0), spacings.max(0)])
    normalized = [
        np.median(grid.normalize_intensity(phantom.synthesis.make_volume(n).image))
        for n in range(len(prepared.volumes))
    ]
    assert how.seen_median == pytest.approx((min(normalized), max(normalized)))


def test_how_records_are_written(tmp_path):
    """One record a chunk, for reading at random, in Snappy; other formats are TFDS's business."""
    writer = open_builder("phantom", **GRID, data_dir=str(tmp_path))._example_writer()
    records = [b"a" * 1_000_000, b"", bytes(range(256))]
    writer.write(tmp_path / "records", enumerate(records))
    reader = ArrayRecordReader(str(tmp_path / "records"))
    assert reader.read_all() == records
    assert "group_size:1," in reader.writer_options_string()
    assert "snappy" in reader.writer_options_string()
    assert (tmp_path / "records").stat().st_size < 200_000
    tfrecord = phantom.Builder(
        config=slices.grid_config(**GRID), data_dir=tmp_path, file_format="tfrecord"
    )
    assert not isinstance(tfrecord._example_writer(), slices.SliceWriter)


BUILDERS = sorted(p.parent.name for p in Path(tfds_builders.__path__[0]).glob("*/*_builder.py"))


@pytest.mark.parametrize("name", BUILDERS)
def test_every_builder_writes_its_records_so(name):
    module = importlib.import_module(f"tfds_builders.{name}.{name}_dataset_builder")
    assert module.Builder._example_writer is slices.example_writer
