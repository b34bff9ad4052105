"""Values that are secrets wherever they stand: what was learned from credential files, or found once already."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import islice
from typing import Any

from mothball.redact import judge
from mothball.redact.patterns import compiled, places, quoted

HEAD = 128
"""Bytes of a value that are looked for; what follows is compared where they stand, so that hostile values cannot make that slow."""
LONGEST = 8 * 1024
"""Of a longer value only so many bytes are hidden where it stands: enough to know it again."""
_GROUP = 64
"""So many literals at a time are looked for by vector instructions: ten times as fast as one pass for more of them."""
_GROUPS = 12
_PATTERN_BYTES = 128 * 1024


class Known:
    """A frozen set of values and where they stand in bytes."""

    def __init__(self, values: Iterable[bytes]) -> None:
        self.values = frozenset(value for value in values if judge.is_distinct(value))
        self._find = _finder(self.values) if self.values else None

    def __bool__(self) -> bool:
        return bool(self.values)

    def spans(self, data: bytes, lo: int, hi: int) -> Iterator[tuple[int, int]]:
        """Each place in ``data[lo:hi]`` where one of the values stands, or begins and goes on for `HEAD` bytes or more."""
        return iter(()) if self._find is None else self._find.spans(data, lo, hi)


class _Finder:
    """Looks for the heads of values: by Aho-Corasick's vectorised form for groups of them, by RE2 for very many."""

    def __init__(self, values: frozenset[bytes]) -> None:
        self._rest: dict[bytes, list[bytes]] = {}
        for value in sorted(values):
            self._rest.setdefault(value[:HEAD], []).append(value[HEAD:LONGEST])
        heads = iter(sorted(self._rest))
        self._groups: list[tuple[list[bytes], Any]] = []
        self._many: list[Any] = []
        if len(self._rest) > _GROUP * _GROUPS:
            while some := list(islice(heads, _PATTERN_BYTES // HEAD)):
                self._many.append(compiled(quoted(some), spans_only=True))
            return
        from ahocorasick_rs import BytesAhoCorasick, MatchKind

        while some := list(islice(heads, _GROUP)):
            self._groups.append((some, BytesAhoCorasick(some, matchkind=MatchKind.LeftmostLongest)))

    def spans(self, data: bytes, lo: int, hi: int) -> Iterator[tuple[int, int]]:
        view: bytes | memoryview = data if lo == 0 and hi >= len(data) else memoryview(data)[lo:hi]
        for heads, group in self._groups:
            for number, start, end in group.find_matches_as_indexes(view):
                yield lo + start, self._end(data, heads[number], lo + end, hi)
        for pattern in self._many:
            for start, end in places(pattern, data, lo, hi):
                yield start, self._end(data, data[start:end], end, hi)

    def _end(self, data: bytes, head: bytes, end: int, hi: int) -> int:
        """How far the bytes behind a head go on as those of one of its values do."""
        return end + max(_common(data[end : min(hi, end + len(rest))], rest) for rest in self._rest[head])


def _common(one: bytes, other: bytes) -> int:
    """How many bytes both begin with."""
    if other.startswith(one):
        return len(one)
    low, high = 0, len(one)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle)
    return low


@lru_cache(maxsize=16)
def _finder(values: frozenset[bytes]) -> _Finder:
    return _Finder(values)
