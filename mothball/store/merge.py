"""Merging the rows of a capture's layers, in the order of their paths.

Bottom to top, a layer first takes away what it removed, then adds its rows; a row that is no folder hides whatever lay
below that path. The lowest layer has nearly all rows and the layers above few, so its rows pass in runs between two paths
that a layer above names; only at such a path all layers are looked at. One block per layer is in memory.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, cast

from mothball.errors import Corrupt
from mothball.store.read import Layer, show
from mothball.store.toc import Toc, TocRow, row_key, sort_key

Event = tuple[bytes, int, int, TocRow | None]
"""(key, -layer, 1, row), or (key, -layer, 0, None) where that layer takes away what lies below it."""
Range = tuple[bytes, bytes | None]
"""Keys from the first to before the second; None: to the end."""
Hidden = list[bytes | None]
"""Per layer, the prefix of keys under which it is hidden; None: nothing is."""


class Found(NamedTuple):
    """One entry of the merged tree as its layer has it; `mtime_ns` is the row's or that of a row ``m`` above it."""

    row: TocRow
    layer: int
    mtime_ns: int


Run = tuple[list[TocRow], int, int | None]
"""Entries that follow each other: rows of one layer, its number, and the mtime that overrides theirs, if one does."""


def merged(layers: Sequence[Layer], folder: bytes, hidden: Hidden, *, names_only: bool = False) -> Iterator[Run]:
    """The entries below `folder`, sorted by path components; `hidden` is as the layers' rows at and above `folder` make it.

    `Corrupt` for an entry that lies in no folder: whoever unpacks that would write through something else. With `names_only`
    rows may have no more than a path and a type, which takes a third of the time.
    """
    base = sort_key(folder)
    start, stop = (base + b"\0", base + b"\1") if folder else (b"\0", None)
    return in_folders(layers, folder, _visible(layers, start, stop, hidden, names_only=names_only))


def flat(runs: Iterable[Run]) -> Iterator[Found]:
    """The entries of `runs` one by one."""
    new = tuple.__new__  # skips the keyword handling of a named tuple
    for rows, layer, mtime_ns in runs:
        for row in rows:
            yield new(Found, (row, layer, row.mtime_ns if mtime_ns is None else mtime_ns))


def in_folders(layers: Sequence[Layer], folder: bytes, runs: Iterable[Run]) -> Iterator[Run]:
    """`runs`, in which each entry lies in `folder` or in a folder before it; else `Corrupt`.

    What lies in a folder follows it without a gap. So the folder of an entry is in the same run, or the last entry of the run
    before lies in it: a look at all rows of a run together, which costs half of a look at each.
    """
    top = folder + b"/" if folder else b""
    entered = {top}
    for run in runs:
        rows = run[0]
        if not rows:
            continue
        kinds = [row.type for row in rows]
        if "m" in kinds:
            raise _only_an_mtime(rows[kinds.index("m")].path)
        if "d" in kinds:
            entered |= {row.path + b"/" for row in rows if row.type == "d"}
        if not {row.path[: row.path.rfind(b"/") + 1] for row in rows} <= entered:
            lost = next(row.path for row in rows if row.path[: row.path.rfind(b"/") + 1] not in entered)
            raise layers[run[1]].toc.corrupt(f"{show(lost)} lies in no folder")
        last = rows[-1].path + b"/"
        entered = {folder for folder in entered if last.startswith(folder)}
        yield run


def _visible(layers: Sequence[Layer], start: bytes, stop: bytes | None, hidden: Hidden, *, names_only: bool) -> Iterator[Run]:
    """The lowest layer's rows run by run, and what is at each path that a layer above names."""
    if not layers:
        return
    lowest = _Rows(layers[0].toc, start, stop, names_only=names_only)
    for key, group in grouped([layer_events(layer.toc, layer.number, [(start, stop)]) for layer in layers[1:]]):
        for rows in lowest.before(key):
            yield rows if hidden[0] is None else _without(rows, hidden[0]), 0, None
        if (row := lowest.at(key)) is not None:
            group.append((key, 0, 1, row))
        if (found := top_of(key, group, hidden)) is not None:
            yield [found.row], found.layer, found.mtime_ns
    for rows in lowest.before(None):
        yield rows if hidden[0] is None else _without(rows, hidden[0]), 0, None


def _without(run: list[TocRow], prefix: bytes) -> list[TocRow]:
    """`run` without the rows whose key begins with `prefix`, which ends with a NUL or is empty (then all do)."""
    if not prefix:
        return []
    first = bisect_left(run, prefix, key=row_key)
    if first == len(run) or not row_key(run[first]).startswith(prefix):
        return run
    return run[:first] + run[bisect_left(run, prefix[:-1] + b"\1", lo=first, key=row_key) :]


