"""The rows of the sweeps that compare methods: each is the short config of its set, and no more.

Same network, optimiser, steps, batches and augmentation in all. The first row is compared with.
"""


def self_training(weight: float, copy_paste: bool = False) -> dict:
    """A row of self-training whose loss on pseudo-labels counts so much."""
    values = {"method.weight": weight, "method.copy_paste": copy_paste}
    return {"method": "self_training"} | values


ROWS = {
    "supervised": {"method": "supervised"},
    "self-training": {"method": "self_training", "method.copy_paste": False},
    "self-training, copy-paste": {"method": "self_training", "method.copy_paste": True},
    "local contrastive": {"method": "local_contrastive"},
    # What the contrastive term itself is worth: all else is as in the row above.
    "local contrastive, without its term": {
        "method": "local_contrastive",
        "method.contrastive_weight": 0.0,
    },
    "BCP": {"method": "bcp"},
    "UniMatch": {"method": "unimatch"},
    "supervised, paper's augmentation": {"method": "supervised", "augment.strength": "paper"},
    "FixMatch": {"method": "fixmatch"},
    "mean teacher": {"method": "mean_teacher"},
    "uncertainty-aware mean teacher": {"method": "uncertainty_aware_mean_teacher"},
    "CPS": {"method": "cps"},
    "AD-MT": {"method": "ad_mt"},
    "RCPS": {"method": "rcps"},
    "self-loop": {"method": "self_loop"},
    "all labels": {
        "method": "supervised",
        "data.num_labeled": "all",
        "rounds.num_rounds": 0,
        "rounds.baseline_steps": 1000,
    },
}
PAIRS = (("c1", 0), ("c2", 1), ("c3", 2), ("c4", 3), ("c5", 4))
