"""The report page: hand-made runs, read back by an HTML parser."""

import copy
import dataclasses
import hashlib
import html.parser
import json
import logging
import re
import runpy
import shlex
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from lclseg import report
from lclseg.data import nifti
from lclseg.data.dataset import PreparedSet, VolumeEntry
from lclseg.data.orientation import AS_FILED, Orientation, to_numbers
from lclseg.data.preprocess import Preprocessing
from lclseg.page import comparison, figures, one_run
from lclseg.page.command import reproducing_command
from lclseg.page.recorded import names_of, read_run

ROOT = Path(__file__).parents[1]
HOSTILE = "<script>alert('1')</script>&\"$x_"
CLASSES = ("organ", HOSTILE)
SIZE = 24
SPACING = (1.5, 1.5, 4.0)
# A file can have this name.
TEST_IDS = ("t0", "t1", "<b onclick=1>t&2", "t3")
POOL_IDS = ("u0", "u1")


class Page(html.parser.HTMLParser):
    """Elements, text and tables of a page; an element closed out of turn is an error."""

    VOID = ("meta", "br", "img")

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.texts, self.tables = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        assert len(dict(attributes)) == len(attributes), f"an attribute twice: {attributes}"
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def table(self, first, *, nth=0):
        """Rows of the nth table whose first heading is `first`, as {heading: cell}."""
        found = [t for t in self.tables if t[0][0] == first]
        head, *rows = found[nth]
        assert all(len(row) == len(head) for row in rows)
        return [dict(zip(head, row, strict=True)) for row in rows]


def record(*dices):
    return {
        "dice": dict(zip(CLASSES, dices, strict=True)),
        "mean_dice": sum(dices) / 2,
        "excluded": [],
        "missed": [],
    }


def stage(dices, *, best, hd95, labels=None, steps=(2, 4)):
    """A stage's part of results.json; Dice rises by 0.1 from one test volume to the next."""
    records = {v: record(*(d + 0.1 * k for d in dices)) for k, v in enumerate(TEST_IDS)}
    shift = 0.1 * (len(TEST_IDS) - 1) / 2
    by_class = {c: d + shift for c, d in zip(CLASSES, dices, strict=True)}
    test = {
        "mean_dice": sum(by_class.values()) / 2,
        "mean_hausdorff95_mm": hd95,
        "mean_assd_mm": None,
        "dice_per_class": by_class,
        "hausdorff95_mm_per_class": dict.fromkeys(CLASSES, hd95),
        "assd_mm_per_class": dict.fromkeys(CLASSES),
        "n_volumes": len(TEST_IDS),
        "n_excluded": 0,
        "n_missed": 3,
        "per_volume": records,
    }
    history = [
        {"step": s, "mean_dice": best - 0.1 * k, "dice_per_class": dict.fromkeys(CLASSES, best)}
        for k, s in enumerate(steps)
    ]
    return {
        "test": test,
        "num_steps": steps[-1],
        "best_validation_dice": best,
        "validation": history,
        "pseudo_labels": labels,
        "seconds": {"train": 84.0, "test": 6.0},
    }


def pseudo_report(stage_name, *, true_dice, agreement, digest="", warnings=()):
    return {
        "made_by": {"stage": stage_name, "step": 4},
        "volume_ids": list(POOL_IDS),
        "num_volumes": len(POOL_IDS),
        "gate": {"min_agreement": 0.9, "agreement": {}, "rejected": ["u7", "u8", "u9"]},
        "kept_previous": None,
        "mean_voxels_per_class": dict.fromkeys(CLASSES, 5.0),
        "empty_volumes": [],
        "mean_confidence": 0.912,
        "ignored_fraction": 0.0,
        "dice_with_previous_round": agreement,
        "true_mean_dice": true_dice,
        "true_dice_per_class": dict.fromkeys(CLASSES, true_dice),
        "warnings": list(warnings),
        "labels_sha256": digest,
    }


def config_with(**overrides):
    config = runpy.run_path(str(ROOT / "configs" / "phantom.py"))["get_config"]("local_contrastive")
    config.rounds.update(baseline_steps=4, num_rounds=2, steps_per_round=4)
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in overrides.items()})
    return config


