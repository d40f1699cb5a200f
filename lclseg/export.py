"""python -m lclseg.export --workdir=RUN --output=FOLDER

Writes the best model of a run, or that of a --stage, as a folder that lclseg.predict takes in place
of the run: weights, what a volume goes through before them, and a model card. Reading it runs no
code from it.
"""

import argparse
import functools
import json
import math
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from numpy.lib import format as npy

from lclseg import model_files
from lclseg.data import preprocess
from lclseg.data.preprocess import Preprocessing, is_whole
from lclseg.errors import in_words
from lclseg.model_files import ModelError, TrainedModel, class_numbers, kept_largest
from lclseg.page import tables
from lclseg.rules import is_number
from lclseg.run import devices
from lclseg.run.config_checks import CHOICES, RULES
from lclseg.run.workdir import write_json

MODEL_FILE, PARAMETERS_FILE, CARD_FILE = "model.json", "parameters.npz", "README.md"
FORMAT = "lclseg model"
# Of the folder; rises when an older lclseg would read it wrongly. Version 2 kept every component,
# version 3 predicted each slice as it is, version 4 had no CRF, version 5 no smoothing, and version
# 6 no finer grid for the CRF.
VERSION, READABLE = 7, (2, 7)
# Version that first had the key, and what it stands for before.
SINCE: dict[str, tuple[int, list | dict | float]] = {
    "largest_component": (3, []),
    "angles": (4, []),
    "crf": (5, {}),
    "through_plane_sigma": (6, 0.0),
    "crf_upsampling": (7, 1),
}
MAX_BATCH, MAX_FILTERS, MAX_LEVELS = 4096, 2**14, 12
MAX_JSON_BYTES = 2**20
MAX_ANGLES = 64
CRF = tuple(key.removeprefix("crf.") for key in RULES if key.startswith("crf."))
MAX_CRF = 1000  # of each of its numbers
MAX_SIGMA = 1000  # mm

WANTED = {
    "format": (lambda v: v == FORMAT, repr(FORMAT)),
    "version": (
        lambda v: is_whole(v, *READABLE),
        f"{READABLE[0]} to {READABLE[1]}, which this lclseg reads",
    ),
    "preprocessing": (lambda v: isinstance(v, dict), "an object"),
    "architecture": (lambda v: isinstance(v, dict), "an object"),
    "batch_size": (lambda v: is_whole(v, 1, MAX_BATCH), f"1..{MAX_BATCH}"),
    "largest_component": (lambda v: isinstance(v, list), "a list of names of classes"),
    "angles": (
        lambda v: isinstance(v, list) and len(v) <= MAX_ANGLES and all(map(is_number, v)),
        f"a list of up to {MAX_ANGLES} numbers, radians",
    ),
    "crf": (lambda v: _is_crf(v), f"{{}}, or an object of {', '.join(CRF)}"),
    "crf_upsampling": RULES["predictions.crf_upsampling"],
    "through_plane_sigma": (
        lambda v: is_number(v) and 0 <= v <= MAX_SIGMA,
        f"a number of mm, 0 to {MAX_SIGMA}",
    ),
    "facts": (lambda v: _are_facts(v), "an object with dataset, stage, step, validation_dice"),
}
WANTED_ARCHITECTURE = {
    "filters": (lambda v: _are_filters(v), f"1 to {MAX_LEVELS} numbers in 1..{MAX_FILTERS}"),
    "dtype": (
        lambda v: isinstance(v, str) and v in CHOICES["model.dtype"],
        " or ".join(CHOICES["model.dtype"]),
    ),
}


def _are_facts(value) -> bool:
    wanted = {"dataset", "stage", "step", "validation_dice"}
    if not isinstance(value, dict) or not wanted <= value.keys():
        return False
    dice = value["validation_dice"]
    return dice is None or (type(dice) in (int, float) and math.isfinite(dice))


def _is_crf(value) -> bool:
    if not isinstance(value, dict) or value.keys() not in (set(), set(CRF)):
        return False
    numbers = value.items()
    return all(RULES[f"crf.{key}"].holds(number) and number <= MAX_CRF for key, number in numbers)


