"""Patient lists -> volumes by role; the lists of every config file."""

import itertools
import runpy
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from lclseg.data.dataset import VolumeEntry
from lclseg.data.splits import Split, SplitError, resolve_split

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))
ROLES = ("labeled", "unlabeled", "validation", "test")


def index_of(*patients, blind=(), two_frames=()):
    """An index with one volume per patient, <patient>_a, or two for those in `two_frames`."""
    ids = [(p, f"{p}_{f}") for p in patients for f in ("ab" if p in two_frames else "a")]
    return {
        volume_id: VolumeEntry(volume_id, patient, patient not in blind, 3 * i, np.ones((3, 2)))
        for i, (patient, volume_id) in enumerate(ids)
    }


VOLUMES = index_of(*"ABCDEFGHIJ")


@pytest.fixture
def data():
    """As configs have it: A..G is the pool, with the labelled and validation patients in it."""
    return ConfigDict(
        {
            "num_labeled": "1",
            "num_validation": -1,
            "split": "c1",
            "splits": {
                "1": {
                    "c1": {"labeled": ("C",), "validation": ("A", "F")},
                    "c2": {"labeled": ("G",), "validation": ("B", "D")},
                },
                "2": {"c1": {"labeled": ("D", "B"), "validation": ("A", "E")}},
            },
            "pool": tuple("ABCDEFG"),
            "test_patients": ("J", "H"),
            **dict.fromkeys(ROLES, ()),
        }
    )


def letters(split):
    """The patients of a split as text, in its order: labelled unlabelled validation test."""
    return " ".join("".join(v.removesuffix("_a") for v in ids) for ids in split)


@pytest.mark.parametrize(
    ("num_labeled", "split", "expected"),
    [("1", "c1", "C BDEG AF JH"), ("1", "c2", "G ACEF BD JH"), ("2", "c1", "DB CFG AE JH")],
)
def test_lists_by_num_labeled_and_split(data, num_labeled, split, expected):
    """In the order of the lists; labelled and validation patients leave the pool."""
    data.num_labeled, data.split = num_labeled, split
    resolved = resolve_split(data, VOLUMES)
    assert isinstance(resolved, Split)
    assert letters(resolved) == expected


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ({"labeled": ("I", "B")}, "IB CDEG AF JH"),
        ({"validation": ("I",)}, "C ABDEFG I JH"),
        ({"test": ("I", "G")}, "C BDE AF IG"),  # a test patient leaves the pool too
        ({"unlabeled": ("I", "B")}, "C IB AF JH"),
        ({"labeled": ("A",), "validation": ("C",)}, "A BDEFG C JH"),
        (dict(zip(ROLES, (("J",), ("I",), ("H",), ("A",)), strict=True)), "J I H A"),
    ],
)
def test_overrides(data, override, expected):
    data.update(override)
    assert letters(resolve_split(data, VOLUMES)) == expected


@pytest.mark.parametrize(
    ("override", "expected"),
    [({}, "C ABDEFG  JH"), ({"labeled": ("B",), "split": "none"}, "B ACDEFG  JH")],
)
def test_without_validation_its_patients_are_in_the_pool(data, override, expected):
    data.update({"num_validation": 0} | override)
    assert letters(resolve_split(data, VOLUMES)) == expected


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_validation": 1}, "num_validation is 1, and data.validation lists 2"),
        ({"num_validation": -2}, "num_validation is -2; wanted 0 or more, or -1"),
        ({"num_validation": 0, "validation": ("A",)}, "num_validation is 0, .* lists 1"),
    ],
)
def test_numbers_of_validation_patients_that_contradict_the_list(data, values, words):
    data.update(values)
    with pytest.raises(SplitError, match=words):
        resolve_split(data, VOLUMES)


def test_own_lists_need_no_split(data):
    data.splits = {}
    data.labeled, data.validation = ("C",), ("A",)
    assert letters(resolve_split(data, VOLUMES)) == "C BDEFG A JH"


@pytest.mark.parametrize(
    "override", [{"num_labeled": "8"}, {"split": "c7"}, {"split": "c7", "labeled": ("A",)}]
)
def test_no_such_split(data, override):
    """The message lists what there is."""
    data.update(override)
    with pytest.raises(SplitError, match=r"no split '(c1|c7)' .*num_labeled=[18]") as caught:
        resolve_split(data, VOLUMES)
    assert "{'1': ['c1', 'c2'], '2': ['c1']}" in str(caught.value)
    assert "set data.labeled and data.validation" in str(caught.value)


