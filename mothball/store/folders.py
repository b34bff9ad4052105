"""The folders of a directory that is being written, each opened from the one above it, never through a link.

Nothing here takes a path of several components to the kernel: somebody who may write in the target could put a link in the
middle of it between a look and a write.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final

from mothball.errors import MothballError, NoSpace, OperationFailed, PathNotAllowed
from mothball.store.below import FOLDER_FLAGS
from mothball.store.read import show

OPEN_FOLDERS: Final = 64
"""Descriptors kept open at most; a process has 1024 by default and a worker has others."""
_FULL: Final = {errno.ENOSPC, errno.EDQUOT}
_DENIED: Final = {errno.EACCES, errno.EPERM}


def explained(error: OSError, path: bytes) -> MothballError:
    """`error` at `path` (below the target) as one of ours, with the path as a person can read it."""
    shown = show(path) or "."
    if error.errno in _FULL:
        return NoSpace(
            f"no space left while writing {shown!r}; free space on that file system and run it again: it goes on where it was",
            path=shown,
        )
    if error.errno in {errno.ELOOP, errno.ENOTDIR}:
        return PathNotAllowed(f"{shown!r}: a link or a file stands where a folder was; nothing is written through it", path=shown)
    if error.errno == errno.EEXIST:
        return OperationFailed(
            f"{shown!r} exists already; another program writes there, or two names of the capture are one name on this file system"
        )
    if error.errno in {errno.EISDIR, errno.ENOTEMPTY}:
        return OperationFailed(f"{shown!r} became a folder with content while it was restored; run it again")
    return OperationFailed(f"{shown!r}: {error.strerror or error}")


class Folders:
    """Open folders below `root` (a descriptor that stays the caller's). From one thread only.

    Paths are bytes relative to the root, ``b""`` is the root. With `lift`, a folder of ours that lacks the owner's
    permissions gets them for the moment; `restore_modes` gives their modes back to those that were not asked to change.
    """

    def __init__(self, root: int, *, lift: bool = False) -> None:
        self.root = root
        self.lifted: dict[bytes, int] = {}
        self._lift = lift
        self._open: OrderedDict[bytes, int] = OrderedDict()

    def __enter__(self) -> Folders:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close what is open below the root."""
        while self._open:
            os.close(self._open.popitem()[1])

    def open(self, path: bytes) -> int:
        """A descriptor of the folder, valid until the next call; raises `OSError`."""
        if not path:
            return self.root
        known = self._open.get(path)
        if known is not None:
            self._open.move_to_end(path)
            return known
        parts = path.split(b"/")
        depth = len(parts) - 1
        fd = self.root
        while depth:
            above = self._open.get(b"/".join(parts[:depth]))
            if above is not None:
                fd = above
                break
            depth -= 1
        for count in range(depth + 1, len(parts) + 1):
            place = b"/".join(parts[:count])
            fd = self._enter(fd, parts[count - 1], place)
            self._open[place] = fd
            if len(self._open) > OPEN_FOLDERS:
                os.close(self._open.popitem(last=False)[1])
        return fd

    def forget(self, path: bytes) -> None:
        """Close `path` and all below it: it is about to be removed."""
        for place in [each for each in self._open if each == path or each.startswith(path + b"/")]:
            os.close(self._open.pop(place))

    def writable(self, path: bytes) -> bool:
        """After `EACCES` in a folder: give its owner the right to write, if that is us; True when it is worth another try."""
        if not self._lift:
            return False
        try:
            fd = self.open(path)
            return self._raise_mode(fd, os.fstat(fd), path)
        except OSError:
            return False

    def restore_modes(self) -> None:
        """Give lifted folders their modes back, the deepest first; what cannot be given back is left."""
        for path in sorted(self.lifted, key=lambda each: each.count(b"/"), reverse=True):
            with suppress(OSError):
                os.fchmod(self.open(path), self.lifted[path])
        self.lifted.clear()

    def _enter(self, fd: int, name: bytes, place: bytes) -> int:
        try:
            return os.open(name, FOLDER_FLAGS, dir_fd=fd)
        except PermissionError:
            if not self._lift:
                raise
            # It may not even be listed. O_PATH needs no permission and opens the link itself, should there be one now.
            handle = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
            try:
                if not self._raise_mode(handle, os.fstat(handle), place):
                    raise
            finally:
                os.close(handle)
            return os.open(name, FOLDER_FLAGS, dir_fd=fd)

    def _raise_mode(self, fd: int, found: os.stat_result, path: bytes) -> bool:
        mode = stat.S_IMODE(found.st_mode)
        if found.st_uid != os.geteuid() or mode & 0o700 == 0o700:  # noqa: PLR2004 - all of the owner's permissions
            return False
        Path(f"/proc/self/fd/{fd}").chmod(mode | 0o700)  # fchmod refuses a descriptor of O_PATH
        self.lifted.setdefault(path, mode)
        return True


def denied(error: OSError) -> bool:
    """True for an error that a folder's permissions explain."""
    return error.errno in _DENIED
