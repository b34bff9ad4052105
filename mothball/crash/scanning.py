"""The last look at a package: its finished bytes once more, with the same rules and every value that is known by now.

Most files are found clean by looking through many at a time, headers and all, by several threads, and most of that while later
files are still being packed. Whatever is not, and what has to be judged by itself, is then read member by member by `Rescan`,
whose word is the last.
"""

from __future__ import annotations

import os
import tarfile
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from functools import partial
from threading import Event
from typing import TYPE_CHECKING, BinaryIO, Final, TypeVar

from mothball.crash.packing import Packed
from mothball.errors import OperationFailed, Unredacted
from mothball.redact.files import CODE
from mothball.redact.known import Known
from mothball.store.read import show
from mothball.store.tarhead import BLOCK, padded

if TYPE_CHECKING:
    from mothball.redact.engine import Redactor
    from mothball.redact.rescan import Finding

T = TypeVar("T")
_PIECE: Final = 4 * 1024**2
_WINDOW: Final = 4 * 1024**2
_OVERLAP: Final = 128 * 1024
"""Bytes that a window sees on both sides of its own: four times the longest secret."""
_PART: Final = 16 * 1024**2
_THREADS: Final = max(1, min(4, os.cpu_count() or 1))
_WAIT: Final = 0.25
_TOLD: Final = 5


