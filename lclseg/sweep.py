"""python -m lclseg.sweep --sweep=configs/sweeps/hippocampus.py [--manual_dir=FOLDER]

A table of experiments: rows (overrides of one config) x pairs (split, seed). A sweep file defines

  CONFIG  path of the config file, from the sweep file
  PAIRS   ((split, seed), ...)
  BASE    {"group.field": value, ...} for every row
  ROWS    {row name: {"group.field": value, ...}}; the first row is the one to compare with;
          "method": NAME takes the config of another method

Every run leaves `<row>/<split>_seed<seed>.json` in the results folder, from which the Markdown
tables are made (`lclseg/sweep_table.py`); finished ones are skipped when the command is started
again. Runs of one pair whose baselines do not differ train it once. As many runs train at a time
as there are devices (of CPUs, cores), one device each; a run that fails does not end the others.
"""

import json
import logging
import re
import runpy
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from absl import app, flags
from ml_collections import ConfigDict

from lclseg.errors import UserError, in_words
from lclseg.run import side_by_side
from lclseg.run.stored_config import as_now, differing_keys, to_store
from lclseg.sweep_table import handed_out, last_test, markdown, runs_of, table

_SWEEP = flags.DEFINE_string("sweep", None, "Sweep file, e.g. configs/sweeps/hippocampus.py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the runs; default runs/<sweep>.")
_RESULTS = flags.DEFINE_string(
    "results", None, "Folder of what the table is made from; default results/<sweep>."
)
_DATA_DIR = flags.DEFINE_string("data_dir", "", "As --config.data.data_dir of lclseg.main.")
_MANUAL_DIR = flags.DEFINE_string("manual_dir", "", "As --config.data.manual_dir of lclseg.main.")
_ONLY = flags.DEFINE_string("only", "", "One run, by its place below --workdir; no table.")
_PREPARE_ONLY = flags.DEFINE_bool("prepare_only", False, "Prepare the data set, train nothing.")
_TABLE_ONLY = flags.DEFINE_bool("table_only", False, "Train nothing, print the table.")
_GAIN_OVER = flags.DEFINE_string(
    "gain_over", None, "Row that the printed gains are over; default the first, as in the files."
)

# What differs from machine to machine, and is not part of a result.
NOT_STORED = ("num_cpu_devices", "data.data_dir", "data.manual_dir", "rounds.baseline_from")
PREPARE = "prepare"  # the job before all runs
logger = logging.getLogger("lclseg")


class SweepError(UserError):
    """A sweep and a results folder that do not fit together; the message tells the way out."""


class Sweep(NamedTuple):
    """A sweep file: rows x pairs of one config; rows hold what they share, too.

    A row's "method" names its method; then the config is what `get_config` gives for it.
    """

    config: ConfigDict
    get_config: Callable[[str], ConfigDict]
    pairs: Sequence[tuple[str, int]]
    rows: Mapping[str, Mapping]

    @property
    def reference(self) -> str:
        """The row that the others are compared with."""
        return next(iter(self.rows))


class Experiment(NamedTuple):
    """One run of a sweep; `path` is its place below workdir and results folder, no suffix."""

    row: str
    split: str
    seed: int
    config: ConfigDict
    path: Path


def load_sweep(path: Path) -> Sweep:
    """Reads a sweep file; raises SweepError if it is not there or lacks one of the names."""
    if not path.is_file():
        raise SweepError(f"--sweep: there is no file {path}")
    content = runpy.run_path(str(path))
    missing = [n for n in ("CONFIG", "PAIRS", "BASE", "ROWS") if n not in content]
    if missing:
        raise SweepError(f"{path} does not define {', '.join(missing)}")
    get_config = runpy.run_path(str(path.parent / content["CONFIG"]))["get_config"]
    rows = {row: {**content["BASE"], **own} for row, own in content["ROWS"].items()}
    return Sweep(get_config(), get_config, content["PAIRS"], rows)


