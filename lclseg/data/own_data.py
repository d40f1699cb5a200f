"""Own data: what a config leaves open is proposed from the folder, and who plays which role drawn.

Roles are drawn first, by the names of the cases. What follows looks at the headers of all images,
and at the masks that training may see, labelled and validation ones: no choice knows test masks.
Nothing here is special to a modality. Axes are those of the files, 0, 1, 2; patients are cases: an
image file, or what nnU-Net calls a case. Where a patient has several, give the lists of patients.
"""

import collections
import concurrent.futures
import hashlib
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from lclseg.cores import usable_cores
from lclseg.data import nifti
from lclseg.data.layouts import Files, find_files, niftis, stem
from lclseg.data.splits import ROLES, SplitError, draw_lists

NAME = "nifti_folder"  # of the builder
SIZE_MULTIPLE = 32  # px: five poolings
MARGIN = 1.1  # the grid covers so many times what the masks' foreground needs
MAX_CLASSES = 255  # uint8, of which pseudo-labels use the last value
TIE = 0.99  # spacings nearer than that count as equal


class Survey(NamedTuple):
    """What one case shows.

    Attributes:
      case_id: see `nifti_folder.Files`.
      shape, spacing_mm: of the image, by axis.
      orientation: of the axes, e.g. "RAS".
      voxels: by label value of the mask; {} without a mask that is looked at.
      reach_mm: by axis, distance of the outermost foreground from the image's centre; 0.0 without
        foreground.
    """

    case_id: str
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    orientation: str
    voxels: dict[int, int]
    reach_mm: tuple[float, float, float]


def find_cases(folder: Path) -> list[Files]:
    """The cases of a folder by id; of images with several channels (_0000, _0001) the first.

    Raises:
      volumes.VolumeError: no folder, no image, two images of one id, a label without image.
    """
    wanted = "wanted images/ and labels/ with equal names, or imagesTr/ and labelsTr/ (nnU-Net)"
    if not folder.is_dir():
        raise nifti.VolumeError(f"data.manual_dir: no folder {folder}; {wanted}")
    files = find_files(folder)
    first = {f.image for f in files if stem(f.image).endswith("_0000")}
    files = [f for f in files if f.image in first or _channel(f, 0) not in first]
    if not files:
        raise nifti.VolumeError(f"data.manual_dir: no .nii.gz file in {folder}; {wanted}")
    repeated = [i for i, n in collections.Counter(f.case_id for f in files).items() if n > 1]
    if repeated:
        raise nifti.VolumeError(
            f"{folder}: several images are called {', '.join(repeated[:8])}; rename all but one"
        )
    used = {f.label for f in files}
    lost = [
        p
        for part in ("labels", "labelsTr")
        if files[0].image.parent.name in ("images", "imagesTr", "imagesTs")
        for p in niftis(folder / part)
        if p not in used
    ]
    if lost:
        raise nifti.VolumeError(
            f"{lost[0]}: no image is called like this label, nor like {len(lost) - 1} others; "
            f"images are called like {files[0].case_id}: rename the labels, or take them out"
        )
    return files


def _channel(case: Files, number: int) -> Path:
    """Where nnU-Net has another channel of a case's image; itself, if its name has no channel."""
    name = re.sub(r"_000\d(?=\.nii(\.gz)?$)", f"_{number:04d}", case.image.name)
    return case.image.with_name(name)


def folder_digest(folder: Path, files: Sequence[Files]) -> str:
    """Hexadecimal digest of names, sizes and modification times of the files that are read."""
    paths = [p for f in files for p in (f.image, f.label) if p is not None]
    paths += [p for p in [folder / "dataset.json"] if p.is_file()]
    stats = [(str(p.relative_to(folder)), p.stat()) for p in sorted(paths)]
    text = json.dumps([(name, s.st_size, s.st_mtime_ns) for name, s in stats])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def survey_case(case: Files, label_values: Sequence[int] = (), *, with_mask: bool) -> Survey:
    """Looks at an image's header and at its mask, if it may.

    Args:
      case: the files.
      with_mask: False: the mask stays unopened.
      label_values: of the foreground; (): all but 0.

    Raises:
      volumes.VolumeError: see `volumes.read_geometry` and `volumes.read_raw_label`; label values
        that are no whole numbers 0..65535.
    """
    shape, spacing_mm, affine = nifti.read_geometry(case.image)
    orientation = "".join(axis or "?" for axis in nib.aff2axcodes(affine))
    if case.label is None or not with_mask:
        return Survey(case.case_id, shape, spacing_mm, orientation, {}, (0.0, 0.0, 0.0))
    no_voxels = np.broadcast_to(np.float32(0), shape)  # the label needs its image's geometry only
    image = nifti.Volume(no_voxels, None, affine, spacing_mm)
    label = whole_numbers(case.label, nifti.read_raw_label(case.label, image, case.image))
    counts = np.bincount(label.ravel())
    voxels = {int(v): int(counts[v]) for v in np.flatnonzero(counts)}
    table = np.zeros(len(counts), bool)
    table[[v for v in voxels if v in label_values or (v and not label_values)]] = True
    foreground = table[label]
    x, y, z = (
        _reach(foreground.any(axis=tuple({0, 1, 2} - {a}))) * spacing_mm[a] for a in range(3)
    )
    return Survey(case.case_id, shape, spacing_mm, orientation, voxels, (x, y, z))


