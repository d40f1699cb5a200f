"""The page of suggestions: expected Dice of the unlabelled volumes, pictures of the poorest."""

import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lclseg.class_groups import Kind
from lclseg.components import largest_component
from lclseg.data import case_files, grid
from lclseg.data.dataset import PreparedSet
from lclseg.evaluation import VolumePrediction
from lclseg.page import figures, pictures
from lclseg.page.elements import document, figure, key, legend, note, section, table, text
from lclseg.page.recorded import named
from lclseg.palette import PALETTE


class Suggestion(NamedTuple):
    """A volume of the pool, as the tables tell of it.

    Attributes:
      rank: 1, 2, ..., the lowest expected Dice first.
      volume_id: as in the run's files.
      expected_dice: in 0..1, see `quality_gate.expected_dice`.
      image, mask: paths, "" where there is none.
    """

    rank: int
    volume_id: str
    expected_dice: float
    image: str
    mask: str


def page(
    config: dict,
    about: dict,
    prepared: PreparedSet,
    predict: Callable[[str], VolumePrediction],
    suggestions: Sequence[Suggestion],
    *,
    keep_largest: Sequence[Kind],
) -> str:
    """Makes the page, as HTML.

    Args:
      config: of the run, read from JSON.
      about: "workdir", "stage" and "step" of the model that looked.
      prepared: the run's data set.
      predict: volume id -> what is predicted for it.
      suggestions: the pool, the lowest expected Dice first; those with a mask are shown.
      keep_largest: classes of which the masks to start from keep the largest component alone.
    """
    title = f"{config['data']['name']}: the poorest predictions of the pool"
    chosen = [s for s in suggestions if s.mask]
    body = [
        f"<header><h1>{text(title)}</h1><p>Run {text(about['workdir'])}, "
        f"{text(named(about['stage']))}, step {about['step']}; {len(suggestions)} unlabelled "
        "volumes.</p></header>",
        section(2, "Look at these first", *_poorest(chosen, prepared, predict, keep_largest)),
        section(2, "How to go on", *_how(config, about, chosen)),
        section(2, "All unlabelled volumes", *_all(suggestions)),
    ]
    return document(title, body)


def _poorest(
    chosen: Sequence[Suggestion],
    prepared: PreparedSet,
    predict: Callable[[str], VolumePrediction],
    keep_largest: Sequence[Kind],
) -> Iterator[str]:
    keys = (key(n, c, "area") for n, c in zip(prepared.class_names, PALETTE * 40, strict=False))
    yield legend(keys, "<span>areas: what the network sees</span>")
    for s in chosen:
        yield f"<h3>{s.rank}. {text(s.volume_id)}</h3>"
        yield f"<p>Expected Dice {s.expected_dice:.2f}.</p>"
        prediction = predict(s.volume_id)
        label = largest_component(prediction.label(), keep_largest)
        image = grid.first_channel(prediction.image)
        doubt = (1 - prediction.network.max(axis=-1)).sum(axis=(1, 2))
        shown = {
            int(np.count_nonzero(label, axis=(1, 2)).argmax()): "most foreground",
            int(doubt.argmax()): "least certain",
        }
        box = pictures.box(list(label))
        views = [
            view
            for index, words in sorted(shown.items())
            for view in (
                figure(
                    figures.overlay(image[index][box], filled=None, outlined=None),
                    f"slice {index + 1} of {len(image)}: {words}",
                ),
                figure(
                    figures.overlay(image[index][box], filled=label[index][box], outlined=None),
                    "the same, with the mask to start from",
                ),
            )
        ]
        yield f'<div class="pictures">{"".join(views)}</div>'


def _how(config: dict, about: dict, chosen: Sequence[Suggestion]) -> Iterator[str]:
    data = config["data"]
    yield (
        "<p>Open an image with its mask, correct the mask, and save it under the name it has. In "
        "3D Slicer: add both files, the mask as a segmentation. In ITK-SNAP, from the folder of "
        "this page:</p>"
    )
    image = next((s.image for s in chosen if s.image), "IMAGE")
    mask = chosen[0].mask if chosen else "MASK"
    yield f"<pre>{text(shlex.join(['itksnap', '-g', image, '-s', mask]))}</pre>"
    if data["name"] != case_files.NAME:
        yield note(
            f"The masks of {data['name']} hold class numbers, as all that a run writes; a data set "
            "of a builder takes no masks from outside."
        )
        return
    folder = Path(data["manual_dir"])
    labels = folder / ("labels" if (folder / "images").is_dir() else "labelsTr")
    yield (
        f"<p>Put the corrected mask into {text(labels)}. The next run learns from it, keeps all "
        "other roles, and starts from the weights of this run:</p>"
    )
    command = (
        f"python -m lclseg.main --config=configs/nifti_folder.py \\\n"
        f"  --config.data.manual_dir={shlex.quote(str(folder))} \\\n"
        f"  --config.rounds.start_from={shlex.quote(about['workdir'])} \\\n"
        "  --workdir=NEW_FOLDER"
    )
    yield f"<pre>{text(command)}</pre>"


def _all(suggestions: Sequence[Suggestion]) -> Iterator[str]:
    rows = [[s.volume_id, str(s.rank), f"{s.expected_dice:.3f}"] for s in suggestions]
    marked = [n for n, s in enumerate(suggestions) if s.mask]
    yield table(["volume", "rank", "expected Dice"], rows, marked)
    yield (
        "<p>Expected Dice: the mean Dice of pairs of predictions of changed copies of the volume: "
        "turned, scaled and, where training has flipped slices, flipped. It ranks predictions, the "
        "poorest first; as a number it is too high where the network errs the same way twice. It "
        "does not tell which mask would teach most.</p>"
    )
