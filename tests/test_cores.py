import os
import subprocess
import sys
from pathlib import Path

import pytest

from lclseg import cores

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity masks here")
def test_usable_cores_are_those_of_the_affinity_mask():
    program = (
        "import os; os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1]);"
        "from lclseg.cores import usable_cores; print(usable_cores())"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHON_CPU_COUNT"}
    printed = subprocess.check_output(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, text=True
    )
    assert printed == "1\n"


def test_usable_cores_where_there_are_no_affinity_masks(monkeypatch):
    """As on macOS with Python 3.11 and 3.12."""
    for name in ("process_cpu_count", "sched_getaffinity"):
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 10)
    assert cores.usable_cores() == 10
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores.usable_cores() == 1
