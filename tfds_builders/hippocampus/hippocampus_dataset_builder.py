"""Medical Segmentation Decathlon Task04: anterior and posterior hippocampus in T1 MR."""

import functools
import json
from pathlib import Path

import tensorflow_datasets as tfds

from lclseg import volumes
from tfds_builders import slices

CLASS_NAMES = ("anterior", "posterior")


def find_cases(folder: Path) -> list[slices.Case]:
    """The training volumes that dataset.json lists; raises VolumeError on a folder unlike MSD's."""
    if not (folder / "dataset.json").is_file() and (folder / "Task04_Hippocampus").is_dir():
        folder = folder / "Task04_Hippocampus"
    listing = folder / "dataset.json"
    if not listing.is_file():
        raise volumes.VolumeError(
            f"no {listing}: wanted the unpacked Task04_Hippocampus folder with dataset.json, "
            f"imagesTr and labelsTr. {Builder.MANUAL_DOWNLOAD_INSTRUCTIONS}"
        )
    try:
        entries = json.loads(listing.read_text())["training"]
        pairs = [(folder / e["image"], folder / e["label"]) for e in entries]
    except (ValueError, KeyError, TypeError) as error:
        raise volumes.VolumeError(
            f"{listing}: not an MSD listing ({type(error).__name__}: {error}); wanted "
            '{"training": [{"image": ..., "label": ...}, ...]}'
        ) from error
    cases = []
    for image, label in pairs:
        volume_id = image.name.removesuffix(".gz").removesuffix(".nii")
        cases.append(slices.Case(volume_id, volume_id, str(image), str(label)))
    return cases


class Builder(tfds.core.GeneratorBasedBuilder):
    """Slices of MSD Task04 (hippocampus), from `manual_dir`."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Download Task04_Hippocampus.tar from medicaldecathlon.com (CC-BY-SA 4.0), unpack it, and "
        "give the folder as --config.data.manual_dir=PATH."
    )

    def _info(self) -> tfds.core.DatasetInfo:
        return slices.dataset_info(
            self,
            class_names=CLASS_NAMES,
            description="MSD Task04 hippocampus: T1 MR, anterior (1) and posterior (2) part.",
            homepage="http://medicaldecathlon.com",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        return {slices.SPLIT: self._generate_examples(Path(dl_manager.manual_dir))}

    def _generate_examples(self, folder: Path):
        load = functools.partial(slices.load_nifti, num_classes=len(CLASS_NAMES) + 1)
        yield from slices.generate_examples(self, find_cases(folder), load)
