"""Reading one file's content out of a layer: seekable, one frame in memory at a time, checked against its sha256."""

from __future__ import annotations

import hashlib
import io
import os
from bisect import bisect_right
from collections import OrderedDict
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from mothball.errors import Corrupt, InvalidParams
from mothball.store.toc import Toc, TocRow, read_frame

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

CACHED_FRAMES = 2
_STEP = 1024**2


class Layer(NamedTuple):
    """One open layer of a capture; `number` 0 is the lowest."""

    number: int
    digest: str
    file: BinaryIO
    toc: Toc


def clean_path(path: str | bytes) -> bytes:
    """`path` as the table of contents has it (B-80); ``""`` and ``"."`` are the root, ``b""``.

    `InvalidParams` for an absolute path, a ``..``, a NUL, an empty component or a text that no file name can have.
    """
    if not isinstance(path, str | bytes):
        raise InvalidParams(f"a path must be a text, not {type(path).__name__}")
    try:
        raw = path.encode("utf-8", "surrogateescape") if isinstance(path, str) else path
    except UnicodeEncodeError:
        raise InvalidParams(f"not a path: {path!r}") from None
    if raw in {b"", b"."}:
        return b""
    if b"\0" in raw:
        raise InvalidParams(f"a path must not hold a NUL byte: {show(raw)}")
    if raw.startswith(b"/"):
        raise InvalidParams(f"a path must be relative to the workspace: {show(raw)}")
    parts = raw.split(b"/")
    if b"" in parts:
        raise InvalidParams(f"a path must not have an empty component: {show(raw)}")
    if b".." in parts:
        raise InvalidParams(f"a path must not have '..' as a component: {show(raw)}")
    return b"/".join(part for part in parts if part != b".")


def show(path: bytes) -> str:
    """`path` for messages and JSON: bytes that are no UTF-8 become ``\\xNN``, control characters cannot reach a terminal."""
    text = path.decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


class FrameCache:
    """The frames used last, decompressed; it bounds memory to `CACHED_FRAMES` frames of at most 64 MiB."""

    def __init__(self) -> None:
        self._frames: OrderedDict[tuple[int, int], bytes] = OrderedDict()

    def get(self, layer: Layer, number: int) -> bytes:
        key = (layer.number, number)
        data = self._frames.get(key)
        if data is None:
            while len(self._frames) >= CACHED_FRAMES:
                self._frames.popitem(last=False)
            data = self._frames[key] = read_frame(layer.file, layer.toc, number)
        else:
            self._frames.move_to_end(key)
        return data

    def clear(self) -> None:
        self._frames.clear()


class ContentReader(io.RawIOBase):
    """The content of one file or hard link. Reading it from the beginning to the end verifies its sha256 on the way.

    The last piece of a file whose content does not match is not handed out: the read raises `Corrupt`.
    """

    def __init__(self, layer: Layer, row: TocRow, frames: FrameCache) -> None:
        self._layer = layer
        self._row = row
        self._frames = frames
        self._place = 0
        self._hashed = 0
        self._sha = hashlib.sha256()
        self._stream = layer.toc.starts[row.frame] + row.offset if row.frame < len(layer.toc.starts) else 0
        extents = row.extents
        self._offsets = [offset for offset, _ in extents] if extents is not None else None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._row.size}.get(whence)
        if base is None or base + offset < 0:
            raise ValueError(f"cannot seek to {offset} from {whence}")
        self._place = base + offset
        return self._place

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        count = self._piece(view)
        if self._place <= self._hashed < self._place + count:
            self._sha.update(view[self._hashed - self._place : count])
            self._hashed = self._place + count
            if self._hashed == self._row.size:
                self._verify()
        self._place += count
        return count

    def readall(self) -> bytes:
        out = bytearray()
        while piece := self.read(_STEP):
            out += piece
        return bytes(out)

    def copy_to(self, out: BinaryIO) -> int:
        """Write the whole content to `out` in pieces of 1 MiB and verify it; returns bytes. Raises `Corrupt`."""
        self.seek(0)
        self._sha, self._hashed = hashlib.sha256(), 0
        while piece := self.read(_STEP):
            out.write(piece)
        if not self._row.size:
            self._verify()
        return self._place

    def _piece(self, view: memoryview) -> int:
        """Fill `view` from the current place up to the next border of a frame or an extent."""
        left = min(len(view), self._row.size - self._place)
        if left <= 0:
            return 0
        if self._offsets is None or self._row.extents is None:
            return self._content(view[:left], self._place)
        number = bisect_right(self._offsets, self._place) - 1
        if number >= 0:
            offset, length = self._row.extents[number]
            inside = self._place - offset
            if inside < length:
                return self._content(view[: min(left, length - inside)], self._place)
        # Between two extents the tar has zeros; there is no need to decompress them.
        following = self._offsets[number + 1] if number + 1 < len(self._offsets) else self._row.size
        left = min(left, following - self._place)
        view[:left] = bytes(left)
        return left

    def _content(self, view: memoryview, place: int) -> int:
        toc = self._layer.toc
        position = self._stream + place
        number = bisect_right(toc.starts, position) - 1
        if number >= len(toc.frames):
            raise toc.corrupt(f"{show(self._row.path)} claims content outside its frames")
        frame = self._frames.get(self._layer, number)
        start = position - toc.starts[number]
        count = min(len(view), len(frame) - start)
        view[:count] = memoryview(frame)[start : start + count]
        return count

    def _verify(self) -> None:
        if self._row.sha256 and self._sha.digest() != self._row.sha256:
            raise Corrupt(
                what=f"layer {self._layer.digest}",
                reason=f"the content of {show(self._row.path)} does not match its sha256",
                digest=self._layer.digest,
            )
