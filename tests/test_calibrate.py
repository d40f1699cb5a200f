"""BatchNorm's statistics before a validation: of which batches, with which keys, and their mean."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from lclseg import stage
from lclseg.random_keys import named_key
from lclseg.run.programs import Stage
from lclseg.steps import TrainState

KEY = jax.random.key(5)
STAGE = Stage("round_1", "joint", first_step=100, num_steps=50)
STATE = TrainState(
    step=np.int32(0),
    stage=np.zeros(2, np.int32),
    params={"w": np.float32(2.0)},
    batch_stats={"mean": np.float32(7.0)},
    opt_state=(),
    ema_params={"w": np.float32(3.0)},
)


def calibrated(num_batches, number):
    """The state after `number` steps of the stage, and (step, key data) of each batch looked at.

    The statistics of a batch are the square of its step.
    """
    seen = []

    def statistics(state, store, rows, key):
        assert state is STATE and store == "slices"
        seen.append((rows, jax.random.key_data(key).tolist()))
        return {"mean": np.float32(rows**2)}

    run = SimpleNamespace(
        config=SimpleNamespace(rounds=SimpleNamespace(batch_norm_batches=num_batches)), key=KEY
    )
    programs = SimpleNamespace(statistics=statistics)
    slices = SimpleNamespace(batch=lambda step: ("slices", step))
    return stage.calibrate(run, programs, STATE, slices, STAGE, number), seen


@pytest.mark.parametrize(
    ("num_batches", "number", "wanted"),
    [
        (3, 10, [107, 108, 109]),
        (1, 50, [149]),
        (4, 2, [100, 101]),  # those of an earlier stage had another loss
    ],
)
def test_statistics_are_the_mean_over_the_last_batches(num_batches, number, wanted):
    others = STATE.replace(batch_stats={})
    state, seen = calibrated(num_batches, number)
    assert [step for step, _ in seen] == wanted
    np.testing.assert_allclose(state.batch_stats["mean"], np.mean(np.square(wanted)))
    # Nothing else changes.
    for a, b in zip(*map(jax.tree.leaves, (state.replace(batch_stats={}), others)), strict=True):
        assert a is b


def test_each_batch_has_a_key_of_its_own_that_the_step_decides():
    keys = dict(calibrated(3, 10)[1])
    statistics = named_key(KEY, "statistics")
    for step, key in keys.items():
        assert key == jax.random.key_data(jax.random.fold_in(statistics, step)).tolist()
    assert len(set(map(tuple, keys.values()))) == 3
    assert dict(calibrated(2, 10)[1]).items() < keys.items()


def test_no_batches_leave_the_running_statistics():
    state, seen = calibrated(0, 10)
    assert state is STATE and seen == []
