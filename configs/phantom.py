"""SYNTHETIC cardiac volumes, generated on the spot: the demonstration that needs no download.

  ./run.sh        or        python -m lclseg.main --config=configs/phantom.py

Expected: test Dice 0.77 for the baseline and 0.80 after round 3 (means of three seeds), in 5 to 10
minutes on two CPU cores.

One labelled volume, short schedule. Volumes 000-043 are the pool, 044-063 the test set.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

get_default = runpy.run_path(str(Path(__file__).with_name("default.py")))["get_config"]


def ids(*numbers: int) -> tuple[str, ...]:
    return tuple(f"phantom_{n:03d}" for n in numbers)


POOL = ids(*range(44))
# num_labeled: split: (labelled, validation)
SPLITS = {
    "1": {"c1": ([0], [40, 41]), "c2": ([1], [42, 43]), "c3": ([2], [38, 39])},
    "2": {"c1": ([0, 3], [40, 41]), "c2": ([1, 4], [42, 43]), "c3": ([2, 5], [38, 39])},
}


def get_config(method: str = "local_contrastive") -> ConfigDict:
    config = get_default(method)
    data = config.data
    data.name = "phantom"
    data.image_size = 64
    data.target_spacing_mm = 2.0
    data.num_labeled = "1"
    data.pool = POOL
    data.test_patients = ids(*range(44, 64))
    data.splits = {
        n: {
            c: {"labeled": ids(*labeled), "validation": ids(*validation)}
            for c, (labeled, validation) in splits.items()
        }
        for n, splits in SPLITS.items()
    }
    data.splits["all"] = {
        c: {
            "labeled": tuple(p for p in POOL if p not in ids(*validation)),
            "validation": ids(*validation),
        }
        for c, (_, validation) in SPLITS["1"].items()
    }
    # Smaller batches than the paper's: the run has ten minutes on two cores.
    config.crf.num_steps = 0  # its spatial sigma is made for 192 px; not tried on this grid
    data.labeled_batch_size = 12
    data.unlabeled_batch_size = 12
    if config.method.name == "local_contrastive":
        config.method.pairs.update(labeled_self=1, pseudo_self=1, labeled_pseudo=2, pseudo_pseudo=2)
    config.optimizer.ema_decay = 0.98
    rounds = config.rounds
    rounds.baseline_steps = 500
    rounds.steps_per_round = 150
    # The averaged weights need statistics of their own.
    rounds.batch_norm_batches = 10
    rounds.fresh_heads = False  # too few steps to learn a head anew
    return config
