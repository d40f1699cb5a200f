"""Signals: the first asks, the second ends."""

import os
import signal
import subprocess
import sys

import pytest

from lclseg.run import stopping


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_a_signal_asks_and_handlers_are_put_back(number):
    before = [signal.getsignal(s) for s in stopping.SIGNALS]
    with stopping.stop_on_signals() as asked:
        assert not asked()
        os.kill(os.getpid(), number)
        assert asked()
    assert [signal.getsignal(s) for s in stopping.SIGNALS] == before


@pytest.mark.parametrize("first", stopping.SIGNALS)
@pytest.mark.parametrize("second", stopping.SIGNALS)
def test_a_second_signal_ends_the_process_at_once(first, second):
    """A process that never looks whether a stop was asked for."""
    program = (
        "import os, time\n"
        "from lclseg.run import stopping\n"
        "with stopping.stop_on_signals() as asked:\n"
        f"    os.kill(os.getpid(), {int(first)})\n"
        "    print('asked', asked(), flush=True)\n"
        f"    os.kill(os.getpid(), {int(second)})\n"
        "    time.sleep(30)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.stdout == "asked True\n"
    assert ended.returncode == -second
