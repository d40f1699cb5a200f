"""Own data: what a config leaves open is proposed from the folder, and who plays which role drawn.

Roles are drawn first, by the names of the cases. What follows looks at the headers of all images,
and at the masks that training may see, labelled and validation ones: no choice knows test masks.
Nothing here is special to a modality, but for CT, whose intensities mean the same in every scan.
Axes are those of the patient: 0 from left to right, 1 from back to front, 2 from feet to head.
"""

import collections
import hashlib
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from lclseg.data import layouts, nifti, orientation
from lclseg.data.layouts import FOREIGN, KNOWN, Files, channel_number, find_files, stem
from lclseg.data.nifti import VolumeError
from lclseg.data.patients import patients_of
from lclseg.data.splits import PROPOSED, ROLES, SplitError, draw_lists, empty_masks
from lclseg.data.survey import NAMED, Survey, odd_headers, survey

NAME = "nifti_folder"  # of the builder
SIZE_MULTIPLE = 32  # px: five poolings
MARGIN = 1.1  # the grid covers so many times what the masks' foreground needs
MAX_CLASSES = 255  # uint8, of which the last value stands for voxels that nothing is known of
TIE = 0.99  # spacings nearer than that count as equal
MAX_PROPOSED_SIZE = 1024  # px; a larger grid is rather a mistake of a header than meant
STRAY_VOXELS = 10  # a value with so many voxels a mask, in few masks, is a slip of the hand
WINDOW_PERCENTILES = (0.5, 99.5)  # of the foreground of CT, as nnU-Net has it
DIGEST_VERSION = 2  # rises when the same files are prepared otherwise
WANTED = "wanted images/ and labels/ with equal names, or imagesTr/ and labelsTr/ (nnU-Net)"
# What a config of own data leaves open; configs/nifti_folder.py says what each means.
OPEN: dict[str, Any] = {
    "name": NAME,
    "manual_dir": "",
    "image_size": 0,
    "target_spacing_mm": 0.0,
    "slice_axis": -1,
    "label_values": (),
    "class_names": (),
    "ignore_value": -1,
    "exclude": (),
    "patients_by_name": True,
    "channels": (),
    "windows": (),
    "folder_digest": "",
    "with_mask": (),
    "num_labeled": "2",
    "num_validation": PROPOSED,
    "draw_seed": 0,
    "pool": (),
    **dict.fromkeys(ROLES, ()),
}


def find_cases(folder: Path, exclude: Sequence[str] = ()) -> list[Files]:
    """The cases of a folder by id.

    Args:
      folder: see `layouts.find_files`.
      exclude: ids of cases to leave out.

    Raises:
      VolumeError: a line a problem: no folder, no image, two files of one name, a label without
        image, a channel missing, nothing to exclude.
    """
    if not folder.is_dir():
        raise VolumeError(f"data.manual_dir: no folder {folder}; {WANTED}")
    every = find_files(folder)
    if not every:
        suffixes = collections.Counter(p.suffix.lower() for p in folder.rglob("*") if p.is_file())
        found = ", ".join(f"{n} {s or 'without suffix'}" for s, n in suffixes.most_common(6))
        hints = sorted({FOREIGN[s] for s in suffixes if s in FOREIGN})
        raise VolumeError(
            f"data.manual_dir: no image in {folder}; found {found or 'no file'}; {WANTED}, as "
            f"{KNOWN}{': ' if hints else ''}{'; '.join(hints)}"
        )
    problems = [
        f"data.exclude: no case is called {name}; cases are called like {every[0].case_id}"
        for name in exclude
        if name not in {f.case_id for f in every}
    ]
    files = [f for f in every if f.case_id not in exclude]
    if not files:
        problems.append("data.exclude leaves no case; take some out of it")
    by_id = collections.defaultdict(list)
    for f in files:
        by_id[f.case_id].append(f)
    for case_id, same in by_id.items():
        if len(same) > 1:
            paths = ", ".join(str(f.image) for f in same)
            problems.append(
                f"{folder}: several images are called {case_id} ({paths}); wanted one: rename or "
                "move all but one"
            )
    problems += _lost_labels(folder, every)
    problems += _uneven_channels(files)
    if problems:
        raise VolumeError("\n".join(problems))
    return files


