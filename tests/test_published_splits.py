"""The paper's patient lists, typed a second time the other way round: by patient, not by split."""

import importlib
import runpy
from pathlib import Path

import numpy as np
import pytest

from lclseg.data.dataset import VolumeEntry
from lclseg.data.splits import resolve_split

CONFIGS = Path(__file__).parent.parent / "configs"
NAMES = ("acdc", "prostate", "mmwhs")

# patient: "num_labeled split" in which it is labelled; "8*": in every one with eight.
LABELED_IN = {
    "acdc": {
        "patient002": "1c1 2c2 2c4 2c5 8*",
        "patient003": "8c1 8c3",
        "patient022": "1c4 2c4 8*",
        "patient023": "8c1 8c3",
        "patient042": "1c2 2c1 2c2 2c3 8*",
        "patient043": "8c1 8c2",
        "patient062": "1c5 2c1 8*",
        "patient063": "8c2",
        "patient094": "8c2 8c3",
        "patient095": "1c3 2c3 2c5 8*",
    },
    "prostate": {
        "prostate_00": "1c4 2c1 2c5 8c1 8c3",
        "prostate_01": "1c1 2c1 2c3 8c1 8c3",
        "prostate_02": "1c2 2c3 8c1 8c2",
        "prostate_04": "1c5 2c4 8c1 8c2",
        "prostate_06": "1c3 8*",
        "prostate_07": "2c5 8*",
        "prostate_10": "2c4 8*",
        "prostate_16": "8c1 8c2",
        "prostate_17": "8c3",
        "prostate_18": "8c2 8c3",
        "prostate_21": "2c2 8c2",
        "prostate_24": "2c2 8c3",
    },
    "mmwhs": {
        "1001": "1c4 2c1 8c1 8c3",
        "1002": "2c3 8c2",
        "1003": "1c1 2c1 8*",
        "1004": "8*",
        "1005": "8c2 8c3",
        "1006": "1c2 2c3 8*",
        "1007": "2c4 8c1 8c2",
        "1008": "1c3 2c2 8c1 8c3",
        "1009": "1c5 2c2 8*",
        "1010": "2c4 8*",
    },
}
ACDC_PAIR_B = "1c2 2c1 2c3 8c2"
ACDC_PAIR_A = "1c1 1c3 1c4 1c5 2c2 2c4 2c5 8c1 8c3"
VALIDATION_IN = {
    "acdc": {
        "patient011": ACDC_PAIR_A,
        "patient071": ACDC_PAIR_A,
        "patient031": ACDC_PAIR_B,
        "patient072": ACDC_PAIR_B,
    },
    "prostate": {
        "prostate_13": "1c1 1c4 2c1 2c4 8c1",
        "prostate_14": "1c1 1c4 2c1 2c4 8c1",
        "prostate_17": "1c2 2c2 8c2",
        "prostate_20": "1c2 2c2 8c2",
        "prostate_25": "1c3 1c5 2c3 2c5 8c3",
        "prostate_28": "1c3 1c5 2c3 2c5 8c3",
    },
    "mmwhs": {
        "1001": "1c2 2c3 8c2",
        "1002": "1c1 1c3 1c4 1c5 2c1 2c2 8c1 8c3",
        "1004": "2c4",
        "1005": "1c1 1c4 2c1 8c1",
        "1007": "1c3 1c5 2c2 8c3",
        "1008": "1c2 2c3 2c4 8c2",
    },
}
# Patients of the archive in neither pool nor test list.
ACDC_OTHERS = (
    "011 013 014 015 016 031 032 033 034 035 036 051 052 053 054 055 056 071 073 074 075 076 091 "
    "092 093 094 095 096"
)
ARCHIVE = {
    "acdc": {f"patient{n:03d}" for n in range(1, 101)},
    # The 32 labelled volumes of the archive; its 16 others have no label.
    "prostate": {
        f"prostate_{n:02d}"
        for n in set(range(48)) - {3, 5, 8, 9, 11, 12, 15, 19, 22, 23, 26, 27, 30, 33, 36, 45}
    },
    "mmwhs": {str(n) for n in range(1001, 1021)},
}
# Slips of one patient id in the pool lists would show here: unlabelled volumes left, by hand.
NUM_UNLABELED = {
    "acdc": {
        "1": {"c1": 51, "c2": 50, "c3": 52, "c4": 51, "c5": 51},
        "2": {"c1": 49, "c2": 50, "c3": 50, "c4": 50, "c5": 51},
        "8": {"c1": 45, "c2": 45, "c3": 46},
        "all": dict.fromkeys(("c1", "c2", "c3", "c4", "c5"), 0),
    },
    "prostate": {
        "1": dict.fromkeys(("c1", "c2", "c3", "c4", "c5"), 14),
        "2": dict.fromkeys(("c1", "c2", "c3", "c4", "c5"), 13),
        "8": dict.fromkeys(("c1", "c2", "c3"), 7),
        "all": dict.fromkeys(("c1", "c2", "c3", "c4", "c5"), 0),
    },
    "mmwhs": {
        "1": dict.fromkeys(("c1", "c2", "c3", "c4", "c5"), 7),
        "2": dict.fromkeys(("c1", "c2", "c3", "c4"), 6),
        "8": dict.fromkeys(("c1", "c2", "c3"), 0),
        "all": dict.fromkeys(("c1", "c2", "c3"), 0),
    },
}


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def data(name):
    return runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]().data


