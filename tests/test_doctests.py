"""The examples in the docstrings of what other programs may import."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "name", ["losses", "crf", "metrics", "models", "components", "through_plane"]
)
def test_examples(name):
    failed, tried = doctest.testmod(importlib.import_module(f"lclseg.{name}"))
    assert tried > 0
    assert failed == 0
