"""python -m lclseg.check_data --input=FOLDER [--num_classes=C]

Looks at every NIfTI image and label of a folder and prints one line for each problem: file, found,
wanted, way out. Exit code 1 if there is any. Layouts: see `nifti_folder.find_files`.
"""

import collections
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from absl import app, flags
from tqdm import tqdm

from lclseg.data import nifti
from lclseg.data.layouts import Files, find_files
from lclseg.errors import in_words

_INPUT = flags.DEFINE_string("input", None, "Folder of NIfTI files.")
_NUM_CLASSES = flags.DEFINE_integer(
    "num_classes",
    None,
    "Labels must be 0..C-1; not given: any whole numbers 0..65535.",
    lower_bound=2,
)
MIN_FOREGROUND_SLICES = 2  # of a labelled volume


def problems_of_folder(folder: Path, num_classes: int | None = None) -> Iterator[str]:
    """Yields the problems of a folder, a line each.

    Args:
      folder: see `nifti_folder.find_files`.
      num_classes: labels must be 0..C-1; None: any whole numbers 0..65535.
    """
    if not folder.is_dir():
        yield f"{folder}: no such folder"
        return
    files = find_files(folder)
    if not files:
        yield f"{folder}: no .nii or .nii.gz file in it; wanted images/ and labels/, or imagesTr/"
    counts = collections.Counter(f.case_id for f in files)
    for case_id, count in counts.items():
        if count > 1:
            paths = ", ".join(str(f.image) for f in files if f.case_id == case_id)
            yield f"{folder}: {count} images are called {case_id} ({paths}); rename all but one"
    for case in tqdm(files, "validating", disable=None, leave=False):
        yield from problems_of_case(case, num_classes)


def problems_of_case(case: Files, num_classes: int | None = None) -> Iterator[str]:
    """Yields the problems of an image and its label, a line each."""
    try:
        image = nifti.read_image(case.image)
    except nifti.VolumeError as error:
        yield from str(error).splitlines()
        return  # a label can only be judged beside its image
    if case.label is None:
        return
    try:
        label = nifti.read_raw_label(case.label, image, case.image)
        highest = nifti.MAX_LABEL_VALUE if num_classes is None else num_classes - 1
        nifti.check_label_values(case.label, label, highest)
    except nifti.VolumeError as error:
        yield from str(error).splitlines()
        return
    shown = int(np.any(label > 0, axis=(0, 1)).sum())
    if shown < MIN_FOREGROUND_SLICES:
        yield (
            f"{case.label}: {shown} of {label.shape[2]} slices show foreground; wanted at least "
            f"{MIN_FOREGROUND_SLICES}: is it the right file, and are slices on the last axis?"
        )


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    folder = Path(_INPUT.value).expanduser()
    problems = 0
    for problem in problems_of_folder(folder, _NUM_CLASSES.value):
        tqdm.write(problem)
        problems += 1
    if problems:
        sys.exit(1)
    files = find_files(folder)
    labelled = sum(f.label is not None for f in files)
    print(f"{len(files)} images, {labelled} of them with a label: no problem found")


if __name__ == "__main__":
    flags.mark_flag_as_required("input")
    with in_words():
        app.run(main)