@pytest.mark.parametrize("roles", list(itertools.combinations(ROLES, 2)), ids=" and ".join)
def test_a_patient_in_two_roles(data, roles):
    """Refused for lists set by hand; the message names patient and lists."""
    data.update({roles[0]: ("E", "I"), roles[1]: ("B", "I")})
    with pytest.raises(SplitError) as caught:
        resolve_split(data, VOLUMES)
    assert all(word in str(caught.value) for word in ("I", *(f"data.{r}" for r in roles)))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ({"labeled": ("F",)}, ("F", "data.labeled", "data.validation")),
        ({"test": ("J", "C")}, ("C", "data.labeled", "data.test")),
        ({"validation": ("H",)}, ("H", "data.validation", "data.test")),
        ({"unlabeled": ("B", "A")}, ("A", "data.unlabeled", "data.validation")),
        ({"unlabeled": ("J", "B")}, ("J", "data.unlabeled", "data.test")),
        ({"test": ("J", "J")}, ("J", "data.test", "once")),
    ],
)
def test_a_list_set_by_hand_against_one_of_the_config(data, override, words):
    data.update(override)
    with pytest.raises(SplitError) as caught:
        resolve_split(data, VOLUMES)
    assert all(word in str(caught.value) for word in words)


def test_splits_are_by_patient_whatever_the_volumes(data):
    """Both frames of a patient take its role, none of them stays in the pool."""
    entries = index_of(*"ABCDEFGHIJ", two_frames="CEJ")
    split = resolve_split(data, entries)
    assert split.labeled == ("C_a", "C_b")
    assert split.unlabeled == ("B_a", "D_a", "E_a", "E_b", "G_a")
    assert split.test == ("J_a", "J_b", "H_a")


def test_further_frames_of_unlabelled_patients_alone(data):
    """B is unlabelled, C labelled, F validates and J tests; each has two volumes."""
    volumes = index_of(*"ABCDEFGHIJ", two_frames="BCFJ")
    data.frames = "both_in_pool"
    split = resolve_split(data, volumes)
    assert split.unlabeled[:2] == ("B_a", "B_b")
    assert (split.labeled, split.validation, split.test) == (
        ("C_a",),
        ("A_a", "F_a"),
        ("J_a", "H_a"),
    )
    data.frames = "both"
    assert resolve_split(data, volumes).labeled == ("C_a", "C_b")


@pytest.mark.parametrize(
    ("absent", "role", "count"),
    [("C", "labeled", "1 of 1"), ("EG", "unlabeled", "2 of 4"), ("F", "validation", "1 of 2")],
)
def test_patients_that_the_data_set_lacks(data, absent, role, count):
    entries = index_of(*(p for p in "ABCDEFGHIJ" if p not in absent))
    with pytest.raises(SplitError, match=f"{count} {role} patients are not in") as caught:
        resolve_split(data, entries)
    message = str(caught.value)
    assert ", ".join(absent) in message
    assert f"({len(entries)} patients)" in message
    assert f"set data.{role}" in message


@pytest.mark.parametrize(("blind", "role"), [("C", "labeled"), ("F", "validation"), ("HJ", "test")])
def test_volumes_without_ground_truth(data, blind, role):
    entries = index_of(*"ABCDEFGHIJ", blind=blind)
    with pytest.raises(SplitError, match=f"{role} volumes without ground truth: .*{blind[-1]}_a"):
        resolve_split(data, entries)


@pytest.mark.parametrize(("role", "patients"), [("validation", "AF"), ("test", "HJ")])
def test_nothing_is_measured_on_empty_masks_alone(data, role, patients):
    entries = dict(VOLUMES)
    for p in patients:
        assert resolve_split(data, entries)
        nothing = np.stack([np.ones(3), np.zeros(3)], axis=1)
        entries[f"{p}_a"] = entries[f"{p}_a"]._replace(class_pixels=nothing)
    with pytest.raises(SplitError, match=rf"masks of data\.{role} .* show no class at all; set"):
        resolve_split(data, entries)


