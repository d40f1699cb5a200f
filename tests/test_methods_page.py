"""The page of a sweep: worst volumes by hand, what stands in the chart, and pictures of a run."""

import re

import pytest

from lclseg.page import methods
from lclseg.page.recorded import find_prepared, read_run

DICE = {
    "supervised": [{"a": 0.5, "b": 0.9, "c": 0.7, "d": None}, {"a": 0.7, "b": 0.2, "c": 0.8}],
    "<other>": [{"a": 0.1, "b": 0.3, "c": 0.2}],
}


def test_worst_volumes_by_hand():
    """Means over the runs: a 0.6, b 0.55, c 0.75; d has no value."""
    expected = [("b", 0.55), ("a", 0.6), ("c", 0.75)]
    assert methods.worst_volumes(DICE["supervised"]) == [
        (name, pytest.approx(value)) for name, value in expected
    ]


def test_the_page_tells_means_and_worst_volumes_and_escapes_names():
    cells = [["supervised", "2"], ["<other>", "1"]]
    page = methods.page("ACDC: 1 labelled", ["row", "runs"], cells, DICE, {})
    assert "<h1>ACDC: 1 labelled</h1>" in page
    # Means of the runs' means: (0.7 + 0.56667) / 2, and 0.2.
    assert ">0.633<" in page and ">0.200<" in page
    assert "b 0.55" in page and "a 0.10" in page
    assert "<other>" not in page and "&lt;other&gt;" in page
    assert "No pictures" in page


def test_pictures_of_the_last_weights(tiny_run):
    workdir, results = tiny_run
    first = read_run(workdir, "")
    prepared, why = find_prepared(first.config)
    runs = {name: read_run(workdir, name, prepared, why) for name in ("one", "two")}
    last = list(results["results"].values())[-1]["test_last"]["per_volume"]
    dice = {name: [{v: r["mean_dice"] for v, r in last.items()}] for name in runs}
    page = methods.page("phantom", ["row"], [["one"], ["two"]], dice, runs)
    assert page.count("<figure>") == 1 + 2 * len(last)
    worst = min(last, key=lambda v: last[v]["mean_dice"])
    assert f"<h4>{worst}</h4>" in page
    number = f"{last[worst]['mean_dice']:.2f}"
    assert len(re.findall(rf"<b>(one|two)</b> Dice {number}", page)) >= 2
