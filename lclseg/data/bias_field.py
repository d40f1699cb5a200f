"""N4 correction of the slow intensity drift that receive coils leave in MR images.

Runs once, while volumes are prepared. Source: Tustison et al., *N4ITK: Improved N3 bias
correction*, IEEE TMI 2010, in SimpleITK; settings of arXiv:2112.09645's preprocessing.
"""

import numpy as np
import SimpleITK as sitk  # noqa: N813

LEVELS, ITERATIONS, CONVERGENCE = 4, 50, 1e-3


def correct_bias_field(
    image: np.ndarray, spacing_mm: tuple[float, float, float], *, shrink_factor: int
) -> np.ndarray:
    """Divides a volume by its bias field, estimated from the brighter part (Otsu's threshold).

    Args:
      image: [X, Y, S] float, at least 0 where there is signal. Its minimum is taken as zero signal
        if below 0.
      spacing_mm: of the voxels.
      shrink_factor: the field, which is smooth, is fitted to every n-th pixel in-plane; the slices,
        few and thick, are all used. 1 is exact and takes minutes a volume.

    Returns:
      [X, Y, S] float32.
    """
    # One thread: volumes run side by side, one a core.
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    image = np.asarray(image, np.float32)
    image = image - min(float(image.min()), 0.0)
    full = sitk.GetImageFromArray(image.T)  # SimpleITK's axes run X, Y, S
    full.SetSpacing([float(s) for s in spacing_mm])
    small = sitk.Shrink(full, [shrink_factor, shrink_factor, 1])
    mask = sitk.OtsuThreshold(small, 0, 1, 200)
    n4 = sitk.N4BiasFieldCorrectionImageFilter()
    n4.SetMaximumNumberOfIterations([ITERATIONS] * LEVELS)
    n4.SetConvergenceThreshold(CONVERGENCE)
    n4.Execute(small, mask)
    log_field = sitk.GetArrayFromImage(n4.GetLogBiasFieldAsImage(full)).T
    return (image / np.exp(log_field)).astype(np.float32)
