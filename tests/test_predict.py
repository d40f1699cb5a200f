"""Segmenting NIfTI files with the model of a run: geometry, values, and what is refused."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from lclseg import evaluation, export, model_files, predict, test_time
from lclseg.crf import upsampled_dense_crf
from lclseg.data import nifti, preprocess
from lclseg.data.layouts import Files
from lclseg.data.nifti import VolumeError
from lclseg.data.preprocess import Preprocessing
from lclseg.model_files import ModelError
from lclseg.run import devices
from lclseg.through_plane import smooth_across_slices
from tfds_builders.phantom import synthesis

TEST_VOLUMES = (4, 5)
HOW = Preprocessing(("shell", "core"), (205, 850), True, 48, 1.5, 0, None)


@pytest.fixture
def main(monkeypatch):
    """The command; JAX is set up already."""
    monkeypatch.setattr(devices, "set_up_jax", lambda devices: None)
    return lambda *argv: predict.main([str(a) for a in argv])


@pytest.fixture(scope="module")
def phantom_folder(tmp_path_factory):
    """The run's test volumes as a scanner's files would be, and their labels."""
    folder = tmp_path_factory.mktemp("phantom")
    for number in TEST_VOLUMES:
        volume = synthesis.make_volume(number)
        affine = np.diag([*volume.spacing_mm, 1.0])
        for data, name in ((volume.image, "images"), (volume.label, "labels")):
            (folder / name).mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(data, affine), folder / name / f"phantom_{number:03d}.nii.gz")
    return folder


@pytest.fixture(scope="module")
def predicted(tiny_run, phantom_folder, tmp_path_factory):
    """What the command wrote for both volumes, with probabilities and metrics."""
    output = tmp_path_factory.mktemp("predicted") / "new" / "folder"
    predict.predict_files(
        [tiny_run[0]],
        phantom_folder / "images",
        output,
        with_probabilities=True,
        labels=phantom_folder / "labels",
    )
    return output


def test_what_is_written(predicted):
    names = [
        f"phantom_{n:03d}{kind}.nii.gz" for n in TEST_VOLUMES for kind in ("", "_probabilities")
    ]
    assert sorted(p.name for p in predicted.iterdir()) == sorted([*names, "metrics.json"])


def without_largest(mask):
    """What lies apart from the largest component of a mask, by SimpleITK."""
    parts = sitk.ConnectedComponent(sitk.GetImageFromArray(mask.astype(np.uint8)), True)
    by_size = sitk.GetArrayFromImage(sitk.RelabelComponent(parts))
    return by_size > 1


@pytest.mark.parametrize("number", TEST_VOLUMES)
def test_prediction_is_that_of_the_runs_own_evaluation(tiny_run, predicted, number):
    workdir, results = tiny_run
    name = f"phantom_{number:03d}.nii.gz"
    ours = nib.load(predicted / name)
    theirs = nib.load(workdir / "predictions" / results["chosen"] / name)
    assert len(np.unique(theirs.dataobj)) > 1
    wanted = np.asarray(theirs.dataobj).copy()  # with every component
    for k in model_files.load_run(workdir).largest_component:
        wanted[without_largest(wanted == k)] = 0
    np.testing.assert_array_equal(np.asarray(ours.dataobj), wanted)
    assert ours.get_data_dtype() == np.uint8


def test_metrics_are_those_of_the_runs_own_evaluation(tiny_run, predicted):
    _, results = tiny_run
    ours = json.loads((predicted / "metrics.json").read_text())
    theirs = results["results"][results["chosen"]]["test"]["largest_component"]
    assert ours.pop("models")[0]["stage"] == results["chosen"]
    kept = json.loads((tiny_run[0] / "postprocessing.json").read_text())
    assert kept == {"largest_component": ours.pop("largest_component")}
    # Spacing went through a header's 32 bits.
    assert_close(ours, theirs)


def assert_close(ours, theirs):
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key in theirs:
            assert_close(ours[key], theirs[key])
    else:
        assert ours == (pytest.approx(theirs) if isinstance(theirs, float) else theirs)


def test_probabilities(tiny_run, predicted):
    """They sum to 1, the label is their argmax, and outside the grid all is background."""
    for number in TEST_VOLUMES:
        label = np.asarray(nib.load(predicted / f"phantom_{number:03d}.nii.gz").dataobj)
        file = nib.load(predicted / f"phantom_{number:03d}_probabilities.nii.gz")
        assert file.shape == (*label.shape, 4) and file.get_data_dtype() == np.float32
        probs = np.asarray(file.dataobj)
        np.testing.assert_allclose(probs.sum(axis=-1), 1, atol=1e-5)
        most = probs.argmax(axis=-1)
        np.testing.assert_array_equal(most[label > 0], label[label > 0])
        for k in np.unique(most[most != label]):
            assert without_largest(most == k)[(most == k) & (label == 0)].all()
        spacing = file.header.get_zooms()
        x = (np.arange(label.shape[0]) - label.shape[0] // 2) * spacing[0]
        # Half a pixel before the middle, of the CRF's grid, twice as fine as that of 32 x 4 mm.
        outside = np.abs(x + 1.0) > 32 * 2.0 + 1e-3
        assert outside.any()
        assert (probs[outside] == [1, 0, 0, 0]).all()


def geometry(kind):
    """Affines [4, 4] in mm, with the spacing along X, Y, S that is in them."""
    spacing = {"thick first": (6.0, 0.9, 1.2)}.get(kind, (0.9, 1.2, 6.0))
    axes = {
        "sagittal": [[0, 0, 1], [-1, 0, 0], [0, -1, 0]],  # files run P, I, R
        "thick first": [[1, 0, 0], [0, -1, 0], [0, 0, -1]],
        "left-handed": [[-1, 0, 0], [0, 1, 0], [0, 0, 1]],
    }.get(kind, np.eye(3))
    if kind == "oblique":
        a, b = np.radians(31), np.radians(-17)
        turn_x = [[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]]
        turn_z = [[np.cos(b), -np.sin(b), 0], [np.sin(b), np.cos(b), 0], [0, 0, 1]]
        axes = np.array(turn_x) @ turn_z
    affine = np.eye(4)
    affine[:3, :3] = np.array(axes) * spacing
    affine[:3, 3] = (-31.7, 112.3, 4.1)
    return affine, spacing


def two_balls(shape, spacing):
    """0, 1 (shell) and 2 (core): balls about a point near the centre, in mm."""
    axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing, strict=True)]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    radius = np.sqrt((x - 2) ** 2 + (y + 3) ** 2 + z**2)
    return (radius < 22).astype(np.uint8) + (radius < 12)


def by_intensity(images):
    """A perfect network for `two_balls` times 100: one-hot, cut half way between the values."""
    return np.eye(3, dtype=np.float32)[np.digitize(images, [0.25, 0.75])]


def write(path, data, affine, *, codes=(1, 1), units=("mm", "sec"), make=nib.Nifti1Image, **header):
    """codes: qform, sform; 0 leaves the form out."""
    file = make(data, None, make.header_class(**header))
    file.header.set_xyzt_units(*units)
    file.header.set_zooms([*np.linalg.norm(affine[:3, :3], axis=0), *[1] * (data.ndim - 3)])
    if codes[0]:
        file.header.set_qform(affine, codes[0])
    if codes[1]:
        file.header.set_sform(affine, codes[1])
    file.header["descrip"] = b"the patient's name"
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(file, path)
    return path


def segment_one(path, output, *, network=by_intensity, how=HOW, label=None, probabilities=False):
    cases = predict.find_cases(path, label)
    outputs = predict.plan_outputs(
        cases, output, with_probabilities=probabilities, with_metrics=label is not None
    )
    return predict.segment(network, how, cases, outputs, batch_size=7)


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


@pytest.mark.parametrize("kind", ["plain", "oblique", "sagittal", "thick first", "left-handed"])
@pytest.mark.parametrize(
    "shape", [(60, 44, 7), (120, 97, 8), (61, 44, 1)], ids=["smaller", "larger", "one slice"]
)
def test_round_trip_in_any_geometry(tmp_path, kind, shape):
    """`smaller`, `larger`: than the 72 mm that the training grid covers."""
    affine, spacing = geometry(kind)
    shape = (shape[2], *shape[:2]) if kind == "thick first" else shape
    truth = two_balls(shape, spacing)
    path = write(tmp_path / "in" / "case.nii.gz", truth * np.float32(100), affine)
    segment_one(path, tmp_path / "out", probabilities=True)
    given, result = nib.load(path), nib.load(tmp_path / "out" / "case.nii.gz")
    assert result.shape == truth.shape
    np.testing.assert_array_equal(result.affine, given.affine)
    label = np.asarray(result.dataobj)
    assert set(np.unique(label)) == {0, 205, 850}
    for k, value in ((1, 205), (2, 850)):
        assert dice(label == value, truth == k) > 0.95
    probs = nib.load(tmp_path / "out" / "case_probabilities.nii.gz")
    np.testing.assert_array_equal(probs.affine, given.affine)
    assert probs.shape == (*truth.shape, 3)


@pytest.mark.parametrize("letters", ["RSA", "SRA", "LPS", "PIR", "ALI"])
def test_a_scan_stored_in_another_order_gets_the_same_result(tmp_path, letters):
    """Axes in another order, some backwards: the same labels and probabilities in that order."""
    affine, spacing = geometry("oblique")
    image = two_balls((60, 44, 7), spacing) * np.float32(100)
    image[40:] += 20  # the two sides differ
    given = nib.Nifti1Image(image, affine)
    turn = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(affine), nib.orientations.axcodes2ornt(letters)
    )
    other = given.as_reoriented(turn)
    write(tmp_path / "plain" / "case.nii.gz", image, affine)
    write(tmp_path / "other" / "case.nii.gz", np.asarray(other.dataobj), other.affine)
    for name in ("plain", "other"):
        segment_one(tmp_path / name / "case.nii.gz", tmp_path / f"{name}_out", probabilities=True)
    for part in ("", "_probabilities"):
        plain, other = (
            nib.load(tmp_path / f"{name}_out" / f"case{part}.nii.gz") for name in ("plain", "other")
        )
        expected = nib.orientations.apply_orientation(np.asarray(plain.dataobj), turn)
        assert expected.std() > 0
        np.testing.assert_allclose(np.asarray(other.dataobj), expected, atol=1e-6)


@pytest.mark.parametrize("suffix", [".mha", ".nrrd", ".hdr", ".NII.GZ"])
def test_other_formats(tmp_path, suffix):
    """The same scan, by SimpleITK or nibabel: the same labels at the same place, as .nii.gz."""
    affine, spacing = geometry("oblique")
    truth = two_balls((60, 44, 7), spacing)
    plain = write(tmp_path / "plain" / "case.nii.gz", truth * np.float32(100), affine)
    (tmp_path / "other").mkdir()
    path = tmp_path / "other" / f"case{suffix}"
    if suffix in (".mha", ".nrrd"):
        sitk.WriteImage(sitk.ReadImage(str(plain)), str(path))
    elif suffix == ".hdr":
        nib.save(nib.Nifti1Pair(truth * np.float32(100), affine), path)
    else:
        shutil.copy(plain, path)
    for name in ("plain", "other"):
        segment_one(tmp_path / name, tmp_path / f"{name}_out")
    expected, found = (nib.load(tmp_path / f"{n}_out" / "case.nii.gz") for n in ("plain", "other"))
    assert np.asarray(expected.dataobj).any()
    np.testing.assert_array_equal(np.asarray(found.dataobj), np.asarray(expected.dataobj))
    np.testing.assert_allclose(found.affine, expected.affine, atol=1e-4)


@pytest.mark.parametrize("unit, to_mm", [("micron", 1e-3), ("meter", 1e3), ("mm", 1.0)])
def test_the_units_of_a_header_are_heeded(tmp_path, unit, to_mm):
    affine, spacing = geometry("plain")
    truth = two_balls((60, 44, 7), spacing)
    other = np.diag([1 / to_mm] * 3 + [1.0]) @ affine
    path = write(tmp_path / "case.nii.gz", truth * np.float32(100), other, units=(unit, "sec"))
    segment_one(path, tmp_path / "out")
    result = nib.load(tmp_path / "out" / "case.nii.gz")
    np.testing.assert_array_equal(result.affine, nib.load(path).affine)
    assert result.header.get_xyzt_units()[0] == unit
    assert dice(np.asarray(result.dataobj) == 205, truth == 1) > 0.95


def test_what_is_unlike_the_training_is_told(tmp_path):
    """Ten times smaller voxels, and the negative of an image; the training's own kind passes."""
    affine, spacing = geometry("plain")
    image = two_balls((60, 44, 7), spacing) * np.float32(100)
    how = HOW._replace(seen_spacing_mm=((0.9, 0.9), (1.2, 1.3), (6.0, 6.0)), seen_median=(0.0, 0.1))
    for name, data, scale in (("same", image, 1), ("small", image, 0.1), ("negative", -image, 1)):
        write(tmp_path / name / "a.nii.gz", data, affine @ np.diag([scale] * 3 + [1]))
    told = {
        name: predict.check_cases(predict.find_cases(tmp_path / name), how)
        for name in ("same", "small", "negative")
    }
    assert told["same"] == []
    assert "voxels of 0.09 mm, in training 0.9 to 0.9 mm" in told["small"][0]
    assert "median intensity 1.00 of its range, in training 0.00 to 0.10" in told["negative"][0]