def _lost_labels(folder: Path, files: Sequence[Files]) -> list[str]:
    """Labels that no image is called like, and second copies of labels."""
    used = {f.label for f in files}
    stems = {(p.parent, stem(p)): p for p in used if p is not None}
    lost = [
        p
        for part in ("labels", "labelsTr", "labelsTs")
        if (folder / part.replace("labels", "images")).is_dir()
        for p in layouts.volumes_of(folder / part)
        if p not in used
    ]
    problems = [
        f"{p}: a second label beside {stems[p.parent, stem(p)].name}; wanted one of that name: "
        "move the other away"
        for p in lost
        if (p.parent, stem(p)) in stems
    ]
    lost = [p for p in lost if (p.parent, stem(p)) not in stems]
    if lost:
        problems.append(
            f"{lost[0]}: no image is called like this label, nor like {len(lost) - 1} others; "
            f"images are called like {files[0].case_id}: rename the labels, or take them out"
        )
    return problems


def _uneven_channels(files: Sequence[Files]) -> list[str]:
    """Cases that lack a channel which others have."""
    found = {f.case_id: tuple(channel_number(p) for p in f.images) for f in files if f.others}
    if not found:
        return []
    usual, _ = collections.Counter(found.values()).most_common(1)[0]
    problems = []
    for f in files:
        numbers = tuple(channel_number(p) for p in f.images)
        if numbers != usual:
            problems.append(
                f"{f.image}: {f.case_id} has channel {', '.join(map(str, numbers))}; wanted "
                f"{', '.join(map(str, usual))}, as most cases have: add the files, choose channels "
                "with data.channels, or leave the case out (data.exclude)"
            )
    return problems


def left_out(folder: Path, files: Sequence[Files], exclude: Sequence[str] = ()) -> list[str]:
    """Warnings of what lies in the folder and is not read, a line each."""
    every = [f for f in find_files(folder) if f.case_id in exclude]
    lines = []
    for kind, paths in layouts.unused(folder, [*files, *every]).items():
        some = ", ".join(str(p.relative_to(folder)) for p in paths[:NAMED])
        some += f" and {len(paths) - NAMED} others" if len(paths) > NAMED else ""
        if kind == "volumes":
            lines.append(
                f"{folder}: not read: {some}; what is to be read lies in images/ and labels/ (or "
                "imagesTr/, labelsTr/, imagesTs/, labelsTs/) themselves"
            )
        else:
            lines.append(f"{folder}: not read: {some}; to use them, {FOREIGN[kind]}")
    return lines


