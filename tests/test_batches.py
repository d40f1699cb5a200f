"""Which slices a batch holds, what is read for them, and reading ahead."""

import itertools
import logging
import threading
import types
from pathlib import Path

import numpy as np
import pytest

from lclseg.data import batches
from lclseg.data.batches import PairComposition, Pool
from lclseg.data.dataset import PreparedSet, VolumeEntry
from lclseg.data.preprocess import Preprocessing
from lclseg.pseudo_labels import PseudoLabels

LABELED = np.array([3, 5, 8, 13, 21, 34])
PSEUDO = np.array([100, 104, 109, 116, 125])
COMPOSITION = PairComposition(labeled_self=2, pseudo_self=3, labeled_pseudo=4, pseudo_pseudo=5)


def draw_labeled(seed, step):
    return batches.draw_labeled(seed, step, LABELED, 4)


def draw_pairs(seed, step):
    return np.concatenate(batches.draw_pairs(seed, step, LABELED, PSEUDO, COMPOSITION), 1)


@pytest.mark.parametrize("draw", [draw_labeled, draw_pairs])
def test_batches_are_a_pure_function_of_seed_and_step(draw):
    """Neither the order of the calls nor NumPy's global state matters."""
    steps = [(seed, step) for seed in (0, 7) for step in range(20)]
    np.random.seed(1)
    first = {s: draw(*s) for s in steps}
    np.random.seed(2)
    for s in reversed(steps):
        np.testing.assert_array_equal(draw(*s), first[s])


@pytest.mark.parametrize("draw", [draw_labeled, draw_pairs])
def test_steps_and_seeds_differ(draw):
    drawn = [draw(seed, step).tolist() for seed in (0, 1) for step in range(20)]
    repeated = sum(a == b for a, b in itertools.combinations(drawn, 2))
    # Four of six slices in order: 360 batches, of whose 780 pairs two or three coincide by chance.
    assert repeated < 12
    # (seed, step) and not their sum or product.
    assert draw(0, 1).tolist() != draw(1, 0).tolist()


def test_labelled_slices_come_without_replacement():
    drawn = np.stack([draw_labeled(0, step) for step in range(200)])
    assert all(len(set(batch)) == 4 for batch in drawn)
    records, counts = np.unique(drawn, return_counts=True)
    assert records.tolist() == LABELED.tolist()
    assert counts.min() > 100 and counts.max() < 167  # 133 expected, standard deviation 6.7


def test_a_batch_larger_than_the_pool_repeats_slices():
    drawn = batches.draw_labeled(0, 0, LABELED[:2], 20)
    assert drawn.shape == (20,)
    assert set(drawn) == {3, 5}


@pytest.mark.parametrize(
    "composition", [COMPOSITION, *map(PairComposition._make, np.eye(4, dtype=int) * 3)]
)
def test_composition_of_pairs(composition):
    """Each kind as often as asked for, members from the right pool, marked as what they are."""
    for step in range(50):
        pairs, is_pseudo = batches.draw_pairs(0, step, LABELED, PSEUDO, composition)
        assert pairs.shape == is_pseudo.shape == (sum(composition), 2)
        assert is_pseudo.dtype == bool
        np.testing.assert_array_equal(is_pseudo, np.isin(pairs, PSEUDO))
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
    composition = PairComposition(0, 0, 0, 40)
    pairs, _ = batches.draw_pairs(0, 0, LABELED, PSEUDO[:2], composition)
    assert {tuple(p) for p in pairs.tolist()} == {(100, 104), (104, 100)}


def test_every_slice_is_drawn_for_pairs():
    drawn = np.concatenate([draw_pairs(0, step)[:, :2].ravel() for step in range(30)])
    assert set(drawn) == {*LABELED, *PSEUDO}


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
    with pytest.raises(ValueError, match="labelled batch: 6 slices; wanted at least 7"):
        batches.select_slices(POOL, min_classes=1, at_least=7, role="labelled batch")


# volume: number of slices. Their records follow one another in this order.
SIZES = {"labelled": 3, "hidden": 4, "other": 2}
POISON = 255


@pytest.fixture
def prepared():
    """Image and label of record r are filled with r; the labels of volume "hidden" with poison."""
    pixels, entries = np.zeros((9, 4), int), {}
    first = 0
    for volume_id, n in SIZES.items():
        entry = VolumeEntry(volume_id, volume_id, True, first, pixels[first : first + n])
        entries[volume_id] = entry
        pixels[entry.slices, 1] = np.array(entry.slices)
        first += n

    def read(indices):
        assert all(type(i) is int for i in indices)
        return [
            {
                "image": np.full((4, 4), i, np.float32),
                "label": np.full((4, 4), POISON if 3 <= i < 7 else i, np.uint8),
            }
            for i in indices
        ]

    source = types.SimpleNamespace(__getitems__=read)
    how = Preprocessing(("a", "b", "c"), (1, 2, 3), False, 4, 1.0, 0, None)
    return PreparedSet("fake", entries, source, how)


@pytest.fixture
def pseudo_labels():
    """Of volume "hidden": label 100 + r for record r."""
    records = np.arange(3, 7)
    labels = np.repeat(100 + records, 16).reshape(4, 4, 4).astype(np.uint8)
    labels.flags.writeable = False
    return PseudoLabels(Path(), records, labels, np.ones((4, 4), int), {})


