"""Which files of a folder are images, and which label belongs to which; no file is opened."""

from pathlib import Path
from typing import NamedTuple

SUFFIXES = (".nii.gz", ".nii")


class Files(NamedTuple):
    """An image and its label; `label` is None for a case without one."""

    case_id: str
    image: Path
    label: Path | None


def find_files(folder: Path) -> list[Files]:
    """The cases of a folder, by id.

    Layouts, the first that fits:
      images/NAME.nii.gz, labels/NAME.nii.gz
      imagesTr/NAME[_0000].nii.gz, labelsTr/NAME.nii.gz, imagesTs/NAME[_0000].nii.gz (Medical
        Segmentation Decathlon, nnU-Net)
      NAME.nii.gz, NAME_gt.nii.gz, here or in folders below (ACDC)

    Files whose name begins with a dot are not looked at. A case without a label file is unlabelled.
    """
    for images, labels in (("images", "labels"), ("imagesTr", "labelsTr")):
        if (folder / images).is_dir():
            label_of = {stem(p): p for p in niftis(folder / labels)}
            found = [
                Files(_case_id(p), p, label_of.get(_case_id(p)))
                for part in (images, "imagesTs" if images == "imagesTr" else None)
                if part
                for p in niftis(folder / part)
            ]
            return sorted(found)
    everything = [
        p for p in sorted(folder.rglob("*")) if p.name.endswith(SUFFIXES) and _visible(p, folder)
    ]
    beside = {p.parent / stem(p).removesuffix("_gt"): p for p in everything if is_label(p)}
    return sorted(
        Files(stem(p), p, beside.get(p.parent / stem(p))) for p in everything if not is_label(p)
    )


def niftis(folder: Path) -> list[Path]:
    """The NIfTI files of a folder, not those in folders below; [] where there is no folder."""
    if not folder.is_dir():
        return []
    return [p for p in sorted(folder.iterdir()) if p.name.endswith(SUFFIXES) and p.name[0] != "."]


def _visible(path: Path, folder: Path) -> bool:
    return not any(part.startswith(".") for part in path.relative_to(folder).parts)


def stem(path: Path) -> str:
    """The file's name without .nii or .nii.gz."""
    return path.name.removesuffix(".gz").removesuffix(".nii")


def _case_id(image: Path) -> str:
    return stem(image).removesuffix("_0000")


def is_label(path: Path) -> bool:
    """Whether the name is that of a label which lies beside its image."""
    return stem(path).endswith("_gt")
