"""Medical Segmentation Decathlon Task05: peripheral and transition zone of the prostate, T2 MR."""

import functools
from pathlib import Path

import tensorflow_datasets as tfds

from lclseg.data import nifti
from tfds_builders import slices
from tfds_builders.prostate import archive

CLASS_NAMES = ("PZ", "TZ")
CHANNEL = 0  # of the 4-D files: T2
TASK = "Task05_Prostate"
# Mirror and digest as MONAI's DecathlonDataset lists them.
ARCHIVE_URL = "https://msd-for-monai.s3-us-west-2.amazonaws.com/Task05_Prostate.tar"
ARCHIVE_MD5 = "35138f08b1efaef89d7424d2bcc928db"
WAY_OUT = (
    f"Download {TASK}.tar from medicaldecathlon.com (CC-BY-SA 4.0), unpack it, and give the folder "
    "as --config.data.manual_dir=PATH."
)


def find_cases(folder: Path) -> list[slices.Case]:
    """Finds the volumes that dataset.json lists; raises VolumeError on a folder unlike MSD's."""
    return slices.msd_cases(folder, task=TASK, way_out=WAY_OUT)


class Builder(tfds.core.GeneratorBasedBuilder):
    """Slices of MSD Task05 (prostate), T2 channel, downloaded or from `manual_dir` if one is given.

    The downloaded volumes stay in the folder `downloads` beside the prepared sets, so that another
    grid needs no second download.
    """

    VERSION = slices.VERSION
    RELEASE_NOTES = slices.RELEASE_NOTES

    _example_writer = slices.example_writer

    def _info(self) -> tfds.core.DatasetInfo:
        return slices.dataset_info(
            self,
            class_names=CLASS_NAMES,
            channel=CHANNEL,
            description="MSD Task05 prostate, T2 channel: peripheral (1) and transition zone (2).",
            homepage="http://medicaldecathlon.com",
        )

    def download_and_prepare(self, *, download_config=None, **kwargs) -> None:
        """Does as the base class, but heeds `download_config.manual_dir` without demanding one.

        TFDS lets a builder see its manual_dir only if the builder cannot do without.
        """
        self._manual_dir = download_config.manual_dir if download_config else None
        super().download_and_prepare(download_config=download_config, **kwargs)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        if self._manual_dir:
            folder = Path(self._manual_dir).expanduser()
        else:
            folder = Path(self.data_dir_root) / "downloads" / TASK
            try:
                archive.fetch_and_unpack(ARCHIVE_URL, folder, md5=ARCHIVE_MD5)
            except nifti.VolumeError as error:
                raise nifti.VolumeError(f"{error}. Or without it: {WAY_OUT}") from error
        return {slices.SPLIT: self._generate_examples(folder)}

    def _generate_examples(self, folder: Path):
        load = functools.partial(
            slices.load_nifti, num_classes=len(CLASS_NAMES) + 1, channel=CHANNEL
        )
        yield from slices.generate_examples(self, find_cases(folder), load)
