"""A capture as one tar: its layers merged, the workspace's root as the tar's root, the same bytes for the same tree.

Sorted by path components, a folder before what it holds; PAX where ustar cannot say it, times with their nanoseconds. Any
tar reads it: what an older reader does not know it leaves out. Holes of sparse files are written as the zeros they read as,
for the image specification advises against sparse members. Nothing of it depends on how many layers the capture has.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable
from typing import Any, Final, Literal, NamedTuple, Protocol

import zstandard

from mothball.errors import InvalidParams
from mothball.store.read import ContentReader, FrameCache, Layer
from mothball.store.tarhead import END_OF_ARCHIVE, header, padded
from mothball.store.toc import read_frame
from mothball.store.tree import Found, Tree

Compression = Literal["", "gzip", "zstd"]
Progress = Callable[..., None]
"""Called with ``entries=``, ``bytes=`` (written so far, before compression), now and then; what it raises ends the export."""

FRAME_BUDGET: Final = 256 * 1024**2
"""Most bytes of decompressed frames kept at once, bytes; two frames are kept whatever their size."""
_REPORT_BYTES: Final = 4 * 1024**2
_REPORT_ENTRIES: Final = 512
_GZIP_LEVEL: Final = 6
_ZSTD_LEVEL: Final = 3
_GZIP_WINDOW: Final = 31  # 15 bits of window and a gzip header, in which zlib writes no name and the time 0
_KINDS: Final = {"f": b"0", "h": b"0", "d": b"5", "l": b"2"}
_NS: Final = 10**9


class TarResult(NamedTuple):
    """`sha256` (``sha256:<hex>``) and `bytes` of what was written to `out`; `entries` counts the members."""

    sha256: str
    bytes: int
    entries: int


class Sink(Protocol):
    """Where an export goes; a pipe will do."""

    def write(self, data: bytes, /) -> Any: ...


def write_tar(tree: Tree, out: Sink, *, compression: Compression = "", progress: Progress | None = None) -> TarResult:
    """Write the merged tree to `out`; every file is compared with its sha256 on the way (B-102).

    With `compression` the tar is one gzip or zstd stream whose header names no file and no time (B-106). `Corrupt` names the
    blob that is damaged; what was written by then must not be used.
    """
    hashed = _Hashed(out)
    packed = _compressor(compression, hashed)
    writer = _TarWriter(tree, packed, progress or (lambda **_: None))
    writer.run()
    packed.finish()
    return TarResult("sha256:" + hashed.sha.hexdigest(), hashed.bytes, writer.entries)


class _Hashed:
    def __init__(self, out: Sink) -> None:
        self._out = out
        self.sha = hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes) -> None:
        self.sha.update(data)
        self.bytes += len(data)
        self._out.write(data)

    def finish(self) -> None:
        """Nothing is kept back here."""


class _Packed:
    def __init__(self, engine: Any, out: _Hashed) -> None:
        self._engine = engine
        self._out = out

    def write(self, data: bytes) -> None:
        if piece := self._engine.compress(data):
            self._out.write(piece)

    def finish(self) -> None:
        self._out.write(self._engine.flush())


def _compressor(name: Compression, out: _Hashed) -> _Packed | _Hashed:
    if name == "gzip":
        return _Packed(zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, _GZIP_WINDOW), out)
    if name == "zstd":
        return _Packed(zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_checksum=True).compressobj(), out)
    if name:
        raise InvalidParams(f"compression is gzip or zstd, not {name!r}")
    return out


class _Frames(FrameCache):
    """As many frames as the budget allows: a merged walk reads forward in every layer, and goes back and forth among them."""

    def get(self, layer: Layer, number: int) -> bytes:
        key = (layer.number, number)
        data = self._frames.get(key)
        if data is None:
            wanted = layer.toc.frames[number].size
            while len(self._frames) > 1 and sum(map(len, self._frames.values())) + wanted > FRAME_BUDGET:
                self._frames.popitem(last=False)
            # The frames before this one of the same layer are done with: content lies in the order of paths.
            for old in [item for item in self._frames if item[0] == layer.number and item[1] < number - 1]:
                del self._frames[old]
            data = self._frames[key] = read_frame(layer.file, layer.toc, number)
        else:
            self._frames.move_to_end(key)
        return data


class _TarWriter:
    def __init__(self, tree: Tree, out: _Packed | _Hashed, progress: Progress) -> None:
        self._tree = tree
        self._out = out
        self._progress = progress
        self._frames = _Frames()
        self._links: dict[tuple[int, bytes], bytes] = {}
        self._reported = (0, 0)
        self.entries = 0
        self.bytes = 0

    def run(self) -> None:
        for found in self._tree.rows():
            self._member(found)
            self.entries += 1
            if self.bytes - self._reported[1] > _REPORT_BYTES or self.entries - self._reported[0] > _REPORT_ENTRIES:
                self._report()
        self.write(END_OF_ARCHIVE)
        self._report()

    def write(self, data: bytes) -> None:
        self._out.write(data)
        self.bytes += len(data)
        if self.bytes - self._reported[1] > _REPORT_BYTES:
            self._report()

    def _report(self) -> None:
        self._reported = (self.entries, self.bytes)
        self._progress(entries=self.entries, bytes=self.bytes)

    def _member(self, found: Found) -> None:
        row = found.row
        kind = _KINDS[row.type]
        path, link, size = row.path, row.link if row.type == "l" else b"", row.size
        if row.type == "d":
            path = path + b"/" if path else b"./"
        elif row.type == "h":
            first = self._first(found)
            if first is not None:
                kind, link, size = b"1", first, 0
        seconds, nanoseconds = divmod(found.mtime_ns, _NS)
        self.write(header(path, kind, row.mode, row.uid, row.gid, size, seconds, link, nanoseconds))
        if kind == b"0":
            ContentReader(self._tree.layers[found.layer], row, self._frames).copy_to(self)  # type: ignore[arg-type]
            self.write(bytes(padded(size) - size))

    def _first(self, found: Found) -> bytes | None:
        """The member to which this name is a link; None when it has to carry the content itself, and others then link to it."""
        key = (found.layer, found.row.link)
        known = self._links.get(key)
        if known is None:
            first = self._tree.first_name(found)
            known = self._links[key] = found.row.path if first is None else first
        return None if known == found.row.path else known
