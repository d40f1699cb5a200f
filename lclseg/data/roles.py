"""Who plays which role in own data: by the names of cases alone, before any mask is opened."""

import collections
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from lclseg.data.case_files import NAME
from lclseg.data.layouts import Files
from lclseg.data.nifti import VolumeError
from lclseg.data.patients import patients_of
from lclseg.data.splits import ROLES, SplitError, draw_lists
from lclseg.data.survey import NAMED


def patient_of_case(data: ConfigDict, files: Sequence[Files]) -> dict[str, str]:
    """Finds the patient of each case."""
    ids = [f.case_id for f in files]
    return patients_of(ids) if data.patients_by_name else {i: i for i in ids}


def draw_roles(
    folder: Path, data: ConfigDict, files: Sequence[Files], start_from: str
) -> tuple[dict[str, Any], list[str]]:
    """Draws lists of patients by role, with the whole pool and those with a mask; and notes.

    By names alone: no mask is opened.
    """
    patient = patient_of_case(data, files)
    lists = {role: tuple(data[role]) for role in ROLES}
    for role, names in lists.items():
        for name in names:
            if patient.get(name, name) != name:
                raise SplitError(
                    f"data.{role}: {name} is one of several scans of {patient[name]}; wanted "
                    f"patients: name {patient[name]}, or set data.patients_by_name=False if these "
                    "are different ones"
                )
            if name not in patient.values():
                raise SplitError(
                    f"data.{role}: no case is called {name}; cases are called like "
                    f"{next(iter(patient.values()))}"
                )
    with_mask = {patient[f.case_id] for f in files if f.label is not None}
    if not with_mask:
        raise VolumeError(
            f"{folder}: 0 label files, so no case has a mask; wanted at least two masks, in "
            "labels/ or labelsTr/, called like their images"
        )
    for_test = {patient[f.case_id] for f in files if f.is_test and f.label is not None}
    lists, notes = keep_roles(start_from, with_mask, lists, data.num_validation, for_test)
    if for_test and not lists["test"]:
        taken = {p for role in ("labeled", "validation") for p in lists[role]}
        lists["test"] = tuple(sorted(for_test - taken))
        notes.append("imagesTs with labelsTs is the test set")
    patients = set(patient.values())
    drawn, told = draw_lists(
        np.random.default_rng(data.draw_seed),
        with_mask,
        lists=lists,
        num_labeled=data.num_labeled,
        num_unlabeled=len(patients - with_mask),
        num_validation=data.num_validation,
    )
    pool = tuple(dict.fromkeys(patient.values()))  # less those with another role
    num_validation = data.num_validation if drawn["validation"] else 0
    found = {"pool": pool, "with_mask": tuple(sorted(with_mask)), "num_validation": num_validation}
    return (
        drawn | found,
        [*notes, *_scans(patient), *told],
    )


def keep_roles(
    start_from: str,
    with_mask: Collection[str],
    lists: Mapping[str, Sequence[str]],
    num_validation: int,
    for_test: Collection[str] = (),
) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Keeps the roles of the run that this one starts from; patients with a new mask learn.

    So no patient that the weights have learnt from is tested on, and a corrected mask is used.

    Args:
      start_from: `rounds.start_from`; "": nothing is kept.
      with_mask: patients that have a mask now.
      lists: by role, as the config gives them; a list that is not empty stays as it is.
      num_validation: `data.num_validation`; with 0 nobody validates.
      for_test: those of labelsTs, who are tested on, not learnt from, if their masks are new.

    Returns:
      Lists by role, and what is worth telling. The lists as they are, where that run was on other
      data: one of its patients is not there, or has no mask.

    Raises:
      SplitError: the run is of a version that did not record which cases had a mask.
    """
    given = {role: tuple(patients) for role, patients in lists.items()}
    path = Path(start_from).expanduser() / "config.json"
    if not start_from or not path.is_file():  # the run says what is wrong with the folder
        return given, []
    before = json.loads(path.read_text())["data"]
    roles = {role: tuple(before.get(role, ())) for role in ("labeled", "validation", "test")}
    if before["name"] != NAME or not {p for r in roles.values() for p in r} <= set(with_mask):
        return given, []
    if "with_mask" not in before:
        raise SplitError(
            f"{path} does not tell which cases had a mask; wanted data.with_mask, which older "
            "versions did not record: give data.labeled, data.validation and data.test"
        )
    since = set(with_mask) - set(before["with_mask"])
    new = sorted(since - set(for_test))
    roles["labeled"] += tuple(new)
    roles["test"] += tuple(sorted(since & set(for_test)))
    if num_validation == 0:
        roles["validation"] = ()
    notes = [
        f"roles as in {path.parent}; {len(new)} new masks to learn from{': ' if new else ''}"
        f"{', '.join(new[:8])}"
    ]
    return given | {role: given[role] or patients for role, patients in roles.items()}, notes


def _scans(patient: dict[str, str]) -> list[str]:
    """A line on patients with several scans, where there are any."""
    scans = collections.defaultdict(list)
    for case, p in patient.items():
        scans[p].append(case)
    several = {p: cases for p, cases in scans.items() if len(cases) > 1}
    if not several:
        return []
    first, cases = next(iter(several.items()))
    return [
        f"WARNING: patients with several scans, by their names: {len(several)}; {first} is "
        f"{' and '.join(cases[:NAMED])}; all scans of a patient play one role. If these are "
        "different patients, set data.patients_by_name=False"
    ]