def experiments(sweep: Sweep) -> Iterator[Experiment]:
    """Yields the runs of a sweep, pair after pair: a whole table early, then more of each row.

    Raises:
      SweepError: a row names a value that the config does not have.
    """
    for split, seed in sweep.pairs:
        for row, overrides in sweep.rows.items():
            values = {"data.split": split, "seed": seed, **overrides}
            config = sweep.config.copy_and_resolve_references()
            if method := values.pop("method", None):
                config = sweep.get_config(method)
                where = {k: sweep.config.data[k] for k in ("data_dir", "manual_dir")}
                config.data.update(where)
            for key, value in values.items():
                group, _, name = key.rpartition(".")
                target = config[group] if group else config
                if name not in target:
                    raise SweepError(f"row {row!r}: there is no {key} in the config")
                target[name] = value
            yield Experiment(row, split, seed, config, Path(slug(row)) / f"{split}_seed{seed}")


def slug(row: str) -> str:
    """Makes a folder's name of a row's: "inter, 3 anchors" -> "inter_3_anchors"."""
    return re.sub(r"[^a-z0-9.]+", "_", row.lower()).strip("_")


def of_result(stored: dict) -> dict:
    """Takes the part of a stored config that a result depends on."""
    content = as_now(stored)
    for key in NOT_STORED:
        *groups, name = key.split(".")
        group = content
        for g in groups:
            group = group[g]
        del group[name]
    return content


def read_results(folder: Path, sweep: Sweep) -> dict[tuple[str, str, int], dict]:
    """Reads finished runs of the sweep by (row, split, seed).

    Raises:
      SweepError: a file holds the result of another config.
    """
    found = {}
    for experiment in experiments(sweep):
        path = folder / experiment.path.with_suffix(".json")
        if path.exists():
            result = json.loads(path.read_text())
            keys = differing_keys(
                of_result(result["config"]), of_result(to_store(experiment.config))
            )
            if keys:
                raise SweepError(
                    f"{path} is of a run with other values of {', '.join(keys[:8])}; give the row "
                    "another name, or remove the file to run it anew"
                )
            found[experiment.row, experiment.split, experiment.seed] = result
    return found


def first_with_baseline(config: ConfigDict, stored: Iterable[tuple[str, dict]]) -> str | None:
    """Finds the first of (name, config as stored) whose baseline is the config's; or None."""
    from lclseg.run.start_from import other_baseline  # here: it loads JAX

    own = to_store(config)
    return next((name for name, theirs in stored if not other_baseline(theirs, own)), None)


def run_one(
    experiment: Experiment,
    workdir: Path,
    folder: Path,
    earlier: Sequence[Experiment],
    stop_asked: Callable[[], bool] = lambda: False,
) -> dict:
    """Trains one experiment and writes its result; returns that.

    Args:
      experiment: which one.
      workdir: of the sweep's runs.
      folder: of the results.
      earlier: experiments that may have trained its baseline.
      stop_asked: see `train.train_and_evaluate`.

    Raises:
      Interrupted: `stop_asked` gave True; the run is saved.
    """
    from lclseg import train
    from lclseg.run.workdir import read_json, write_text  # here: they need JAX

    run_dir, config = workdir / experiment.path, experiment.config
    begun = read_json(run_dir / "config.json")
    places = [str(workdir / e.path) for e in earlier]
    finished = [p for p in places if "chosen" in (read_json(Path(p, "results.json")) or {})]
    stored = ((p, as_now(json.loads(Path(p, "config.json").read_text()))) for p in finished)
    config.rounds.baseline_from = (
        begun["rounds"]["baseline_from"] if begun else first_with_baseline(config, stored) or ""
    )
    result = train.train_and_evaluate(config, run_dir, stop_asked)
    content = {"config": of_result(to_store(config)), **result}
    path = folder / experiment.path.with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, separators=(",", ":")) + "\n")
    return content


def write_table(sweep: Sweep, folder: Path) -> None:
    """Writes README.md of the results folder anew."""
    from lclseg.run.workdir import write_text

    tables = markdown(sweep.rows, sweep.pairs, read_results(folder, sweep), sweep.reference)
    write_text(folder / "README.md", tables + "\n")


