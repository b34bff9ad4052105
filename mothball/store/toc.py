"""The table of contents of a layer: where every entry lies, without decompressing content (design.md, section 5).

A layer blob is ``zstd frame | zstd frame | ... | skippable frame``. The payload of the skippable frame is
``block 0 | block 1 | ... | index | trailer``: blocks hold the rows of the entries, the index says where blocks and
frames lie, the trailer says how long the index is. Any decoder of zstd skips it.

Everything read here may be damaged or written by an enemy, so every number is compared with the blob's real size, every
block with its sha256, and nothing is allocated because a blob says so. A table that lies is `Corrupt` and names the blob.
"""

from __future__ import annotations

import hashlib
import os
import struct
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from operator import lt
from typing import Annotated, Any, BinaryIO, Final, Literal, NamedTuple, TypeAlias

import msgspec
import zstandard

from mothball.errors import Corrupt
from mothball.store.manifest import TOC_DIGEST, TOC_OFFSET, TOC_SIZE

VERSION: Final = 1
SKIPPABLE_MAGIC: Final = 0x184D2A5D
TRAILER_MAGIC: Final = b"MBTOC001"
BLOCK_ROWS: Final = 1024
"""Most rows of one block."""
BLOCK_BYTES: Final = 4 * 1024**2
"""Size before compression at which the writer splits a block of several rows."""
MAX_BLOCK_BYTES: Final = 8 * 1024**2
"""Size before compression that a reader accepts; only a block of one row may be larger than `BLOCK_BYTES`."""
MAX_FRAME_BYTES: Final = 64 * 1024**2
"""Decompressed size of one frame that a reader accepts."""
MAX_EXTENTS: Final = 65_536
"""Most data extents of one sparse file; a writer joins neighbours when there are more."""
MAX_INDEX_BYTES: Final = 64 * 1024**2
MAX_REMOVED: Final = 1 << 22
MAX_FRAMES: Final = 1 << 20
MAX_BLOCKS: Final = 1 << 16

_HEADER = struct.Struct("<II")
_TRAILER = struct.Struct("<Q8s")
_MAX_INT: Final = 2**63 - 1
_SHA256_BYTES: Final = 32
_CACHED_BLOCKS: Final = 4

Row: TypeAlias = (
    tuple[bytes, str, int, int, int, int, int, bytes, bytes, int, int]
    | tuple[bytes, str, int, int, int, int, int, bytes, bytes, int, int, Sequence[Sequence[int]]]
    | list[Any]
)
"""What a writer gives: path, type, mode, uid, gid, mtime_ns, size, sha256, link, frame, offset[, extents]."""

_Length = Annotated[int, msgspec.Meta(ge=0, le=_MAX_INT)]
_Id = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]


class TocRow(msgspec.Struct, array_like=True, gc=False, frozen=True):
    """One entry of a layer as read. Paths are bytes, relative to the workspace's root, which itself is ``b""``.

    Types: ``f`` file, ``d`` folder, ``l`` symbolic link, ``h`` further name of a file (`link` is the first name),
    ``m`` only the mtime changed. `frame` and `offset` say where the first byte of the content lies.
    """

    path: bytes
    type: Literal["f", "d", "l", "h", "m"]
    mode: Annotated[int, msgspec.Meta(ge=0, le=0o7777)]
    uid: _Id
    gid: _Id
    mtime_ns: Annotated[int, msgspec.Meta(ge=-_MAX_INT, le=_MAX_INT)]
    size: _Length
    sha256: Annotated[bytes, msgspec.Meta(max_length=32)]
    link: bytes
    frame: _Length
    offset: _Length
    extents: Annotated[tuple[tuple[_Length, _Length], ...], msgspec.Meta(max_length=MAX_EXTENTS)] | None = None

    def as_tuple(self) -> Row:
        """The form that `encode_toc` takes."""
        row = (
            self.path, self.type, self.mode, self.uid, self.gid, self.mtime_ns,
            self.size, self.sha256, self.link, self.frame, self.offset,
        )  # fmt: skip
        return row if self.extents is None else (*row, self.extents)


class EncodedToc(NamedTuple):
    """`payload` of the skippable frame, and the ``sha256:<hex>`` of the index within it (`TOC_DIGEST`)."""

    payload: bytes
    index_digest: str


