"""What a user can mend, and how a command ends: in words, never in a traceback for these."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator


class UserError(Exception):
    """Something that the user can mend; the message names it, what was wanted, and the way out."""


class ConfigError(UserError):
    """A config that cannot be run; the message names the keys and the way out."""


class NonFiniteLossError(UserError):
    """The loss, or a gradient, became NaN or infinite; training on would lose the weights."""


@contextlib.contextmanager
def in_words() -> Iterator[None]:
    """Ends a command with one line for what the user can mend, and quietly under `| head`.

    That is a `UserError`, or an OSError of a file or disk: exit status 1. A closed pipe gives 128 +
    SIGPIPE, as programs give that the signal ends; the signal itself stays off, since it would end
    a run whose network peer is gone.
    """
    try:
        try:
            yield
        except BrokenPipeError:
            raise
        except (UserError, OSError) as error:  # of a disk or a file, which it names
            sys.exit(f"lclseg: {error}")
        finally:
            sys.stdout.flush()  # here, not as Python ends: there it can only be told of
    except BrokenPipeError:
        # What is still buffered goes nowhere, or Python would try it again on its way out.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except BrokenPipeError:
                os.dup2(nowhere, stream.fileno())
        sys.exit(128 + signal.SIGPIPE)
