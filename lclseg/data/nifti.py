"""Volumes on disk: NIfTI files, others through `other_formats`; reading with checks, and writing.

Arrays here lie as their files have them: `orientation` brings them onto the axes of a set. Letters:
X Y S axes of the array, K channels, C classes.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np

from lclseg.data import orientation
from lclseg.data.orientation import AS_FILED, Orientation
from lclseg.errors import UserError

# A label lies on its image where no corner is further off than so many voxels: programs round
# origins and angles to a few digits.
MAX_GAP_VOXELS = 0.05
# Label values that are no further from a whole number are meant as one: scale factors leave such.
ROUNDING = 1e-3
# A header can ask for any amount of memory, and a few compressed kilobytes can fill it.
MAX_VOXELS = 2**28  # 1024 x 1024 x 256
MAX_HEADER_BYTES = 2**20  # with its extensions
MAX_LABEL_VALUE = 2**16 - 1
IGNORED = 255  # in place of a class, of voxels that nothing is known of
MILLIMETRES = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # by xyzt_units: not told, m, mm, micrometres
SPACING_TOLERANCE = 0.01  # of pixdim against the affine, relative
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
      image: [X, Y, S] float32, or [X, Y, S, K] of several channels.
      label: [X, Y, S] integer, or None where there is no ground truth.
      affine: [4, 4] float64, voxel index to mm.
      spacing_mm: voxel size along X, Y, S, from the header.
      orientation: how these axes lie in the file.
    """

    image: np.ndarray
    label: np.ndarray | None
    affine: np.ndarray
    spacing_mm: tuple[float, float, float]
    orientation: Orientation = AS_FILED


class Geometry(NamedTuple):
    """What the header of a volume tells.

    Attributes:
      shape: of the file's three axes.
      spacing_mm, affine: see `Volume`; of other units, in mm.
      warnings: what is odd and does no harm by itself, a line each.
    """

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    affine: np.ndarray
    warnings: tuple[str, ...] = ()


class Opened(NamedTuple):
    """A file whose header has been read.

    Attributes:
      shape: of all its axes.
      spacing: along the first three, as the header has it.
      affine: [4, 4], in the same unit.
      to_mm: length of that unit.
      has_position: whether the header tells where the voxels lie.
      read: gives the voxels, an array of that shape.
    """

    shape: tuple[int, ...]
    spacing: tuple[float, float, float]
    affine: np.ndarray
    to_mm: float
    has_position: bool
    read: Callable[[], np.ndarray]


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
            _check_voxels(path, shape)
            if not header["vox_offset"] <= MAX_HEADER_BYTES:
                raise VolumeError(
                    f"{path}: header tells of voxels that start at byte {header['vox_offset']}; "
                    f"wanted at most {MAX_HEADER_BYTES}: the header is damaged, copy or download "
                    "the file again"
                )


def _check_voxels(path: Path, shape: Sequence[int]) -> None:
    if math.prod(shape) > MAX_VOXELS or max(shape, default=0) > MAX_VOXELS:
        raise VolumeError(
            f"{path}: header tells of an array of shape {tuple(shape)}; wanted at most "
            f"{MAX_VOXELS} voxels: if the header is right, cut the volume or store it coarser"
        )


def _check_kind(path: Path) -> None:
    """Raises VolumeError where something else than a volume lies there, named for what it is."""
    name = path.name.lower()
    if path.is_symlink() and not path.exists():
        raise VolumeError(
            f"{path}: a link to {os.readlink(path)}, which is not there; wanted the file itself: "
            "fetch it (datalad get, git annex get), or take the link out"
        )
    if path.is_dir():
        raise VolumeError(
            f"{path}: found a folder of that name; wanted a file: rename the folder, or move the "
            "file in it here"
        )
    with path.open("rb") as stream:
        start = stream.read(132)
    if start.startswith(b"version https://git-lfs"):
        raise VolumeError(
            f"{path}: a Git LFS pointer in place of the file; wanted the file itself: git lfs pull"
        )
    if start[128:132] == b"DICM":
        raise VolumeError(
            f"{path}: found a DICOM file; wanted a volume: convert the series, e.g. with dcm2niix"
        )
    is_gzip = start.startswith(b"\x1f\x8b")
    if name.endswith(".nii.gz") and start and not is_gzip and _begins_as_nifti(start):
        raise VolumeError(
            f"{path}: not compressed, though its name ends in .gz; wanted a gzip file: rename it "
            f"to {path.name[:-3]}, or compress it (gzip)"
        )
    if name.endswith(".nii") and is_gzip:
        raise VolumeError(
            f"{path}: compressed, though its name does not end in .gz; wanted a plain file: rename "
            f"it to {path.name}.gz"
        )


