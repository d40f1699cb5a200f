"""Renamed to lclseg.sweep; this name goes with the next release."""

import runpy
import sys

if __name__ == "__main__":
    print("lclseg: lclseg.ablation is now called lclseg.sweep", file=sys.stderr)
    runpy.run_module("lclseg.sweep", run_name="__main__")
