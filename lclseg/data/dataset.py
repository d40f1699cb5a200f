"""The prepared set: opening it (preparing it at need), its index, and reading slices from it."""

import contextlib
import dataclasses
import errno
import importlib
import io
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from lclseg.data import nifti
from lclseg.data.orientation import Orientation, from_numbers
from lclseg.data.preprocess import Preprocessing

logger = logging.getLogger("lclseg")
# No space left, quota used up, file too large.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class VolumeEntry(NamedTuple):
    """Index entry of a volume: its slices are records first_slice, first_slice + 1, ..."""

    volume_id: str
    patient_id: str
    has_label: bool
    first_slice: int
    class_pixels: np.ndarray  # [S, C] int, ground truth on the training grid

    @property
    def slices(self) -> range:
        return range(self.first_slice, self.first_slice + len(self.class_pixels))


class NativeVolume(NamedTuple):
    """A volume of its own spacing, its axes in the orientation of the set.

    Attributes:
      label: [X, Y, S] uint8, None without ground truth.
      shape, affine, spacing_mm: of these axes.
      orientation: how they lie in the file.
    """

    label: np.ndarray | None
    shape: tuple[int, int, int]
    affine: np.ndarray
    spacing_mm: tuple[float, float, float]
    orientation: Orientation


@dataclasses.dataclass(frozen=True)
class PreparedSet:
    """A prepared data set: index in memory, slices on disk, read at random.

    Attributes:
      name: of the data set.
      volumes: index by volume id, in stored order.
      source: random-access source of slices.
      preprocessing: how volumes became slices.
      description: one line on what the set holds.
    """

    name: str
    volumes: Mapping[str, VolumeEntry]
    source: Any
    preprocessing: Preprocessing
    description: str = ""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the foreground classes 1, 2, ..."""
        return self.preprocessing.class_names

    @property
    def num_classes(self) -> int:
        return len(self.class_names) + 1

    @property
    def image_size(self) -> int:
        """H = W."""
        return self.preprocessing.image_size

    @property
    def target_spacing_mm(self) -> float:
        """In-plane spacing of the slices."""
        return self.preprocessing.target_spacing_mm

    def read_slices(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Reads images [B, H, W] float32 and labels [B, H, W] uint8 of the given records.

        Images of several channels are [B, H, W, K].
        """
        records = self.source.__getitems__([int(i) for i in indices])
        return (
            np.stack([r["image"] for r in records]),
            np.stack([r["label"] for r in records]),
        )

    def slice_name(self, record: int) -> str:
        """Names volume and slice number of a record, e.g. "patient001_frame01, slice 3"."""
        entry = next(e for e in self.volumes.values() if record in e.slices)
        return f"{entry.volume_id}, slice {record - entry.first_slice}"

    def read_slice_spacing(self, volume_id: str) -> float:
        """Reads how far the slices of a volume lie apart, mm."""
        (record,) = self.source.__getitems__([self.volumes[volume_id].first_slice])
        return float(record["spacing_mm"][2])

    def read_native(self, volume_id: str) -> NativeVolume:
        """Reads native geometry and label of a volume."""
        entry = self.volumes[volume_id]
        records = self.source.__getitems__(list(entry.slices))
        label = np.stack([r["native_label"] for r in records], axis=-1)
        first = records[0]
        return NativeVolume(
            label=label if entry.has_label else None,
            shape=tuple(first["native_shape"].tolist()),
            affine=first["affine"],
            spacing_mm=tuple(first["spacing_mm"].tolist()),
            orientation=from_numbers(first["orientation"]),
        )


def open_prepared(
    name: str,
    *,
    image_size: int,
    target_spacing_mm: float,
    data_dir: str,
    manual_dir: str,
    n4_shrink_factor: int = 0,
    prepare: bool = True,
    options: Mapping[str, Any] | None = None,
) -> PreparedSet:
    """Opens `tfds_builders/<name>`, preparing it first if that was not done yet.

    Args:
      name: of the builder.
      image_size, target_spacing_mm: the training grid; each grid is prepared once.
      data_dir: where prepared sets live; "" means TFDS's own (TFDS_DATA_DIR or
        ~/tensorflow_datasets).
      manual_dir: folder with the downloaded volumes, for data sets that need one.
      n4_shrink_factor: of N4 bias-field correction, see `bias_field`; 0: none.
      prepare: False: a set that is not prepared yet is an error.
      options: what else the builder's `grid_config` takes, if it has one of its own.

    Raises:
      nifti.VolumeError: no such builder; data folder missing or unlike the published one; a
        broken file; not prepared, without `prepare`.
    """
    builder = open_builder(
        name,
        image_size=image_size,
        target_spacing_mm=target_spacing_mm,
        data_dir=data_dir,
        n4_shrink_factor=n4_shrink_factor,
        options=options,
    )
    if not builder.is_prepared():
        if not prepare:
            raise nifti.VolumeError(
                f"data set {name} is not prepared in {builder.data_dir}; training prepares it"
            )
        _prepare(builder, name, manual_dir)
    from tfds_builders import slices  # here: lclseg imports without the builders

    metadata = builder.info.metadata
    entries = [
        VolumeEntry(
            volume_id=v["volume_id"],
            patient_id=v["patient_id"],
            has_label=v["has_label"],
            first_slice=v["first_slice"],
            class_pixels=np.asarray(v["class_pixels"]),
        )
        for v in metadata["volumes"]
    ]
    return PreparedSet(
        name=name,
        volumes={e.volume_id: e for e in entries},
        source=builder.as_data_source(split=slices.SPLIT),
        preprocessing=preprocessing_of(builder),
        description=builder.info.description,
    )


