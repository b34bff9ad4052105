"""Compressed streams of somebody else's making, as plain bytes: bounded in memory, in size and in how much a little becomes."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable
from typing import IO, Any, BinaryIO, Final, cast

import zstandard

from mothball.errors import Corrupt, Oversize

RATIO: Final = 200
"""Most bytes that one compressed byte may become once there are more than `FREE_BYTES`; texts reach about 20, logs 100."""
FREE_BYTES: Final = 256 * 1024**2
_WINDOW: Final = 128 * 1024**2
_GZIP: Final = b"\x1f\x8b"
_ZSTD: Final = (b"\x28\xb5\x2f\xfd", *(bytes([0x50 + low, 0x2A, 0x4D, 0x18]) for low in range(16)))
_HEAD: Final = 4


class Inflated:
    """`read(n)` gives plain bytes of `file`, whatever of gzip, zstd or nothing it is packed with.

    `taken` and `given` count packed and plain bytes. `Corrupt` and `Oversize` name `what`.
    """

    def __init__(self, file: BinaryIO, what: str, *, limit: int = 1 << 62, seen: Callable[[bytes], None] | None = None) -> None:
        """`limit`: most plain bytes. `seen` gets every packed byte as it is read."""
        self.given = 0
        self._what = what
        self._limit = limit
        self._counted = _Counted(file, seen)
        head = self._counted.peek(_HEAD)
        self._stream: IO[bytes] | Any = self._counted
        if head.startswith(_GZIP):
            self._stream = gzip.GzipFile(fileobj=self._counted, mode="rb")
        elif head.startswith(_ZSTD):
            engine = zstandard.ZstdDecompressor(max_window_size=_WINDOW)
            self._stream = engine.stream_reader(cast("IO[bytes]", self._counted), read_across_frames=True, closefd=False)
        self.packed = self._stream is not self._counted

    @property
    def taken(self) -> int:
        """Packed bytes read so far."""
        return self._counted.taken

    def read(self, count: int) -> bytes:
        """At most `count` plain bytes; empty at the end."""
        try:
            data: bytes = self._stream.read(count)
        except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
            reason = "it is cut" if isinstance(error, EOFError) else "it cannot be decompressed"
            raise Corrupt(what=self._what, reason=reason) from None
        self.given += len(data)
        if self.given > self._limit:
            raise Oversize(f"{self._what} unpacks to more than {self._limit:,} bytes", what=self._what, limit=self._limit)
        if self.packed and self.given > FREE_BYTES and self.given > RATIO * self.taken:
            reason = f"{self._what} unpacks to more than {RATIO} times its size, as only bombs do; it was not unpacked"
            raise Oversize(reason, what=self._what, size=self.given, limit=RATIO * self.taken)
        return data

    def drain(self, limit: int) -> None:
        """Read what the decompressor left of the packed bytes, so that `seen` has seen all; at most to one past `limit`."""
        while self.taken <= limit and self._counted.read(min(1024**2, limit - self.taken + 1)):
            pass


class _Counted(io.RawIOBase):
    def __init__(self, file: BinaryIO, seen: Callable[[bytes], None] | None) -> None:
        self._file = file
        self._seen = seen
        self._ahead = b""
        self.taken = 0

    def peek(self, count: int) -> bytes:
        while len(self._ahead) < count and (more := self._file.read(count - len(self._ahead))):
            self._ahead += more
        return self._ahead

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        if self._ahead:
            size = len(self._ahead) if size < 0 else size
            data, self._ahead = self._ahead[:size], self._ahead[size:]
        else:
            data = self._file.read(size)
        self.taken += len(data)
        if self._seen is not None:
            self._seen(data)
        return data
