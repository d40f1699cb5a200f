"""One orientation for all volumes: from the axes of a file to those of the set, and back.

An orientation is told by three letters, one an axis, as in nibabel: where the axis points to in the
patient, R(ight) or L(eft), A(nterior) or P(osterior), S(uperior) or I(nferior). Volumes have their
slices on the last axis, so that "RAS" is cut into axial slices and "ASR" into sagittal ones.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LETTERS = ("LR", "PA", "IS")  # by world axis: towards its negative and its positive end
# By the world axis that slices are counted along: 0 left to right, 1 back to front, 2 up.
BY_SLICE_AXIS = ("ASR", "RSA", "RAS")
# An axis whose voxels are so many times as long as the others' is that of an anisotropic scan. Such
# a scan is cut into its own slices where they lie within MAX_TILT of the set's; the slices of a
# heart, tilted by 45 degrees and more, would otherwise follow another axis in each patient.
THICK = 2.0
MIN_COSINE = 0.4  # of the angle between both, 66 degrees


class Orientation(NamedTuple):
    """How the axes of a volume lie in its file.

    Attributes:
      axes: axis k of the volume is axis `axes[k]` of the file.
      flips: whether it is counted from the other end.
    """

    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]


AS_FILED = Orientation((0, 1, 2), (False, False, False))


def is_valid(letters: object) -> bool:
    """Tells whether these are three letters, one for each axis of the patient."""
    if not (isinstance(letters, str) and len(letters) == 3):
        return False
    return all(sum(letter in pair for letter in letters) == 1 for pair in LETTERS)


def _world(letter: str) -> tuple[int, int]:
    """World axis and sign of a letter: R is (0, 1), L is (0, -1)."""
    axis = next(a for a, pair in enumerate(LETTERS) if letter in pair)
    return axis, (1 if letter == LETTERS[axis][1] else -1)


def _cosines(affine: np.ndarray) -> np.ndarray:
    """[3 world axes, 3 file axes], rounded, so that a header's last digits decide nothing."""
    columns = np.asarray(affine, np.float64)[:3, :3]
    return np.round(columns / np.linalg.norm(columns, axis=0), 4)


def letters_of(affine: np.ndarray) -> str:
    """Finds the orientation of a file that is nearest to its affine, e.g. "LPS"."""
    to_ras = nearest(affine, (1.0, 1.0, 1.0), "RAS")
    names = [""] * 3
    for world, (axis, flip) in enumerate(zip(*to_ras, strict=True)):
        names[axis] = LETTERS[world][0 if flip else 1]
    return "".join(names)


def nearest(affine: np.ndarray, spacing_mm: Sequence[float], wanted: str) -> Orientation:
    """Finds the order and direction of a file's axes that come nearest to an orientation.

    Args:
      affine: [4, 4], voxel index of the file to mm; regular.
      spacing_mm: of the file's axes.
      wanted: letters of the volume's axes, the slices' last.

    Of the 48 ways the one whose axes lie closest to the wanted ones (largest sum of cosines). The
    axis of thick slices goes last wherever it is not far from there: see `THICK`.
    """
    cosines = _cosines(affine)
    world = [_world(letter) for letter in wanted]
    towards = np.array([sign * cosines[axis] for axis, sign in world])  # [volume axis, file axis]
    ways = list(itertools.permutations(range(3)))
    thick = int(np.argmax(spacing_mm))
    others = max(s for axis, s in enumerate(spacing_mm) if axis != thick)
    if spacing_mm[thick] >= THICK * others and abs(towards[2, thick]) >= MIN_COSINE:
        ways = [way for way in ways if way[2] == thick]
    a, b, c = max(ways, key=lambda way: np.abs(towards[range(3), way]).sum())
    return Orientation(
        (a, b, c), (bool(towards[0, a] < 0), bool(towards[1, b] < 0), bool(towards[2, c] < 0))
    )


def to_volume(array: np.ndarray, orientation: Orientation) -> np.ndarray:
    """Turns from the axes of the file to those of the volume; axes after the third stay."""
    turned = array.transpose([*orientation.axes, *range(3, array.ndim)])
    return turned[tuple(slice(None, None, -1 if flip else 1) for flip in orientation.flips)]


def to_file(array: np.ndarray, orientation: Orientation) -> np.ndarray:
    """Inverts `to_volume`."""
    turned = array[tuple(slice(None, None, -1 if flip else 1) for flip in orientation.flips)]
    return turned.transpose([*np.argsort(orientation.axes), *range(3, array.ndim)])


def index_matrix(orientation: Orientation, shape: Sequence[int]) -> np.ndarray:
    """Makes [4, 4], voxel index of the volume to that of the file; `shape` is the volume's."""
    matrix = np.zeros((4, 4))
    matrix[3, 3] = 1
    for k, (axis, flip) in enumerate(zip(*orientation, strict=True)):
        matrix[axis, k] = -1 if flip else 1
        matrix[axis, 3] = shape[k] - 1 if flip else 0
    return matrix


def between(affine: np.ndarray, other: np.ndarray) -> Orientation | None:
    """Tells how an array with the affine `other` is brought onto the axes of one with `affine`.

    Returns:
      None where their axes are not parallel; whether both then cover the same place is not looked
      at.
    """
    try:
        turn = np.linalg.solve(other[:3, :3], affine[:3, :3])
    except np.linalg.LinAlgError:
        return None
    whole = np.round(turn)
    if np.abs(turn - whole).max() > 0.1 or (np.abs(whole).sum(axis=0) != 1).any():
        return None
    a, b, c = (int(axis) for axis in np.abs(whole).argmax(axis=0))
    if len({a, b, c}) != 3:
        return None
    return Orientation((a, b, c), (whole[a, 0] < 0, whole[b, 1] < 0, whole[c, 2] < 0))


def to_numbers(orientation: Orientation) -> list[int]:
    """Counts axes from 1, negative where flipped: what a record stores."""
    return [-(axis + 1) if flip else axis + 1 for axis, flip in zip(*orientation, strict=True)]


def from_numbers(numbers: Sequence[int]) -> Orientation:
    """Inverts `to_numbers`."""
    a, b, c = (int(n) for n in numbers)
    return Orientation((abs(a) - 1, abs(b) - 1, abs(c) - 1), (a < 0, b < 0, c < 0))