def write_page(sweep: Sweep, results: Mapping, workdir: Path, folder: Path) -> Path:
    """Writes index.html of the results folder: the table, charts, and pictures of worst volumes."""
    from lclseg.page import methods
    from lclseg.page.recorded import find_prepared, read_run
    from lclseg.run.workdir import write_text

    (split, seed), *_ = sweep.pairs
    folders = {
        e.row: workdir / e.path for e in experiments(sweep) if (e.split, e.seed) == (split, seed)
    }
    folders = {row: path for row, path in folders.items() if (path / "results.json").exists()}
    runs = {}
    if folders:
        first = read_run(next(iter(folders.values())), "")
        prepared, why = find_prepared(first.config)
        runs = {row: read_run(path, row, prepared, why) for row, path in folders.items()}
    dice = {
        row: [
            {v: t["mean_dice"] for v, t in handed_out(last_test(r))["per_volume"].items()}
            for r in own.values()
        ]
        for row in sweep.rows
        if (own := runs_of(results, row, sweep.pairs))
    }
    example = next(iter(results.values()))
    title = f"{example['dataset']}: {len(example['volumes']['labeled'])} labelled, methods compared"
    head_and_cells = table(sweep.rows, sweep.pairs, results, sweep.reference)
    path = folder / "index.html"
    write_text(path, methods.page(title, *head_and_cells, dice, runs))
    return path


def run_missing(
    sweep: Sweep, workdir: Path, folder: Path, stop_asked: Callable[[], bool] = lambda: False
) -> list[str]:
    """Trains what is not in the results folder yet, one after the other, on all devices.

    Returns:
      What failed for a reason that the user can mend, a line a run.

    Raises:
      Interrupted: `stop_asked` gave True; finished runs and the one under way are saved.
    """
    results = read_results(folder, sweep)
    earlier: list[Experiment] = []
    failed = []
    for experiment in experiments(sweep):
        if (experiment.row, experiment.split, experiment.seed) not in results:
            logger.info("%s", title(experiment))
            try:
                run_one(experiment, workdir, folder, earlier, stop_asked)
            except UserError as error:
                logger.error("%s: failed: %s", experiment.path, error)
                failed.append(f"{experiment.path}: {error}")
            else:
                write_table(sweep, folder)
        earlier.append(experiment)
    return failed


def run_side_by_side(
    sweep: Sweep,
    workdir: Path,
    folder: Path,
    *,
    platform: str,
    num_devices: int,
    stop_asked: Callable[[], bool] = lambda: False,
) -> list[str]:
    """Trains what is not in the results folder yet, as many runs at a time as there are devices.

    Each is a process of its own, with one device. A run whose baseline an earlier one trains waits
    for that one. What a run prints is in `<run>.log` below the workdir.

    Returns:
      What failed, a line a run.

    Raises:
      Interrupted: `stop_asked` gave True; finished runs and those under way are saved.
    """
    from lclseg.run import stopping

    results = read_results(folder, sweep)
    jobs = [_job(PREPARE, workdir / "prepare.log", "--prepare_only")]
    earlier: list[Experiment] = []
    for experiment in experiments(sweep):
        if (experiment.row, experiment.split, experiment.seed) not in results:
            name, after = str(experiment.path), [PREPARE]
            stored = ((str(e.path), to_store(e.config)) for e in earlier)
            source = first_with_baseline(experiment.config, stored)
            if source and any(source == job.name for job in jobs):
                after.append(source)
            log = workdir / experiment.path.with_suffix(".log")
            jobs.append(_job(name, log, f"--only={name}", after=after))
        earlier.append(experiment)
    if len(jobs) == 1:
        return []
    logger.info("%d runs, %d at a time, one %s each", len(jobs) - 1, num_devices, platform)
    logs = {job.name: job.log for job in jobs}

    def ended(name: str, status: int) -> None:
        how = "stopped" if stop_asked() else "failed"
        logger.info("%s: %s", name, "done" if status == 0 else f"{how}, see {logs[name]}")
        if status == 0 and name != PREPARE:
            write_table(sweep, folder)

    status = side_by_side.run_side_by_side(
        jobs, platform=platform, num_devices=num_devices, stop_asked=stop_asked, ended=ended
    )
    if stop_asked():
        raise stopping.Interrupted(f"stopped with {len(jobs) - len(status)} runs not begun")
    return [f"{name}: see {logs[name]}" for name, code in status.items() if code]


