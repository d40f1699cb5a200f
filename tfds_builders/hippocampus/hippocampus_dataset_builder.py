"""Medical Segmentation Decathlon Task04: anterior and posterior hippocampus in T1 MR."""

import functools
from pathlib import Path

import tensorflow_datasets as tfds

from tfds_builders import slices

CLASS_NAMES = ("anterior", "posterior")


def find_cases(folder: Path) -> list[slices.Case]:
    """Finds the volumes that dataset.json lists; raises VolumeError on a folder unlike MSD's."""
    return slices.msd_cases(
        folder, task="Task04_Hippocampus", way_out=Builder.MANUAL_DOWNLOAD_INSTRUCTIONS
    )


class Builder(tfds.core.GeneratorBasedBuilder):
    """Slices of MSD Task04 (hippocampus), from `manual_dir`."""

    VERSION = slices.VERSION
    RELEASE_NOTES = slices.RELEASE_NOTES
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Download Task04_Hippocampus.tar from medicaldecathlon.com (CC-BY-SA 4.0), unpack it, and "
        "give the folder as --config.data.manual_dir=PATH."
    )

    _example_writer = slices.example_writer

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
