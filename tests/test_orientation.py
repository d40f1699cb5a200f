"""Volumes in one orientation: on the way in, on the way out, for every order of a file's axes."""

import itertools

import nibabel as nib
import numpy as np
import pytest

from lclseg.data import nifti, orientation
from lclseg.data.nifti import VolumeError
from lclseg.data.orientation import AS_FILED, Orientation

EVERY = [
    "".join(letters)
    for pairs in itertools.permutations(("RL", "AP", "SI"))
    for letters in itertools.product(*pairs)
]
SHAPE, SPACING = (5, 6, 4), (0.8, 1.1, 3.0)  # along R, A, S


def turn_matrix(x_degrees, z_degrees):
    a, b = np.radians((x_degrees, z_degrees))
    x = [[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]]
    z = [[np.cos(b), -np.sin(b), 0], [np.sin(b), np.cos(b), 0], [0, 0, 1]]
    return np.array(x) @ z


def ras_affine(tilt=(0, 0)):
    affine = np.eye(4)
    affine[:3, :3] = turn_matrix(*tilt) * SPACING
    affine[:3, 3] = (-31.7, 112.3, 4.1)
    return affine


def stored(data, affine, letters):
    """The same scan as a file of another orientation; by nibabel."""
    ours = nib.orientations.axcodes2ornt("RAS")
    theirs = nib.orientations.axcodes2ornt(letters)
    turn = nib.orientations.ornt_transform(ours, theirs)
    moved = nib.orientations.apply_orientation(data, turn)
    return moved, affine @ nib.orientations.inv_ornt_aff(turn, data.shape)


def write(path, data, affine):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, affine), path)
    return path


def scan(seed=0):
    return np.random.default_rng(seed).integers(1, 250, SHAPE).astype(np.uint8)


def test_there_are_48():
    assert len(set(EVERY)) == 48 and all(map(orientation.is_valid, EVERY))
    assert not any(map(orientation.is_valid, ("RAR", "RA", "XAS", None, "RLS", "")))


@pytest.mark.parametrize("tilt", [(0, 0), (20, -13)], ids=["straight", "oblique"])
@pytest.mark.parametrize("letters", EVERY)
def test_every_order_of_axes_gives_the_same_volume(tmp_path, letters, tilt):
    """And goes back to the file's own order exactly."""
    data, affine = scan(), ras_affine(tilt)
    moved, moved_affine = stored(data, affine, letters)
    assert orientation.letters_of(moved_affine) == letters
    path = write(tmp_path / "a.nii.gz", moved, moved_affine)
    volume = nifti.oriented(nifti.read_image(path), "RAS")
    np.testing.assert_array_equal(volume.image, data)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-4)
    np.testing.assert_allclose(volume.spacing_mm, SPACING, rtol=1e-5)
    back = orientation.to_file(volume.image, volume.orientation)
    np.testing.assert_array_equal(back, moved)
    numbers = orientation.to_numbers(volume.orientation)
    assert orientation.from_numbers(numbers) == volume.orientation
    label = (data > 100).astype(np.uint8)
    nifti.write_label(
        tmp_path / "l.nii.gz", label, volume.affine, volume.spacing_mm, turn=volume.orientation
    )
    written = nib.load(tmp_path / "l.nii.gz")
    np.testing.assert_array_equal(np.asarray(written.dataobj), moved > 100)
    np.testing.assert_allclose(written.affine, moved_affine, atol=1e-4)
    np.testing.assert_allclose(
        written.header.get_zooms(), nib.load(path).header.get_zooms(), rtol=1e-6
    )


@pytest.mark.parametrize("wanted", EVERY)
def test_every_orientation_may_be_wanted(tmp_path, wanted):
    """Whatever axes the set has, a voxel keeps its place in the patient; extra axes stay last."""
    data, affine = scan(), ras_affine()
    path = write(tmp_path / "a.nii.gz", *stored(data, affine, "PIR"))
    volume = nifti.oriented(nifti.read_image(path), wanted)
    expected, expected_affine = stored(data, affine, wanted)
    np.testing.assert_array_equal(volume.image, expected)
    np.testing.assert_allclose(volume.affine, expected_affine, atol=1e-4)
    channels = np.stack([volume.image, 2 * volume.image], axis=-1)
    filed = orientation.to_file(channels, volume.orientation)
    np.testing.assert_array_equal(orientation.to_volume(filed, volume.orientation), channels)
    np.testing.assert_array_equal(filed[..., 1], 2.0 * stored(data, affine, "PIR")[0])


@pytest.mark.parametrize("letters", EVERY)
def test_a_label_stored_in_another_order_than_its_image(tmp_path, letters):
    data, affine = scan(), ras_affine((20, -13))
    image = write(tmp_path / "a.nii.gz", *stored(data, affine, "LSP"))
    label = write(tmp_path / "l.nii.gz", *stored(data % 3, affine, letters))
    found = nifti.read_raw_label(label, nifti.read_image(image), image)
    np.testing.assert_array_equal(found, stored(data % 3, affine, "LSP")[0])


def test_a_label_whose_header_puts_it_elsewhere_is_refused(tmp_path):
    """Mirrored about another point, or a voxel off."""
    data, affine = scan(), ras_affine()
    image = write(tmp_path / "a.nii.gz", data, affine)
    for n, matrix in enumerate((np.diag([-1, 1, 1, 1]), [[1, 0, 0, 1], *np.eye(4)[1:]])):
        path = write(tmp_path / f"l{n}.nii.gz", data, affine @ matrix)
        with pytest.raises(VolumeError, match="lie differently in space"):
            nifti.read_raw_label(path, nifti.read_image(image), image)


@pytest.mark.parametrize("normal", [(0.6, 0.55, 0.58), (0.66, 0.5, 0.56), (0.5, 0.62, 0.6)])
def test_tilted_thick_slices_are_never_cut_across(normal):
    """Short-axis slices of hearts: the nearest axis of the patient is another one in each."""
    normal = np.array(normal) / np.linalg.norm(normal)
    first = np.cross(normal, (0, 0, 1.0))
    first /= np.linalg.norm(first)
    axes = np.stack([first, np.cross(normal, first), normal], axis=1)
    affine = np.eye(4)
    affine[:3, :3] = axes * (1.4, 1.4, 8.0)
    for order in itertools.permutations(range(3)):
        spacing = np.array((1.4, 1.4, 8.0))[list(order)]
        turn = orientation.nearest(affine[:, [*order, 3]], spacing, "RAS")
        assert order[turn.axes[2]] == 2


def test_slices_of_another_direction_are_cut_across():
    """A sagittal scan in an axial set: what is up stays up."""
    affine = np.diag([5.0, 1, 1, 1])
    assert orientation.nearest(affine, (5.0, 1.0, 1.0), "RAS") == AS_FILED


def test_numbers_are_signed_and_count_from_one():
    turn = Orientation((2, 0, 1), (True, False, False))
    assert orientation.to_numbers(turn) == [-3, 1, 2]
