"""What compressed files hold: git objects and packs, zip and jar, gzip, bzip2, xz, zstd. A secret in there is a secret too.

Everything is inflated piece by piece and thrown away. Where that would be more than `MOST` bytes, or in a way that is not known
here, the file counts as unread: who cannot look into it does not hand it over. What is damaged is looked at as far as anybody can
read it.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

MOST = 2 * 1024**3
"""Inflated bytes of one file that are looked at."""
UNREAD = "unread"
"""The rule that fires for a file whose content cannot be looked at."""
_CHUNK = 1024 * 1024
_SLICE = 1024
"""Compressed bytes given to zstd at once: it has no limit of its own, and makes at most 32 MiB of so few."""
_ZIP = b"PK\x03\x04"
_ZIP_HEADER = 30
_PACK_HEADER = 12
_OFS_DELTA, _REF_DELTA = 6, 7
_DEFLATED, _STORED = 8, 0
_SIZES_FOLLOW = 8
_LONGEST_INSERT = 0x7F
_COPY = 0x80


class Unread(Exception):
    """This cannot be looked into."""


class Source:
    """Pieces of a file, pulled as needed; `seen` is called with each of them, whatever becomes of it."""

    def __init__(self, pieces: Iterable[bytes], seen: Callable[[bytes], None]) -> None:
        self._pieces = iter(pieces)
        self._seen = seen
        self.buffer = b""

    def more(self) -> bool:
        """Pull a piece; False at the end."""
        piece = next(self._pieces, None)
        if piece is None:
            return False
        self._seen(piece)
        self.buffer += piece
        return True

    def need(self, size: int) -> bool:
        """True when there are `size` bytes in the buffer."""
        while len(self.buffer) < size:
            if not self.more():
                return False
        return True

    def take(self, size: int) -> bytes:
        """`size` bytes off the buffer; raises `Unread` when there are fewer."""
        if not self.need(size):
            raise Unread
        out, self.buffer = self.buffer[:size], self.buffer[size:]
        return out

    def drain(self) -> None:
        """Pull everything that is left, keeping nothing."""
        self.buffer = b""
        while self.more():
            self.buffer = b""


def contents(source: Source) -> Iterator[bytes | None]:
    """What the file holds when it is compressed, in pieces, a None behind each document; nothing when it is not.

    Raises `Unread` for what is too much or not known here.
    """
    total = 0
    for piece in _contents(source):
        total += len(piece or b"")
        if total > MOST:
            raise Unread
        yield piece


def _contents(source: Source) -> Iterator[bytes | None]:
    source.need(_PACK_HEADER)
    head = source.buffer[:_PACK_HEADER]
    if head[:4] == _ZIP:
        yield from _zip(source)
    elif head[:4] == b"PACK" and head[4:8] in (b"\0\0\0\2", b"\0\0\0\3"):
        yield from _pack(source, int.from_bytes(head[8:12], "big"))
    elif head[:3] == b"\x1f\x8b\x08" or (head[:1] == b"\x78" and int.from_bytes(head[:2], "big") % 31 == 0):
        yield from _members(source, lambda: _Inflate(47))
    elif head[:3] == b"BZh":
        yield from _members(source, bz2.BZ2Decompressor)
    elif head[:6] == b"\xfd7zXZ\0":
        yield from _members(source, lambda: lzma.LZMADecompressor(memlimit=256 * 1024**2))
    elif head[:4] == b"\x28\xb5\x2f\xfd":
        import zstandard

        yield from _members(source, lambda: _Zstd(zstandard.ZstdDecompressor(max_window_size=2**27).decompressobj()))


class _Inflate:
    """zlib with the face of the decompressors of bz2 and lzma."""

    def __init__(self, bits: int) -> None:
        self._inner = zlib.decompressobj(bits)

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    @property
    def needs_input(self) -> bool:
        return not self._inner.unconsumed_tail

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._inner.decompress(self._inner.unconsumed_tail + data, max_length)


class _Zstd:
    """zstandard's decompressor with the same face; what it makes of one call is bounded by what it is given."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._waiting = b""

    @property
    def eof(self) -> bool:
        return bool(self._inner.eof)

    @property
    def unused_data(self) -> bytes:
        return bytes(self._inner.unused_data) + self._waiting

    @property
    def needs_input(self) -> bool:
        return not self._waiting

    def decompress(self, data: bytes, _max_length: int) -> bytes:
        waiting = self._waiting + data
        self._waiting = waiting[_SLICE:]
        return bytes(self._inner.decompress(waiting[:_SLICE]))


