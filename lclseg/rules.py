"""Which values a key may have: a test of the value, and the same in words for the message."""

import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """Which values a key may have, as a test and in words."""

    holds: Callable[[Any], bool]
    wanted: str


def is_number(value: Any) -> bool:
    """Tells whether a value is finite, and no bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: Any) -> bool:
    """Tells whether a value is a whole number, and no bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def whole(least: int, most: int | None = None) -> Rule:
    """Makes the rule of a whole number, `least` or more, `most` at most."""
    words = f"a whole number, {least} or more" if most is None else f"{least} to {most}, whole"
    return Rule(lambda v: is_whole(v) and least <= v and (most is None or v <= most), words)


def one_of(*choices: Any) -> Rule:
    """Makes the rule of a value that is one of some."""
    return Rule(lambda v: v in choices, f"one of {', '.join(map(str, choices))}")


def each(holds: Callable[[Any], bool], wanted: str, *, at_least: int = 0) -> Rule:
    """Makes the rule of a tuple or list whose items are all right."""

    def right(value):
        return isinstance(value, tuple | list) and len(value) >= at_least and all(map(holds, value))

    return Rule(right, wanted)


def span(in_order: Callable[[Any, Any], bool], wanted: str) -> Rule:
    """Makes the rule of two numbers, (low, high), that are in order."""

    def right(value):
        is_pair = isinstance(value, tuple | list) and len(value) == 2
        return is_pair and all(map(is_number, value)) and in_order(*value)

    return Rule(right, wanted)


ABOVE_0 = Rule(lambda v: is_number(v) and v > 0, "a number above 0")
NOT_NEGATIVE = Rule(lambda v: is_number(v) and v >= 0, "0 or more")
SHARE_BELOW_1 = Rule(lambda v: is_number(v) and 0 <= v < 1, "0 <= x < 1")
PROBABILITY = Rule(lambda v: is_number(v) and 0 <= v <= 1, "0 <= x <= 1")
TEXT = Rule(lambda v: isinstance(v, str), "text")
NAME = Rule(lambda v: isinstance(v, str) and v != "", "text that is not empty")
NAMES = each(NAME.holds, "a tuple of texts, none of them empty")
YES_NO = Rule(lambda v: isinstance(v, bool), "True or False")
# Of `optimizer.ema_decay`, where the averaged weights are the teacher.
AVERAGED = Rule(
    lambda v: is_number(v) and 0 < v < 1,
    "0 < x < 1, such as 0.99: the averaged weights are this method's teacher, and at 0 they are "
    "the network itself",
)
FACTORS = span(lambda low, high: 0 <= low <= high, "(low, high) with 0 <= low <= high")
INTERVAL = span(lambda low, high: low < high, "(low, high) with low < high")
