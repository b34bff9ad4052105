"""Where a cache lies: opened part by part, never through a link, checked to be a place for a cache, and locked.

Everything that follows goes by these descriptors. Somebody who may write above the cache could otherwise put a link on the way
between a look and a rename, and have another folder emptied.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from mothball.cache_fields import check_place, clean_path
from mothball.errors import Busy, InvalidParams, NoSpace, OperationFailed, PathNotAllowed
from mothball.ocicache.system import mount_of, open_folder
from mothball.store.below import identity, lies_in

_PASS: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_POLL_S: Final = 0.05


class Place:
    """An opened cache. `parent`: the folder above it, by ``O_PATH``; `fd` None: there is no such directory."""

    def __init__(self, path: str, parent: int | None, name: str, fd: int | None) -> None:
        self.path = path
        self.name = name
        self.parent = parent
        self.fd = fd

    @property
    def movable(self) -> bool:
        """True when its name can be given to another folder: it is no mount point."""
        return self.fd is not None and self.parent is not None and mount_of(self.fd) == mount_of(self.parent)

    def open(self) -> None:
        """Open it again: its name may mean another folder by now. Raises as `open_place`."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None
        if self.parent is not None:
            self.fd = _open_cache(self.path, self.name, self.parent)


@contextmanager
def open_place(path: str, *, data_dir: Path, roots: Sequence[Path] = ()) -> Iterator[Place]:
    """The cache `path`, closed at the end; there need not be one.

    Raises `PathNotAllowed` for what is no place for a cache and for a symbolic link anywhere on the way, `InvalidParams` for
    something that is not a directory, `OperationFailed` for one that may not be read.
    """
    if clean_path(path, "a cache") != path:
        raise InvalidParams(f"the path of a cache must be written plainly: {clean_path(path, 'a cache')!r}, not {path!r}")
    check_place(path, roots=[str(each) for each in roots], data_dir=str(data_dir))
    parent, name = _open_parent(path)
    place = Place(path, parent, name, None)
    try:
        place.open()
        if place.fd is not None:
            _check_alone(path, [*roots, data_dir, Path("/"), Path("~").expanduser()], data_dir)
        yield place
    finally:
        for fd in (place.fd, parent):
            if fd is not None:
                os.close(fd)


def _open_parent(path: str) -> tuple[int | None, str]:
    *above, name = path.strip("/").split("/")
    fd = os.open("/", _PASS)
    for number, part in enumerate(above):
        try:
            deeper = os.open(part, _PASS, dir_fd=fd)
        except FileNotFoundError:
            return None, name
        except OSError as error:
            raise _refusal(error, "/" + "/".join(above[: number + 1]), path) from error
        finally:
            os.close(fd)
        fd = deeper
    return fd, name


def _open_cache(path: str, name: str, parent: int) -> int | None:
    try:
        return open_folder(name, parent)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _refusal(error, path, path) from error


def _refusal(error: OSError, part: str, path: str) -> Exception:
    if error.errno in {errno.ELOOP, errno.ENOTDIR}:
        if Path(part).is_symlink():
            text = f"{part!r} is a symbolic link, and no cache is pruned through one"
            return PathNotAllowed(f"{text}; declare its real path: {os.path.realpath(path)!r}", path=path)
        return InvalidParams(f"{part!r} is not a directory, so there is no cache at {path!r}")
    if error.errno in {errno.EACCES, errno.EPERM}:
        text = f"{part!r} may not be read by user {os.geteuid()}; run the worker as the owner of the cache"
        return OperationFailed(text, path=path)
    return OperationFailed(f"{part!r} cannot be opened: {error.strerror}", path=path)


def _check_alone(path: str, kept: Sequence[Path], data_dir: Path) -> None:
    """By inode, whatever the names are: a bind mount gives a folder a second one."""
    here = Path(path)
    if lies_in(here, data_dir):
        raise PathNotAllowed(
            f"{path!r} cannot be a cache: it lies in the data dir {str(data_dir)!r}, where the captures are", path=path
        )
    for each in kept:
        if identity(each) is not None and lies_in(each.resolve(), here):
            raise PathNotAllowed(f"{path!r} cannot be a cache: it is, or holds, {str(each)!r}", path=path)


def work_folder(data_dir: Path) -> Path:
    """Where locks are, and the files without a name that a large cache is sorted in."""
    return data_dir / "run" / "image-caches"


@contextmanager
def locked(path: str, data_dir: Path, wait_s: float = 0.0) -> Iterator[None]:
    """One prune of a cache at a time on this host. Raises `Busy` after `wait_s`, `NoSpace`, `OperationFailed`."""
    fd = _lock_file(path, data_dir)
    until = time.monotonic() + wait_s
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise Busy(what=f"the cache {path!r}", reason="another process works on it; try again later") from None
                time.sleep(_POLL_S)
        yield
    finally:
        os.close(fd)


def _lock_file(path: str, data_dir: Path) -> int:
    folder = work_folder(data_dir)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = folder / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.lock"
        return os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise OperationFailed(f"the lock of {path!r} below {str(data_dir)!r} cannot be made: {error.strerror}") from error
        # A full disk is what a prune is for: then all caches of this host share the folder itself as their lock.
        try:
            return os.open(data_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            raise NoSpace(f"no space left for the lock of {path!r} below {str(data_dir)!r}; nothing was pruned") from error
