"""What the values of a config owe one another."""

import runpy
from pathlib import Path

import pytest

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_averaged_weights_have_statistics_of_their_own(path):
    """BatchNorm's running statistics belong to other weights than the averaged ones."""
    config = runpy.run_path(str(path))["get_config"]()
    assert not config.optimizer.ema_decay or config.rounds.batch_norm_batches
