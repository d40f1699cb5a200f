"""Own data: what is proposed, which lists are drawn, and the prepared set; on small files."""

import json
import os
import runpy
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from lclseg import evaluation, export, model_files, predict, report, train
from lclseg.data import own_data
from lclseg.data.builder_options import options_of
from lclseg.data.dataset import open_prepared
from lclseg.data.nifti import VolumeError
from lclseg.data.splits import SplitError, draw_lists
from lclseg.errors import ConfigError
from tfds_builders import slices
from tfds_builders.mmwhs import mmwhs_dataset_builder as mmwhs

ROOT = Path(__file__).parents[1]
OPEN = {"labeled": (), "unlabeled": (), "validation": (), "test": ()}


def write(path, data, spacing_mm=(1.0, 1.0, 4.0), flip=(1, 1, 1)):
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([*np.multiply(spacing_mm, flip), 1.0])
    affine[:3, 3] = (5, -7, 11)
    nib.save(nib.Nifti1Image(data, affine), path)


def mask(shape, *boxes):
    """A label map with (value, x, y, z) boxes, each axis a (first, last) pair."""
    label = np.zeros(shape, np.int16)
    for value, *ranges in boxes:
        label[tuple(slice(first, last + 1) for first, last in ranges)] = value
    return label


def image_of(seed, shape):
    return np.random.default_rng(seed).normal(100, 20, shape).astype(np.float32)


SHAPE = (40, 30, 4)
BOX = (1, (10, 12), (20, 24), (1, 2))
OTHER = (2, (20, 25), (10, 14), (0, 3))


def make_simple(root, num_masks=3, num_cases=5, dtype=np.uint8, values=(1, 2), **kwargs):
    """images/ and labels/, c0, c1, ...: the first `num_masks` of them with a mask."""
    for n in range(num_cases):
        write(root / "images" / f"c{n}.nii.gz", image_of(n, SHAPE), **kwargs)
        if n < num_masks:
            label = mask(SHAPE, (values[0], *BOX[1:]), (values[1], *OTHER[1:])).astype(dtype)
            write(root / "labels" / f"c{n}.nii.gz", label, **kwargs)
    return root


def make_nnunet(root, labels):
    """imagesTr with _0000, labelsTr, imagesTs, dataset.json; b has no mask; files of a Mac."""
    for n, (folder, case) in enumerate((("Tr", "a"), ("Tr", "b"), ("Tr", "d"), ("Ts", "c"))):
        write(root / f"images{folder}" / f"{case}_0000.nii.gz", image_of(n, SHAPE))
    for case in "ad":
        write(root / "labelsTr" / f"{case}.nii.gz", mask(SHAPE, BOX, OTHER).astype(np.float32))
        (root / "labelsTr" / f"._{case}.nii.gz").write_bytes(b"\x00\x05")
    (root / "dataset.json").write_text(json.dumps({"labels": labels}))
    return root


def config_of(folder, **data):
    config = runpy.run_path(str(ROOT / "configs" / "nifti_folder.py"))["get_config"]()
    config.data.manual_dir = str(folder)
    config.data.update(data)
    return config


def open_set(config, data_dir):
    data = config.data
    return open_prepared(
        data.name,
        image_size=data.image_size,
        target_spacing_mm=data.target_spacing_mm,
        data_dir=str(data_dir),
        manual_dir=data.manual_dir,
        options=own_data.builder_options(data),
    )


def complete(folder, **data):
    return own_data.complete(config_of(folder, **data))


def test_another_data_set_is_left_alone():
    config = runpy.run_path(str(ROOT / "configs" / "phantom.py"))["get_config"]("local_contrastive")
    assert own_data.complete(config) == (config, "")
    assert options_of(config.data) == {}


# Foreground of a: x 10..12 of 40, y 20..24 of 30: 10 voxels from the centre to the outer edge along
# both. The other box is nearer.
@pytest.mark.parametrize(
    ("spacing_mm", "given", "target", "size"),
    [
        ((1.0, 1.0, 4.0), {}, 1.0, 32),  # 2 * 10 mm * 1.1 = 22 px
        ((1.0, 2.0, 4.0), {}, 1.5, 32),  # y: 2 * 20 mm * 1.1 = 44 mm = 29.3 px
        ((1.0, 2.0, 4.0), {"target_spacing_mm": 1.0}, 1.0, 64),  # 44 px
        ((3.2, 3.2, 4.0), {"target_spacing_mm": 2.2}, 2.2, 32),  # 70.4 mm are 32 px to the bit
        ((3.2, 3.2, 4.0), {"target_spacing_mm": 2.19}, 2.19, 64),
        ((1.0, 2.0, 4.0), {"image_size": 96}, 1.5, 96),
        ((0.123456789, 0.123456789, 4.0), {}, 0.12346, 32),
    ],
)
def test_grid(tmp_path, spacing_mm, given, target, size):
    """Worked out by hand from 40 x 30 pixels with the outermost foreground 10 from the centre."""
    config, _ = complete(make_simple(tmp_path, spacing_mm=spacing_mm), **given)
    assert config.data.target_spacing_mm == target
    assert config.data.image_size == size


