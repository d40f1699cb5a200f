"""A folder of NIfTI images, some or all with a mask: your own data, no builder to write."""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

import tensorflow_datasets as tfds

from lclseg.data import case_files, nifti, preprocess
from lclseg.data.dataset import preprocessing_of
from lclseg.data.layouts import Files
from lclseg.data.patients import patients_of
from lclseg.data.preprocess import Preprocessing
from tfds_builders import slices


@dataclasses.dataclass(eq=False)
class FolderConfig(slices.GridConfig):
    """Grid, and what is learnt from the folder.

    Attributes:
      folder_digest: see `case_files.folder_digest`.
      label_values: of the foreground classes 1, 2, ...; other values of a mask are background.
      class_names: likewise.
      orientation: of the volumes, their slices last; see `lclseg.data.orientation`.
      ignore_value, channels, windows: see `preprocess.Preprocessing`.
      exclude: ids of the cases that are left out.
      patients_by_name: whether a patient's scans are told by their names.
    """

    folder_digest: str = ""
    label_values: tuple[int, ...] = ()
    class_names: tuple[str, ...] = ()
    orientation: str = "RAS"
    ignore_value: int | None = None
    channels: tuple[int, ...] = ()
    windows: tuple[tuple[float, float] | None, ...] = ()
    exclude: tuple[str, ...] = ()
    patients_by_name: bool = True


def grid_config(
    *, image_size: int, target_spacing_mm: float, n4_shrink_factor: int = 0, folder_name: str, **own
) -> FolderConfig:
    """Makes a FolderConfig of a grid and its other attributes, `own`, in a folder of its own.

    The name holds a digest of the files' names, sizes and times and of the other values: a folder
    that has changed, or another one, is another prepared set.
    """
    base = slices.grid_config(
        image_size=image_size,
        target_spacing_mm=target_spacing_mm,
        n4_shrink_factor=n4_shrink_factor,
    )
    digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:12]
    folder_name = re.sub(r"[^A-Za-z0-9_-]+", "_", folder_name)[:40]
    return FolderConfig(
        name=f"{folder_name}_{digest}_{base.name}",
        image_size=base.image_size,
        target_spacing_mm=base.target_spacing_mm,
        n4_shrink_factor=base.n4_shrink_factor,
        **own,
    )


def load(case: slices.Case, *, files: Mapping[str, Files], how: Preprocessing) -> nifti.Volume:
    """Reads a case; raises `nifti.VolumeError`."""
    volume, _ = preprocess.read_case(files[case.volume_id], how)
    return volume


class Builder(tfds.core.GeneratorBasedBuilder):
    """Slices of the volumes in `manual_dir`; made with a `FolderConfig`."""

    VERSION = slices.VERSION
    RELEASE_NOTES = slices.RELEASE_NOTES
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Give the folder that holds images/ and labels/ with equal names, or imagesTr/, labelsTr/ "
        "and dataset.json (nnU-Net, Medical Segmentation Decathlon), as "
        "--config.data.manual_dir=PATH."
    )

    _example_writer = slices.example_writer

    def _info(self) -> tfds.core.DatasetInfo:
        config = self.builder_config
        classes = ", ".join(f"{name} ({c})" for c, name in enumerate(config.class_names, start=1))
        return slices.dataset_info(
            self,
            class_names=config.class_names,
            label_values=config.label_values,
            others_are_background=True,
            orientation=config.orientation,
            ignore_value=config.ignore_value,
            channels=config.channels,
            windows=config.windows,
            description=f"Own volumes: {classes}.",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        return {slices.SPLIT: self._generate_examples(Path(dl_manager.manual_dir))}

    def _generate_examples(self, folder: Path):
        config = self.builder_config
        files = case_files.find_cases(folder, config.exclude)
        if case_files.folder_digest(folder, files) != config.folder_digest:
            raise nifti.VolumeError(
                f"{folder}: files have changed since the run looked at them; start it again"
            )
        ids = [f.case_id for f in files]
        patient = patients_of(ids) if config.patients_by_name else {i: i for i in ids}
        cases = [
            slices.Case(
                f.case_id, patient[f.case_id], str(f.image), str(f.label) if f.label else None
            )
            for f in files
        ]
        how = preprocessing_of(self)
        load_case = functools.partial(load, files={f.case_id: f for f in files}, how=how)
        yield from slices.generate_examples(self, cases, load_case)
