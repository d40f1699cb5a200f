"""Own data: what a config leaves open is proposed from the folder, and who plays which role drawn.

Roles are drawn first, by the names of the cases (`roles.py`). What follows looks at the headers of
all images, and at the masks that training may see, labelled and validation ones: no choice knows
test masks. What is proposed is in `proposals.py`, what is wrong with masks in `mask_checks.py`.
Axes are those of the patient: 0 from left to right, 1 from back to front, 2 from feet to head.
"""

import collections
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from lclseg.data import orientation
from lclseg.data.case_files import NAME, channels_used, find_cases, folder_digest, left_out
from lclseg.data.dataset_json import listed_names
from lclseg.data.mask_checks import check_classes, check_masks, check_pool, largest_component
from lclseg.data.nifti import VolumeError
from lclseg.data.proposals import (
    propose_class_names,
    propose_image_size,
    propose_label_values,
    propose_slice_axis,
    propose_spacing_mm,
    propose_windows,
)
from lclseg.data.roles import draw_roles, patient_of_case
from lclseg.data.splits import PROPOSED, ROLES
from lclseg.data.survey import Survey, odd_headers, survey

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


def complete(config: ConfigDict) -> tuple[ConfigDict, str]:
    """Fills in what a config of own data leaves open; other configs stay as they are.

    Args:
      config: what `OPEN` has is filled in.

    Returns:
      The whole config, and what was proposed, as text of several lines, the warnings last; "" for
      other configs.

    Raises:
      VolumeError, SplitError: files, masks or roles do not do; see `find_cases`, `draw_roles` and
        the functions of `proposals.py` and `mask_checks.py`.
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
    data.channels = channels_used(files, data.channels)
    data.folder_digest = folder_digest(folder, files)
    warnings = left_out(folder, files, data.exclude)

    # Who plays which role is settled before any mask is opened.
    patient = patient_of_case(data, files)
    rounds = config.get("rounds")
    lists, notes = draw_roles(folder, data, files, rounds.start_from if rounds else "")
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
        check_pool(data, turned, patient)
    learnt = [s for s in surveys if s.voxels and patient[s.case_id] in data.labeled]
    if not data.windows:
        labeled = [s.files for s in learnt]
        data.windows = propose_windows(folder, data.channels, labeled, data.label_values)
    notes = [n for n in notes if not n.startswith("WARNING: ")]
    choice = config.predictions.largest_component if "predictions" in config else "by_masks"
    notes.append(largest_component(choice, data, learnt))
    return config, _summary(folder, data, surveys, turned, given, notes, warnings)


def builder_options(data: ConfigDict) -> dict:
    """Takes what `open_prepared` needs besides the grid from a complete config of own data."""
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
    """Finds the warnings in what `complete` told."""
    return re.findall(r"^  WARNING: (.*)$", text, re.MULTILINE)