def _are_filters(value) -> bool:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_LEVELS:
        return False
    return all(is_whole(v, 1, MAX_FILTERS) for v in value)


def write_model(model: TrainedModel, folder: Path) -> None:
    """Writes a model into a new folder; model.json is the last file and marks it complete.

    Raises:
      ModelError: the folder is there and not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelError(f"{folder} exists and is not an empty folder; choose another --output")
    folder.mkdir(parents=True, exist_ok=True)
    tree = {"params": model.state.ema_params, "batch_stats": model.state.batch_stats}
    leaves = flax.traverse_util.flatten_dict(jax.device_get(tree), sep="/")
    np.savez(folder / PARAMETERS_FILE, **leaves)
    (folder / CARD_FILE).write_text(model_card(model))
    content = {
        "format": FORMAT,
        "version": VERSION,
        "preprocessing": preprocess.to_json(model.preprocessing),
        "architecture": model.architecture,
        "batch_size": model.batch_size,
        "largest_component": kept_largest(model),
        "angles": list(model.angles),
        "crf": model.crf,
        "crf_upsampling": model.crf_upsampling,
        "through_plane_sigma": model.through_plane_sigma,
        "facts": model.facts,
    }
    write_json(folder / MODEL_FILE, content)


def read_model(folder: Path) -> TrainedModel:
    """Opens what `write_model` wrote; nothing in the folder is trusted, and nothing is run.

    Raises:
      ModelError: another version, a value, leaf or shape that is missing or wrong.
    """
    path = folder / MODEL_FILE
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"found {path.stat().st_size} bytes; wanted at most {MAX_JSON_BYTES}")
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{path}: not readable as JSON ({error}); export the model anew"
        ) from error
    try:
        if isinstance(content, dict):  # first, since a later version may have other keys
            first = {k: WANTED[k] for k in ("format", "version")}
            preprocess.check_values(
                {k: v for k, v in content.items() if k in first}, first, str(path)
            )
            for key, (since, before) in SINCE.items():
                if content["version"] < since:
                    content.setdefault(key, before)
        preprocess.check_values(content, WANTED, str(path))
        how = preprocess.from_json(content["preprocessing"], f"{path}, preprocessing")
        architecture = content["architecture"]
        preprocess.check_values(architecture, WANTED_ARCHITECTURE, f"{path}, architecture")
    except ValueError as error:
        raise ModelError(str(error)) from error
    multiple = 2 ** (len(architecture["filters"]) - 1)
    if how.image_size % multiple:
        raise ModelError(
            f"{path}: image_size is {how.image_size}; with {len(architecture['filters'])} filters "
            f"wanted a multiple of {multiple}"
        )
    leaves = dict(_read_leaves(folder / PARAMETERS_FILE, _wanted_leaves(how, architecture)))
    tree = flax.traverse_util.unflatten_dict(leaves, sep="/")
    return TrainedModel(
        source=folder,
        preprocessing=how,
        architecture=architecture,
        batch_size=content["batch_size"],
        largest_component=class_numbers(content["largest_component"], how, str(path)),
        angles=tuple(content["angles"]),
        crf=content["crf"],
        crf_upsampling=content["crf_upsampling"],
        through_plane_sigma=float(content["through_plane_sigma"]),
        state=model_files.inference_state(tree["params"], tree["batch_stats"]),
        facts=content["facts"],
    )


def _wanted_leaves(how: Preprocessing, architecture: dict) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of all parameters and statistics by name; nothing is computed."""
    unet = model_files.unet(how, architecture)
    slices = jax.ShapeDtypeStruct(
        (1, how.image_size, how.image_size, how.num_channels), jnp.float32
    )
    init = functools.partial(unet.init, train=False)
    return flax.traverse_util.flatten_dict(jax.eval_shape(init, jax.random.key(0), slices), sep="/")


