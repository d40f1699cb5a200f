"""ACDC (Automated Cardiac Diagnosis Challenge): short-axis cine MR, RV, myocardium, LV."""

import dataclasses
import functools
import re
from pathlib import Path

import tensorflow_datasets as tfds

from lclseg.data import nifti
from tfds_builders import slices

CLASS_NAMES = ("RV", "MYO", "LV")
ORIENTATION = "LPS"  # as the files have it


@dataclasses.dataclass(eq=False)
class AcdcConfig(slices.GridConfig):
    """Grid, and which frames are prepared.

    Attributes:
      both_frames: the end-systolic frame too, not the end-diastolic one alone.
    """

    both_frames: bool = False


def grid_config(*, both_frames: bool = False, **grid) -> AcdcConfig:
    """Makes an AcdcConfig with the values of `slices.grid_config`, in a folder of its own."""
    base = dataclasses.asdict(slices.grid_config(**grid))
    base["name"] += "_both" if both_frames else ""
    return AcdcConfig(**base, both_frames=both_frames)


def find_cases(folder: Path, *, both_frames: bool = False) -> list[slices.Case]:
    """Finds each patient's end-diastolic frame; raises VolumeError on a folder unlike ACDC's.

    End diastole is the earlier of the two frames published as 3-D files: `_frame01`, but
    `_frame04` for patient090. The later one is end systole.

    Args:
      folder: that holds the patients' folders.
      both_frames: the end-systolic frame of every patient too, after the other.
    """
    places = [folder, folder / "training", folder / "database" / "training"]
    root = next((p for p in places if any(p.glob("patient[0-9][0-9][0-9]"))), None)
    if root is None:
        raise nifti.VolumeError(
            f"no patientNNN folder in any of {', '.join(map(str, places))}: wanted "
            "patientNNN/patientNNN_frameFF.nii.gz and ..._frameFF_gt.nii.gz. "
            f"{Builder.MANUAL_DOWNLOAD_INSTRUCTIONS}"
        )
    cases = []
    for patient in sorted(root.glob("patient[0-9][0-9][0-9]")):
        frames = sorted(
            f
            for f in patient.glob(f"{patient.name}_frame*.nii*")
            if re.fullmatch(rf"{patient.name}_frame\d+\.nii(\.gz)?", f.name)
        )
        if not frames:
            raise nifti.VolumeError(
                f"{patient}: no {patient.name}_frameFF.nii.gz in it; unpack the archive again"
            )
        for image in frames if both_frames else frames[:1]:
            volume_id = image.name.removesuffix(".gz").removesuffix(".nii")
            label = image.with_name(image.name.replace(volume_id, f"{volume_id}_gt"))
            mask = str(label) if label.exists() else None
            cases.append(slices.Case(volume_id, patient.name, str(image), mask))
    return cases


class Builder(tfds.core.GeneratorBasedBuilder):
    """Slices of the ACDC volumes, end-diastolic or both, from `manual_dir`."""

    VERSION = slices.VERSION
    RELEASE_NOTES = slices.RELEASE_NOTES
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Register at humanheart-project.creatis.insa-lyon.fr (non-commercial research), download "
        "the ACDC training set, unpack it, and give the folder that holds patient001, patient002, "
        "... as --config.data.manual_dir=PATH."
    )

    _example_writer = slices.example_writer

    def _info(self) -> tfds.core.DatasetInfo:
        return slices.dataset_info(
            self,
            class_names=CLASS_NAMES,
            orientation=ORIENTATION,
            description="ACDC, end-diastolic frames: right ventricle (1), myocardium (2), left "
            "ventricle (3).",
            homepage="https://humanheart-project.creatis.insa-lyon.fr/database",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        return {slices.SPLIT: self._generate_examples(Path(dl_manager.manual_dir))}

    def _generate_examples(self, folder: Path):
        load = functools.partial(slices.load_nifti, num_classes=len(CLASS_NAMES) + 1)
        cases = find_cases(folder, both_frames=self.builder_config.both_frames)
        yield from slices.generate_examples(self, cases, load)