def test_the_margin_ends_with_the_image(tmp_path):
    """Foreground at the border of 64 px: 64, not 70.4 and so 96."""
    shape = (64, 64, 3)
    for case in "ab":
        write(tmp_path / "images" / f"{case}.nii.gz", image_of(1, shape))
        write(tmp_path / "labels" / f"{case}.nii.gz", mask(shape, (1, (0, 3), (30, 33), (0, 2))))
    write(tmp_path / "images" / "c.nii.gz", image_of(1, shape))
    assert complete(tmp_path)[0].data.image_size == 64


def test_spacing_is_the_median_of_all_images(tmp_path):
    """c3 and c4 have no mask, and count."""
    make_simple(tmp_path)
    for n, spacing in ((2, 0.8), (3, 0.7), (4, 0.7)):
        for kind in ("images", "labels"):
            path = tmp_path / kind / f"c{n}.nii.gz"
            if path.exists():
                write(path, np.asarray(nib.load(path).dataobj), (spacing, spacing, 4.0))
    config, text = complete(tmp_path)
    assert config.data.target_spacing_mm == 0.8
    assert "0.7 to 1 mm" in text


@pytest.mark.parametrize(
    ("spacing_mm", "axis"),
    [
        ((1, 1, 4), 2),
        ((4, 1, 1), 0),
        ((1, 4, 2), 1),
        ((1, 1, 1), 2),
        ((1.001, 1, 1), 2),  # rounding of a header is no axis
        ((3, 1, 3), 2),
    ],
)
def test_slice_axis(tmp_path, spacing_mm, axis):
    config, _ = complete(make_simple(tmp_path, spacing_mm=spacing_mm))
    assert config.data.slice_axis == axis
    assert complete(tmp_path, slice_axis=1)[0].data.slice_axis == 1


@pytest.mark.parametrize(
    "labels",
    [
        {"0": "background", "1": "ring", "2": "disc"},  # Decathlon
        {"background": 0, "ring": 1, "disc": 2},  # nnU-Net
    ],
)
def test_nnunet_folder(tmp_path, labels):
    config, text = complete(make_nnunet(tmp_path / "D7", labels))
    assert config.data.class_names == ("ring", "disc")
    assert config.data.label_values == (1, 2)
    assert "4 images, 2 with a mask" in text
    prepared = open_set(config, tmp_path / "prepared")
    assert [(v, e.has_label) for v, e in prepared.volumes.items()] == [
        ("a", True),
        ("b", False),
        ("c", False),
        ("d", True),
    ]
    np.testing.assert_array_equal(prepared.read_native("a").label, mask(SHAPE, BOX, OTHER))
    assert prepared.read_native("b").label is None


def test_names_of_what_dataset_json_does_not_tell(tmp_path):
    """A value without a name, a region of values; a listed value that no mask shows is out."""
    make_nnunet(tmp_path, {"background": 0, "whole": [1, 2], "disc": 2, "never": 7})
    config, _ = complete(tmp_path)
    assert config.data.class_names == ("class_1", "disc")


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.int32, np.float32, np.float64])
def test_label_values_become_consecutive_classes(tmp_path, dtype):
    config, text = complete(make_simple(tmp_path / "x", dtype=dtype, values=(500, 205)))
    assert config.data.label_values == (205, 500)
    assert config.data.class_names == ("class_205", "class_500")
    assert "205 -> 1 class_205 (in 3), 500 -> 2 class_500 (in 3)" in text
    prepared = open_set(config, tmp_path / "prepared")
    assert prepared.preprocessing.label_values == (205, 500)
    assert prepared.num_classes == 3
    native = prepared.read_native("c0").label
    raw = nib.load(tmp_path / "x" / "labels" / "c0.nii.gz").get_fdata()
    np.testing.assert_array_equal(np.array((0, 205, 500))[native], raw)
    # Every voxel lies on the grid: 40 x 30 at 1 mm, the boxes within the middle 32.
    counts = sum(prepared.volumes["c0"].class_pixels)
    assert counts[1:].tolist() == [(raw == 205).sum(), (raw == 500).sum()]