def _read_leaves(
    path: Path, wanted: dict[str, jax.ShapeDtypeStruct]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields name and array of every leaf; an array is read only if its header is as wanted."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = {name.removesuffix(".npy") for name in archive.namelist()}
            for kind, names in (
                ("is missing", wanted.keys() - found),
                ("has no place in this model", found - wanted.keys()),
            ):
                if names:
                    raise ModelError(
                        f"{path}: {min(names)} {kind} ({len(names)} such arrays); wanted the "
                        f"{len(wanted)} of the architecture in {MODEL_FILE}: export the model anew"
                    )
            for name, leaf in wanted.items():
                with archive.open(f"{name}.npy") as file:
                    shape, dtype = _array_header(file)
                if shape != leaf.shape or dtype != leaf.dtype:
                    raise ModelError(
                        f"{path}: {name} is {dtype} of shape {shape}; wanted {leaf.dtype} of shape "
                        f"{leaf.shape}, by the architecture in {MODEL_FILE}"
                    )
                with archive.open(f"{name}.npy") as file:
                    value = npy.read_array(file, allow_pickle=False)
                if not np.isfinite(value).all():
                    raise ModelError(
                        f"{path}: {name} has NaN or infinite values; wanted finite ones"
                    )
                yield name, value
    except ModelError:
        raise
    except Exception as error:  # zipfile, zlib and NumPy raise a dozen types on damaged files
        raise ModelError(
            f"{path}: not readable ({type(error).__name__}: {error}); copy the folder again, or "
            "export the model anew"
        ) from error


def _array_header(file) -> tuple[tuple[int, ...], np.dtype]:
    version = npy.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"found an array of NPY version {version}; wanted (1, 0)")
    shape, _, dtype = npy.read_array_header_1_0(file)
    return shape, dtype


