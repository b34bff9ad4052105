"""Where an export goes: a file or a folder that was not there, and is there only when it is whole.

Written beside its name under another one, flushed, then renamed. What is there already is never replaced.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from mothball.errors import AlreadyExists, InvalidParams, OperationFailed, PathNotAllowed
from mothball.store.below import FOLDER_FLAGS, lies_in
from mothball.store.blobs import full_disk_is_no_space, sync_folder

_RANDOM = 8
_LONG_NAME = 200
"""Bytes of a name above which a scratch folder beside it is named by its hash."""


def check_new(path: Path, store: Path) -> Path:
    """`path`, absolute, when nothing is there and its folder is; else `AlreadyExists` or `InvalidParams`.

    `PathNotAllowed` below `store`, the root of a store: what lies there is the store's, and a collector takes what it does
    not know.
    """
    place = path.expanduser().absolute()
    if not place.name or place.name in {".", ".."}:
        raise InvalidParams(f"{str(path)!r} is no name for something new")
    if os.path.lexists(place):
        raise _exists(place)
    if not place.parent.is_dir():
        raise InvalidParams(f"{place.parent} is not a folder; nothing was written")
    if lies_in(place.parent.resolve(), store):
        raise PathNotAllowed(
            f"{place} is inside the store at {store}, whose folders are no place for exports; choose another", path=str(place)
        )
    return place


def _exists(place: Path) -> AlreadyExists:
    return AlreadyExists(f"{place} exists already and is not replaced; remove it, or choose another name", path=str(place))


@contextmanager
def _trouble(place: Path) -> Iterator[None]:
    """Errors of the file system as ours: a full disk is `NoSpace`, the rest says where."""
    try:
        with full_disk_is_no_space(place):
            yield
    except OSError as error:
        raise OperationFailed(reason=f"{place} cannot be written: {error.strerror or type(error).__name__}") from error


@contextmanager
def scratch_folder(place: Path) -> Iterator[Path]:
    """A new folder beside `place`, gone at the end. What a killed export of the same name left there goes first."""
    name = place.name if len(os.fsencode(place.name)) <= _LONG_NAME else hashlib.sha256(os.fsencode(place.name)).hexdigest()
    prefix = f".{name}.mothball-export-"
    with _trouble(place):
        _remove_stale(place.parent, prefix)
        folder, fd = place, None
        try:
            while fd is None:
                folder = place.parent / (prefix + secrets.token_hex(_RANDOM))
                fd = _make(folder)
            yield folder
        finally:  # also when a signal interrupts the line after the folder was made
            if folder is not place:
                remove_tree(folder)
            if fd is not None:
                os.close(fd)


def _make(folder: Path) -> int | None:
    """Make `folder`; its lock tells others that whoever fills it lives. None when another took it for a stale one before."""
    folder.mkdir(mode=0o700)
    with suppress(FileNotFoundError):
        fd = os.open(folder, FOLDER_FLAGS)
        if _lock(fd) is not False and folder.exists():
            return fd
        os.close(fd)
    return None


def _remove_stale(parent: Path, prefix: str) -> None:
    """Remove folders of ours that nobody holds."""
    for name in os.listdir(parent):  # noqa: PTH208 -- names are all that is needed
        if not name.startswith(prefix) or len(name) != len(prefix) + 2 * _RANDOM:
            continue
        with suppress(OSError):
            fd = os.open(parent / name, FOLDER_FLAGS)
            try:
                if os.fstat(fd).st_uid == os.geteuid() and _lock(fd):
                    remove_tree(parent / name)
            finally:
                os.close(fd)


def remove_tree(path: Path) -> None:
    """Remove `path` and all below it, also folders without permissions; links are removed, never followed."""

    def lift(folder: Path) -> None:
        with suppress(OSError):
            fd = os.open(folder, os.O_PATH | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                Path(f"/proc/self/fd/{fd}").chmod(0o700)
            finally:
                os.close(fd)

    shutil.rmtree(path, ignore_errors=True)
    if os.path.lexists(path):
        lift(path)
        for above, folders, _ in os.walk(path):
            for name in folders:
                lift(Path(above) / name)
        shutil.rmtree(path, ignore_errors=True)


def _lock(fd: int) -> bool | None:
    """True when the lock is ours now, False when somebody has it, None where there are no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextmanager
def new_file(path: Path, store: Path) -> Iterator[BinaryIO]:
    """A file to write, which has the name `path` once the block has ended without an error. Errors as `check_new`."""
    place = check_new(path, store)
    with scratch_folder(place) as folder:
        scratch = folder / "file"
        with scratch.open("xb", buffering=1024**2) as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        try:
            os.link(scratch, place)  # unlike a rename it never replaces what somebody put there meanwhile
        except FileExistsError:
            raise _exists(place) from None
        except OSError:  # a file system without hard links
            if os.path.lexists(place):
                raise _exists(place) from None
            scratch.rename(place)
        sync_folder(place.parent)


@contextmanager
def new_folder(path: Path, store: Path) -> Iterator[Path]:
    """A folder to fill, which has the name `path` once the block has ended without an error. Errors as `check_new`."""
    place = check_new(path, store)
    with scratch_folder(place) as folder:
        scratch = folder / "folder"
        scratch.mkdir()
        yield scratch
        try:
            scratch.rename(place)
        except (FileExistsError, NotADirectoryError):
            raise _exists(place) from None
        except OSError as error:
            if os.path.lexists(place):
                raise _exists(place) from error
            raise
        sync_folder(place.parent)
