"""How far something has come: a bar on a terminal, a line every minute or so in a log file.

Imports no JAX: the processes that prepare volumes use it, too.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Self, TypeVar

from tqdm import tqdm

EVERY_SECONDS = 60.0  # between two lines, where nothing else is told
logger = logging.getLogger("lclseg")
Item = TypeVar("Item")


def on_terminal() -> bool:
    """Tells whether somebody watches standard error, where bars are drawn."""
    return sys.stderr.isatty()


class Progress:
    """Tells how far a stage, or any other loop, has come. A context manager.

    The first line stands `EVERY_SECONDS` after the beginning, so that what is quick says nothing.
    """

    def __init__(
        self,
        name: str,
        first: int,
        last: int,
        *,
        unit: str,
        leave: bool = True,
        terminal: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
        say: Callable[[str], None] = logger.info,
    ):
        """Begins to count.

        Args:
          name: of what goes on, such as "baseline".
          first: how many are done already.
          last: how many there are.
          unit: what is counted, such as "step".
          leave: whether a finished bar stays on the terminal.
          terminal: draw a bar; None: where standard error is a terminal.
          clock: seconds.
          say: takes a line; the default is the log, where only the first process speaks.
        """
        self._name, self._done, self._last, self._unit = name, first, last, unit
        self._clock, self._say = clock, say
        self._scalars: dict[str, float] = {}
        self._told_at, self._told = clock(), first
        self._counted = False  # whether `update` was called; the first call waits for a compiler
        terminal = on_terminal() if terminal is None else terminal
        self._bar = (
            tqdm(desc=name, total=last, initial=first, unit=unit, leave=leave) if terminal else None
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, done: int, **scalars: float) -> None:
        """Takes note that `done` are done in all, and of scalars to show, such as loss=0.3.

        A line is due where the last one is `EVERY_SECONDS` old.
        """
        self._scalars |= scalars
        if self._bar is not None:
            if scalars:
                shown = {name: _short(value) for name, value in self._scalars.items()}
                self._bar.set_postfix(shown, refresh=False)
            self._bar.update(done - self._done)
        self._done = done
        if not self._counted:
            self._counted = True
            self._told_at, self._told = self._clock(), done
        elif self._bar is None and self._clock() - self._told_at >= EVERY_SECONDS:
            self._line()

    def tell(self, **scalars: float) -> None:
        """Prints a line at once, for what is rare and worth one, such as validation_dice=0.8."""
        if self._bar is not None:
            self.update(self._done, **scalars)
        else:
            self._line(**scalars)

    def _line(self, **scalars: float) -> None:
        now = self._clock()
        parts = [f"{self._unit} {self._done} of {self._last}"]
        parts += [f"{_words(k)} {_short(v)}" for k, v in (self._scalars | scalars).items()]
        seconds, count = now - self._told_at, self._done - self._told
        if count and seconds > 0:
            rate = count / seconds
            left = (self._last - self._done) / rate
            parts.append(_rate(rate, self._unit))
            parts.append(f"{duration(left)} left")
        self._say(f"{self._name}: {', '.join(parts)}")
        self._told_at, self._told = now, self._done


def steps(stage: str, first: int, last: int) -> Progress:
    """Shows progress of training that goes on after step `first`, up to step `last`."""
    return Progress(stage, first, last, unit="step")


def each(
    items: Iterable[Item],
    name: str,
    total: int,
    *,
    unit: str = "volume",
    leave: bool = True,
    say: Callable[[str], None] = logger.info,
) -> Iterator[Item]:
    """Yields the items, and tells how many of `total` are done; see `Progress`.

    `name` says what is done to them, such as "preparing volumes".
    """
    with Progress(name, 0, total, unit=unit, leave=leave, say=say) as progress:
        for done, item in enumerate(items, start=1):
            yield item
            progress.update(done)


def to_stderr(line: str) -> None:
    """Prints a line beside a command's output, for commands that have no log."""
    print(line, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Puts seconds in words, to two units: "45 s", "3 min 20 s", "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _rate(per_second: float, unit: str) -> str:
    if per_second >= 1:
        return f"{per_second:.1f} {unit}s/s"
    return f"{1 / per_second:.1f} s/{unit}"


def _words(name: str) -> str:
    return name.replace("_dice", " Dice").replace("_", " ")


def _short(value: float) -> str:
    return f"{value:.4f}"
