"""A look at own data: headers of every case, masks of some, what is wrong with them or odd.

Letters: R A S axes of the patient, X Y S those of a volume (slices on the last).
"""

import concurrent.futures
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from lclseg.class_groups import Kind
from lclseg.components import one_piece
from lclseg.cores import usable_cores
from lclseg.data import nifti, orientation
from lclseg.data.layouts import Files
from lclseg.data.nifti import VolumeError

FAR = 3.0  # times the median of the others: spacings and fields of view that are asked about
NAMED = 4  # files named in a warning


class Survey(NamedTuple):
    """What one case shows, its axes as in the file.

    Attributes:
      files: of the case.
      shape, spacing_mm, affine: of the image.
      voxels: by label value of the mask; {} without a mask that is looked at.
      reach_mm: by axis, distance of the outermost foreground from the image's centre; 0.0 without
        foreground.
      warnings: what its headers have that is odd.
      one_piece: the values of `voxels`, but 0, that are one piece; see `components.one_piece`.
    """

    files: Files
    shape: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    affine: np.ndarray
    voxels: dict[int, int]
    reach_mm: tuple[float, ...]
    warnings: tuple[str, ...] = ()
    one_piece: tuple[Kind, ...] = ()

    @property
    def case_id(self) -> str:
        return self.files.case_id

    def along(self, wanted: str) -> "Survey":
        """Turns shape, spacing and reach to the axes of an orientation."""
        axes = orientation.nearest(self.affine, self.spacing_mm, wanted).axes
        return self._replace(
            shape=tuple(self.shape[a] for a in axes),
            spacing_mm=tuple(self.spacing_mm[a] for a in axes),
            reach_mm=tuple(self.reach_mm[a] for a in axes),
        )


def survey_case(case: Files, label_values: Sequence[int] = (), *, with_mask: bool) -> Survey:
    """Looks at an image's header and at its mask, if it may.

    Args:
      case: the files.
      with_mask: False: the mask stays unopened.
      label_values: of the foreground; (): all but 0.

    Raises:
      VolumeError: see `nifti.read_geometry`, `nifti.read_raw_label` and `nifti.whole_numbers`; a
        line for each problem.
    """
    geometries, problems = [], []
    for path in case.images:
        try:
            geometries.append(nifti.read_geometry(path))
        except VolumeError as error:
            problems += str(error).splitlines()
    if problems:
        raise VolumeError("\n".join(problems))
    geometry = geometries[0]
    warnings = tuple(w for g in geometries for w in g.warnings)
    seen = Survey(
        *(case, geometry.shape, geometry.spacing_mm, geometry.affine, {}, (0.0, 0.0, 0.0)), warnings
    )
    if case.label is None or not with_mask:
        return seen
    raw = nifti.read_raw_label(case.label, geometry, case.image)
    label = nifti.whole_numbers(case.label, raw)
    counts = np.bincount(label.ravel())
    voxels = {int(v): int(counts[v]) for v in np.flatnonzero(counts)}
    table = np.zeros(len(counts), bool)
    table[[v for v in voxels if v in label_values or (v and not label_values)]] = True
    foreground = table[label]
    reach = tuple(
        _reach(foreground.any(axis=tuple({0, 1, 2} - {a}))) * geometry.spacing_mm[a]
        for a in range(3)
    )
    whole = one_piece([label], [v for v in voxels if v])
    return seen._replace(voxels=voxels, reach_mm=reach, one_piece=whole)


def _reach(occupied: np.ndarray) -> float:
    """Samples from the middle of a line [n] bool to the outer edge of its outermost True, or 0."""
    found = np.flatnonzero(occupied)
    if not found.size:
        return 0.0
    middle = (len(occupied) - 1) / 2
    return float(max(middle - found[0], found[-1] - middle) + 0.5)


def survey(
    files: Sequence[Files], label_values: Sequence[int] = (), *, seen: Collection[str]
) -> list[Survey]:
    """Surveys every case, on all cores: unpacking and counting hold no interpreter lock.

    seen: ids of the cases whose masks are looked at.

    Raises:
      VolumeError: a line for each problem of any case.
    """

    def look(case: Files) -> Survey | str:
        try:
            return survey_case(case, label_values, with_mask=case.case_id in seen)
        except VolumeError as error:
            return str(error)

    workers = min(usable_cores(), len(files))
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        found = list(
            tqdm(
                pool.map(look, files), "looking at the masks", len(files), disable=None, leave=False
            )
        )
    problems = [f for f in found if isinstance(f, str)]
    if problems:
        raise VolumeError("\n".join(problems))
    return [f for f in found if isinstance(f, Survey)]


def odd_headers(surveys: Sequence[Survey], wanted: str) -> list[str]:
    """Warns of headers that are unlike the others', a line each.

    Args:
      surveys: of all cases.
      wanted: orientation of the volumes.
    """
    lines = _together([w for s in surveys for w in s.warnings])
    turned = [s.along(wanted) for s in surveys]
    spacing = np.array([s.spacing_mm for s in turned])
    extent = spacing * np.array([s.shape for s in turned])
    usual, field = np.median(spacing, axis=0), np.median(extent[:, :2], axis=0)
    for s, own, size in zip(turned, spacing, extent[:, :2], strict=True):
        if _is_far(own, usual):
            lines.append(
                f"{s.files.image}: voxels of {_lengths(own)} mm; the median of all is "
                f"{_lengths(usual)} mm: look at spacing and unit in its header, or leave the case "
                "out (data.exclude)"
            )
        elif _is_far(size, field):
            lines.append(
                f"{s.files.image}: slices of {_lengths(size)} mm; the median of all is "
                f"{_lengths(field)} mm: is the same part of the body in it?"
            )
    across = [
        s
        for s in surveys
        if np.argmax(s.spacing_mm) != orientation.nearest(s.affine, s.spacing_mm, wanted).axes[2]
        and max(s.spacing_mm) >= orientation.THICK * sorted(s.spacing_mm)[1]
    ]
    if across:
        lines.append(
            f"{_named(across)}: scanned in slices of another direction than the set's, "
            f"{wanted[2]}, and cut across them; a set of its own would do them justice"
        )
    return lines


def _is_far(values: np.ndarray, usual: np.ndarray) -> bool:
    ratio = values / usual
    return bool((ratio > FAR).any() or (ratio < 1 / FAR).any())


def _lengths(values: Sequence[float] | np.ndarray) -> str:
    return " x ".join(f"{v:.4g}" for v in values)


def _together(warnings: Sequence[str]) -> list[str]:
    """The first `NAMED` warnings, and how many there are of the kind."""
    if len(warnings) <= NAMED:
        return list(warnings)
    return [*warnings[:1], f"and {len(warnings) - 1} other files likewise"]


def _named(surveys: Sequence[Survey]) -> str:
    some = ", ".join(s.case_id for s in surveys[:NAMED])
    return some + (f" and {len(surveys) - NAMED} others" if len(surveys) > NAMED else "")


def voxels_in(s: Survey, value: int) -> str:
    """Tells how many voxels of a value a mask has, in words, with its path."""
    return f"{s.voxels[value]} voxel{'s' * (s.voxels[value] > 1)} of {s.files.label}"