class Frame(NamedTuple):
    """One zstd frame: its place in the blob and its size once decompressed, all in bytes."""

    offset: int
    length: int
    size: int


class Block(NamedTuple):
    """One block of rows: key of its first path, place in the payload, number of rows, sha256 of the stored bytes."""

    first: bytes
    offset: int
    length: int
    rows: int
    sha256: bytes


class _Index(msgspec.Struct, gc=False):
    v: int
    frames: Annotated[list[tuple[_Length, _Length, _Length]], msgspec.Meta(max_length=MAX_FRAMES)]
    blocks: Annotated[list[tuple[bytes, _Length, _Length, _Length, bytes]], msgspec.Meta(max_length=MAX_BLOCKS)]
    removed: Annotated[list[bytes], msgspec.Meta(max_length=MAX_REMOVED)]
    content: _Length
    entries: _Length


_index_decoder = msgspec.msgpack.Decoder(_Index)
_rows_decoder = msgspec.msgpack.Decoder(Annotated[list[TocRow], msgspec.Meta(max_length=BLOCK_ROWS)])
_encoder = msgspec.msgpack.Encoder()


def sort_key(path: bytes) -> bytes:
    """The key under which paths sort by their components: no name holds a NUL, so the slash becomes the smallest byte."""
    return path.replace(b"/", b"\0")


def encode_toc(rows: Sequence[Row], frames: Sequence[tuple[int, int, int]], removed: Sequence[bytes], content: int) -> EncodedToc:
    """The payload of the skippable frame of a layer; the same arguments give the same bytes.

    `rows` are sorted by `sort_key` and differ in path, `removed` as well; `frames` are (offset, length, decompressed length)
    in bytes, `content` the total bytes of the files. `ValueError` for what no reader would accept: that is a writer's fault.
    """
    _check_writer(rows, removed)
    compressor = zstandard.ZstdCompressor(level=3, write_checksum=False, write_content_size=True)
    parts: list[bytes] = []
    blocks: list[tuple[bytes, int, int, int, bytes]] = []
    offset = 0
    for chunk, raw in _chunks(rows):
        stored = compressor.compress(raw)
        blocks.append((chunk[0][0], offset, len(stored), len(chunk), hashlib.sha256(stored).digest()))
        parts.append(stored)
        offset += len(stored)
    if len(frames) > MAX_FRAMES or len(blocks) > MAX_BLOCKS or len(removed) > MAX_REMOVED:
        raise ValueError("a layer has too many frames, entries or removals for one table of contents")
    index = _encoder.encode(
        {"v": VERSION, "frames": frames, "blocks": blocks, "removed": removed, "content": content, "entries": len(rows)}
    )
    if len(index) > MAX_INDEX_BYTES:
        raise ValueError(f"the index has {len(index)} bytes, at most {MAX_INDEX_BYTES} are allowed")
    payload = b"".join((*parts, index, _TRAILER.pack(len(index), TRAILER_MAGIC)))
    return EncodedToc(payload, "sha256:" + hashlib.sha256(index).hexdigest())


def skippable_frame(payload: bytes) -> bytes:
    """`payload` with the header that makes every zstd decoder pass over it."""
    if len(payload) >= 2**32:
        raise ValueError("a table of contents must be smaller than 4 GiB")
    return _HEADER.pack(SKIPPABLE_MAGIC, len(payload)) + payload


def _check_writer(rows: Sequence[Row], removed: Sequence[bytes]) -> None:
    if reason := _paths_fault([row[0] for row in rows], root_allowed=True):
        raise ValueError(reason)
    if reason := _paths_fault(list(removed), root_allowed=False):
        raise ValueError(f"removals: {reason}")
    if any(len(extents) > MAX_EXTENTS for row in rows for extents in row[11:]):
        raise ValueError(f"a sparse file has more than {MAX_EXTENTS} extents")