class Ahead:
    """Looks through a package while it is written, behind the writer, for the values that are known at the start.

    What it has seen of bytes that change later is dropped (`changed`), and then looked at again with all the rest.
    """

    def __init__(self, known: Known, look: Callable[[int], Sequence[tuple[int, int]]]) -> None:
        """`look` is `look_at_window` with those `known` values."""
        self.known = known
        self._look = look
        self._next = _WINDOW  # what comes first in a package is written last
        self._parts: dict[int, Future[Sequence[tuple[int, int]]]] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="package-ahead")

    def written(self, place: int) -> None:
        """All bytes before `place` are in the file."""
        while self._next + _WINDOW + _OVERLAP <= place:
            self._parts[self._next] = self._pool.submit(self._look, self._next)
            self._next += _WINDOW

    def changed(self, place: int) -> None:
        """Bytes of one record at `place` were written anew."""
        self.written(place)  # or a look that begins from now on could still see the old ones
        for start in [each for each in self._parts if each - _OVERLAP <= place + BLOCK and place <= each + _WINDOW + _OVERLAP]:
            self._parts.pop(start).cancel()

    def close(self) -> None:
        """Look no further."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def seen(self) -> dict[int, list[int]]:
        """By the beginnings of the windows that were looked at: the places in them where something stands."""
        done = ((start, part) for start, part in self._parts.items() if not part.cancelled() and part.exception() is None)
        return {start: [place for begin, end in part.result() for place in (begin, end - 1)] for start, part in done}


def scan_package(
    fd: int, files: Iterable[Packed], shift: int, redactor: Redactor, tick: Callable[..., None], ahead: Ahead | None = None
) -> list[Finding]:
    """What is found in the package `fd`, whose `files` lie `shift` bytes behind where they say. `tick` gets ``step=``, ``bytes=``.

    `ahead` has looked at it before, when nothing was moved since. Raises what `tick` raises, `OSError`.
    """
    return _Scan(fd, files, shift, redactor, tick).run(ahead)


def scan_ranges(fd: int, ranges: Sequence[tuple[int, int]], redactor: Redactor, tick: Callable[..., None]) -> list[Finding]:
    """What is found in these stretches of the package `fd`; a member begins at the beginning of each. Raises as `scan_package`."""
    return _Scan(fd, (), 0, redactor, tick).read(ranges)


class _Scan:
    def __init__(self, fd: int, files: Iterable[Packed], shift: int, redactor: Redactor, tick: Callable[..., None]) -> None:
        self._fd = fd
        self._size = os.fstat(fd).st_size
        self._redactor = redactor
        self._known = Known(redactor.values)
        self._tick = tick
        self._stop = Event()
        self._bytes = 0
        # The members of files, and between them what has a header only: parts without a gap, from the first byte to the last.
        packed = sorted(files)
        starts, apart = [0], [True]
        for file in packed:
            start, end = file.start + shift, file.content + shift + padded(file.size)
            if start > starts[-1]:
                starts.append(start)
                apart.append(file.apart)
            else:
                apart[-1] = file.apart
            starts.append(end)
            apart.append(False)
        self._starts, self._apart = starts, apart

    def run(self, ahead: Ahead | None) -> list[Finding]:
        loud = {place for place, apart in enumerate(self._apart) if apart}
        seen = ahead.seen() if ahead is not None else {}
        # What became known since is looked for everywhere, the rest where nobody has looked.
        new = Known(self._known.values - ahead.known.values) if ahead is not None else None
        windows = [
            partial(self._window, place, seen.get(place), new)
            for place in range(0, self._size, _WINDOW)
            if new or place not in seen
        ]
        for offsets in (*seen.values(), *self._each(windows)):
            loud |= {bisect_right(self._starts, offset) - 1 for offset in offsets}
        ranges = [(self._starts[place], (*self._starts, self._size)[place + 1]) for place in sorted(loud)]
        return self.read(_joined(ranges))

    def read(self, ranges: Sequence[tuple[int, int]]) -> list[Finding]:
        """Member by member, with the last word."""
        found = self._each([partial(self._rescan, *each) for each in ranges])
        return sorted((finding for some in found for finding in some), key=lambda finding: finding.offset)

    def _each(self, work: Sequence[Callable[[], list[T]]]) -> list[list[T]]:
        """What each of `work` gives, by threads; meanwhile somebody is asked whether the package is still wanted."""
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="package-scan") as pool:
            parts = [pool.submit(each) for each in work]
            try:
                waiting = set(parts)
                while waiting:
                    _, waiting = wait(waiting, timeout=_WAIT, return_when=FIRST_EXCEPTION)
                    self._tick(step="scan", bytes=min(self._bytes, self._size))
                    if any(part.done() and part.exception() is not None for part in parts):
                        break
                return [part.result() for part in parts]
            except BaseException:
                self._stop.set()
                for part in parts:
                    part.cancel()
                raise

    def _window(self, start: int, seen: list[int] | None, new: Known | None) -> list[int]:
        if seen is None or new is None:
            found = look_at_window(self._fd, start, self._redactor, self._known)
        else:
            found = _known_in(self._fd, start, new)
        self._bytes += _WINDOW
        return [place for begin, end in found for place in (begin, end - 1)]

    def _rescan(self, start: int, end: int) -> list[Finding]:
        from mothball.redact.rescan import Finding, Rescan

        scan, place = Rescan(self._redactor), start
        while place < end and not self._stop.is_set():
            piece = os.pread(self._fd, min(_PIECE, end - place), place)
            if not piece:
                raise OperationFailed(reason="the package became shorter while it was scanned")
            scan.feed(piece)
            place += len(piece)
        return [Finding(finding.rule, finding.offset + start) for finding in scan.finish()]


def look_at_window(fd: int, start: int, redactor: Redactor, known: Known) -> list[tuple[int, int]]:
    """Where something that may be a secret begins and ends in and around the window at `start`."""
    data, place = _around(fd, start)
    return [(place + span.start, place + span.end) for span in redactor.spans(data, 0, len(data), CODE, known=known)]


def _known_in(fd: int, start: int, known: Known) -> list[tuple[int, int]]:
    data, place = _around(fd, start)
    return [(place + begin, place + end) for begin, end in known.spans(data, 0, len(data))]


def _around(fd: int, start: int) -> tuple[bytes, int]:
    before = min(start, _OVERLAP)
    return os.pread(fd, before + _WINDOW + _OVERLAP, start - before), start - before


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """`ranges` with those that touch put together, as far as one thread should read at a time."""
    out: list[tuple[int, int]] = []
    for start, end in ranges:
        if out and out[-1][1] == start and end - out[-1][0] <= _PART:
            out[-1] = out[-1][0], end
        elif end > start:
            out.append((start, end))
    return out


def unredacted(package: BinaryIO, found: Sequence[Finding]) -> Unredacted:
    """The error for what was found in a package; it says where, but never what."""
    places = sorted({f"{finding.rule} in {_member(package, finding.offset)}" for finding in found[:_TOLD]})
    more = f" and {len(found) - _TOLD} more" if len(found) > _TOLD else ""
    return Unredacted(
        what="the crash package",
        reason=f"its finished bytes still hold what looks like a secret ({'; '.join(places)}{more}), so nothing was published. "
        "Leave that file out with .mothballignore, package without binaries, or allow the value in the redaction rules",
    )


def _member(package: BinaryIO, offset: int) -> str:
    package.seek(0)
    with tarfile.open(fileobj=package, mode="r:", errors="surrogateescape") as tar:
        for member in tar:
            if offset < member.offset_data:
                return "the name of a file"  # which is not repeated here
            if offset < member.offset_data + padded(member.size if member.isreg() else 0):
                return show(os.fsencode(member.name))[:200]
    return "the end of the archive"