def test_label_values_are_stored_with_the_set(tmp_path):
    """MM-WHS has values of its own."""
    shape = (20, 20, 2)
    label = np.zeros(shape, np.int16)
    label[5:15, 5:15] = 420
    write(tmp_path / "mr" / "mr_train_1001_image.nii.gz", image_of(0, shape))
    write(tmp_path / "mr" / "mr_train_1001_label.nii.gz", label)
    grid = {"image_size": 32, "target_spacing_mm": 1.0, "data_dir": str(tmp_path / "prepared")}
    values = mmwhs.RAW_VALUES
    prepared = open_prepared("mmwhs", manual_dir=str(tmp_path / "mr"), **grid)
    assert prepared.preprocessing.label_values == values
    again = open_prepared("mmwhs", manual_dir="", **grid).preprocessing
    assert (again.label_values, again.others_are_background) == (values, True)
    assert again == prepared.preprocessing


def test_chosen_label_values(tmp_path):
    """Others are background, and count for no proposal; the box of 1 needs the larger grid."""
    config, text = complete(
        make_simple(tmp_path / "x"),
        label_values=(2,),
        class_names=("disc",),
        target_spacing_mm=0.5,
    )
    # 2: x 20..25, y 10..14: 6 voxels, 5: 2 * 6 * 1.1 / 0.5 = 26.4 px; with 1 it would be 44.
    assert config.data.image_size == 32
    assert "values 1 count as background" in text
    native = open_set(config, tmp_path / "prepared").read_native("c0").label
    np.testing.assert_array_equal(native, mask(SHAPE, (1, *OTHER[1:])))
    assert complete(tmp_path / "x", target_spacing_mm=0.5)[0].data.image_size == 64


def test_a_grid_that_cuts_foreground_off_is_told(tmp_path):
    _, text = complete(make_simple(tmp_path), image_size=32, target_spacing_mm=0.5)
    assert "WARNING: the grid cuts off foreground of 3 masks, c0 first" in text
    assert "cuts off" not in complete(tmp_path)[1]


def test_files_of_several_orientations_make_one_set(tmp_path):
    """c1 stored as PSR, image and mask; c2's mask alone as LSA: the set is the same."""
    plain = make_simple(tmp_path / "plain")
    mixed = make_simple(tmp_path / "mixed")
    for name, letters in (("images/c1", "PSR"), ("labels/c1", "PSR"), ("labels/c2", "LSA")):
        restore(mixed / f"{name}.nii.gz", letters)
    sets = []
    for folder in (plain, mixed):
        config, text = complete(folder)
        assert config.data.slice_axis == 2
        sets.append(open_set(config, tmp_path / "prepared"))
    assert "files lie RAS 4, PSR 1; all are turned to RAS" in text and "WARNING: no" in text
    assert list(sets[0].volumes) == list(sets[1].volumes)
    records = range(len(sets[0].source))
    for ours, theirs in zip(*(s.read_slices(records) for s in sets), strict=True):
        assert ours.any()
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def restore(path, letters):
    """Stores a file in another order of axes; the scan stays where it is."""
    file = nib.load(path)
    ours = nib.orientations.io_orientation(file.affine)
    turn = nib.orientations.ornt_transform(ours, nib.orientations.axcodes2ornt(letters))
    turned = file.as_reoriented(turn)
    nib.save(nib.Nifti1Image(np.asarray(turned.dataobj), turned.affine), path)


def test_coarsest_axis_first(tmp_path):
    """Sagittal slices: last on the way in, and where they were in what is written."""
    shape, spacing = (5, 40, 36), (4.0, 1.0, 1.2)
    label = mask(shape, (3, (1, 3), (12, 20), (8, 30)))
    for case in "ab":
        write(tmp_path / "images" / f"{case}.nii.gz", image_of(0, shape), spacing)
        write(tmp_path / "labels" / f"{case}.nii.gz", label, spacing)
    write(tmp_path / "images" / "c.nii.gz", image_of(0, shape), spacing)
    config, _ = complete(tmp_path)
    assert config.data.slice_axis == 0 and config.data.target_spacing_mm == 1.1
    prepared = open_set(config, tmp_path / "prepared")
    assert prepared.preprocessing.orientation == "ASR"
    native = prepared.read_native("a")
    assert native.shape == (40, 36, 5)
    np.testing.assert_allclose(native.spacing_mm, (1.0, 1.2, 4.0), rtol=1e-6)
    np.testing.assert_array_equal(native.label, np.moveaxis(label, 0, 2) > 0)
    # A voxel has kept its place in the world.
    file = nib.load(tmp_path / "images" / "a.nii.gz")
    np.testing.assert_allclose(native.affine @ (7, 9, 2, 1), file.affine @ (2, 7, 9, 1))

    def predict(images):  # the truth, whatever the image: [S, H, W] -> one-hot
        _, truth = prepared.read_slices(range(len(images)))
        return np.eye(2, dtype=np.float32)[truth]

    summary = evaluation.evaluate(
        predict, prepared, ["a"], batch_size=5, with_distances=False, save_to=tmp_path / "out"
    )
    assert summary["mean_dice"] > 0.9  # resampling
    written = nib.load(tmp_path / "out" / "a.nii.gz")
    assert written.shape == shape
    np.testing.assert_allclose(written.affine, file.affine)
    np.testing.assert_allclose(written.header.get_zooms(), spacing, rtol=1e-6)
    agree = (written.get_fdata() > 0) == (label > 0)
    assert agree.mean() > 0.97


