"""python -m lclseg.main --config=configs/acdc.py [--workdir=DIR] [--config.group.field=value]

Trains and tests. configs/default.py lists every group.field with its meaning; a wrong one is named
before any work.
"""

from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from lclseg.errors import UserError, in_words

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, e.g. configs/phantom.py.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder for everything the run writes; default runs/<data set>/<split>."
)
_PREPARE_ONLY = flags.DEFINE_bool(
    "prepare_only", False, "Prepare the data set, where it was not yet, and end."
)


def main(argv):
    # Imported here: the processes that prepare volumes import this module, but need no JAX.
    from lclseg import report, train
    from lclseg.run import multihost, setup, stopping

    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}; options look like --config.seed=1")
    config = _CONFIG.value
    data = config.data
    default = f"runs/{data.name}/{data.num_labeled}_{data.split}_seed{config.seed}"
    if "://" in (_WORKDIR.value or ""):
        raise UserError(f"--workdir is {_WORKDIR.value}; wanted a folder: mount the storage first")
    workdir = Path(_WORKDIR.value or default).expanduser().absolute()
    with (
        multihost.ending_together(),
        in_words(),
        stopping.ending_on_disk_errors(workdir),
    ):
        try:
            setup.set_up_process(config)
            if _PREPARE_ONLY.value:
                print(setup.prepare(config))
                return
            with (
                stopping.stop_on_signals() as stop_asked,
                multihost.own_workdir(workdir) as folder,
            ):
                results = train.train_and_evaluate(config, folder, stop_asked)
        except stopping.Interrupted as stop:
            print(f"lclseg: {stop}; the same command goes on from there")
            return
    if multihost.is_first():
        print(f"\n{report.table(results)}\n\n{workdir}/report.html")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    with in_words():
        app.run(main)