def _begins_as_nifti(start: bytes) -> bool:
    sizes = (nib.nifti1.header_dtype.itemsize, nib.nifti2.header_dtype.itemsize)
    return any(start[:4] == n.to_bytes(4, order) for n in sizes for order in ("little", "big"))


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Makes a VolumeError of the dozen types that nibabel raises, zlib's and OSError among them."""
    try:
        _check_kind(path)
        yield
    except FileNotFoundError as error:
        if error.filename and Path(error.filename) != path:  # an .img beside its .hdr
            raise VolumeError(
                f"{path}: its voxels should lie in {error.filename}, which is not there; wanted "
                "both files of the pair: copy the other one here"
            ) from None
        raise VolumeError(f"{path}: no such file") from None
    except PermissionError:
        raise VolumeError(
            f"{path}: no permission to read it; wanted a readable file: chmod u+r, or ask its owner"
        ) from None
    except VolumeError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[-1][:200] if str(error).strip() else ""
        kind = "a volume" if path.suffix.lower() in _reader_suffixes() else "NIfTI"
        raise VolumeError(
            f"{path}: not readable as {kind} ({type(error).__name__}: {reason}); "
            "the file is damaged or of another format: copy or download it again"
        ) from error


def _reader_suffixes() -> Sequence[str]:
    from lclseg.data import other_formats

    return tuple(other_formats.READERS)


def _open(path: Path) -> Opened:
    """Reads the header of a file of bearable size; for use within `_readable`."""
    if path.suffix.lower() in _reader_suffixes():
        from lclseg.data import other_formats

        shape, spacing, affine, _ = other_formats.open_header(path)
        _check_voxels(path, shape)
        x, y, z = (*spacing, 1.0)[:3]  # of two axes: refused later, for the shape
        return Opened(shape, (x, y, z), affine, 1.0, True, lambda: other_formats.read_voxels(path))
    file = _load(path)
    unit = int(file.header["xyzt_units"]) & 7
    if unit not in MILLIMETRES:
        raise VolumeError(
            f"{path}: header has unit {unit} for lengths; wanted metres, millimetres or "
            "micrometres (1, 2, 3) in xyzt_units: convert the header"
        )
    has_position = bool(file.header["qform_code"] or file.header["sform_code"])
    return Opened(
        shape=tuple(int(n) for n in file.shape),
        spacing=_stored_spacing(path, file),
        affine=np.asarray(file.affine, np.float64),
        to_mm=MILLIMETRES[unit],
        has_position=has_position,
        read=lambda: np.asarray(file.dataobj),
    )


def _load(path: Path) -> nib.Nifti1Pair:
    """Opens a NIfTI file of bearable size, voxels unread; for use within `_readable`."""
    _check_size(path)
    file = nib.load(path)
    if not isinstance(file, nib.Nifti1Pair):
        raise VolumeError(
            f"{path}: found a {type(file).__name__}, which does not tell where its voxels lie; "
            "wanted a NIfTI file: convert it"
        )
    return file


def _stored_spacing(path: Path, file: nib.Nifti1Pair) -> tuple[float, float, float]:
    """Spacing as the header has it: on loading, nibabel takes 0 for 1 mm and drops signs."""
    with nib.openers.Opener(str(path)) as stream:
        header = type(file.header).from_fileobj(stream, check=False)
    return tuple(header["pixdim"][1:4].tolist())


def _three_axes(path: Path, shape: Sequence[int], *, wanted_labels: bool = False) -> None:
    """Raises VolumeError unless an array has three axes, and further ones of length 1 at most."""
    shape = tuple(shape)
    if 0 not in shape and (len(shape) == 3 or (len(shape) > 3 and set(shape[3:]) == {1})):
        return
    if len(shape) < 3:
        way_out = "a single slice has a third axis of 1: store it so"
    elif wanted_labels:
        way_out = (
            "of one class each (one-hot), or of probabilities: store the class of each voxel, "
            "label.argmax(axis=-1)"
        )
    else:
        way_out = (
            "of several channels, one file each (NAME_0000, NAME_0001, ...); of several times, one "
            "file for each time that is wanted (fslsplit, nibabel.four_to_three)"
        )
    raise VolumeError(f"{path}: found an array of shape {shape}; wanted a 3-D volume: {way_out}")


