"""Which files of a folder are images, and which label belongs to which; no file is opened."""

import collections
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

# Compared in small letters.
SUFFIXES = (".nii.gz", ".nii", ".hdr", ".mha", ".mhd", ".nrrd", ".nhdr")
KNOWN = ".nii.gz, .nii, .hdr with .img, .mha, .mhd, .nrrd or .nhdr"
# Of other suffixes, those that hold images, and what brings them into one of ours.
FOREIGN = {
    ".dcm": "convert the series with dcm2niix",
    ".ima": "convert the series with dcm2niix",
    ".mgz": "convert them with mri_convert",
    ".mnc": "convert them with mnc2nii",
    **dict.fromkeys(
        (".npy", ".npz", ".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".h5", ".mat", ".gipl"),
        "store volumes with spacing and orientation, e.g. as .nii.gz with nibabel or SimpleITK",
    ),
}
CHANNEL = re.compile(r"(?P<case>.+)_(?P<number>\d{4})")
MAX_CHANNELS = 100


class Files(NamedTuple):
    """An image and its label.

    Attributes:
      case_id: what the case is called.
      image: of several channels the first.
      label: None for a case without one.
      others: the further channels, by number.
      is_test: it lies in imagesTs, with a label in labelsTs.
    """

    case_id: str
    image: Path
    label: Path | None
    others: tuple[Path, ...] = ()
    is_test: bool = False

    @property
    def images(self) -> tuple[Path, ...]:
        """All channels."""
        return (self.image, *self.others)

    @property
    def numbers(self) -> tuple[int, ...]:
        """Of the channels; () where there is one file."""
        return tuple(channel_number(p) for p in self.images) if self.others else ()

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files."""
        return self.images if self.label is None else (*self.images, self.label)


def find_files(folder: Path) -> list[Files]:
    """Finds the cases of a folder, by id.

    Layouts, the first that fits; NAME ends in any of `SUFFIXES`:
      images/NAME, labels/NAME
      imagesTr/NAME[_0000], labelsTr/NAME, and imagesTs, labelsTs likewise, the test set (Medical
        Segmentation Decathlon, nnU-Net)
      NAME, NAME_gt, here or in folders below (ACDC)

    NAME_0000, NAME_0001, ... of one folder are the channels of one case, but for those that have a
    label of that very name. Files whose name begins with a dot are not looked at. A case without a
    label file is unlabelled.
    """
    if (folder / "images").is_dir():
        return sorted(_pairs(folder / "images", folder / "labels"))
    if (folder / "imagesTr").is_dir():
        test = [
            f._replace(is_test=f.label is not None)
            for f in _pairs(folder / "imagesTs", folder / "labelsTs")
        ]
        return sorted([*_pairs(folder / "imagesTr", folder / "labelsTr"), *test])
    everything = [p for p in sorted(folder.rglob("*")) if is_volume(p) and _visible(p, folder)]
    beside = {p.parent / stem(p).removesuffix("_gt"): p for p in everything if is_label(p)}
    images = [p for p in everything if not is_label(p)]
    # ACDC has the whole cine loop beside the frames that are labelled.
    framed = {p.parent for p in images if "_frame" in stem(p)}
    images = [p for p in images if not (p.parent in framed and stem(p).endswith("_4d"))]
    by_folder = collections.defaultdict(list)
    for path in images:
        by_folder[path.parent].append(path)
    found = []
    for parent, paths in by_folder.items():
        labels = {key.name: p for key, p in beside.items() if key.parent == parent}
        found += group_channels(paths, labels)
    return sorted(found)


def _pairs(images: Path, labels: Path) -> list[Files]:
    return group_channels(volumes_of(images), {stem(p): p for p in volumes_of(labels)})


def group_channels(images: Sequence[Path], label_of: dict[str, Path]) -> list[Files]:
    """Groups the images of one folder into cases; see `find_files`.

    Args:
      images: files of one folder.
      label_of: labels by name without suffix.
    """
    own = {stem(p): p for p in images}
    first: dict[str, Path] = {}
    others = collections.defaultdict(list)
    for path in images:
        match = CHANNEL.fullmatch(stem(path))
        if match is None:
            continue
        name, number = match["case"], int(match["number"])
        if number == 0:
            first[name] = path
        elif number < MAX_CHANNELS and f"{name}_0000" in own and stem(path) not in label_of:
            others[name].append(path)
    further = {p for paths in others.values() for p in paths}
    found = []
    for path in images:
        if path in further:
            continue
        name = stem(path)
        case = name.removesuffix("_0000")
        channels = tuple(others[case]) if first.get(case) == path else ()
        found.append(Files(case, path, label_of.get(case) or label_of.get(name), channels))
    return found


def channel_number(path: Path) -> int:
    """Reads the number in the name of a channel's file; 0 without one."""
    match = CHANNEL.fullmatch(stem(path))
    return int(match["number"]) if match else 0


def unused(folder: Path, files: Sequence[Files]) -> dict[str, list[Path]]:
    """Finds what lies in a folder and is none of its cases' files, by what it is.

    Keys: "volumes" that are not read, and those in FOREIGN that look like images, by their suffix.
    Beside a layout with folders of images and labels, other folders count, too.
    """
    used = {p for f in files for p in f.paths}
    framed = {f.image.parent for f in files if "_frame" in f.case_id}
    found = collections.defaultdict(list)
    for path in sorted(folder.rglob("*")):
        if path in used or not _visible(path, folder) or "__MACOSX" in path.parts:
            continue
        if is_volume(path):
            if not (path.parent in framed and stem(path).endswith("_4d")):
                found["volumes"].append(path)
        elif path.suffix.lower() in FOREIGN and path.is_file():
            found[path.suffix.lower()].append(path)
    return dict(found)


def volumes_of(folder: Path) -> list[Path]:
    """Lists the volumes of a folder, not those in folders below; [] where there is no folder."""
    if not folder.is_dir():
        return []
    return [p for p in sorted(folder.iterdir()) if is_volume(p) and p.name[0] != "."]


def is_volume(path: Path) -> bool:
    """Tells whether the name is that of a volume."""
    return path.name.lower().endswith(SUFFIXES)


def _visible(path: Path, folder: Path) -> bool:
    return not any(part.startswith(".") for part in path.relative_to(folder).parts)


def stem(path: Path) -> str:
    """Takes the suffix, one of `SUFFIXES`, off a file's name."""
    suffix = next((s for s in SUFFIXES if path.name.lower().endswith(s)), "")
    return path.name[: len(path.name) - len(suffix)]


def is_label(path: Path) -> bool:
    """Tells whether the name is that of a label which lies beside its image."""
    return stem(path).endswith("_gt")
