"""Durations in texts that people write: ``90m``, ``24h``, ``7d``, ``2h30m``, ``never``. Elsewhere they are milliseconds."""

from __future__ import annotations

import re

from mothball.errors import InvalidParams

NEVER = "never"
MAX_MS = 100 * 365 * 86_400_000
"""100 years: more than that is a mistake, and sums with it would leave what Lua counts exactly."""
_UNITS = {"w": 604_800_000, "d": 86_400_000, "h": 3_600_000, "m": 60_000, "s": 1000}
_DURATION = re.compile(r"(?:[0-9]{1,12}[wdhms])+\Z")
_PART = re.compile(r"([0-9]+)([wdhms])")
_LONGEST_TEXT = 100
_QUOTED = 50


def parse(text: object, what: str = "duration") -> int | None:
    """Milliseconds of ``90m``, ``24h``, ``7d``, ``2h30m``; None for ``never``. Units are w, d, h, m (minutes) and s.

    Zero, negative ones, plain numbers, nonsense and more than 100 years are `InvalidParams` that names `what`.
    """
    if text == NEVER:
        return None
    if not isinstance(text, str) or len(text) > _LONGEST_TEXT or not _DURATION.match(text):
        raise InvalidParams(f"{what}={quote(text)} is not a duration; write for example 90m, 24h, 7d, 2h30m or never")
    total = sum(int(number) * _UNITS[unit] for number, unit in _PART.findall(text))
    if not 1 <= total <= MAX_MS:
        raise InvalidParams(f"{what}={text} must be more than nothing and at most 100 years; write never to switch it off")
    return total


def quote(value: object) -> str:
    """`value` as an error repeats it: at most 50 characters, whatever somebody passed."""
    try:
        text = repr(value)
    except ValueError:  # a number with thousands of digits
        return f"a {type(value).__name__} of many digits"
    return text if len(text) <= _QUOTED else f"{text[:_QUOTED]}..."


def show(ms: int | None) -> str:
    """The text that `parse` reads back as `ms`, in one unit of at most a day: ``90m``, ``1d``, ``never``.

    What is no whole number of seconds came from no such text; it is shown in ``ms`` and `parse` refuses it.
    """
    if ms is None:
        return NEVER
    for unit, size in _UNITS.items():
        if unit != "w" and ms and ms % size == 0:
            return f"{ms // size}{unit}"
    return f"{ms}ms"


def ago(ms: int) -> str:
    """A span of time for people: ``3h 12m``, ``2d``, ``45s``, ``0s``; two units at most, rounded down, never negative."""
    seconds = max(ms, 0) // 1000
    for size, unit, smaller, sub in ((86_400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if seconds >= size:
            rest = seconds % size // smaller
            return f"{seconds // size}{unit}" + (f" {rest}{sub}" if rest else "")
    return f"{seconds}s"
