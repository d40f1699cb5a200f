"""python -m lclseg.suggest --workdir=RUN

Tells which unlabelled volumes of a run are worth a mask next: it ranks them by what their masks
would teach, shows how good the prediction of each is expected to be, and writes masks to start
from. Correct these in ITK-SNAP or 3D Slicer, put them beside your other masks, and train again with
--config.rounds.start_from=RUN.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from lclseg import evaluation, next_volume, predict
from lclseg.data import nifti, own_data
from lclseg.data.dataset import PreparedSet
from lclseg.data.layouts import Files
from lclseg.model_files import ModelError, TrainedModel
from lclseg.page.recorded import RunError
from lclseg.run.setup import USER_ERRORS as RUN_ERRORS

USER_ERRORS = (*RUN_ERRORS, ModelError, RunError, OSError)
DRAWS = 4  # pairs of augmented predictions of a volume


class Looked(NamedTuple):
    """What the network makes of a volume.

    Attributes:
      expected_dice: see `next_volume.expected_dice`; None for a labelled volume.
      features: [F], see `next_volume.describe`.
    """

    expected_dice: float | None
    features: np.ndarray


class Suggestion(NamedTuple):
    """A volume of the pool, as the table tells of it.

    Attributes:
      rank: 1, 2, ... of those suggested; None of the others.
      volume_id: as in the run's files.
      expected_dice: in 0..1.
      distance: to the nearest labelled volume, in spreads of the features.
      gain: see `next_volume.Choice`; None of those not suggested.
      image, mask: paths, "" where there is none.
    """

    rank: int | None
    volume_id: str
    expected_dice: float
    distance: float
    gain: float | None
    image: str
    mask: str


def look(
    network: evaluation.Predict,
    prepared: PreparedSet,
    volume_id: str,
    *,
    draws: int,
    seed: int = 0,
) -> Looked:
    """Predicts a volume, plain and, with `draws` above 0, augmented; see `Looked`."""
    entry = prepared.volumes[volume_id]
    image, _ = prepared.read_slices(entry.slices)
    features = next_volume.describe(image, network(image))
    if not draws:
        return Looked(None, features)
    rng = np.random.default_rng((seed, entry.first_slice))
    return Looked(next_volume.expected_dice(rng, network, image, draws=draws), features)


def rank(
    pool: dict[str, Looked], labelled: Sequence[Looked], count: int, images: dict[str, str]
) -> list[Suggestion]:
    """The volumes of the pool: `count` suggested ones, then the others, lowest quality first."""
    ids = list(pool)
    quality = np.array([pool[v].expected_dice for v in ids])
    within, to_labelled = next_volume.distances(
        np.stack([pool[v].features for v in ids]), np.stack([x.features for x in labelled])
    )
    choices = next_volume.choose(quality, within, to_labelled, count)
    chosen = {c.number: (place, c.gain) for place, c in enumerate(choices, start=1)}
    others = [n for n in np.argsort(quality, kind="stable") if n not in chosen]
    return [
        Suggestion(
            rank=chosen[n][0] if n in chosen else None,
            volume_id=ids[n],
            expected_dice=float(quality[n]),
            distance=float(to_labelled[n].min()),
            gain=chosen[n][1] if n in chosen else None,
            image=images.get(ids[n], ""),
            mask=f"masks/{ids[n]}.nii.gz" if n in chosen else "",
        )
        for n in [*chosen, *others]
    ]


def find_images(config: dict) -> dict[str, Files]:
    """Files of own data by volume id; {} of other data sets, or where they are gone."""
    data = ConfigDict(config["data"])
    if data.name != own_data.NAME:
        return {}
    try:
        cases = own_data.find_cases(Path(data.manual_dir).expanduser())
    except nifti.VolumeError:
        return {}
    return {case.case_id: case._replace(label=None) for case in cases}


def write_masks(
    network: evaluation.Predict,
    model: TrainedModel,
    prepared: PreparedSet,
    volume_ids: Sequence[str],
    files: dict[str, Files],
    folder: Path,
) -> None:
    """Writes NAME.nii.gz, the prediction of each volume in its native geometry.

    Of own data it has the header of its image and the label values of the other masks, as
    `lclseg.predict` writes it. Of other data sets it has class numbers, as all that a run writes.
    """
    cases = [files[v] for v in volume_ids if v in files]
    outputs = predict.plan_outputs(cases, folder, with_probabilities=False, with_metrics=False)
    predict.segment(
        network, model.preprocessing, cases, outputs, batch_size=model.batch_size
    ) if cases else None
    for volume_id in volume_ids:
        if volume_id in files:
            continue
        image, _ = prepared.read_slices(prepared.volumes[volume_id].slices)
        native = prepared.read_native(volume_id)
        label = evaluation.to_native_label(prepared, volume_id, network(image))
        nifti.write_label(
            folder / f"{volume_id}.nii.gz",
            label,
            native.affine,
            native.spacing_mm,
            slice_axis=prepared.slice_axis,
        )
