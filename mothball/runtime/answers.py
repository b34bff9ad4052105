"""What programs and daemons answer, read with care: it is JSON of somebody else's making."""

from __future__ import annotations

from typing import Any

MAX_TEXT = 1000
MAX_FACTS = 50
_MAX_WHOLE = 2**63


def dig(data: Any, *names: str) -> int:
    """The whole number at `names` in nested objects; 0 for none."""
    for name in names:
        data = data.get(name) if isinstance(data, dict) else None
    return data if isinstance(data, int) and not isinstance(data, bool) else 0


def text(value: object) -> str:
    """`value` as a text of at most `MAX_TEXT` characters that can be written as UTF-8; empty for what is none."""
    # JSON's escapes bring in halves of characters, which no bytes stand for.
    return value[:MAX_TEXT].encode("utf-8", "replace").decode() if isinstance(value, str) else ""


def whole(value: object) -> int:
    """`value` as a whole number from 0; 0 for what is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MAX_WHOLE else 0


def plain(value: object) -> dict[str, Any]:
    """The plain values of an object, at most `MAX_FACTS`: they go into an event and a record."""
    if not isinstance(value, dict):
        return {}
    kept = {
        text(name)[:64]: text(each) if isinstance(each, str) else each
        for name, each in value.items()
        if each is None or isinstance(each, (str, bool)) or (isinstance(each, (int, float)) and abs(each) < _MAX_WHOLE)
    }
    return dict(list(kept.items())[:MAX_FACTS])
