"""python -m lclseg.check_data --input=FOLDER [--num_classes=C]

Looks at every image and label of a folder, as a run with configs/nifti_folder.py does, and prints
one line for each problem: file, found, wanted, way out; then what would be proposed, and warnings.
Exit code 1 if there is a problem. Layouts: see `layouts.find_files`.
"""

import collections
import sys
from pathlib import Path
from typing import NamedTuple

from absl import app, flags
from ml_collections import ConfigDict
from tqdm import tqdm

from lclseg.data import mask_checks, own_data, preprocess
from lclseg.data.layouts import Files, find_files
from lclseg.data.nifti import VolumeError
from lclseg.data.preprocess import Preprocessing
from lclseg.errors import UserError, in_words

_INPUT = flags.DEFINE_string("input", None, "Folder of volumes.")
_NUM_CLASSES = flags.DEFINE_integer(
    "num_classes",
    None,
    "Labels must be 0..C-1; not given: any whole numbers 0..65535.",
    lower_bound=2,
)


class Report(NamedTuple):
    """What was found: a line each.

    Attributes:
      problems: why a run would refuse the folder; () where it would not.
      proposal: what a run would propose, its warnings last; "" where there are problems.
    """

    problems: tuple[str, ...]
    proposal: str


def check_folder(folder: Path, num_classes: int | None = None) -> Report:
    """Looks at a folder as a run does, and reads every file of it.

    Args:
      folder: see `layouts.find_files`.
      num_classes: labels must be 0..C-1; None: any whole numbers 0..65535.
    """
    config = ConfigDict({"data": {**own_data.OPEN, "manual_dir": str(folder)}})
    problems: list[str] = []
    proposal = ""
    try:
        whole, proposal = own_data.complete(config)
    except UserError as error:
        problems += str(error).splitlines()
    files = find_files(folder) if folder.is_dir() else []
    shown: dict[int, list[str]] = collections.defaultdict(list)  # cases by label value
    for case in tqdm(files, "checking", disable=None, leave=False):
        found, values = look_at_case(case, num_classes)
        problems += [p for p in found if p not in problems]
        for value in values:
            shown[value].append(case.case_id)
    if not problems and (empty := mask_checks.empty_test(whole.data)):
        problems.append(str(empty))
    if not problems:
        unseen = mask_checks.unseen_values(whole.data, shown)
        proposal = "\n".join([proposal, *(f"  WARNING: {w}" for w in unseen)])
    return Report(tuple(problems), "" if problems else proposal)


def look_at_case(case: Files, num_classes: int | None = None) -> tuple[list[str], list[int]]:
    """Finds the problems of an image and its label, a line each, and the label's values but 0."""
    how = Preprocessing((), (), False, 1, 1.0, 0, None, channels=case.numbers)
    try:
        _, found = preprocess.read_case(case, how)
    except VolumeError as error:
        return str(error).splitlines(), []
    values = [int(v) for v in found]
    if num_classes is None:
        return [], values
    others = [v for v in values if v >= num_classes]
    if not others:
        return [], values
    return [
        f"{case.label}: found label values {', '.join(map(str, others))}; wanted whole "
        f"numbers 0..{num_classes - 1}: mend the file, or give another --num_classes"
    ], values


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    folder = Path(_INPUT.value).expanduser()
    report = check_folder(folder, _NUM_CLASSES.value)
    if report.problems:
        print("\n".join(report.problems))
        sys.exit(1)
    files = find_files(folder)
    labelled = sum(f.label is not None for f in files)
    print(report.proposal)
    print(f"{len(files)} cases, {labelled} of them with a label: no problem found")


if __name__ == "__main__":
    flags.mark_flag_as_required("input")
    with in_words():
        app.run(main)