def test_channels(tmp_path):
    """nnU-Net's several images of a case are its channels, in the order of their numbers."""
    make_nnunet(tmp_path / "x", {"background": 0, "ring": 1, "disc": 2})
    for n, name in enumerate(("Tr/a", "Tr/b", "Tr/d", "Ts/c")):
        write(tmp_path / "x" / f"images{name}_0001.nii.gz", 500 - 2 * image_of(n, SHAPE))
    config, text = complete(tmp_path / "x", target_spacing_mm=1.0)
    assert config.data.pool == ("a", "b", "c", "d")
    assert config.data.channels == (0, 1) and "4 images" in text
    both = open_set(config, tmp_path / "prepared")
    image, _ = both.read_slices(both.volumes["d"].slices)
    assert image.shape == (4, 32, 32, 2) and both.preprocessing.num_channels == 2
    # Of one a straight line downwards gives the other, percentiles of each taken by itself.
    np.testing.assert_allclose(image[:, :, 5:25, 1], 1 - image[:, :, 5:25, 0], atol=1e-4)
    for number in (0, 1):
        config, _ = complete(tmp_path / "x", channels=(number,), target_spacing_mm=1.0)
        one = open_set(config, tmp_path / "prepared")
        alone, _ = one.read_slices(one.volumes["d"].slices)
        np.testing.assert_allclose(alone, image[..., number], atol=1e-6)
    with pytest.raises(VolumeError, match="no channel 2 of a; wanted some of 0, 1"):
        complete(tmp_path / "x", channels=(2,))


def test_a_missing_channel_is_named(tmp_path):
    make_nnunet(tmp_path, {"background": 0, "ring": 1})
    for name in ("Tr/a", "Tr/d", "Ts/c"):
        write(tmp_path / f"images{name}_0001.nii.gz", image_of(8, SHAPE))
    with pytest.raises(VolumeError, match=r"b_0000.nii.gz: b has channel 0; wanted 0, 1"):
        complete(tmp_path)
    assert complete(tmp_path, exclude=("b",), num_labeled="1")[0].data.pool == ("a", "c", "d")


def test_numbered_files_with_labels_of_their_own_are_no_channels(tmp_path):
    for n in range(3):
        name = f"p7_{n:04d}.nii.gz"
        write(tmp_path / "images" / name, image_of(n, SHAPE))
        write(tmp_path / "labels" / name, mask(SHAPE, BOX))
    write(tmp_path / "images" / "q.nii.gz", image_of(3, SHAPE))
    config, _ = complete(tmp_path, patients_by_name=False)
    assert config.data.pool == ("p7", "p7_0001", "p7_0002", "q") and config.data.channels == ()


def test_ct_is_windowed_by_the_foreground(tmp_path):
    """As nnU-Net: 0.5th to 99.5th percentile in the masks learnt from, mapped to 0 and 1."""
    make_nnunet(tmp_path / "x", {"background": 0, "ring": 1, "disc": 2})
    content = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "ring": 1, "disc": 2}}
    (tmp_path / "x" / "dataset.json").write_text(json.dumps(content))
    config, text = complete(tmp_path / "x", labeled=("a",), target_spacing_mm=1.0)
    image = image_of(0, SHAPE)
    low, high = np.percentile(image[mask(SHAPE, BOX, OTHER) > 0], (0.5, 99.5))
    np.testing.assert_allclose(config.data.windows, [(low, high)], rtol=1e-6)
    assert "channel 0 is CT" in text
    prepared = open_set(config, tmp_path / "prepared")
    slices_, _ = prepared.read_slices(prepared.volumes["a"].slices)
    expected = np.clip((image - low) / (high - low), 0, 1)[4:36].transpose(2, 0, 1)
    np.testing.assert_allclose(slices_[:, :, 1:31], expected, atol=1e-5)


def refuse_to_build(monkeypatch):
    def build(*args):
        raise AssertionError("prepared a second time")

    monkeypatch.setattr(slices, "generate_examples", build)


def test_an_unchanged_folder_is_prepared_once(tmp_path, monkeypatch):
    folder = make_simple(tmp_path / "x")
    before = open_set(complete(folder)[0], tmp_path / "prepared").read_slices([2])[0]
    refuse_to_build(monkeypatch)
    config, _ = complete(folder, draw_seed=3, num_labeled="1")  # no byte depends on the lists
    np.testing.assert_array_equal(
        open_set(config, tmp_path / "prepared").read_slices([2])[0], before
    )


