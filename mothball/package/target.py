"""Where an export goes: a file or a folder that was not there, and is there only when it is whole.

Written beside its name under another one, flushed, then renamed. What is there already is never replaced.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from mothball.errors import AlreadyExists, InvalidParams, OperationFailed
from mothball.store.blobs import full_disk_is_no_space, sync_folder


def check_new(path: Path) -> Path:
    """`path`, absolute, when nothing is there and its folder is; else `AlreadyExists` or `InvalidParams`."""
    place = path.expanduser().absolute()
    if not place.name or place.name in {".", ".."}:
        raise InvalidParams(f"{str(path)!r} is no name for something new")
    if os.path.lexists(place):
        raise _exists(place)
    if not place.parent.is_dir():
        raise InvalidParams(f"{place.parent} is not a folder; nothing was written")
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
    """A new folder beside `place`, gone at the end."""
    folder = place.parent / f".{place.name}.mothball-export-{secrets.token_hex(4)}"
    with _trouble(place):
        folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which has the name `path` once the block has ended without an error."""
    place = check_new(path)
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
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which has the name `path` once the block has ended without an error."""
    place = check_new(path)
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
