"""The command that gives a run's config again."""

import json
import runpy
import shlex
from pathlib import Path

from lclseg.run.config_checks import differing_keys

CONFIGS = Path(__file__).parents[2] / "configs"


def reproducing_command(config: dict) -> str | None:
    """The command that gives this config, by the config files as they are now; None: there is none.

    Values other than those of `configs/<data set>.py` become overrides, one a line.
    """
    dataset = config["data"]["name"]
    path = CONFIGS / f"{dataset}.py"
    if not dataset.isidentifier() or not path.exists():  # it is run: of this folder only
        return None
    stored = runpy.run_path(str(path))["get_config"]()
    defaults = json.loads(stored.to_json_best_effort())
    overrides = []
    for key in differing_keys(defaults, config):
        *groups, name = key.split(".")
        theirs, ours = defaults, config
        for group in groups:
            theirs, ours = theirs[group], ours[group]
        # A key of one side only, or patient lists of another version: no override gives these.
        if name not in theirs or name not in ours or key.startswith("data.splits."):
            return None
        value = ours[name]
        if value is None:  # no flag can say so
            return None
        text = str(tuple(value) if isinstance(value, list) else value)
        overrides.append(f"--config.{key}={_quoted(text)}")
    return " \\\n  ".join([f"python -m lclseg.main --config=configs/{path.name}", *overrides])


def _quoted(text: str) -> str:
    """As a word of the shell: like `shlex.quote`, but lists of names stay readable."""
    if "'" in text and not set(text) & set('"$`\\!'):
        return f'"{text}"'
    return shlex.quote(text)
