"""The tar inside a layer as a stream of members, strict and bounded: for checking it, never for unpacking.

It knows what `tarhead` writes for a layer (ustar members, PAX headers in front of those that need one) and refuses everything
else: other types, other PAX keys, wrong checksums, numbers that are none. It is written apart from the writer on purpose.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

from mothball.errors import Corrupt
from mothball.store.read import Layer, show
from mothball.store.toc import read_frame

BLOCK: Final = 512
MAX_PAX_BYTES: Final = 1024**2
"""Largest extended header accepted; a path of 64 folders of 255 bytes needs 17 KiB."""
_TYPES: Final = {b"0": "f", b"5": "d", b"2": "l", b"1": "h"}
_PAX_KEYS: Final = frozenset({b"path", b"linkpath", b"size", b"uid", b"gid", b"mtime", b"hdrcharset"})
_ZEROS: Final = bytes(BLOCK)


class Member(NamedTuple):
    """One member. `start` is where its content begins in the decompressed stream, `sha256` that of the content of a file."""

    path: bytes
    type: str
    mode: int
    uid: int
    gid: int
    mtime: int
    size: int
    link: bytes
    start: int
    sha256: bytes


class TarStream:
    """Iterates over the members of one layer, one frame in memory; afterwards `diff_id` is that of the whole tar."""

    def __init__(self, layer: Layer, report: Callable[[int], None] = lambda _: None) -> None:
        """`report` is called with the bytes read so far, once per frame: one member may be all of a layer."""
        self._layer = layer
        self._report = report
        self._frames = self._read_frames()
        self._diff = hashlib.sha256()
        self._frame = memoryview(b"")
        self._used = 0
        self._place = 0
        self.bytes = 0
        """Decompressed bytes read so far."""

    @property
    def diff_id(self) -> str:
        return "sha256:" + self._diff.hexdigest()

    def _read_frames(self) -> Iterator[bytes]:
        for number in range(len(self._layer.toc.frames)):
            yield read_frame(self._layer.file, self._layer.toc, number)

    def fault(self, reason: str) -> Corrupt:
        """The error that names the layer."""
        return self._layer.toc.corrupt(f"its tar at {self._place}: {reason}")

    def members(self) -> Iterator[Member]:
        """Every member in order; `Corrupt` for whatever is not exactly as it should be, up to the last byte of the last frame."""
        pax: dict[bytes, bytes] = {}
        while (block := self._take(BLOCK)) != _ZEROS:
            kind = block[156:157]
            size = self._number(block[124:136])
            self._check_block(block)
            if kind == b"x":
                if pax or size > MAX_PAX_BYTES:
                    raise self.fault("an extended header that is too large or follows another")
                pax = self._pax(self._take(size))
                self._skip_padding(size)
                continue
            yield self._member(block, kind, size, pax)
            pax = {}
        if pax or self._take(BLOCK) != _ZEROS:
            raise self.fault("it does not end with two blocks of zeros")
        if self._used < len(self._frame) or next(self._frames, b""):
            raise self.fault("it goes on after its end")

    def _member(self, block: bytes, kind: bytes, size: int, pax: dict[bytes, bytes]) -> Member:
        if kind not in _TYPES:
            raise self.fault(f"a member of type {kind!r}")
        prefix, name = _text(block[345:500]), _text(block[:100])
        path = pax.get(b"path", prefix + b"/" + name if prefix else name)
        link = pax.get(b"linkpath", _text(block[157:257]))
        size = self._decimal(pax[b"size"]) if b"size" in pax else size
        if size and kind != b"0":
            raise self.fault("content in a member that is no file")
        start = self._place
        return Member(
            path,
            _TYPES[kind],
            self._number(block[100:108]),
            self._decimal(pax[b"uid"]) if b"uid" in pax else self._number(block[108:116]),
            self._decimal(pax[b"gid"]) if b"gid" in pax else self._number(block[116:124]),
            self._decimal(pax[b"mtime"]) if b"mtime" in pax else self._number(block[136:148]),
            size,
            link,
            start,
            self._content(size) if kind == b"0" else b"",
        )

    def _check_block(self, block: bytes) -> None:
        if block[257:265] != b"ustar\x0000":
            raise self.fault("a header that is not ustar")
        if sum(block) - sum(block[148:156]) + 8 * 0x20 != self._number(block[148:156]):
            raise self.fault("a header with a wrong checksum")

    def _number(self, field: bytes) -> int:
        text = field.rstrip(b"\0 ")
        if not text.isdigit() or b"8" in text or b"9" in text:
            raise self.fault(f"{field!r} is not an octal number")
        return int(text, 8)

    def _decimal(self, text: bytes) -> int:
        if len(text) > 20 or not text.removeprefix(b"-").isdigit():  # noqa: PLR2004 -- digits of a 64 bit number
            raise self.fault(f"{text[:40]!r} is not a number")
        value = int(text)
        if not -(2**63) <= value < 2**63:
            raise self.fault(f"{text!r} is too large a number")
        return value

    def _pax(self, body: bytes) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        place = 0
        while place < len(body):
            length, space, _ = body[place : place + 8].partition(b" ")
            if not space or not length.isdigit() or not 0 < int(length) <= len(body) - place:
                raise self.fault("an extended header of wrong lengths")
            record = body[place + len(length) + 1 : place + int(length)]
            key, equals, value = record.partition(b"=")
            if not equals or not value.endswith(b"\n") or key not in _PAX_KEYS or key in found:
                raise self.fault(f"an extended header with {show(key[:40])}")
            found[key] = value[:-1]
            place += int(length)
        if b"size" in found and found[b"size"].startswith(b"-"):
            raise self.fault("a negative size")
        return found

    # -- bytes ---------------------------------------------------------------------------------------------------------

    def _more(self) -> None:
        """The next frame; every byte of every frame goes through the diff id exactly once."""
        data = next(self._frames, None)
        if data is None:
            raise self.fault("it ends too early")
        self._diff.update(data)
        self.bytes += len(data)
        self._report(self.bytes)
        self._frame, self._used = memoryview(data), 0

    def _pieces(self, count: int) -> Iterator[memoryview]:
        while count:
            if self._used == len(self._frame):
                self._more()
            piece = self._frame[self._used : self._used + count]
            self._used += len(piece)
            self._place += len(piece)
            count -= len(piece)
            yield piece

    def _take(self, count: int) -> bytes:
        end = self._used + count
        if end <= len(self._frame):
            out = bytes(self._frame[self._used : end])
            self._used = end
            self._place += count
            return out
        return b"".join(self._pieces(count))

    def _content(self, size: int) -> bytes:
        sha: Any = hashlib.sha256()
        for piece in self._pieces(size):
            sha.update(piece)
        self._skip_padding(size)
        digest: bytes = sha.digest()
        return digest

    def _skip_padding(self, size: int) -> None:
        padding = -size % BLOCK
        if padding and self._take(padding).strip(b"\0"):
            raise self.fault("padding that is not zeros")


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]
