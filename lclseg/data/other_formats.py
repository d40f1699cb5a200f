"""MetaImage and NRRD files, by SimpleITK; their axes point to L, P, S, those here to R, A, S."""

from pathlib import Path

import numpy as np

# By suffix, in small letters, the reader: files may be called otherwise than it expects.
READERS = {
    ".mha": "MetaImageIO",
    ".mhd": "MetaImageIO",
    ".nrrd": "NrrdImageIO",
    ".nhdr": "NrrdImageIO",
}
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def open_header(path: Path) -> tuple[tuple[int, ...], tuple[float, ...], np.ndarray, str]:
    """Reads shape, spacing, affine in the axes of NIfTI and voxel type; no voxel is read.

    Several values a voxel (colours, vectors) are a further axis of the shape.

    Raises:
      RuntimeError: not readable as what its suffix says.
    """
    reader = _reader(path)
    reader.ReadImageInformation()
    axes = reader.GetDimension()
    shape = tuple(int(n) for n in reader.GetSize())
    spacing = tuple(float(s) for s in reader.GetSpacing())
    affine = np.eye(4)
    if axes >= 3:
        direction = np.reshape(reader.GetDirection(), (axes, axes))[:3, :3]
        affine[:3, :3] = direction * spacing[:3]
        affine[:3, 3] = reader.GetOrigin()[:3]
    components = reader.GetNumberOfComponents()
    shape += (components,) if components > 1 else ()
    return shape, spacing, LPS_TO_RAS @ affine, str(reader.GetPixelID())


def read_voxels(path: Path) -> np.ndarray:
    """Reads the array whose shape `open_header` tells; raises RuntimeError."""
    import SimpleITK as sitk  # noqa: N813, here: a set of NIfTI files does without

    image = _reader(path).Execute()
    array = sitk.GetArrayFromImage(image)
    components = image.GetNumberOfComponentsPerPixel()
    space = array.ndim - (components > 1)
    # Its axes run backwards, but for the components of a voxel.
    return array.transpose([*range(space)[::-1], *range(space, array.ndim)])


def _reader(path: Path):
    import SimpleITK as sitk  # noqa: N813

    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    reader = sitk.ImageFileReader()
    reader.SetImageIO(READERS[path.suffix.lower()])
    reader.SetFileName(str(path))
    return reader
