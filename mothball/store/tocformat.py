"""The format of a layer's table of contents, and writing it (design.md, section 5).

A layer blob is ``zstd frame | zstd frame | ... | skippable frame``. The payload of the skippable frame is
``block 0 | block 1 | ... | index | trailer``: blocks hold the rows of the entries, the index says where blocks and
frames lie, the trailer says how long the index is. Any decoder of zstd skips it. `toc` reads it.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from operator import lt
from typing import Annotated, Any, Final, Literal, NamedTuple, TypeAlias

import msgspec
import zstandard

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

HEADER = struct.Struct("<II")
TRAILER = struct.Struct("<Q8s")
_MAX_INT: Final = 2**63 - 1
SHA256_BYTES: Final = 32

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


class Index(msgspec.Struct, gc=False):
    """The index as it is stored: what `Frame` and `Block` say, removals, bytes of content, number of rows."""

    v: int
    frames: Annotated[list[tuple[_Length, _Length, _Length]], msgspec.Meta(max_length=MAX_FRAMES)]
    blocks: Annotated[list[tuple[bytes, _Length, _Length, _Length, bytes]], msgspec.Meta(max_length=MAX_BLOCKS)]
    removed: Annotated[list[bytes], msgspec.Meta(max_length=MAX_REMOVED)]
    content: _Length
    entries: _Length


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
    payload = b"".join((*parts, index, TRAILER.pack(len(index), TRAILER_MAGIC)))
    return EncodedToc(payload, "sha256:" + hashlib.sha256(index).hexdigest())


def skippable_frame(payload: bytes) -> bytes:
    """`payload` with the header that makes every zstd decoder pass over it."""
    if len(payload) >= 2**32:
        raise ValueError("a table of contents must be smaller than 4 GiB")
    return HEADER.pack(SKIPPABLE_MAGIC, len(payload)) + payload


def _check_writer(rows: Sequence[Row], removed: Sequence[bytes]) -> None:
    if reason := paths_fault([row[0] for row in rows], root_allowed=True):
        raise ValueError(reason)
    if reason := paths_fault(list(removed), root_allowed=False):
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


def paths_fault(paths: list[bytes], *, root_allowed: bool) -> str | None:
    """What is wrong with sorted relative `paths`, None when nothing is."""
    return sorted_keys(paths, root_allowed=root_allowed)[0]


def sorted_keys(paths: list[bytes], *, root_allowed: bool) -> tuple[str | None, list[bytes]]:
    """What is wrong with sorted relative `paths` (None: nothing), and the key of each. One pass in C over all of them."""
    top = [b""] if root_allowed and paths and paths[0] == b"" else []
    named = paths[1:] if top else paths
    if not named:
        return None, top
    joined = b"/\0/" + b"/\0/".join(named) + b"/\0/"
    if joined.count(b"\0") != len(named) + 1:
        return "a path holds a NUL byte", []
    if b"//" in joined:
        return "a path is absolute or has an empty component", []
    if b"/." in joined:  # most blocks have none, and each look at all the names costs as much as decoding them
        for bad, reason in (
            (b"/./", "a path has '.' as a component"),
            (b"/../", "a path has '..' as a component"),
            (b"/.wh.", "a path has the name of a whiteout"),
        ):
            if bad in joined:
                return reason, []
    # Every slash a NUL, so that three of them separate the keys: no path has an empty component.
    keys = joined.replace(b"/", b"\0").split(b"\0\0\0")[1:-1]
    if not all(map(lt, keys, keys[1:])):
        return "the paths are not sorted, or one is there twice", []
    return None, top + keys