def _read_3d(
    path: Path, channel: int | None = None, *, wanted_labels: bool = False
) -> tuple[np.ndarray, Opened]:
    with _readable(path):
        file = _open(path)
        if channel is None:
            _three_axes(path, file.shape, wanted_labels=wanted_labels)
        data = file.read()
    if channel is not None:
        if data.ndim != 4 or data.shape[3] <= channel:
            raise VolumeError(
                f"{path}: found an array of shape {data.shape}; wanted a 4-D file with at least "
                f"{channel + 1} channels, of which channel {channel} is the image"
            )
        data = data[..., channel]
    if data.dtype.fields:
        raise VolumeError(
            f"{path}: found voxels of type {data.dtype}, colours; wanted real numbers: store grey "
            "values, or each colour in a file of its own (NAME_0000, NAME_0001, NAME_0002)"
        )
    if data.dtype.kind not in "iufb":
        raise VolumeError(
            f"{path}: found voxels of type {data.dtype}; wanted real numbers: store, e.g., the "
            "magnitude"
        )
    return data.reshape(data.shape[:3]), file


def _in_mm(path: Path, file: Opened) -> Geometry:
    """Geometry of an opened 3-D file; raises VolumeError, a line a problem."""
    spacing_mm = tuple(s * file.to_mm for s in file.spacing)
    affine = np.diag([file.to_mm] * 3 + [1.0]) @ file.affine
    problems = []
    if not all(np.isfinite(s) and s > 0 for s in spacing_mm):
        problems.append(
            f"{path}: voxel spacing is {spacing_mm} mm; wanted positive numbers: set pixdim in the "
            "header"
        )
    if not np.isfinite(affine).all() or np.linalg.det(affine[:3, :3]) == 0:
        problems.append(
            f"{path}: the affine does not span a volume; wanted a header that tells where voxels "
            "lie: copy that of another export of the same scan"
        )
    if problems:
        raise VolumeError("\n".join(problems))
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    warnings = []
    if np.abs(lengths / spacing_mm - 1).max() > SPACING_TOLERANCE:
        warnings.append(
            f"{path}: the affine has voxels of {_lengths(lengths)} mm, pixdim of "
            f"{_lengths(spacing_mm)} mm, which is taken; set one of them right"
        )
    if not file.has_position:
        warnings.append(
            f"{path}: the header tells neither orientation nor place (qform_code and sform_code "
            "are 0): left and right may be swapped; copy the header of another export of the scan"
        )
    shape = tuple(file.shape[:3])
    return Geometry(shape, spacing_mm, affine, tuple(warnings))  # type: ignore[arg-type]


def _lengths(values: Sequence[float] | np.ndarray) -> str:
    return " x ".join(f"{v:.4g}" for v in values)


def read_image(path: Path, *, channel: int | None = None) -> Volume:
    """Reads a 3-D image, its axes as in the file; its label is None.

    Args:
      path: NIfTI, MetaImage or NRRD file.
      channel: which one of a 4-D file (X Y S channels) is the image; None: the file is 3-D.

    Raises:
      VolumeError: unreadable, larger than `MAX_VOXELS`, not 3-D, NaN or infinite or constant
        voxels, spacing not positive, affine singular. One line a problem.
    """
    data, file = _read_3d(path, channel)
    with np.errstate(over="ignore"):
        image = data.astype(np.float32)
    problems = []
    if not np.isfinite(image).all():
        bad = int((~np.isfinite(image)).sum())
        problems.append(
            f"{path}: {bad} voxels are NaN or infinite; wanted finite intensities: set those "
            "outside the body to 0, e.g. numpy.nan_to_num"
        )
    elif image.min() == image.max():
        problems.append(
            f"{path}: every voxel is {image.flat[0]:g}; wanted an image: export it again, or "
            "leave it out (data.exclude)"
        )
    try:
        geometry = _in_mm(path, file)
    except VolumeError as error:
        problems += str(error).splitlines()
    if problems:
        raise VolumeError("\n".join(problems))
    return Volume(image, None, geometry.affine, geometry.spacing_mm)


def has_channels(path: Path) -> bool:
    """Tells whether a file has a fourth axis, longer than 1."""
    with _readable(path):
        return len(_open(path).shape) == 4 and _open(path).shape[3] > 1


