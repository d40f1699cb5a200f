"""Synthetic short-axis cardiac MR, generated on the spot: for demonstrations and tests only."""

import numpy as np
import tensorflow_datasets as tfds

from lclseg.data import nifti
from tfds_builders import slices
from tfds_builders.phantom import synthesis

CLASS_NAMES = ("RV", "MYO", "LV")
NUM_VOLUMES = 64


def load(case: slices.Case) -> nifti.Volume:
    """Generates the volume whose index is in `case.image`."""
    phantom = synthesis.make_volume(int(case.image))
    affine = np.diag([*phantom.spacing_mm, 1.0])
    return nifti.Volume(phantom.image, phantom.label, affine, phantom.spacing_mm)


def find_cases(num_volumes: int = NUM_VOLUMES) -> list[slices.Case]:
    """Makes one case per synthetic subject: phantom_000, phantom_001, ..."""
    ids = [f"phantom_{i:03d}" for i in range(num_volumes)]
    return [slices.Case(name, name, str(i), str(i)) for i, name in enumerate(ids)]


class Builder(tfds.core.GeneratorBasedBuilder):
    """Slices of SYNTHETIC cardiac volumes; no patient was scanned, nothing is downloaded."""

    VERSION = slices.VERSION
    RELEASE_NOTES = slices.RELEASE_NOTES

    _example_writer = slices.example_writer

    def _info(self) -> tfds.core.DatasetInfo:
        return slices.dataset_info(
            self,
            class_names=CLASS_NAMES,
            description="SYNTHETIC short-axis cardiac MR: RV (1), myocardium (2), LV (3).",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        return {slices.SPLIT: self._generate_examples()}

    def _generate_examples(self):
        yield from slices.generate_examples(self, find_cases(), load)
