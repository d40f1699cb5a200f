"""Folders with what people of this field have had trouble with: what is read, refused and told."""

import errno
import gzip
import json
import os
import re
import runpy
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from lclseg import check_data, evaluation
from lclseg.data import dataset, grid, nifti, own_data, preprocess
from lclseg.data.dataset import open_prepared
from lclseg.data.nifti import VolumeError
from lclseg.data.patients import patients_of
from lclseg.data.splits import SplitError
from lclseg.errors import UserError
from lclseg.run import setup
from tfds_builders import slices

ROOT = Path(__file__).parents[1]
SHAPE, AFFINE = (40, 36, 5), np.diag([1.0, 1.0, 4.0, 1.0])


def image(seed=0):
    return np.random.default_rng(seed).normal(300, 60, SHAPE).astype(np.float32)


def label(seed=0, classes=2):
    out = np.zeros(SHAPE, np.uint8)
    x = 12 + seed % 5
    out[x : x + 8, 12:22, 1:4] = 1
    if classes > 1:
        out[x : x + 4, 12:22, 1:4] = 2
    return out


def write(path, data, affine=AFFINE, **fields):
    path.parent.mkdir(parents=True, exist_ok=True)
    file = nib.Nifti1Image(data, affine)
    file.header.set_xyzt_units("mm")
    for name, value in fields.items():
        file.header[name] = value
    nib.save(file, path)
    return path


def image_of(root, n):
    return root / "images" / f"c{n}.nii.gz"


def label_of(root, n):
    return root / "labels" / f"c{n}.nii.gz"


@pytest.fixture
def folder(tmp_path):
    """Four cases with a mask, two without."""
    root = tmp_path / "mine"
    for n in range(6):
        write(image_of(root, n), image(n))
        if n < 4:
            write(label_of(root, n), label(n))
    return root


def config_of(folder, **data):
    config = runpy.run_path(str(ROOT / "configs" / "nifti_folder.py"))["get_config"]()
    config.data.update(manual_dir=str(folder), data_dir=str(folder.parent / "prepared"), **data)
    return config


def warnings_of(folder, **data):
    return own_data.warnings_in(own_data.complete(config_of(folder, **data))[1])


def open_set(folder, **data):
    config, _ = own_data.complete(config_of(folder, **data))
    return open_prepared(
        "nifti_folder",
        image_size=config.data.image_size,
        target_spacing_mm=config.data.target_spacing_mm,
        data_dir=config.data.data_dir,
        manual_dir=str(folder),
        options=own_data.builder_options(config.data),
    )


def test_defaults_of_the_check_are_the_configs():
    data = runpy.run_path(str(ROOT / "configs" / "nifti_folder.py"))["get_config"]().data
    assert {key: data[key] for key in own_data.OPEN} == own_data.OPEN


# What the check and the run say: problems, named alike.


def one_hot(root):
    write(label_of(root, 1), np.stack([label(1) == c for c in range(3)], -1).astype(np.uint8))


def dangling(root):
    image_of(root, 5).unlink()
    image_of(root, 5).symlink_to("../annex/objects/xx.nii.gz")


def colours(root):
    data = np.zeros(SHAPE, [(c, "u1") for c in "RGB"])
    data["R"] = 7
    write(image_of(root, 0), data)


def folder_of_that_name(root):
    image_of(root, 4).unlink()
    image_of(root, 4).mkdir()


def plain_called_gz(root):
    path = write(root / "a.nii", image())
    path.rename(image_of(root, 2))


def gz_called_plain(root):
    image_of(root, 2).rename(image_of(root, 2).with_suffix(""))


def lfs_pointer(root):
    image_of(root, 3).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def mark_and_broken(root):
    (root / "dataset.json").write_text('{"labels": ', encoding="utf-8-sig")


def second_copy(root):
    sitk.WriteImage(sitk.ReadImage(str(label_of(root, 0))), str(root / "labels" / "c0.nrrd"))


def two_formats_of_an_image(root):
    sitk.WriteImage(sitk.ReadImage(str(image_of(root, 0))), str(root / "images" / "c0.mha"))


def only_pictures(root):
    shutil.rmtree(root / "images")
    shutil.rmtree(root / "labels")
    (root / "slice1.png").write_bytes(b"\x89PNG")


