"""Slices on the devices: what they show, that hidden truth is not among it, and by stretches."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from lclseg.data import batches
from lclseg.data.dataset import PreparedSet, VolumeEntry
from lclseg.data.preprocess import Preprocessing
from lclseg.losses import IGNORE
from lclseg.run import devices
from lclseg.run.store import SHARE, DeviceSlices, Labels, num_rows

NUM_DEVICES = 4  # of the tests' process
POISON = 254
LABELED = np.arange(0, 6)
HIDDEN = np.arange(6, 14)  # unlabelled; their ground truth is poison
PSEUDO = np.arange(6, 11)  # those of them with a pseudo-label
NOTHING = Labels(LABELED, np.empty(0, int), np.empty((0, 4, 4), np.uint8))
PSEUDO_LABELS = Labels(LABELED, PSEUDO, np.repeat(100 + PSEUDO, 16).reshape(5, 4, 4).astype("u1"))


@pytest.fixture
def prepared():
    """Image and label of record r are filled with r; labels of unlabelled slices with poison."""
    reads = []

    def read(indices):
        reads.append(len(indices))
        return [
            {
                "image": np.full((4, 4), i, np.float32),
                "label": np.full((4, 4), POISON if i in HIDDEN else i, np.uint8),
            }
            for i in indices
        ]

    counts = np.ones((14, 4), int)
    entries = {"all": VolumeEntry("all", "all", True, 0, counts)}
    source = types.SimpleNamespace(__getitems__=read, reads=reads)
    how = Preprocessing(("a", "b", "c"), (1, 2, 3), False, 4, 1.0, 0, None)
    return PreparedSet("fake", entries, source, how)


def draw(rng):
    return {"unlabeled": rng.choice(HIDDEN, 4), "pairs": rng.choice(PSEUDO, 8)}


def make(prepared, labels=PSEUDO_LABELS, **options):
    sampler = batches.sampler(5, LABELED, 4, draw)
    everything = np.concatenate([HIDDEN, LABELED])
    return DeviceSlices(prepared, labels, sampler, everything, **options), sampler


def shown(store, rows):
    """Image, label and is_labeled of a step's rows [devices, n], each device in its own copy."""
    return [
        np.concatenate([np.asarray(array[d])[rows[d]] for d in range(NUM_DEVICES)])
        for array in store
    ]


def expected(records, labels):
    label = np.where(np.isin(records, LABELED), records, IGNORE)
    label = np.where(np.isin(records, labels.pseudo), 100 + records, label)
    return records, label, np.isin(records, LABELED)