def write_run(workdir, results=None, *, lines=(), **overrides):
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(config_with(**overrides).to_json_best_effort())
    if results is not None:
        (workdir / "results.json").write_text(json.dumps(results))
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return workdir


LINES = [
    {"stage": "baseline", "step": 2, "loss": 0.9, "segmentation_loss": 0.9},
    {"stage": "baseline", "step": 2, "validation_dice": 0.6},
    {"stage": "baseline", "step": 4, "loss": 0.5, "segmentation_loss": 0.5},
    {"stage": "round_1", "step": 2, "loss": 0.7, "segmentation_loss": 0.4, "contrastive_loss": 3.0},
]


def make_results():
    """Baseline and two rounds, the first of them best on validation."""
    return {
        "dataset": "phantom",
        "description": f"of {HOSTILE}",
        "class_names": list(CLASSES),
        "num_labeled": "1",
        "split": "c1",
        "seed": 0,
        "volumes": {
            "labeled": [HOSTILE],
            "unlabeled": list(POOL_IDS),
            "validation": ["v"],
            "test": list(TEST_IDS),
        },
        "versions": {"lclseg": "7.8.9", "jax": "1.2.3"},
        "device": {"kind": "abacus", "platform": "wood", "count": 3},
        "results": {
            "baseline": stage((0.1, 0.3), best=0.6, hd95=12.345),
            "round_1": stage(
                (0.3, 0.5),
                best=0.8,
                hd95=6.5,
                labels=pseudo_report(
                    "baseline", true_dice=0.25, agreement=None, warnings=[f"{HOSTILE} is odd"]
                ),
            ),
            "round_2": stage(
                (0.2, 0.4),
                best=0.7,
                hd95=7.5,
                labels=pseudo_report("round_1", true_dice=0.75, agreement=0.5),
            ),
        },
        "chosen": "round_1",
    }


@pytest.fixture
def results():
    return make_results()


def square(side, first_class, num_slices=3):
    """[S, H, W]: a square that is largest in slice 1, class 2 below `first_class` rows of 1."""
    label = np.zeros((num_slices, SIZE, SIZE), np.uint8)
    for s, smaller in enumerate((4, 0, 2)):
        label[s, 4 : 4 + side - smaller, 6 : 6 + side - smaller] = 2
        label[s, 4 : 4 + min(first_class, side - smaller), 6 : 6 + side - smaller] = 1
    return label


def make_prepared(turn=AS_FILED):
    """Test and pool volumes of three slices; truth is a square of 10 px."""
    records, entries = [], {}
    for volume_id in (*TEST_IDS, *POOL_IDS):
        entries[volume_id] = VolumeEntry(
            volume_id, volume_id, True, len(records), np.zeros((3, 3), int)
        )
        for s, label in enumerate(square(10, 5)):
            records.append(
                {
                    "image": np.full((SIZE, SIZE), 0.1 * s, np.float32),
                    "label": label,
                    "native_label": label,
                    "native_shape": np.array((SIZE, SIZE, 3), np.int32),
                    "affine": np.diag((*SPACING, 1.0)),
                    "orientation": np.array(to_numbers(turn)),
                    "spacing_mm": np.array(SPACING),
                }
            )
    source = types.SimpleNamespace(__getitems__=lambda indices: [records[i] for i in indices])
    how = Preprocessing(CLASSES, (1, 2), False, SIZE, SPACING[0], 0, None)
    return PreparedSet("fake", entries, source, how)


@pytest.fixture
def prepared():
    return make_prepared()


def write_predictions(workdir, sides, turn):
    """A square of sides[stage] for every test volume."""
    for name, side in sides.items():
        for volume_id in TEST_IDS:
            nifti.write_label(
                workdir / "predictions" / name / f"{volume_id}.nii.gz",
                np.moveaxis(square(side, 5), 0, 2),
                np.diag((*SPACING, 1.0)),
                SPACING,
                turn=turn,
            )