def _members(source: Source, make: Callable[[], Any]) -> Iterator[bytes | None]:
    """Streams of one kind behind each other, to the end or to what is none."""
    while source.need(1):
        before = len(source.buffer)
        yield from _stream(source, make())
        yield None
        if len(source.buffer) == before:
            return


def _stream(source: Source, decoder: Any) -> Iterator[bytes]:
    """One compressed stream; the source stands behind it then. A damaged one ends where it is damaged."""
    while not decoder.eof:
        data = b""
        if decoder.needs_input:
            if not source.need(1):
                return
            data, source.buffer = source.buffer, b""
        try:
            out = decoder.decompress(data, _CHUNK)
        except (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError) as error:
            if isinstance(error, lzma.LZMAError) and "limit" in str(error).lower():
                raise Unread from None
            source.buffer = data[1:] + source.buffer
            return
        except Exception as error:  # zstandard's own error, whose class would have to be imported for every file
            if type(error).__name__ != "ZstdError":
                raise
            source.buffer = data[1:] + source.buffer
            return
        if out:
            yield out
    source.buffer = decoder.unused_data + source.buffer


def _zip(source: Source) -> Iterator[bytes | None]:
    """Every member that is deflated; stored ones stand in the file as they are. Found by their headers, not by the directory."""
    while True:
        at = source.buffer.find(_ZIP)
        if at < 0:
            source.buffer = source.buffer[-3:]
            if not source.more():
                return
            continue
        source.buffer = source.buffer[at:]
        if not source.need(_ZIP_HEADER):
            return
        head = source.buffer[:_ZIP_HEADER]
        method, skip = (
            int.from_bytes(head[8:10], "little"),
            int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little"),
        )
        encrypted = head[6] & 1
        if not source.need(_ZIP_HEADER + skip):
            return
        yield source.buffer[_ZIP_HEADER : _ZIP_HEADER + skip]
        yield None
        source.buffer = source.buffer[_ZIP_HEADER + skip :]
        if encrypted:
            continue
        if method == _DEFLATED:
            yield from _stream(source, _Inflate(-15))
            yield None
        elif method != _STORED:
            raise Unread
        elif not head[6] & _SIZES_FOLLOW:
            yield from _stored(source, int.from_bytes(head[18:22], "little"))
            yield None


def _stored(source: Source, left: int) -> Iterator[bytes]:
    """The next `left` bytes as they are."""
    while left and source.need(1):
        piece, source.buffer = source.buffer[:left], source.buffer[left:]
        left -= len(piece)
        yield piece


def _pack(source: Source, count: int) -> Iterator[bytes | None]:
    """The objects of a git pack; of a delta what it adds."""
    source.take(_PACK_HEADER)
    for _ in range(count):
        byte = source.take(1)[0]
        kind = byte >> 4 & 7
        while byte & 0x80:
            byte = source.take(1)[0]
        if kind == _REF_DELTA:
            source.take(20)
        elif kind == _OFS_DELTA:
            while source.take(1)[0] & 0x80:
                pass
        delta = kind in (_OFS_DELTA, _REF_DELTA)
        if not delta:
            yield from _stream(source, _Inflate(15))
        else:
            whole = bytearray()
            for piece in _stream(source, _Inflate(15)):
                whole += piece
                if len(whole) > 64 * _CHUNK:
                    raise Unread
            yield _added(bytes(whole))
        yield None


def _added(delta: bytes) -> bytes:
    """The bytes that a git delta inserts; a line between two that do not follow each other."""
    at = 0
    for _ in range(2):  # the sizes of source and target
        while at < len(delta) and delta[at] & 0x80:
            at += 1
        at += 1
    out: list[bytes] = []
    while at < len(delta):
        code = delta[at]
        at += 1
        if code & _COPY:
            at += (code & _LONGEST_INSERT).bit_count()
            out.append(b"\n")
        elif code:
            out.append(delta[at : at + code])
            at += code
    return b"".join(out)
