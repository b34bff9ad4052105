"""Pure text: names that cannot harm a terminal, sizes, durations, times.

Names come from other people's directories. A newline in a name must not fake a line of a listing, an escape sequence
must not reach the terminal, and a name that is not UTF-8 must stay recognisable.
"""

from __future__ import annotations

import base64
import os
import re
from datetime import UTC, datetime
from typing import Any

from mothball import sizes
from mothball.errors import InvalidParams

_NAMED = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\\": "\\\\"}
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d|w)?")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0, "w": 604_800.0}
_SURROGATE_FIRST, _SURROGATE_LAST = 0xDC80, 0xDCFF
_BYTE_LAST = 0xFF


def escape(name: str) -> str:
    """`name` (from ``os.fsdecode``) in printable characters only, without loss: ``\\n``, ``\\xNN`` per odd byte, ``\\\\``."""
    if name.isprintable() and "\\" not in name:
        return name
    return "".join(char if char.isprintable() and char != "\\" else _escape_char(char) for char in name)


def printable(text: str) -> str:
    """`text` on one printable line; unlike `escape` it leaves backslashes alone, so it suits sentences."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escape_char(char) for char in text)


def _escape_char(char: str) -> str:
    if char in _NAMED:
        return _NAMED[char]
    number = ord(char)
    if _SURROGATE_FIRST <= number <= _SURROGATE_LAST:
        return f"\\x{number - 0xDC00:02x}"
    if number <= 0x7F:  # noqa: PLR2004 - the last ASCII character
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number <= 0xFFFF else f"\\U{number:08x}"  # noqa: PLR2004 - the basic plane


def path_fields(name: str) -> dict[str, str]:
    """JSON form of a file name: ``path``; a name that is not UTF-8 also has its exact bytes as ``path_b64``."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return {"path": escape(name), "path_b64": base64.b64encode(os.fsencode(name)).decode("ascii")}
    return {"path": name}


def json_safe(value: Any) -> Any:
    """`value` with lone surrogates in its texts escaped: strict JSON readers refuse them."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            return escape(value)
        return value
    if isinstance(value, dict):
        return {str(key): json_safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(item) for item in value]
    return value


def human_bytes(size: int | float) -> str:
    """`size` in bytes as ``512 B``, ``1.5 KiB``, ``20 MiB``."""
    value = float(size)
    unit = _UNITS[0]
    for unit in _UNITS:
        if abs(value) < 1024 or unit == _UNITS[-1]:  # noqa: PLR2004
            break
        value /= 1024
    if unit == "B":
        return f"{int(size)} B"
    return f"{value:.1f} {unit}" if abs(value) < 10 else f"{value:.0f} {unit}"  # noqa: PLR2004 - three digits are enough


def human_seconds(seconds: float) -> str:
    """`seconds` as ``0.25 s``, ``12 s``, ``3 m 20 s``, ``5 h 12 m``, ``3 d 4 h``."""
    if seconds < 10:  # noqa: PLR2004
        return f"{max(seconds, 0.0):.2f} s"
    total = round(seconds)
    if total < 60:  # noqa: PLR2004
        return f"{total} s"
    for size, unit, smaller, sub in ((86_400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if total >= size:
            rest = total % size // smaller
            return f"{total // size} {unit}" + (f" {rest} {sub}" if rest else "")
    return f"{total} s"


def age(at_ms: int | None, now_ms: int) -> str:
    """How long ago `at_ms` was; ``-`` when never."""
    if not at_ms:
        return "-"
    seconds = max(now_ms - at_ms, 0) / 1000
    return f"{human_seconds(float(int(seconds)) if seconds >= 1 else 0.0).replace('.00', '')} ago"


def time_text(at_ms: int | None) -> str:
    """`at_ms` (milliseconds since 1970) as ISO 8601 in UTC; ``-`` when never."""
    if not at_ms:
        return "-"
    return datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def parse_duration(text: str) -> float:
    """Seconds of ``90``, ``30s``, ``15m``, ``1h30m``, ``7d``; `InvalidParams` otherwise."""
    compact = text.replace(" ", "").lower()
    parts = list(_DURATION.finditer(compact))
    if not parts or "".join(part.group(0) for part in parts) != compact or (len(parts) > 1 and not all(p.group(2) for p in parts)):
        raise InvalidParams(f"{printable(text)!r} is not a duration; write for example 30s, 15m, 1h30m or 7d")
    return sum(float(part.group(1)) * _SECONDS[part.group(2) or "s"] for part in parts)


def parse_size(text: str) -> int:
    """Bytes of ``1048576``, ``512KiB``, ``20M``, ``1.5GiB`` (powers of 1024); `InvalidParams` otherwise."""
    if (size := sizes.read(text)) is None:
        raise InvalidParams(f"{printable(text)!r} is not a size; write for example 1048576, 512KiB or 1.5GiB")
    return size
