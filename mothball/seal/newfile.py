"""A file that appears under its name only when it is whole, and of which nothing is left when it is not.

It is written without a name (``O_TMPFILE``) and linked into place at the end: whatever kills the writer, half a secret lies
nowhere. Where the file system knows no such files it is written under a hidden name, locked; what a killed writer left there goes
with the next file of that name.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final

from mothball.errors import AlreadyExists, InvalidParams, OperationFailed
from mothball.store.blobs import full_disk_is_no_space

MODE: Final = 0o600
HIDDEN: Final = ".mothball-seal-"
_RANDOM: Final = 8
_LONG_NAME: Final = 200
_BUFFER: Final = 1024**2
_NO_TMPFILE: Final = {errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL}
"""What file systems and kernels without ``O_TMPFILE`` answer to it."""
_NO_LINKS: Final = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


def check_new(path: Path) -> Path:
    """`path`, absolute, when nothing is there and its folder is; else `AlreadyExists` or `InvalidParams`."""
    place = path.expanduser().absolute()
    if place.name in {"", ".", ".."}:
        raise InvalidParams(f"{str(path)!r} is no name for a file")
    if os.path.lexists(place):
        raise _exists(place)
    if not place.parent.is_dir():
        raise InvalidParams(f"{place.parent} is not a folder; nothing was written")
    return place


def _exists(place: Path) -> AlreadyExists:
    return AlreadyExists(f"{place} exists already and is not replaced; remove it, or choose another name", path=str(place))


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write and to read back, mode 0600, which has the name `path` once the block has ended without an error.

    Errors as `check_new`, `NoSpace` for a full disk, `OperationFailed` for whatever else the file system refuses. It never
    replaces what somebody put there meanwhile.
    """
    place = check_new(path)
    try:
        with full_disk_is_no_space(place):
            folder = os.open(place.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                yield from _written(folder, place)
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        raise OperationFailed(f"{place} was not written: {error.strerror or error}") from error


def _written(folder: int, place: Path) -> Iterator[BinaryIO]:
    fd = _unnamed(folder)
    if fd is None:
        yield from _hidden(folder, place)
        return
    with os.fdopen(fd, "w+b", _BUFFER) as out:
        yield out
        out.flush()
        os.fsync(out.fileno())
        # Only with a folder's descriptor does Python call linkat, which follows the link of /proc to the file itself.
        try:
            os.link(_self(out.fileno()), place.name, dst_dir_fd=folder, follow_symlinks=True)
        except FileExistsError:
            raise _exists(place) from None


def _self(fd: int) -> str:
    return f"/proc/self/fd/{fd}"


def _unnamed(folder: int) -> int | None:
    """A file without a name in `folder`; None where there are none, or where it could not get a name later (no /proc)."""
    try:
        fd = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, MODE, dir_fd=folder)
    except OSError as error:
        if error.errno in _NO_TMPFILE:
            return None
        raise
    if os.path.lexists(_self(fd)):
        return fd
    os.close(fd)
    return None


def _hidden(folder: int, place: Path) -> Iterator[BinaryIO]:
    prefix = f".{place.name[: _LONG_NAME // 4]}{HIDDEN}"
    _remove_stale(folder, prefix)
    name = prefix + secrets.token_hex(_RANDOM)
    fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, MODE, dir_fd=folder)
    try:
        with os.fdopen(fd, "w+b", _BUFFER) as out:
            with suppress(OSError):
                fcntl.flock(out.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield out
            out.flush()
            os.fsync(out.fileno())
            _give_name(folder, name, place)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=folder)


def _give_name(folder: int, name: str, place: Path) -> None:
    try:
        os.link(name, place.name, src_dir_fd=folder, dst_dir_fd=folder)  # unlike a rename it never replaces
    except FileExistsError:
        raise _exists(place) from None
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if os.path.lexists(place):
            raise _exists(place) from None
        os.rename(name, place.name, src_dir_fd=folder, dst_dir_fd=folder)


def _remove_stale(folder: int, prefix: str) -> None:
    """Remove hidden files of ours that nobody writes any more."""
    for name in os.listdir(folder):
        if not name.startswith(prefix) or len(name) != len(prefix) + 2 * _RANDOM:
            continue
        with suppress(OSError):
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(fd).st_uid == os.geteuid():
                    os.unlink(name, dir_fd=folder)
            finally:
                os.close(fd)
