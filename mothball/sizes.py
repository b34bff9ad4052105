"""Sizes in texts that people write: ``10GiB``, ``512K``, ``1048576``, ``never``. Units are powers of 1024; numbers are bytes."""

from __future__ import annotations

import re

from mothball.durations import NEVER, quote
from mothball.errors import InvalidParams

MAX_BYTES = 1 << 53
"""What Lua and JSON count exactly, 8 PiB."""
_SIZE = re.compile(r"(?i)\s*([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*(b|[kmgtp](?:i?b)?)?\s*\Z")
_LETTERS = "bkmgtp"


def read(text: str) -> int | None:
    """Bytes of ``1048576``, ``512KiB``, ``20M``, ``1.5GiB``; None when `text` is no size."""
    found = _SIZE.match(text)
    if not found:
        return None
    return int(float(found[1]) * 1024 ** _LETTERS.index((found[2] or "b")[0].lower()))


def parse(value: object, what: str = "size") -> int | None:
    """Bytes of a number or a text such as ``10GiB``; None for ``never``.

    Zero, negative ones, nonsense and more than 8 PiB are `InvalidParams` that names `what`.
    """
    if value == NEVER:
        return None
    size = read(value) if isinstance(value, str) else value
    if isinstance(size, bool) or not isinstance(size, int):
        raise InvalidParams(f"{what}={quote(value)} is not a size; write for example 10GiB, 500MiB, 1048576 or never")
    if not 1 <= size <= MAX_BYTES:
        raise InvalidParams(f"{what}={quote(value)} must be from 1 byte to 8 PiB; write never for no limit")
    return size


def show(size: int | None) -> str:
    """The text that `parse` reads back as `size`, in the largest unit that says it exactly: ``10GiB``, ``1500``, ``never``."""
    if size is None:
        return NEVER
    for power in range(len(_LETTERS) - 1, 0, -1):
        if size and size % 1024**power == 0:
            return f"{size // 1024**power}{_LETTERS[power].upper()}iB"
    return str(size)
