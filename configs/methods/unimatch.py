"""Two strong views and dropped features; see lclseg/methods/unimatch.py."""

OPTIONS = {
    "threshold": 0.95,  # pixels less certain than this are not learnt from
    "cutmix_probability": 0.5,  # chance of a pasted box, for each strong view
    "cutmix_area_range": (0.02, 0.4),  # of the box, a share of the slice
    "cutmix_aspect_range": (0.3, 3.3),  # height / width of the box
}
