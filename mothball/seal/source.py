"""The file that is sealed, opened or looked at: one real file, which must not change meanwhile."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from mothball.errors import InvalidParams, OperationFailed


class Source:
    """An open file: `file` (buffered, seekable), `path` and `size` in bytes."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file = file
        self.path = path
        self._before = os.fstat(file.fileno())
        self.size = self._before.st_size

    def check_unchanged(self) -> None:
        """`OperationFailed` when somebody wrote to the file since it was opened: what was read may be half old, half new."""
        if _facts(os.fstat(self.file.fileno())) != _facts(self._before):
            raise OperationFailed(f"{self.path} changed while it was read; nothing was written. Run it again")

    def is_still(self, found: os.stat_result) -> bool:
        """True when `found` is of this very file."""
        return (found.st_dev, found.st_ino) == (self._before.st_dev, self._before.st_ino)


def _facts(found: os.stat_result) -> tuple[int, int, int]:
    # Not ctime: a second name or a changed mode is no other content.
    return found.st_size, found.st_mtime_ns, found.st_ino


@contextmanager
def open_source(path: Path) -> Iterator[Source]:
    """`path` open for reading; `InvalidParams` for what is not one regular file (a link, a FIFO and a device are none)."""
    place = path.expanduser().absolute()
    try:
        fd = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        why = "it is a link; give the path of the file itself" if place.is_symlink() else error.strerror or str(error)
        raise InvalidParams(f"{place} cannot be read: {why}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise InvalidParams(f"{place} is not a regular file")
    with os.fdopen(fd, "rb", 1024**2) as file:
        yield Source(file, place)
