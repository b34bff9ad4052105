"""The one way in which an archive becomes files (design, section 8): nothing absolute, no ``..``, no link followed, no device.

An archive that is cut, holds a name twice, lies about its lengths or grows beyond all measure is refused as a whole (B-114 to
B-116); the caller throws the folder away. What was written until then lies in that folder and nowhere else.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple

from mothball.errors import InvalidParams, NoSpace
from mothball.package.inflate import Inflated
from mothball.package.rootfs import RootEntry
from mothball.package.tarread import Limits, TarReader
from mothball.package.writetree import TreeWriter
from mothball.store.read import show

_AGE = (b"age-encryption.org/", b"-----BEGIN AGE ENCRYPTED")
_STIM = b"STIM"
_SPARE = 64 * 1024**2
"""Bytes that an extraction leaves free on a disk."""


class Extracted(NamedTuple):
    """What was written: regular files, folders, symbolic links, bytes of content."""

    files: int
    folders: int
    links: int
    bytes: int


def extract(
    archive: BinaryIO,
    target: Path,
    what: str,
    *,
    limits: Limits | None = None,
    tick: Callable[..., None] = lambda **_: None,
) -> Extracted:
    """Unpack the tar `archive` (plain, gzip or zstd; read once, from where it stands) into the empty folder `target`.

    Files belong to whoever runs this; modes and times are those of the archive, without setuid and setgid. A symbolic link is
    made as it is and never followed, wherever it leads. `limits` bounds members and bytes; without it, content may be what the
    file system of `target` has free. `tick` is called often with ``step="unpack"`` and counts. `Corrupt`, `InvalidParams`,
    `Oversize` and `NoSpace` name `what` or the member.
    """
    room = os.statvfs(target)
    free = room.f_bavail * room.f_frsize - _SPARE
    if limits is None:
        limits = Limits(bytes=max(free, 0))
    _refuse_sealed(archive, what)
    stream = Inflated(archive, what, limit=limits.bytes + limits.members * 2048 + limits.names)
    if not stream.packed and archive.seekable() and (size := os.fstat(archive.fileno()).st_size - archive.tell()) > free:
        raise NoSpace(
            f"{what} needs up to {size:,} bytes and {target} has {max(free, 0):,} free; free space there, nothing was unpacked",
            path=str(target),
        )
    reader = TarReader(stream.read, what, limits=limits)
    with TreeWriter(target, what, tick=lambda: tick(step="unpack", files=out.files, bytes=out.bytes)) as out:
        for member in reader:
            if member.kind == "x":
                raise InvalidParams(f"{what} has the device or FIFO {show(member.path)!r}; it was not unpacked")
            out.add(
                RootEntry(member.path, member.kind, member.mode, member.mtime_ns, member.size, member.link, reader.pieces)
                if member.path
                else _root(member.kind, member.mode, member.mtime_ns, what)
            )
        out.finish()
        return Extracted(out.files, out.folders, out.links, out.bytes)


def _root(kind: str, mode: int, mtime_ns: int, what: str) -> RootEntry:
    """The folder itself: whoever unpacks must be able to look into it, whatever the archive says."""
    if kind != "d":
        raise InvalidParams(f"{what} has a member without a name; it was not unpacked")
    return RootEntry(b"", "d", mode | 0o700, mtime_ns)


def _refuse_sealed(archive: BinaryIO, what: str) -> None:
    """Say what to do with a file that is no tar because it is sealed."""
    if not archive.seekable():
        return
    place = archive.tell()
    head = archive.read(32)
    archive.seek(place)
    if head.startswith((*_AGE, _STIM)):
        raise InvalidParams(f"{what} is sealed; open it with `mothball unseal` first")