def test_ground_truth_pool(prepared):
    pool = batches.ground_truth_pool(prepared, ["other", "labelled"])
    assert pool.records.tolist() == [7, 8, 0, 1, 2]
    assert pool.class_pixels.tolist() == [[0, r, 0, 0] for r in (7, 8, 0, 1, 2)]


def test_read_labeled(prepared):
    batch = batches.read_labeled(prepared, np.array([8, 0, 8, 2]))
    assert batch["image"].shape == batch["label"].shape == (4, 4, 4)
    assert batch["image"].dtype == np.float32 and batch["label"].dtype == np.uint8
    for name in ("image", "label"):
        assert batch[name][:, 1, 2].tolist() == [8, 0, 8, 2]
        assert (batch[name] == batch[name][:, :1, :1]).all()


def test_read_pairs_uses_pseudo_labels_and_never_the_hidden_truth(prepared, pseudo_labels):
    pairs = np.array([[0, 0], [6, 6], [2, 3], [5, 4]])
    is_pseudo = np.array([[False, False], [True, True], [False, True], [True, True]])
    batch = batches.read_pairs(prepared, pseudo_labels, pairs, is_pseudo)
    assert set(batch) == {"pair_image", "pair_label"}
    assert batch["pair_image"].shape == batch["pair_label"].shape == (4, 2, 4, 4)
    assert batch["pair_image"].dtype == np.float32 and batch["pair_label"].dtype == np.uint8
    np.testing.assert_array_equal(batch["pair_image"][..., 0, 0], pairs)
    expected = [[0, 0], [106, 106], [2, 103], [105, 104]]
    np.testing.assert_array_equal(
        batch["pair_label"], np.tile(np.array(expected)[..., None, None], (4, 4))
    )


def test_no_drawn_pair_ever_shows_the_hidden_truth(prepared, pseudo_labels):
    labeled = batches.ground_truth_pool(prepared, ["labelled", "other"]).records
    for step in range(30):
        pairs, is_pseudo = batches.draw_pairs(0, step, labeled, pseudo_labels.records, COMPOSITION)
        label = batches.read_pairs(prepared, pseudo_labels, pairs, is_pseudo)["pair_label"]
        assert not (label == POISON).any()
        np.testing.assert_array_equal(label[..., 0, 0], np.where(is_pseudo, 100 + pairs, pairs))


def test_read_pairs_without_pseudo_labelled_slices(prepared, pseudo_labels):
    pairs = np.array([[0, 0], [1, 1]])
    batch = batches.read_pairs(prepared, pseudo_labels, pairs, np.zeros((2, 2), bool))
    assert batch["pair_label"][:, :, 0, 0].tolist() == [[0, 0], [1, 1]]


def test_a_slice_marked_pseudo_without_a_pseudo_label(prepared, pseudo_labels):
    """An error: its ground truth must not slip in instead."""
    with pytest.raises(KeyError):
        batches.read_pairs(prepared, pseudo_labels, np.array([[2, 4]]), np.array([[True, True]]))


@pytest.mark.parametrize("num_devices", [1, 2, 3, 6])
def test_shard(num_devices):
    """Device n takes the n-th share, of every array."""
    batch = {"image": np.arange(6 * 4).reshape(6, 2, 2), "pair_label": np.arange(12).reshape(12, 1)}
    shards = batches.shard(batch, num_devices)
    assert shards.keys() == batch.keys()
    for name, whole in batch.items():
        share = len(whole) // num_devices
        assert shards[name].shape == (num_devices, share, *whole.shape[1:])
        for n in range(num_devices):
            np.testing.assert_array_equal(shards[name][n], whole[n * share : (n + 1) * share])


@pytest.mark.parametrize(("first", "last"), [(0, 7), (5, 7), (5, 6), (100, 103), (4, 4), (4, 3)])
def test_read_ahead_delivers_every_step_once_and_in_order(first, last):
    steps = range(first, last)
    found = list(batches.read_ahead(lambda s: {"step": s}, first, last))
    assert found == [{"step": s} for s in steps]


def test_read_ahead_works_in_one_other_thread_and_not_far_ahead():
    made, threads = [], set()

    def make(step):
        threads.add(threading.get_ident())
        made.append(step)
        return {"step": step}

    for batch in batches.read_ahead(make, 0, 12):
        assert max(made) <= batch["step"] + batches.PREFETCH
    assert made == list(range(12))
    assert len(threads) == 1 and threading.get_ident() not in threads


def test_read_ahead_is_ahead():
    """While step 0 is in use, step 1 is made: waiting for it does not hang."""
    made = [threading.Event() for _ in range(3)]

    def make(step):
        made[step].set()
        return {}

    ahead = batches.read_ahead(make, 0, 3)
    next(ahead)
    assert made[1].wait(timeout=30)
    ahead.close()


def test_read_ahead_hands_errors_to_the_caller():
    def make(step):
        if step == 3:
            raise OSError("disk gone at step 3")
        return {"step": step}

    delivered = []
    with pytest.raises(OSError, match="disk gone at step 3"):
        for batch in batches.read_ahead(make, 0, 10):
            delivered.append(batch["step"])
    assert delivered == [0, 1, 2]