def test_channels_of_a_case(tmp_path):
    """Both are given to the network in the order of training, under the case's name."""
    affine, spacing = geometry("plain")
    truth = two_balls((60, 44, 7), spacing)
    for number, factor in ((0, 100), (1, -50)):
        write(tmp_path / "in" / f"p_{number:04d}.nii.gz", truth * np.float32(factor), affine)
    seen = []

    def network(images):
        seen.append(images)
        return by_intensity(images[..., 1])

    segment_one(
        tmp_path / "in", tmp_path / "out", network=network, how=HOW._replace(channels=(1, 0))
    )
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["p.nii.gz"]
    assert seen[0].shape[1:] == (48, 48, 2)
    # Channel 1 is the negative: 1 where channel 0 is 0, as far as the volume reaches.
    np.testing.assert_allclose(seen[0][:, 18:30, 18:30].sum(axis=-1), 1, atol=1e-5)
    label = np.asarray(nib.load(tmp_path / "out" / "p.nii.gz").dataobj)
    assert dice(label == 850, truth == 2) > 0.95
    (case,) = predict.find_cases(tmp_path / "in")
    with pytest.raises(VolumeError, match="found 2 channels of p; wanted one image"):
        predict.check_cases([case], HOW)
    (tmp_path / "in" / "p_0001.nii.gz").unlink()
    (case,) = predict.find_cases(tmp_path / "in")
    with pytest.raises(VolumeError, match="found channel 0 of p; wanted 1, 0 as in training"):
        predict.check_cases([case], HOW._replace(channels=(1, 0)))


