"""What changed between the last good state and the failure: the blame window, with a small patch of small text files.

Both contents are redacted before they are compared: a key block whose lines each begin with ``+`` would be no key block to a rule.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Final, Protocol

import msgspec

from mothball.errors import Corrupt, NotFound
from mothball.store import Ref, RefIndex, Store
from mothball.store.diff import Change, DiffTotals, diff
from mothball.store.refs import SNAPSHOT
from mothball.store.textdiff import patch
from mothball.store.tree import Entry, Tree

MOST_CHANGES: Final = 1000
PATCH_BYTES: Final = 64 * 1024
FILE_BYTES: Final = 64 * 1024
"""Largest file that is compared line by line here."""
SECONDS: Final = 5.0
_STEPS: Final = 5_000_000
"""Comparisons of lines that one file may cost at the worst: a second or so."""
_POPULAR_FROM: Final = 200
"""From so many lines on `difflib` leaves lines alone that stand everywhere."""


class Contents(Protocol):
    """What is asked of `mothball.redact.engine.Redactor`."""

    def data(self, data: bytes, /, name: bytes = b"") -> bytes: ...


def baseline(refs: RefIndex, *, digest: str, since: str | None = None, before: str | None = None) -> Ref | None:
    """The ref that a capture `digest` is held against: `since` (a ref or a digest with one), else the newest snapshot of other
    content, else the generation `before` it, for which there may be no ref. None when there is nothing earlier.

    Raises `NotFound` for a `since` that is not there.
    """
    if since is not None:
        return refs.get(since)
    snapshots = [(int(match[1]), ref) for ref in refs.list() if (match := SNAPSHOT.match(ref.name)) and ref.digest != digest]
    if snapshots:
        return max(snapshots)[1]
    return Ref("", before, 0) if before is not None and before != digest else None


def changes(store: Store, before: Ref, after: str, *, redactor: Contents | None = None) -> dict[str, Any]:
    """What makes the capture `after` of `before`: ``ref``, ``digest``, ``totals``, ``changes`` (at most 1000), ``patch``, ``cut``.

    ``patch`` has at most 64 KiB, of files up to 64 KiB each, in at most about five seconds; ``cut`` says what is not whole and why.
    The times of folders are only counted.
    A side that is not there any more or is damaged is said in ``error``; the report is worth having without it.
    """
    head = {"ref": before.name, "digest": before.digest}
    try:
        with Tree.open(store, before.digest) as old, Tree.open(store, after) as new:
            return head | _compared(old, new, redactor)
    except (Corrupt, NotFound) as error:
        return head | {"totals": None, "changes": [], "patch": "", "cut": [], "error": error.message}


def _compared(old: Tree, new: Tree, redactor: Contents | None) -> dict[str, Any]:
    totals = DiffTotals()
    listed: list[dict[str, Any]] = []
    texts = _Texts(old, new, redactor)
    count = 0
    for change in diff(old, new):
        totals.count(change)
        if change.kind == "time" and change.after is not None and change.after.type == "dir":
            continue  # a folder's time moves with whatever is made in it
        count += 1
        if count <= MOST_CHANGES:
            listed.append(_line(change))
            texts.add(change)
    cut = [f"{count - MOST_CHANGES} changes are not listed"] if count > MOST_CHANGES else []
    return {
        "totals": msgspec.to_builtins(totals),
        "changes": listed,
        "patch": texts.text(),
        "cut": cut + texts.cut(),
        "error": None,
    }


def _line(change: Change) -> dict[str, Any]:
    return {
        "path": change.path,
        "kind": change.kind,
        "before": change.before.size if change.before else None,
        "after": change.after.size if change.after else None,
    }


class _Texts:
    """The patch as it grows: whole changes while there is room and time."""

    def __init__(self, old: Tree, new: Tree, redactor: Contents | None) -> None:
        self._old, self._new = old, new
        self._redactor = redactor
        self._pieces: list[bytes] = []
        self._room = PATCH_BYTES
        self._end = time.monotonic() + SECONDS
        self._left: Counter[str] = Counter()

    def add(self, change: Change) -> None:
        if why := self._refusal(change):
            self._left[why] += 1
            return
        try:
            piece = b"".join(self._lines(change))
        except Corrupt:
            self._left["of which the content is damaged"] += 1
            return
        if len(piece) > self._room:
            self._left[f"because the patch has at most {PATCH_BYTES} bytes"] += 1
            return
        self._pieces.append(piece)
        self._room -= len(piece)

    def text(self) -> str:
        return b"".join(self._pieces).decode("utf-8", "surrogateescape")

    def cut(self) -> list[str]:
        return [f"{count} changes are not in the patch, {why}" for why, count in sorted(self._left.items())]

    def _refusal(self, change: Change) -> str:
        sizes = [entry.size for entry in (change.before, change.after) if entry is not None]
        if max(sizes, default=0) > FILE_BYTES:
            return f"of files over {FILE_BYTES} bytes"
        return "" if time.monotonic() < self._end else f"because {SECONDS:g} s were over"

    def _lines(self, change: Change) -> Iterator[bytes]:
        before, after = self._content(self._old, change.before), self._content(self._new, change.after)
        if "changed" in change.aspects and _steps(before, after) > _STEPS:
            self._left["of files that differ too much to be compared line by line"] += 1
            return iter(())
        return patch(change, lambda _: before, lambda _: after)

    def _content(self, tree: Tree, entry: Entry | None) -> bytes:
        if entry is None or entry.type not in {"file", "hardlink"}:
            return b""
        data = tree.read(entry.path, limit=FILE_BYTES)
        if self._redactor is None or b"\0" in data:
            return data  # a binary file is only said to differ
        return self._redactor.data(data, name=entry.path.encode("utf-8", "surrogateescape"))


def _steps(before: bytes, after: bytes) -> int:
    """At most so many steps does `difflib` take: equal pairs of lines, once for each line at which it may split the files.

    What both begin and end with is found at once. Lines that stand in more than one of a hundred places it leaves alone.
    """
    one, other = before.split(b"\n"), after.split(b"\n")
    first = _same(one, other)
    last = _same(one[first:][::-1], other[first:][::-1])
    common = len(other) // 100 + 1 if len(other) >= _POPULAR_FROM else len(other)
    places = {text: count for text, count in Counter(other).items() if count <= common}
    left, right = Counter(one[first : len(one) - last]), Counter(other[first : len(other) - last])
    pairs = sum(count * right[text] for text, count in left.items() if text in places)
    return pairs * min(left.total(), right.total())


def _same(one: Sequence[bytes], other: Sequence[bytes]) -> int:
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count
