"""The mark in a folder that is filled in place: it was empty when a restore began, and that restore has not ended.

A mount point, or the folder somebody stands in, cannot be made beside its place. The mark is what lets the next run of the same
restore go on where it would otherwise find a folder with content. It stands in the folder itself: beside it nobody may be
allowed to write.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from typing import Any, Final

from mothball.errors import Corrupt
from mothball.store.below import read_small
from mothball.store.folders import explained
from mothball.store.foreign import read_json
from mothball.store.unpack import TEMP_PREFIX

MARK: Final = TEMP_PREFIX + b"unfinished"
_NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_LIMIT: Final = 1024**2


def read_mark(fd: int) -> dict[str, Any] | None:
    """What the mark in the open folder says; None when there is none of ours."""
    try:
        if os.stat(MARK, dir_fd=fd, follow_symlinks=False).st_uid != os.geteuid():
            return None
        return read_json(read_small(fd, os.fsdecode(MARK), _LIMIT) or b"", dict[str, Any], "the mark of a restore")
    except (OSError, Corrupt):
        return None


def write_mark(fd: int, says: dict[str, Any]) -> None:
    """Mark the open folder. Where that is not allowed nothing is marked: such a run can be ended, not continued."""
    try:
        mark = os.open(MARK, _NEW, 0o600, dir_fd=fd)
    except PermissionError:
        return
    except OSError as error:
        raise explained(error, MARK) from error
    try:
        with os.fdopen(mark, "wb") as file:
            file.write(json.dumps(says).encode())
    except OSError as error:
        raise explained(error, MARK) from error


def remove_mark(fd: int) -> None:
    """Take the mark away, if there is one."""
    try:
        with suppress(FileNotFoundError):
            os.unlink(MARK, dir_fd=fd)
    except OSError as error:
        raise explained(error, MARK) from error