def test_outside_the_training_grid_is_background(tmp_path):
    affine, spacing = geometry("plain")
    shape = (130, 100, 3)
    image = np.full(shape, 100, np.float32)
    image[60:62] = 0  # not constant
    path = write(tmp_path / "case.nii", image, affine)
    segment_one(path, tmp_path / "out", network=lambda x: np.eye(3)[np.full(x.shape, 2)])
    label = np.asarray(nib.load(tmp_path / "out" / "case.nii.gz").dataobj)
    x, y = ((np.arange(n) - n // 2) * s for n, s in zip(shape[:2], spacing[:2], strict=True))
    inside = (np.abs(x) < 36)[:, None] & (np.abs(y) < 36)
    near = (np.abs(np.abs(x) - 36) < 1)[:, None] | (np.abs(np.abs(y) - 36) < 1)
    expected = np.broadcast_to(np.where(inside, 850, 0)[..., None], shape)
    np.testing.assert_array_equal(label[~near], expected[~near])


@pytest.mark.parametrize(
    "options",
    [
        {"codes": (1, 0)},
        {"codes": (0, 2)},
        {"codes": (4, 3)},
        {"codes": (0, 0)},
        {"units": ("unknown", "unknown")},
        {"units": ("mm", "msec")},
        {"make": nib.Nifti2Image},
        {"endianness": ">"},
    ],
    ids=str,
)
def test_header_is_kept_to_the_bit(tmp_path, options):
    affine, spacing = geometry("oblique")
    image = two_balls((50, 40, 4), spacing).astype(np.int16) * 100
    path = write(tmp_path / "case.nii.gz", image, affine, **options)
    segment_one(path, tmp_path / "out")
    given, result = nib.load(path), nib.load(tmp_path / "out" / "case.nii.gz")
    assert type(result) is type(given)
    np.testing.assert_array_equal(result.affine, given.affine)
    for field in ("dim", "pixdim", "xyzt_units", "qform_code", "sform_code", "srow_x", "qoffset_y"):
        np.testing.assert_array_equal(result.header[field], given.header[field])
    assert result.header["descrip"].item() == b""
    assert result.get_data_dtype().newbyteorder("=") == np.uint16


def test_scale_factors_of_the_input_do_not_reach_the_labels(tmp_path):
    affine, spacing = geometry("plain")
    truth = two_balls((50, 40, 4), spacing)
    file = nib.Nifti1Image(truth.astype(np.int16) * 100, affine)
    file.header.set_slope_inter(0.37, 1000)
    nib.save(file, tmp_path / "case.nii.gz")
    segment_one(tmp_path / "case.nii.gz", tmp_path / "out")
    label = np.asarray(nib.load(tmp_path / "out" / "case.nii.gz").dataobj)
    assert set(np.unique(label)) == {0, 205, 850}


def test_metrics_map_the_data_sets_label_values(tmp_path):
    """Also 421, which is no class."""
    affine, spacing = geometry("plain")
    truth = two_balls((60, 44, 7), spacing)
    raw = np.array([0, 205, 850], np.int16)[truth]
    raw[0, 0, 0] = 421
    write(tmp_path / "images" / "mr_1_image.nii.gz", truth * np.float32(100), affine)
    write(tmp_path / "labels" / "mr_1_label.nii.gz", raw, affine)
    summary = segment_one(tmp_path / "images", tmp_path / "out", label=tmp_path / "labels")
    assert summary["dice_per_class"]["shell"] > 0.95 and summary["dice_per_class"]["core"] > 0.95
    assert summary["mean_hausdorff95_mm"] < 1.5
    lines = predict.table(summary).splitlines()
    assert lines[2].split()[:3] == [
        "mr_1_image",
        "shell",
        f"{summary['dice_per_class']['shell']:.4f}",
    ]
    assert lines[-1].split()[:3] == ["mean", "all", f"{summary['mean_dice']:.4f}"]


def test_metrics_take_other_label_values_as_training_did(tmp_path):
    affine, spacing = geometry("plain")
    raw = two_balls((60, 44, 7), spacing)
    raw[0, 0, 0] = 3
    write(tmp_path / "case.nii.gz", raw * np.float32(100), affine)
    write(tmp_path / "labels" / "case.nii.gz", raw, affine)
    (case,) = predict.find_cases(tmp_path / "case.nii.gz", tmp_path / "labels")
    how = HOW._replace(label_values=(1, 2))
    label = predict.read_case(case, how).label
    np.testing.assert_array_equal(label, np.where(raw == 3, 0, raw))
    with pytest.raises(VolumeError, match=r"case\.nii\.gz: found label values 3; wanted 0 .* 1, 2"):
        predict.read_case(case, how._replace(others_are_background=False))


def test_table_tells_of_missed_and_absent_classes(tmp_path):
    affine, spacing = geometry("plain")
    truth = two_balls((60, 44, 7), spacing)
    write(tmp_path / "case.nii.gz", truth * np.float32(100), affine)
    how = HOW._replace(class_names=("shell", "core", "none"), label_values=(1, 2, 3))
    write(tmp_path / "labels" / "case.nii.gz", truth, affine)

    def shell_only(images):
        return np.eye(4)[(by_intensity(images).argmax(axis=-1) > 0).astype(int)]

    summary = segment_one(
        tmp_path / "case.nii.gz",
        tmp_path / "out",
        how=how,
        network=shell_only,
        label=tmp_path / "labels",
    )
    rows = [line.split() for line in predict.table(summary).splitlines()]
    assert rows[3][:3] == ["case", "core", "0.0000"] and rows[3][-1] == "missed"
    assert rows[4] == ["case", "none", "-", "-", "-", "excluded"]


@pytest.mark.parametrize("axes", [3, 4])
def test_a_run_on_4d_files_takes_its_channel_or_a_3d_file(tmp_path, axes):
    affine, spacing = geometry("plain")
    truth = two_balls((50, 40, 4), spacing)
    image = truth * np.float32(100)
    if axes == 4:
        noise = np.random.default_rng(0).normal(size=image.shape).astype(np.float32)
        image = np.stack([noise, image, noise], axis=-1)
    path = write(tmp_path / "case.nii.gz", image, affine)
    segment_one(path, tmp_path / "out", how=HOW._replace(channel=1))
    result = nib.load(tmp_path / "out" / "case.nii.gz")
    assert result.shape == truth.shape
    assert dice(np.asarray(result.dataobj) == 850, truth == 2) > 0.95


def test_n4_is_done_where_the_run_did_it(tmp_path, monkeypatch):
    from lclseg.data import bias_field

    affine, spacing = geometry("plain")
    path = write(
        tmp_path / "case.nii.gz", two_balls((51, 40, 4), spacing) * np.float32(100), affine
    )
    asked = []

    def corrected(image, spacing_mm, *, shrink_factor):
        asked.append((image.shape, shrink_factor))
        return image[::-1]

    monkeypatch.setattr(bias_field, "correct_bias_field", corrected)
    segment_one(path, tmp_path / "without")
    assert not asked
    segment_one(path, tmp_path / "with", how=HOW._replace(n4_shrink_factor=4))
    assert asked == [((51, 40, 4), 4)]
    plain, mirrored = (
        np.asarray(nib.load(tmp_path / n / "case.nii.gz").dataobj) for n in ("without", "with")
    )
    np.testing.assert_array_equal(mirrored, plain[::-1])


# What is refused.


def good(path):
    affine, spacing = geometry("plain")
    return write(path, two_balls((30, 20, 4), spacing) * np.float32(100), affine)


def with_nan(path):
    image = np.ones((5, 6, 3), np.float32)
    image[2, 2, 2] = np.nan
    write(path, image, geometry("plain")[0])


def truncated(path):
    content = good(path).read_bytes()
    path.write_bytes(content[: len(content) // 2])


def write_with_unit(path, unit):
    file = nib.Nifti1Image(np.arange(60.0).reshape(5, 4, 3), np.eye(4))
    file.header["xyzt_units"] = unit
    nib.save(file, path)


BAD = {
    "4-D": (lambda p: write(p, np.ones((5, 6, 3, 2)), np.eye(4)), "3-D volume"),
    "truncated": (truncated, "not readable as NIfTI"),
    "NaN": (with_nan, "1 voxels are NaN or infinite"),
    "constant": (lambda p: write(p, np.ones((5, 6, 3)), np.eye(4)), "every voxel is 1"),
    "text": (lambda p: p.write_text("hello"), "not readable as NIfTI"),
    "unit of time": (
        lambda p: write_with_unit(p, 5),
        "wanted metres, millimetres or micrometres",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_input_is_named_before_anything_is_predicted(
    tiny_run, tmp_path, main, monkeypatch, fault
):
    make, message = BAD[fault]
    good(tmp_path / "in" / "a.nii.gz")
    make(tmp_path / "in" / "b.nii.gz")
    monkeypatch.setattr(predict, "segment", lambda *a, **k: pytest.fail("predicted"))
    with pytest.raises(SystemExit) as stop:
        main("--workdir", tiny_run[0], "--input", tmp_path / "in", "--output", tmp_path / "out")
    (line,) = stop.value.code.splitlines()  # text: exit code 1
    assert line.startswith(f"lclseg: {tmp_path / 'in' / 'b.nii.gz'}: ") and message in line
    assert not (tmp_path / "out").exists()


def test_every_bad_file_is_named(tmp_path):
    cases = []
    for name in ("x", "y"):
        with_nan(tmp_path / f"{name}.nii.gz")
        cases.append(Files(name, tmp_path / f"{name}.nii.gz", None))
    with pytest.raises(VolumeError, match=r"x\.nii\.gz: 1 voxels.*\n.*y\.nii\.gz: 1 voxels"):
        predict.check_cases(cases, HOW)


@pytest.mark.parametrize("name", ["b.nii.gz", "b_probabilities.nii.gz", "metrics.json"])
def test_nothing_is_overwritten(tmp_path, main, monkeypatch, name):
    for folder in ("in", "labels"):
        for case in "ab":
            good(tmp_path / folder / f"{case}.nii.gz")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("years of work")
    monkeypatch.setattr(predict, "load_models", lambda folders: pytest.fail("worked"))
    with pytest.raises(SystemExit, match=f"exist already: .*{name}; move") as stop:
        main(
            *("--workdir", tmp_path, "--input", tmp_path / "in", "--output", tmp_path / "out"),
            *("--probabilities", "--labels", tmp_path / "labels"),
        )
    assert stop.value.code.startswith("lclseg: 1 result")
    assert [p.read_text() for p in (tmp_path / "out").iterdir()] == ["years of work"]


def test_an_input_is_never_its_own_output(tmp_path):
    path = good(tmp_path / "a.nii.gz")
    with pytest.raises(VolumeError, match="exist already"):
        segment_one(path, tmp_path)


@pytest.mark.parametrize(
    "names, message",
    [
        (("a.nii", "a.nii.gz"), r"a\.nii and .*a\.nii\.gz would have the same result"),
        (("a.nii", "a_probabilities.nii.gz"), r"a_probabilities\.nii\.gz would be written twice"),
    ],
)
def test_results_do_not_collide(tmp_path, names, message):
    for name in names:
        good(tmp_path / "in" / name)
    with pytest.raises(VolumeError, match=message):
        segment_one(tmp_path / "in", tmp_path / "out", probabilities=True)
    assert not (tmp_path / "out").exists()


def test_a_failed_write_leaves_no_half_file(tmp_path, monkeypatch):
    path = good(tmp_path / "a.nii.gz")

    def fail(image, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(nifti.nib, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        segment_one(path, tmp_path / "out")
    assert not list((tmp_path / "out").glob("a*"))


def test_which_files_of_a_folder(tmp_path):
    for name in ("b.nii", "a.nii.gz", "a_gt.nii.gz", "lone_gt.nii.gz", ".hidden.nii.gz", "x.txt"):
        (tmp_path / name).touch()
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "c.nii.gz").touch()
    assert [c.case_id for c in predict.find_cases(tmp_path)] == ["a", "b", "lone_gt"]


@pytest.mark.parametrize("label", ["a.nii.gz", "a_gt.nii.gz", "a.nii"])
def test_label_of_an_image(tmp_path, label):
    (tmp_path / "labels").mkdir()
    (tmp_path / "a.nii.gz").touch()
    (tmp_path / "labels" / label).touch()
    (case,) = predict.find_cases(tmp_path / "a.nii.gz", tmp_path / "labels")
    assert case.label == tmp_path / "labels" / label


def test_labels_beside_their_images(tmp_path):
    for name in ("a.nii.gz", "a_gt.nii.gz"):
        (tmp_path / name).touch()
    (case,) = predict.find_cases(tmp_path, tmp_path)
    assert case[:3] == ("a", tmp_path / "a.nii.gz", tmp_path / "a_gt.nii.gz")


@pytest.mark.parametrize(
    "source, labels, message",
    [
        ("nowhere", None, "no such file or folder"),
        ("empty", None, r"no volume in it, found no file"),
        ("a.txt", None, r"called \.nii\.gz, \.nii, \.hdr with"),
        ("in", "nowhere", "no such folder"),
        ("in", "empty", r"no label of .*a\.nii\.gz; wanted a\.nii\.gz or a_gt\.nii\.gz"),
    ],
)
def test_inputs_that_are_not_there(tmp_path, source, labels, message):
    good(tmp_path / "in" / "a.nii.gz")
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").touch()
    with pytest.raises(VolumeError, match=message):
        predict.find_cases(tmp_path / source, labels and tmp_path / labels)


@pytest.mark.parametrize(
    "values, affine, message",
    [
        ((1, 2), None, r"found label values 1, 2; wanted 0 and the classes' 205, 850"),
        ((205, 850), np.diag([3.0, 1, 1, 1]), "lie differently in space"),
    ],
)
def test_bad_labels_are_refused(tmp_path, values, affine, message):
    path = good(tmp_path / "a.nii.gz")
    truth = two_balls((30, 20, 4), geometry("plain")[1])
    raw = np.array([0, *values], np.int16)[truth]
    label = write(
        tmp_path / "l" / "a.nii.gz", raw, geometry("plain")[0] if affine is None else affine
    )
    with pytest.raises(VolumeError, match=message):
        predict.check_cases([Files("a", path, label)], HOW)


# Which model.


def snapshot(folder):
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in sorted(folder.rglob("*"))}


def test_the_best_stage_is_loaded_and_the_run_left_alone(tiny_run):
    workdir, results = tiny_run
    before = snapshot(workdir)
    model = model_files.load_run(workdir)
    assert snapshot(workdir) == before
    assert model.facts["stage"] == results["chosen"]
    chosen = results["results"][results["chosen"]]
    assert model.facts["validation_dice"] == chosen["best_validation_dice"]
    assert model.facts["test"]["mean_dice"] == chosen["test"]["mean_dice"]
    assert model.facts["num_volumes"] == {"labeled": 1, "unlabeled": 1, "validation": 2, "test": 2}
    how = model.preprocessing
    assert how[:8] == (("RV", "MYO", "LV"), (1, 2, 3), False, 32, 4.0, 0, None, "RAS")
    for stage, result in results["results"].items():
        one = model_files.load_run(workdir, stage=stage).facts
        assert (one["stage"], one["validation_dice"]) == (stage, result["best_validation_dice"])


def test_any_stage_is_loaded_on_demand(tiny_run, tmp_path):
    workdir, results = tiny_run
    stage, result = list(results["results"].items())[-1]
    last = model_files.load_run(workdir, "last").facts
    assert (last["stage"], last["step"]) == (stage, result["num_steps"])
    assert last["validation_dice"] == result["validation"][-1]["mean_dice"]
    assert last["test"]["mean_dice"] == result["test_last"]["mean_dice"]
    with pytest.raises(ModelError, match="'round_7'; wanted one of baseline, round_1, last"):
        model_files.load_run(workdir, "round_7")
    exported = tmp_path / "exported"
    export.write_model(model_files.load_run(workdir, "baseline"), exported)
    assert predict.load_models([exported], "baseline")[0].facts["stage"] == "baseline"
    with pytest.raises(ModelError, match="of the stage 'baseline'; found --stage=last"):
        predict.load_models([workdir, exported], "last")


def test_the_command_takes_a_stage(tiny_run, phantom_folder, tmp_path, main):
    """The Dice of its labels is what the run itself found for that stage, not for its best."""
    workdir, results = tiny_run
    name = "phantom_004"
    stages = results["results"]
    wanted = {"baseline": stages["baseline"]["test"], "last": stages["round_1"]["test_last"]}
    wanted = {k: v["largest_component"] for k, v in wanted.items()}
    wanted = {k: v["per_volume"][name]["dice"] for k, v in wanted.items()}
    assert all(abs(wanted["last"][k] - dice) > 0.01 for k, dice in wanted["baseline"].items())
    for stage, dice in wanted.items():
        main(
            *("--workdir", workdir, "--stage", stage, "--output", tmp_path / stage),
            *("--input", phantom_folder / "images" / f"{name}.nii.gz"),
            *("--labels", phantom_folder / "labels"),
        )
        found = json.loads((tmp_path / stage / "metrics.json").read_text())
        # JAX 0.12: 0.0006 apart in one class. Batches of another size round sums otherwise.
        assert found["per_volume"][name]["dice"] == pytest.approx(dice, abs=0.002)


def test_partly_finished_runs(tiny_run, tmp_path):
    """Before the baseline's test, and of a version that did not record its preprocessing."""
    whole = model_files.load_run(tiny_run[0])
    workdir = tmp_path / "run"
    shutil.copytree(tiny_run[0], workdir)
    shutil.rmtree(workdir / "checkpoints" / "round_1")
    for name in ("results.json", "preprocessing.json"):
        (workdir / name).unlink()
    model = model_files.load_run(workdir)
    assert model.preprocessing == whole.preprocessing
    assert model.facts["stage"] == "baseline"
    assert model.facts["test"] is None and model.facts["num_volumes"] is None
    history = tiny_run[1]["results"]["baseline"]["validation"]
    best = max(history, key=lambda h: h["mean_dice"])
    assert model.facts["validation_dice"] == best["mean_dice"]
    shutil.rmtree(workdir / "checkpoints" / "baseline")
    with pytest.raises(ModelError, match="no validated checkpoint"):
        model_files.load_run(workdir)


def test_damaged_checkpoints_and_foreign_folders(tiny_run, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(tiny_run[0], workdir)
    for path in (workdir / "checkpoints").rglob("state/**/*"):
        if path.is_file():
            path.write_bytes(b"damaged")
    with pytest.raises(ModelError, match="damaged, or of another version") as error:
        model_files.load_run(workdir)
    assert len(str(error.value).splitlines()) == 1
    with pytest.raises(ModelError, match=r"neither config\.json nor model\.json"):
        predict.load_models([tmp_path])


def test_mean_of_several_models(tiny_run):
    """Against the network applied by hand, by one to turned slices too."""
    model = model_files.load_run(tiny_run[0])
    other = model._replace(
        state=model_files.inference_state(
            jax.tree.map(lambda x: -0.5 * x, model.state.ema_params), model.state.batch_stats
        ),
        batch_size=5,
        angles=(),
    )
    assert len(model.angles) == 2
    images = np.random.default_rng(0).random((9, 32, 32), np.float32)
    by_hand = []
    for m in (model, other):
        variables = {"params": m.state.ema_params, "batch_stats": m.state.batch_stats}
        apply = functools.partial(
            model_files.unet(m.preprocessing, m.architecture).apply, variables, train=False
        )
        by_hand.append(
            test_time.mean_over_copies(
                lambda x, apply=apply: jax.nn.softmax(apply(x)["segmentation"], axis=-1),
                jnp.asarray(images),
                m.angles,
            )
        )
    assert np.abs(by_hand[0] - by_hand[1]).max() > 0.1
    mean = predict.mean_predictor([model, other])(images)
    np.testing.assert_allclose(mean, (by_hand[0] + by_hand[1]) / 2, atol=1e-5)


@pytest.mark.parametrize(
    "field, value", [("class_names", ("RV", "MYO", "LA")), ("target_spacing_mm", 2.0)]
)
def test_models_of_other_classes_or_preprocessing_are_not_averaged(
    tiny_run, tmp_path, field, value
):
    workdir = tmp_path / "run"
    shutil.copytree(tiny_run[0], workdir)
    path = workdir / "preprocessing.json"
    how = preprocess.from_json(json.loads(path.read_text()), str(path))
    path.write_text(json.dumps(preprocess.to_json(how._replace(**{field: value}))))
    (workdir / "postprocessing.json").unlink()  # it names classes, too
    assert len(predict.load_models([tiny_run[0], tiny_run[0]])) == 2
    with pytest.raises(ModelError, match=f"cannot be averaged: {field} is .*; give") as error:
        predict.load_models([tiny_run[0], workdir])
    assert str(value) in str(error.value)


def test_a_mean_is_refined_as_its_models_say(tiny_run):
    """Smoothed, then by the CRF; the volume is longer than what goes through that at once."""
    model = model_files.load_run(tiny_run[0])
    assert model.crf["num_steps"] == 2 and model.through_plane_sigma == 8.0
    rng = np.random.default_rng(0)
    image = rng.random((19, 32, 32), np.float32)
    probs = rng.dirichlet([0.3] * 4, image.shape).astype(np.float32)
    smoothed = smooth_across_slices(probs, 5.0, 8.0)
    expected = upsampled_dense_crf(image, smoothed, upsampling=2, **model.crf)
    assert expected.shape == (19, 64, 64, 4)
    assert np.abs(expected[:, ::2, ::2] - smoothed).max() > 0.1 < np.abs(smoothed - probs).max()
    found = predict.refiner([model, model])(image, probs, 5.0)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    by_channels = np.stack([image, rng.random(image.shape, np.float32)], axis=-1)
    np.testing.assert_array_equal(predict.refiner([model])(by_channels, probs, 5.0), found)
    assert predict.refiner([model._replace(crf={}, through_plane_sigma=0.0)]) is None
    # All of them the same way.
    other = model._replace(through_plane_sigma=0.0, source="OTHER")
    with pytest.raises(ModelError, match="through_plane_sigma of 8.0, OTHER of none; wanted the"):
        predict.refiner([model, other])
    with pytest.raises(ModelError, match="crf of {'bilateral_sigma'.* OTHER of none"):
        predict.refiner([model, other._replace(crf={}, through_plane_sigma=8.0)])
    with pytest.raises(ModelError, match="crf_upsampling of 2, OTHER of 1; wanted the same"):
        predict.refiner([model, other._replace(crf_upsampling=1, through_plane_sigma=8.0)])


def test_the_command(tiny_run, phantom_folder, tmp_path, main, capsys, predicted):
    """One file; two runs, which are one; the table."""
    output = tmp_path / "out"
    main(
        *("--workdir", tiny_run[0], "--workdir", tiny_run[0]),
        *("--input", phantom_folder / "images" / "phantom_004.nii.gz", "--output", output),
        *("--labels", phantom_folder / "labels"),
    )
    assert sorted(p.name for p in output.iterdir()) == ["metrics.json", "phantom_004.nii.gz"]
    for folder in (output, predicted):
        label = np.asarray(nib.load(folder / "phantom_004.nii.gz").dataobj)
        assert label.any()
    summary = json.loads((output / "metrics.json").read_text())
    assert len(summary.pop("models")) == 2
    kept = ", ".join(summary.pop("largest_component"))
    out, told = capsys.readouterr()
    assert predict.table(summary) in out and str(output) in out
    assert f"of {kept} the largest component is kept; --largest_component=no keeps all" in told


def test_the_largest_component_of_a_class_alone(tmp_path):
    """A second ball far from the first, smaller; each class in two pieces."""
    affine, spacing = geometry("oblique")
    truth = two_balls((60, 44, 7), spacing)
    image = truth * np.float32(100)
    image[2:8, 2:8, 3:5], image[4:6, 4:6, 3:5] = 100, 200
    path = write(tmp_path / "in" / "case.nii.gz", image, affine)
    found = {}
    for keep in ((), (1,), (2,)):
        cases = predict.find_cases(path)
        folder = tmp_path / f"kept {keep}"
        outputs = predict.plan_outputs(cases, folder, with_probabilities=False, with_metrics=False)
        predict.segment(by_intensity, HOW, cases, outputs, batch_size=7, keep_largest=keep)
        found[keep] = np.asarray(nib.load(folder / "case.nii.gz").dataobj)
    every = found.pop(())
    for (k,), label in found.items():
        apart = without_largest(every == HOW.label_values[k - 1])
        assert apart[:10].any()
        np.testing.assert_array_equal(label, np.where(apart, 0, every))


def test_which_largest_components_are_kept(tiny_run, tmp_path):
    """By the flag, or as the runs say, if they agree; of an older run none."""
    model = model_files.load_run(tiny_run[0])
    names = json.loads((tiny_run[0] / "postprocessing.json").read_text())["largest_component"]
    assert names and model_files.kept_largest(model) == names
    assert predict.classes_to_clean([model], "run") == model.largest_component
    models = [model._replace(largest_component=kept) for kept in ((1, 3), (1, 3), ())]
    assert predict.classes_to_clean(models[:2], "run") == (1, 3)
    with pytest.raises(ModelError, match="RV, LV, .* of no class; .*--largest_component=yes"):
        predict.classes_to_clean(models, "run")
    assert predict.classes_to_clean(models, "yes") == (1, 2, 3)
    assert predict.classes_to_clean(models, "no") == ()

    workdir = shutil.copytree(tiny_run[0], tmp_path / "run")
    (workdir / "postprocessing.json").write_text('{"largest_component": ["atrium"]}')
    with pytest.raises(ModelError, match=r"postprocessing\.json: largest_component is \['atrium"):
        model_files.load_run(workdir)
    (workdir / "postprocessing.json").unlink()
    assert model_files.load_run(workdir).largest_component == ()


def test_the_flag_keeps_every_component(tiny_run, phantom_folder, tmp_path, main, capsys):
    image = phantom_folder / "images" / "phantom_004.nii.gz"
    argv = ("--workdir", tiny_run[0], "--input", image, "--output", tmp_path / "out")
    main(*argv, "--largest_component=no")
    assert "largest component" not in capsys.readouterr().err
    ours = nib.load(tmp_path / "out" / image.name)
    theirs = nib.load(tiny_run[0] / "predictions" / tiny_run[1]["chosen"] / image.name)
    np.testing.assert_array_equal(np.asarray(ours.dataobj), np.asarray(theirs.dataobj))


def test_full_batches_run_across_volumes():
    """Volumes of another size than the batch: every slice once, in its own volume."""
    calls = []

    def network(images):
        calls.append(len(images))
        return images[..., None] * 2

    images = [
        (n, np.random.default_rng(i).random((s, 2, 2)))
        for i, (n, s) in enumerate(zip("abc", (3, 9, 1), strict=True))
    ]
    found = list(evaluation.predict_images(network, iter(images), batch_size=4))
    assert calls == [4, 4, 4, 1]
    for (name, image), prediction in zip(images, found, strict=True):
        assert prediction.volume_id == name
        np.testing.assert_array_equal(prediction.probs[..., 0], image * 2)