def read_geometry(path: Path) -> Geometry:
    """Reads shape, spacing and affine of a 3-D image, from its header; no voxel is read.

    Raises:
      VolumeError: unreadable, not 3-D, spacing not positive or affine singular.
    """
    with _readable(path):
        file = _open(path)
        _three_axes(path, file.shape)
        return _in_mm(path, file)


def read_raw_label(path: Path, image: Volume | Geometry, image_path: Path) -> np.ndarray:
    """Reads the label map that belongs to an image, its values as the file has them.

    A label whose axes are stored in another order or direction is brought onto the image's, where
    both headers tell that they lie at the same place.

    Args:
      path: see `read_image`.
      image: what `read_image` or `read_geometry` gave for the image.
      image_path: named in errors.

    Returns:
      Array of the image's shape and the file's type.

    Raises:
      VolumeError: unreadable, or it does not lie on the image.
    """
    shape = image.shape if isinstance(image, Geometry) else image.image.shape[:3]
    data, file = _read_3d(path, wanted_labels=True)
    affine = np.diag([file.to_mm] * 3 + [1.0]) @ file.affine
    turn = orientation.between(image.affine, affine)
    if turn is not None and orientation.to_volume(data, turn).shape == shape:
        turned = affine @ orientation.index_matrix(turn, shape)
        gap = max_gap_mm(turned, image.affine, shape)
        if gap <= MAX_GAP_VOXELS * min(image.spacing_mm):
            return orientation.to_volume(data, turn)
    if data.shape != shape:
        raise VolumeError(
            f"{path}: label has shape {data.shape}, its image {image_path} {shape}; wanted a label "
            "for each voxel of the image: resample it onto the image, or take the pair out"
        )
    gap = np.abs(affine - image.affine).max()
    lost = "" if file.has_position else "; the label's header has lost its position"
    raise VolumeError(
        f"{path}: label and image {image_path} lie differently in space (affines differ by up "
        f"to {gap:.3g}{lost}); resample one onto the other, or copy the image's header if they "
        "match"
    )


def max_gap_mm(affine: np.ndarray, other: np.ndarray, shape: Sequence[int]) -> float:
    """Computes how far apart, at most, two affines put a corner of an array."""
    last = np.array(shape) - 1
    corners = np.stack(np.meshgrid(*[(0, n) for n in last], indexing="ij"), -1).reshape(-1, 3)
    moved = (affine - other) @ np.c_[corners, np.ones(len(corners))].T
    return float(np.linalg.norm(moved[:3], axis=0).max())


def read_label(
    path: Path, image: Volume | Geometry, image_path: Path, *, num_classes: int
) -> np.ndarray:
    """Reads the label map that belongs to an image.

    Args:
      path: file with whole numbers 0..num_classes-1 (floats that are nearly whole are fine).
      image: what `read_image` gave for the image.
      image_path: named in errors.
      num_classes: C, background included.

    Returns:
      [X, Y, S] uint8.

    Raises:
      VolumeError: unreadable, not on the image, values not in 0..C-1.
    """
    data = whole_numbers(path, read_raw_label(path, image, image_path), num_classes - 1)
    return data.astype(np.uint8)


def whole_numbers(path: Path, label: np.ndarray, highest: int = MAX_LABEL_VALUE) -> np.ndarray:
    """Rounds a label whose values are within `ROUNDING` of whole numbers; uint16.

    Raises:
      VolumeError: other values than 0..highest; up to 8 are named, and what they look like.
    """
    if label.dtype.kind in "bu" and label.dtype.itemsize <= 2:
        rounded = label.astype(np.uint16)
    else:
        with np.errstate(invalid="ignore"):
            nearest = np.round(label)
            rounded = nearest.astype(np.uint16)
            whole = (np.abs(label - nearest) <= ROUNDING) & (nearest == rounded)
        if not whole.all():
            _refuse_values(path, label, label[~whole], highest)
    if rounded.max() > highest:
        _refuse_values(path, label, rounded[rounded > highest], highest)
    return rounded


def _refuse_values(path: Path, label: np.ndarray, odd: np.ndarray, highest: int) -> None:
    values = np.unique(odd)
    named = ", ".join(f"{v:.9g}" for v in values[:8]) + (", ..." if len(values) > 8 else "")
    way_out = "mend the file, or leave the case out (data.exclude)"
    if np.isfinite(values).all():
        fractions = np.abs(values - np.round(values)) > ROUNDING
        if fractions.any() and label.min() >= 0 and label.max() <= 1:
            way_out = "are these probabilities? Store classes, e.g. (p > 0.5) or p.argmax(axis=-1)"
        elif len(np.unique(label)) > 64:
            way_out = "is this an image in place of its label? Put the label there"
        elif fractions.any():
            way_out = "was it resampled with interpolation? Do so with the nearest neighbour"
    raise VolumeError(
        f"{path}: found label values {named}; wanted whole numbers 0..{highest}: {way_out}"
    )


