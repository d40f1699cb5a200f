"""Self-Loop uncertainty, arXiv:2007.09854, in our reading; see lclseg/methods/self_loop.py."""

OPTIONS = {
    "uncertainty_weight": 1.0,  # of the uncertainty-guided term
    "permutation_weight": 1.0,  # of the cross-entropy of permutations
    "num_permutations": 100,  # K, of 9 tiles
    "num_encoders": 3,  # Q
    "encoder_learning_rate": 0.01,  # of the Q gradient steps; not tuned
    "spread_penalty": 4.0,  # where the Q predictions differ, a pixel counts exp(-penalty x spread)
}
