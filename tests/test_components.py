"""The largest component, against a flood fill and by hand."""

import itertools

import numpy as np
import pytest

from lclseg.class_groups import classes_of, names_of
from lclseg.components import largest_component, one_piece
from lclseg.losses import IGNORE


def flood_fill(label, num_classes, connectivity):
    """The same, pixel by pixel: the first of the largest components of each class stays."""
    steps = [
        step
        for step in itertools.product((-1, 0, 1), repeat=label.ndim)
        if 0 < np.abs(step).sum() <= connectivity
    ]
    kept = np.where((label > 0) & (label < num_classes), 0, label)
    for k in range(1, num_classes):
        waiting = {tuple(p) for p in np.argwhere(label == k)}
        largest = []
        for start in sorted(waiting):
            if start not in waiting:
                continue
            waiting.remove(start)
            component, border = [start], [start]
            while border:
                pixel = border.pop()
                for step in steps:
                    neighbour = tuple(np.add(pixel, step))
                    if neighbour in waiting:
                        waiting.remove(neighbour)
                        component.append(neighbour)
                        border.append(neighbour)
            if len(component) > len(largest):
                largest = component
        for pixel in largest:
            kept[pixel] = k
    return kept


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("shape", "connectivity"),
    [((4, 7, 6), 1), ((4, 7, 6), 2), ((4, 7, 6), 3), ((9, 8), 1), ((9, 8), 2)],
)
def test_equals_a_flood_fill(shape, connectivity, seed):
    """Sparse noise of three classes: many components, and many of one size."""
    rng = np.random.default_rng(seed)
    label = rng.choice(4, shape, p=[0.55, 0.15, 0.15, 0.15]).astype(np.uint8)
    found = largest_component(label, range(1, 4), connectivity)
    np.testing.assert_array_equal(found, flood_fill(label, 4, connectivity))
    assert (found != label).any()


@pytest.mark.parametrize("shape", [(4, 7, 6), (9, 8)])
def test_all_neighbours_count_by_default(shape):
    label = np.random.default_rng(0).choice(3, shape, p=[0.8, 0.1, 0.1])
    np.testing.assert_array_equal(
        largest_component(label, range(1, 3)), flood_fill(label, 3, len(shape))
    )


def test_touching_at_a_corner():
    """One component in 26-connectivity; in 6-connectivity two of one size, and the first stays."""
    label = np.zeros((2, 2, 2), np.uint8)
    label[0, 0, 0] = label[1, 1, 1] = 1
    np.testing.assert_array_equal(largest_component(label, range(1, 2)), label)
    first = np.zeros_like(label)
    first[0, 0, 0] = 1
    np.testing.assert_array_equal(largest_component(label, range(1, 2), connectivity=1), first)


def test_slices_are_connected_through_the_volume():
    """A class in two pieces on a slice that meet on the next: one component in 3-D only."""
    label = np.array([[[2, 0, 2, 2]], [[2, 2, 2, 0]]], np.int64)
    found = largest_component(label, range(1, 3))
    np.testing.assert_array_equal(found, label)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(largest_component(label[0], range(1, 3)), [[0, 0, 2, 2]])


def test_classes_do_not_join():
    """Each class has its own largest component, through no pixel of another."""
    label = np.array([[1, 1, 2, 1, 2, 2]], np.uint8)
    np.testing.assert_array_equal(largest_component(label, range(1, 3)), [[1, 1, 0, 0, 2, 2]])


def test_pixels_of_no_class_stay():
    label = np.array([[IGNORE, 0, IGNORE, 1, 0, 1, 1, 3]], np.uint8)
    expected = [[IGNORE, 0, IGNORE, 0, 0, 1, 1, 3]]
    np.testing.assert_array_equal(largest_component(label, range(1, 3)), expected)


@pytest.mark.parametrize("value", [0, 1, IGNORE])
def test_one_value_everywhere(value):
    label = np.full((2, 3, 4), value, np.uint8)
    np.testing.assert_array_equal(largest_component(label, range(1, 3)), label)


def test_the_label_given_is_not_changed():
    label = np.array([[1, 0, 1, 1]], np.uint8)
    label.flags.writeable = False
    np.testing.assert_array_equal(largest_component(label, range(1, 2)), [[0, 0, 1, 1]])
    assert label.tolist() == [[1, 0, 1, 1]]