def write_pseudo_labels(workdir, sides):
    """By round, a square for each pool volume: {1: (side of u0, side of u1), ...}."""
    for number, of_volumes in sides.items():
        folder = workdir / "pseudo_labels" / f"round_{number}"
        folder.mkdir(parents=True)
        np.save(folder / "labels.npy", np.concatenate([square(s, 5) for s in of_volumes]))
        digest = hashlib.sha256((folder / "labels.npy").read_bytes()).hexdigest()
        made = pseudo_report("baseline", true_dice=0.125, agreement=0.5, digest=digest)
        (folder / "report.json").write_text(json.dumps(made))


def full_run(workdir, turn=AS_FILED):
    """A finished run with everything in it; its files have their axes so."""
    write_run(workdir, make_results(), lines=LINES)
    write_predictions(workdir, {"baseline": 4, "round_1": 8, "round_2": 6}, turn)
    write_pseudo_labels(workdir, {1: (8, 8), 2: (8, 4), 3: (8, 5)})
    return read_run(workdir, "run", make_prepared(turn))


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return one_run.page(full_run(tmp_path_factory.mktemp("full") / "run"))


def test_warnings_of_the_data_stand_at_the_top(tmp_path):
    run = full_run(tmp_path / "run")
    assert 'class="warning"' not in one_run.header(run, "")
    proposal = "mine: 5 images\n  data.image_size = 32\n  WARNING: c<1>: empty\n  WARNING: odd\n"
    (run.workdir / "proposal.txt").write_text(proposal)
    found = one_run.header(run, "")
    assert found.count('<p class="warning">') == 2 and ">c&lt;1&gt;: empty</p>" in found


def test_summary_holds_the_numbers_of_the_results(full):
    rows = Page(full).table("stage")
    assert [row["stage"] for row in rows] == ["baseline", "round 1", "round 2"]
    # Per class the mean over volumes is the first volume's plus 0.15.
    assert [row["organ Dice"] for row in rows] == ["0.250", "0.450", "0.350"]
    assert [row[f"{HOSTILE} Dice"] for row in rows] == ["0.450", "0.650", "0.550"]
    assert [row["test Dice"] for row in rows] == ["0.350", "0.550", "0.450"]
    assert [row["gain"] for row in rows] == ["", "+0.200", "+0.100"]
    assert [row["validation Dice"] for row in rows] == ["0.600", "0.800", "0.700"]
    assert [row["HD95 mm"] for row in rows] == ["12.35", "6.50", "7.50"]
    assert [row["ASSD mm"] for row in rows] == ["-"] * 3
    assert [row["missed"] for row in rows] == ["3"] * 3
    marked = re.findall(r'<tr class="marked"><th scope="row">([^<]*)', full)
    assert set(marked) == {"round 1"}
    distances = Page(full).table("stage", nth=1)
    assert distances[1]["organ HD95 mm"] == "6.50"


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        (["organ"], "where of organ the largest connected component alone is kept, as lclseg"),
        ([], "were kept; for this run lclseg.predict keeps every one."),
    ],
)
def test_largest_components_stand_beside_the_rest(tmp_path, results, kept, words):
    for result in (results["results"]["baseline"], results["results"]["round_1"]):
        result["test"]["largest_component"] = result["test"] | {"mean_dice": 0.875}
    workdir = write_run(tmp_path / "run", results)
    (workdir / "postprocessing.json").write_text(json.dumps({"largest_component": kept}))
    read = Page(one_run.page(read_run(workdir, "run")))
    column = [row["one-piece Dice"] for row in read.table("stage")]
    assert column == ["0.875", "0.875", "-"]
    assert [row["test Dice"] for row in read.table("stage")] == ["0.350", "0.550", "0.450"]
    assert words in read.text


def test_runs_that_tested_no_largest_component_have_no_such_column(full):
    assert "argest component" not in Page(full).text


def test_a_run_without_test_volumes_says_so_once(tmp_path, results):
    """As of own data with two or three masks: no columns and charts of nothing."""
    for result in results["results"].values():
        result["test"] |= {"per_volume": {}, "mean_dice": None, "n_volumes": 0}
    page = one_run.page(read_run(write_run(tmp_path / "run", results), "run"))
    rows = Page(page).table("stage")
    assert [list(row) for row in rows] == [["stage", "validation Dice"]] * 3
    assert [row["validation Dice"] for row in rows] == ["0.600", "0.800", "0.700"]
    assert page.count("no test volumes") == 1 and "Dice of each test volume" not in page


