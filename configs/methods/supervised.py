"""Labelled slices alone; see lclseg/methods/supervised.py."""

OPTIONS: dict = {}
