"""A bundle as the two parts of the reference system's container, and back (B-113, B-114, B-125).

The parts are the bytes of config.json and a tar of what lies below ``rootfs/``, without that prefix. Both have to fit in memory,
for the container encrypts each in one piece; the limits come before anything is read.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

from mothball.errors import Corrupt, InvalidParams, MothballError, OperationFailed, Oversize, SealError
from mothball.package.tarread import MAX_DEPTH, Limits, TarMember, TarReader
from mothball.store.below import FILE_FLAGS, FOLDER_FLAGS
from mothball.store.read import show
from mothball.store.tarhead import END_OF_ARCHIVE, header, padded
from mothball.store.toc import sort_key

CONFIG: Final = b"config.json"
ROOTFS: Final = b"rootfs"
MAX_CONFIG: Final = 16 * 1024**2
MAX_CONTENT: Final = 2 * 1024**3
LISTED: Final = 100
_KINDS: Final = {"f": b"0", "d": b"5", "l": b"2"}
_NS: Final = 10**9


class Parts(NamedTuple):
    """`config` and `rootfs` (a tar); `left_out` names the first `LISTED` entries that such a container has no place for."""

    config: bytes
    rootfs: bytes
    left_out: tuple[str, ...]


class _Rootfs:
    """The tar below rootfs while it grows; it never grows beyond `limit` bytes."""

    def __init__(self, what: str, limit: int) -> None:
        self.out = io.BytesIO()
        self.config: bytes | None = None
        self.left_out: list[str] = []
        self._what = what
        self._limit = limit

    def add(self, path: bytes, kind: str, mode: int, mtime_ns: int, size: int = 0, link: bytes = b"") -> int:
        """Write the header of one member; returns where its content begins. Owners are 0, times whole seconds."""
        name = path + b"/" if kind == "d" else path
        head = header(name, _KINDS[kind], mode & 0o7777, 0, 0, size, max(mtime_ns // _NS, 0), link)
        needed = self.out.tell() + len(head) + padded(size) + len(END_OF_ARCHIVE)
        if needed > self._limit:
            raise Oversize(
                f"the rootfs of {self._what} is larger than {self._limit:,} bytes; a .stim is encrypted in memory in one piece. "
                "Seal it with age, which has no limit",
                what=self._what,
                size=needed,
                limit=self._limit,
            )
        self.out.write(head)
        return self.out.tell()

    def pad(self) -> None:
        self.out.write(bytes(padded(self.out.tell()) - self.out.tell()))

    def leave_out(self, path: bytes) -> None:
        if len(self.left_out) < LISTED:
            self.left_out.append(show(path))

    def set_config(self, data: bytes) -> None:
        if self.config is not None:
            raise InvalidParams(f"{self._what} has two files config.json")
        self.config = data

    def parts(self) -> Parts:
        if self.config is None:
            raise InvalidParams(f"{self._what} is no bundle: it has no config.json")
        self.out.write(END_OF_ARCHIVE)
        return Parts(self.config, self.out.getvalue(), tuple(self.left_out))


def parts_of_tar(src: BinaryIO, what: str, limit: int) -> Parts:
    """The parts of a bundle's or a crash package's tar, uncompressed, from the position of `src`.

    `Corrupt` and `InvalidParams` for what is damaged, cut or no bundle (B-114), `Oversize` above `limit` bytes of rootfs. A hard
    link becomes a file of its own: the reference system reads regular members only, and would lose it.
    """
    made = _Rootfs(what, limit)
    reader = TarReader(src.read, what)
    files: dict[bytes, tuple[int, int, TarMember]] = {}
    for member in reader:
        if member.path == CONFIG and member.kind == "f":
            if member.size > MAX_CONFIG:
                raise Oversize(f"config.json of {what} has {member.size} bytes", what=what, size=member.size, limit=MAX_CONFIG)
            made.set_config(b"".join(reader.pieces()))
        elif member.path.startswith(ROOTFS + b"/"):
            _take(made, reader, member, files)
        elif member.path not in {b"", ROOTFS}:
            made.leave_out(member.path)
    return made.parts()


def _take(made: _Rootfs, reader: TarReader, member: TarMember, files: dict[bytes, tuple[int, int, TarMember]]) -> None:
    path = member.path[len(ROOTFS) + 1 :]
    if member.kind == "f":
        start = made.add(path, "f", member.mode, member.mtime_ns, member.size)
        for piece in reader.pieces():
            made.out.write(piece)
        files[member.path] = start, member.size, member
    elif member.kind == "h":
        if member.link not in files:
            raise Corrupt(what=show(member.path), reason=f"it is a hard link to {show(member.link)}, which no member before it is")
        first, size, of = files[member.link]
        start = made.add(path, "f", of.mode, of.mtime_ns, size)
        with made.out.getbuffer() as view:
            content = bytes(view[first : first + size])
        made.out.write(content)
        files[member.path] = start, size, of
    elif member.kind == "x":
        made.leave_out(member.path)
        return
    else:
        made.add(path, member.kind, member.mode, member.mtime_ns, link=member.link)
    made.pad()


def parts_of_folder(folder: Path, limit: int) -> Parts:
    """The parts of a bundle that lies unpacked in `folder`.

    Nothing is read through a link; sockets, FIFOs and devices are left out.
    """
    what = str(folder)
    made = _Rootfs(what, limit)
    with _opened(folder, what) as fd:
        for name in sorted(os.listdir(fd), key=os.fsencode):  # noqa: PTH208 -- a descriptor has no path
            if name == os.fsdecode(CONFIG):
                made.set_config(_small(name, fd, what))
            elif name == os.fsdecode(ROOTFS):
                with _opened(name, f"{what}/rootfs", fd) as rootfs:
                    _walk(made, rootfs, b"", what)
            else:
                made.leave_out(os.fsencode(name))
    return made.parts()


@contextmanager
def _opened(path: str | Path, what: str, dir_fd: int | None = None) -> Iterator[int]:
    try:
        fd = os.open(path, FOLDER_FLAGS, dir_fd=dir_fd)
    except OSError as error:
        raise InvalidParams(f"{what} cannot be read as a folder: {error.strerror}") from error
    try:
        yield fd
    finally:
        os.close(fd)


def _walk(made: _Rootfs, fd: int, above: bytes, what: str) -> None:
    if above.count(b"/") >= MAX_DEPTH:
        raise InvalidParams(f"{what} has folders deeper than {MAX_DEPTH}: {show(above[:200])}")
    for name in sorted(os.listdir(fd), key=os.fsencode):
        path = above + os.fsencode(name)
        found = os.stat(name, dir_fd=fd, follow_symlinks=False)
        if stat.S_ISDIR(found.st_mode):
            made.add(path, "d", found.st_mode, found.st_mtime_ns)
            with _opened(name, show(path), fd) as deeper:
                _walk(made, deeper, path + b"/", what)
        elif stat.S_ISLNK(found.st_mode):
            made.add(path, "l", 0o777, found.st_mtime_ns, link=os.fsencode(os.readlink(name, dir_fd=fd)))
        elif stat.S_ISREG(found.st_mode):
            _file(made, name, fd, path)
        else:
            made.leave_out(ROOTFS + b"/" + path)


def _file(made: _Rootfs, name: str, folder: int, path: bytes) -> None:
    with _regular(name, folder, show(path)) as (file, found):
        made.add(path, "f", found.st_mode, found.st_mtime_ns, found.st_size)
        left = found.st_size
        while left and (piece := file.read(min(left, 1024**2))):
            made.out.write(piece)
            left -= len(piece)
        if left or file.read(1):
            raise OperationFailed(f"{show(path)} changed while it was read; nothing was written. Run it again")
        made.pad()


def _small(name: str, folder: int, what: str) -> bytes:
    with _regular(name, folder, f"{what}/{name}") as (file, found):
        if found.st_size > MAX_CONFIG:
            raise Oversize(f"{name} of {what} has {found.st_size} bytes", what=what, size=found.st_size, limit=MAX_CONFIG)
        data: bytes = file.read(MAX_CONFIG)
        return data


@contextmanager
def _regular(name: str, folder: int, what: str) -> Iterator[tuple[Any, os.stat_result]]:
    try:
        fd = os.open(name, FILE_FLAGS, dir_fd=folder)
    except OSError as error:
        raise InvalidParams(f"{what} cannot be read: {error.strerror}") from error
    with os.fdopen(fd, "rb", 0) as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise InvalidParams(f"{what} is not a regular file")
        yield file, found


def write_bundle_tar(out: BinaryIO, config: bytes, rootfs: bytes) -> int:
    """Write both parts as one tar (B-113): config.json 0600, the folder rootfs, then its members sorted; returns their number.

    Folders that no member says are added. `SealError` (B-126) for a rootfs that is no tar, is cut, leads out of its folder or
    says one name twice: it may come from anybody.
    """
    with _unparsed():
        members = _members(rootfs)
    out.write(header(CONFIG, b"0", 0o600, 0, 0, len(config), 0))
    out.write(config + bytes(padded(len(config)) - len(config)))
    out.write(header(ROOTFS + b"/", b"5", 0o755, 0, 0, 0, 0))
    view = memoryview(rootfs)
    for path in sorted(members, key=sort_key):
        member, name = members[path], ROOTFS + b"/" + path
        if member is None or member.kind == "d":
            mode, at = (0o755, 0) if member is None else (member.mode, _seconds(member))
            out.write(header(name + b"/", b"5", mode, 0, 0, 0, at))
            continue
        out.write(header(name, _KINDS[member.kind], member.mode, 0, 0, member.size, _seconds(member), member.link))
        out.write(view[member.start : member.start + member.size])
        out.write(bytes(padded(member.size) - member.size))
    out.write(END_OF_ARCHIVE)
    return len(members) + 2


def _members(rootfs: bytes) -> dict[bytes, TarMember | None]:
    """Members by name, None for a folder that none of them is."""
    found: dict[bytes, TarMember | None] = {}
    for member in TarReader(io.BytesIO(rootfs).read, "its tar", limits=Limits(bytes=len(rootfs))):
        if member.kind == "x":
            raise InvalidParams(f"{show(member.path)} is a device or a FIFO")
        if not member.path:
            continue
        if member.path in found:
            raise InvalidParams(f"{show(member.path)} is there twice")
        found[member.path] = member
    for path, found_here in list(found.items()):
        if found_here is not None and found_here.kind == "h":
            of = found.get(found_here.link)
            if of is None or of.path != found_here.link or of.kind != "f":
                raise InvalidParams(f"{show(path)} is a hard link to what is no file")
            found[path] = of  # a file of its own: in sorted order its first name may come later
        parts = path.split(b"/")
        for count in range(1, len(parts)):
            folder = found.setdefault(b"/".join(parts[:count]), None)
            if folder is not None and folder.kind != "d":
                raise InvalidParams(f"{show(path)} is below what is no folder")
    if (whole := sum(each.size for each in found.values() if each is not None)) > MAX_CONTENT:
        raise InvalidParams(f"its hard links make {whole:,} bytes of it, at most {MAX_CONTENT:,} are written")
    return found


def _seconds(member: TarMember) -> int:
    return max(member.mtime_ns // _NS, 0)


@contextmanager
def _unparsed() -> Iterator[None]:
    try:
        yield
    except MothballError as error:
        raise SealError(f"failed to parse rootfs: {error.message}") from None
