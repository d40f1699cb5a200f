"""What a set's builder is told besides the grid, from a complete config."""

from typing import Any

from ml_collections import ConfigDict

from lclseg.data import case_files, own_data


def options_of(data: ConfigDict) -> dict[str, Any]:
    """Makes `options` of `open_builder` and `open_prepared` of `config.data`; {} for most sets."""
    if data.name == case_files.NAME:
        return own_data.builder_options(data)
    if "frames" in data:  # ACDC
        return {"both_frames": data.frames != "end_diastolic"}
    return {}
