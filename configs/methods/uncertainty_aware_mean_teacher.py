"""Agreement with a certain teacher; see lclseg/methods/uncertainty_aware_mean_teacher.py."""

OPTIONS = {
    "weight": 0.1,  # of the squared difference, at the end of its ramp
    "noise_sigma": 0.1,  # standard deviation of the noise on what the teacher sees
    "noise_bound": 0.2,  # which it is clipped to, either way
    "passes": 8,  # of the teacher, whose mean says how certain it is
    "start": 0.75,  # highest entropy of a certain pixel at first, a share of log C; 1 in the end
}
