"""MM-WHS (Multi-Modality Whole Heart Segmentation) 2017, MR: seven structures of the heart."""

import logging
import re
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from lclseg import volumes
from tfds_builders import slices

CLASS_NAMES = ("MYO", "LA", "LV", "RA", "RV", "AA", "PA")
RAW_VALUES = (205, 420, 500, 550, 600, 820, 850)  # of the classes 1..7, in the files
logger = logging.getLogger("lclseg")


def find_cases(folder: Path) -> list[slices.Case]:
    """The MR training volumes; raises VolumeError on a folder unlike MM-WHS's."""
    places = [folder, folder / "mr_train", folder / "MM-WHS 2017 Dataset" / "mr_train"]
    pattern = "mr_train_[0-9][0-9][0-9][0-9]_image.nii*"
    root = next((p for p in places if any(p.glob(pattern))), None)
    if root is None:
        raise volumes.VolumeError(
            f"no mr_train_NNNN_image.nii.gz in any of {', '.join(map(str, places))}. "
            f"{Builder.MANUAL_DOWNLOAD_INSTRUCTIONS}"
        )
    cases = []
    for image in sorted(root.glob(pattern)):
        number = re.match(r"mr_train_(\d{4})_", image.name)[1]
        label = image.with_name(image.name.replace("_image", "_label"))
        cases.append(
            slices.Case(
                f"mr_train_{number}", number, str(image), str(label) if label.exists() else None
            )
        )
    return cases


def map_label(raw: np.ndarray, *, path: Path) -> np.ndarray:
    """Classes 0..7 of a label map as published, uint8; other values become background.

    These are logged, with their number of voxels (421 occurs in the published files).

    Raises:
      VolumeError: none of the seven values occurs.
    """
    values, counts = np.unique(raw, return_counts=True)
    if not np.isin(values, RAW_VALUES).any():
        raise volumes.VolumeError(
            f"{path}: found label values {', '.join(f'{v:g}' for v in values[:8])}; wanted those "
            f"of MM-WHS, {', '.join(map(str, RAW_VALUES))}"
        )
    odd = ~np.isin(values, (0, *RAW_VALUES))
    if odd.any():
        # From a worker process, where an unconfigured logger writes warnings to stderr.
        logger.warning(
            "%s: label values that MM-WHS does not define count as background: %s",
            path,
            ", ".join(f"{v:g} ({n} voxels)" for v, n in zip(values[odd], counts[odd], strict=True)),
        )
    label = np.zeros(raw.shape, np.uint8)
    for c, value in enumerate(RAW_VALUES, start=1):
        label[raw == value] = c
    return label


def load(case: slices.Case) -> volumes.Volume:
    """Reads a case; raises `volumes.VolumeError`."""
    image = volumes.read_image(Path(case.image))
    if case.label is None:
        return image
    path = Path(case.label)
    raw = volumes.read_raw_label(path, image, Path(case.image))
    return image._replace(label=map_label(raw, path=path))


class Builder(tfds.core.GeneratorBasedBuilder):
    """Slices (third axis of the files) of the MM-WHS MR training volumes, from `manual_dir`."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Register at zmiclab.github.io/zxh/0/mmwhs (research only), download the MR training data, "
        "unpack them, and give the folder that holds mr_train_1001_image.nii.gz, "
        "mr_train_1001_label.nii.gz, ... as --config.data.manual_dir=PATH."
    )

    def _info(self) -> tfds.core.DatasetInfo:
        return slices.dataset_info(
            self,
            class_names=CLASS_NAMES,
            label_values=(0, *RAW_VALUES),
            description="MM-WHS MR: myocardium of the left ventricle (1), left atrium (2), left "
            "ventricle (3), right atrium (4), right ventricle (5), ascending aorta (6), pulmonary "
            "artery (7).",
            homepage="https://zmiclab.github.io/zxh/0/mmwhs",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        return {slices.SPLIT: self._generate_examples(Path(dl_manager.manual_dir))}

    def _generate_examples(self, folder: Path):
        yield from slices.generate_examples(self, find_cases(folder), load)
