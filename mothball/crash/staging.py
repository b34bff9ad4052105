"""Members on their way into a package: looked at together as they will stand there, before they are written.

One look at some megabytes of members, names and all, costs a fraction of a look at each, and other processes do it beside the
packer. For most of a package it is the last look as well: what nothing was found in is written as it was looked at. What a look
touches is redacted, by these processes too, and looked at by itself once more when the package is finished.
"""

from __future__ import annotations

import mmap
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Final, NamedTuple

from mothball.crash.members import Redacted
from mothball.redact.files import CODE
from mothball.store.tarhead import BLOCK

if TYPE_CHECKING:
    from mothball.crash.looker import Look
    from mothball.crash.members import Member
    from mothball.crash.outfile import OutFile
    from mothball.redact.engine import Redactor
    from mothball.redact.known import Known

SEGMENT: Final = 4 * 1024**2
"""Bytes of members from which on they are looked at together."""
WHOLE: Final = 16 * 1024**2
"""The longest content that is looked at so."""
_RING: Final = 32 * 1024**2
_THREADS: Final = 4
Touched = dict[int, "Redacted | None"]
"""By their numbers: members in which something may stand, and what became of those that are text."""


class Desk:
    """Memory that a process shares with its forks, on which members lie while they are looked at. Use as a context manager."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _RING)

    def __enter__(self) -> Desk:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._memory.close()

    def put(self, place: int, data: bytes) -> None:
        """Lay `data` down. Raises `ValueError` where there is no room."""
        self._memory[place : place + len(data)] = data

    def get(self, place: int, size: int) -> bytes:
        """What lies at a place."""
        return self._memory[place : place + size]


def look_at_members(desk: Desk, redactor: Redactor, known: Known, place: int, size: int) -> list[tuple[int, int]]:
    """Where something that may be a secret begins and ends in the members at a place, from there, in rising order."""
    data = desk.get(place, size)
    return [(span.start, span.end) for span in redactor.spans(data, 0, size, CODE, known=known)]


def redact_members(desk: Desk, redactor: Redactor, texts: Sequence[tuple[int, int, bytes]]) -> list[Redacted]:
    """Texts without their secrets; each lies at a place, has a size, and comes from a path."""
    return redacted(redactor, ((desk.get(place, size), path) for place, size, path in texts))


def redacted(redactor: Redactor, texts: Iterable[tuple[bytes, bytes]]) -> list[Redacted]:
    """The contents of text files, with their paths, without their secrets, which `redactor` is not told of."""
    twin, out = redactor.twin(), []
    for data, path in texts:
        twin.counts.clear()
        twin.values.clear()
        new = twin.data(data, path)
        out.append(Redacted(new if twin.counts else None, dict(twin.counts), sorted(twin.values)))
    return out


class Looked:
    """What was looked at of a package, as it stands there: by all rules, and for the values that were `known` then."""

    def __init__(self, known: Known) -> None:
        self.known = known
        self.stretches: list[tuple[int, int]] = []
        """From where to where, in rising order; whole members, but for those that were looked `inside`."""
        self.touched: list[int] = []
        """Where the members in them begin in which something may stand."""
        self.inside: set[int] = set()
        """Where the content of binary files begins that were looked at by themselves, as strictly as can be."""

    def add(self, start: int, end: int) -> None:
        """A stretch behind all others."""
        if self.stretches and self.stretches[-1][1] == start:
            start = self.stretches.pop()[0]
        if end > start:
            self.stretches.append((start, end))

    def gaps(self, end: int) -> list[tuple[int, int]]:
        """What was not looked at of the first `end` bytes."""
        out, place = [], 0
        for start, stop in self.stretches:
            if start > place:
                out.append((place, min(start, end)))
            place = stop
        return out if place >= end else [*out, (place, end)]


class Looks(NamedTuple):
    """What a packer asks of other processes, and what came of it."""

    desk: Desk
    names: Look
    """`mothball.crash.content.any_secret`."""
    redact: Look
    """`redact_members` for places on the desk, sizes and paths."""
    inside: Look
    """`mothball.crash.big.look_inside` for a place in the package and a size."""
    members: Look
    """`look_at_members` for a place on the desk and a size."""
    looked: Looked


class _Segment(NamedTuple):
    members: list[Member]
    place: int
    size: int
    found: Future[Touched]


class Stage:
    """Where members wait for what a look says of them, in order. Use as a context manager, from one thread."""

    def __init__(
        self, out: OutFile, redactor: Redactor, settle: Callable[[list[Member], Touched], None], looks: Looks | None
    ) -> None:
        """`settle` writes members to `out`, and what became of those of them that were touched. Without `looks` those are all, and
        none waits."""
        self._out = out
        self._redactor = redactor
        self._settle = settle
        self._looks = looks
        self._members: list[Member] = []
        self._size = 0
        self._waiting: deque[_Segment] = deque()
        self._end = 0
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="package-stage")

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def put(self, member: Member) -> None:
        """Append `member`. Raises what `settle` and a look raise."""
        if self._looks is None:
            key = None if member.binary else member.key
            self._settle([member], {0: None if key is None else redacted(self._redactor, [(member.data, key[1])])[0]})
            return
        size = len(member.data)
        if size > SEGMENT and self._members:
            self._send(self._looks)
        self._members.append(member)
        self._size += len(member.header) + size + BLOCK
        if self._size >= SEGMENT:
            self._send(self._looks)

    def flush(self) -> None:
        """Until every member that was appended is written. Raises as `put`."""
        if self._looks is None:
            return
        if self._members:
            self._send(self._looks)
        while self._waiting:
            self._next(self._looks)

    def _send(self, looks: Looks) -> None:
        size, waiting = self._size, self._waiting
        place = self._end if self._end + size <= _RING else 0
        while any(each.place < place + size and place < each.place + each.size for each in waiting):
            self._next(looks)
        waiting.append(_Segment(self._members, place, size, self._pool.submit(_looked_at, looks, place, self._members)))
        self._members, self._size, self._end = [], 0, place + size
        while waiting and waiting[0].found.done():
            self._next(looks)

    def _next(self, looks: Looks) -> None:
        """Write the segment that waits longest."""
        segment = self._waiting.popleft()
        touched, begin = segment.found.result(), self._out.place
        self._settle(segment.members, touched)
        looks.looked.add(begin, self._out.place)


def _looked_at(looks: Looks, place: int, members: list[Member]) -> Touched:
    """The members in which something may stand, or that are judged by themselves, and what becomes of the texts among them."""
    parts: list[bytes] = []
    starts: list[int] = []
    size = 0
    touched: set[int] = set()
    for number, (_, names, data, key, _, _, binary, apart) in enumerate(members):
        parts += (names, b"\0", data, b"\0")
        starts.append(size)
        size += len(names) + len(data) + 2
        if apart and key is not None and not binary:
            touched.add(number)
    looks.desk.put(place, b"".join(parts))
    for begin, end in looks.members(place, size):
        touched.update(range(bisect_right(starts, begin) - 1, bisect_right(starts, end - 1)))
    out: Touched = dict.fromkeys(sorted(touched))
    texts = {
        number: (place + starts[number] + len(member.names) + 1, len(member.data), member.key[1])
        for number in out
        if (member := members[number]).key is not None and not member.binary
    }
    if texts:
        # Asked for together: a tree may have ten thousand files of configuration.
        found = looks.redact(list(texts.values()))
        out.update((number, Redacted(*each)) for number, each in zip(texts, found, strict=True))
    return out
