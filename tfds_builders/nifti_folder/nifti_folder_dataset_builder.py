"""A folder of NIfTI images, some or all with a mask: your own data, no builder to write."""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

import tensorflow_datasets as tfds

from lclseg.data import nifti, own_data
from tfds_builders import slices


@dataclasses.dataclass(eq=False)
class FolderConfig(slices.GridConfig):
    """Grid, and what is learnt from the folder.

    Attributes:
      folder_digest: see `proposal.folder_digest`.
      label_values: of the foreground classes 1, 2, ...; other values of a mask are background.
      class_names: likewise.
      slice_axis: of the files.
    """

    folder_digest: str = ""
    label_values: tuple[int, ...] = ()
    class_names: tuple[str, ...] = ()
    slice_axis: int = 2


def grid_config(
    *,
    folder_name: str,
    folder_digest: str,
    label_values: Sequence[int],
    class_names: Sequence[str],
    slice_axis: int,
    **grid,
) -> FolderConfig:
    """A FolderConfig with the values of `slices.grid_config`, in a folder of its own.

    The name holds a digest of the files' names, sizes and times and of the other values: a folder
    that has changed, or another one, is another prepared set.
    """
    base = slices.grid_config(**grid)
    text = json.dumps([folder_digest, list(label_values), list(class_names), slice_axis])
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    folder_name = re.sub(r"[^A-Za-z0-9_-]+", "_", folder_name)[:40]
    return FolderConfig(
        name=f"{folder_name}_{digest}_{base.name}",
        image_size=base.image_size,
        target_spacing_mm=base.target_spacing_mm,
        n4_shrink_factor=base.n4_shrink_factor,
        folder_digest=folder_digest,
        label_values=tuple(label_values),
        class_names=tuple(class_names),
        slice_axis=slice_axis,
    )


def load(case: slices.Case, *, label_values: Sequence[int], slice_axis: int) -> nifti.Volume:
    """Reads a case, slices last; raises `volumes.VolumeError`."""
    volume = nifti.read_image(Path(case.image))
    if case.label is not None:
        path = Path(case.label)
        raw = own_data.whole_numbers(path, nifti.read_raw_label(path, volume, Path(case.image)))
        label, _ = nifti.map_label_values(raw, label_values)
        volume = volume._replace(label=label)
    return nifti.slices_last(volume, slice_axis)


class Builder(tfds.core.GeneratorBasedBuilder):
    """Slices of the volumes in `manual_dir`; made with a `FolderConfig`."""

    VERSION = tfds.core.Version("1.1.0")
    RELEASE_NOTES = {"1.1.0": "Records compressed as a whole.", "1.0.0": "First release."}
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
            slice_axis=config.slice_axis,
            description=f"Own volumes: {classes}.",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        return {slices.SPLIT: self._generate_examples(Path(dl_manager.manual_dir))}

    def _generate_examples(self, folder: Path):
        files = own_data.find_cases(folder)
        if own_data.folder_digest(folder, files) != self.builder_config.folder_digest:
            raise nifti.VolumeError(
                f"{folder}: files have changed since the run looked at them; start it again"
            )
        # A case counts as a patient.
        cases = [
            slices.Case(f.case_id, f.case_id, str(f.image), str(f.label) if f.label else None)
            for f in files
        ]
        load_case = functools.partial(
            load,
            label_values=self.builder_config.label_values,
            slice_axis=self.builder_config.slice_axis,
        )
        yield from slices.generate_examples(self, cases, load_case)