def _chunks(rows: Sequence[Row]) -> Iterator[tuple[Sequence[Row], bytes]]:
    """`rows` in blocks with their encoded bytes; a block of long names is halved until it is small enough."""
    todo = [rows[start : start + BLOCK_ROWS] for start in range(0, len(rows), BLOCK_ROWS)]
    todo.reverse()
    while todo:
        chunk = todo.pop()
        raw = _encoder.encode(chunk)
        if len(raw) > BLOCK_BYTES and len(chunk) > 1:
            middle = len(chunk) // 2
            todo += [chunk[middle:], chunk[:middle]]
            continue
        if len(raw) > MAX_BLOCK_BYTES:
            raise ValueError("one entry is too large for a table of contents")
        yield chunk, raw


def _paths_fault(paths: list[bytes], *, root_allowed: bool) -> str | None:
    """What is wrong with sorted relative `paths`, None when nothing is. One pass in C over all of them."""
    named = paths[1:] if root_allowed and paths and paths[0] == b"" else paths
    if not named:
        return None
    joined = b"/\0/" + b"/\0/".join(named) + b"/\0/"
    if joined.count(b"\0") != len(named) + 1:
        return "a path holds a NUL byte"
    for bad, reason in (
        (b"//", "a path is absolute or has an empty component"),
        (b"/./", "a path has '.' as a component"),
        (b"/../", "a path has '..' as a component"),
        (b"/.wh.", "a path has the name of a whiteout"),
    ):
        if bad in joined:
            return reason
    keys = [path.replace(b"/", b"\0") for path in paths]
    if not all(map(lt, keys, keys[1:])):
        return "the paths are not sorted, or one is there twice"
    return None