def touch(folder):
    path = folder / "labels" / "c1.nii.gz"
    later = path.stat().st_mtime_ns + 10**9
    os.utime(path, ns=(later, later))


CHANGES = {
    "file rewritten": touch,
    "mask taken away": lambda folder: (folder / "labels" / "c1.nii.gz").unlink(),
    "image added": lambda f: write(f / "images" / "c9.nii.gz", image_of(9, SHAPE)),
    "names": lambda f: (f / "dataset.json").write_text('{"labels": {"ring": 1}}'),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_folder_is_prepared_anew(tmp_path, monkeypatch, change):
    folder = make_simple(tmp_path / "x")
    open_set(complete(folder)[0], tmp_path / "prepared")
    change(folder)
    with monkeypatch.context() as patch:
        refuse_to_build(patch)
        with pytest.raises(AssertionError, match="a second time"):
            open_set(complete(folder)[0], tmp_path / "prepared")


def test_two_folders_in_one_place(tmp_path):
    """Folders of one name and with the same file names are two sets."""
    sets = []
    for n in (1, 2):
        folder = make_simple(tmp_path / str(n) / "data")
        for image in (folder / "images").iterdir():
            write(image, image_of(100 * n, SHAPE))
        sets.append(open_set(complete(folder)[0], tmp_path / "prepared"))
    images = [s.read_slices([0])[0] for s in sets]
    assert np.abs(images[0] - images[1]).max() > 0.1


def test_files_that_change_between_the_look_and_the_preparation(tmp_path):
    folder = make_simple(tmp_path / "x")
    config, _ = complete(folder)
    touch(folder)
    with pytest.raises(VolumeError, match="changed"):
        open_set(config, tmp_path / "prepared")


def unlink_masks(root):
    for path in (root / "labels").iterdir():
        path.unlink()


def empty_masks(root):
    for path in (root / "labels").iterdir():
        write(path, np.zeros(SHAPE, np.uint8))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (unlink_masks, VolumeError, "0 label files, so no case has a mask; wanted at least two"),
        (empty_masks, VolumeError, "3 labelled and validation masks .*all of them empty"),
        (
            lambda r: [(r / "labels" / f"c{n}.nii.gz").unlink() for n in (0, 1)],
            SplitError,
            "1 patients with ground truth; wanted at least 2",
        ),
        (
            lambda r: (r / "labels" / "c0.nii.gz").rename(r / "labels" / "c0_seg.nii.gz"),
            VolumeError,
            "c0_seg.nii.gz: no image is called like this label",
        ),
        (
            lambda r: write(r / "labels" / "c1.nii.gz", np.full(SHAPE, 0.5, np.float32)),
            VolumeError,
            "c1.nii.gz: found label values 0.5; wanted whole numbers",
        ),
        (
            lambda r: write(r / "labels" / "c1.nii.gz", np.full(SHAPE, -1, np.int16)),
            VolumeError,
            "c1.nii.gz: found label values -1",
        ),
        (
            lambda r: write(r / "labels" / "c1.nii.gz", np.full(SHAPE, np.nan, np.float32)),
            VolumeError,
            "c1.nii.gz: found label values nan",
        ),
        (
            lambda r: write(
                r / "labels" / "c1.nii.gz", np.arange(4800, dtype=np.int16).reshape(SHAPE)
            ),
            VolumeError,
            "masks show 4799 values .* are these images",
        ),
        (
            lambda r: write(r / "labels" / "c2.nii.gz", np.ones((9, 9, 9), np.uint8)),
            VolumeError,
            r"c2.nii.gz: label has shape \(9, 9, 9\)",
        ),
        (
            lambda r: write(r / "images" / "c4.nii.gz", np.ones((9, 9, 9, 2), np.float32)),
            VolumeError,
            "c4.nii.gz: found an array of shape .*one file each",
        ),
        (
            lambda r: write(r / "images" / "c0.nii", image_of(0, SHAPE)),
            VolumeError,
            "several images are called c0",
        ),
        (
            lambda r: (r / "dataset.json").write_text('{"labels"'),
            VolumeError,
            "dataset.json: not readable as JSON",
        ),
    ],
)
def test_folders_that_will_not_do(tmp_path, damage, error, message):
    make_simple(tmp_path)
    damage(tmp_path)
    with pytest.raises(error, match=message):
        complete(tmp_path)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ({"manual_dir": ""}, VolumeError, "data.manual_dir is not set; give the folder"),
        ({"manual_dir": "/no/such"}, VolumeError, "no folder /no/such; wanted images/"),
        ({"num_labeled": "4"}, SplitError, "3 patients with ground truth; wanted at least 4"),
        ({"num_labeled": "few"}, SplitError, "data.num_labeled is 'few'"),
        ({"class_names": ("one",)}, VolumeError, "a name for each value but 0"),
        ({"class_names": ("one", "one")}, VolumeError, "each one different"),
    ],
)
def test_values_that_will_not_do(tmp_path, data, error, message):
    make_simple(tmp_path)
    with pytest.raises(error, match=message):
        complete(tmp_path, **data)


