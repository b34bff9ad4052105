"""The file that a package is written to: buffered, written and flushed to disk by a thread beside who fills it."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import BinaryIO, Final, NamedTuple

from mothball.errors import OperationFailed

_BUFFER: Final = 4 * 1024**2
_MOST: Final = 4
"""So many buffers wait to be written, at most."""
_FLUSH: Final = 64 * 1024**2
_PIECE: Final = 4 * 1024**2
_AT_ONCE: Final = min(1024, os.sysconf("SC_IOV_MAX"))


class OutFile:
    """Appends to `file` from `start` on. `place` is where the next byte goes. Use as a context manager, from one thread.

    With `sync` what is written goes to disk on the way, so that the flush at the end has little left to wait for.
    """

    def __init__(self, file: BinaryIO, start: int, *, sync: bool) -> None:
        file.flush()
        self._fd = file.fileno()
        self.place = start
        self._done = start
        self._parts: list[bytes] = []
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="package-write")
        self._writing: deque[Future[None]] = deque()
        self._flusher = ThreadPoolExecutor(1, thread_name_prefix="package-sync") if sync else None
        self._flushing: Future[None] | None = None
        self._flushed = start

    def __enter__(self) -> OutFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                self.flush()
        finally:
            self._pool.shutdown(wait=True)
            if self._flusher is not None:
                self._flusher.shutdown(wait=True)

    @property
    def fd(self) -> int:
        return self._fd

    def write(self, *data: bytes) -> None:
        """Append all of `data`. Raises what an earlier write met."""
        self._parts += data
        for each in data:
            self.place += len(each)
        if self.place - self._done >= _BUFFER:
            self._send()

    def drain(self) -> None:
        """Until all that was appended can be read."""
        self._send()
        while self._writing:
            self._writing.popleft().result()

    def flush(self) -> None:
        """`drain`, and until what is on its way to disk is there."""
        self.drain()
        if self._flushing is not None:
            self._flushing.result()

    def rewrite(self, place: int, data: bytes) -> None:
        """Replace bytes that were appended before."""
        self.drain()
        write_at(self._fd, data, place)

    def _send(self) -> None:
        while self._writing and (len(self._writing) >= _MOST or self._writing[0].done()):
            self._writing.popleft().result()
        if self._parts:
            self._writing.append(self._pool.submit(write_parts, self._fd, self._parts, self._done))
            self._done, self._parts = self.place, []
        if self._flusher is not None and self._done - self._flushed > _FLUSH and (self._flushing is None or self._flushing.done()):
            if self._flushing is not None:
                self._flushing.result()
            self._flushing = self._flusher.submit(os.fdatasync, self._fd)
            self._flushed = self._done


class Move(NamedTuple):
    """The bytes of a file from `start` to before `end`, and how far they go: forward, backward (less than 0) or not at all."""

    start: int
    end: int
    by: int


def shifted(fd: int, moves: Sequence[Move], tick: Callable[[int], None]) -> None:
    """Move stretches of a file within it; given, and arriving, in rising order and apart from each other.

    What goes backward is moved first, from the beginning on, then what goes forward, from the end on: so nothing is written over
    that is still to be moved. `tick` is told the place, now and then.
    """
    for move in (move for move in moves if move.by < 0):
        for place in range(move.start, move.end, _PIECE):
            copied(fd, fd, place, min(place + _PIECE, move.end), place + move.by)
            tick(place)
    for move in (move for move in reversed(moves) if move.by > 0):
        for place in reversed(range(move.start, move.end, _PIECE)):
            copied(fd, fd, place, min(place + _PIECE, move.end), place + move.by)
            tick(place)


def copied(source: int, to: int, start: int, end: int, place: int) -> None:
    """Copy bytes of one file to a place in another, or of at most one piece (4 MiB) to a place in the same one."""
    for piece in pieces(source, start, end):
        write_at(to, piece, place)
        place += len(piece)


def pieces(fd: int, start: int, end: int) -> Iterator[bytes]:
    """The bytes of a file from `start` to before `end`, each piece (4 MiB) read whole. Raises `OperationFailed`."""
    for begin in range(start, end, _PIECE):
        yield read_at(fd, begin, min(begin + _PIECE, end))


def read_at(fd: int, start: int, end: int) -> bytes:
    """The bytes of a file from `start` to before `end`, all of them. Raises `OperationFailed`."""
    piece = os.pread(fd, end - start, start)
    while len(piece) < end - start:
        more = os.pread(fd, end - start - len(piece), start + len(piece))
        if not more:
            raise OperationFailed(reason="the package became shorter while it was read")
        piece += more
    return piece


def write_parts(fd: int, parts: Sequence[bytes], place: int) -> None:
    """One after the other from `place` on, without a copy of them all."""
    for first in range(0, len(parts), _AT_ONCE):
        some = parts[first : first + _AT_ONCE]
        size, count = sum(map(len, some)), os.pwritev(fd, some, place)
        if count < size:
            write_at(fd, b"".join(some)[count:], place + count)
        place += size


def write_at(fd: int, data: bytes | bytearray | memoryview, place: int) -> None:
    """All of `data`, wherever the descriptor stands."""
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, place)
        view, place = view[count:], place + count
