"""NIfTI reading and writing, and the maps between native and training geometry."""

import gzip

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from lclseg.data import grid, nifti
from lclseg.data.nifti import VolumeError

AFFINE = np.array(
    [[-1.5, 0.1, 0, 40], [0.05, -0.8, 0.3, -20], [0, 0.2, 7.5, 5], [0, 0, 0, 1]], np.float64
)


def noise(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def positions_mm(size, spacing):
    """Pixel centres along an axis, measured from the middle pixel."""
    return (np.arange(size) - size // 2) * spacing


def within(mm, size, spacing):
    """Whether positions, as `positions_mm` has them, lie in one of the pixels of an axis."""
    ends = positions_mm(size, spacing)[[0, -1]] + np.array([-0.5, 0.5]) * spacing
    return (mm > ends[0]) & (mm < ends[1])


# native shape, native in-plane spacing, image_size, target spacing; no grid pixel lies half-way
# between two native ones
GRIDS = {
    "finer": ((9, 13, 3), (1.7, 2.3), 24, 0.71),
    "coarser": ((40, 33, 2), (0.61, 0.83), 16, 1.37),
    "finer along x, coarser along y": ((15, 61, 2), (2.9, 0.57), 31, 1.19),
    "crop x, pad y": ((50, 10, 2), (1.0, 1.3), 28, 1.13),
    "one row": ((1, 13, 2), (3.1, 1.3), 9, 1.07),
}


@pytest.mark.parametrize(("shape", "spacing", "size", "target"), GRIDS.values(), ids=GRIDS)
def test_image_to_grid_equals_map_coordinates(shape, spacing, size, target):
    image = noise(shape)
    grid_mm = np.stack(np.meshgrid(*[positions_mm(size, target)] * 2, indexing="ij"))
    index = [grid_mm[a] / spacing[a] + shape[a] // 2 for a in (0, 1)]
    inside = np.all([within(grid_mm[a], shape[a], spacing[a]) for a in (0, 1)], axis=0)
    expected = [
        ndimage.map_coordinates(image[..., s], index, order=1, mode="nearest") * inside
        for s in range(shape[2])
    ]
    found = grid.image_to_grid(image, (*spacing, 5.0), image_size=size, target_spacing_mm=target)
    assert found.dtype == np.float32
    assert found.any()
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(("shape", "spacing", "size", "target"), GRIDS.values(), ids=GRIDS)
def test_label_to_grid_takes_the_nearest_pixel(shape, spacing, size, target):
    label = np.random.default_rng(0).integers(1, 250, shape).astype(np.uint8)
    expected = np.zeros((shape[2], size, size), np.uint8)
    native_x, native_y = (positions_mm(shape[a], spacing[a]) for a in (0, 1))
    for i, x in enumerate(positions_mm(size, target)):
        for j, y in enumerate(positions_mm(size, target)):
            if within(x, shape[0], spacing[0]) and within(y, shape[1], spacing[1]):
                nearest = np.abs(native_x - x).argmin(), np.abs(native_y - y).argmin()
                expected[:, i, j] = label[nearest]
    found = grid.label_to_grid(label, (*spacing, 5.0), image_size=size, target_spacing_mm=target)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)


def test_distances_in_mm_are_kept():
    """A ramp of so many units per mm has the same slope and zero on the grid."""
    shape, spacing = (60, 44, 1), (0.9, 1.6)
    x, y = (positions_mm(shape[a], spacing[a]) for a in (0, 1))
    image = (3 * x[:, None] - 2 * y + 1)[..., None]
    x, y = [positions_mm(32, 1.25)] * 2
    found = grid.image_to_grid(image, (*spacing, 8.0), image_size=32, target_spacing_mm=1.25)
    np.testing.assert_allclose(found[0], 3 * x[:, None] - 2 * y + 1, atol=1e-4)


@pytest.mark.parametrize("spacing", [1.0, 0.625, 1.36719, float(np.float32(1.36719))])
@pytest.mark.parametrize("size", [12, 13])
def test_identity_where_spacing_and_size_match(spacing, size):
    image = noise((size, size, 3))
    kwargs = {"image_size": size, "target_spacing_mm": spacing}
    spacing_mm = (spacing, spacing, 10.0)
    np.testing.assert_allclose(
        grid.image_to_grid(image, spacing_mm, **kwargs), np.moveaxis(image, 2, 0), atol=1e-5
    )
    label = (image > 0).astype(np.uint8)
    on_grid = grid.label_to_grid(label, spacing_mm, **kwargs)
    np.testing.assert_array_equal(on_grid, np.moveaxis(label, 2, 0))
    probs = np.eye(2, dtype=np.float32)[on_grid]
    back = grid.probs_to_native_label(probs, spacing_mm, (size, size), target_spacing_mm=spacing)
    np.testing.assert_array_equal(back, label)


@pytest.mark.parametrize("spacing", [1.0, 0.625, 1.36719])
@pytest.mark.parametrize("native", [10, 11, 216, 217])
@pytest.mark.parametrize("size", [6, 7, 191, 192, 230, 231])
def test_equal_spacing_is_a_crop_or_pad(native, size, spacing):
    """Whatever the sizes' parity: no pixel is blurred, none left out, labels lie on their image."""
    volume = 1 + np.arange(native * 8).reshape(native, 8, 1) % 250
    before = size // 2 - native // 2
    whole = np.pad(volume[..., 0], ((max(before, 0), size), (0, 0)))[max(-before, 0) :][:size]
    kwargs = {"image_size": size, "target_spacing_mm": spacing}
    columns = slice(max(size // 2 - 4, 0), size // 2 + 4)
    shown = slice(max(4 - size // 2, 0), None)
    for to_grid in (grid.image_to_grid, grid.label_to_grid):
        found = to_grid(volume.astype(np.uint8), (spacing, spacing, 1), **kwargs)[0, :, columns]
        expected = whole[:, shown][:, : found.shape[1]]
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("native", [40, 41])
@pytest.mark.parametrize("ratio", [0.5, 0.71, 1, 1.5, 1.75, 2, 3])
def test_labels_lie_where_the_image_is(native, ratio):
    """On the whole, pixels' labels come from where the pixels' intensities do, to either side."""
    line = np.arange(native)[:, None, None] * np.ones((1, 8, 1), np.int32)
    kwargs = {"image_size": 64, "target_spacing_mm": ratio}
    image = grid.image_to_grid(line, (1.0, 1.0, 1.0), **kwargs)[0, :, 32]
    label = grid.label_to_grid(line, (1.0, 1.0, 1.0), **kwargs)[0, :, 32]
    inner = (image > 0) & (image < native - 1)
    assert inner.sum() > 10
    assert abs((label - image)[inner].mean()) < 0.06


# native shape, native in-plane spacing, image_size, target spacing, radii of the ellipse in mm
ROUND_TRIPS = {
    "grid larger": ((70, 61, 2), (1.1, 1.3), 128, 0.9, (22, 28)),
    "grid smaller": ((150, 130, 2), (0.8, 0.9), 64, 1.25, (22, 28)),
    "one axis each": ((160, 50, 2), (0.8, 1.2), 64, 1.1, (24, 20)),
    "coarse native": ((48, 40, 2), (2.1, 2.4), 96, 1.0, (25, 30)),
}


def ellipse_depth(shape, spacing, radii_mm):
    """[X, Y, S], positive inside an ellipse off the centre, roughly in mm."""
    x, y = (positions_mm(shape[a], spacing[a]) for a in (0, 1))
    radius = np.hypot((x[:, None] - 3) / radii_mm[0], (y - -2) / radii_mm[1])
    return np.repeat(((1 - radius) * min(radii_mm))[..., None], shape[2], axis=2)


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


@pytest.mark.parametrize(
    ("shape", "spacing", "size", "target", "radii"), ROUND_TRIPS.values(), ids=ROUND_TRIPS
)
@pytest.mark.parametrize("kind", ["probabilities", "labels"])
def test_round_trip(shape, spacing, size, target, radii, kind):
    depth = ellipse_depth(shape, spacing, radii)
    label = (depth > 0).astype(np.uint8)
    spacing_mm = (*spacing, 6.0)
    kwargs = {"image_size": size, "target_spacing_mm": target}
    if kind == "probabilities":
        inside = 1 / (1 + np.exp(-depth / 2))
        probs = np.stack(
            [grid.image_to_grid(p, spacing_mm, **kwargs) for p in (1 - inside, inside)], axis=-1
        )
    else:
        probs = np.eye(2)[grid.label_to_grid(label, spacing_mm, **kwargs)]
    native = grid.probs_to_native_label(probs, spacing_mm, shape[:2], target_spacing_mm=target)
    assert native.shape == shape
    assert native.dtype == np.uint8
    assert dice(native == 1, label == 1) > 0.97


def test_native_pixels_outside_the_grid_are_background():
    shape, spacing, size, target = (50, 41, 3), (1.1, 1.7), 24, 1.3
    probs = np.zeros((3, size, size, 4), np.float32)
    probs[..., 2] = 1
    native = grid.probs_to_native_label(probs, (*spacing, 9.0), shape[:2], target_spacing_mm=target)
    x, y = (within(positions_mm(shape[a], spacing[a]), size, target) for a in (0, 1))
    expected = np.where(x[:, None] & y, 2, 0)
    assert 0 < expected.astype(bool).sum() < expected.size
    np.testing.assert_array_equal(native, np.repeat(expected[..., None], 3, axis=2))


def test_a_label_map_beyond_the_crop_comes_back_where_the_grid_was():
    """Stripes of three classes fill the native volume; what the crop cut stays background."""
    label = np.repeat(np.arange(90) // 30, 80).reshape(90, 80).T[..., None].astype(np.uint8) + 1
    kwargs = {"image_size": 32, "target_spacing_mm": 1.0}
    on_grid = grid.label_to_grid(label, (1.0, 1.0, 5.0), **kwargs)
    back = grid.probs_to_native_label(
        np.eye(4)[on_grid], (1.0, 1.0, 5.0), (80, 90), target_spacing_mm=1.0
    )
    expected = np.zeros_like(label)
    expected[24:56, 29:61] = label[24:56, 29:61]
    np.testing.assert_array_equal(back, expected)


def test_normalize_intensity_by_hand():
    """Of 0, 1, ..., 100 the 1st percentile is 1, the 99th 99: v becomes (v - 1) / 98, unclipped."""
    values = np.random.default_rng(0).permutation(101).astype(np.float32)
    normalized = grid.normalize_intensity((values * 4 - 30).reshape(101, 1, 1))
    assert normalized.dtype == np.float32
    np.testing.assert_allclose(normalized.ravel(), (values - 1) / 98, atol=1e-6)


def test_normalize_intensity_of_a_nearly_empty_volume():
    image = np.full((20, 20, 3), 2.0, np.float32)
    image[3, 4, 1], image[5, 6, 2] = 10, 6
    normalized = grid.normalize_intensity(image)
    assert np.unique(normalized).tolist() == [0, 0.5, 1]


def write_nifti(path, data, *, affine=AFFINE, pixdim=None):
    """Writes a .nii.gz; `pixdim` goes into the header's bytes behind nibabel's back."""
    nib.save(nib.Nifti1Image(data, affine), path)
    if pixdim is not None:
        content = bytearray(gzip.decompress(path.read_bytes()))
        content[80:92] = np.asarray(pixdim, "<f4").tobytes()
        path.write_bytes(gzip.compress(bytes(content)))
    return path


def test_read_image(tmp_path):
    """Voxels scaled as the header says and left in the file's order; spacing as in pixdim."""
    path = tmp_path / "image.nii.gz"
    file = nib.Nifti1Image(np.arange(60, dtype=np.int16).reshape(3, 4, 5), AFFINE)
    file.header.set_slope_inter(0.5, 100)
    nib.save(file, path)
    stored = nib.load(path).get_fdata()
    volume = nifti.read_image(path)
    assert volume.image.dtype == np.float32
    np.testing.assert_allclose(volume.image, stored, rtol=1e-6)
    assert volume.label is None
    assert volume.affine.dtype == np.float64
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-5)
    norms = np.linalg.norm(AFFINE[:3, :3], axis=0)
    np.testing.assert_allclose(volume.spacing_mm, norms, rtol=1e-5)


def holes(value):
    data = noise((4, 5, 3))
    data[1, 2, 0] = data[3, 3, 2] = value
    return data


def make_bad_image(path, kind):
    arrays = {
        "4-D": noise((4, 5, 3, 2)),
        "2-D": noise((4, 5)),
        "NaN": holes(np.nan),
        "infinite": holes(-np.inf),
        "constant": np.full((4, 5, 3), 7, np.int16),
        "complex": noise((4, 5, 3)).astype(np.complex64),
        "RGB": np.zeros((4, 5, 3), [(c, "u1") for c in "RGB"]),
    }
    if kind in arrays:
        write_nifti(path, arrays[kind])
    elif kind == "truncated":
        content = write_nifti(path, noise((30, 30, 9))).read_bytes()
        path.write_bytes(content[: len(content) // 2])
    elif kind == "not NIfTI":
        path.write_text("<html>404</html>")
    elif kind == "no bytes":
        path.write_bytes(b"")
    elif kind == "folder":
        path.mkdir()
    elif kind == "spacing NaN":
        write_nifti(path, noise((4, 5, 3)), pixdim=(1, np.nan, 1))
    elif kind == "spacing zero":
        write_nifti(path, noise((4, 5, 3)), pixdim=(1, 1, 0))
    else:
        assert kind == "missing"


BAD_IMAGES = {
    "missing": "no such file",
    "truncated": "not readable as NIfTI .*damaged or of another format: copy or download it again",
    "not NIfTI": "not readable as NIfTI",
    "no bytes": "not readable as NIfTI",
    "folder": "found a folder of that name; wanted a file: rename",
    "4-D": r"found an array of shape \(4, 5, 3, 2\); wanted a 3-D volume",
    "2-D": r"found an array of shape \(4, 5\); wanted a 3-D volume",
    "complex": "found voxels of type complex64; wanted real numbers",
    "RGB": "found voxels of type .*; wanted real numbers",
    "NaN": "2 voxels are NaN or infinite; wanted finite",
    "infinite": "2 voxels are NaN or infinite; wanted finite",
    "constant": "every voxel is 7; wanted an image",
    "spacing NaN": r"voxel spacing is \(1.0, nan, 1.0\) mm; wanted positive",
    "spacing zero": "spacing|pixdim",
}


@pytest.mark.parametrize(("kind", "message"), BAD_IMAGES.items(), ids=BAD_IMAGES)
def test_read_image_errors(tmp_path, kind, message):
    path = tmp_path / "patient007_frame01.nii.gz"
    make_bad_image(path, kind)
    with pytest.raises(VolumeError, match=message) as caught:
        nifti.read_image(path)
    assert str(caught.value).startswith(str(path))


LABEL = np.random.default_rng(1).integers(0, 4, (4, 5, 3)).astype(np.uint8)


@pytest.fixture
def pair(tmp_path):
    """(label path, image, image path), the image written and read, the label not yet written."""
    image_path = write_nifti(tmp_path / "image.nii.gz", noise((4, 5, 3)))
    return tmp_path / "label.nii.gz", nifti.read_image(image_path), image_path


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int64", "float32", "float64"])
def test_read_label(pair, dtype):
    """Floats are as good as integers if they are whole."""
    nib.save(nib.Nifti1Image(LABEL.astype(dtype), AFFINE, dtype=np.dtype(dtype)), pair[0])
    label = nifti.read_label(*pair, num_classes=4)
    assert label.dtype == np.uint8
    np.testing.assert_array_equal(label, LABEL)


def changed(value, dtype):
    label = LABEL.astype(dtype)
    label[2, 2, 1] = value
    return label


SHIFTED = AFFINE + [[0, 0, 0, 0.25], [0] * 4, [0] * 4, [0] * 4]
BAD_LABELS = {
    "shape": (LABEL[:, :, :2], AFFINE, r"shape \(4, 5, 2\), its image {image} \(4, 5, 3\)"),
    "axes swapped": (LABEL.transpose(1, 0, 2), AFFINE, r"shape \(5, 4, 3\), its image {image}"),
    "4-D": (LABEL[..., None].repeat(2, 3), AFFINE, r"\(4, 5, 3, 2\); wanted a 3-D volume"),
    "shifted": (LABEL, SHIFTED, r"image {image} lie differently .*differ by up to 0\.25"),
    "mirrored": (LABEL, AFFINE @ np.diag([-1, 1, 1, 1]), r"image {image} lie differently"),
    "too high": (changed(4, "uint8"), AFFINE, r"label values 4; wanted whole numbers 0\.\.3"),
    "negative": (changed(-1, "int16"), AFFINE, r"label values -1; wanted whole numbers 0\.\.3"),
    "fractional": (changed(0.5, "f4"), AFFINE, r"label values 0\.5; wanted whole numbers 0\.\.3"),
    "NaN": (changed(np.nan, "f4"), AFFINE, r"label values nan; wanted whole numbers 0\.\.3"),
}


@pytest.mark.parametrize(("data", "affine", "message"), BAD_LABELS.values(), ids=BAD_LABELS)
def test_read_label_errors(pair, data, affine, message):
    path, _, image_path = pair
    write_nifti(path, np.ascontiguousarray(data), affine=affine)
    with pytest.raises(VolumeError, match=message.format(image=image_path)) as caught:
        nifti.read_label(*pair, num_classes=4)
    assert str(caught.value).startswith(str(path))


def test_read_label_missing(pair):
    with pytest.raises(VolumeError, match=f"{pair[0]}: no such file"):
        nifti.read_label(*pair, num_classes=4)


def test_label_within_the_affine_tolerance(pair):
    """Headers rewritten by other software differ in the last digits."""
    write_nifti(pair[0], LABEL, affine=AFFINE + 2e-4)
    np.testing.assert_array_equal(nifti.read_label(*pair, num_classes=4), LABEL)


def test_write_label(tmp_path):
    """All of the geometry goes into the file, spacing even where the affine says another one."""
    path = tmp_path / "a" / "b" / "label.nii.gz"
    spacing_mm = (1.25, 0.75, 8.0)
    nifti.write_label(path, LABEL.astype(np.int64), AFFINE, spacing_mm)
    file = nib.load(path)
    assert file.shape == LABEL.shape
    assert file.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(file.dataobj), LABEL)
    np.testing.assert_allclose(file.affine, AFFINE, atol=1e-5)
    np.testing.assert_allclose(file.header.get_zooms(), spacing_mm, rtol=1e-6)
    assert file.header.get_xyzt_units()[0] == "mm"


def test_written_label_belongs_to_its_image(pair):
    path, image, image_path = pair
    nifti.write_label(path, LABEL, image.affine, image.spacing_mm)
    label = nifti.read_label(path, image, image_path, num_classes=4)
    np.testing.assert_array_equal(label, LABEL)
