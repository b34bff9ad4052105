"""The members of a crash package: what is on its way into one, and what became of each file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

Key = tuple[bool, bytes]
"""A file: whether it is the workspace's own, and its path there."""


class Packed(NamedTuple):
    """What became of one file: where its member begins and its content, how long that is, and what was found in it."""

    start: int
    content: int
    size: int
    binary: bool
    apart: bool
    """It has to be scanned by itself."""
    counts: Counter[str] | None


class Redacted(NamedTuple):
    """What became of a text, and what was found in it."""

    data: bytes | None
    """None when it stays as it is."""
    counts: dict[str, int]
    values: list[bytes]
    """The secrets."""


class Member(NamedTuple):
    """What is on its way: a header and what stands behind it, without the padding."""

    header: bytes
    names: bytes
    """All that a header says in letters: its path, and where a link leads."""
    data: bytes
    key: Key | None
    """None for what is no file; the rest says nothing then."""
    path: bytes
    """Where the file lies below the rootfs."""
    head: Callable[[int], bytes]
    """Makes its header for a size."""
    binary: bool
    """Nothing in it is redacted."""
    apart: bool
    """It has to be redacted and scanned by itself, whatever a look at it among others says."""
