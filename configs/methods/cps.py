"""Two networks that teach each other; see lclseg/methods/cps.py."""

OPTIONS = {
    "weight": 0.1,  # of the cross-entropy against the other's labels, at the end of its ramp
}
