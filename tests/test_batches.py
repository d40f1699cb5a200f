"""Which slices a batch holds."""

import itertools
import logging
import types

import numpy as np
import pytest

from lclseg.data import batches
from lclseg.data.batches import Pool
from lclseg.data.dataset import PreparedSet, VolumeEntry
from lclseg.data.preprocess import Preprocessing
from lclseg.errors import UserError
from lclseg.methods import contract
from lclseg.methods.local_contrastive import Pairs, draw_pairs

LABELED = np.array([3, 5, 8, 13, 21, 34])
PSEUDO = np.array([100, 104, 109, 116, 125])
COMPOSITION = Pairs(labeled_self=2, pseudo_self=3, labeled_pseudo=4, pseudo_pseudo=5)


def pairs_of(rng):
    return {"pairs": draw_pairs(rng, LABELED, PSEUDO, COMPOSITION)}


def drawn(seed, step, draw=pairs_of):
    return batches.sampler(seed, LABELED, 4, draw)(step)


def assert_same_batch(a, b):
    assert a.keys() == b.keys()
    for group in a:
        np.testing.assert_array_equal(a[group], b[group])


def test_batches_are_a_pure_function_of_seed_and_step():
    """Neither the order of the calls nor NumPy's global state matters."""
    steps = [(seed, step) for seed in (0, 7) for step in range(20)]
    np.random.seed(1)
    first = {s: drawn(*s) for s in steps}
    np.random.seed(2)
    for s in reversed(steps):
        assert_same_batch(drawn(*s), first[s])


@pytest.mark.parametrize("group", ["labeled", "pairs"])
def test_steps_and_seeds_differ(group):
    found = [drawn(seed, step)[group].tolist() for seed in (0, 1) for step in range(20)]
    repeated = sum(a == b for a, b in itertools.combinations(found, 2))
    # Four of six slices in order: 360 batches, of whose 780 pairs two or three coincide by chance.
    assert repeated < 12
    # (seed, step) and not their sum or product.
    assert drawn(0, 1)[group].tolist() != drawn(1, 0)[group].tolist()


def test_labelled_slices_are_the_same_whatever_the_method():
    for step in range(5):
        alone = drawn(3, step, draw=None)
        assert set(alone) == {"labeled"}
        np.testing.assert_array_equal(alone["labeled"], drawn(3, step)["labeled"])


def test_labelled_slices_come_without_replacement():
    found = np.stack([drawn(0, step)["labeled"] for step in range(200)])
    assert all(len(set(batch)) == 4 for batch in found)
    records, counts = np.unique(found, return_counts=True)
    assert records.tolist() == LABELED.tolist()
    assert counts.min() > 100 and counts.max() < 167  # 133 expected, standard deviation 6.7


def test_a_batch_larger_than_the_pool_repeats_slices():
    found = batches.sampler(0, LABELED[:2], 20, None)(0)["labeled"]
    assert found.shape == (20,)
    assert set(found) == {3, 5}
    rng = np.random.default_rng(0)
    assert set(contract.draw_from(PSEUDO, rng, 40)) == set(PSEUDO)
    assert set(contract.draw_from(PSEUDO, rng, 5)) == set(PSEUDO)  # without replacement


@pytest.mark.parametrize("composition", [COMPOSITION, *map(Pairs._make, np.eye(4, dtype=int) * 3)])
def test_composition_of_pairs(composition):
    """Each kind as often as asked for, one pair after the other, members from the right pool."""
    for seed in range(50):
        rng = np.random.default_rng(seed)
        records = draw_pairs(rng, LABELED, PSEUDO, composition)
        assert records.shape == (2 * sum(composition),)
        pairs = records.reshape(-1, 2)
        is_pseudo = np.isin(pairs, PSEUDO)
        np.testing.assert_array_equal(~is_pseudo, np.isin(pairs, LABELED))
        same, num_pseudo = pairs[:, 0] == pairs[:, 1], is_pseudo.sum(axis=1)
        found = [
            (same & (num_pseudo == 0)).sum(),  # a labelled slice against itself
            (same & (num_pseudo == 2)).sum(),
            (num_pseudo == 1).sum(),
            (~same & (num_pseudo == 2)).sum(),  # never the same slice twice
        ]
        assert found == list(composition)


def test_pairs_of_two_pseudo_labelled_slices():
    """With two in the pool every pair holds both, in either order."""
    rng = np.random.default_rng(0)
    pairs = draw_pairs(rng, LABELED, PSEUDO[:2], Pairs(0, 0, 0, 40)).reshape(-1, 2)
    assert {tuple(p) for p in pairs.tolist()} == {(100, 104), (104, 100)}