def open_builder(
    name: str,
    *,
    image_size: int,
    target_spacing_mm: float,
    data_dir: str,
    n4_shrink_factor: int = 0,
    options: Mapping[str, Any] | None = None,
) -> tfds.core.DatasetBuilder:
    """Opens the builder of `tfds_builders/<name>`, its set prepared or not; see `open_prepared`."""
    module_name = f"tfds_builders.{name}.{name}_dataset_builder"
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise
        raise nifti.VolumeError(
            f"data.name is {name!r}, but there is no tfds_builders/{name}/{name}_dataset_builder.py"
        ) from None
    from tfds_builders import slices  # here: lclseg imports without the builders

    config = getattr(module, "grid_config", slices.grid_config)(
        image_size=image_size,
        target_spacing_mm=target_spacing_mm,
        n4_shrink_factor=n4_shrink_factor,
        **(options or {}),
    )
    return module.Builder(config=config, data_dir=data_dir or None, file_format="array_record")


def preprocessing_of(builder: tfds.core.DatasetBuilder) -> Preprocessing:
    """Tells how the volumes of a builder become slices, whether or not they have done so yet."""
    metadata = builder.info.metadata
    config = builder.builder_config
    return Preprocessing(
        class_names=tuple(metadata["class_names"]),
        label_values=tuple(metadata["label_values"]),
        others_are_background=metadata["others_are_background"],
        image_size=config.image_size,
        target_spacing_mm=config.target_spacing_mm,
        n4_shrink_factor=config.n4_shrink_factor,
        channel=metadata["channel"],
        orientation=metadata["orientation"],
        channels=tuple(metadata["channels"]),
        windows=tuple(w and (w[0], w[1]) for w in metadata["windows"]),
        ignore_value=metadata["ignore_value"],
        **_seen(metadata["volumes"]),
    )


def _seen(volumes: Sequence[Mapping[str, Any]]) -> dict[str, tuple]:
    """What the prepared volumes are like; see `Preprocessing`; nothing before they are prepared."""
    if not volumes:
        return {}
    spacings = np.array([v["spacing_mm"] for v in volumes])
    medians = [v["median"] for v in volumes]
    ranges = zip(spacings.min(axis=0).tolist(), spacings.max(axis=0).tolist(), strict=True)
    return {"seen_spacing_mm": tuple(ranges), "seen_median": (min(medians), max(medians))}


def _prepare(builder: tfds.core.DatasetBuilder, name: str, manual_dir: str) -> None:
    instructions = builder.MANUAL_DOWNLOAD_INSTRUCTIONS
    if instructions:
        if not manual_dir:
            raise nifti.VolumeError(
                f"data set {name} is not prepared in {builder.data_dir}, and data.manual_dir is "
                f"not set. {instructions}"
            )
        folder = Path(manual_dir).expanduser()
        manual_dir = str(folder)
        if not folder.is_dir():
            raise nifti.VolumeError(f"data.manual_dir: no folder {folder}. {instructions}")
        if not any(folder.iterdir()):
            raise nifti.VolumeError(f"data.manual_dir: {folder} is empty. {instructions}")
    logger.info("preparing data set %s in %s", name, builder.data_dir)
    tfds.disable_progress_bar()  # the builders show their own, by volume
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS tells of a download that there is not
        try:
            builder.download_and_prepare(
                download_config=tfds.download.DownloadConfig(manual_dir=manual_dir or None)
            )
        except Exception as error:
            number = _disk_error(error)
            if number is None:
                raise
            raise OSError(number, os.strerror(number), str(builder.data_dir)) from None


def _disk_error(error: BaseException | None) -> int | None:
    """The number of the disk's error behind any of those that writing a set raises."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            return error.errno
        for number in DISK_ERRORS:  # the record writer's own errors have no number
            if os.strerror(number) in str(error):
                return number
        error = error.__cause__ or error.__context__
    return None
