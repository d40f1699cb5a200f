"""Configs beside runs: the lists in place of tables, and comparisons that outlive versions."""

import json
import runpy
from pathlib import Path

import pytest

from lclseg.run import stored_config
from lclseg.run.stored_config import (
    as_now,
    baseline_differences,
    differing_keys,
    refused_changes,
    to_store,
)
from lclseg.run.workdir import claim_workdir

ROOT = Path(__file__).parents[1]


def phantom(method="local_contrastive", **overrides):
    config = runpy.run_path(str(ROOT / "configs" / "phantom.py"))["get_config"](method)
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in overrides.items()})
    return config


def test_lists_are_stored_and_no_tables():
    data = to_store(phantom(data__split="c2"))["data"]
    assert not {"splits", "pool", "test_patients"} & data.keys()
    assert data["labeled"] == ["phantom_001"]
    assert data["validation"] == ["phantom_005", "phantom_024"]
    assert data["unlabeled"] == [f"phantom_{n:03d}" for n in range(44) if n not in (1, 5, 24)]
    assert data["test"] == [f"phantom_{n:03d}" for n in range(44, 64)]


def test_stored_twice_is_stored_once():
    once = to_store(phantom())
    assert as_now(once) == once


def test_a_new_split_or_pool_elsewhere_leaves_a_run_as_it_is():
    before, config = to_store(phantom()), phantom()
    config.data.splits["1"]["c9"] = {"labeled": ("phantom_009",), "validation": ("phantom_008",)}
    assert differing_keys(before, to_store(config)) == []
    # But another patient in the run's own lists is told.
    config.data.splits["1"]["c1"]["labeled"] = ("phantom_009",)
    assert differing_keys(before, to_store(config)) == ["data.labeled", "data.unlabeled"]


@pytest.mark.parametrize(
    ("key", "other"),
    [
        ("crf.num_steps", 7),
        ("rounds.fresh_heads", False),
        ("pseudo_labels.largest_component", "yes"),
        ("augment.strength", "strong"),
    ],
)
def test_an_absent_key_stands_for_its_default(key, other):
    """As before there was the key: equal to a run with the default, and to no other."""
    group, name = key.split(".")
    default = runpy.run_path(str(ROOT / "configs" / "default.py"))["get_config"]()[group][name]
    old = to_store(phantom())
    del old[group][name]
    same, different = phantom(), phantom()
    same[group][name], different[group][name] = default, other
    assert differing_keys(as_now(old), to_store(same)) == []
    assert differing_keys(as_now(old), to_store(different)) == [key]


def test_a_whole_group_may_be_absent():
    old = to_store(phantom())
    del old["predictions"]
    assert differing_keys(as_now(old), to_store(phantom())) == []


def test_a_key_that_no_version_knows_is_a_difference():
    old = to_store(phantom())
    old["augment"]["wobble"] = 0
    assert differing_keys(as_now(old), to_store(phantom())) == ["augment.wobble"]


def test_a_run_of_before_the_methods_is_refused_by_name():
    """Its options stood elsewhere, and today's code starts from other weights."""
    old = to_store(phantom())
    old["loss"]["temperature"] = old.pop("method")["temperature"]
    assert "loss.temperature" in differing_keys(as_now(old), to_store(phantom()))


def test_a_method_keeps_its_own_options_only():
    stored = to_store(phantom("self_training"))
    assert stored["method"].keys() == {"name", "weight", "copy_paste"}
    assert "method.name" in differing_keys(stored, to_store(phantom()))


def test_without_the_config_files_an_absent_key_is_refused(monkeypatch, tmp_path):
    """As where lclseg is installed without them: too careful rather than too easy."""
    old = to_store(phantom())
    del old["crf"]["num_steps"]
    now = to_store(phantom())
    monkeypatch.setattr(stored_config, "CONFIGS", tmp_path)
    stored_config._defaults.cache_clear()
    try:
        assert differing_keys(as_now(old), now) == ["crf.num_steps"]
    finally:
        stored_config._defaults.cache_clear()


def test_what_a_run_may_change_when_it_goes_on():
    before = to_store(phantom())
    longer = to_store(phantom(rounds__num_rounds=4, rounds__baseline_steps=600, log__every=7))
    assert refused_changes(before, longer, begun=["baseline"]) == []
    assert refused_changes(before, longer, begun=["baseline", "round_1"]) == [
        "rounds.baseline_steps"
    ]


@pytest.mark.parametrize("by_method", [False, True])
def test_what_a_baseline_depends_on(by_method):
    def found(now, before=None):
        before = to_store(before or phantom())
        return baseline_differences(before, to_store(now), by_method=by_method)

    later = phantom(rounds__refresh_every=7, crf__num_steps=2, rounds__num_rounds=1)
    assert found(later) == []
    assert found(phantom(optimizer__learning_rate=0.5)) == ["optimizer.learning_rate"]
    # It is validated by it, and tested. Of largest components a test tells both.
    assert found(phantom(predictions__largest_component="no")) == []
    averaged = "predictions.test_time_augmentation"
    assert found(phantom(predictions__test_time_augmentation=True)) == [averaged]
    refined = phantom(predictions__crf=True, crf__num_steps=2)
    assert found(refined) == ["crf.num_steps", "predictions.crf"]
    stronger = phantom(predictions__crf=True, crf__num_steps=2, crf__bilateral_weight=0.5)
    assert found(stronger, refined) == ["crf.bilateral_weight"]
    smoothed = {"predictions__through_plane_sigma": 1.0, "pseudo_labels__through_plane_sigma": 1.0}
    assert found(phantom(**smoothed)) == ["predictions.through_plane_sigma"]
    # An option of the method counts where the method trains the first stage its own way.
    assert found(phantom(method__temperature=0.5)) == ["method.temperature"] * by_method
    assert ("method.name" in found(phantom("self_training"))) == by_method


def test_a_workdir_of_an_older_version_goes_on(tmp_path):
    """config.json as it was: tables whole, and a key less."""
    content = json.loads(phantom().to_json_best_effort())
    del content["predictions"]["largest_component"]
    assert "splits" in content["data"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    claim_workdir(phantom(), tmp_path).close()
    data = json.loads((tmp_path / "config.json").read_text())["data"]
    assert "splits" not in data and data["labeled"] == ["phantom_000"]
