"""The largest component within a compiled step, against scipy's labelling on the host."""

import functools

import jax
import numpy as np
import pytest

from lclseg.components import largest_component
from lclseg.components_2d import largest_component_2d

SIZE, NUM_CLASSES = 40, 4


@functools.cache
def compiled(num_iterations):
    """Takes [n, H, W]: one program for all cases."""
    of_slice = functools.partial(
        largest_component_2d, num_classes=NUM_CLASSES, num_iterations=num_iterations
    )
    return jax.jit(jax.vmap(of_slice))


def spiral():
    """A line of class 1, one pixel wide, that winds from the corner to the centre."""
    label = np.zeros((SIZE, SIZE), np.uint8)
    row, column, step, blocked = 0, 0, (0, 1), 0
    label[0, 0] = 1
    while blocked < 2:
        r, c = row + step[0], column + step[1]
        beyond = r + step[0], c + step[1]
        inside = 0 <= r < SIZE and 0 <= c < SIZE and not label[r, c]
        free = not all(0 <= x < SIZE for x in beyond) or not label[beyond]
        if inside and free:
            row, column, blocked = r, c, 0
            label[r, c] = 1
        else:
            step, blocked = (step[1], -step[0]), blocked + 1
    return label


def shapes(name):
    rng = np.random.default_rng(3)
    match name:
        case "noise":  # many components of one size, and touching by corners
            return rng.integers(0, NUM_CLASSES, (6, SIZE, SIZE)).astype(np.uint8)
        case "ignored":  # labels of C and more
            return rng.choice([0, 1, 2, 9, 255], (6, SIZE, SIZE)).astype(np.uint8)
        case "blobs":
            coarse = rng.integers(0, NUM_CLASSES, (6, SIZE // 4, SIZE // 4)).astype(np.uint8)
            return coarse.repeat(4, axis=1).repeat(4, axis=2)
        case "near percolation":  # long and branched
            return (rng.random((6, SIZE, SIZE)) < 0.41).astype(np.uint8)
        case "spirals":
            return np.stack([np.rot90(s, k) for s in (spiral(), spiral().T) for k in (0, 1, 2)])
        case "empty":
            return np.zeros((6, SIZE, SIZE), np.uint8)
    raise AssertionError(name)


@pytest.mark.parametrize(
    "name", ["noise", "ignored", "blobs", "near percolation", "spirals", "empty"]
)
def test_compiled_largest_component_is_that_of_scipy(name):
    label = shapes(name)
    found = compiled(24)(label)
    assert found.dtype == label.dtype
    wanted = np.stack([largest_component(x, range(1, NUM_CLASSES)) for x in label])
    np.testing.assert_array_equal(found, wanted)


def test_the_spiral_is_one_long_component():
    line = spiral()
    assert line.sum() > SIZE * SIZE / 3
    np.testing.assert_array_equal(largest_component(line, [1]), line)


def test_where_the_bound_is_hit_a_part_of_the_component_stays():
    # Two iterations follow a line over a few pixels only. Beside the spiral lies nothing else.
    label = shapes("spirals")
    found = np.asarray(compiled(2)(label))
    assert np.all((found == 0) | (found == label))
    kept = found.sum(axis=(1, 2))
    assert np.all((kept > 0) & (kept < label.sum(axis=(1, 2))))
