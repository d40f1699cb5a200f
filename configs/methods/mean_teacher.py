"""Agreement with the averaged weights; see lclseg/methods/mean_teacher.py."""

OPTIONS = {
    "weight": 0.1,  # of the squared difference, at the end of its ramp
    "noise_sigma": 0.1,  # standard deviation of the noise on what the teacher sees
    "noise_bound": 0.2,  # which it is clipped to, either way
}
