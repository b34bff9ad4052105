"""The file that a package is written to: buffered, written and flushed to disk by a thread beside who fills it."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import BinaryIO, Final

_BUFFER: Final = 4 * 1024**2
_FLUSH: Final = 64 * 1024**2


class OutFile:
    """Appends to `file` from `start` on. `place` is where the next byte goes. Use as a context manager, from one thread.

    With `sync` what is written goes to disk on the way, so that the flush at the end has little left to wait for.
    """

    def __init__(self, file: BinaryIO, start: int, *, sync: bool) -> None:
        file.flush()
        self._fd = file.fileno()
        self._done = start
        self._buffer = bytearray()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="package-write")
        self._writing: Future[None] | None = None
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
    def place(self) -> int:
        return self._done + len(self._buffer)

    def write(self, data: bytes) -> None:
        """Append `data`. Raises what an earlier write met."""
        self._buffer += data
        if len(self._buffer) >= _BUFFER:
            self._send()

    def flush(self) -> None:
        """Until all that was appended is in the file."""
        self._send()
        if self._writing is not None:
            self._writing.result()
        if self._flushing is not None:
            self._flushing.result()

    def rewrite(self, place: int, data: bytes) -> None:
        """Replace bytes that were appended before."""
        self.flush()
        write_at(self._fd, data, place)

    def _send(self) -> None:
        if self._writing is not None:
            self._writing.result()
            self._writing = None
        if self._buffer:
            self._writing = self._pool.submit(write_at, self._fd, self._buffer, self._done)
            self._done += len(self._buffer)
            self._buffer = bytearray()
        if self._flusher is not None and self._done - self._flushed > _FLUSH and (self._flushing is None or self._flushing.done()):
            if self._flushing is not None:
                self._flushing.result()
            self._flushing = self._flusher.submit(os.fdatasync, self._fd)
            self._flushed = self._done


def write_at(fd: int, data: bytes | bytearray | memoryview, place: int) -> None:
    """All of `data`, wherever the descriptor stands."""
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, place)
        view, place = view[count:], place + count
