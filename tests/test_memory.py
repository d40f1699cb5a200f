"""What a step takes, against XLA's own layout, and the refusal."""

import functools
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from lclseg import steps
from lclseg.errors import ConfigError
from lclseg.methods import supervised
from lclseg.methods.base import base_of
from lclseg.models import Net, UNet
from lclseg.run import memory
from lclseg.run.programs import make_optimizer

DEFAULT = Path(__file__).parents[1] / "configs" / "default.py"


def config_of(**data):
    config = runpy.run_path(str(DEFAULT))["get_config"]()
    config.data.update(data)
    return config


def test_estimate_is_near_what_the_compiler_lays_out():
    config = config_of(image_size=32, labeled_batch_size=8, eval_batch_size=1)
    config.rounds.num_rounds = 0
    model = UNet(num_classes=3, filters=(16, 32, 64, 64))
    optimizer = make_optimizer(config.optimizer, 1)
    state = steps.create_train_state(jax.random.key(0), model, optimizer, image_size=32)
    method = supervised.make(None, base_of(config, 3))
    step = functools.partial(
        steps.train_step,
        net=Net(model),
        terms=method.terms,
        views=method.views,
        optimizer=optimizer,
        ema_decay=0.0,
    )
    store = steps.Store(
        jax.ShapeDtypeStruct((8, 32, 32), jnp.float32),
        jax.ShapeDtypeStruct((8, 32, 32), jnp.uint8),
        jax.ShapeDtypeStruct((8,), bool),
    )
    rows = {"labeled": jax.ShapeDtypeStruct((8,), jnp.int32)}
    compiled = jax.jit(step).lower(state, store, rows, jax.random.key(0)).compile()
    parameters = 3 * sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
    laid_out = compiled.memory_analysis().temp_size_in_bytes
    assert 0.4 * laid_out < memory.step_bytes(config) + parameters < 2.5 * laid_out


def test_a_step_that_is_too_large_is_refused():
    config = config_of(image_size=640)
    memory.check_memory(config, 2**50)
    with pytest.raises(ConfigError, match=r"about 23\.\d GiB, with data.image_size=640.*smaller"):
        memory.check_memory(config, 2**34)
    config.model.dtype = "bfloat16"
    memory.check_memory(config, 2**34)


def test_there_is_some_memory():
    assert 2**28 < memory.available_bytes() < 2**50