def whole_numbers(path: Path, label: np.ndarray) -> np.ndarray:
    """The label as uint16; raises VolumeError unless it holds whole numbers 0..65535."""
    with np.errstate(invalid="ignore"):
        whole = label.astype(np.uint16)
    if not np.array_equal(whole, label):
        nifti.check_label_values(path, label, nifti.MAX_LABEL_VALUE)
    return whole


def _reach(occupied: np.ndarray) -> float:
    """Samples from the middle of a line [n] bool to the outer edge of its outermost True, or 0."""
    found = np.flatnonzero(occupied)
    if not found.size:
        return 0.0
    middle = (len(occupied) - 1) / 2
    return float(max(middle - found[0], found[-1] - middle) + 0.5)


def propose_slice_axis(surveys: Sequence[Survey]) -> int:
    """The axis of coarsest median spacing; of equal ones the last."""
    spacing = np.median([s.spacing_mm for s in surveys], axis=0)
    return int(np.flatnonzero(spacing >= TIE * spacing.max())[-1])


def propose_spacing_mm(surveys: Sequence[Survey], slice_axis: int) -> float:
    """Median spacing of all images along the two other axes, to five digits."""
    spacings = np.delete([s.spacing_mm for s in surveys], slice_axis, axis=1)
    return float(f"{np.median(spacings):.5g}")


def propose_image_size(surveys: Sequence[Survey], slice_axis: int, target_spacing_mm: float) -> int:
    """The smallest multiple of 32 px that covers the foreground seen, with a margin of 10 %.

    About the centre of the image, where volumes are cropped and padded; the margin ends with the
    largest image.
    """
    needed = 0.0
    for s in surveys:
        for axis in {0, 1, 2} - {slice_axis}:
            extent = s.shape[axis] * s.spacing_mm[axis]
            needed = max(needed, min(2 * MARGIN * s.reach_mm[axis], extent))
    # Rounded: 32.0000001 px of a header's float32 are 32.
    blocks = math.ceil(round(needed / target_spacing_mm / SIZE_MULTIPLE, 4))
    return SIZE_MULTIPLE * max(blocks, 1)


def propose_label_values(folder: Path, surveys: Sequence[Survey]) -> tuple[int, ...]:
    """The foreground values that the masks looked at show, ascending.

    Raises:
      volumes.VolumeError: none with foreground, too many values, or nnU-Net's "ignore".
    """
    masks = [s for s in surveys if s.voxels]
    values = sorted({v for s in masks for v in s.voxels} - {0})
    if not values:
        cases = ", ".join(s.case_id for s in masks[:8])
        raise nifti.VolumeError(
            f"{folder}: {len(masks)} labelled and validation masks ({cases}), all of them empty; "
            "set data.labeled and data.validation to others, or draw anew with another "
            "data.draw_seed"
        )
    if len(values) >= MAX_CLASSES:
        raise nifti.VolumeError(
            f"{folder}: masks show {len(values)} values ({', '.join(map(str, values[:8]))}, ...); "
            f"wanted fewer than {MAX_CLASSES}: are these images? Or set data.label_values"
        )
    ignored = [v for v, name in listed_names(folder).items() if name == "ignore" and v in values]
    if ignored:
        raise nifti.VolumeError(
            f"{folder / 'dataset.json'}: value {ignored[0]} is to be ignored, which lclseg cannot; "
            "set data.label_values to the values of the classes: others count as background"
        )
    return tuple(values)


def listed_names(folder: Path) -> dict[int, str]:
    """Label value -> name from dataset.json, the Decathlon's or nnU-Net's; {} without one.

    nnU-Net's regions (several values a name) are left out.

    Raises:
      volumes.VolumeError: it is not readable as JSON.
    """
    path = folder / "dataset.json"
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise nifti.VolumeError(f"{path}: not readable as JSON ({error})") from error
    labels = content.get("labels") if isinstance(content, dict) else None
    names = {}
    for key, value in labels.items() if isinstance(labels, dict) else ():
        # {"1": "Anterior"} or {"Anterior": 1}
        number, name = (key, value) if isinstance(value, str) and key.isdigit() else (value, key)
        if str(number).isdigit():
            names[int(number)] = name
    return names


