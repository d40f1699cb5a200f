"""The command that gives a run's config again."""

import runpy
import shlex
from typing import Any

from lclseg.run.stored_config import CONFIGS, as_now, differing_keys, to_store

# The last is what the others leave of the pool.
LISTS = ("data.labeled", "data.validation", "data.test", "data.unlabeled")
MISSING = object()


def reproducing_command(config: dict) -> str | None:
    """Finds the command that gives this config, by today's config files; None: there is none.

    Values other than those of `configs/<data set>.py` become overrides, one a line.
    """
    dataset = config["data"]["name"]
    path = CONFIGS / f"{dataset}.py"
    if not dataset.isidentifier() or not path.exists():  # it is run: of this folder only
        return None
    config = as_now(config)
    method = config["method"]["name"]
    if not (CONFIGS / "methods" / f"{method}.py").exists():
        return None
    file = runpy.run_path(str(path))["get_config"](method)
    keys = [k for k in differing_keys(to_store(file), config) if k not in LISTS]
    for key in ("data.num_labeled", "data.split"):
        file.update_from_flattened_dict({key: _value(config, key)})
    # A list set by hand takes its patients out of the pool, which needs no word then.
    for key in LISTS:
        if _value(to_store(file), key) != _value(config, key):
            keys.append(key)
            file.update_from_flattened_dict({key: tuple(_value(config, key))})
    defaults = to_store(file)
    overrides = []
    for key in keys:
        value = _value(config, key)
        # No flag can say these: a key of another version, none, and an empty list for the file's.
        if key not in LISTS and MISSING in (value, _value(defaults, key)):
            return None
        if value is None or value == []:
            return None
        text = str(tuple(value) if isinstance(value, list) else value)
        overrides.append(f"--config.{key}={_quoted(text)}")
    return " \\\n  ".join(
        [f"python -m lclseg.main --config=configs/{path.name}:{method}", *overrides]
    )


def _value(config: dict, key: str) -> Any:
    """Of a dotted key; `MISSING` where there is none."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part, MISSING) if isinstance(value, dict) else MISSING
    return value


def _quoted(text: str) -> str:
    """As a word of the shell: like `shlex.quote`, but lists of names stay readable."""
    if "'" in text and not set(text) & set('"$`\\!'):
        return f'"{text}"'
    return shlex.quote(text)