class Toc:
    """The table of contents of one layer, its index in memory, its blocks decoded on demand.

    `Toc` does not own `blob`, which must be a real file and stay open. Not for several threads at once.
    """

    def __init__(self, blob: BinaryIO, name: str, start: int, index: _Index) -> None:
        self._fd = blob.fileno()
        self._start = start
        self.name = name
        self.frames = [Frame(*frame) for frame in index.frames]
        self.blocks = [Block(sort_key(block[0]), block[1], block[2], block[3], block[4]) for block in index.blocks]
        self.removed: list[bytes] = index.removed
        self._removed_set: frozenset[bytes] | None = None
        self.content = index.content
        self.entries = index.entries
        self._firsts = [block.first for block in self.blocks]
        self._decoder = zstandard.ZstdDecompressor()
        self._cache: dict[int, list[TocRow]] = {}
        self.starts: list[int] = [0]
        """Offset of each frame in the decompressed stream, and last the stream's length."""
        for frame in self.frames:
            self.starts.append(self.starts[-1] + frame.size)

    # -- reading the index ---------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, blob: BinaryIO, name: str, annotations: Mapping[str, str] | None = None) -> Toc:
        """Read the index of `blob`; `name` (its digest) stands in errors.

        With the annotations of the layer's descriptor the index is compared with its digest; without them (None) it is
        found by the trailer. `Corrupt` for whatever is not exactly as a writer leaves it.
        """
        fd = blob.fileno()
        size = _size(fd, name)
        if size < _HEADER.size + _TRAILER.size:
            raise _corrupt(name, f"{size} bytes are too short for a layer")
        length, magic = _TRAILER.unpack(_pread(fd, size - _TRAILER.size, _TRAILER.size, name))
        if magic != TRAILER_MAGIC:
            raise _corrupt(name, "its table of contents has no trailer")
        if length > MAX_INDEX_BYTES or length > size - _TRAILER.size - _HEADER.size:
            raise _corrupt(name, f"its index claims {length} bytes")
        raw = _pread(fd, size - _TRAILER.size - length, length, name)
        if annotations is not None and "sha256:" + hashlib.sha256(raw).hexdigest() != annotations.get(TOC_DIGEST):
            raise _corrupt(name, "its index does not have the digest that the manifest says")
        index = _decode_index(raw, name)
        blocks_length = index.blocks[-1][1] + index.blocks[-1][2] if index.blocks else 0
        payload = blocks_length + length + _TRAILER.size
        start = size - payload
        if annotations is not None and (annotations.get(TOC_OFFSET), annotations.get(TOC_SIZE)) != (
            str(start),
            str(payload),
        ):
            raise _corrupt(name, "its table of contents is not where the manifest says")
        if start < _HEADER.size or _HEADER.unpack(_pread(fd, start - _HEADER.size, _HEADER.size, name)) != (
            SKIPPABLE_MAGIC,
            payload,
        ):
            raise _corrupt(name, "its table of contents does not stand in a skippable frame of its length")
        _check_index(index, start - _HEADER.size, name)
        return cls(blob, name, start, index)

    # -- rows ----------------------------------------------------------------------------------------------------------

    def rows(self, start: bytes = b"") -> Iterator[TocRow]:
        """The rows in order, beginning with the first whose `sort_key` is at least `start`; one block in memory at a time."""
        first = max(0, bisect_right(self._firsts, start) - 1)
        for number in range(first, len(self.blocks)):
            rows = self.block(number)
            if number == first and start:
                rows = rows[_bisect(rows, start) :]
            yield from rows

    def find(self, path: bytes) -> TocRow | None:
        """The row of `path`, or None; decodes at most one block."""
        key = sort_key(path)
        number = bisect_right(self._firsts, key) - 1
        if number < 0:
            return None
        rows = self.block(number)
        place = _bisect(rows, key)
        return rows[place] if place < len(rows) and rows[place].path == path else None

    def removes(self, path: bytes) -> bool:
        """True when this layer takes exactly `path` away from the layers below."""
        if self._removed_set is None:
            self._removed_set = frozenset(self.removed)
        return path in self._removed_set

    def block(self, number: int) -> list[TocRow]:
        """The rows of one block, checked; the last few blocks stay in memory."""
        rows = self._cache.get(number)
        if rows is None:
            rows = self._decode_block(number)
            while len(self._cache) >= _CACHED_BLOCKS:
                del self._cache[next(iter(self._cache))]
            self._cache[number] = rows
        return rows

    def _decode_block(self, number: int) -> list[TocRow]:
        block = self.blocks[number]
        stored = _pread(self._fd, self._start + block.offset, block.length, self.name)
        if hashlib.sha256(stored).digest() != block.sha256:
            raise self.corrupt(f"block {number} of its table of contents does not have its sha256")
        raw = decompress(self._decoder, stored, None, MAX_BLOCK_BYTES, self.name)
        try:
            rows: list[TocRow] = _rows_decoder.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise self.corrupt(f"block {number} of its table of contents: {error}") from None
        if len(rows) != block.rows or sort_key(rows[0].path) != block.first:
            raise self.corrupt(f"block {number} of its table of contents has other rows than its index says")
        if number + 1 < len(self.blocks) and sort_key(rows[-1].path) >= self.blocks[number + 1].first:
            raise self.corrupt(f"block {number} of its table of contents runs into the next")
        if reason := _paths_fault([row.path for row in rows], root_allowed=number == 0):
            raise self.corrupt(reason)
        self._check_rows(rows)
        return rows

    def _check_rows(self, rows: Iterable[TocRow]) -> None:
        starts, frames = self.starts, len(self.frames)
        total = starts[-1]
        for row in rows:
            kind = row.type
            if kind == "f" or kind == "h":  # noqa: PLR1714 -- this loop runs once per entry
                if row.extents is not None:
                    self._check_extents(row)
                if len(row.sha256) != _SHA256_BYTES and (row.size or row.sha256):
                    raise self.corrupt(f"{row.path!r} has no sha256")
                if row.size and (
                    row.frame >= frames
                    or starts[row.frame] + row.offset >= starts[row.frame + 1]
                    or starts[row.frame] + row.offset + row.size > total
                ):
                    raise self.corrupt(f"{row.path!r} claims content outside its frames")
                if kind == "h" and (not row.link or _paths_fault([row.link], root_allowed=False)):
                    raise self.corrupt(f"{row.path!r} is a hard link to {row.link[:256]!r}")
            elif kind == "l":
                if not row.link or b"\0" in row.link:
                    raise self.corrupt(f"{row.path!r} is a symbolic link without a target")
            elif row.size:
                raise self.corrupt(f"{row.path!r} is no file and has a size")

    def _check_extents(self, row: TocRow) -> None:
        """The extents of a sparse file must be in order, apart from each other and within the file.

        They are a map for restoring holes: the tar holds the whole content, zeros included, as any other reader expects.
        """
        end = 0
        for offset, length in row.extents or ():
            if offset < end or length > row.size - offset:
                raise self.corrupt(f"{row.path!r} has extents that overlap or leave the file")
            end = offset + length

    def corrupt(self, reason: str) -> Corrupt:
        """The error that names this blob."""
        return _corrupt(self.name, reason)