def ignored_or_class(root):
    for n in range(4):
        data = label(n)
        data[:, :2] = 255
        write(label_of(root, n), data)


def far_reaching(root):
    """Micrometres called millimetres, image and mask."""
    for path in (image_of(root, 1), label_of(root, 1)):
        data = np.asarray(nib.load(path).dataobj)
        write(path, data, np.diag([1000.0, 1000.0, 4000.0, 1.0]))


PROBLEMS = {
    "one-hot mask": (one_hot, r"c1\.nii\.gz: .*\(40, 36, 5, 3\); wanted a 3-D volume: .*argmax"),
    "4-D image": (
        lambda r: write(image_of(r, 1), np.stack([image()] * 2, -1)),
        r"c1\.nii\.gz: .*\(40, 36, 5, 2\); wanted a 3-D volume: of several channels, one file each",
    ),
    "dangling link": (dangling, r"c5\.nii\.gz: a link to \.\./annex/objects/xx.*fetch it"),
    "colours": (colours, r"c0\.nii\.gz: .*colours; wanted real numbers: store grey values"),
    "folder": (folder_of_that_name, r"c4\.nii\.gz: found a folder .*wanted a file: rename"),
    "plain called .gz": (plain_called_gz, r"c2\.nii\.gz: not compressed.*rename it to c2\.nii,"),
    "compressed called .nii": (gz_called_plain, r"c2\.nii: compressed.*rename it to c2\.nii\.gz"),
    "Git LFS": (lfs_pointer, r"c3\.nii\.gz: a Git LFS pointer.*git lfs pull"),
    "dataset.json": (mark_and_broken, r"dataset\.json: not readable as JSON.*mend it"),
    "second copy of a mask": (second_copy, r"c0\.nrrd: a second label|c0\.nii\.gz: a second label"),
    "two images of a case": (two_formats_of_an_image, r"several images are called c0.*rename"),
    "label without image": (
        lambda r: write(r / "labels" / "x.nii.gz", label()),
        r"x\.nii\.gz: no image is called like this label",
    ),
    "pictures": (only_pictures, r"no image in .*found 1 \.png; wanted images/ .*store volumes"),
    "probabilities": (
        lambda r: write(label_of(r, 0), np.random.default_rng(0).random(SHAPE, np.float32)),
        r"c0\.nii\.gz: found label values 0\.\d+.*are these probabilities\? Store classes",
    ),
    "an image as mask": (
        lambda r: write(label_of(r, 0), image().astype(np.int16) - 1024),
        r"c0\.nii\.gz: found label values -.*is this an image in place of its label",
    ),
    "interpolated mask": (
        lambda r: write(label_of(r, 0), label() * np.float32(1.25)),
        r"c0\.nii\.gz: found label values 1\.25, 2\.5; .*nearest neighbour",
    ),
    "NaN": (
        lambda r: write(image_of(r, 0), np.where(image() > 400, np.nan, image())),
        r"c0\.nii\.gz: \d+ voxels are NaN or infinite; wanted finite.*nan_to_num",
    ),
    "255": (ignored_or_class, r"value 255 in 3 masks, beside 1, 2; .*data\.ignore_value=255"),
    "millimetres that are none": (
        far_reaching,
        r"c1\.nii\.gz: its foreground reaches over .*wanted a grid of at most 1024 px: look at",
    ),
    "no mask": (lambda r: shutil.rmtree(r / "labels"), r"0 label files, so no case has a mask"),
    "pool of one slice": (
        lambda r: [image_of(r, 5).unlink(), write(image_of(r, 4), image()[..., :1])],
        r"slices in the unlabelled pool: 1; wanted at least 2",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), PROBLEMS.values(), ids=PROBLEMS)
def test_check_and_run_refuse_alike(folder, spoil, message):
    spoil(folder)
    problems = check_data.check_folder(folder).problems
    with pytest.raises(UserError) as refused:
        setup.prepare(config_of(folder))
    assert str(refused.value).splitlines()[0] in problems
    assert re.search(message, "\n".join(problems)), problems


def test_a_file_that_may_not_be_read(folder, monkeypatch):
    """As root every file may be, so the refusal is the system's in place of a mode's."""
    opened = Path.open

    def refuse(path, *args, **kwargs):
        if path == image_of(folder, 1):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    (problem,) = check_data.check_folder(folder).problems
    assert "c1.nii.gz: no permission to read it; wanted a readable file: chmod" in problem