def test_only_the_classes_asked_for_are_cleaned():
    label = np.array([[1, 0, 1, 1, 2, 0, 2, 2]], np.uint8)
    np.testing.assert_array_equal(largest_component(label, [2]), [[1, 0, 1, 1, 0, 0, 2, 2]])
    np.testing.assert_array_equal(largest_component(label, []), label)


def test_classes_in_one_piece():
    """1 is whole, 2 in halves in one label, 3 has a speck of one pixel in 201, 4 is in none."""
    first = np.zeros((3, 20, 30), np.uint8)
    first[0, 0, :5] = 1
    first[0, 3, :2] = first[0, 3, 4:6] = 2
    first[1:, 10:, 15:25] = 3
    first[2, 0, 0] = 3
    second = np.zeros_like(first)
    second[0, 0, :2] = 2
    assert one_piece([first, second], range(1, 5)) == (1, 3)
    assert one_piece([second], range(1, 5)) == (2,)
    assert one_piece([second], [1, 4]) == ()
    first[2, 0, :4] = 3  # 4 pixels in 204
    assert one_piece([first, second], range(1, 5)) == (1,)


@pytest.mark.parametrize("seed", range(4))
def test_several_classes_together_keep_the_piece_that_holds_most_of_them(seed):
    """Against the definition, piece by piece: the sum over classes of the share that it holds."""
    rng = np.random.default_rng(seed)
    label = rng.choice(5, (4, 7, 6), p=[0.83, 0.12, 0.02, 0.01, 0.02]).astype(np.uint8)
    together = np.isin(label, (1, 2, 4)).astype(np.uint8)
    best, best_shares = None, -1.0
    while together.any():
        piece = flood_fill(together, 2, 3) == 1
        shares = sum((piece & (label == k)).sum() / (label == k).sum() for k in (1, 2, 4))
        if shares > best_shares:
            best, best_shares = piece, shares
        together[piece] = 0
    expected = np.where(np.isin(label, (1, 2, 4)) & ~best, 0, label)
    np.testing.assert_array_equal(largest_component(label, [(1, 2, 4)]), expected)
    assert (expected != label).any()


def test_a_large_false_piece_of_one_class_does_not_displace_the_right_one():
    """1 beside 2 and 3; a false 1 is larger than all of them. By itself it would be kept."""
    label = np.array([[1, 1, 2, 3, 3, 0, 1, 1, 1, 1, 1, 1]], np.uint8)
    right = [[1, 1, 2, 3, 3, 0, 0, 0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(largest_component(label, [(1, 2, 3), 1, 2, 3]), right)
    wrong = [[0, 0, 2, 3, 3, 0, 1, 1, 1, 1, 1, 1]]
    np.testing.assert_array_equal(largest_component(label, [1, 2, 3]), wrong)


def test_classes_together_are_one_piece_where_they_touch():
    """Alone each is whole; together they are in the second label only."""
    apart, joined = np.zeros((2, 1, 6), np.uint8)
    apart[0, :2], apart[0, 4:] = 1, 2
    joined[0, :3], joined[0, 3:] = 1, 2
    kinds = [(1, 2), 1, 2]
    assert one_piece([joined], kinds) == ((1, 2), 1, 2)
    assert one_piece([joined, apart], kinds) == (1, 2)


def test_names_of_classes_and_back():
    names = ["RV", "MYO", "LV"]
    kinds = ((1, 2, 3), 1, 3)
    assert names_of(kinds, names) == ["RV + MYO + LV", "RV", "LV"]
    assert classes_of(names_of(kinds, names), names) == kinds
    assert classes_of(["a + b"], ["a + b", "c"]) == (1,)  # a class of that very name
    with pytest.raises(ValueError, match="found 'XX'; wanted one of RV, MYO, LV"):
        classes_of(["RV + XX"], names)


@pytest.mark.parametrize(
    ("label", "connectivity", "error", "message"),
    [
        (np.zeros(4, int), None, ValueError, r"\(4,\); wanted \[S, H, W\] or \[H, W\]"),
        (np.zeros((1, 2, 3, 4), int), None, ValueError, r"\(1, 2, 3, 4\)"),
        (np.zeros((2, 3)), None, TypeError, "float64; wanted integers"),
        (np.zeros((2, 3), int), 3, ValueError, "connectivity 3; wanted 1 to 2"),
        (np.zeros((2, 3, 4), int), 0, ValueError, "connectivity 0; wanted 1 to 3"),
    ],
)
def test_what_does_not_fit_is_named(label, connectivity, error, message):
    with pytest.raises(error, match=message):
        largest_component(label, range(1, 2), connectivity)
