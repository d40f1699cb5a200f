"""MM-WHS (Multi-Modality Whole Heart Segmentation) 2017, MR: seven structures of the heart."""

import logging
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from lclseg.data import nifti
from tfds_builders import slices

CLASS_NAMES = ("MYO", "LA", "LV", "RA", "RV", "AA", "PA")
# Of the classes 1..7, in the files, where 421 occurs too: it counts as background.
RAW_VALUES = (205, 420, 500, 550, 600, 820, 850)
logger = logging.getLogger("lclseg")


def find_cases(folder: Path) -> list[slices.Case]:
    """Finds the MR training volumes; raises VolumeError on a folder unlike MM-WHS's."""
    places = [folder, folder / "mr_train", folder / "MM-WHS 2017 Dataset" / "mr_train"]
    pattern = "mr_train_[0-9][0-9][0-9][0-9]_image.nii*"
    root = next((p for p in places if any(p.glob(pattern))), None)
    if root is None:
        raise nifti.VolumeError(
            f"no mr_train_NNNN_image.nii.gz in any of {', '.join(map(str, places))}. "
            f"{Builder.MANUAL_DOWNLOAD_INSTRUCTIONS}"
        )
    cases = []
    for image in sorted(root.glob(pattern)):
        number = image.name.split("_")[2]
        label = image.with_name(image.name.replace("_image", "_label"))
        cases.append(
            slices.Case(
                f"mr_train_{number}", number, str(image), str(label) if label.exists() else None
            )
        )
    return cases


def load(case: slices.Case) -> nifti.Volume:
    """Reads a case; raises `nifti.VolumeError`, too where a label shows no structure at all."""
    image = nifti.read_image(Path(case.image))
    if case.label is None:
        return image
    path = Path(case.label)
    raw = nifti.read_raw_label(path, image, Path(case.image))
    label, others = nifti.map_label_values(raw, RAW_VALUES)
    if not label.any():
        found = ", ".join(f"{v:g}" for v in np.unique(raw)[:8])
        raise nifti.VolumeError(
            f"{path}: found label values {found}; wanted some of {', '.join(map(str, RAW_VALUES))}"
        )
    if others:
        listed = ", ".join(f"{v:g} ({n} voxels)" for v, n in others.items())
        logger.warning("%s: unknown label values count as background: %s", path, listed)
    return image._replace(label=label)


class Builder(tfds.core.GeneratorBasedBuilder):
    """Axial slices of the MM-WHS MR training volumes, from `manual_dir`."""

    VERSION = slices.VERSION
    RELEASE_NOTES = slices.RELEASE_NOTES
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Register at zmiclab.github.io/zxh/0/mmwhs (research only), download the MR training data, "
        "unpack them, and give the folder that holds mr_train_1001_image.nii.gz, "
        "mr_train_1001_label.nii.gz, ... as --config.data.manual_dir=PATH."
    )

    _example_writer = slices.example_writer

    def _info(self) -> tfds.core.DatasetInfo:
        return slices.dataset_info(
            self,
            class_names=CLASS_NAMES,
            label_values=RAW_VALUES,
            others_are_background=True,
            description="MM-WHS MR: myocardium of the left ventricle (1), left atrium (2), left "
            "ventricle (3), right atrium (4), right ventricle (5), ascending aorta (6), pulmonary "
            "artery (7).",
            homepage="https://zmiclab.github.io/zxh/0/mmwhs",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        return {slices.SPLIT: self._generate_examples(Path(dl_manager.manual_dir))}

    def _generate_examples(self, folder: Path):
        yield from slices.generate_examples(self, find_cases(folder), load)
