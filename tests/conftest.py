import os
import tempfile
from pathlib import Path

import jax
import pytest

# Before JAX's first computation: the tests of the steps compare 1, 2 and 4 devices.
jax.config.update("jax_num_cpu_devices", 4)
# Every broadcast between different ranks must be spelled out.
jax.config.update("jax_numpy_rank_promotion", "raise")
# A program that several tests compile is compiled once per session.
_CACHE = tempfile.TemporaryDirectory(prefix="lclseg-test-cache-")
jax.config.update("jax_compilation_cache_dir", _CACHE.name)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes, too")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        skip = pytest.mark.skip(reason="takes minutes; --slow runs it")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; skipped without --slow")
    config.addinivalue_line(
        "markers", "real_data: reads files outside the repository; skipped where they are absent"
    )


def _real_data_subfolder(name):
    default = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("LCLSEG_REAL_DATA", default)).expanduser() / name
    if not folder.is_dir():
        pytest.skip(f"there is no folder {folder}; set LCLSEG_REAL_DATA to the folder above it")
    return folder


@pytest.fixture(scope="session")
def golden_folder():
    """Inputs, value and gradient of the authors' loss, one NPZ file each."""
    return _real_data_subfolder("golden")


@pytest.fixture(scope="session")
def real_data_folder():
    """Downloaded data sets, as their publishers pack them."""
    return _real_data_subfolder("data")
