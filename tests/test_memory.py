"""What a step takes, against XLA's own layout, and the refusal."""

import functools
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from lclseg import steps
from lclseg.models import UNet
from lclseg.run import memory, setup
from lclseg.run.config_checks import ConfigError

DEFAULT = Path(__file__).parents[1] / "configs" / "default.py"


def config_of(**data):
    config = runpy.run_path(str(DEFAULT))["get_config"]()
    config.data.update(data)
    return config


def test_estimate_is_near_what_the_compiler_lays_out():
    config = config_of(image_size=32, labeled_batch_size=8, eval_batch_size=1)
    config.rounds.num_rounds = 0
    model = UNet(num_classes=3, filters=(16, 32, 64, 64))
    optimizer = setup.make_optimizer(config.optimizer, 1)
    state = steps.create_train_state(jax.random.key(0), model, optimizer, image_size=32)
    step = functools.partial(
        steps.train_step,
        model=model,
        optimizer=optimizer,
        ema_decay=0.0,
        loss_options=steps.LossOptions(**config.loss),
        augment_options=steps.AugmentOptions(**config.augment),
        axis_name=None,
    )
    batch = {
        "image": jax.ShapeDtypeStruct((8, 32, 32), jnp.float32),
        "label": jax.ShapeDtypeStruct((8, 32, 32), jnp.uint8),
    }
    compiled = jax.jit(step).lower(state, batch, jax.random.key(0)).compile()
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