# (masks, cases without, num_labeled) -> labelled, validation, test; the rest is in the pool.
@pytest.mark.parametrize(
    ("masks", "without", "num_labeled", "expected"),
    [
        (1, 9, "1", (1, 0, 0)),
        (2, 9, "2", (2, 0, 0)),
        (2, 9, "1", (1, 1, 0)),
        (3, 9, "2", (2, 1, 0)),
        (3, 9, "1", (1, 1, 1)),
        (4, 9, "2", (2, 1, 1)),
        (6, 9, "2", (2, 2, 2)),
        (30, 9, "8", (8, 2, 20)),
        (8, 9, "8", (8, 0, 0)),
        (2, 9, "all", (1, 1, 0)),
        (5, 9, "all", (3, 1, 1)),
        (30, 9, "all", (22, 2, 6)),
        (200, 0, "2", (2, 2, 40)),
        (5, 0, "1", (1, 2, 1)),
        (4, 0, "2", (2, 1, 1)),
        (2, 0, "2", (2, 0, 0)),
        (30, 0, "all", (22, 2, 6)),
    ],
)
def test_how_many_are_drawn(masks, without, num_labeled, expected):
    shown = {f"p{n:03d}": 2 for n in range(masks)}

    def draw(seed):
        return draw_lists(
            np.random.default_rng(seed),
            shown,
            lists=OPEN,
            num_labeled=num_labeled,
            num_unlabeled=without,
        )[0]

    lists = draw(5)
    assert tuple(len(lists[r]) for r in ("labeled", "validation", "test")) == expected
    drawn = sum(lists.values(), ())
    assert len(set(drawn)) == len(drawn) and set(drawn) <= set(shown)
    assert draw(5) == lists
    if masks > 5 and expected[0] < masks:
        assert draw(6) != lists
        assert len({draw(seed)["labeled"] for seed in range(20)}) > 3


# (masks, cases without, num_labeled, num_validation) -> labelled, validation, test.
@pytest.mark.parametrize(
    ("masks", "without", "num_labeled", "num_validation", "expected"),
    [
        (2, 9, "2", 0, (2, 0, 0)),
        (1, 9, "1", 0, (1, 0, 0)),
        (5, 9, "2", 0, (2, 0, 3)),
        (2, 9, "all", 0, (1, 0, 1)),
        (10, 0, "2", 0, (2, 0, 2)),
        (9, 9, "2", 4, (2, 4, 3)),
        (6, 9, "6", 3, (3, 3, 0)),
    ],
)
def test_masks_are_spent_on_validation_as_asked(
    masks, without, num_labeled, num_validation, expected
):
    lists, notes = draw_lists(
        np.random.default_rng(0),
        {f"p{n}": 2 for n in range(masks)},
        lists=OPEN,
        num_labeled=num_labeled,
        num_unlabeled=without,
        num_validation=num_validation,
    )
    assert tuple(len(lists[r]) for r in ("labeled", "validation", "test")) == expected
    assert any("last averaged weights" in n for n in notes) == (num_validation == 0)


def test_a_list_of_validation_cases_is_not_drawn_again():
    lists, _ = draw_lists(
        np.random.default_rng(0),
        {p: 1 for p in "ABCDEFGH"},
        lists=OPEN | {"validation": ("B",)},
        num_labeled="2",
        num_unlabeled=3,
        num_validation=1,
    )
    assert lists["validation"] == ("B",) and len(lists["test"]) == 5


def test_more_validation_cases_than_masks():
    with pytest.raises(SplitError, match="wanted at least 4"):
        draw_lists(
            np.random.default_rng(0),
            {p: 1 for p in "ABC"},
            lists=OPEN,
            num_labeled="2",
            num_unlabeled=3,
            num_validation=3,
        )


def test_lists_that_are_given_stay(tmp_path):
    shown = {p: 1 for p in "ABCDEFGH"}
    for lists, expected in (
        ({"labeled": ("B",)}, (1, 2, 5)),
        ({"validation": ("B",)}, (2, 1, 5)),
        ({"test": ("B", "C")}, (2, 2, 2)),
        ({"labeled": ("A", "B"), "validation": ("C",)}, (2, 1, 5)),
        ({"unlabeled": ("A", "B")}, (2, 2, 2)),
    ):
        found, _ = draw_lists(
            np.random.default_rng(0),
            shown,
            lists=OPEN | lists,
            num_labeled="2",
            num_unlabeled=3,
        )
        assert tuple(map(len, (found["labeled"], found["validation"], found["test"]))) == expected
        for role, patients in lists.items():
            assert found.get(role, patients) == patients
        everyone = sum((OPEN | found | lists).values(), ())
        assert len(set(everyone)) == len(everyone)


