"""Values that are secrets wherever they stand: what was learned from credential files, or found once already."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

from mothball.redact import judge
from mothball.redact.patterns import compiled, places, quoted

_PATTERN_BYTES = 128 * 1024
_FEW_BYTES = 16 * 1024
LONGEST = 8 * 1024
"""Of a longer value only so many bytes are looked for: enough to know it again."""


class Known:
    """A frozen set of values and where they stand in bytes."""

    def __init__(self, values: Iterable[bytes]) -> None:
        self.values = frozenset(value for value in values if judge.is_distinct(value))
        self._finders = _finders(self.values) if self.values else ()
        self.heads = frozenset(value[:LONGEST] for value in self.values)
        """What is looked for of each value."""
        self.longest = max(map(len, self.heads), default=0)
        self.few = 0 < sum(map(len, self.heads)) <= _FEW_BYTES
        """So few that they can be looked for together with other things, in one pattern."""

    def __bool__(self) -> bool:
        return bool(self.values)

    def spans(self, data: bytes, lo: int, hi: int) -> Iterator[tuple[int, int]]:
        """Each place in ``data[lo:hi]`` where one of the values stands."""
        for finder in self._finders:
            yield from places(finder, data, lo, hi)


@lru_cache(maxsize=16)
def _finders(values: frozenset[bytes]) -> tuple[Any, ...]:
    groups: list[list[bytes]] = [[]]
    size = 0
    for value in sorted(values):
        if size > _PATTERN_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(value[:LONGEST])
        size += min(len(value), LONGEST)
    return tuple(compiled(quoted(group), spans_only=True) for group in groups)
