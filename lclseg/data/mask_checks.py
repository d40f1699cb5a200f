"""What is wrong, or worth telling, of own data's masks, classes and pool."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from lclseg.data.case_files import find_cases
from lclseg.data.nifti import VolumeError
from lclseg.data.roles import patient_of_case
from lclseg.data.splits import SplitError, empty_masks
from lclseg.data.survey import NAMED, Survey, survey, voxels_in


def check_classes(label_values: Sequence[int], class_names: Sequence[str]) -> None:
    """Raises VolumeError unless values and names are as many, and each different."""
    if len(set(class_names)) != len(class_names) or len(set(label_values)) != len(label_values):
        raise VolumeError(
            f"data.class_names are {class_names} and data.label_values {label_values}; wanted each "
            "one different"
        )
    if len(class_names) != len(label_values):
        raise VolumeError(
            f"data.class_names are {len(class_names)}, data.label_values {len(label_values)} "
            f"{tuple(label_values)}; wanted a name for each value but 0"
        )


def check_masks(
    data: ConfigDict, surveys: Sequence[Survey], patient: Mapping[str, str]
) -> list[str]:
    """Finds what is worth telling of the masks looked at: empty ones, and classes that are rare.

    Args:
      data: of the config, with classes and lists of patients.
      surveys: of all cases.
      patient: of each case.

    Raises:
      SplitError: no labelled mask, or no validation mask, shows any of the classes.
    """
    masks = [s for s in surveys if s.voxels]
    shows = {s.case_id: any(v in s.voxels for v in data.label_values) for s in masks}
    for role in ("labeled", "validation"):
        own = [case for case in shows if patient[case] in data[role]]
        # Of a list given by hand, a case without a mask is for `splits.resolve_split` to name.
        complete_list = {patient[case] for case in own} >= {*data[role]}
        if own and complete_list and not any(shows[case] for case in own):
            raise empty_masks(role, own)
    empty = [s for s in masks if not shows[s.case_id]]
    lines = []
    if empty:
        some = ", ".join(str(s.files.label) for s in empty[:NAMED])
        some += f" and {len(empty) - NAMED} others" if len(empty) > NAMED else ""
        lines.append(f"{some}: empty, without any class; if that is not meant, mend them")
    learnt = [s for s in masks if patient[s.case_id] in data.labeled]
    for value, name in zip(data.label_values, data.class_names, strict=True):
        where = [s for s in masks if value in s.voxels]
        if not any(value in s.voxels for s in learnt):
            lines.append(
                f"no labelled mask shows {name} (value {value}), so the network cannot learn it; "
                "set data.labeled, or draw anew with another data.draw_seed"
            )
        elif len(where) == 1 and len(masks) > 2:
            lines.append(
                f"{name} (value {value}) is in one mask only of the {len(masks)} looked at, "
                f"{voxels_in(where[0], value)}; add masks that show it, or mend that one"
            )
    return lines


def check_pool(data: ConfigDict, turned: Sequence[Survey], patient: Mapping[str, str]) -> None:
    """Raises SplitError where the rounds have too few slices to make pairs of."""
    taken = {p for role in ("labeled", "validation", "test") for p in data[role]}
    pool = set(data.unlabeled or data.pool) - taken
    members = [s for s in turned if patient[s.case_id] in pool]
    slices = sum(s.shape[2] for s in members)
    if slices < 2:
        raise SplitError(
            f"slices in the unlabelled pool: {slices}; wanted at least 2, to draw from: add "
            "images, or set rounds.num_rounds=0 for supervised training alone"
        )


def largest_component(choice: str, data: ConfigDict, learnt: Sequence[Survey]) -> str:
    """Tells of which classes what is handed out keeps the largest component alone, in a line.

    Args:
      choice: `predictions.largest_component`.
      data: of the config, with classes.
      learnt: of the labelled cases.
    """
    line = f"predictions.largest_component = {choice}"
    if choice != "by_masks":
        return f"{line}  (given)"
    whole, apart = [], []
    for value, name in zip(data.label_values, data.class_names, strict=True):
        where = [s for s in learnt if value in s.voxels]
        broken = [s.case_id for s in where if value not in s.one_piece]
        if broken:
            apart.append(f"{name}, in several pieces in {broken[0]}")
        elif where:
            whole.append(name)
    kept = (
        f"kept of {', '.join(whole)}, one piece in all labelled masks" if whole else "kept of none"
    )
    return f"{line}  ({'; not of '.join([kept, *apart])})"


def empty_test(data: ConfigDict) -> SplitError | None:
    """Makes the error that a run ends with once it has prepared test masks that are all empty.

    `complete` does not open them; this does, for who checks a folder, and chooses nothing.

    Raises:
      VolumeError: see `survey.survey`.
    """
    files = find_cases(Path(data.manual_dir).expanduser(), data.exclude)
    patient = patient_of_case(data, files)
    tested = [f for f in files if f.label is not None and patient[f.case_id] in data.test]
    surveys = survey(tested, seen={f.case_id for f in tested}) if tested else []
    if not surveys or any(v in s.voxels for s in surveys for v in data.label_values):
        return None
    return empty_masks("test", [s.case_id for s in surveys])


def unseen_values(data: ConfigDict, shown: Mapping[int, Sequence[str]]) -> list[str]:
    """Warns of label values in masks that `complete` does not look at; chooses nothing.

    Args:
      data: of a complete config.
      shown: cases by label value, of all masks.
    """
    files = find_cases(Path(data.manual_dir).expanduser(), data.exclude)
    patient = patient_of_case(data, files)
    seen = {*data.labeled, *data.validation}
    lines = []
    for value, cases in sorted(shown.items()):
        if value in (data.ignore_value, *data.label_values) or {patient[c] for c in cases} & seen:
            continue
        lines.append(
            f"value {value}: in the masks of {', '.join(cases[:NAMED])} alone "
            f"({len(cases)} in all), which are neither learnt from nor for validation; it counts "
            "as background. If it is a class, name cases that show it in data.labeled, or draw "
            "anew with another data.draw_seed"
        )
    return lines
