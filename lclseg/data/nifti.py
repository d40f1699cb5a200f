"""NIfTI files: reading with checks, writing, and the order of their axes.

Letters: X Y S native volume (slices on the last axis, see `slices_last`), C classes.
"""

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np

from lclseg.errors import UserError

AFFINE_TOLERANCE = 1e-3
# A header can ask for any amount of memory, and a few compressed kilobytes can fill it.
MAX_VOXELS = 2**28  # 1024 x 1024 x 256
MAX_HEADER_BYTES = 2**20  # with its extensions
MAX_LABEL_VALUE = 2**16 - 1
# Of a NIfTI header: where the voxels lie, and in which units.
GEOMETRY_FIELDS = (
    *("pixdim", "xyzt_units", "qform_code", "sform_code"),
    *("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("srow_x", "srow_y", "srow_z"),
)


class VolumeError(UserError):
    """A file or volume that cannot be used; the message names it, what was found and wanted."""


class Volume(NamedTuple):
    """One scan in native geometry.

    Attributes:
      image: [X, Y, S] float32.
      label: [X, Y, S] uint8, or None where there is no ground truth.
      affine: [4, 4] float64, voxel index to mm.
      spacing_mm: voxel size along X, Y, S, from the header.
    """

    image: np.ndarray
    label: np.ndarray | None
    affine: np.ndarray
    spacing_mm: tuple[float, float, float]


class Geometry(NamedTuple):
    """What the header of a volume tells: see `Volume`."""

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    affine: np.ndarray


def _check_size(path: Path) -> None:
    """Raises VolumeError where the header asks for more than `MAX_VOXELS`; reads nothing else."""
    with nib.openers.Opener(str(path)) as stream:
        start = stream.read(nib.nifti2.header_dtype.itemsize)
    for layout in (nib.nifti1.header_dtype, nib.nifti2.header_dtype):
        for ordered in (layout, layout.newbyteorder()):
            if len(start) < layout.itemsize:
                continue
            header = np.frombuffer(start, ordered, count=1)[0]
            if header["sizeof_hdr"] != layout.itemsize:
                continue
            shape = [int(n) for n in header["dim"][1 : 1 + max(int(header["dim"][0]), 0)]]
            if math.prod(shape) > MAX_VOXELS or max(shape, default=0) > MAX_VOXELS:
                raise VolumeError(
                    f"{path}: header tells of an array of shape {tuple(shape)}; wanted at most "
                    f"{MAX_VOXELS} voxels"
                )
            if not header["vox_offset"] <= MAX_HEADER_BYTES:
                raise VolumeError(
                    f"{path}: header tells of voxels that start at byte {header['vox_offset']}; "
                    f"wanted at most {MAX_HEADER_BYTES}"
                )


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Makes a VolumeError of the dozen types that nibabel raises, zlib's and OSError among them."""
    try:
        yield
    except FileNotFoundError:
        raise VolumeError(f"{path}: no such file") from None
    except VolumeError:
        raise
    except Exception as error:
        raise VolumeError(
            f"{path}: not readable as NIfTI ({type(error).__name__}: {error}); "
            "the file is damaged or of another format: copy or download it again"
        ) from error


def _load(path: Path) -> nib.Nifti1Image:
    """Opens a NIfTI file of bearable size, voxels unread; for use within `_readable`."""
    _check_size(path)
    file = nib.load(path)
    if not isinstance(file, nib.Nifti1Image):
        raise VolumeError(f"{path}: found a {type(file).__name__}; wanted a NIfTI file")
    return file


def _load_3d(path: Path, channel: int | None = None) -> tuple[np.ndarray, nib.Nifti1Image]:
    with _readable(path):
        file = _load(path)
        data = np.asarray(file.dataobj)
    if channel is not None:
        if data.ndim != 4 or data.shape[3] <= channel:
            raise VolumeError(
                f"{path}: found an array of shape {data.shape}; wanted a 4-D file with at least "
                f"{channel + 1} channels, of which channel {channel} is the image"
            )
        data = data[..., channel]
    if data.ndim != 3 or 0 in data.shape:
        raise VolumeError(f"{path}: found an array of shape {data.shape}; wanted a 3-D volume")
    if data.dtype.kind not in "iufb":
        raise VolumeError(f"{path}: found voxels of type {data.dtype}; wanted real numbers")
    return data, file


def _stored_spacing(path: Path, file: nib.Nifti1Image) -> tuple[float, float, float]:
    """Spacing as the header has it: on loading, nibabel takes 0 for 1 mm and drops signs."""
    with nib.openers.Opener(str(path)) as stream:
        header = type(file.header).from_fileobj(stream, check=False)
    return tuple(header["pixdim"][1:4].tolist())


def read_image(path: Path, *, channel: int | None = None) -> Volume:
    """Reads a 3-D NIfTI image; its label is None.

    Args:
      path: NIfTI file.
      channel: which one of a 4-D file (X Y S channels) is the image; None: the file is 3-D.

    Raises:
      VolumeError: unreadable, larger than `MAX_VOXELS`, not 3-D, NaN or infinite or constant
        voxels, spacing not positive, affine singular. One line a problem.
    """
    data, file = _load_3d(path, channel)
    with np.errstate(over="ignore"):
        image = data.astype(np.float32)
    problems = []
    if not np.isfinite(image).all():
        bad = int((~np.isfinite(image)).sum())
        problems.append(f"{path}: {bad} voxels are NaN or infinite; wanted finite intensities")
    elif image.min() == image.max():
        problems.append(f"{path}: every voxel is {image.flat[0]:g}; wanted an image")
    spacing_mm = _stored_spacing(path, file)
    if not all(np.isfinite(s) and s > 0 for s in spacing_mm):
        problems.append(f"{path}: voxel spacing is {spacing_mm} mm; wanted positive numbers")
    if not np.isfinite(file.affine).all() or np.linalg.det(file.affine[:3, :3]) == 0:
        problems.append(
            f"{path}: the affine does not span a volume; wanted a header that tells where voxels "
            "lie"
        )
    if problems:
        raise VolumeError("\n".join(problems))
    return Volume(image, None, np.asarray(file.affine, np.float64), spacing_mm)


def read_geometry(path: Path) -> Geometry:
    """Shape, spacing and affine of a 3-D NIfTI image, from its header; no voxel is read.

    Raises:
      VolumeError: unreadable, not 3-D, or spacing not positive.
    """
    with _readable(path):
        file = _load(path)
        shape, affine = file.shape, np.asarray(file.affine, np.float64)
        spacing_mm = _stored_spacing(path, file)
    if len(shape) != 3:
        raise VolumeError(
            f"{path}: found an array of shape {shape}; wanted a 3-D volume: "
            "of several channels or times, one file each"
        )
    if not all(np.isfinite(s) and s > 0 for s in spacing_mm):
        raise VolumeError(f"{path}: voxel spacing is {spacing_mm} mm; wanted positive numbers")
    return Geometry(shape, spacing_mm, affine)


def read_raw_label(path: Path, image: Volume, image_path: Path) -> np.ndarray:
    """Reads the label map that belongs to an image, its values as the file has them.

    Args:
      path: NIfTI file.
      image: what `read_image` gave for the image.
      image_path: named in errors.

    Returns:
      [X, Y, S] of the file's type.

    Raises:
      VolumeError: unreadable, shape or affine not the image's.
    """
    data, file = _load_3d(path)
    if data.shape != image.image.shape:
        raise VolumeError(
            f"{path}: label has shape {data.shape}, its image {image_path} {image.image.shape}"
        )
    if not np.allclose(file.affine, image.affine, atol=AFFINE_TOLERANCE):
        gap = np.abs(file.affine - image.affine).max()
        raise VolumeError(
            f"{path}: label and image {image_path} lie differently in space (affines differ by up "
            f"to {gap:.3g}); resample one onto the other, or copy the image's header if they match"
        )
    return data


def read_label(path: Path, image: Volume, image_path: Path, *, num_classes: int) -> np.ndarray:
    """Reads the label map that belongs to an image.

    Args:
      path: NIfTI file with whole numbers 0..num_classes-1 (floats that are whole are fine).
      image: what `read_image` gave for the image.
      image_path: named in errors.
      num_classes: C, background included.

    Returns:
      [X, Y, S] uint8.

    Raises:
      VolumeError: unreadable, shape or affine not the image's, values not in 0..C-1.
    """
    data = read_raw_label(path, image, image_path)
    check_label_values(path, data, num_classes - 1)
    return data.astype(np.uint8)


def check_label_values(path: Path, label: np.ndarray, highest: int) -> None:
    """Raises VolumeError, naming up to 8 of them, where values are not whole numbers 0..highest."""
    values = np.unique(label)
    odd = values[~np.isin(values, np.arange(highest + 1))]
    if odd.size:
        named = ", ".join(f"{v:g}" for v in odd[:8])
        raise VolumeError(f"{path}: found label values {named}; wanted whole numbers 0..{highest}")


def map_label_values(raw: np.ndarray, values: Sequence[int]) -> tuple[np.ndarray, dict[float, int]]:
    """Classes 1, 2, ... in place of the label values of a data set; all others are background.

    Args:
      raw: [X, Y, S], as the file has it.
      values: of the classes 1, 2, ...

    Returns:
      Classes, [X, Y, S] uint8; and the other values but 0, with their number of voxels.
    """
    label = np.zeros(raw.shape, np.uint8)
    for c, value in enumerate(values, start=1):
        label[raw == value] = c
    found, counts = np.unique(raw, return_counts=True)
    others = {float(v): int(n) for v, n in zip(found, counts, strict=True) if v not in (0, *values)}
    return label, others


def read_header(path: Path) -> nib.Nifti1Header:
    """The header of a NIfTI file; raises VolumeError where it is not readable."""
    with _readable(path):
        return _load(path).header


def write_like(path: Path, data: np.ndarray, reference: Path) -> None:
    """Writes voxels that lie where those of another file do, creating the folder.

    The file is whole at any moment: a hidden one, then renamed.

    Args:
      path: ends in .nii.gz.
      data: [X, Y, S] or [X, Y, S, C], stored in its own type.
      reference: NIfTI file. Its format, units, qform and sform are taken over to the bit, and
        nothing else: texts and extensions of a header may name the patient.
    """
    theirs = read_header(reference)
    ours = type(theirs)(endianness=theirs.endianness)
    for field in GEOMETRY_FIELDS:
        ours[field] = theirs[field]
    if data.ndim == 4:
        ours["pixdim"][4] = 1  # of the classes, which have no spacing
    ours.set_data_dtype(data.dtype)
    image = nib.Nifti2Image if isinstance(theirs, nib.Nifti2Header) else nib.Nifti1Image
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name.removesuffix('.nii.gz')}.partial.nii.gz")
    nib.save(image(data, None, ours), partial)
    os.replace(partial, path)