def title(experiment: Experiment) -> str:
    """Names an experiment in words."""
    return f"{experiment.row}, split {experiment.split}, seed {experiment.seed}"


def _job(name: str, log: Path, *flags: str, after: Sequence[str] = ()) -> side_by_side.Job:
    """A process that does one thing of this command."""
    command = [sys.executable, "-m", "lclseg.sweep", *_flags(), *flags]
    return side_by_side.Job(name=name, command=command, log=log, after=after)


def _flags() -> list[str]:
    """The command's own flags, for a process that does one of its runs."""
    return [
        f"--{flag.name}={flag.value}"
        for flag in (_SWEEP, _WORKDIR, _RESULTS, _DATA_DIR, _MANUAL_DIR)
        if flag.value
    ]


def main(argv):
    from lclseg.run import multihost, setup, stopping

    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    path = Path(_SWEEP.value)
    workdir = Path(_WORKDIR.value or f"runs/{path.stem}").expanduser().absolute()
    folder = Path(_RESULTS.value or f"results/{path.stem}").expanduser()
    sweep = load_sweep(path)
    if _GAIN_OVER.value and _GAIN_OVER.value not in sweep.rows:
        raise SweepError(
            f"--gain_over: {path} has no row {_GAIN_OVER.value!r}; it has {', '.join(sweep.rows)}"
        )
    sweep.config.data.update(data_dir=_DATA_DIR.value, manual_dir=_MANUAL_DIR.value)
    if _PREPARE_ONLY.value:
        setup.set_up_process(sweep.config)
        print(setup.prepare(next(experiments(sweep)).config))
        return
    if _ONLY.value:
        _train_only(sweep, _ONLY.value, workdir, folder)
        return
    failed: list[str] = []
    if not _TABLE_ONLY.value:
        if multihost.settings():
            raise SweepError("a sweep runs on one machine; start lclseg.main on a cluster")
        try:
            with stopping.ending_on_disk_errors(workdir), stopping.stop_on_signals() as stop_asked:
                failed = _train_missing(sweep, workdir, folder, stop_asked)
        except stopping.Interrupted as stop:
            print(f"lclseg: {stop}; the same command goes on from there")
            return
    results = read_results(folder, sweep)
    reference = _GAIN_OVER.value or sweep.reference
    # Written before anything is printed: who prints to `head` closes the pipe early.
    page = None
    if results:
        write_table(sweep, folder)
        page = write_page(sweep, results, workdir, folder)
    print(markdown(sweep.rows, sweep.pairs, results, reference))
    if page:
        print(f"\n{page}")
    if failed:
        raise SweepError("\n  ".join([f"{len(failed)} runs failed:", *failed]))


def _train_missing(
    sweep: Sweep, workdir: Path, folder: Path, stop_asked: Callable[[], bool]
) -> list[str]:
    """Trains on one device, or on all of them side by side; returns what failed."""
    from lclseg.run import setup

    platform, num_devices = side_by_side.devices_here()
    if num_devices == 1:
        setup.set_up_process(sweep.config)
        return run_missing(sweep, workdir, folder, stop_asked)
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    return run_side_by_side(
        sweep,
        workdir,
        folder,
        platform=platform,
        num_devices=num_devices,
        stop_asked=stop_asked,
    )


def _train_only(sweep: Sweep, name: str, workdir: Path, folder: Path) -> None:
    """Trains one run, in the process that `run_side_by_side` started for it."""
    from lclseg.run import setup, stopping

    setup.set_up_process(sweep.config)
    earlier: list[Experiment] = []
    for experiment in experiments(sweep):
        if str(experiment.path) == name:
            break
        earlier.append(experiment)
    try:
        with stopping.ending_on_disk_errors(workdir), stopping.stop_on_signals() as stop_asked:
            run_one(experiment, workdir, folder, earlier, stop_asked)
    except stopping.Interrupted as stop:
        sys.exit(f"lclseg: {stop}; the same command goes on from there")


if __name__ == "__main__":
    flags.mark_flag_as_required("sweep")
    with in_words():
        app.run(main)