def map_label_values(
    raw: np.ndarray, values: Sequence[int], *, ignored: int | None = None
) -> tuple[np.ndarray, dict[float, int]]:
    """Puts classes 1, 2, ... in place of a data set's label values; all others are background.

    Args:
      raw: [X, Y, S], as the file has it.
      values: of the classes 1, 2, ...
      ignored: value of voxels that nothing is known of; they become `IGNORED`.

    Returns:
      Classes, [X, Y, S] uint8; and the other values but 0, with their number of voxels.
    """
    label = np.zeros(raw.shape, np.uint8)
    for c, value in enumerate(values, start=1):
        label[raw == value] = c
    if ignored is not None:
        label[raw == ignored] = IGNORED
    found, counts = np.unique(raw, return_counts=True)
    known = (0, *values, *(() if ignored is None else (ignored,)))
    others = {float(v): int(n) for v, n in zip(found, counts, strict=True) if v not in known}
    return label, others


def read_header(path: Path) -> nib.Nifti1Header:
    """Reads the header of a NIfTI file; raises VolumeError where it is not readable."""
    with _readable(path):
        return _load(path).header


def write_like(path: Path, data: np.ndarray, reference: Path) -> None:
    """Writes voxels that lie where those of another file do, creating the folder.

    The file is whole at any moment: a hidden one, then renamed.

    Args:
      path: ends in .nii.gz.
      data: [X, Y, S] or [X, Y, S, C], axes as in the other file, stored in its own type.
      reference: volume on disk. Of a NIfTI file format, units, qform and sform are taken over to
        the bit, and nothing else: texts and extensions of a header may name the patient.
    """
    make: Any = nib.Nifti1Image
    if reference.suffix.lower() in _reader_suffixes():
        geometry = read_geometry(reference)
        ours = make.header_class()
        ours.set_data_shape(data.shape)
        ours.set_xyzt_units("mm")
        ours.set_qform(geometry.affine, 1)
        ours.set_sform(geometry.affine, 1)
    else:
        theirs = read_header(reference)
        make = nib.Nifti2Image if isinstance(theirs, nib.Nifti2Header) else nib.Nifti1Image
        ours = make.header_class(endianness=theirs.endianness)
        for field in GEOMETRY_FIELDS:
            ours[field] = theirs[field]
    if data.ndim == 4:
        ours["pixdim"][4] = 1  # of the classes, which have no spacing
    ours.set_data_dtype(data.dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name.removesuffix('.nii.gz')}.partial.nii.gz")
    nib.save(make(data, None, ours), partial)
    os.replace(partial, path)


def oriented(volume: Volume, wanted: str) -> Volume:
    """Turns a volume of a file as near to an orientation as its axes come.

    Args:
      volume: what `read_image` gave, with or without label.
      wanted: letters of the axes, the slices' last; see `orientation`.
    """
    turn = orientation.nearest(volume.affine, volume.spacing_mm, wanted)
    image = orientation.to_volume(volume.image, turn)
    x, y, z = (volume.spacing_mm[a] for a in turn.axes)
    return Volume(
        image=image,
        label=None if volume.label is None else orientation.to_volume(volume.label, turn),
        affine=volume.affine @ orientation.index_matrix(turn, image.shape[:3]),
        spacing_mm=(x, y, z),
        orientation=turn,
    )


def write_label(
    path: Path,
    label: np.ndarray,
    affine: np.ndarray,
    spacing_mm: Sequence[float],
    *,
    turn: Orientation = AS_FILED,
) -> None:
    """Writes [X, Y, S] labels as a uint8 NIfTI file in millimetres, creating its folder.

    `turn` is how the axes of the volume lie in its file, which is what is written: the inverse of
    `oriented`.
    """
    back = np.linalg.inv(orientation.index_matrix(turn, label.shape))
    file = nib.Nifti1Image(orientation.to_file(label.astype(np.uint8), turn), affine @ back)
    file.header.set_zooms([spacing_mm[turn.axes.index(a)] for a in range(3)])
    file.header.set_xyzt_units("mm")
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(file, path)
