"""What a folder's dataset.json tells, the Decathlon's or nnU-Net's: names of classes, and CT."""

import json
from pathlib import Path

from lclseg.data.nifti import VolumeError


def dataset_json(folder: Path) -> dict:
    """Reads dataset.json, the Decathlon's or nnU-Net's; {} without one.

    Raises:
      VolumeError: it is not readable as JSON.
    """
    path = folder / "dataset.json"
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))  # Windows' editors add a mark
    except ValueError as error:
        raise VolumeError(
            f"{path}: not readable as JSON ({error}); mend it, or take it out: then classes are "
            "called class_1, ..."
        ) from error
    return content if isinstance(content, dict) else {}


def listed_names(folder: Path) -> dict[int, str]:
    """Reads label value -> name from dataset.json; leaves out nnU-Net's regions (several values).

    Raises:
      VolumeError: it is not readable as JSON.
    """
    labels = dataset_json(folder).get("labels")
    names = {}
    for key, value in labels.items() if isinstance(labels, dict) else ():
        # {"1": "Anterior"} or {"Anterior": 1}
        number, name = (key, value) if isinstance(value, str) and key.isdigit() else (value, key)
        if str(number).isdigit():
            names[int(number)] = name
    return names


def is_ct(folder: Path, channel: int) -> bool:
    """Tells whether dataset.json says that a channel is CT."""
    content = dataset_json(folder)
    names = content.get("channel_names", content.get("modality"))
    name = names.get(str(channel)) if isinstance(names, dict) else None
    return isinstance(name, str) and name.strip().upper() == "CT"
