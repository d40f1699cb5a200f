"""Every config, and every method: the checks pass, and a step traces at the config's own sizes."""

import functools
import importlib
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lclseg import steps
from lclseg.data import case_files
from lclseg.data.batches import Pool, sampler
from lclseg.methods.base import method_of
from lclseg.models import Net, UNet
from lclseg.run import programs
from lclseg.run.config_checks import check_config

CONFIGS = Path(__file__).parents[1] / "configs"
NAMES = sorted(p.stem for p in CONFIGS.glob("*.py") if p.stem != "default")
METHODS = sorted(p.stem for p in (CONFIGS / "methods").glob("*.py"))
CASES = [(name, "local_contrastive") for name in NAMES] + [("phantom", name) for name in METHODS]


def open_config(name, method):
    """(config, number of classes); of own data with a grid and classes as they may be proposed."""
    config = runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"](method)
    if config.data.name == case_files.NAME:
        config.data.image_size, config.data.target_spacing_mm = 96, 1.5
        return config, 4
    module = f"tfds_builders.{config.data.name}.{config.data.name}_dataset_builder"
    return config, len(importlib.import_module(module).CLASS_NAMES) + 1


def shape_and_dtype(x):
    return x.shape, x.dtype


@pytest.mark.parametrize(("name", "method_name"), sorted(set(CASES)))
def test_checks_pass_and_a_step_traces(name, method_name):
    config, num_classes = open_config(name, method_name)
    check_config(config, num_devices=1)
    method = method_of(config, num_classes)
    model = UNet(
        num_classes=num_classes,
        filters=tuple(config.model.filters),
        heads=method.heads,
        dtype=config.model.dtype,
    )
    size = config.data.image_size
    optimizer = programs.make_optimizer(config.optimizer, 10)
    state = steps.create_train_state(
        jax.random.key(0),
        model,
        optimizer,
        image_size=size,
        networks=method.networks,
        init_memory=method.init_memory,
    )
    num_slices = 60  # slices that each show every class; the first half is labelled
    store = steps.Store(
        jax.ShapeDtypeStruct((num_slices, size, size), jnp.float32),
        jax.ShapeDtypeStruct((num_slices, size, size), jnp.uint8),
        jax.ShapeDtypeStruct((num_slices,), bool),
    )
    pools = [
        Pool(records, np.ones((len(records), num_classes), int))
        for records in np.split(np.arange(num_slices), 2)
    ]
    draw = method.sampler(*pools) if method.sampler else None
    rows = sampler(0, pools[0].records, config.data.labeled_batch_size, draw)(0)
    assert len(rows["labeled"]) == config.data.labeled_batch_size
    rows = {group: jnp.asarray(records) for group, records in rows.items()}
    for terms, views in filter(None, (method.pretraining, (method.terms, method.views))):
        step = functools.partial(
            steps.train_step,
            net=Net(model),
            terms=terms,
            views=views,
            optimizer=optimizer,
            ema_decay=config.optimizer.ema_decay,
            remember=method.remember,
        )
        after, metrics = jax.eval_shape(step, state, store, rows, jax.random.key(0))
        # So that the next step needs no other program.
        assert jax.tree.map(shape_and_dtype, after) == jax.tree.map(shape_and_dtype, state)
        assert {"loss", "gradient_norm"} < metrics.keys()
        assert all(m.shape == () for m in metrics.values())