def test_every_bad_file_is_named_at_once(folder):
    for n in (0, 2):
        write(label_of(folder, n), label() * np.float32(0.5))
    with pytest.raises(VolumeError) as refused:
        own_data.complete(config_of(folder))
    first, second = str(refused.value).splitlines()
    assert "c0.nii.gz" in first and "c2.nii.gz" in second


# What is read.


def as_itk(root, suffix):
    for path in list(root.rglob("*.nii.gz")):
        sitk.WriteImage(sitk.ReadImage(str(path)), str(path).replace(".nii.gz", suffix))
        path.unlink()


def as_pair(root):
    for path in list(root.rglob("*.nii.gz")):
        file = nib.load(path)
        pair = nib.Nifti1Pair(np.asarray(file.dataobj), file.affine)
        nib.save(pair, str(path).replace(".nii.gz", ".hdr"))
        path.unlink()


def as_upper_case(root):
    for path in list(root.rglob("*.nii.gz")):
        path.rename(str(path).replace(".nii.gz", ".NII.GZ"))


FORMATS = {
    ".mha": lambda r: as_itk(r, ".mha"),
    ".mhd": lambda r: as_itk(r, ".mhd"),
    ".nrrd": lambda r: as_itk(r, ".nrrd"),
    ".hdr": as_pair,
    ".NII.GZ": as_upper_case,
}


