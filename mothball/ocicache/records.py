"""Entries that may go, in fixed-size records: sorted by last use when the order matters, with flat memory however many there are.

Beyond the first `RUN` records they are spilled, sorted, into a file without a name and merged from there. When the disk is so full
that this cannot be done (and a prune is what would help), they stay in memory: 93 bytes each.
"""

from __future__ import annotations

import heapq
import io
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final, NamedTuple, Self

RUN: Final = 32_768
"""Records that are sorted in memory at a time."""
_READ: Final = 512
_LATEST: Final = (1 << 64) - 1
_FORMAT: Final = struct.Struct(">Q32sBQQQQQI")
_FORMS: Final = ("{}", "sha256:{}", "sha256-{}")
_NAMED: Final = len(_FORMS)
_HEX: Final = 64


class Entry(NamedTuple):
    """One entry as it was seen. `used`: its last use, ns of the files' clock; `size` of the content, `bytes` on the disk."""

    used: int
    key: bytes
    form: int
    inode: int
    size: int
    bytes: int
    mtime: int
    atime: int
    links: int

    @property
    def name(self) -> str:
        """The file's name."""
        if self.form == _NAMED:
            return self.key.rstrip(b"\0").decode()
        return _FORMS[self.form].format(self.key.hex())

    @property
    def digest(self) -> str:
        """64 hex digits; empty for what is no blob."""
        return "" if self.form == _NAMED else self.key.hex()


def key_of(name: str) -> tuple[bytes, int]:
    """The record's form of a name; names that are no digests have at most 32 characters."""
    if len(name) == _HEX:
        return bytes.fromhex(name), 0
    if name.startswith("sha256") and len(name) == _HEX + 7:
        return bytes.fromhex(name[7:]), 1 if name[6] == ":" else 2
    return name.encode(), _NAMED


def within(time: int) -> int:
    """A time that a record can hold, ns: before 1970 as 1970, after 2554 as then. Anybody can give a file such times."""
    return 0 if time < 0 else min(time, _LATEST)


class Records:
    """Filled, then read, once or again, in order of last use (`ordered`) or as they came."""

    def __init__(self, spill: Path, *, ordered: bool) -> None:
        """`spill`: a folder for the file without a name."""
        self._spill = spill
        self._ordered = ordered
        self._here: list[bytes] = []
        self._file: IO[bytes] | None = None
        self._runs: list[tuple[int, int]] = []
        self.count = 0
        self.bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, used: int, key: bytes, form: int, inode: int, size: int, room: int, mtime: int, atime: int, links: int) -> None:
        """One entry; times as `within` has them."""
        record = _FORMAT.pack(within(used), key, form, inode, size, room, within(mtime), within(atime), min(links, 0xFFFFFFFF))
        self._here.append(record)
        self.count += 1
        self.bytes += room
        if len(self._here) >= RUN:
            self._flush()

    def _flush(self) -> None:
        if self._ordered:
            self._here.sort()
        if self._file is None:
            self._file = _unnamed(self._spill)
        data = b"".join(self._here)
        at = self._file.seek(0, io.SEEK_END)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:  # the disk is full
            self._file = _in_memory(self._file, at)
            self._file.write(data)
        self._runs.append((at, len(self._here)))
        self._here = []

    def __iter__(self) -> Iterator[Entry]:
        if self._ordered:
            self._here.sort()
        runs = [self._run(at, count) for at, count in self._runs]
        merged = heapq.merge(*runs, self._here) if self._ordered else _chained(runs, self._here)
        make, unpack = Entry._make, _FORMAT.unpack
        for record in merged:
            yield make(unpack(record))

    def _run(self, at: int, count: int) -> Iterator[bytes]:
        size = _FORMAT.size
        file = self._file
        assert file is not None  # noqa: S101 - a run lies in the file
        for start in range(0, count, _READ):
            file.seek(at + start * size)
            data = file.read(min(_READ, count - start) * size)
            for place in range(0, len(data), size):
                yield data[place : place + size]


def _chained(runs: list[Iterator[bytes]], rest: list[bytes]) -> Iterator[bytes]:
    for run in runs:
        yield from run
    yield from rest


def _in_memory(file: IO[bytes], size: int) -> IO[bytes]:
    """What the first `size` bytes of `file` hold, which is closed."""
    out = io.BytesIO()
    with file:
        file.seek(0)
        while out.tell() < size and (piece := file.read(min(1 << 20, size - out.tell()))):
            out.write(piece)
    return out


def _unnamed(folder: Path) -> IO[bytes]:
    """In the folder, or in one above it: a dry run does not make it."""
    for place in (folder, *folder.parents, None):
        try:
            return tempfile.TemporaryFile(dir=place, buffering=0)
        except OSError:
            continue
    return io.BytesIO()