def test_other_tables(full):
    read = Page(full)
    by_volume = read.table("volume")
    assert [row["volume"] for row in by_volume] == list(TEST_IDS)
    assert [row["round 2"] for row in by_volume] == ["0.300", "0.400", "0.500", "0.600"]
    labels = read.table("used by")
    # The folders hold a third set, and their reports count, not those in results.json.
    assert [row["used by"] for row in labels] == ["round 1", "round 2", "after round 2"]
    assert {row["true Dice"] for row in labels} == {"0.125"}
    assert {(row["volumes kept"], row["rejected"]) for row in labels} == {("2", "3")}
    assert {(r["confidence"], r["Dice with round before"]) for r in labels} == {("0.912", "0.500")}


def test_pseudo_labels_without_their_folders(tmp_path, results):
    run = read_run(write_run(tmp_path / "run", results), "run", None, "no data here")
    read = Page(one_run.page(run))
    assert [row["true Dice"] for row in read.table("used by")] == ["0.250", "0.750"]
    assert [row["Dice with round before"] for row in read.table("used by")] == ["-", "0.500"]
    assert f"round 1: {HOSTILE} is odd" in read.text


def test_origin(full):
    read = Page(full)
    for text in ("7.8.9", "jax 1.2.3", "3 x abacus (wood)", "baseline 1.5 min", "UTC"):
        assert text in read.text
    assert (
        "python -m lclseg.main --config=configs/phantom.py:local_contrastive \\ --config.rounds"
        in read.text
    )
    assert '"baseline_steps": 4' in read.text


def test_page_is_whole_in_itself(full):
    read = Page(full)  # every element is closed in turn
    ids = [a["id"] for _, a in read.elements if "id" in a]
    assert len(ids) == len(set(ids)) > 0
    links = [a[k] for _, a in read.elements for k in ("src", "href", "xlink:href") if k in a]
    assert any(link.startswith("data:image/png;base64,") for link in links)
    links += re.findall(r"url\(([^)]*)\)", full)
    for link in links:
        assert link.startswith("data:image/png;base64,") or link.removeprefix("#") in ids
    assert not re.search(r"https?:|//[a-z]|@import", re.sub(r"data:[^\"]*", "", full))
    assert {"svg", "figure", "details"} <= {tag for tag, _ in read.elements}


def test_text_from_data_is_no_markup(full):
    read = Page(full)
    assert not {"script", "img", "iframe"} & {tag for tag, _ in read.elements}
    assert not [a for _, a in read.elements if any(name.startswith("on") for name in a)]
    assert f"{HOSTILE} Dice" in read.text
    assert f"of {HOSTILE}" in read.text
    assert "<b onclick=1>t&2" in read.text


def test_names_of_runs_and_reasons_are_no_markup(tmp_path, results):
    results["results"] = {"baseline": results["results"]["baseline"]}
    workdirs = [write_run(tmp_path / n, results) for n in ("a", "b<i>")]
    read = Page(comparison.page([read_run(w, w.name, None, HOSTILE) for w in workdirs]))
    assert "b<i>" in read.text and f"No pictures: {HOSTILE}" in read.text
    assert "script" not in {tag for tag, _ in read.elements}


def test_figures_write_text_as_it_is():
    svg = figures.strip_chart({HOSTILE: [0.5, None]}, y_limits=(0, 1), num_places=9)
    assert HOSTILE in Page(svg).text and "<script" not in svg


