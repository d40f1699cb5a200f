"""python -m lclseg.report RUN [RUN ...] [--output=FILE]

Writes an HTML page on a run, finished or not, or a page that compares runs: summary, learning
curves, Dice of each test volume, pictures of predictions and pseudo-labels, config. RUN is the
--workdir of a run. Training writes the page, RUN/report.html, by itself.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import absl.logging

from lclseg.data.dataset import PreparedSet
from lclseg.errors import in_words
from lclseg.page import tables
from lclseg.page.recorded import find_prepared, names_of, read_run
from lclseg.run.workdir import write_text

logger = logging.getLogger("lclseg")


def table(results: dict) -> str:
    """Shows what a run found, as aligned text: stages by test volumes, then pseudo-labels by round.

    Stages: validation and test Dice, gain over the baseline, Dice per class, HD95 and ASSD in mm,
    class-volume pairs missed, test Dice of the last weights. Pseudo-labels: volumes used, rejected
    by the gate, empty; mean confidence; Dice with the round before and, where ground truth is
    hidden, with the truth.
    """
    classes, stages = results["class_names"], results["results"]
    head = ["stage", "val Dice", "test Dice", "gain", *classes, "HD95 mm", "ASSD mm", "missed"]
    tested = [[*head, "last"]]
    pseudo = [
        ["trained on", "volumes", "rejected", "empty", "confidence", "Dice before", "true Dice"],
    ]
    notes = []
    for stage, result in stages.items():
        name = stage + (" *" if stage == results.get("chosen") else "")
        tested.append([name, *tables.stage_cells(stages, stage, classes, ".4f")])
        labels = result["pseudo_labels"]
        if labels:
            pseudo.append([stage, *tables.pseudo_label_cells(labels, ".4f")])
            notes += [f"{stage}: {warning}" for warning in labels["warnings"]]
    volumes = results["volumes"]
    caption = (
        f"{results['dataset']}: {len(volumes['labeled'])} labelled, {len(volumes['unlabeled'])} "
        f"unlabelled, {len(volumes['validation'])} validation, {len(volumes['test'])} test "
        f"volumes; split {results['split']}, seed {results['seed']}; "
        f"* {'best on validation' if volumes['validation'] else 'handed out: the last'}; "
        "last: test Dice of a stage's last weights"
    )
    parts = [f"{results['description']}\n{caption}", tables.aligned(tested)]
    if len(pseudo) > 1:
        parts.append("\n".join(["Pseudo-labels", tables.aligned(pseudo), *notes]))
    return "\n\n".join(parts)


def write_page(workdirs: Sequence[Path], output: Path) -> None:
    """Writes the page on the runs in some folders; pictures of what is prepared on this machine.

    Raises:
      RunError: a folder holds no run.
    """
    from lclseg.page import comparison, one_run  # here: training need not load matplotlib

    runs = []
    for workdir, name in zip(workdirs, names_of(workdirs), strict=True):
        run = read_run(workdir, name)
        prepared, why = find_prepared(run.config)
        runs.append(run._replace(prepared=prepared, why_no_pictures=why))
    write_text(output, one_run.page(runs[0]) if len(runs) == 1 else comparison.page(runs))


def write_own_page(workdir: Path, prepared: PreparedSet | None) -> None:
    """Writes a run's report.html, without pictures of volumes where `prepared` is None.

    Never raises, since the page can be made again and a run's results not: what went wrong is
    logged, with its traceback.
    """
    try:
        from lclseg.page import one_run

        run = read_run(workdir, workdir.name, prepared, "they come when the run is finished")
        write_text(workdir / "report.html", one_run.page(run))
    except Exception:
        logger.exception(
            "%s could not be written; the run and its results are not touched by this. To make the "
            "page again: python -m lclseg.report %s",
            workdir / "report.html",
            workdir,
        )


@in_words()
def main(arguments: Sequence[str] | None = None) -> None:
    description = __doc__.partition("\n\n")[2]
    parser = argparse.ArgumentParser("python -m lclseg.report", description=description)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="workdir of a run")
    parser.add_argument(
        "--output", type=Path, help="default: report.html, in the folder of a single run, else here"
    )
    options = parser.parse_args(arguments)
    absl.logging.set_verbosity(absl.logging.ERROR)  # TFDS tells of every grid that it opens
    runs = list(dict.fromkeys(run.expanduser().absolute() for run in options.runs))
    output = options.output or (runs[0] if len(runs) == 1 else Path()) / "report.html"
    write_page(runs, output.expanduser())
    print(output)


if __name__ == "__main__":
    main()
