"""Renamed to lclseg.check_data; this name goes with the next release."""

import runpy
import sys

if __name__ == "__main__":
    print("lclseg: lclseg.validate is now called lclseg.check_data", file=sys.stderr)
    runpy.run_module("lclseg.check_data", run_name="__main__")