def propose_class_names(folder: Path, label_values: Sequence[int]) -> tuple[str, ...]:
    """Names from dataset.json, or class_<value>."""
    listed = listed_names(folder)
    return tuple(listed.get(v) or f"class_{v}" for v in label_values)


def complete(config: ConfigDict) -> tuple[ConfigDict, str]:
    """Fills in what a config of own data leaves open; other configs stay as they are.

    Args:
      config: `data.image_size` 0, `data.target_spacing_mm` 0.0, `data.slice_axis` -1, empty
        `data.label_values`, `data.class_names` and lists of patients are filled in, and
        `data.folder_digest` is.

    Returns:
      The whole config, and what was proposed, as text of several lines; "" for other configs.

    Raises:
      volumes.VolumeError, SplitError: see the functions above and `splits.draw_lists`.
    """
    if config.data.name != NAME:
        return config, ""
    config = config.copy_and_resolve_references()
    data = config.data
    if not data.manual_dir:
        raise nifti.VolumeError(
            "data.manual_dir is not set; give the folder with your images/ and labels/ (or "
            "imagesTr/ and labelsTr/) as --config.data.manual_dir=PATH"
        )
    folder = Path(data.manual_dir).expanduser()
    files = find_cases(folder)
    data.folder_digest = folder_digest(folder, files)
    given = {key: bool(data[key]) for key in ("label_values", "image_size", "target_spacing_mm")}
    data.label_values = tuple(v for v in data.label_values if v)
    masked = [f.case_id for f in files if f.label]
    if not masked:
        raise nifti.VolumeError(
            f"{folder}: 0 label files, so no case has a mask; wanted at least two masks, in "
            "labels/ or labelsTr/, called like their images"
        )
    given_lists = {role: tuple(data[role]) for role in ROLES}
    kept, notes = keep_roles(config.rounds.start_from, masked, given_lists, data.num_validation)
    lists, drawn_notes = draw_lists(
        np.random.default_rng(data.draw_seed),
        masked,
        lists=kept,
        num_labeled=data.num_labeled,
        num_unlabeled=len(files) - len(masked),
        num_validation=data.num_validation,
    )
    notes = notes + drawn_notes
    surveys = survey(files, data.label_values, seen={*lists["labeled"], *lists["validation"]})
    data.label_values = data.label_values or propose_label_values(folder, surveys)
    data.class_names = data.class_names or propose_class_names(folder, data.label_values)
    check_classes(data.label_values, data.class_names)
    given["slice_axis"] = data.slice_axis in (0, 1, 2)
    if not given["slice_axis"]:
        data.slice_axis = propose_slice_axis(surveys)
    data.target_spacing_mm = data.target_spacing_mm or propose_spacing_mm(surveys, data.slice_axis)
    data.image_size = data.image_size or propose_image_size(
        surveys, data.slice_axis, data.target_spacing_mm
    )
    data.with_mask = tuple(sorted(masked))
    notes += check_masks(surveys, lists, data.label_values, data.class_names)
    data.pool = tuple(f.case_id for f in files)  # less those with another role
    data.update(lists)
    others = sum(_channel(f, 1) != f.image and _channel(f, 1).exists() for f in files)
    if others:
        notes.append(f"WARNING: {others} images have channels; only the first (_0000) is read")
    listed = listed_names(folder)
    if not given["label_values"]:
        notes += [
            f"WARNING: dataset.json lists {value} ({name}), which no labelled or validation mask "
            "shows: it counts as background; set data.label_values, or draw anew"
            for value, name in listed.items()
            if value and value not in data.label_values
        ]
    return config, _summary(folder, data, surveys, len(masked), given, notes)


