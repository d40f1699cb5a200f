"""The cases of a folder of one's own: which files belong together, and what is wrong with them."""

import collections
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from lclseg.data import layouts
from lclseg.data.layouts import FOREIGN, KNOWN, Files, channel_number, find_files, stem
from lclseg.data.nifti import VolumeError
from lclseg.data.survey import NAMED

NAME = "nifti_folder"  # of the builder
DIGEST_VERSION = 2  # rises when the same files are prepared otherwise
WANTED = "wanted images/ and labels/ with equal names, or imagesTr/ and labelsTr/ (nnU-Net)"


def find_cases(folder: Path, exclude: Sequence[str] = ()) -> list[Files]:
    """Finds the cases of a folder, by id.

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
    """Warns of what lies in the folder and is not read, a line each."""
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
    """Digests names, sizes and modification times of the files that are read; hexadecimal."""
    paths = [p for f in files for p in f.paths]
    paths += [p.with_suffix(".img") for p in paths if p.suffix.lower() == ".hdr"]
    paths.append(folder / "dataset.json")
    stats = [(str(p.relative_to(folder)), p.stat()) for p in sorted(paths) if p.is_file()]
    text = json.dumps([DIGEST_VERSION, *((n, s.st_size, s.st_mtime_ns) for n, s in stats)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def channels_used(files: Sequence[Files], chosen: Sequence[int]) -> tuple[int, ...]:
    """Chooses the channels to use; () where a case is one file and nothing was chosen."""
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
