"""The reserve: bytes kept back, so that what frees a full disk still has room to write its few files."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from mothball.errors import NoSpace
from mothball.store import Store

_FULL = {errno.ENOSPC, errno.EDQUOT}
_ROOM = 2
"""The reserve is made again when so many times its size is free: taking the last bytes would fill the disk itself."""

T = TypeVar("T")


class Reserve:
    """The file ``reserve`` of a store: allocated, never written, given up when the disk is full."""

    def __init__(self, store: Store, size: int) -> None:
        """`size` in bytes; 0 means none, and removes what is there."""
        self.path = store.root / "reserve"
        self._temp = store.blobs.temp
        self.size = size

    @property
    def held(self) -> int:
        """Bytes that are kept back now."""
        try:
            return self.path.lstat().st_size
        except FileNotFoundError:
            return 0

    def make(self) -> int:
        """Allocate the reserve when there is room for it; returns the bytes held. A full disk is no error here."""
        if self.held == self.size or (self.size and self._free() < _ROOM * self.size):
            return self.held
        if not self.size:
            self.path.unlink(missing_ok=True)
            return 0
        scratch = self._temp / f"reserve-{os.getpid()}-{secrets.token_hex(6)}"
        try:
            fd = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)  # tells the sweep of temp files that its maker lives
                os.posix_fallocate(fd, 0, self.size)
                scratch.rename(self.path)
            finally:
                os.close(fd)
        except OSError as error:
            scratch.unlink(missing_ok=True)
            if error.errno not in _FULL:
                raise
        return self.held

    def release(self) -> bool:
        """Give the bytes back; False when none were held."""
        with suppress(FileNotFoundError):
            self.path.unlink()
            return True
        return False

    def spend_when_full(self, call: Callable[[], T]) -> T:
        """`call()`; when the disk is full the reserve is given up and `call` tried once more. Raises `NoSpace`.

        For work that ends with fewer bytes in use, and that may be begun twice.
        """
        try:
            return call()
        except NoSpace:
            if not self.release():
                raise
        except OSError as error:
            if error.errno not in _FULL:
                raise
            if not self.release():
                raise NoSpace(path=str(self.path.parent)) from error
        return call()

    def _free(self) -> int:
        found = os.statvfs(self.path.parent)
        return found.f_bavail * found.f_frsize