def test_no_choice_knows_the_masks_of_others(tmp_path):
    """Test masks that would change grid, classes and lists, or that no reader opens: all the same.

    Foreground at the border would ask for a larger grid, 9 would be a class.
    """
    make_simple(tmp_path, num_masks=8, num_cases=10)
    before, text = complete(tmp_path, target_spacing_mm=0.5)
    assert len(before.data.test) == 4 and "looked at: the 4 labelled" in text
    first, *others = before.data.test
    write(
        tmp_path / "labels" / f"{first}.nii.gz",
        mask(SHAPE, (1, (0, 39), (0, 29), (0, 3)), (9, (3, 5), (3, 5), (0, 3))).astype(np.uint8),
    )
    (tmp_path / "labels" / f"{others[0]}.nii.gz").write_bytes(b"no NIfTI")
    write(tmp_path / "labels" / f"{others[1]}.nii.gz", np.zeros(SHAPE, np.uint8))
    after, _ = complete(tmp_path, target_spacing_mm=0.5)
    before.data.folder_digest = after.data.folder_digest  # of the files
    assert after.to_dict() == before.to_dict()


@pytest.mark.parametrize("role", ["labeled", "validation"])
def test_masks_without_foreground_to_learn_from(tmp_path, role):
    make_simple(tmp_path, num_masks=4)
    lists = {"labeled": ("c0", "c1"), "validation": ("c2", "c3")}
    for case in lists[role]:
        write(tmp_path / "labels" / f"{case}.nii.gz", np.zeros(SHAPE, np.uint8))
    with pytest.raises(SplitError, match=rf"data\.{role} .* show no class at all; set"):
        complete(tmp_path, **lists)


def test_a_class_that_no_labelled_mask_shows_is_told(tmp_path):
    make_simple(tmp_path, num_masks=4)
    lists = {"labeled": ("c0", "c1"), "validation": ("c2", "c3")}
    assert "no labelled mask" not in complete(tmp_path, **lists)[1]
    for case in lists["labeled"]:
        write(tmp_path / "labels" / f"{case}.nii.gz", mask(SHAPE, BOX).astype(np.uint8))
    config, text = complete(tmp_path, **lists)
    assert config.data.label_values == (1, 2)
    assert "WARNING: no labelled mask shows class_2" in text


def test_scans_of_a_patient_play_one_role(tmp_path):
    for n, case in enumerate(f"p{p}_scan{s}" for p in range(6) for s in (1, 2)):
        write(tmp_path / "images" / f"{case}.nii.gz", image_of(n, SHAPE))
        if case != "p3_scan2":
            write(tmp_path / "labels" / f"{case}.nii.gz", mask(SHAPE, BOX, OTHER))
    config, text = complete(tmp_path)
    assert config.data.pool == config.data.with_mask == tuple(f"p{p}" for p in range(6))
    assert "patients with several scans, by their names: 6; " in text
    apart, _ = complete(tmp_path, patients_by_name=False)
    assert len(apart.data.pool) == 12 and len(apart.data.with_mask) == 11


def test_images_and_labels_for_testing_are_the_test_set(tmp_path):
    make_nnunet(tmp_path, {"background": 0, "ring": 1, "disc": 2})
    write(tmp_path / "labelsTs" / "c.nii.gz", mask(SHAPE, BOX, OTHER))
    for seed in range(4):
        data = complete(tmp_path, draw_seed=seed)[0].data
        assert data.test == ("c",) and {*data.labeled, *data.validation} == {"a", "d"}


def test_config_with_lists(tmp_path):
    """On top of a folder: roles do not overlap, whoever has none is in the pool."""
    make_simple(tmp_path, num_masks=5, num_cases=7)
    config, text = complete(tmp_path, validation=("c4",), num_labeled="1")
    data = config.data
    assert data.validation == ("c4",) and len(data.labeled) == 1 and len(data.test) == 3
    assert data.pool == tuple(f"c{n}" for n in range(7))
    assert "data.validation: 1 given: c4" in text and "in the unlabelled pool: 2 patients" in text
    again, _ = complete(tmp_path, validation=("c4",), num_labeled="1", data_dir="elsewhere")
    assert again.data.labeled == data.labeled
    # The model's seed moves nobody.
    other = config_of(tmp_path, validation=("c4",), num_labeled="1")
    other.seed = 7
    assert own_data.complete(other)[0].data.test == data.test