def keep_roles(
    start_from: str,
    with_mask: Collection[str],
    lists: Mapping[str, Sequence[str]],
    num_validation: int,
) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """The roles of the run that this one starts from; cases that have got a mask since learn.

    So no case that the weights have learnt from is tested on, and a corrected mask is used.

    Args:
      start_from: `rounds.start_from`; "": nothing is kept.
      with_mask: cases that have a mask now.
      lists: by role, as the config gives them; a list that is not empty stays as it is.
      num_validation: `data.num_validation`; with 0 nobody validates.

    Returns:
      Lists by role, and what is worth telling. The lists as they are, where that run was on other
      data: one of its cases is not there, or has no mask.

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
    new = sorted(set(with_mask) - set(before["with_mask"]))
    roles["labeled"] += tuple(new)
    if num_validation == 0:
        roles["validation"] = ()
    notes = [
        f"roles as in {path.parent}; {len(new)} new masks to learn from{': ' if new else ''}"
        f"{', '.join(new[:8])}"
    ]
    return given | {role: given[role] or patients for role, patients in roles.items()}, notes


def check_masks(
    surveys: Sequence[Survey],
    lists: Mapping[str, Sequence[str]],
    label_values: Sequence[int],
    class_names: Sequence[str],
) -> list[str]:
    """What is worth telling of the masks to learn from, line by line.

    Raises:
      SplitError: no labelled mask, or no validation mask, shows any of the classes.
    """
    shown = {s.case_id: {v for v in label_values if v in s.voxels} for s in surveys if s.voxels}
    by_role = {
        role: set().union(*(shown.get(patient, set()) for patient in lists[role]))
        for role in ("labeled", "validation")
    }
    for role, found in by_role.items():
        # Of a list given by hand, a case without a mask is for `splits.resolve_split` to name.
        if lists[role] and not found and shown.keys() >= {*lists[role]}:
            raise SplitError(
                f"the masks of data.{role} ({', '.join(lists[role][:8])}) show no class at all; "
                f"set data.{role} to others, or draw anew with another data.draw_seed"
            )
    return [
        f"WARNING: no labelled mask shows {name}, so the network cannot learn it; set "
        "data.labeled, or draw anew with another data.draw_seed"
        for value, name in zip(label_values, class_names, strict=True)
        if value not in by_role["labeled"]
    ]


def survey(
    files: Sequence[Files], label_values: Sequence[int] = (), *, seen: Collection[str]
) -> list[Survey]:
    """`survey_case` of every case, on all cores: unpacking and counting hold no interpreter lock.

    seen: the cases whose masks are looked at.

    Raises:
      volumes.VolumeError: of the first case that has one.
    """
    workers = min(usable_cores(), len(files))
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        surveys = pool.map(
            lambda f: survey_case(f, label_values, with_mask=f.case_id in seen), files
        )
        return list(tqdm(surveys, "looking at the masks", len(files), disable=None, leave=False))


def check_classes(label_values: Sequence[int], class_names: Sequence[str]) -> None:
    """Raises VolumeError unless values and names are as many, and each different."""
    if len(set(class_names)) != len(class_names) or len(set(label_values)) != len(label_values):
        raise nifti.VolumeError(
            f"data.class_names are {class_names} and data.label_values {label_values}; wanted each "
            "one different"
        )
    if len(class_names) != len(label_values):
        raise nifti.VolumeError(
            f"data.class_names are {len(class_names)}, data.label_values {len(label_values)} "
            f"{tuple(label_values)}; wanted a name for each value but 0"
        )


def builder_options(data: ConfigDict) -> dict:
    """What `open_prepared` needs besides the grid, of a complete config, as the builder has it."""
    if "frames" in data:  # ACDC
        return {"both_frames": data.frames != "end_diastolic"}
    if data.name != NAME:
        return {}
    return {
        "folder_name": Path(data.manual_dir).expanduser().resolve().name,
        "folder_digest": data.folder_digest,
        "label_values": tuple(data.label_values),
        "class_names": tuple(data.class_names),
        "slice_axis": data.slice_axis,
    }


def _summary(folder: Path, data: ConfigDict, surveys, num_masks, given, notes) -> str:
    masks = [s for s in surveys if s.voxels]
    in_plane = np.delete([s.spacing_mm for s in surveys], data.slice_axis, axis=1)
    through = [s.spacing_mm[data.slice_axis] for s in surveys]
    classes = ", ".join(
        f"{value} -> {c} {name} (in {sum(value in s.voxels for s in masks)})"
        for c, (value, name) in enumerate(
            zip(data.label_values, data.class_names, strict=True), start=1
        )
    )
    others = sorted({v for s in masks for v in s.voxels} - {0, *data.label_values})

    def line(key, value, why):
        return f"  data.{key} = {value}  ({'given' if given.get(key) else why})"

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
    if others:
        lines.append(f"  values {', '.join(map(str, others[:8]))} count as background")
    lost = [
        s.case_id
        for s in surveys
        for axis in {0, 1, 2} - {data.slice_axis}
        if 2 * s.reach_mm[axis] > data.image_size * data.target_spacing_mm + 1e-3
    ]
    if lost:
        lines.append(
            f"  WARNING: the grid cuts off foreground of {len(set(lost))} masks, {lost[0]} first; "
            "a larger data.image_size or data.target_spacing_mm covers them"
        )
    orientations = collections.Counter(s.orientation for s in surveys).most_common()
    if len(orientations) > 1:
        odd = next(s.case_id for s in surveys if s.orientation == orientations[1][0])
        told = ", ".join(f"{name} {n}" for name, n in orientations)
        lines.append(
            f"  WARNING: images lie differently in their files ({told}; {odd} first), so the "
            "network sees them turned; bring them into one orientation"
        )
    lines += [f"  {note}" for note in notes]
    return "\n".join(lines)