def by_patient(data, role):
    """{patient: set of "num_labeled split"} for the splits with 1, 2 and 8 labelled volumes."""
    found = {}
    for n in ("1", "2", "8"):
        for c, split in data.splits[n].items():
            for patient in split[role]:
                found.setdefault(patient, set()).add(n + c)
    return found


def expand(table):
    return {
        patient: set(splits.replace("8*", "8c1 8c2 8c3").split())
        for patient, splits in table.items()
    }


def test_labeled_patients(name, data):
    assert by_patient(data, "labeled") == expand(LABELED_IN[name])


def test_validation_patients(name, data):
    assert by_patient(data, "validation") == expand(VALIDATION_IN[name])


def test_sizes(name, data):
    assert {n: set(s) for n, s in data.splits.items()} == {
        n: set(s) for n, s in NUM_UNLABELED[name].items()
    }
    for n, splits in data.splits.items():
        for split in splits.values():
            assert len(set(split.validation)) == len(split.validation) == 2
            if n != "all":
                assert len(set(split.labeled)) == len(split.labeled) == int(n)


def test_pool_and_test_list_of_acdc():
    data = runpy.run_path(str(CONFIGS / "acdc.py"))["get_config"]().data
    assert len(data.pool) == len(set(data.pool)) == 52
    assert {int(p[-3:]) for p in data.test_patients} == {
        d + u for d in (0, 20, 40, 60, 80) for u in (7, 8, 9, 10)
    }
    others = {f"patient{n}" for n in ACDC_OTHERS.split()}
    assert others == ARCHIVE["acdc"] - set(data.pool) - set(data.test_patients)


@pytest.mark.parametrize(("name", "in_pool", "in_test"), [("prostate", 17, 15), ("mmwhs", 10, 10)])
def test_pool_and_test_list_are_the_whole_archive(name, in_pool, in_test):
    data = runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]().data
    assert (len(data.pool), len(data.test_patients)) == (in_pool, in_test)
    assert {*data.pool, *data.test_patients} == ARCHIVE[name]
    assert min(data.test_patients) > max(data.pool)


def test_upper_bound(name, data):
    everyone = ARCHIVE[name] - set(data.test_patients)
    like = "8" if name == "mmwhs" else "1"
    for c, split in data.splits["all"].items():
        assert split.validation == data.splits[like][c].validation
        assert set(split.labeled) == everyone - set(split.validation)
        assert len(split.labeled) == {"acdc": 78, "prostate": 15, "mmwhs": 8}[name]


def test_every_split_resolves(name, data):
    """Through the code that runs use: no patient in two roles, none that the archive lacks."""
    entries = {
        p: VolumeEntry(p, p, True, i, np.ones((1, 2), int))
        for i, p in enumerate(sorted(ARCHIVE[name]))
    }
    for n, splits in NUM_UNLABELED[name].items():
        for c, num_unlabeled in splits.items():
            data.num_labeled, data.split = n, c
            split = resolve_split(data, entries)
            assert len(split.unlabeled) == num_unlabeled, (n, c)
            held = [set(s) for s in split]
            assert len(set.union(*held)) == sum(map(len, held)), (n, c)


@pytest.mark.parametrize(
    ("name", "image_size", "spacing_mm", "num_classes", "min_classes"),
    [("acdc", 192, 1.36719, 4, 3), ("prostate", 192, 0.625, 3, 2), ("mmwhs", 160, 1.5, 8, 3)],
)
def test_grid_and_classes(name, image_size, spacing_mm, num_classes, min_classes):
    config = runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]()
    data = config.data
    assert data.name == name
    assert (data.image_size, data.target_spacing_mm) == (image_size, spacing_mm)
    assert data.min_classes == min_classes
    builder = importlib.import_module(f"tfds_builders.{name}.{name}_dataset_builder")
    assert len(builder.CLASS_NAMES) + 1 == num_classes
    # The paper's schedule, which the docstrings promise.
    rounds = config.rounds
    assert (rounds.baseline_steps, rounds.num_rounds, rounds.steps_per_round) == (5000, 3, 5000)