def test_which_classes_are_one_piece_is_told(tmp_path):
    """Of the labelled masks: in that of the validation case, class 1 is in two pieces, too."""
    make_simple(tmp_path, num_masks=4)
    speck = (2, (0, 2), (0, 2), (0, 3))
    for name, pieces in (("c0", (BOX, OTHER, speck)), ("c2", ((1, *speck[1:]), BOX, OTHER))):
        write(tmp_path / "labels" / f"{name}.nii.gz", mask(SHAPE, *pieces).astype(np.uint8))
    lists = {"labeled": ("c0", "c1"), "validation": ("c2",)}
    line = "predictions.largest_component = by_masks  "
    _, text = complete(tmp_path, **lists)
    assert (
        f"{line}(kept of class_1, one piece in all labelled masks; not of class_2, in several "
        "pieces in c0)"
    ) in text
    _, text = complete(tmp_path, labeled=("c0",), validation=("c1",), label_values=(2,))
    assert f"{line}(kept of none; not of class_2, in several pieces in c0)" in text
    config = config_of(tmp_path, **lists)
    config.predictions.largest_component = "no"
    _, text = own_data.complete(config)
    assert "predictions.largest_component = no  (given)" in text


def test_a_run_that_learns_from_both_of_two_masks(tmp_path):
    """No mask chooses a checkpoint: the last weights are handed out, and everything says so."""
    folder = make_simple(tmp_path / "x", num_masks=2, num_cases=4, spacing_mm=(4.0, 1.0, 1.0))
    workdir = tmp_path / "run"
    config = config_of(folder, data_dir=str(tmp_path / "prepared"), labeled_batch_size=4)
    config.data.unlabeled_batch_size = 4
    config.model.filters = (4, 4)
    config.augment.strength = "paper"  # compiled in half the time
    config.rounds.update(baseline_steps=3, steps_per_round=2, num_rounds=1, eval_every=2)
    config.rounds.batch_norm_batches = 1
    results = train.train_and_evaluate(config, workdir)
    assert {r: len(ids) for r, ids in results["volumes"].items()} == {
        "labeled": 2,
        "unlabeled": 2,
        "validation": 0,
        "test": 0,
    }
    assert results["chosen"] == "round_1"
    kept = json.loads((workdir / "postprocessing.json").read_text())["largest_component"]
    assert kept == ["class_1", "class_2"]
    assert "(kept of class_1, class_2, one piece" in (workdir / "proposal.txt").read_text()
    for stage, steps in (("baseline", 3), ("round_1", 2)):
        result = results["results"][stage]
        assert (result["best_validation_dice"], result["validation"]) == (None, [])
        assert result["num_steps"] == steps
    assert "handed out: the last" in report.table(results)
    assert "since no volume validates" in (workdir / "report.html").read_text()

    model = model_files.load_run(workdir)
    facts = {k: model.facts[k] for k in ("stage", "step", "validation_dice")}
    assert facts == {"stage": "round_1", "step": 2, "validation_dice": None}
    assert model_files.load_run(workdir, "baseline").facts["step"] == 3
    export.write_model(model, tmp_path / "exported")
    assert export.read_model(tmp_path / "exported").facts == model.facts
    assert "Not validated" in (tmp_path / "exported" / "README.md").read_text()
    predict.predict_files([workdir], folder / "images" / "c3.nii.gz", tmp_path / "out")
    assert (tmp_path / "out" / "c3.nii.gz").exists()


def test_a_run_with_two_masks(tmp_path):
    """Trains, tests on nothing, tells so; goes on with the same folder, not with a changed one."""
    folder = make_simple(tmp_path / "x", num_masks=2, num_cases=4, spacing_mm=(4.0, 1.0, 1.0))
    workdir = tmp_path / "run"

    def run():
        config = config_of(folder, data_dir=str(tmp_path / "prepared"), labeled_batch_size=4)
        config.data.update(num_labeled="1", unlabeled_batch_size=4)
        config.model.filters = (4, 4)
        config.augment.strength = "paper"  # compiled in half the time
        config.rounds.update(baseline_steps=2, steps_per_round=2, num_rounds=1, eval_every=2)
        config.rounds.batch_norm_batches = 0
        return train.train_and_evaluate(config, workdir)

    results = run()
    split = json.loads((workdir / "splits.json").read_text())
    assert split == results["volumes"]
    assert {r: len(ids) for r, ids in split.items()} == {
        "labeled": 1,
        "unlabeled": 2,
        "validation": 1,
        "test": 0,
    }
    assert results["results"]["baseline"]["test"]["n_volumes"] == 0
    assert "0 test volumes" in report.table(results)
    for case in ("c2", "c3"):
        written = nib.load(workdir / "pseudo_labels" / "round_1" / f"{case}.nii.gz")
        image = nib.load(folder / "images" / f"{case}.nii.gz")
        assert written.shape == image.shape
        np.testing.assert_allclose(written.affine, image.affine)
    stored = json.loads((workdir / "config.json").read_text())["data"]
    assert (stored["slice_axis"], stored["image_size"]) == (0, 32)

    assert run() == results
    touch(folder)
    with pytest.raises(ConfigError, match="other values of data.folder_digest"):
        run()
