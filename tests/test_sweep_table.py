"""A sweep's tables, worked by hand."""

import pytest
from sweep_results import fake_result

from lclseg import sweep_table

ROWS = ("supervised", "inter, 3 anchors", "every pixel", "not run yet")
PAIRS = (("c1", 0), ("c2", 7), ("c3", 8))
RESULTS = {
    ("supervised", "c1", 0): fake_result(0.70),
    ("supervised", "c2", 7): fake_result(0.80),
    ("inter, 3 anchors", "c1", 0): fake_result(0.6, 0.75, chosen="round_1"),
    ("inter, 3 anchors", "c2", 7): fake_result(0.6, 0.87),
    ("every pixel", "c2", 7): fake_result(0.6, 0.9, component=0.05),
}


def test_mean_and_interval_by_hand():
    # t(0.975, 2 degrees of freedom) = 4.302653; standard deviation 1, over sqrt(3).
    assert sweep_table.mean_and_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2.484138))
    assert sweep_table.mean_and_interval([0.5]) == (0.5, None)


def test_tables_by_hand():
    text = sweep_table.markdown(ROWS, PAIRS, RESULTS, "supervised")
    means, by_pair, gains, by_stage = (table.splitlines() for table in text.split("\n\n"))
    assert means[0] == (
        "| row | runs | last weights | largest component | gain over supervised | chosen | RV | LV "
        "| HD95 | HD95, largest component | seconds | 1000 slices |"
    )
    # t(0.975, 1) = 12.7062, times half the difference of two values.
    assert means[2:] == [
        "| supervised | 2 | 0.750 ± 0.635 | 0.770 ± 0.635 |  | 0.700 ± 0.635 | 0.670 | 0.870 "
        "| 7.5 | 7.7 | 60 | 2.0 |",
        "| inter, 3 anchors | 2 | 0.810 ± 0.762 | 0.830 ± 0.762 | +0.060 ± 0.127 | 0.625 ± 0.953 "
        "| 0.730 | 0.930 | 8.1 | 8.3 | 120 | 4.0 |",
        "| every pixel | 1 | 0.900 | 0.950 | +0.130 | 0.550 | 0.850 | 1.050 "
        "| 9.0 | 9.5 | 120 | 4.0 |",
    ]
    assert by_pair == [
        "| row | c1 | c2 |",
        "| --- | --- | --- |",
        "| supervised | 0.720 | 0.820 |",
        "| inter, 3 anchors | 0.770 | 0.890 |",
        "| every pixel |  | 0.950 |",
    ]
    assert gains == [
        "| gain over supervised | c1 | c2 | mean | every component counted | chosen |",
        "| --- | --- | --- | --- | --- | --- |",
        "| inter, 3 anchors | +0.050 | +0.070 | +0.060 ± 0.127 | +0.060 ± 0.127 | -0.075 ± 1.588 |",
        "| every pixel |  | +0.130 | +0.130 | +0.100 | -0.200 |",
    ]
    assert by_stage[0].startswith("| row | split | seed | last weights, largest component, by ")
    assert by_stage[4] == "| inter, 3 anchors | c1 | 0 | 0.620 -> 0.770 | round_1 |"
    assert by_stage[6:] == ["| every pixel | c2 | 7 | 0.650 -> 0.950 | baseline |"]


def test_gains_over_another_row():
    head, lines = sweep_table.table(ROWS, PAIRS, RESULTS, "inter, 3 anchors")
    assert head[4] == "gain over inter, 3 anchors"
    assert [line[4] for line in lines] == ["-0.060 ± 0.127", "", "+0.060"]


def test_pairs_of_one_split_are_told_apart_by_their_seeds():
    results = {("a", "c1", 0): fake_result(0.5), ("a", "c1", 1): fake_result(0.6)}
    head, lines = sweep_table.by_pair(["a"], [("c1", 1), ("c1", 0)], results)
    assert head == ["row", "c1, seed 1", "c1, seed 0"]
    assert lines == [["a", "0.620", "0.520"]]


def test_no_result_yet():
    assert sweep_table.markdown(ROWS, PAIRS, {}, "supervised") == "no finished run yet"
