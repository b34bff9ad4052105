"""A hidden folder beside another one, locked, with a file that says what it is for.

A restore makes its target in one and a purge deletes a workspace in one: nobody else finds what is half made or half gone. The name
follows from that of the folder beside it, so the next run finds what an earlier one left; the lock makes two runs meet.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Final, NamedTuple, TypeVar

from mothball.errors import Corrupt
from mothball.store.below import FOLDER_FLAGS
from mothball.store.foreign import read_json

TREE: Final = b"tree"
STATE: Final = b"state"
NEW_STATE: Final = STATE + b".new"
"""What a state is written as, before it takes the place of the one before; a kill leaves it there."""
_MAX_NAME: Final = 200

T = TypeVar("T")


class Refusals(NamedTuple):
    """The errors of whoever needs the folder."""

    not_made: Callable[[OSError], Exception]
    not_opened: Callable[[OSError], Exception]
    anothers: Callable[[int], Exception]
    """Given the id of the user whose folder has the name."""
    busy: Callable[[], Exception]


def beside(name: bytes, suffix: bytes) -> bytes:
    """The name of the folder beside `name`."""
    base = name if len(name) <= _MAX_NAME else hashlib.sha256(name).hexdigest().encode()
    return b"." + base + suffix


def lock(name: bytes, parent: int, refusals: Refusals, *, make: bool) -> int | None:
    """A descriptor of the folder `name` in `parent`, locked; None without `make` when there is none. Raises what `refusals` say."""
    while True:
        if make:
            try:
                os.mkdir(name, 0o700, dir_fd=parent)
            except FileExistsError:
                pass
            except OSError as error:
                raise refusals.not_made(error) from error
        try:
            fd = os.open(name, FOLDER_FLAGS, dir_fd=parent)
        except FileNotFoundError:
            if make:
                continue  # the run that had it has just finished
            return None
        except OSError as error:
            raise refusals.not_opened(error) from error
        try:
            found = os.fstat(fd)
            if found.st_uid != os.geteuid():
                raise refusals.anothers(found.st_uid)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _still(name, parent, found):
                return fd
        except BlockingIOError:
            os.close(fd)
            raise refusals.busy() from None
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _still(name: bytes, parent: int, found: os.stat_result) -> bool:
    """True when the name still means the folder that is locked now: its last user removes it."""
    with suppress(FileNotFoundError):
        now = os.stat(name, dir_fd=parent, follow_symlinks=False)
        return (now.st_dev, now.st_ino) == (found.st_dev, found.st_ino)
    return False


def has_tree(fd: int) -> bool:
    """True while the tree is in the folder `fd`."""
    with suppress(FileNotFoundError):
        os.stat(TREE, dir_fd=fd, follow_symlinks=False)
        return True
    return False


def read_state(fd: int, kind: type[T], what: str, limit: int) -> T | None:
    """What the folder says it is for; None when it says nothing, or nothing that can be read within `limit` bytes."""
    try:
        state = os.open(STATE, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
    except FileNotFoundError:
        return None
    with os.fdopen(state, "rb") as file:
        try:
            return read_json(file.read(limit), kind, what)
        except Corrupt:
            return None


def write_state(fd: int, text: bytes, *, durable: bool) -> None:
    """Say in one step what the folder is for; `durable`: it survives a power cut. Raises `OSError`."""
    temp = NEW_STATE
    with suppress(FileNotFoundError):
        os.unlink(temp, dir_fd=fd)
    made = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=fd)
    with os.fdopen(made, "wb") as file:
        file.write(text)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    os.rename(temp, STATE, src_dir_fd=fd, dst_dir_fd=fd)
    if durable:
        os.fsync(fd)