def test_light_and_dark(full):
    light, dark = re.findall(r":root \{(.*?)\}", full, re.S)
    assert "@media (prefers-color-scheme: dark) { :root {" in full
    used = set(re.findall(r"var\((--[\w-]+)", full)) - {"--key"}
    assert {"--ink", "--muted", "--rule", "--c0"} <= used
    assert used <= set(re.findall(r"(--[\w-]+):", light))
    assert used - {"--font"} <= set(re.findall(r"(--[\w-]+):", dark))
    charts = re.findall(r"<svg.*?</svg>", full, re.S)
    fixed = {c for svg in charts if "<image" not in svg for c in re.findall(r"#[0-9a-f]{6}", svg)}
    assert not fixed, "a chart has a colour that does not change with the theme"


@pytest.fixture
def drawn(monkeypatch):
    """What overlays are drawn of, in the order of the page."""
    calls = []

    def overlay(image, *, filled, outlined):
        calls.append((image, filled, outlined))
        return "<svg></svg>"

    monkeypatch.setattr(figures, "overlay", overlay)
    return calls


@pytest.mark.parametrize("turn", [AS_FILED, Orientation((2, 0, 1), (False, True, False))])
def test_pictures_of_test_volumes(turn, drawn, tmp_path):
    text = one_run.page(full_run(tmp_path / "run", turn))
    headings = re.findall(r"<h4>(\w+): ([^<]*)</h4>", text)
    assert headings == [
        ("Best", "t3"),
        ("Median", "&lt;b onclick=1&gt;t&amp;2"),
        ("Worst", "t0"),
    ]
    sides = (4, 8, 6) * 3  # of each volume: baseline, the chosen round, the last one
    for side, (image, filled, outlined) in zip(sides, drawn, strict=False):
        assert (image == np.float32(0.1)).all()  # slice 1 has most foreground
        assert np.count_nonzero(filled) == 100 and np.count_nonzero(outlined) == side**2
        assert np.count_nonzero(outlined == 1) == side * min(side, 5)
        assert image.shape == filled.shape == outlined.shape
        assert 10 <= image.shape[0] == image.shape[1] < SIZE


def test_pictures_of_pseudo_labels_start_with_the_volume_that_changed_most(drawn, tmp_path):
    text = one_run.page(full_run(tmp_path / "run"))
    headings = re.findall(r"<h5>([^<]*)</h5>", text)
    assert headings == ["u1", "u0"]
    of_pool = drawn[9:]  # after three test volumes by three stages
    assert [np.count_nonzero(outlined) for _, _, outlined in of_pool[:3]] == [64, 16, 25]
    image, filled, _ = of_pool[0]
    assert (image == np.float32(0.1)).all() and np.count_nonzero(filled) == 100
    # Squares of 8 and 4, slice by slice, of class 1 up to row 5.
    before, after = square(8, 5), square(4, 5)
    dices = [
        2 * np.sum((before == k) & (after == k)) / (np.sum(before == k) + np.sum(after == k))
        for k in (1, 2)
    ]
    assert f"Dice with the round before {np.mean(dices):.2f}" in text
    assert "Dice with the round before 1.00" in text


def test_no_hidden_truth(drawn, tmp_path, results, prepared):
    for name in ("round_1", "round_2"):
        labels = results["results"][name]["pseudo_labels"]
        labels["true_mean_dice"] = None
        labels["true_dice_per_class"] = dict.fromkeys(CLASSES)
    entries = {v: e._replace(has_label=v in TEST_IDS) for v, e in prepared.volumes.items()}
    unlabelled = dataclasses.replace(prepared, volumes=entries)
    workdir = write_run(tmp_path / "run", results)
    write_pseudo_labels(workdir, {1: (8, 8), 2: (8, 4)})
    for path in workdir.glob("pseudo_labels/*/report.json"):
        stored = json.loads(path.read_text())
        path.write_text(json.dumps(stored | {"true_mean_dice": None, "true_dice_per_class": {}}))
    read = Page(one_run.page(read_run(workdir, "run", unlabelled)))
    assert "No true Dice" in read.text
    assert drawn[0][1] is None
    assert "There is no predictions/round_1/t3.nii.gz any more." in read.text


def test_labels_that_are_not_those_of_the_report(tmp_path, results, prepared):
    workdir = write_run(tmp_path / "run", results)
    write_pseudo_labels(workdir, {1: (8, 8), 2: (8, 4)})
    np.save(workdir / "pseudo_labels" / "round_2" / "labels.npy", np.zeros(3))
    read = Page(one_run.page(read_run(workdir, "run", prepared)))
    assert "is missing or not what was written" in read.text


