"""Stopping in good order: SIGTERM and SIGINT ask, and the run stops where nothing is lost."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from lclseg.run import multihost

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(Exception):  # noqa: N818, not an error
    """The run stopped because it was asked to, with everything saved; the message tells where."""


@contextlib.contextmanager
def ending_on_disk_errors(workdir: Path) -> Iterator[None]:
    """Ends the process at once with one line on what the disk refused, and the way out."""
    try:
        yield
    except BrokenPipeError:  # no disk's
        raise
    except OSError as error:
        multihost.end(
            f"lclseg: {error.strerror or error}: {error.filename or workdir}. The run in {workdir} "
            "stopped; what it had finished is intact, and once the disk is in order the same "
            "command goes on from there"
        )


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether a stop was asked for.

    The first SIGTERM or SIGINT (Ctrl-C) asks; the second does what it does without us, and ends the
    process at once. Handlers are put back on leaving. Main thread only.
    """
    asked = threading.Event()
    previous = {s: signal.getsignal(s) for s in SIGNALS}

    def ask(number, frame):
        asked.set()
        for s in SIGNALS:
            signal.signal(s, signal.SIG_DFL)

    try:
        for s in SIGNALS:
            signal.signal(s, ask)
        yield asked.is_set
    finally:
        for s, handler in previous.items():
            # None: one of JAX's, in C++, that Python cannot put back.
            signal.signal(s, signal.SIG_DFL if handler is None else handler)