def _axes_slices_last(slice_axis: int) -> list[int]:
    return [axis for axis in range(3) if axis != slice_axis] + [slice_axis]


def slices_last(volume: Volume, slice_axis: int) -> Volume:
    """The same volume with axis `slice_axis` of its file (0, 1 or 2) last; see `write_label`."""
    axes = _axes_slices_last(slice_axis)
    x, y, z = (volume.spacing_mm[a] for a in axes)
    return Volume(
        image=volume.image.transpose(axes),
        label=None if volume.label is None else volume.label.transpose(axes),
        affine=volume.affine[:, [*axes, 3]],
        spacing_mm=(x, y, z),
    )


def as_filed(array: np.ndarray, slice_axis: int) -> np.ndarray:
    """[X, Y, S] or [X, Y, S, C] with the axes of the file: the inverse of `slices_last`."""
    axes = np.argsort(_axes_slices_last(slice_axis))
    return array.transpose([*axes, *range(3, array.ndim)])


def write_label(
    path: Path, label: np.ndarray, affine: np.ndarray, spacing_mm, *, slice_axis: int = 2
) -> None:
    """Writes [X, Y, S] labels as a uint8 NIfTI file in millimetres, creating its folder.

    `slice_axis` is the axis on which the file shall have its slices: the inverse of `slices_last`.
    """
    axes = np.argsort(_axes_slices_last(slice_axis))
    file = nib.Nifti1Image(as_filed(label.astype(np.uint8), slice_axis), affine[:, [*axes, 3]])
    file.header.set_zooms([spacing_mm[a] for a in axes])
    file.header.set_xyzt_units("mm")
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(file, path)