def test_run_that_has_only_begun(tmp_path):
    workdir = write_run(tmp_path / "run", lines=LINES[:2])
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "base')
    read = Page(one_run.page(read_run(workdir, "run")))
    assert "Not finished: no stage done" in read.text
    assert "last step 2 of baseline" in read.text
    assert "None are made yet." in read.text
    assert "Validation Dice" in read.text  # of the lines: results.json is not there


def test_run_before_its_first_line(tmp_path):
    read = Page(one_run.page(read_run(write_run(tmp_path / "run"), "run")))
    assert "Nothing is logged yet." in read.text


def test_run_between_rounds(tmp_path, results):
    del results["results"]["round_2"], results["chosen"]
    workdir = write_run(tmp_path / "run", results, lines=LINES)
    read = Page(one_run.page(read_run(workdir, "run", None, "they come later")))
    assert "Not finished: baseline, round 1 done" in read.text
    assert "No pictures: they come later." in read.text
    assert [row["stage"] for row in read.table("stage")] == ["baseline", "round 1"]


def test_curves_join_the_stages(monkeypatch, tmp_path, results):
    charts = []

    def line_chart(lines, **options):
        charts.append((lines, options))
        return "<svg></svg>"

    monkeypatch.setattr(figures, "line_chart", line_chart)
    lines = [*LINES, {"stage": "round_1", "step": 4, "loss": 0.6, "consistency_loss": 0.125}]
    one_run.page(read_run(write_run(tmp_path / "run", results, lines=lines), "run", None, "-"))
    (loss, segmentation, consistency), options = charts[0]
    points = {x: y for x, y in zip(loss.x, loss.y, strict=True) if not np.isnan(y)}
    assert points == {2: 0.9, 4: 0.5, 6: 0.7, 8: 0.6}  # round 1 begins after 4 steps
    assert 0.4 in segmentation.y
    # A term of whatever method; the contrastive one has a chart of its own.
    assert consistency.name == "consistency loss" and 0.125 in consistency.y
    assert list(options["marks"]) == [(4, "round 1"), (8, "round 2")]
    *_, mean, best = charts[1][0]
    assert list(zip(best.x, best.y, strict=True)) == [(2, 0.6), (6, 0.8), (10, 0.7)]
    known = [(x, y) for x, y in zip(mean.x, mean.y, strict=True) if not np.isnan(y)]
    assert [x for x, _ in known] == [2, 4, 6, 8, 10, 12]
    assert known[2][1] == 0.8


def test_comparison(tmp_path, results):
    other = copy.deepcopy(results)
    other["results"] = {"baseline": other["results"]["baseline"]}
    other["chosen"] = "baseline"
    workdirs = [
        write_run(tmp_path / "exp" / "joint" / "seed0", results, lines=LINES),
        write_run(
            tmp_path / "exp" / "alone" / "seed0", other, lines=LINES[:3], rounds__num_rounds=0
        ),
        write_run(tmp_path / "exp" / "begun" / "seed0", lines=LINES[:1]),
    ]
    output = tmp_path / "compared.html"
    report.main([*map(str, workdirs), f"--output={output}"])
    text = output.read_text()
    read = Page(text)
    rows = read.table("run")
    assert [row["run"] for row in rows] == ["joint", "alone", "begun"]
    assert [row["baseline"] for row in rows] == ["0.350", "0.350", "-"]
    assert [row["round 1"] for row in rows] == ["0.550", "", "-"]
    assert [row["chosen"] for row in rows] == ["round 1", "baseline", "no stage is finished"]
    assert [row["its test Dice"] for row in rows] == ["0.550", "0.350", ""]
    assert [row["gain"] for row in rows] == ["+0.200", "", ""]
    differing = read.table("run", nth=1)
    assert [row["rounds.num_rounds"] for row in differing] == ["2", "0", "2"]
    articles = [a["id"] for tag, a in read.elements if tag == "article"]
    assert articles == ["run-0", "run-1", "run-2"]
    assert "A run without rounds makes none." in read.text
    ids = [a["id"] for _, a in read.elements if "id" in a]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    "paths, names",
    [
        (["/a/x"], ["x"]),
        (["/a/x/s0", "/a/y/s0"], ["x", "y"]),
        (["/a/x/s0", "/a/x/s1"], ["s0", "s1"]),
        (["/a/x/s0", "/a/y/s1"], ["x/s0", "y/s1"]),
        (["/a/x", "/a/x/y"], ["x", "y"]),
    ],
)
def test_names_of_runs(paths, names):
    assert names_of([Path(p) for p in paths]) == names


