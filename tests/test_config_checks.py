"""Every value of a config is held against a rule before any work; all problems come at once."""

import importlib
import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from ml_collections import ConfigDict

from lclseg import train
from lclseg.data import splits
from lclseg.errors import ConfigError, UserError
from lclseg.run import setup
from lclseg.run.config_checks import check_config

CONFIGS = Path(__file__).parents[1] / "configs"
METHODS = sorted(p.stem for p in (CONFIGS / "methods").glob("*.py"))
TAUGHT_BY_AVERAGED = ("mean_teacher", "uncertainty_aware_mean_teacher", "bcp")


def config_of(name="phantom", method="local_contrastive"):
    return runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"](method)


def with_value(key, value):
    """A config of any types: ConfigDict itself would refuse some of the values."""
    content = config_of().to_dict()
    *groups, name = key.split(".")
    group = content
    for g in groups:
        group = group[g]
    group[name] = value
    return ConfigDict(content)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda p: p.stem)
def test_every_config_of_the_repository_passes(path, method):
    if path.stem == "default":  # names no data set
        return
    config = config_of(path.stem, method)
    if method in TAUGHT_BY_AVERAGED and config.optimizer.ema_decay == 0:
        with pytest.raises(ConfigError, match=r"optimizer\.ema_decay is 0\.0; .* such as 0\.99"):
            check_config(config, num_devices=1)
        config.optimizer.ema_decay = 0.99
    check_config(config, num_devices=1)


@pytest.mark.parametrize("method", METHODS)
def test_every_option_of_a_method_has_a_rule(method):
    rules = importlib.import_module(f"lclseg.methods.{method}").RULES
    options = runpy.run_path(str(CONFIGS / "methods" / f"{method}.py"))["OPTIONS"]
    names = [
        f"{k}.{inner}" if inner else k
        for k, v in options.items()
        for inner in (v if isinstance(v, dict) else [""])
    ]
    assert sorted(rules) == sorted(names)


def test_averaged_weights_may_be_off_where_they_teach_nothing():
    for method in set(METHODS) - set(TAUGHT_BY_AVERAGED):
        config = config_of("phantom", method)
        config.optimizer.ema_decay = 0.0
        check_config(config, num_devices=1)


WRONG = [
    ("seed", -1),
    ("seed", True),
    ("num_cpu_devices", -1),
    ("data.name", ""),
    ("data.image_size", 31.0),
    ("data.image_size", 0),
    ("data.target_spacing_mm", float("nan")),
    ("data.n4_shrink_factor", -1),
    ("data.num_labeled", 1),
    ("data.pool", "phantom_001"),
    ("data.labeled", ("phantom_001", 2)),
    ("data.num_validation", -2),
    ("data.labeled_batch_size", 0),
    ("data.min_classes", 0),
    ("method.name", "none_such"),
    ("method.temperature", 0.0),
    ("method.matching", "outer"),
    ("method.pixels_per_class", -1),
    ("method.pairs.labeled_pseudo", -2),
    ("method.view_contrast_range", (1.3, 0.7)),
    ("method.view_clip", (1.0, 1.0)),
    ("method.view_geometry", 1),
    ("model.filters", (16,)),
    ("model.filters", (16, 0)),
    ("model.filters", (16, "32")),
    ("model.filters", (16, 32.0)),
    ("model.dtype", "float12"),
    ("loss.segmentation", "dise"),
    ("loss.class_weights", (1.0, -1.0)),
    ("loss.class_weights", (0.0, 0.0)),
    ("loss.class_weights", "1,2"),
    ("augment.max_rotation_degrees", 181.0),
    ("augment.scale_range", (1.05, 0.95)),
    ("augment.scale_range", (0.0, 1.0)),
    ("augment.scale_range", (0.9, 1.0, 1.1)),
    ("augment.elastic_probability", 1.5),
    ("augment.elastic_sigma", -0.1),
    ("augment.contrast_range", (-0.5, 1.0)),
    ("augment.max_brightness", -0.1),
    ("crf.num_steps", -1),
    ("crf.spatial_sigma", 0.0),
    ("pseudo_labels.min_agreement", 1.0),
    ("pseudo_labels.min_confidence", -0.1),
    ("optimizer.learning_rate", float("inf")),
    ("optimizer.schedule", "linear"),
    ("optimizer.ema_decay", 1.0),
    ("rounds.baseline_steps", 0),
    ("rounds.num_rounds", -1),
    ("rounds.eval_every", 0),
    ("rounds.fresh_heads", "no"),
    ("log.every", 0),
]


@pytest.mark.parametrize(("key", "value"), WRONG, ids=str)
def test_a_wrong_value_is_named_with_what_is_wanted(key, value):
    with pytest.raises(ConfigError) as caught:
        check_config(with_value(key, value), num_devices=1)
    (line,) = [x for x in str(caught.value).splitlines() if x.startswith(f"  {key} is {value!r}")]
    assert "wanted" in line or "there is no" in line


def test_all_problems_come_in_one_message():
    config = config_of()
    config.update_from_flattened_dict(
        {"augment.scale_range": (2.0, 1.0), "optimizer.schedule": "linear", "data.image_size": 31}
    )
    config.data.split = "c9"
    with pytest.raises(ConfigError) as caught:
        check_config(config, num_devices=5)
    first, *lines = str(caught.value).splitlines()
    assert first == "the config cannot be run:"
    keys = ("augment.scale_range", "optimizer.schedule", "data.image_size", "no split 'c9'")
    for part in (*keys, "data.labeled_batch_size is 8; wanted a multiple of the 5 devices"):
        assert sum(part in line for line in lines) == 1, part


