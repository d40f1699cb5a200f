"""Lines in a log file: when they come and what they say. The clock is the test's own."""

import io
import subprocess
import sys

import pytest

from lclseg.run import progress


class Clock:
    """Seconds that pass only when the test says so."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def in_a_log(first, last, *, name="baseline", unit="step"):
    """(progress, its clock, the lines it has said)."""
    clock, lines = Clock(), []
    seen = progress.Progress(
        name, first, last, unit=unit, terminal=False, clock=clock, say=lines.append
    )
    return seen, clock, lines


def test_a_line_a_minute_with_loss_rate_and_time_left():
    seen, clock, lines = in_a_log(0, 500)
    for number in range(1, 132):  # one step a second; the first one waits for the compiler
        clock.now += 100.0 if number == 1 else 1.0
        seen.update(number, loss=0.5 - number / 1000)
    assert lines == [
        "baseline: step 61 of 500, loss 0.4390, 1.0 steps/s, 7 min 19 s left",
        "baseline: step 121 of 500, loss 0.3790, 1.0 steps/s, 6 min 19 s left",
    ]


def test_the_rate_is_that_since_the_line_before():
    seen, clock, lines = in_a_log(0, 1000)
    seen.update(1)
    for _ in range(2):
        clock.now += 60.0
        seen.update(seen._done + 120)
    clock.now += 60.0
    seen.update(seen._done + 12)
    assert [line.split(", ")[1] for line in lines] == ["2.0 steps/s", "2.0 steps/s", "5.0 s/step"]


def test_a_run_that_goes_on_counts_from_where_it_was():
    seen, clock, lines = in_a_log(400, 500)
    seen.update(401)
    clock.now += 60.0
    seen.update(421)
    assert lines == ["baseline: step 421 of 500, 3.0 s/step, 3 min 57 s left"]


def test_a_validation_is_told_at_once_and_the_minute_begins_anew():
    seen, clock, lines = in_a_log(0, 100)
    seen.update(1, loss=0.25)
    clock.now += 50.0
    seen.update(11)
    seen.tell(validation_dice=0.8125)
    clock.now += 59.0
    seen.update(12)
    assert lines == [
        "baseline: step 11 of 100, loss 0.2500, validation Dice 0.8125, 5.0 s/step, 7 min 25 s left"
    ]
    clock.now += 1.0
    seen.update(13)
    assert len(lines) == 2
    assert "validation" not in lines[1]  # old by now


def test_what_is_quick_says_nothing():
    seen, clock, lines = in_a_log(0, 3)
    with seen:
        for number in (1, 2, 3):
            clock.now += 1.0
            seen.update(number)
    assert lines == []


def test_nothing_is_divided_by_zero():
    seen, _, lines = in_a_log(0, 10)
    seen.tell(validation_dice=0.5)  # nothing done, no time gone
    seen.update(5)
    seen.update(6)
    seen.tell()
    assert lines == ["baseline: step 0 of 10, validation Dice 0.5000", "baseline: step 6 of 10"]


def test_each_yields_the_items_and_counts_them(monkeypatch):
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.0)
    monkeypatch.setattr(progress, "on_terminal", lambda: False)
    lines = []
    items = progress.each("abc", "preparing volumes", 3, say=lines.append)
    assert list(items) == ["a", "b", "c"]
    heads = [line.split(",")[0] for line in lines]
    assert heads == ["preparing volumes: volume 2 of 3", "preparing volumes: volume 3 of 3"]


def test_a_terminal_gets_a_bar_and_no_lines(monkeypatch):
    terminal, lines = io.StringIO(), []
    monkeypatch.setattr(sys, "stderr", terminal)
    clock = Clock()
    with progress.Progress(
        "baseline", 0, 4, unit="step", terminal=True, clock=clock, say=lines.append
    ) as seen:
        for number in range(1, 5):
            clock.now += 100.0
            seen.update(number, loss=0.125)
        seen.tell(validation_dice=0.75)
    shown = terminal.getvalue()
    assert lines == []
    assert "baseline: 100%" in shown and "4/4" in shown
    assert "loss=0.125" in shown and "validation_dice=0.75" in shown


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")],
)
def test_durations_in_words(seconds, words):
    assert progress.duration(seconds) == words


def test_needs_no_jax():
    code = "import sys, lclseg.run.progress; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
