import gc
import itertools
import os
import runpy
import tempfile
from pathlib import Path

import jax
import pytest

# Before JAX's first computation: the tests of the steps compare 1, 2 and 4 devices.
jax.config.update("jax_num_cpu_devices", 4)
# Every broadcast between different ranks must be spelled out.
jax.config.update("jax_numpy_rank_promotion", "raise")
# Most of the time of the tests is XLA's. A program that several tests compile is compiled once per
# session, whichever worker of pytest-xdist needs it: they inherit the controller's environment.
CACHE = "LCLSEG_TEST_CACHE"
if CACHE not in os.environ:
    _folder = tempfile.TemporaryDirectory(prefix="lclseg-test-cache-")
    os.environ[CACHE] = _folder.name
jax.config.update("jax_compilation_cache_dir", os.environ[CACHE])
# Programs run once or twice here: XLA's costly passes take longer than they save. Programs of
# processes that tests start, and of CI's run in short, are compiled as ever.
jax.config.update("jax_disable_most_optimizations", True)


# A compiled program takes some of the 65530 memory maps that Linux grants a process; without them
# the next program ends it with a segmentation fault.
MANY_MAPS = 30_000
_tests = itertools.count(1)


@pytest.fixture(autouse=True)
def forget_programs():
    """Drops compiled programs, where there are many: what is needed again comes from the cache."""
    yield
    maps = Path("/proc/self/maps")
    if next(_tests) % 10 == 0 and maps.exists():
        with maps.open("rb") as lines:
            if sum(1 for _ in lines) > MANY_MAPS:
                jax.clear_caches()
                gc.collect()


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


@pytest.fixture(scope="session")
def real_data_folder():
    """Downloaded data sets, as their publishers pack them."""
    default = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("LCLSEG_REAL_DATA", default)).expanduser() / "data"
    if not folder.is_dir():
        pytest.skip(f"there is no folder {folder}; set LCLSEG_REAL_DATA to the folder above it")
    return folder


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """(workdir, results) of a finished run on six phantom volumes; it tested 004 and 005."""
    from lclseg import train
    from tfds_builders.phantom import phantom_dataset_builder as phantom

    root = Path(__file__).resolve().parents[1]
    config = runpy.run_path(str(root / "configs" / "phantom.py"))["get_config"]("local_contrastive")
    data = config.data
    data.data_dir = str(tmp_path_factory.mktemp("data"))
    data.image_size, data.target_spacing_mm = 32, 4.0
    data.labeled, data.unlabeled = ("phantom_000",), ("phantom_001",)
    data.validation, data.test = ("phantom_002", "phantom_003"), ("phantom_004", "phantom_005")
    data.labeled_batch_size = 4
    config.method.pairs.update(labeled_self=1, pseudo_self=1, labeled_pseudo=1, pseudo_pseudo=1)
    config.method.view_min_classes = 1
    data.eval_batch_size = 16
    config.model.filters = (4, 8)
    config.augment.strength = "paper"  # compiled in half the time
    config.predictions.test_time_augmentation = config.predictions.crf = True
    config.predictions.crf_upsampling = 2
    config.predictions.through_plane_sigma = 8.0  # mm, of slices 8 to 10 mm apart
    config.crf.update(num_steps=2, bilateral_sigma=1.0, intensity_sigma=0.1, bilateral_weight=1.0)
    config.crf.update(spatial_sigma=1.0, spatial_weight=0.5)
    config.optimizer.update(ema_decay=0.0, learning_rate=0.01)
    config.rounds.update(baseline_steps=20, num_rounds=1, steps_per_round=4, eval_every=4)
    workdir = tmp_path_factory.mktemp("run") / "tiny"
    cases = phantom.find_cases(6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phantom, "find_cases", lambda: cases)
        return workdir, train.train_and_evaluate(config, workdir)
