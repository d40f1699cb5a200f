"""Builders of the phantom, ACDC and the hippocampus set, on small files in the published layout."""

import concurrent.futures
import gzip
import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from lclseg.data import bias_field, grid
from lclseg.data.dataset import open_prepared
from lclseg.data.nifti import VolumeError
from lclseg.run import setup
from tfds_builders import slices
from tfds_builders.acdc import acdc_dataset_builder as acdc
from tfds_builders.hippocampus import hippocampus_dataset_builder as hippocampus
from tfds_builders.phantom import phantom_dataset_builder as phantom

ROOT = Path(__file__).parents[1]
MAC_JUNK = b"\x00\x05\x16\x07"


def affine_of(spacing_mm, turn=0.3):
    affine = np.diag([*spacing_mm, 1.0]) @ np.diag([-1, -1, 1, 1])
    c, s = np.cos(turn), np.sin(turn)
    affine[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ affine[:3, :3]
    affine[:3, 3] = (12.5, -30, 4)
    return affine


def write(path, data, spacing_mm):
    path.parent.mkdir(parents=True, exist_ok=True)
    file = nib.Nifti1Image(data, affine_of(spacing_mm))
    nib.save(file, path)


def make_volume(seed, shape, num_classes):
    """(int16 image, uint8 label); no two slices alike in brightness or label."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 100, shape) + 200 * np.arange(shape[2])
    label = np.zeros(shape, np.uint8)
    for s in range(shape[2]):
        for k in range(1, num_classes):
            label[2 + 3 * k : 4 + 3 * k, 3 : 5 + k + s, s] = k
    return image.astype(np.int16), label


# patient: (end-diastolic frame, end-systolic frame, shape, spacing, has labels)
ACDC = {
    "patient001": ("01", "12", (20, 26, 3), (1.5625, 1.25, 10.0), True),
    "patient002": ("01", "12", (22, 18, 2), (1.4, 1.4, 10.0), False),
    "patient090": ("04", "11", (24, 20, 4), (1.25, 1.6, 5.0), True),
}


def make_acdc(root):
    """The published layout: 4-D cine, both frames, their labels, Info.cfg."""
    for n, (patient, (ed, es, shape, spacing, labelled)) in enumerate(ACDC.items()):
        folder = root / patient
        image, label = make_volume(n, shape, 4)
        cine = np.stack([image, image // 2], axis=-1)
        write(folder / f"{patient}_4d.nii.gz", cine, spacing)
        write(folder / f"{patient}_frame{ed}.nii.gz", image, spacing)
        write(folder / f"{patient}_frame{es}.nii.gz", image[::-1].copy(), spacing)
        if labelled:
            write(folder / f"{patient}_frame{ed}_gt.nii.gz", label, spacing)
            write(folder / f"{patient}_frame{es}_gt.nii.gz", label[::-1].copy(), spacing)
        (folder / f"._{patient}_frame{ed}.nii.gz").write_bytes(MAC_JUNK)
        info = f"ED: {int(ed)}\nES: {int(es)}\nGroup: DCM\nNbFrame: 30\n"
        (folder / "Info.cfg").write_text(info)
    (root / "MANDATORY_CITATION.md").write_text("Bernard et al.")
    (root / "._patient001").write_bytes(MAC_JUNK)
    return root


HIPPOCAMPUS = {"hippocampus_007": (18, 25, 3), "hippocampus_001": (21, 17, 4)}


def make_hippocampus(folder):
    """The published layout, down to labels stored as floats and the files a Mac leaves."""
    for n, (name, shape) in enumerate(HIPPOCAMPUS.items()):
        image, label = make_volume(10 + n, shape, 3)
        write(folder / "imagesTr" / f"{name}.nii.gz", image.astype(np.float32), (1, 1, 1))
        write(folder / "labelsTr" / f"{name}.nii.gz", label.astype(np.float32), (1, 1, 1))
        for kind in ("imagesTr", "labelsTr"):
            (folder / kind / f"._{name}.nii.gz").write_bytes(MAC_JUNK)
    write(folder / "imagesTs" / "hippocampus_002.nii.gz", image, (1, 1, 1))
    listing = {
        "name": "Hippocampus",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "Anterior", "2": "Posterior"},
        "training": [
            {"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"}
            for n in HIPPOCAMPUS
        ],
        "test": ["./imagesTs/hippocampus_002.nii.gz"],
    }
    (folder / "dataset.json").write_text(json.dumps(listing))
    (folder / "._dataset.json").write_bytes(MAC_JUNK)
    return folder


def open_set(name, tmp_path, manual_dir="", *, image_size=32, target_spacing_mm=1.5, **options):
    return open_prepared(
        name,
        **options,
        image_size=image_size,
        target_spacing_mm=target_spacing_mm,
        data_dir=str(tmp_path / "prepared"),
        manual_dir=str(manual_dir),
    )


def in_orientation(path, wanted):
    """A file turned by nibabel, e.g. to "LPS"."""
    file = nib.load(path)
    ours = nib.orientations.io_orientation(file.affine)
    turn = nib.orientations.ornt_transform(ours, nib.orientations.axcodes2ornt(wanted))
    return file.as_reoriented(turn)


def check_volume(prepared, volume_id, image_path, label_path):
    """Everything read back agrees with the files: geometry, labels, slices in order, counts."""
    entry, native = prepared.volumes[volume_id], prepared.read_native(volume_id)
    wanted = prepared.preprocessing.orientation
    file = in_orientation(image_path, wanted)
    assert native.shape == file.shape
    np.testing.assert_allclose(native.affine, file.affine, atol=1e-5)
    np.testing.assert_allclose(native.spacing_mm, file.header.get_zooms(), rtol=1e-6)
    truth = np.zeros(file.shape)
    if label_path is not None:
        truth = in_orientation(label_path, wanted).get_fdata()
    if label_path is None:
        assert native.label is None
    else:
        np.testing.assert_array_equal(native.label, truth)
        assert native.label.dtype == np.uint8

    kwargs = {"image_size": prepared.image_size, "target_spacing_mm": prepared.target_spacing_mm}
    image, label = prepared.read_slices(entry.slices)
    low, high = np.percentile(file.get_fdata(), (1, 99))
    expected = grid.image_to_grid(
        (file.get_fdata() - low) / (high - low), native.spacing_mm, **kwargs
    )
    np.testing.assert_allclose(image, expected, atol=1e-4)
    expected = grid.label_to_grid(truth.astype(np.uint8), native.spacing_mm, **kwargs)
    np.testing.assert_array_equal(label, expected)
    for pixels, slice_label in zip(entry.class_pixels, label, strict=True):
        assert pixels.tolist() == [(slice_label == k).sum() for k in range(prepared.num_classes)]

    records = prepared.source.__getitems__(list(entry.slices))
    assert [int(r["slice_index"]) for r in records] == list(range(file.shape[2]))
    assert {int(r["num_slices"]) for r in records} == {file.shape[2]}
    assert {r["volume_id"].decode() for r in records} == {volume_id}
    assert {r["patient_id"].decode() for r in records} == {entry.patient_id}


def check_index(prepared, expected):
    """expected: volume_id -> (patient, number of slices), in stored order."""
    assert list(prepared.volumes) == list(expected)
    start = 0
    for volume_id, (patient, num_slices) in expected.items():
        entry = prepared.volumes[volume_id]
        assert (entry.volume_id, entry.patient_id) == (volume_id, patient)
        assert entry.slices == range(start, start + num_slices)
        start += num_slices
    assert len(prepared.source) == start


def refuse_to_build(monkeypatch):
    def build(*args):
        raise AssertionError("prepared a second time")

    monkeypatch.setattr(slices, "generate_examples", build)


@pytest.fixture(scope="module")
def acdc_place(tmp_path_factory):
    """(folder with `prepared` below it, folder of the files)."""
    place = tmp_path_factory.mktemp("acdc")
    return place, make_acdc(place / "ACDC" / "training")


@pytest.fixture(scope="module")
def acdc_set(acdc_place):
    place, root = acdc_place
    return open_set("acdc", place, root.parent)  # the folder above will do


def test_acdc(acdc_place, acdc_set):
    assert acdc_set.class_names == ("RV", "MYO", "LV")
    expected = {
        "patient001_frame01": ("patient001", 3),
        "patient002_frame01": ("patient002", 2),
        "patient090_frame04": ("patient090", 4),
    }
    check_index(acdc_set, expected)
    for volume_id, (patient, _) in expected.items():
        image = acdc_place[1] / patient / f"{volume_id}.nii.gz"
        label = acdc_place[1] / patient / f"{volume_id}_gt.nii.gz"
        assert acdc_set.volumes[volume_id].has_label is label.exists()
        check_volume(acdc_set, volume_id, image, label if label.exists() else None)


def test_acdc_labels_are_visible_on_the_grid(acdc_set):
    """All four classes, growing from slice to slice; none where there is no ground truth."""
    pixels = acdc_set.volumes["patient090_frame04"].class_pixels
    assert (pixels > 0).all()
    assert (np.diff(pixels[:, 1:], axis=0) > 0).all()
    assert acdc_set.volumes["patient002_frame01"].class_pixels.tolist() == [[32 * 32, 0, 0, 0]] * 2


def test_a_second_grid_lies_beside_the_first(acdc_place, acdc_set, monkeypatch):
    place, root = acdc_place
    before, _ = acdc_set.read_slices(range(9))
    other = open_set("acdc", place, root, image_size=24, target_spacing_mm=2.25)
    volume_id = "patient001_frame01"
    stem = str(root / "patient001" / volume_id)
    check_volume(other, volume_id, f"{stem}.nii.gz", f"{stem}_gt.nii.gz")
    assert other.read_slices([0])[0].shape == (1, 24, 24)

    # Either is found again, without its files and without being built.
    refuse_to_build(monkeypatch)
    again = open_set("acdc", place)
    np.testing.assert_array_equal(again.read_slices(range(9))[0], before)
    assert again.image_size == 32 and again.target_spacing_mm == 1.5
    for a, b in zip(again.volumes.values(), acdc_set.volumes.values(), strict=True):
        assert a[:4] == b[:4]
        np.testing.assert_array_equal(a.class_pixels, b.class_pixels)
    assert open_set("acdc", place, image_size=24, target_spacing_mm=2.25).image_size == 24


@pytest.mark.parametrize("below", ["", "training", "database/training"])
def test_acdc_folders(tmp_path, below):
    make_acdc(tmp_path / below)
    cases = acdc.find_cases(tmp_path)
    assert [c.volume_id for c in cases] == [
        "patient001_frame01",
        "patient002_frame01",
        "patient090_frame04",
    ]
    assert [c.label is None for c in cases] == [False, True, False]


def test_acdc_end_systole_follows_end_diastole(tmp_path):
    """The later frame too, where it is asked for: a volume of its own, of the same patient."""
    image, label = make_volume(0, (20, 20, 2), 4)
    for name, data in (("frame12", image), ("frame12_gt", label), ("frame01", image)):
        write(tmp_path / "patient003" / f"patient003_{name}.nii.gz", data, (1, 1, 8))
    cases = acdc.find_cases(tmp_path, both_frames=True)
    assert [(c.volume_id, c.patient_id, c.label is None) for c in cases] == [
        ("patient003_frame01", "patient003", True),
        ("patient003_frame12", "patient003", False),
    ]
    assert [c.volume_id for c in acdc.find_cases(tmp_path)] == ["patient003_frame01"]


@pytest.mark.parametrize(
    ("frames", "pool", "test"),
    [
        ("end_diastolic", ["patient002_frame01"], ["patient090_frame04"]),
        ("both_in_pool", ["patient002_frame01", "patient002_frame12"], ["patient090_frame04"]),
        (
            "both",
            ["patient002_frame01", "patient002_frame12"],
            ["patient090_frame04", "patient090_frame11"],
        ),
    ],
)
def test_acdc_frames_of_a_config(acdc_place, frames, pool, test):
    """From the config to the volumes of each role, through the builder."""
    place, root = acdc_place
    config = runpy.run_path(str(ROOT / "configs" / "acdc_short.py"))["get_config"]("supervised")
    config.rounds.num_rounds = 0
    config.data.update(
        data_dir=str(place / "prepared"),
        manual_dir=str(root),
        image_size=32,
        n4_shrink_factor=0,
        frames=frames,
        labeled=("patient001",),
        unlabeled=("patient002",),
        num_validation=0,
        test=("patient090",),
    )
    _, split = setup.open_data(config)
    assert list(split.unlabeled) == pool
    assert list(split.test) == test


def test_acdc_files_that_were_unpacked(tmp_path):
    """.nii in place of .nii.gz, as some downloads have them."""
    image, label = make_volume(0, (20, 20, 2), 4)
    for name, data in (("frame01", image), ("frame01_gt", label), ("frame10", image)):
        write(tmp_path / "patient003" / f"patient003_{name}.nii", data, (1, 1, 8))
    (case,) = acdc.find_cases(tmp_path)
    assert case.volume_id == "patient003_frame01" and case.patient_id == "patient003"
    volume = slices.load_nifti(case, num_classes=4)
    np.testing.assert_array_equal(volume.image, image)
    np.testing.assert_array_equal(volume.label, label)


def test_acdc_folder_without_patients(tmp_path):
    (tmp_path / "testing").mkdir()
    with pytest.raises(VolumeError, match="no patientNNN folder in any of") as caught:
        acdc.find_cases(tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message and str(tmp_path / "training") in message
    assert "patientNNN/patientNNN_frameFF.nii.gz" in message
    assert "--config.data.manual_dir=PATH" in message


def test_acdc_patient_without_images(tmp_path):
    """Labels alone are no patient, nor are they taken for images."""
    make_acdc(tmp_path)
    folder = tmp_path / "patient001"
    for frame in ("01", "12"):
        (folder / f"patient001_frame{frame}.nii.gz").unlink()
    with pytest.raises(VolumeError, match=f"{folder}: no patient001_frameFF.nii.gz in it"):
        acdc.find_cases(tmp_path)


def nothing_prepared(tmp_path):
    """No file, and no folder named as a version, which TFDS would take for a prepared set."""
    found = list((tmp_path / "prepared").rglob("*"))
    return not [p for p in found if p.is_file() or p.name == "1.1.0" or "incomplete" in p.name]


def test_a_misplaced_folder_leaves_nothing_behind(tmp_path):
    (tmp_path / "downloads" / "ACDC.zip").parent.mkdir()
    (tmp_path / "downloads" / "ACDC.zip").write_bytes(b"PK")
    with pytest.raises(VolumeError, match="no patientNNN folder in any of"):
        open_set("acdc", tmp_path, tmp_path / "downloads")
    assert nothing_prepared(tmp_path)


def test_preparing_holds_few_results():
    """In order, whichever is ready first; at most `ahead` items are under way or waiting."""
    begun = []

    def work(item):
        time.sleep(0.01 * (item % 3))
        begun.append(item)
        return item

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        results = slices._in_order(pool, work, range(20), ahead=4)
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        time.sleep(0.1)
        assert max(begun) <= 5
        assert list(results) == list(range(3, 20))


def test_a_broken_file_leaves_nothing_behind(tmp_path):
    """The message names all of them; with the files mended, the same call prepares the set."""
    root = make_acdc(tmp_path / "ACDC")
    broken = root / "patient090" / "patient090_frame04.nii.gz"
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) // 2])
    label = root / "patient001" / "patient001_frame01_gt.nii.gz"
    label_content = label.read_bytes()
    label.write_bytes(MAC_JUNK)
    with pytest.raises(VolumeError, match=f"{broken}: not readable as NIfTI") as caught:
        open_set("acdc", tmp_path, root)
    assert f"{label}: not readable" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 2
    assert nothing_prepared(tmp_path)
    with pytest.raises(VolumeError, match="data.manual_dir is not set"):
        open_set("acdc", tmp_path)

    broken.write_bytes(content)
    label.write_bytes(label_content)
    prepared = open_set("acdc", tmp_path, root)
    assert [len(v.slices) for v in prepared.volumes.values()] == [3, 2, 4]
    check_volume(
        prepared,
        "patient090_frame04",
        broken,
        broken.with_name("patient090_frame04_gt.nii.gz"),
    )


def test_hippocampus(tmp_path):
    """Volumes in the order of the listing; labels as whole numbers."""
    root = make_hippocampus(tmp_path / "MSD" / "Task04_Hippocampus")
    prepared = open_set("hippocampus", tmp_path, root.parent)
    assert prepared.class_names == ("anterior", "posterior")
    check_index(prepared, {name: (name, shape[2]) for name, shape in HIPPOCAMPUS.items()})
    for name in HIPPOCAMPUS:
        assert prepared.volumes[name].has_label is True
        check_volume(
            prepared,
            name,
            root / "imagesTr" / f"{name}.nii.gz",
            root / "labelsTr" / f"{name}.nii.gz",
        )
        assert (prepared.volumes[name].class_pixels > 0).all()


def test_hippocampus_folder_itself(tmp_path):
    make_hippocampus(tmp_path)
    assert [c.patient_id for c in hippocampus.find_cases(tmp_path)] == list(HIPPOCAMPUS)


def test_hippocampus_without_listing(tmp_path):
    (tmp_path / "imagesTr").mkdir()
    with pytest.raises(VolumeError, match=f"no {tmp_path / 'dataset.json'}: wanted") as caught:
        hippocampus.find_cases(tmp_path)
    assert "--config.data.manual_dir=PATH" in str(caught.value)


@pytest.mark.parametrize(
    "listing", ["", "[]", "{}", '{"training": 3}', '{"training": [{"image": "a"}]}', "\x00\x05"]
)
def test_hippocampus_listing_unlike_msd(tmp_path, listing):
    path = tmp_path / "dataset.json"
    path.write_text(listing)
    with pytest.raises(VolumeError, match=f"{path}: not an MSD listing"):
        hippocampus.find_cases(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda label: label.unlink(), "{label}: no such file"),
        (lambda label: label.write_bytes(MAC_JUNK), "{label}: not readable"),
        (
            lambda label: write(label, np.full((18, 25, 3), 3, np.uint8), (1, 1, 1)),
            r"{label}: found label values 3; wanted whole numbers 0\.\.2",
        ),
        (
            lambda label: write(label, np.zeros((18, 25, 3), np.uint8), (1, 1, 2)),
            "{label}: label and image {image} lie differently in space",
        ),
        (
            lambda label: label.write_bytes(
                gzip.compress(gzip.decompress(label.read_bytes())[:-9])
            ),
            "{label}: not readable",
        ),
    ],
    ids=["missing", "not NIfTI", "value", "space", "cut"],
)
def test_hippocampus_bad_label(tmp_path, damage, message):
    make_hippocampus(tmp_path)
    case = hippocampus.find_cases(tmp_path)[0]
    damage(Path(case.label))
    with pytest.raises(VolumeError, match=message.format(label=case.label, image=case.image)):
        slices.load_nifti(case, num_classes=3)


def test_two_volumes_of_one_name(tmp_path):
    """Listed twice: one would overwrite the other in the index."""
    root = make_hippocampus(tmp_path / "Task04_Hippocampus")
    listing = json.loads((root / "dataset.json").read_text())
    listing["training"].append(listing["training"][0])
    (root / "dataset.json").write_text(json.dumps(listing))
    with pytest.raises(VolumeError, match="volume ids occur twice: hippocampus_007"):
        open_set("hippocampus", tmp_path, root)
    assert nothing_prepared(tmp_path)


def test_the_published_phantom_has_64_subjects():
    cases = phantom.find_cases()
    assert len(cases) == phantom.NUM_VOLUMES == 64
    assert cases[7] == slices.Case("phantom_007", "phantom_007", "7", "7")
    volume = phantom.load(cases[7])
    np.testing.assert_array_equal(volume.image, phantom.synthesis.make_volume(7).image)


SCRIPT = """
import importlib, pkgutil, sys
import lclseg.data
for module in pkgutil.iter_modules(lclseg.data.__path__, "lclseg.data."):
    importlib.import_module(module.name)
    assert "jax" not in sys.modules, f"{module.name} imports jax"
from lclseg.data.dataset import open_prepared
from tfds_builders.phantom import phantom_dataset_builder as phantom

if __name__ == "__main__":
    cases = phantom.find_cases(3)
    phantom.find_cases = lambda: cases  # workers get their cases, they look nothing up
    prepared = open_prepared(
        "phantom", image_size=32, target_spacing_mm=3.0, data_dir=sys.argv[1], manual_dir=""
    )
    assert len(prepared.read_slices([0, 1])[0]) == 2
    assert "tensorflow" not in sys.modules, "tensorflow was imported"
"""


@pytest.fixture(scope="module")
def phantom_place(tmp_path_factory):
    """Built by a program of its own, where whoever imports tensorflow, workers too, is told so."""
    place = tmp_path_factory.mktemp("phantom")
    poison = place / "poison" / "tensorflow"
    poison.mkdir(parents=True)
    traitor = "import pathlib\npathlib.Path(__file__).with_name('imported').touch()\n"
    (poison / "__init__.py").write_text(traitor)
    (place / "build.py").write_text(SCRIPT)
    paths = [str(place / "poison"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    result = subprocess.run(
        [sys.executable, place / "build.py", place / "prepared"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return place


def test_phantom_is_built_without_tensorflow(phantom_place):
    assert not (phantom_place / "poison" / "tensorflow" / "imported").exists()


def test_phantom(phantom_place, monkeypatch):
    refuse_to_build(monkeypatch)
    prepared = open_set("phantom", phantom_place, target_spacing_mm=3.0)
    truth = [phantom.synthesis.make_volume(i) for i in range(3)]
    names = [f"phantom_{i:03d}" for i in range(3)]
    check_index(prepared, {n: (n, t.label.shape[2]) for n, t in zip(names, truth, strict=True)})
    for name, volume in zip(names, truth, strict=True):
        native = prepared.read_native(name)
        np.testing.assert_array_equal(native.label, volume.label)
        np.testing.assert_allclose(native.spacing_mm, volume.spacing_mm)
        assert (prepared.volumes[name].class_pixels.sum(axis=0) > 0).all()


def test_every_grid_has_a_name_of_its_own():
    grids = [(192, 1.0), (160, 1.0), (192, 1.36719), (192, 1.5), (192, 0.625), (19, 21.0)]
    configs = [
        slices.grid_config(image_size=n, target_spacing_mm=mm, n4_shrink_factor=n4)
        for n, mm in grids
        for n4 in (0, 2, 4)
    ]
    assert len({c.name for c in configs}) == 3 * len(grids)


def test_bias_field_is_taken_out_before_all_else(tmp_path):
    """A set of its own beside the uncorrected one; labels are the same, images are N4's."""
    folder = tmp_path / "hippocampus"
    names = ("hippocampus_001", "hippocampus_002")
    rng = np.random.default_rng(0)
    for name in names:
        x = np.linspace(-1, 1, 32)
        image = rng.normal(100, 3, (32, 32, 4)) * np.exp(0.5 * x)[:, None, None]
        image[:6] = 1
        image = image[::-1]  # the files' first axis runs from right to left
        write(folder / "imagesTr" / f"{name}.nii.gz", image.astype(np.float32), (1.0, 1.0, 1.0))
        label = np.zeros(image.shape, np.uint8)
        label[10:20, 10:20] = 1
        write(folder / "labelsTr" / f"{name}.nii.gz", label, (1.0, 1.0, 1.0))
    pairs = [{k: f"{k}sTr/{n}.nii.gz" for k in ("image", "label")} for n in names]
    (folder / "dataset.json").write_text(json.dumps({"training": pairs}))
    options = {"image_size": 32, "target_spacing_mm": 1.0}
    plain = open_set("hippocampus", tmp_path, folder, **options)
    corrected = open_set("hippocampus", tmp_path, folder, **options, n4_shrink_factor=2)
    before, label = plain.read_slices(range(8))
    after, corrected_label = corrected.read_slices(range(8))
    np.testing.assert_array_equal(label, corrected_label)
    file = in_orientation(folder / "imagesTr" / f"{names[0]}.nii.gz", "RAS")
    expected = bias_field.correct_bias_field(file.get_fdata(), (1, 1, 1), shrink_factor=2)
    expected = np.moveaxis(grid.normalize_intensity(expected), 2, 0)
    np.testing.assert_allclose(after[:4], expected, atol=1e-4)
    # Brighter towards high rows before, level afterwards.
    assert before[:, 28:].mean() - before[:, 8:12].mean() > 0.3
    assert abs(after[:, 28:].mean() - after[:, 8:12].mean()) < 0.1
