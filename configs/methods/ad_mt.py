"""Alternate diverse teaching, arXiv:2311.17325; see lclseg/methods/ad_mt.py."""

OPTIONS = {
    "weight": 2.0,  # of the pseudo-label term, times its ramp-up
    "threshold": 0.95,  # of the teachers' confidence
    "teacher_decay": 0.99,  # of both teachers; optimizer.ema_decay is of the weights that evaluate
    "period": 40,  # steps of a teacher's phase, on average
    # CutMix: a box of another slice, see lclseg.mixing.cutmix_mask.
    "box_probability": 0.5,
    "box_area": (0.02, 0.4),  # share of the slice
    "box_aspect": (0.3, 3.3),  # height / width
}
