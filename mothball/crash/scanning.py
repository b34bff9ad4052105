"""The last look at a package: its finished bytes once more, with the same rules and every value that is known by now.

Most files are found clean by looking through many at a time, headers and all, either while they are packed
(`mothball.crash.staging`) or here by several threads. Whatever is not, and what has to be judged by itself, is then read member
by member by `Rescan`, whose word is the last.
"""

from __future__ import annotations

import os
import tarfile
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial
from threading import Event
from typing import TYPE_CHECKING, BinaryIO, Final, TypeVar

from mothball.crash.outfile import pieces, read_at
from mothball.errors import Unredacted
from mothball.redact.files import CODE
from mothball.redact.known import Known
from mothball.store.read import show
from mothball.store.tarhead import padded

if TYPE_CHECKING:
    from mothball.crash.members import Packed
    from mothball.crash.staging import Looked
    from mothball.redact.engine import Redactor
    from mothball.redact.rescan import Finding

T = TypeVar("T")
_WINDOW: Final = 4 * 1024**2
_OVERLAP: Final = 128 * 1024
"""Bytes that a window sees on both sides of its own: four times the longest secret."""
_PART: Final = 16 * 1024**2
_THREADS: Final = max(1, min(4, os.cpu_count() or 1))
_WAIT: Final = 0.25
_TOLD: Final = 5


def scan_package(
    fd: int, files: Iterable[Packed], shift: int, redactor: Redactor, tick: Callable[..., None], looked: Looked | None = None
) -> list[Finding]:
    """What is found in the package `fd`, whose `files` lie `shift` bytes behind where they say. `tick` gets ``step=``, ``bytes=``.

    `looked` is what was looked at before, when nothing was moved or written since. Raises what `tick` raises, `OSError`.
    """
    return _Scan(fd, files, shift, redactor, tick).run(looked)


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

    def run(self, looked: Looked | None) -> list[Finding]:
        loud = {place for place, apart in enumerate(self._apart) if apart}
        look: Callable[[int], list[int]] | None = self._window
        if looked is not None:
            loud -= {self._part(place) for place in looked.inside}
            loud |= {self._part(place) for place in looked.touched}
            for start, end in looked.gaps(self._size):
                loud |= set(range(self._part(start), self._part(end - 1) + 1))
            # What became known since is looked for everywhere.
            new = Known(self._known.values - looked.known.values)
            look = partial(self._known_in, new) if new else None
        if look is not None:
            for offsets in self._each([partial(look, place) for place in range(0, self._size, _WINDOW)]):
                loud |= {self._part(offset) for offset in offsets}
        ranges = [(self._starts[place], (*self._starts, self._size)[place + 1]) for place in sorted(loud)]
        return self.read(_joined(ranges))

    def _part(self, offset: int) -> int:
        """The number of the part in which a byte lies."""
        return bisect_right(self._starts, offset) - 1

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

    def _window(self, start: int) -> list[int]:
        """Where something that may be a secret begins and ends in and around a window."""
        data, place = self._around(start)
        found = self._redactor.spans(data, 0, len(data), CODE, known=self._known)
        return [place + each for span in found for each in (span.start, span.end - 1)]

    def _known_in(self, known: Known, start: int) -> list[int]:
        data, place = self._around(start)
        return [place + each for begin, end in known.spans(data, 0, len(data)) for each in (begin, end - 1)]

    def _around(self, start: int) -> tuple[bytes, int]:
        place = max(0, start - _OVERLAP)
        self._bytes += _WINDOW
        return read_at(self._fd, place, min(self._size, start + _WINDOW + _OVERLAP)), place

    def _rescan(self, start: int, end: int) -> list[Finding]:
        from mothball.redact.rescan import Finding, Rescan

        scan = Rescan(self._redactor)
        for piece in pieces(self._fd, start, end):
            if self._stop.is_set():
                break
            scan.feed(piece)
        return [Finding(finding.rule, finding.offset + start) for finding in scan.finish()]


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """`ranges` with those that touch put together, as far as one thread should read at a time."""
    out: list[tuple[int, int]] = []
    for start, end in ranges:
        if out and out[-1][1] == start and end - out[-1][0] <= _PART:
            out[-1] = out[-1][0], end
        elif end > start:
            out.append((start, end))
    return out


def found_at(rule: str, offset: int) -> Finding:
    """What was found in a package in another way."""
    from mothball.redact.rescan import Finding

    return Finding(rule, offset)


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