def test_keys_that_are_missing_or_unknown():
    content = config_of().to_dict()
    del content["crf"]["num_steps"]
    content["crf"]["steps"] = 3
    content["method"]["tau"] = 0.1
    with pytest.raises(ConfigError) as caught:
        check_config(ConfigDict(content), num_devices=1)
    message = str(caught.value)
    assert "crf.num_steps is missing" in message
    assert "crf.steps is no key" in message and "method.tau is no key" in message


def test_what_own_data_leaves_open_is_open_for_own_data_alone():
    check_config(config_of("nifti_folder"), num_devices=1)
    config = config_of("nifti_folder")
    config.data.image_size = -32
    with pytest.raises(ConfigError, match=r"data\.image_size is -32"):
        check_config(config, num_devices=1)


def test_class_weights_are_held_against_the_classes_before_anything_is_prepared(tmp_path):
    """The phantom has three classes and background: two weights would end in a traceback later."""
    config = config_of()
    config.data.data_dir = str(tmp_path)
    config.loss.segmentation, config.loss.class_weights = "cross_entropy", (1.0, 2.0)
    with mock.patch("lclseg.data.dataset._prepare", side_effect=AssertionError):
        with pytest.raises(ConfigError, match="has 2 values; wanted 4, of background, "):
            setup.open_data(config)
        config.loss.class_weights = (1.0,) * 4
        with pytest.raises(AssertionError):  # now it would prepare
            setup.open_data(config)


@pytest.mark.parametrize(("slices", "refused"), [([], True), ([1], True), ([2], False)])
def test_a_pool_that_is_too_small_to_draw_from(monkeypatch, slices, refused):
    """Before a workdir is claimed; an empty pool, a volume of one slice, of two."""
    volumes = {f"u{n}": SimpleNamespace(slices=range(7, 7 + n)) for n in slices}
    split = splits.Split(("l",), tuple(volumes), (), ("t",))
    monkeypatch.setattr(setup, "open_builder", lambda *args, **kwargs: None)
    monkeypatch.setattr(setup, "preprocessing_of", lambda b: SimpleNamespace(class_names=("a",)))
    prepared = SimpleNamespace(volumes=volumes)
    monkeypatch.setattr(setup, "open_prepared", lambda *args, **kwargs: prepared)
    monkeypatch.setattr(setup, "resolve_split", lambda *args, **kwargs: split)
    config = config_of()
    if refused:
        wanted = f"found {len(slices)} volumes with {sum(slices)} slices .*; wanted at least 2"
        with pytest.raises(ConfigError, match=wanted):
            setup.open_data(config)
        config.rounds.num_rounds = 0
    assert setup.open_data(config) == (prepared, split)


def test_class_weights_that_no_loss_reads():
    config = config_of()
    config.loss.class_weights = (1.0,) * 4
    with pytest.raises(ConfigError, match="batch_dice_and_cross_entropy has no weights"):
        check_config(config, num_devices=1)


def test_a_crf_of_no_steps_refines_no_prediction():
    config = config_of()
    config.predictions.crf, config.crf.num_steps = True, 0
    with pytest.raises(ConfigError, match=r"crf\.num_steps is 0, which refines nothing; wanted 1"):
        check_config(config, num_devices=1)
    config.crf.num_steps = 1
    check_config(config, num_devices=1)


def test_a_finer_grid_is_one_of_a_crf():
    config = config_of()
    config.predictions.crf_upsampling = 2
    with pytest.raises(
        ConfigError, match=r"crf_upsampling is 2, but predictions\.crf is False; wan"
    ):
        check_config(config, num_devices=1)
    config.predictions.crf, config.crf.num_steps = True, 1
    check_config(config, num_devices=1)


def test_a_wrong_value_of_own_data_is_told_before_the_folder_is_looked_at(tmp_path):
    config = config_of("nifti_folder")
    config.data.manual_dir = str(tmp_path / "not there")
    config.optimizer.learning_rate = -1.0
    for start in (
        lambda: train.train_and_evaluate(config, tmp_path / "run"),
        lambda: setup.prepare(config),
    ):
        with pytest.raises(ConfigError, match=r"optimizer\.learning_rate is -1"):
            start()
    assert not (tmp_path / "run").exists()


def test_every_error_that_a_user_can_mend_is_a_user_error():
    from lclseg import errors, model_files, pseudo_labels, sweep
    from lclseg.data import nifti
    from lclseg.page import recorded
    from lclseg.run import workdir

    for error in (
        ConfigError,
        splits.SplitError,
        nifti.VolumeError,
        pseudo_labels.PseudoLabelError,
        sweep.SweepError,
        recorded.RunError,
        model_files.ModelError,
        workdir.WorkdirError,
        errors.NonFiniteLossError,
    ):
        assert issubclass(error, UserError)
    # And none of them is taken for a mistake of the program.
    assert not issubclass(UserError, ValueError)


def test_json_of_a_config_is_what_was_checked():
    """Tuples become lists in config.json; these pass, too."""
    check_config(ConfigDict(json.loads(config_of().to_json_best_effort())), num_devices=1)
