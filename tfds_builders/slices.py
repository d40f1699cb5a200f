"""What the builders share: features of a slice, and volumes -> slices on all cores.

A builder says where its files are, which volumes exist and which labels mean what; here the volumes
become preprocessed slices. Every slice carries its volume's identity and native geometry, native
label included, so that training and evaluation need the prepared set only.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tqdm import tqdm

from lclseg.cores import usable_cores
from lclseg.data import grid, nifti, orientation, preprocess
from lclseg.run import progress

# Of every prepared set: another one is prepared anew.
VERSION = tfds.core.Version("1.3.0")
RELEASE_NOTES = {
    "1.3.0": "Middle pixels of volume and grid coincide: labels lie where the image is.",
    "1.2.0": "Volumes in one orientation; intensities held within a range.",
    "1.1.0": "Records compressed as a whole.",
    "1.0.0": "First release.",
}
# One split: roles (labelled, unlabelled, validation, test) are chosen by patient in the config.
SPLIT = "slices"


class Case(NamedTuple):
    """One volume to prepare.

    Attributes:
      volume_id: unique name, e.g. patient001_frame01.
      patient_id: what the lists in the configs name; splits are by patient.
      image: path of the image (or whatever the builder's `load` understands).
      label: path of the label, or None for a volume without ground truth.
    """

    volume_id: str
    patient_id: str
    image: str
    label: str | None


@dataclasses.dataclass(eq=False)
class GridConfig(tfds.core.BuilderConfig):
    """The options that change bytes on disk.

    Attributes:
      image_size: H = W of the training grid.
      target_spacing_mm: its in-plane spacing.
      n4_shrink_factor: of N4 bias-field correction; 0: none.
    """

    image_size: int = 192
    target_spacing_mm: float = 1.0
    n4_shrink_factor: int = 0


def grid_config(
    *, image_size: int, target_spacing_mm: float, n4_shrink_factor: int = 0
) -> GridConfig:
    """Makes a GridConfig whose name tells its values, so that each has a folder of its own."""
    n4 = f"_n4x{n4_shrink_factor}" if n4_shrink_factor else ""
    return GridConfig(
        name=f"{image_size}px_{target_spacing_mm:g}mm{n4}",
        image_size=image_size,
        target_spacing_mm=target_spacing_mm,
        n4_shrink_factor=n4_shrink_factor,
    )


def dataset_info(
    builder: tfds.core.DatasetBuilder,
    *,
    class_names: Sequence[str],
    description: str,
    label_values: Sequence[int] | None = None,
    others_are_background: bool = False,
    channel: int | None = None,
    orientation: str = "RAS",
    channels: Sequence[int] = (),
    windows: Sequence[tuple[float, float] | None] = (),
    ignore_value: int | None = None,
    **kwargs,
) -> tfds.core.DatasetInfo:
    """Makes the DatasetInfo of a slice data set.

    Args:
      class_names: of the foreground, labels 1, 2, ...
      label_values: which the data set's own label files have for them, and predictions shall have;
        None: 1, 2, ...
      others_are_background: whether these may have other values, too.
      channel: of 4-D files, which one is the image; None: files are 3-D.
      orientation: which `generate_examples` brings the volumes into; see `lclseg.data.orientation`.
      channels, windows, ignore_value: see `preprocess.Preprocessing`.
    """
    size = builder.builder_config.image_size
    image_shape = (size, size, len(channels)) if len(channels) > 1 else (size, size)
    tensor = tfds.features.Tensor
    # Not compressed one by one: `SliceWriter` does that for the record as a whole.
    pixels = functools.partial(tensor, encoding=tfds.features.Encoding.BYTES)
    features = {
        "volume_id": tfds.features.Text(),
        "patient_id": tfds.features.Text(),
        "slice_index": np.int32,
        "num_slices": np.int32,
        "has_label": np.bool_,
        "image": pixels(shape=image_shape, dtype=np.float32),
        "label": pixels(shape=(size, size), dtype=np.uint8),
        "native_label": pixels(shape=(None, None), dtype=np.uint8),
        "native_shape": tensor(shape=(3,), dtype=np.int32),
        "spacing_mm": tensor(shape=(3,), dtype=np.float64),
        "affine": tensor(shape=(4, 4), dtype=np.float64),
        "orientation": tensor(shape=(3,), dtype=np.int32),
    }
    return tfds.core.DatasetInfo(
        builder=builder,
        description=description,
        features=tfds.features.FeaturesDict(features),
        # `volumes`, filled by `generate_examples`, is the index of the set: it is read whole at
        # start-up, so that no slice needs to be.
        metadata=tfds.core.MetadataDict(
            class_names=list(class_names),
            label_values=list(label_values or range(1, len(class_names) + 1)),
            others_are_background=others_are_background,
            channel=channel,
            orientation=orientation,
            channels=list(channels),
            windows=[w and list(w) for w in windows],
            ignore_value=ignore_value,
            volumes=[],
        ),
        disable_shuffling=True,  # slices of a volume stay together and in order
        **kwargs,
    )


class SliceWriter(tfds.core.ExampleWriter):
    """Writes ArrayRecord files of records that are read one by one, compressed with Snappy.

    TFDS's own writer takes Zstandard: a seventh less space, but seven to nine times as long to
    write, and up to half again as long to read.
    """

    def write(self, path: os.PathLike, examples: Iterable[tuple[Any, bytes]]) -> None:
        writer = ArrayRecordWriter(os.fspath(path), "group_size:1,snappy")
        for _, record in examples:
            writer.write(record)
        writer.close()


def example_writer(builder: tfds.core.GeneratorBasedBuilder) -> tfds.core.ExampleWriter:
    """Stands in for the builders' `_example_writer`, the method that TFDS has for this."""
    file_format = builder.info.file_format
    is_array_record = file_format is tfds.core.FileFormat.ARRAY_RECORD
    return (SliceWriter if is_array_record else tfds.core.ExampleWriter)(file_format)


def msd_cases(folder: Path, *, task: str, way_out: str) -> list[Case]:
    """Finds the training volumes that dataset.json of a Medical Segmentation Decathlon task lists.

    Args:
      folder: holds dataset.json, or a folder named `task` that does.
      task: name of the unpacked archive, e.g. Task05_Prostate.
      way_out: ends the message where there is no such listing.

    Raises:
      nifti.VolumeError: no dataset.json, or one unlike the Decathlon's or without a volume.
    """
    if not (folder / "dataset.json").is_file() and (folder / task).is_dir():
        folder = folder / task
    listing = folder / "dataset.json"
    if not listing.is_file():
        raise nifti.VolumeError(
            f"no {listing}: wanted the unpacked {task} folder with dataset.json, imagesTr and "
            f"labelsTr. {way_out}"
        )
    try:
        entries = json.loads(listing.read_text(encoding="utf-8-sig"))["training"]
        pairs = [(folder / e["image"], folder / e["label"]) for e in entries]
    except (ValueError, KeyError, TypeError) as error:
        raise nifti.VolumeError(
            f"{listing}: not an MSD listing ({type(error).__name__}: {error}); wanted "
            '{"training": [{"image": ..., "label": ...}, ...]}'
        ) from error
    if not pairs:
        raise nifti.VolumeError(f"{listing}: lists no training volume; wanted at least one")
    cases = []
    for image, label in pairs:
        volume_id = image.name.removesuffix(".gz").removesuffix(".nii")
        cases.append(Case(volume_id, volume_id, str(image), str(label)))
    return cases


def load_nifti(case: Case, *, num_classes: int, channel: int | None = None) -> nifti.Volume:
    """Reads a case whose image and label are NIfTI paths; raises `nifti.VolumeError`.

    `channel` is the one to take from a 4-D image; None: the image is 3-D.
    """
    image = nifti.read_image(Path(case.image), channel=channel)
    if case.label is None:
        return image
    label = nifti.read_label(Path(case.label), image, Path(case.image), num_classes=num_classes)
    return image._replace(label=label)


def _prepare(
    case: Case,
    *,
    load: Callable[[Case], nifti.Volume],
    image_size: int,
    target_spacing_mm: float,
    n4_shrink_factor: int,
    wanted: str,
    windows: Sequence[tuple[float, float] | None],
) -> tuple[list[dict], float]:
    """Slices of one case, in order along the last axis, and its `grid.relative_median`."""
    volume = nifti.oriented(load(case), wanted)
    shape = volume.image.shape[:3]
    on_grid: dict[str, Any] = {"image_size": image_size, "target_spacing_mm": target_spacing_mm}
    image = preprocess.to_slices(
        volume.image,
        volume.spacing_mm,
        n4_shrink_factor=n4_shrink_factor,
        windows=windows,
        **on_grid,
    )
    has_label = volume.label is not None
    native_label = np.zeros(shape, np.uint8) if volume.label is None else volume.label
    label = grid.label_to_grid(native_label, volume.spacing_mm, **on_grid)
    first = volume.image if volume.image.ndim == 3 else volume.image[..., 0]
    examples = [
        {
            "volume_id": case.volume_id,
            "patient_id": case.patient_id,
            "slice_index": s,
            "num_slices": len(image),
            "has_label": has_label,
            "image": image[s],
            "label": label[s],
            "native_label": native_label[..., s],
            "native_shape": np.asarray(shape, np.int32),
            "spacing_mm": np.asarray(volume.spacing_mm, np.float64),
            "affine": np.asarray(volume.affine, np.float64),
            "orientation": np.asarray(orientation.to_numbers(volume.orientation), np.int32),
        }
        for s in range(len(image))
    ]
    return examples, grid.relative_median(first)


def generate_examples(
    builder: tfds.core.DatasetBuilder,
    cases: Sequence[Case],
    load: Callable[[Case], nifti.Volume],
) -> Iterator[tuple[int, dict]]:
    """Yields (key, slice), volume after volume, prepared on all cores; indexes the volumes.

    Args:
      builder: gives class names and training grid.
      cases: what to prepare; ids must be unique.
      load: Case -> Volume; runs in several threads at once.

    Raises:
      nifti.VolumeError: what `load` raised, a line for each problem of any case; or two cases of
        one id.
    """
    ids = [case.volume_id for case in cases]
    repeated = sorted({i for i in ids if ids.count(i) > 1})
    if repeated:
        raise nifti.VolumeError(f"volume ids occur twice: {', '.join(repeated[:8])}")
    metadata = builder.info.metadata
    num_classes = len(metadata["class_names"]) + 1
    prepare = functools.partial(
        _prepare,
        load=load,
        image_size=builder.builder_config.image_size,
        target_spacing_mm=builder.builder_config.target_spacing_mm,
        n4_shrink_factor=builder.builder_config.n4_shrink_factor,
        wanted=metadata["orientation"],
        windows=[w and tuple(w) for w in metadata["windows"]],
    )
    metadata["volumes"] = []
    key = 0
    workers = min(usable_cores(), len(cases))
    # Threads are enough: NumPy, zlib and SimpleITK let others run while they compute.
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        prepared = _in_order(pool, prepare, cases, ahead=4 * workers)
        try:
            for examples, median in progress.each(prepared, "preparing volumes", len(cases)):
                # Without the ignored, of which there is no class.
                pixels = [
                    np.bincount(e["label"].ravel(), minlength=num_classes)[:num_classes]
                    for e in examples
                ]
                metadata["volumes"].append(
                    {
                        "volume_id": examples[0]["volume_id"],
                        "patient_id": examples[0]["patient_id"],
                        "has_label": examples[0]["has_label"],
                        "first_slice": key,
                        # Per slice and class, on the training grid.
                        "class_pixels": np.stack(pixels).tolist(),
                        "spacing_mm": examples[0]["spacing_mm"].tolist(),
                        "median": median,  # of the first channel
                    }
                )
                for example in examples:
                    yield key, example
                    key += 1
        except BaseException as error:
            pool.shutdown(cancel_futures=True)
            if isinstance(error, nifti.VolumeError):
                problems = _problems(cases, load) or [str(error)]
                raise nifti.VolumeError("\n".join(problems)) from error
            raise


def _in_order(
    pool: concurrent.futures.Executor, function: Callable, items: Sequence, *, ahead: int
) -> Iterator:
    """As `pool.map`, holding the results of `ahead` items at most, not of all of them."""
    pending: collections.deque[concurrent.futures.Future] = collections.deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) == ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _problems(cases: Sequence[Case], load: Callable[[Case], nifti.Volume]) -> list[str]:
    """What is wrong with the cases, a line for each problem."""
    problems = []
    for case in tqdm(cases, "looking for more problems", disable=None, leave=False):
        try:
            load(case)
        except nifti.VolumeError as error:
            problems += str(error).splitlines()
    return problems