def folder_digest(folder: Path, files: Sequence[Files]) -> str:
    """Hexadecimal digest of names, sizes and modification times of the files that are read."""
    paths = [p for f in files for p in f.paths]
    paths += [p.with_suffix(".img") for p in paths if p.suffix.lower() == ".hdr"]
    paths.append(folder / "dataset.json")
    stats = [(str(p.relative_to(folder)), p.stat()) for p in sorted(paths) if p.is_file()]
    text = json.dumps([DIGEST_VERSION, *((n, s.st_size, s.st_mtime_ns) for n, s in stats)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def propose_slice_axis(surveys: Sequence[Survey]) -> int:
    """The axis of the patient with the coarsest median spacing; of equal ones the last."""
    along = []
    for s in surveys:
        axes = orientation.nearest(s.affine, (1.0, 1.0, 1.0), "RAS").axes
        along.append([s.spacing_mm[a] for a in axes])
    spacing = np.median(along, axis=0)
    return int(np.flatnonzero(spacing >= TIE * spacing.max())[-1])


def propose_spacing_mm(turned: Sequence[Survey]) -> float:
    """Median in-plane spacing of all images, to five digits; axes of the volumes."""
    return float(f"{np.median([s.spacing_mm[:2] for s in turned]):.5g}")


def propose_image_size(turned: Sequence[Survey], target_spacing_mm: float) -> int:
    """The smallest multiple of 32 px that covers the foreground seen, with a margin of 10 %.

    About the centre of the image, where volumes are cropped and padded; the margin ends with the
    largest image.

    Args:
      turned: their axes those of the volumes.
      target_spacing_mm: of the grid.

    Raises:
      VolumeError: more than `MAX_PROPOSED_SIZE`.
    """
    needed: dict[Files, float] = {}
    for s in turned:
        for axis in (0, 1):
            extent = s.shape[axis] * s.spacing_mm[axis]
            wanted = min(2 * MARGIN * s.reach_mm[axis], extent)
            needed[s.files] = max(needed.get(s.files, 0.0), wanted)
    largest = max(needed, key=lambda files: needed[files])
    # Rounded: 32.0000001 px of a header's float32 are 32.
    blocks = math.ceil(round(needed[largest] / target_spacing_mm / SIZE_MULTIPLE, 4))
    size = SIZE_MULTIPLE * max(blocks, 1)
    if size > MAX_PROPOSED_SIZE:
        raise VolumeError(
            f"{largest.label}: its foreground reaches over {needed[largest]:.4g} mm, which are "
            f"{size} px of {target_spacing_mm:g} mm; wanted a grid of at most {MAX_PROPOSED_SIZE} "
            "px: look at spacing and unit in its header, leave the case out (data.exclude), or set "
            "data.target_spacing_mm or data.image_size yourself"
        )
    return size


def propose_label_values(
    folder: Path, surveys: Sequence[Survey], ignore_value: int | None
) -> tuple[tuple[int, ...], list[str]]:
    """The foreground values that the masks looked at show, ascending, and warnings of others.

    Others are left out: they are in so few voxels of so few masks that a hand has slipped.

    Raises:
      VolumeError: none with foreground, too many values, or 255 among others, which may
        be one or mean that nothing is known there.
    """
    masks = [s for s in surveys if s.voxels]
    shown: dict[int, list[Survey]] = collections.defaultdict(list)
    for s in masks:
        for value in s.voxels:
            if value not in (0, ignore_value):
                shown[value].append(s)
    if not shown:
        cases = ", ".join(s.case_id for s in masks[:NAMED])
        raise VolumeError(
            f"{folder}: {len(masks)} labelled and validation masks ({cases}), all of them empty; "
            "set data.labeled and data.validation to others, or draw anew with another "
            "data.draw_seed"
        )
    if len(shown) >= MAX_CLASSES:
        values = ", ".join(map(str, sorted(shown)[:8]))
        raise VolumeError(
            f"{folder}: masks show {len(shown)} values ({values}, ...); wanted fewer than "
            f"{MAX_CLASSES}: are these images? Or set data.label_values"
        )
    stray = {
        value: where
        for value, where in shown.items()
        if max(s.voxels[value] for s in where) <= STRAY_VOXELS
        and len(where) <= max(1, len(masks) // 10)
    }
    if len(stray) == len(shown):
        stray = {}
    if (
        nifti.IGNORED in shown
        and len(shown) - len(stray) > 1
        and nifti.IGNORED not in stray
        and nifti.IGNORED not in listed_names(folder)
    ):
        others = tuple(sorted(v for v in shown if v not in stray and v != nifti.IGNORED))
        raise VolumeError(
            f"{shown[nifti.IGNORED][0].files.label}: found value {nifti.IGNORED} in "
            f"{len(shown[nifti.IGNORED])} masks, beside {', '.join(map(str, others))}; wanted to "
            'know what it means. If nothing is known there, call it "ignore" in dataset.json or '
            f"set data.ignore_value={nifti.IGNORED}; if it is a class, set data.label_values="
            f"{(*others, nifti.IGNORED)}"
        )
    warnings = [
        f"value {value}: {' and '.join(_voxels_in(s, value) for s in where)}, in no other mask; "
        "counts as background. If it is a class, set data.label_values; else mend the mask"
        for value, where in sorted(stray.items())
    ]
    return tuple(sorted(shown.keys() - stray.keys())), warnings


def _voxels_in(s: Survey, value: int) -> str:
    return f"{s.voxels[value]} voxel{'s' * (s.voxels[value] > 1)} of {s.files.label}"


def dataset_json(folder: Path) -> dict:
    """What dataset.json holds, the Decathlon's or nnU-Net's; {} without one.

    Raises:
      VolumeError: it is not readable as JSON.
    """
    path = folder / "dataset.json"
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))  # Windows' editors add a mark
    except ValueError as error:
        raise VolumeError(
            f"{path}: not readable as JSON ({error}); mend it, or take it out: then classes are "
            "called class_1, ..."
        ) from error
    return content if isinstance(content, dict) else {}


def listed_names(folder: Path) -> dict[int, str]:
    """Label value -> name from dataset.json; nnU-Net's regions (several values a name) left out.

    Raises:
      VolumeError: it is not readable as JSON.
    """
    labels = dataset_json(folder).get("labels")
    names = {}
    for key, value in labels.items() if isinstance(labels, dict) else ():
        # {"1": "Anterior"} or {"Anterior": 1}
        number, name = (key, value) if isinstance(value, str) and key.isdigit() else (value, key)
        if str(number).isdigit():
            names[int(number)] = name
    return names


def is_ct(folder: Path, channel: int) -> bool:
    """Whether dataset.json says that a channel is CT."""
    content = dataset_json(folder)
    names = content.get("channel_names", content.get("modality"))
    name = names.get(str(channel)) if isinstance(names, dict) else None
    return isinstance(name, str) and name.strip().upper() == "CT"


def propose_class_names(folder: Path, label_values: Sequence[int]) -> tuple[str, ...]:
    """Names from dataset.json, or class_<value>."""
    listed = listed_names(folder)
    return tuple(listed.get(v) or f"class_{v}" for v in label_values)


def propose_windows(
    folder: Path, channels: Sequence[int], labeled: Sequence[Files], label_values: Sequence[int]
) -> tuple[tuple[float, float] | None, ...]:
    """Of each channel that is CT, percentiles of the intensities in the foreground; else None.

    Args:
      folder: holds dataset.json.
      channels: numbers; (): the one file of each case.
      labeled: the cases to learn from.
      label_values: of the foreground.

    Returns:
      A window or None for each channel; () where none is CT.
    """
    windows: list[tuple[float, float] | None] = []
    for channel in channels or (0,):
        if not is_ct(folder, channel):
            windows.append(None)
            continue
        values = []
        for f in labeled:
            assert f.label is not None
            path = next(p for p in f.images if channel_number(p) == channel or not channels)
            volume = nifti.read_image(path)
            raw = nifti.read_raw_label(f.label, volume, path)
            label = nifti.whole_numbers(f.label, raw)
            values.append(volume.image[np.isin(label, label_values)])
        if not values:  # `splits.resolve_split` tells that they have no mask
            windows.append(None)
            continue
        low, high = np.percentile(np.concatenate(values), WINDOW_PERCENTILES)
        windows.append((float(low), float(high)) if high > low else None)
    return tuple(windows) if any(windows) else ()


def complete(config: ConfigDict) -> tuple[ConfigDict, str]:
    """Fills in what a config of own data leaves open; other configs stay as they are.

    Args:
      config: what `OPEN` has is filled in.

    Returns:
      The whole config, and what was proposed, as text of several lines, the warnings last; "" for
      other configs.

    Raises:
      VolumeError, SplitError: see the functions above and `splits.draw_lists`.
    """
    if config.data.name != NAME:
        return config, ""
    config = config.copy_and_resolve_references()
    data = config.data
    if not data.manual_dir:
        raise VolumeError(
            "data.manual_dir is not set; give the folder with your images/ and labels/ (or "
            "imagesTr/ and labelsTr/) as --config.data.manual_dir=PATH"
        )
    folder = Path(data.manual_dir).expanduser()
    files = find_cases(folder, data.exclude)
    given = {key: bool(data[key]) for key in ("label_values", "image_size", "target_spacing_mm")}
    given["slice_axis"] = data.slice_axis in (0, 1, 2)
    data.channels = _channels(files, data.channels)
    data.folder_digest = folder_digest(folder, files)
    warnings = left_out(folder, files, data.exclude)

    # Who plays which role is settled before any mask is opened.
    patient = _patients(data, files)
    rounds = config.get("rounds")
    lists, notes = _draw(folder, data, files, rounds.start_from if rounds else "")
    data.update(lists)
    warnings += [n.removeprefix("WARNING: ") for n in notes if n.startswith("WARNING: ")]
    seen = {f.case_id for f in files if patient[f.case_id] in {*data.labeled, *data.validation}}
    surveys = survey(files, tuple(v for v in data.label_values if v), seen=seen)

    listed = listed_names(folder)
    if data.ignore_value < 0:
        named = [v for v, name in listed.items() if name.lower() == "ignore"]
        data.ignore_value = named[0] if named else -1
    ignored = data.ignore_value if data.ignore_value >= 0 else None
    data.label_values = tuple(v for v in data.label_values if v)
    if not data.label_values:
        data.label_values, stray = propose_label_values(folder, surveys, ignored)
        warnings += stray
        if len(data.label_values) < len({v for s in surveys for v in s.voxels} - {0}):
            # Their foreground is what counts.
            surveys = survey(files, data.label_values, seen=seen)
        warnings += [
            f"dataset.json lists {value} ({name}), which no labelled or validation mask shows: it "
            "counts as background; set data.label_values, or draw anew with another data.draw_seed"
            for value, name in listed.items()
            if value not in (0, ignored, *data.label_values)
        ]
    data.class_names = data.class_names or propose_class_names(folder, data.label_values)
    check_classes(data.label_values, data.class_names)
    warnings += check_masks(data, surveys, patient)

    if not given["slice_axis"]:
        data.slice_axis = propose_slice_axis(surveys)
    wanted = orientation.BY_SLICE_AXIS[data.slice_axis]
    warnings += odd_headers(surveys, wanted)
    turned = [s.along(wanted) for s in surveys]
    data.target_spacing_mm = data.target_spacing_mm or propose_spacing_mm(turned)
    data.image_size = data.image_size or propose_image_size(turned, data.target_spacing_mm)
    if rounds is None or rounds.num_rounds:
        _check_pool(data, turned, patient)
    learnt = [s for s in surveys if s.voxels and patient[s.case_id] in data.labeled]
    if not data.windows:
        labeled = [s.files for s in learnt]
        data.windows = propose_windows(folder, data.channels, labeled, data.label_values)
    notes = [n for n in notes if not n.startswith("WARNING: ")]
    choice = config.predictions.largest_component if "predictions" in config else "by_masks"
    notes.append(largest_component(choice, data, learnt))
    return config, _summary(folder, data, surveys, turned, given, notes, warnings)


def _channels(files: Sequence[Files], chosen: Sequence[int]) -> tuple[int, ...]:
    """The numbers of the channels to use; () where a case is one file and nothing was chosen."""
    there = tuple(channel_number(p) for p in files[0].images)
    missing = [n for n in chosen if n not in there]
    if missing:
        raise VolumeError(
            f"data.channels: found no channel {missing[0]} of {files[0].case_id}; wanted some of "
            f"{', '.join(map(str, there))}"
        )
    if chosen:
        return tuple(chosen)
    return there if len(there) > 1 else ()


def _patients(data: ConfigDict, files: Sequence[Files]) -> dict[str, str]:
    """The patient of each case."""
    ids = [f.case_id for f in files]
    return patients_of(ids) if data.patients_by_name else {i: i for i in ids}


def _draw(
    folder: Path, data: ConfigDict, files: Sequence[Files], start_from: str
) -> tuple[dict[str, Any], list[str]]:
    """Lists of patients by role, with the whole pool and those with a mask; what is worth telling.

    By names alone: no mask is opened.
    """
    patient = _patients(data, files)
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
    """The roles of the run that this one starts from; patients who have got a mask since learn.

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


def largest_component(choice: str, data: ConfigDict, learnt: Sequence[Survey]) -> str:
    """A line on the classes of which what is handed out keeps the largest component alone.

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


def check_masks(
    data: ConfigDict, surveys: Sequence[Survey], patient: Mapping[str, str]
) -> list[str]:
    """What is worth telling of the masks looked at: empty ones, and classes that are rare.

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
                f"{_voxels_in(where[0], value)}; add masks that show it, or mend that one"
            )
    return lines


def empty_test(data: ConfigDict) -> SplitError | None:
    """The error that a run ends with once it has prepared test masks which are all empty.

    `complete` does not open them; this does, for who checks a folder, and chooses nothing.

    Raises:
      VolumeError: see `survey.survey`.
    """
    files = find_cases(Path(data.manual_dir).expanduser(), data.exclude)
    patient = _patients(data, files)
    tested = [f for f in files if f.label is not None and patient[f.case_id] in data.test]
    surveys = survey(tested, seen={f.case_id for f in tested}) if tested else []
    if not surveys or any(v in s.voxels for s in surveys for v in data.label_values):
        return None
    return empty_masks("test", [s.case_id for s in surveys])


def unseen_values(data: ConfigDict, shown: Mapping[int, Sequence[str]]) -> list[str]:
    """Warnings of label values in masks that `complete` does not look at; chooses nothing.

    Args:
      data: of a complete config.
      shown: cases by label value, of all masks.
    """
    files = find_cases(Path(data.manual_dir).expanduser(), data.exclude)
    patient = _patients(data, files)
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


def _check_pool(data: ConfigDict, turned: Sequence[Survey], patient: Mapping[str, str]) -> None:
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


def builder_options(data: ConfigDict) -> dict:
    """What `open_prepared` needs besides the grid, of a complete config of own data."""
    ignored = data.get("ignore_value", -1)
    return {
        "folder_name": Path(data.manual_dir).expanduser().resolve().name,
        "folder_digest": data.folder_digest,
        "label_values": tuple(data.label_values),
        "class_names": tuple(data.class_names),
        "orientation": orientation.BY_SLICE_AXIS[data.slice_axis],
        "ignore_value": ignored if ignored >= 0 else None,
        "exclude": tuple(data.get("exclude", ())),
        "patients_by_name": data.get("patients_by_name", True),
        "channels": tuple(data.get("channels", ())),
        "windows": tuple(w and tuple(w) for w in data.get("windows", ())),
    }


def _summary(
    folder: Path,
    data: ConfigDict,
    surveys: Sequence[Survey],
    turned: Sequence[Survey],
    given: dict[str, bool],
    notes: Sequence[str],
    warnings: Sequence[str],
) -> str:
    masks = [s for s in turned if s.voxels]
    in_plane = np.array([s.spacing_mm[:2] for s in turned])
    through = [s.spacing_mm[2] for s in turned]
    classes = ", ".join(
        f"{value} -> {c} {name} (in {sum(value in s.voxels for s in masks)})"
        for c, (value, name) in enumerate(
            zip(data.label_values, data.class_names, strict=True), start=1
        )
    )
    others = sorted(
        {v for s in masks for v in s.voxels} - {0, data.ignore_value, *data.label_values}
    )

    def line(key, value, why):
        return f"  data.{key} = {value}  ({'given' if given.get(key) else why})"

    num_masks = sum(s.files.label is not None for s in surveys)
    lines = [
        f"{folder}: {len(surveys)} images, {num_masks} with a mask",
        f"  looked at: the {len(masks)} labelled and validation masks; of the others the names",
        f"  label value -> class, in so many of these: {classes}",
        line("label_values", tuple(data.label_values), "all that they show"),
        line("slice_axis", data.slice_axis, f"coarsest spacing, {np.median(through):.4g} mm"),
        line(
            "target_spacing_mm",
            data.target_spacing_mm,
            f"median in-plane; {in_plane.min():.4g} to {in_plane.max():.4g} mm",
        ),
        line("image_size", data.image_size, "px; covers their foreground and a margin"),
    ]
    if data.ignore_value >= 0:
        lines.append(f"  value {data.ignore_value}: nothing is known there, and nothing counts")
    if others:
        lines.append(f"  values {', '.join(map(str, others[:8]))} count as background")
    if data.channels:
        lines.append(f"  data.channels = {tuple(data.channels)}  (the image's channels)")
    for channel, window in zip(data.channels or (0,), data.windows, strict=False):
        if window is not None:
            lines.append(
                f"  channel {channel} is CT: {window[0]:.4g} to {window[1]:.4g}, as the "
                "foreground has, become 0 to 1"
            )
    letters = collections.Counter(orientation.letters_of(s.affine) for s in surveys)
    told = ", ".join(f"{name} {n}" for name, n in letters.most_common())
    lines.append(
        f"  files lie {told}; all are turned to {orientation.BY_SLICE_AXIS[data.slice_axis]}"
    )
    lines += [f"  {note}" for note in notes]
    lost = [
        s.case_id
        for s in turned
        for axis in (0, 1)
        if 2 * s.reach_mm[axis] > data.image_size * data.target_spacing_mm + 1e-3
    ]
    warnings = list(warnings)
    if lost:
        warnings.append(
            f"the grid cuts off foreground of {len(set(lost))} masks, {lost[0]} first; a larger "
            "data.image_size or data.target_spacing_mm covers them"
        )
    return "\n".join([*lines, *(f"  WARNING: {w}" for w in warnings)])


def warnings_in(text: str) -> list[str]:
    """The warnings in what `complete` told."""
    return re.findall(r"^  WARNING: (.*)$", text, re.MULTILINE)