@pytest.mark.parametrize("store", FORMATS.values(), ids=FORMATS)
def test_other_formats_make_the_same_set(folder, store):
    """Oblique, so that a mix-up of SimpleITK's axes with NIfTI's would show."""
    a = np.radians(20)
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn @ AFFINE[:3, :3], (-7, 31, 5)
    for path in folder.rglob("*.nii.gz"):
        write(path, np.asarray(nib.load(path).dataobj), affine)
    before = open_set(folder)
    natives = [before.read_native(v) for v in before.volumes]
    store(folder)
    after = open_set(folder)
    assert list(after.volumes) == list(before.volumes) and len(natives) == 6
    for volume_id, native in zip(after.volumes, natives, strict=True):
        other = after.read_native(volume_id)
        np.testing.assert_allclose(other.affine, native.affine, atol=1e-4)
        if native.label is not None:
            np.testing.assert_array_equal(other.label, native.label)
    records = range(len(before.source))
    for ours, theirs in zip(before.read_slices(records), after.read_slices(records), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_nearly_whole_labels_are_rounded(folder):
    """0.9999999 of a float, and 0.99999994 of a scale factor."""
    write(label_of(folder, 0), label(0) * np.float32(0.9999999))
    file = nib.Nifti1Image(label(1).astype(np.int16) * 255, AFFINE)
    nib.save(file, label_of(folder, 1))
    raw = bytearray(label_of(folder, 1).read_bytes())
    header = bytearray(gzip.decompress(bytes(raw)))
    header[112:120] = np.array([1 / 255, 0], "<f4").tobytes()
    label_of(folder, 1).write_bytes(gzip.compress(bytes(header)))
    prepared = open_set(folder)
    for n in (0, 1):
        np.testing.assert_array_equal(prepared.read_native(f"c{n}").label, label(n))
    write(label_of(folder, 0), label(0) * np.float32(0.998))
    with pytest.raises(VolumeError, match=r"found label values 0\.99800"):
        own_data.complete(config_of(folder))


def test_micrometres_are_converted(folder):
    for path in (image_of(folder, 1), label_of(folder, 1)):
        data = np.asarray(nib.load(path).dataobj)
        write(path, data, np.diag([1000.0, 1000.0, 4000.0, 1.0]), xyzt_units=3)
    config, _ = own_data.complete(config_of(folder))
    assert (config.data.image_size, config.data.target_spacing_mm) == (32, 1.0)
    np.testing.assert_allclose(open_set(folder).read_native("c1").spacing_mm, (1, 1, 4), rtol=1e-5)


def test_a_byte_order_mark_of_dataset_json(folder):
    content = {"labels": {"background": 0, "outer": 1, "inner": 2}}
    (folder / "dataset.json").write_text(json.dumps(content), encoding="utf-8-sig")
    assert own_data.complete(config_of(folder))[0].data.class_names == ("outer", "inner")


def test_trailing_axes_of_one_are_dropped(folder):
    write(image_of(folder, 0), image(0)[..., None])
    write(label_of(folder, 0), label(0)[..., None, None])
    np.testing.assert_array_equal(open_set(folder).read_native("c0").label, label(0))


# What is told: warnings.


def copies_elsewhere(root):
    write(root / "labels_old" / "c0.nii.gz", label())
    write(root / "images" / "below" / "c9.nii.gz", image())


def stray_voxel(root):
    data = label(3)
    data[2, 2, 2] = 7
    write(label_of(root, 3), data)


def one_class_once(root):
    for n in (1, 2, 3):
        write(label_of(root, n), label(n, classes=1))


def other_spacing(root):
    write(image_of(root, 4), image(4), np.diag([0.1, 0.1, 0.4, 1.0]))


def spacing_against_affine(root):
    path = image_of(root, 4)
    file = nib.load(path)
    file.header.set_sform(np.diag([2.0, 2.0, 4.0, 1.0]), 1)
    nib.save(nib.Nifti1Image(np.asarray(file.dataobj), None, file.header), path)


def without_forms(root):
    file = nib.load(image_of(root, 4))
    file.header["qform_code"] = file.header["sform_code"] = 0
    nib.save(nib.Nifti1Image(np.asarray(file.dataobj), None, file.header), image_of(root, 4))


def sagittal(root):
    write(image_of(root, 4), image(4), np.diag([4.0, 1.0, 1.0, 1.0]))


WARNINGS = {
    "files elsewhere": (copies_elsewhere, ["images/below/c9.nii.gz, labels_old/c0.nii.gz"]),
    "other kinds of files": (
        lambda r: (r / "labels" / "c5.png").write_bytes(b"x"),
        ["labels/c5.png; to use them, store volumes"],
    ),
    "stray voxel": (stray_voxel, ["value 7: 1 voxel of ", "c3.nii.gz, in no other mask"]),
    "class in one mask": (one_class_once, ["class_2 (value 2) is in one mask only", "c0.nii.gz"]),
    "empty mask": (
        lambda r: write(label_of(r, 0), np.zeros(SHAPE, np.uint8)),
        ["c0.nii.gz: empty, without any class"],
    ),
    "spacing": (other_spacing, ["c4.nii.gz: voxels of 0.1 x 0.1 x 0.4 mm; the median of all is 1"]),
    "pixdim": (
        spacing_against_affine,
        ["c4.nii.gz: the affine has voxels of 2 x 2 x 4 mm, pixdim"],
    ),
    "no orientation": (
        without_forms,
        ["c4.nii.gz: the header tells neither orientation nor place"],
    ),
    "other slices": (sagittal, ["c4: scanned in slices of another direction"]),
}


@pytest.mark.parametrize(("change", "words"), WARNINGS.values(), ids=WARNINGS)
def test_what_is_odd_is_told_last(folder, change, words):
    seen = {
        "labeled": ("c0", "c3")
    }  # of other masks, of those tested on above all, nothing is told
    assert warnings_of(folder, **seen) == []
    change(folder)
    _, text = own_data.complete(config_of(folder, **seen))
    told = [w for w in own_data.warnings_in(text) if words[0] in w]
    assert len(told) == 1 and all(word in told[0] for word in words)
    lines = text.splitlines()
    first = next(n for n, line in enumerate(lines) if "WARNING" in line)
    assert all("WARNING" in line for line in lines[first:])
    assert check_data.check_folder(folder).problems == ()


def test_a_stray_value_is_background_unless_it_is_named(folder):
    stray_voxel(folder)
    config, _ = own_data.complete(config_of(folder))
    assert config.data.label_values == (1, 2)
    np.testing.assert_array_equal(open_set(folder).read_native("c3").label, label(3))
    config, _ = own_data.complete(config_of(folder, label_values=(1, 2, 7)))
    assert config.data.class_names == ("class_1", "class_2", "class_7")


def test_ignored_voxels_count_nowhere(folder):
    """Not in the counts, not in the loss's classes, not in Dice."""
    ignored_or_class(folder)
    names = {"background": 0, "outer": 1, "inner": 2, "ignore": 255}
    (folder / "dataset.json").write_text(json.dumps({"labels": names}))
    config, text = own_data.complete(config_of(folder))
    assert config.data.label_values == (1, 2) and config.data.ignore_value == 255
    assert "value 255: nothing is known there" in text
    prepared = open_set(folder)
    native = prepared.read_native("c0")
    assert (native.label[:, :2] == nifti.IGNORED).all() and (native.label[:, 2:] < 3).all()
    pixels = prepared.volumes["c0"].class_pixels
    assert pixels.shape == (5, 3)
    np.testing.assert_array_equal(pixels.sum(axis=0)[1:], np.bincount(label(0).ravel())[1:])
    everything = np.ones(SHAPE, np.uint8)
    ours, truth = evaluation.without_ignored(everything, native.label)
    assert not ours[:, :2].any() and not truth[:, :2].any() and ours[:, 2:].all()
    (folder / "dataset.json").unlink()
    assert own_data.complete(config_of(folder, ignore_value=255))[0].data.label_values == (1, 2)
    three = own_data.complete(config_of(folder, label_values=(1, 2, 255)))[0].data
    assert three.ignore_value == -1 and len(three.class_names) == 3


def test_masks_of_0_and_255_are_one_class(folder):
    for n in range(4):
        write(label_of(folder, n), (label(n) > 0).astype(np.uint8) * 255)
    assert own_data.complete(config_of(folder))[0].data.label_values == (255,)


# Who plays which role.

NAMES = {
    "patient002_frame01 patient002_frame12 patient003_frame01": "patient002",
    "sub-01_ses-1 sub-01_ses-2 sub-02_ses-1": "sub-01",
    "sub-01_ses-1_T2w sub-01_ses-2_T2w sub-02_T2w": "sub-01",
    "ID7_0001 ID7_0002 ID8_0001": "ID7",
    "knee12_left knee12_right knee13_left": "knee12",
    "A0S9V9_ED A0S9V9_ES B1_ED": "A0S9V9",
    "p1-visit-2 p1-visit-3 p2": "p1",
    "patient002_frame_01 patient002_frame_12 patient003_frame_01": "patient002",
    "anna_pre anna_post bea_pre": "anna",
    "x7_scan1_t2 x7_scan2_t2 x8_scan1_t2": "x7",
}


@pytest.mark.parametrize(("ids", "patient"), NAMES.items())
def test_scans_of_one_patient(ids, patient):
    first, second, other = ids.split()
    found = patients_of([first, second, other])
    assert found == {first: patient, second: patient, other: other}


@pytest.mark.parametrize(
    "ids",
    [
        [f"hippocampus_{n:03d}" for n in range(9)],
        [f"patient{n:03d}" for n in range(9)],
        [f"2021_{n:03d}" for n in range(9)] + [f"2022_{n:03d}" for n in range(9)],
        ["1.3.6.1.4.0175", "1.3.6.1.4.0176", "1.3.6.1.4.0177"],
        ["a b", "O'Neil, J", "-dash", "x(1)", "x(2)", "Пациент"],
        ["la_001_a", "la_002_a"],
        [f"liver_scan{n}" for n in range(9)] + ["brain_scan1"],
        [f"control_m_{n}" for n in range(9)],
    ],
)
def test_names_that_are_of_a_patient_each(ids):
    assert patients_of(ids) == {i: i for i in ids}


def test_scans_of_a_patient_play_one_role(tmp_path):
    root = tmp_path / "mine"
    for p in range(5):
        for t in (1, 12):
            name = f"patient{p:03d}_frame{t:02d}.nii.gz"
            write(root / "images" / name, image(p + t))
            if t == 1 or p < 4:
                write(root / "labels" / name, label(p))
    config, text = own_data.complete(config_of(root))
    roles = {p: role for role in ("labeled", "validation", "test") for p in config.data[role]}
    assert set(roles) < {f"patient{p:03d}" for p in range(5)}
    assert "patient000 is patient000_frame01 and patient000_frame12" in text
    prepared, split = setup.open_data(config)
    owners = {}
    for role, ids in split._asdict().items():
        for volume_id in ids:
            owners.setdefault(prepared.volumes[volume_id].patient_id, set()).add(role)
    assert all(len(found) == 1 for p, found in owners.items() if p != "patient004")
    with pytest.raises(SplitError, match="one of several scans of patient001; .*name patient001"):
        own_data.complete(config_of(root, test=("patient001_frame01",)))
    apart, _ = own_data.complete(config_of(root, patients_by_name=False))
    assert len(apart.data.pool) == 10


def test_images_ts_with_labels_ts_are_the_test_set(tmp_path):
    root = tmp_path / "mine"
    for n in range(8):
        part = "Ts" if n > 4 else "Tr"
        write(root / f"images{part}" / f"c{n}_0000.nii.gz", image(n))
        if n not in (0, 7):
            write(root / f"labels{part}" / f"c{n}.nii.gz", label(n))
    config, text = own_data.complete(config_of(root))
    assert config.data.test == ("c5", "c6") and "imagesTs with labelsTs is the test set" in text
    _, split = setup.open_data(config)
    assert split.test == ("c5", "c6") and {"c0", "c7"} <= set(split.unlabeled)


def test_cases_may_be_left_out(folder):
    write(label_of(folder, 1), label() * np.float32(0.5))
    config, _ = own_data.complete(config_of(folder, exclude=("c1",)))
    assert config.data.pool == ("c0", "c2", "c3", "c4", "c5")
    assert warnings_of(folder, exclude=("c1",), num_labeled="1") == []
    assert "c1" not in open_set(folder, exclude=("c1",)).volumes
    with pytest.raises(VolumeError, match="data.exclude: no case is called x; cases are called"):
        own_data.complete(config_of(folder, exclude=("x",)))


def test_lists_of_empty_masks_alone_are_refused(folder):
    write(label_of(folder, 3), np.zeros(SHAPE, np.uint8))
    words = r"the masks of data\.validation \(c3\) show no class at all"
    with pytest.raises(SplitError, match=words):
        own_data.complete(config_of(folder, validation=("c3",)))


# Intensities.


def test_a_hot_voxel_outweighs_no_other():
    plain = image()
    hot = plain.copy()
    hot[20, 20, 3] = 1e30
    options = {"image_size": 32, "target_spacing_mm": 1.0, "n4_shrink_factor": 0}
    ours, theirs = (preprocess.to_slices(i, (1, 1, 4), **options) for i in (plain, hot))
    assert theirs.max() == grid.CLIP[1]
    changed = np.abs(ours - theirs) > 1e-2
    assert changed.sum() == 1
    n4 = options | {"n4_shrink_factor": 2}
    ours, theirs = (preprocess.to_slices(i, (1, 1, 4), **n4) for i in (plain, hot))
    assert np.quantile(np.abs(ours - theirs), 0.99) < 0.02


def test_ordinary_intensities_are_left_alone():
    values = np.linspace(0, 100, 4001, dtype=np.float32).reshape(-1, 1, 1)
    np.testing.assert_allclose(
        grid.normalize_intensity(values).ravel()[[0, -1]], [-1 / 98, 99 / 98]
    )
    wide = np.concatenate([values.ravel(), [190.0, 305.0, -150.0]])
    low, high = grid.intensity_range(wide)
    found = grid.normalize_intensity(wide.reshape(-1, 1, 1)).ravel()[-3:]
    np.testing.assert_allclose(found, [(190 - low) / (high - low), 3, -1], rtol=1e-5)


# The disk.


@pytest.mark.parametrize("kind", [OSError, RuntimeError])
def test_a_full_disk_is_one_line(folder, monkeypatch, kind):
    """The record writer's own error has no number, only its text; nothing half-made stays."""

    def full(self, path, examples):
        next(iter(examples))
        if kind is OSError:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        raise RuntimeError(f"UNKNOWN: {os.strerror(errno.ENOSPC)} [type...]")

    with monkeypatch.context() as patch:
        patch.setattr(slices.SliceWriter, "write", full)
        with pytest.raises(OSError, match="No space left on device") as error:
            open_set(folder)
    assert error.value.errno == errno.ENOSPC and "prepared" in error.value.filename
    assert len(open_set(folder).volumes) == 6


def test_other_errors_are_no_disk_errors():
    assert dataset._disk_error(ValueError("x")) is None
