"""Reading the table of contents of a layer: one path, or all, without decompressing content.

Everything read here may be damaged or written by an enemy, so every number is compared with the blob's real size, every
block with its sha256, and nothing is allocated because a blob says so. A table that lies is `Corrupt` and names the blob.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Annotated, Any, BinaryIO, Final, Literal, NamedTuple, TypeVar

import msgspec
import zstandard

from mothball.errors import Corrupt
from mothball.store.manifest import TOC_DIGEST, TOC_OFFSET, TOC_SIZE
from mothball.store.tocformat import (
    BLOCK_ROWS,
    HEADER,
    MAX_BLOCK_BYTES,
    MAX_EXTENTS,
    MAX_FRAME_BYTES,
    MAX_INDEX_BYTES,
    SHA256_BYTES,
    SKIPPABLE_MAGIC,
    TRAILER,
    TRAILER_MAGIC,
    VERSION,
    Block,
    EncodedToc,
    Frame,
    Index,
    Row,
    TocRow,
    encode_toc,
    paths_fault,
    skippable_frame,
    sort_key,
    sorted_keys,
)  # fmt: skip

__all__ = [
    "MAX_EXTENTS", "EncodedToc", "Row", "Toc", "TocRow", "decompress", "encode_toc", "read_frame", "row_key", "skippable_frame",
    "sort_key",
]  # fmt: skip

T = TypeVar("T")
_CACHED_BLOCKS: Final = 4
_FEW: Final = 64
"""So many rows of a block are decoded one by one; a whole block of 1024 takes as long as some 200 of them."""


class NameRow(msgspec.Struct, array_like=True, gc=False, frozen=True):
    """The first two fields of a row, for whoever lists names; the others are passed over unread, and so unchecked."""

    path: bytes
    type: Literal["f", "d", "l", "h", "m"]


_MOST: Final = msgspec.Meta(max_length=BLOCK_ROWS)
_index_decoder = msgspec.msgpack.Decoder(Index)
_rows_decoder = msgspec.msgpack.Decoder(Annotated[list[TocRow], _MOST])
_names_decoder = msgspec.msgpack.Decoder(Annotated[list[NameRow], _MOST])
_raw_decoder = msgspec.msgpack.Decoder(Annotated[list[msgspec.Raw], _MOST])
_row_decoder = msgspec.msgpack.Decoder(TocRow)


class Rows(NamedTuple):
    """The rows of one block, and the keys under which they sort."""

    keys: list[bytes]
    rows: list[TocRow]


class Named(NamedTuple):
    """Of one block the keys of its rows, their names with their types, and the block as it is encoded."""

    keys: list[bytes]
    rows: list[NameRow]
    raw: bytes


def row_key(row: TocRow) -> bytes:
    """The key under which rows sort."""
    return row.path.replace(b"/", b"\0")  # `sort_key`, without a second call: this runs once per look at a row


class Toc:
    """The table of contents of one layer, its index in memory, its blocks decoded on demand.

    `Toc` does not own `blob`, which must be a real file and stay open. Not for several threads at once.
    """

    def __init__(self, blob: BinaryIO, name: str, start: int, index: Index) -> None:
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
        self._cache: dict[int, Rows] = {}
        self._named: dict[int, Named] = {}
        self._stored: dict[int, list[msgspec.Raw]] = {}
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
        if size < HEADER.size + TRAILER.size:
            raise _corrupt(name, f"{size} bytes are too short for a layer")
        length, magic = TRAILER.unpack(_pread(fd, size - TRAILER.size, TRAILER.size, name))
        if magic != TRAILER_MAGIC:
            raise _corrupt(name, "its table of contents has no trailer")
        if length > MAX_INDEX_BYTES or length > size - TRAILER.size - HEADER.size:
            raise _corrupt(name, f"its index claims {length} bytes")
        raw = _pread(fd, size - TRAILER.size - length, length, name)
        if annotations is not None and "sha256:" + hashlib.sha256(raw).hexdigest() != annotations.get(TOC_DIGEST):
            raise _corrupt(name, "its index does not have the digest that the manifest says")
        index = _decode_index(raw, name)
        blocks_length = index.blocks[-1][1] + index.blocks[-1][2] if index.blocks else 0
        payload = blocks_length + length + TRAILER.size
        start = size - payload
        if annotations is not None and (annotations.get(TOC_OFFSET), annotations.get(TOC_SIZE)) != (
            str(start),
            str(payload),
        ):
            raise _corrupt(name, "its table of contents is not where the manifest says")
        if start < HEADER.size or HEADER.unpack(_pread(fd, start - HEADER.size, HEADER.size, name)) != (
            SKIPPABLE_MAGIC,
            payload,
        ):
            raise _corrupt(name, "its table of contents does not stand in a skippable frame of its length")
        _check_index(index, start - HEADER.size, name)
        return cls(blob, name, start, index)

    # -- rows ----------------------------------------------------------------------------------------------------------

    def rows(self, start: bytes = b"") -> Iterator[TocRow]:
        """The rows in order, beginning with the first whose `sort_key` is at least `start`; one block in memory at a time."""
        first = self.block_of(start)
        for number in range(first, len(self.blocks)):
            keys, rows = self.block(number)
            yield from rows[bisect_left(keys, start) :] if number == first and start else rows

    def block_of(self, key: bytes) -> int:
        """The number of the block that has the first row whose key is at least `key`, or of the one before it."""
        return max(0, bisect_right(self._firsts, key) - 1)

    def find(self, path: bytes) -> TocRow | None:
        """The row of `path`, or None; reads at most one block and decodes that row alone."""
        key = sort_key(path)
        return next(self.between(key, key + b"\0"), None)

    def between(self, start: bytes, stop: bytes | None) -> Iterator[TocRow]:
        """The rows whose `sort_key` is from `start` to before `stop` (None: to the end).

        A block of which few are asked for is not decoded as a whole: its names are read and checked, and those rows.
        """
        for number in range(self.block_of(start), len(self.blocks)):
            if stop is not None and self._firsts[number] >= stop:
                return
            keys = self.names(number).keys
            first = bisect_left(keys, start)
            last = len(keys) if stop is None else bisect_left(keys, stop, lo=first)
            if last - first > _FEW:
                yield from self.block(number).rows[first:last]
            else:
                for place in range(first, last):
                    yield self._row(number, place)
            if last < len(keys):
                return

    def removes(self, path: bytes) -> bool:
        """True when this layer takes exactly `path` away from the layers below."""
        if self._removed_set is None:
            self._removed_set = frozenset(self.removed)
        return path in self._removed_set

    def block(self, number: int) -> Rows:
        """The rows of one block, checked; the last few blocks stay in memory."""
        block = self._cache.get(number)
        if block is None:
            rows: list[TocRow] = self._decoded(number, self._raw(number), _rows_decoder)
            block = Rows(self._check_names(number, [row.path for row in rows]), rows)
            self._check_rows(rows)
            _remember(self._cache, number, block)
        return block

    def names(self, number: int) -> Named:
        """The names of one block, checked as such, at a third of the cost of `block`; the last few blocks stay in memory."""
        named = self._named.get(number)
        if named is None:
            raw = self._raw(number)
            rows: list[NameRow] = self._decoded(number, raw, _names_decoder)
            named = Named(self._check_names(number, [row.path for row in rows]), rows, raw)
            _remember(self._named, number, named)
        return named

    def _row(self, number: int, place: int) -> TocRow:
        """One row of a block of which no other may be wanted."""
        stored = self._stored.get(number)
        if stored is None:
            stored = self._decoded(number, self.names(number).raw, _raw_decoder)
            _remember(self._stored, number, stored)
        row = self._decoded(number, stored[place], _row_decoder)
        self._check_rows((row,))
        return row

    def _raw(self, number: int) -> bytes:
        block = self.blocks[number]
        stored = _pread(self._fd, self._start + block.offset, block.length, self.name)
        if hashlib.sha256(stored).digest() != block.sha256:
            raise self.corrupt(f"block {number} of its table of contents does not have its sha256")
        return decompress(self._decoder, stored, None, MAX_BLOCK_BYTES, self.name)

    def _decoded(self, number: int, raw: bytes | msgspec.Raw, decoder: msgspec.msgpack.Decoder[T]) -> T:
        try:
            return decoder.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise self.corrupt(f"block {number} of its table of contents: {error}") from None

    def _check_names(self, number: int, paths: list[bytes]) -> list[bytes]:
        """The keys of a block's paths, if they are as its index says, in order, and such as may be unpacked."""
        block = self.blocks[number]
        if len(paths) != block.rows or sort_key(paths[0]) != block.first:
            raise self.corrupt(f"block {number} of its table of contents has other rows than its index says")
        if number + 1 < len(self.blocks) and sort_key(paths[-1]) >= self.blocks[number + 1].first:
            raise self.corrupt(f"block {number} of its table of contents runs into the next")
        reason, keys = sorted_keys(paths, root_allowed=number == 0)
        if reason:
            raise self.corrupt(reason)
        return keys

    def _check_rows(self, rows: Iterable[TocRow]) -> None:
        starts, frames = self.starts, len(self.frames)
        total = starts[-1]
        for row in rows:
            kind = row.type
            if kind == "f" or kind == "h":  # noqa: PLR1714 -- this loop runs once per entry
                if row.extents is not None:
                    self._check_extents(row)
                if len(row.sha256) != SHA256_BYTES and (row.size or row.sha256):
                    raise self.corrupt(f"{row.path!r} has no sha256")
                if row.size and (
                    row.frame >= frames
                    or starts[row.frame] + row.offset >= starts[row.frame + 1]
                    or starts[row.frame] + row.offset + row.size > total
                ):
                    raise self.corrupt(f"{row.path!r} claims content outside its frames")
                if kind == "h" and (not row.link or paths_fault([row.link], root_allowed=False)):
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


def _decode_index(raw: bytes, name: str) -> Index:
    try:
        index = _index_decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _corrupt(name, f"its index: {error}") from None
    if index.v != VERSION:
        raise _corrupt(name, f"its table of contents has version {index.v}, this reader knows {VERSION}")
    return index


def _check_index(index: Index, frames_end: int, name: str) -> None:
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
        if offset != end or length < 1 or not 1 <= count <= BLOCK_ROWS or len(digest) != SHA256_BYTES:
            raise _corrupt(name, f"its index has a block of {count} rows and {length} bytes at {offset}")
        end += length
        rows += count
    if rows != index.entries:
        raise _corrupt(name, f"its index claims {index.entries} entries and has {rows}")
    if not all(sort_key(low[0]) < sort_key(high[0]) for low, high in pairwise(index.blocks)):
        raise _corrupt(name, "its blocks are not sorted")
    if reason := paths_fault(index.removed, root_allowed=False):
        raise _corrupt(name, f"its removals: {reason}")


def _remember(cache: dict[int, T], number: int, value: T) -> None:
    """Keep `value` and the last few before it."""
    while len(cache) >= _CACHED_BLOCKS:
        del cache[next(iter(cache))]
    cache[number] = value


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