@pytest.mark.parametrize("labels", [NOTHING, PSEUDO_LABELS], ids=["no labels", "pseudo"])
def test_rows_show_what_was_drawn(prepared, labels):
    """The slices of the sampler, in order, over four devices; ground truth or pseudo-labels."""
    slices, sampler = make(prepared, labels)
    assert slices.load(0, 20) == 20
    found = slices.rows(range(3, 6))
    for i, step in enumerate(range(3, 6)):
        for group, records in sampler(step).items():
            rows = found[group][:, i]
            assert rows.dtype == np.int32
            assert rows.shape == (NUM_DEVICES, len(records) // NUM_DEVICES)
            image, label, is_labeled = shown(slices.store, rows)
            for array, wanted in zip(
                (image[:, 1, 2], label[:, 1, 2], is_labeled),
                expected(records, labels),
                strict=True,
            ):
                np.testing.assert_array_equal(array, wanted)
            assert (image == image[:, :1, :1]).all() and (label == label[:, :1, :1]).all()


def test_hidden_truth_is_never_on_a_device(prepared):
    for labels in (NOTHING, PSEUDO_LABELS):
        for capacity in (None, 12):
            slices, _ = make(prepared, labels, capacity=capacity)
            end = slices.load(0, 20)
            stores = [slices.store, slices.batch(end)[0], slices.batch(end + 7)[0]]
            for store in stores:
                assert store.label.dtype == np.uint8
                assert not np.any(np.asarray(store.label) == POISON)


def test_a_slice_with_both_labels_shows_its_ground_truth():
    labels = Labels(np.array([2]), np.array([2, 4]), np.full((2, 1, 1), 9, np.uint8))
    truth = np.array([7, 7, 7], np.uint8).reshape(3, 1, 1)
    found = labels.of(np.array([2, 3, 4]), truth)
    assert found.ravel().tolist() == [7, IGNORE, 9]


def test_slices_by_stretches_are_those_of_all_at_once(prepared):
    """To the bit, step after step; each stretch ends where the next step would not fit."""
    whole, sampler = make(prepared)
    assert whole.load(0, 12) == 12
    parts, _ = make(prepared, capacity=12)
    end, stretches = 0, 0
    for step in range(12):
        if step >= end:
            end = parts.load(step, 12)
            stretches += 1
            assert step < end <= 12
            assert all(x.shape[:2] == (NUM_DEVICES, 12) for x in parts.store)
            drawn = [np.concatenate(list(sampler(s).values())) for s in range(step, end + 1)]
            assert len(np.unique(np.concatenate(drawn[:-1]))) <= 12
            assert end == 12 or len(np.unique(np.concatenate(drawn))) > 12
        for (group, ours), theirs in zip(
            parts.rows(range(step, step + 1)).items(),
            whole.rows(range(step, step + 1)).values(),
            strict=True,
        ):
            for a, b in zip(
                shown(parts.store, ours[:, 0]), shown(whole.store, theirs[:, 0]), strict=True
            ):
                np.testing.assert_array_equal(a, b, err_msg=group)
    assert stretches > 1


@pytest.mark.parametrize("capacity", [None, 12])
def test_a_batch_of_any_step_whatever_is_loaded(prepared, capacity):
    """What is held stays held; its place is another one only where it lacks a slice."""
    slices, sampler = make(prepared, capacity=capacity)
    end = slices.load(4, 20)
    held = slices.store
    for step in (4, end, 1, 30):
        store, rows = slices.batch(step)
        assert capacity or store is held
        for group, records in sampler(step).items():
            image, label, _ = shown(store, rows[group])
            np.testing.assert_array_equal(image[:, 0, 0], records)
            np.testing.assert_array_equal(label[:, 0, 0], expected(records, PSEUDO_LABELS)[1])
    assert slices.store is held
    assert slices.batch(4)[0] is held


def test_slices_that_are_held_are_not_read_again(prepared):
    slices, _ = make(prepared)
    slices.load(0, 20)
    slices.load(20, 40)
    assert prepared.source.reads == [14]


def test_every_device_holds_a_copy(prepared):
    slices, _ = make(prepared)
    slices.load(0, 1)
    for array in slices.store:
        assert array.sharding.device_set == set(jax.local_devices())
        for copy in np.asarray(array):
            np.testing.assert_array_equal(copy, np.asarray(array)[0])


def test_a_batch_that_does_not_fit_is_refused(prepared):
    slices, _ = make(prepared, capacity=3)
    with pytest.raises(ValueError, match=r"the 3 that fit.*data\.labeled_batch_size"):
        slices.load(0, 5)


def test_stores_of_a_few_slices_more_or_less_have_one_shape(prepared):
    """So that they run one compiled program; no more rows than there is memory for."""
    labels = Labels(LABELED[:3], *(NOTHING.pseudo, NOTHING.pseudo_labels))
    shapes = set()
    for records in (LABELED, LABELED[:3]):
        draws = batches.sampler(5, records, 4, None)
        slices = DeviceSlices(prepared, labels, draws, records)
        slices.load(0, 20)
        shapes.add(tuple(x.shape for x in slices.store))
    assert len(shapes) == 1
    few = DeviceSlices(prepared, labels, draws, LABELED[:3], capacity=5)
    few.load(0, 20)
    assert few.store.image.shape == (NUM_DEVICES, 5, 4, 4)


@pytest.mark.parametrize("channels", [(), (0, 1, 2)])
def test_a_store_takes_its_share_of_memory_whatever_the_channels(prepared, channels, monkeypatch):
    how = prepared.preprocessing._replace(channels=channels)
    prepared = dataclasses.replace(prepared, preprocessing=how)
    monkeypatch.setattr(devices, "memory_bytes", lambda: 1500)
    slices, _ = make(prepared)
    pixel = 4 * max(1, len(channels)) + 1  # bytes: float32 images, and the label
    fit = SHARE * 1500 / (16 * pixel + 1)  # 4 x 4 pixels, and whether it is labelled
    assert slices.capacity == int(fit) < 14


def test_a_store_is_at_most_a_quarter_larger_than_its_slices():
    numbers = np.arange(1, 20_000)
    rows = np.array([num_rows(int(n)) for n in numbers])
    assert (rows >= numbers).all() and (np.diff(rows) >= 0).all()
    assert (rows <= np.maximum(numbers + 63, 1.25 * numbers)).all()
    # In each doubling there are few shapes, and so few programs.
    assert all(len(set(rows[n : 2 * n])) <= 6 for n in (64, 500, 4000))
