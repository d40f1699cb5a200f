"""One HTML page on a run, or one that compares runs: no scripts, nothing fetched, light or dark."""