def test_command_line(tmp_path, results, capsys):
    """A run's own page lies in its folder; what this machine has not prepared is said."""
    workdir = write_run(
        tmp_path / "run", results, lines=LINES, data__data_dir=str(tmp_path / "nothing")
    )
    report.main([str(workdir)])
    assert capsys.readouterr().out == f"{workdir / 'report.html'}\n"
    assert not (tmp_path / "nothing").exists()
    read = Page((workdir / "report.html").read_text())
    assert "data set phantom is not prepared in" in read.text
    with pytest.raises(SystemExit, match=r"holds no run: there is no config\.json"):
        report.main([str(tmp_path)])


def test_a_page_that_fails_is_told_and_raises_nothing(tmp_path, results, monkeypatch, caplog):
    workdir = write_run(tmp_path / "run", results)

    def page_of(runs):
        raise ZeroDivisionError("somewhere in the page")

    monkeypatch.setattr(one_run, "page", page_of)
    with caplog.at_level(logging.ERROR, "lclseg"):
        report.write_own_page(workdir, None)
    assert f"python -m lclseg.report {workdir}" in caplog.text
    assert "Traceback" in caplog.text and "somewhere in the page" in caplog.text
    assert not (workdir / "report.html").exists()


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"seed": 3, "method.temperature": 0.25, "rounds.fresh_heads": True},
        {"method.pixels_per_class": 3, "method.matching": "batch"},
        {"data.manual_dir": "/a folder/it's", "data.test": ("p'1", "p 2"), "data.labeled": ("p3",)},
        {
            "model.filters": (4, 8),
            "method.pairs.pseudo_self": 2,
            "augment.scale_range": (0.5, 2.0),
        },
    ],
)
def test_command_gives_the_config_again(overrides, monkeypatch):
    config = runpy.run_path(str(ROOT / "configs" / "phantom.py"))["get_config"]("local_contrastive")
    config.update_from_flattened_dict(overrides)
    command = reproducing_command(json.loads(config.to_json_best_effort()))
    python, module, name, *arguments = shlex.split(command.replace("\\\n", ""))
    assert (python, module, name) == ("python", "-m", "lclseg.main")
    assert len(arguments) == 1 + len(overrides)
    arguments[0] = arguments[0].replace("configs/", f"{ROOT}/configs/")
    monkeypatch.setattr(sys, "argv", ["lclseg", *arguments])  # where ml_collections looks
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    values(sys.argv)
    assert values.config.to_json_best_effort() == config.to_json_best_effort()


@pytest.mark.parametrize("name", ["nothing_of_the_kind", "../tests/conftest", ""])
def test_no_command_for_a_config_of_elsewhere(name):
    config = json.loads(config_with().to_json_best_effort())
    config["data"]["name"] = name
    assert reproducing_command(config) is None


def test_no_command_for_what_no_flag_can_set():
    config = json.loads(config_with().to_json_best_effort())
    assert reproducing_command(config) is not None
    config["method"]["pixels_per_class"] = None
    assert reproducing_command(config) is None
    config = json.loads(config_with().to_json_best_effort())
    config["loss"]["mapping"] = "x"  # as of another version
    assert reproducing_command(config) is None
    config = json.loads(config_with().to_json_best_effort())
    command = reproducing_command(config)
    del config["method"]["matching"]  # as of a version before there was the key
    assert reproducing_command(config) == command


def test_training_does_not_load_matplotlib():
    code = "import sys, lclseg.train; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