class _Rows:
    """The rows of one layer from `start` to before `stop`, taken in pieces of rising keys."""

    def __init__(self, toc: Toc, start: bytes, stop: bytes | None, *, names_only: bool) -> None:
        self._toc = toc
        self._stop = stop
        self._names_only = names_only
        self._block = toc.block_of(start)
        self._last = len(toc.blocks)
        self._load()
        self._place = bisect_left(self._keys, start)

    def _load(self) -> None:
        self._place = 0
        self._keys: list[bytes] = []
        self._rows: list[TocRow] = []
        if self._block >= self._last:
            return
        if self._names_only:
            named = self._toc.names(self._block)
            # Whoever asks for names reads no other field of these rows; `at` gives whole ones, for `top_of` needs their time.
            self._keys, self._rows = named.keys, cast("list[TocRow]", named.rows)
        else:
            self._keys, self._rows = self._toc.block(self._block)

    def before(self, key: bytes | None) -> Iterator[list[TocRow]]:
        """The rows whose key is less than `key` (None: than `stop`), block by block; they are taken."""
        if key is None:
            key = self._stop
        while self._block < self._last:
            following = self._block + 1
            if key is None or (following < self._last and self._toc.blocks[following].first <= key):
                if self._place < len(self._rows):
                    yield self._rows[self._place :] if self._place else self._rows
                self._block = following
                self._load()
                continue
            end = bisect_left(self._keys, key, lo=self._place)
            if end > self._place:
                yield self._rows[self._place : end]
            self._place = end
            return

    def at(self, key: bytes) -> TocRow | None:
        """The row at exactly `key`, taken; `before` has to have passed what lies before it."""
        if self._place < len(self._keys) and self._keys[self._place] == key:
            self._place += 1
            return next(self._toc.between(key, key + b"\0")) if self._names_only else self._rows[self._place - 1]
        return None


def layer_events(toc: Toc, number: int, ranges: Sequence[Range]) -> Iterator[Event]:
    """Rows and removals of one layer whose key lies in one of the `ranges`, which are sorted and apart.

    Removals of the lowest layer mean nothing, for there is nothing below.
    """
    rows = _range_rows(toc, number, ranges)
    if not toc.removed or not number:
        return rows
    return heapq.merge(rows, _range_removals(toc, number, ranges))


def _range_rows(toc: Toc, number: int, ranges: Sequence[Range]) -> Iterator[Event]:
    for start, stop in ranges:
        for row in toc.between(start, stop):
            yield row_key(row), -number, 1, row


def _range_removals(toc: Toc, number: int, ranges: Sequence[Range]) -> Iterator[Event]:
    for start, stop in ranges:
        place = bisect_left(toc.removed, start, key=sort_key)
        for path in toc.removed[place:]:
            key = sort_key(path)
            if stop is not None and key >= stop:
                break
            yield key, -number, 0, None


def grouped(streams: Sequence[Iterator[Event]]) -> Iterator[tuple[bytes, list[Event]]]:
    """All events by path; within one path the top layer first, its removal before its row."""
    if not streams:
        return
    group: list[Event] = []
    for event in streams[0] if len(streams) == 1 else heapq.merge(*streams):
        if group and event[0] != group[0][0]:
            yield group[0][0], group
            group = []
        group.append(event)
    if group:
        yield group[0][0], group


def top_of(key: bytes, group: list[Event], hidden: Hidden) -> Found | None:
    """What is at one path, given its events; notes in `hidden` what it hides below. `Corrupt` for an mtime without an entry."""
    floor = 0
    mtime: int | None = None
    found: Found | None = None
    for _, negative, _, row in group:
        number = -negative
        prefix = hidden[number]
        if number < floor or (prefix is not None and key.startswith(prefix)):
            continue
        if row is None:
            floor = number
            _hide(hidden, number, key)
            continue
        kind = row.type
        if found is None:
            if kind == "m":
                mtime = row.mtime_ns if mtime is None else mtime
                continue
            found = Found(row, number, row.mtime_ns if mtime is None else mtime)
        if kind not in "dm":
            # Also when a folder above has taken its place again: what lay below it in older layers stays hidden.
            floor = number
            if number:
                _hide(hidden, number, key)
    if found is None and mtime is not None:
        raise _only_an_mtime(key.replace(b"\0", b"/"))
    return found


def _only_an_mtime(path: bytes) -> Corrupt:
    return Corrupt(what="a capture", reason=f"{show(path)} has an mtime and no entry")


def _hide(hidden: Hidden, below: int, key: bytes) -> None:
    """Hide the subtree of `key` in every layer under `below`; a prefix that is hidden already and wider stays."""
    prefix = key + b"\0"
    for number in range(below):
        wide = hidden[number]
        if wide is None or not prefix.startswith(wide):
            hidden[number] = prefix
