"""The name of a crash report: its id, its ref in the store and the stem of its package's file (B-55, B-60)."""

from __future__ import annotations

import hashlib
import re
from datetime import UTC, datetime
from typing import Final

from mothball.errors import InvalidParams
from mothball.names import slug

PREFIX: Final = "crash-"
MAX_ID: Final = 120
"""Longest id; with ``.tar.age`` and what a temporary file adds it stays far below the 255 bytes of a file name."""
PACKAGE: Final = ".tar"
SEALED: Final = ".tar.age"
_DIGEST: Final = 8
_ID = re.compile(r"crash-[A-Za-z0-9_][A-Za-z0-9._-]*-[0-9]{8}-[0-9]{6}Z-[0-9a-f]{8}\Z")


def report_id(*, repo: str | None, workspace: str, number: int | None, at_ms: int, digest: str) -> str:
    """``crash-<slug>-issue-<n>-<YYYYMMDD-HHMMSS>Z-<digest8>`` of a report made at `at_ms` (ms of Redis TIME), in UTC (B-53, B-55).

    The slug is that of the repo, of the workspace without one; it is an allow-list (B-60) and is cut so that the id has at most
    `MAX_ID` characters. ``-issue-<n>`` is left out without a number. `digest`: hex, the first 8 count; it tells two reports of
    one second apart. `InvalidParams` for a time, a number or a digest that is none.
    """
    if not re.match(r"[0-9a-f]{8}", digest):
        raise InvalidParams(f"the digest of a crash report must be hex, not {digest!r}")
    if number is not None and (isinstance(number, bool) or not 0 <= number < 10**18):
        raise InvalidParams(f"the number of a crash report's issue must be 0 or more and have at most 18 digits, not {number!r}")
    tail = f"-issue-{number}" if number is not None else ""
    tail += f"-{_stamp(at_ms)}-{digest[:_DIGEST]}"
    return PREFIX + _short(repo or workspace, MAX_ID - len(PREFIX) - len(tail)) + tail


def is_report_id(text: object) -> bool:
    """True for a text that `report_id` could have made: it is a safe file name and a safe ref."""
    return isinstance(text, str) and len(text) <= MAX_ID and _ID.match(text) is not None


def check_report_id(text: object) -> str:
    """`text` when it is the id of a crash report, else `InvalidParams`: nothing else ever becomes part of a path."""
    if not is_report_id(text):
        raise InvalidParams(f"{str(text)[:200]!r} is not the id of a crash report; `mothball crash-reports` lists them")
    return str(text)


def _short(value: str, room: int) -> str:
    safe = slug(value)
    if len(safe) <= room:
        return safe
    digest = hashlib.sha256(value.encode("utf-8", "surrogatepass")).hexdigest()[:_DIGEST]
    return f"{safe[: room - _DIGEST - 1]}-{digest}"


def _stamp(at_ms: int) -> str:
    try:
        return datetime.fromtimestamp(at_ms // 1000, UTC).strftime("%Y%m%d-%H%M%SZ")
    except (ValueError, OverflowError, OSError):
        raise InvalidParams(f"{at_ms!r} is not a time in milliseconds since 1970") from None