def decompress(decoder: zstandard.ZstdDecompressor, stored: bytes, expected: int | None, limit: int, name: str) -> bytes:
    """The content of exactly one zstd frame; its header must state a size of `expected` bytes (None: any up to `limit`).

    The size is checked before anything is allocated: the decoder itself believes the header (a bomb).
    """
    try:
        claimed = zstandard.frame_content_size(stored)
        if claimed < 0 or claimed > limit or (expected is not None and claimed != expected):
            raise _corrupt(name, f"a frame claims {claimed} bytes")
        out: bytes = decoder.decompress(stored, allow_extra_data=False)
    except (zstandard.ZstdError, MemoryError) as error:
        raise _corrupt(name, f"a frame cannot be decompressed: {error}") from None
    if len(out) != claimed:
        raise _corrupt(name, f"a frame claims {claimed} bytes and holds {len(out)}")
    return out


def read_frame(blob: BinaryIO, toc: Toc, number: int) -> bytes:
    """The decompressed content of one frame of the blob that `toc` belongs to; its zstd checksum is verified."""
    frame = toc.frames[number]
    stored = _pread(blob.fileno(), frame.offset, frame.length, toc.name)
    return decompress(zstandard.ZstdDecompressor(), stored, frame.size, MAX_FRAME_BYTES, toc.name)


def _decode_index(raw: bytes, name: str) -> _Index:
    try:
        index = _index_decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _corrupt(name, f"its index: {error}") from None
    if index.v != VERSION:
        raise _corrupt(name, f"its table of contents has version {index.v}, this reader knows {VERSION}")
    return index


def _check_index(index: _Index, frames_end: int, name: str) -> None:
    """Frames fill the blob up to the skippable frame, blocks the payload up to the index: no gap, no overlap, no surprise."""
    end = 0
    for offset, length, size in index.frames:
        if offset != end or length < 1 or size < 1 or size > MAX_FRAME_BYTES:
            raise _corrupt(name, f"its index has a frame of {length} bytes at {offset} for {size} bytes of content")
        end += length
    if end != frames_end:
        raise _corrupt(name, f"its frames end at {end}, its table of contents begins at {frames_end}")
    end = rows = 0
    for _, offset, length, count, digest in index.blocks:
        if offset != end or length < 1 or not 1 <= count <= BLOCK_ROWS or len(digest) != _SHA256_BYTES:
            raise _corrupt(name, f"its index has a block of {count} rows and {length} bytes at {offset}")
        end += length
        rows += count
    if rows != index.entries:
        raise _corrupt(name, f"its index claims {index.entries} entries and has {rows}")
    if not all(sort_key(low[0]) < sort_key(high[0]) for low, high in pairwise(index.blocks)):
        raise _corrupt(name, "its blocks are not sorted")
    if reason := _paths_fault(index.removed, root_allowed=False):
        raise _corrupt(name, f"its removals: {reason}")


def _bisect(rows: list[TocRow], key: bytes) -> int:
    low, high = 0, len(rows)
    while low < high:
        middle = (low + high) // 2
        if sort_key(rows[middle].path) < key:
            low = middle + 1
        else:
            high = middle
    return low


def _size(fd: int, name: str) -> int:
    try:
        return os.fstat(fd).st_size
    except OSError as error:
        raise _corrupt(name, f"it cannot be read: {error.strerror}") from None


def _pread(fd: int, offset: int, length: int, name: str) -> bytes:
    """Exactly `length` bytes at `offset`; the caller has compared both with the blob's size, which may shrink meanwhile."""
    parts: list[bytes] = []
    try:
        while length > 0:
            part = os.pread(fd, length, offset)
            if not part:
                raise _corrupt(name, f"it ends at {offset}, where {length} bytes more are claimed")
            parts.append(part)
            offset += len(part)
            length -= len(part)
    except OSError as error:
        raise _corrupt(name, f"it cannot be read: {error.strerror}") from None
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _corrupt(name: str, reason: str, **fields: Any) -> Corrupt:
    return Corrupt(what=f"layer {name}", reason=reason, digest=name, **fields)
