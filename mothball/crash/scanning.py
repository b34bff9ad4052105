"""The last look at a package: its finished bytes once more, part by part, by several threads."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from itertools import pairwise
from threading import Event
from typing import TYPE_CHECKING, BinaryIO, Final

from mothball.errors import OperationFailed, Unredacted
from mothball.store.read import show
from mothball.store.tarhead import padded

if TYPE_CHECKING:
    from mothball.redact.engine import Redactor
    from mothball.redact.rescan import Finding

_PIECE: Final = 4 * 1024**2
_THREADS: Final = max(1, min(4, os.cpu_count() or 1))
_WAIT: Final = 0.25
_TOLD: Final = 5


def scan_package(fd: int, borders: Sequence[int], redactor: Redactor, tick: Callable[..., None]) -> list[Finding]:
    """What the rules, and all values that `redactor` knows by now, find in the bytes from the first to the last of `borders`.

    At each border a member begins, so nothing that stands in one file stands in two parts. `tick` is called with ``step=`` and
    ``bytes=``; what it raises ends the scan.
    """
    done = [0] * (len(borders) - 1)
    stop = Event()
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="package-scan") as pool:
        parts = [pool.submit(_part, fd, start, end, redactor, done, at, stop) for at, (start, end) in enumerate(pairwise(borders))]
        try:
            waiting = set(parts)
            while waiting:
                _, waiting = wait(waiting, timeout=_WAIT, return_when=FIRST_EXCEPTION)
                tick(step="scan", bytes=sum(done))
            return [finding for part in parts for finding in part.result()]
        finally:
            stop.set()
            for part in parts:
                part.cancel()


def _part(fd: int, start: int, end: int, redactor: Redactor, done: list[int], at: int, stop: Event) -> list[Finding]:
    from mothball.redact.rescan import Finding, Rescan

    scan, place = Rescan(redactor), start
    while place < end and not stop.is_set():
        piece = os.pread(fd, min(_PIECE, end - place), place)
        if not piece:
            raise OperationFailed(reason="the package became shorter while it was scanned")
        scan.feed(piece)
        place += len(piece)
        done[at] = place - start
    return [Finding(finding.rule, finding.offset + start) for finding in scan.finish()]


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
