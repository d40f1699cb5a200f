"""python -m lclseg.main --config=configs/acdc.py [--workdir=DIR] [--config.group.field=value]"""

import logging
import sys
from pathlib import Path

import absl.logging
from absl import app, flags
from ml_collections import config_flags

from lclseg.volumes import VolumeError

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, e.g. configs/phantom.py.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder for everything the run writes; default runs/<data set>/<split>."
)


def main(argv):
    # Imported here: the processes that prepare volumes import this module, but need no JAX.
    import jax

    from lclseg import report, train
    from lclseg.configuration import ConfigError
    from lclseg.pseudo_labels import PseudoLabelError
    from lclseg.splits import SplitError

    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}; options look like --config.seed=1")
    config = _CONFIG.value
    data = config.data
    default = f"runs/{data.name}/{data.num_labeled}_{data.split}_seed{config.seed}"
    workdir = Path(_WORKDIR.value or default).expanduser().absolute()
    absl.logging.set_verbosity(absl.logging.ERROR)  # Orbax and TFDS log by the page
    logging.getLogger("lclseg").setLevel(logging.INFO)
    cache = Path("~/.cache/lclseg/xla").expanduser()
    jax.config.update("jax_compilation_cache_dir", str(cache))
    train.use_cpu_devices(config)
    try:
        results = train.train_and_evaluate(config, workdir)
    except (
        ConfigError,
        SplitError,
        VolumeError,
        PseudoLabelError,
        FloatingPointError,
    ) as error:
        sys.exit(f"lclseg: {error}")
    print(f"\n{report.table(results)}\n\n{workdir}")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)