def model_card(model: TrainedModel) -> str:
    """Makes the text of README.md of an exported model."""
    how, facts, test = model.preprocessing, model.facts, model.facts["test"]
    counts = facts["num_volumes"]
    if counts is None:
        volumes = f"num_labeled {facts['num_labeled']}; the run had not been tested when exported"
    else:
        volumes = f"{counts['labeled']} labelled"
        if facts["stage"] != "baseline":
            volumes += f", {counts['unlabeled']} unlabelled"
        volumes += f"; {counts['validation']} validation volumes"
    spacing = f"{how.target_spacing_mm:g}"
    field_mm = how.image_size * how.target_spacing_mm
    transforms = [
        f"channel {how.channel} of 4-D files" if how.channel is not None else "",
        "N4 bias-field correction" if how.n4_shrink_factor else "",
        f"channels {', '.join(map(str, how.channels))} of a case" if how.channels else "",
        "intensities to [0, 1] by the 1st and 99th percentile of the volume, held within -1 to 3"
        if not all(how.windows) or not how.windows
        else "",
        *(
            f"intensities of channel {n}, {w[0]:.4g} to {w[1]:.4g}, to [0, 1]"
            for n, w in zip(how.channels or (0,), how.windows, strict=False)
            if w
        ),
        f"axes turned to {how.orientation}, slices along the last",
        f"in-plane resampling to {spacing} x {spacing} mm",
        f"cropped or padded to {how.image_size} x {how.image_size} pixels about the middle one",
    ]
    kept = kept_largest(model)
    # Where none is kept, a run has tested what it would bring; that is not this model.
    cleaned = test and kept and test.get("largest_component")
    summaries = [test, cleaned] if cleaned else [test]
    rows = [
        ["class", "label value", "test Dice", "with the largest component"][: 2 + len(summaries)]
    ]
    rows += [["---"] * len(rows[0])]
    for name, value in zip(how.class_names, how.label_values, strict=True):
        dice = [tables.number(s and s["dice_per_class"][name], ".4f") for s in summaries]
        rows.append([name, str(value), *dice])
    scores = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    before = "\n".join(f"* {t}" for t in transforms if t)
    after = ""
    if kept:
        after = (
            f"\nOf {', '.join(kept)} it keeps the largest connected component alone; with\n"
            "--largest_component=no it keeps every component."
        )
    if model.angles:
        degrees = ", ".join(f"{math.degrees(angle):g}" for angle in model.angles)
        after += (
            "\nA prediction is the mean over the slice as it is and copies of it, turned by\n"
            f"{degrees} degrees."
        )
    if model.through_plane_sigma:
        after += (
            "\nProbabilities are smoothed across slices, by a Gaussian of "
            f"{model.through_plane_sigma:g} mm."
        )
    if model.crf:
        after += "\nA dense CRF then moves edges to those of the image."
    method = "supervised"
    if facts["stage"] != "baseline":
        method = f"semi-supervised by the method {facts.get('method', 'local_contrastive')}"
    if test is None:
        tested = "This checkpoint has not been tested."
    else:
        tested = f"Test, {test['n_volumes']} volumes, 3-D, native geometry: {_means_of(test)}."
    if cleaned:
        tested += f"\nWith the largest component of {', '.join(kept)}: {_means_of(cleaned)}."
    if facts["validation_dice"] is None:
        chosen = "Not validated: these are the last weights of the stage."
    else:
        chosen = (
            f"Validation Dice {facts['validation_dice']:.4f}. Where the checkpoint was chosen by "
            "it, that is too high an estimate."
        )
    return f"""# {facts["dataset"]}: {", ".join(how.class_names)}

A 2-D U-Net for volumes, trained by lclseg, {method}.

    python -m lclseg.predict --workdir=THIS_FOLDER --input=FILE_OR_FOLDER --output=FOLDER

## Trained on

{facts["description"] or facts["dataset"]}

{volumes}.
Split {facts["split"]}, seed {facts["seed"]}; stage {facts["stage"]}, step {facts["step"]}.

## How good it is

{chosen}
{tested}

{scores}

## Before the network

{before}

lclseg.predict does it, and brings the result back onto the input.{after}

## Intended use

Research on segmentation of images like those it was trained on: same modality, sequence, anatomy,
and field of view. Not a medical device: no diagnosis or treatment may rest on it.

## Limits

* Few patients were labelled, often of one scanner and site: expect worse results on others.
* It always answers, on images of another kind as well, and does not tell when it is wrong. Look at
  the results.
* Slices are segmented one by one. What lies outside the field of {field_mm:g} x {field_mm:g} mm
  about the image's centre becomes background.
* Probabilities are not calibrated.

## Licence

lclseg is Apache-2.0. These weights were learnt from the data named above: its terms (research
only, share-alike, no redistribution, ...) may bind them too, and weights can tell of the patients
they were learnt from. Look at the terms before you pass this folder on.
"""


def _means_of(summary: dict) -> str:
    return (
        f"mean Dice {tables.number(summary['mean_dice'], '.4f')}, HD95 "
        f"{tables.number(summary['mean_hausdorff95_mm'], '.2f')} mm, ASSD "
        f"{tables.number(summary['mean_assd_mm'], '.2f')} mm; {summary['n_missed']} class-volume "
        "pairs missed"
    )


@in_words()
def main(argv: Sequence[str] | None = None) -> None:
    # Not absl's flags: those of all modules of a process share their names.
    parser = argparse.ArgumentParser("lclseg.export", allow_abbrev=False, description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True, help="of the run")
    parser.add_argument(
        "--stage", help="baseline, joint, round_1, ...: its best model; last: the newest weights"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder that does not exist yet")
    options = parser.parse_args(argv)
    devices.set_up_jax(1)
    output = options.output.expanduser()
    workdir = options.workdir.expanduser().absolute()
    if (workdir / MODEL_FILE).exists():
        raise ModelError(f"{workdir} is an exported model already; copy the folder")
    model = model_files.load_run(workdir, options.stage)
    write_model(model, output)
    facts = model.facts
    print(
        f"{facts['stage']}, step {facts['step']}, validation Dice "
        f"{tables.number(facts['validation_dice'], '.4f')}\n"
        f"{output}"
    )


if __name__ == "__main__":
    main()