def test_every_slice_is_drawn_for_pairs():
    found = np.concatenate([drawn(0, step)["pairs"] for step in range(30)])
    assert set(found) == {*LABELED, *PSEUDO}


# Number of classes shown: 4, 3, 3, 2, 1, 1.
POOL = Pool(
    records=np.array([10, 11, 12, 20, 21, 22]),
    class_pixels=np.array(
        [[5, 1, 2, 8], [7, 0, 4, 5], [0, 9, 6, 1], [9, 7, 0, 0], [16, 0, 0, 0], [0, 16, 0, 0]]
    ),
)


@pytest.mark.parametrize(
    ("min_classes", "at_least", "expected"),
    [(4, 1, [10]), (3, 1, [10, 11, 12]), (3, 3, [10, 11, 12]), (2, 4, [10, 11, 12, 20])],
)
def test_slices_with_enough_classes(caplog, min_classes, at_least, expected):
    with caplog.at_level(logging.WARNING, logger="lclseg"):
        found = batches.select_slices(
            POOL, min_classes=min_classes, at_least=at_least, role="views"
        )
    assert found.tolist() == expected
    assert not caplog.records


@pytest.mark.parametrize(
    ("min_classes", "at_least", "expected", "reached"),
    [
        (4, 2, [10, 11, 12], 3),
        (4, 4, [10, 11, 12, 20], 2),
        (3, 4, [10, 11, 12, 20], 2),
        (4, 6, [10, 11, 12, 20, 21, 22], 1),
        (9, 1, [10], 4),
    ],
)
def test_too_few_slices_relax_the_demand_class_by_class(
    caplog, min_classes, at_least, expected, reached
):
    """The most demanding number that leaves enough; one line in the log tells."""
    with caplog.at_level(logging.WARNING, logger="lclseg"):
        found = batches.select_slices(
            POOL, min_classes=min_classes, at_least=at_least, role="pseudo-labelled views"
        )
    assert found.tolist() == expected
    (line,) = caplog.messages
    assert line.startswith("pseudo-labelled views: ")
    assert f"fewer than {at_least} of 6 slices show {min_classes} classes" in line
    assert line.endswith(f"from the {len(expected)} that show {reached}")


@pytest.mark.parametrize(("at_least", "num_found", "reached"), [(1, 1, 2), (2, 4, 0), (4, 4, 0)])
def test_as_many_slices_as_asked_for_even_of_no_class(caplog, at_least, num_found, reached):
    """All but one slice are too uncertain to show any."""
    pool = Pool(np.arange(4), np.array([[9, 7, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]))
    with caplog.at_level(logging.WARNING, logger="lclseg"):
        found = batches.select_slices(pool, min_classes=3, at_least=at_least, role="views")
    assert len(found) == num_found
    assert caplog.messages[0].endswith(f"from the {num_found} that show {reached}")


def test_a_pool_that_is_too_small():
    with pytest.raises(UserError, match="labelled batch: found 6 slices.*at least 7: name more"):
        batches.select_slices(POOL, min_classes=1, at_least=7, role="labelled batch")


@pytest.fixture
def prepared():
    """Three volumes of 3, 4 and 2 slices; class 1 of record r has r pixels."""
    pixels, entries = np.zeros((9, 4), int), {}
    first = 0
    for volume_id, n in {"labelled": 3, "hidden": 4, "other": 2}.items():
        entry = VolumeEntry(volume_id, volume_id, True, first, pixels[first : first + n])
        entries[volume_id] = entry
        pixels[entry.slices, 1] = np.array(entry.slices)
        first += n
    how = Preprocessing(("a", "b", "c"), (1, 2, 3), False, 4, 1.0, 0, None)
    return PreparedSet("fake", entries, types.SimpleNamespace(), how)


def test_ground_truth_pool(prepared):
    pool = batches.ground_truth_pool(prepared, ["other", "labelled"])
    assert pool.records.tolist() == [7, 8, 0, 1, 2]
    assert pool.class_pixels.tolist() == [[0, r, 0, 0] for r in (7, 8, 0, 1, 2)]


def test_records_of_volumes(prepared):
    assert batches.records_of(prepared, ["other", "labelled"]).tolist() == [7, 8, 0, 1, 2]
    assert batches.records_of(prepared, []).tolist() == []
