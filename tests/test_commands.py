"""How commands end: one line for what the user can mend, and no traceback under `| head`."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lclseg.errors import UserError, in_words

ROOT = Path(__file__).parents[1]
COMMANDS = {
    "main": ("--help",),
    "predict": ("--help",),
    "export": ("--help",),
    "report": ("--help",),
    "suggest": ("--help",),
    "check_data": ("--input=tests",),
    "sweep": ("--sweep=configs/sweeps/hippocampus.py", "--table_only"),
}


def into_a_closed_pipe(command):
    """Exit status and standard error of a command whose reader has gone before the first line."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    read, write = os.pipe()
    os.close(read)
    try:
        ended = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
    finally:
        os.close(write)
    return ended.returncode, ended.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_ends_in_a_traceback_when_nobody_reads(name):
    command = [sys.executable, "-m", f"lclseg.{name}", *COMMANDS[name]]
    code, errors = into_a_closed_pipe(command)
    assert "Traceback" not in errors and "BrokenPipe" not in errors and "Exception" not in errors
    assert code == 128 + signal.SIGPIPE


def test_a_closed_pipe_in_the_middle_and_at_the_end():
    for body in ("[print(n) for n in range(10**5)]", "print(1)"):
        program = f"from lclseg.errors import in_words\nwith in_words():\n    {body}"
        assert into_a_closed_pipe([sys.executable, "-c", program]) == (141, "")


@pytest.mark.parametrize(
    "error", [UserError("no such thing; wanted another"), FileNotFoundError(2, "gone", "x.nii")]
)
def test_what_the_user_can_mend_is_one_line(error):
    with pytest.raises(SystemExit) as caught, in_words():
        raise error
    assert caught.value.code == f"lclseg: {error}"


def test_a_mistake_of_the_program_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), in_words():
        1 / 0  # noqa: B018