def test_one_frame_without_ground_truth(data):
    """Of a labelled patient it is in the pool; of one in another role it is left out."""
    entries = index_of(*"ABCDEFGHIJ", two_frames="CJ")
    for name in ("C_b", "J_b"):
        entries[name] = entries[name]._replace(has_label=False)
    split = resolve_split(data, entries)
    assert "C_b" in split.unlabeled and "C_b" not in split.labeled
    assert not any("J_b" in ids for ids in split)
    data.unlabeled = ("B",)
    assert resolve_split(data, entries).unlabeled == ("B_a",)


def test_unlabelled_volumes_need_no_ground_truth(data):
    split = resolve_split(data, index_of(*"ABCDEFGHIJ", blind="BDEGI"))
    assert letters(split) == "C BDEG AF JH"


def test_only_the_pool_may_be_empty(data):
    data.pool = ("A", "C")
    assert letters(resolve_split(data, VOLUMES)) == "C  AF JH"
    data.test_patients = ()
    with pytest.raises(SplitError, match="no test patient is left; set data.test"):
        resolve_split(data, VOLUMES)


@pytest.fixture(params=CONFIGS, ids=lambda path: path.stem)
def config(request):
    return runpy.run_path(str(request.param))["get_config"]()


def test_lists_of_the_config_files(config):
    """Every split: disjoint by patient, as many labelled as it says, validation patients."""
    data = config.data
    patients = {*data.pool, *data.test_patients}
    for splits in data.splits.values():
        for split in splits.values():
            patients |= {*split.labeled, *split.validation}
    entries = index_of(*sorted(patients))
    for num_labeled, splits in data.splits.items():
        for name, split in splits.items():
            data.num_labeled, data.split = num_labeled, name
            resolved = resolve_split(data, entries)
            counts = [len(ids) for ids in resolved]
            assert len(set().union(*resolved)) == sum(counts), (num_labeled, name)
            assert counts[2] == len(split.validation) == (10 if data.image_size == 256 else 2)
            assert counts[3] == len(data.test_patients)
            assert counts[0] == len(split.labeled)
            if num_labeled == "all":  # nobody of the pool is left over
                assert counts[1] == 0
            else:
                assert counts[0] == int(num_labeled)


def test_the_chosen_split_of_a_config_exists(config):
    if config.data.splits:
        assert config.data.split in config.data.splits[config.data.num_labeled]


def parse(*arguments):
    """What the command line makes of configs/phantom.py."""
    values = flags.FlagValues()
    path = next(p for p in CONFIGS if p.stem == "phantom")
    argv = ["program", *arguments]
    config_flags.DEFINE_config_file("config", str(path), flag_values=values, sys_argv=argv)
    values(argv)
    return values.config.data


def numbers(ids):
    return [int(v.removesuffix("_a")[-3:]) for v in ids]


PHANTOMS = index_of(*(f"phantom_{n:03d}" for n in range(64)))


@pytest.mark.parametrize(
    ("arguments", "labeled", "validation", "test"),
    [
        ([], [0], [12, 28], range(44, 64)),
        (["--config.data.num_labeled=2"], [0, 3], [12, 28], range(44, 64)),
        (["--config.data.split=c2"], [1], [5, 24], range(44, 64)),
        (["--config.data.test=('phantom_050','phantom_046')"], [0], [12, 28], [50, 46]),
        (["--config.data.labeled=('phantom_007',)"], [7], [12, 28], range(44, 64)),
        (
            ["--config.data.num_labeled=2", "--config.data.validation=('phantom_009',)"],
            [0, 3],
            [9],
            range(44, 64),
        ),
    ],
)
def test_overrides_on_the_command_line(arguments, labeled, validation, test):
    split = resolve_split(parse(*arguments), PHANTOMS)
    assert numbers(split.labeled) == labeled
    assert numbers(split.validation) == validation
    assert numbers(split.test) == list(test)
    left = [n for n in range(44) if n not in (*labeled, *validation, *test)]
    assert numbers(split.unlabeled) == left


def test_one_unlabelled_patient_on_the_command_line():
    """A tuple of one without its comma is one patient, not eleven letters."""
    split = resolve_split(parse("--config.data.unlabeled=('phantom_020')"), PHANTOMS)
    assert numbers(split.unlabeled) == [20]
