"""Deleting what was surveyed, through descriptors: never a name that was not looked at, never through a link or a mount.

Whatever is not as it was seen is left, and who called is told what stayed. What no capture takes goes first (the git folders, and
what the workspace's own rules leave out), and what the capture holds only when nothing of that had to stay: the ignore files are
among it, so a run that finishes what another began still knows what was ignored.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from mothball.purge.receipt import Gap
from mothball.purge.survey import Item, Survey
from mothball.store.folders import Folders, denied
from mothball.store.left_out import IGNORE_FILE
from mothball.store.read import show

_CHECK_EVERY = 256
_RULES = {os.fsencode(IGNORE_FILE), b".gitignore"}


def delete(root_fd: int, seen: Survey, captured: set[bytes], report: Callable[[int], None]) -> list[Gap]:
    """Delete what is in `seen`, everything outside of `captured` first; returns what had to stay, and why.

    `report` is called with the number of names that are gone; what it raises ends the work between two names.
    """
    work = _Removal(root_fd, seen, report)
    last = _with_folders(captured)  # which may be others than in the capture when somebody insists
    # An ignore file may leave out itself. It goes after all that it leaves out.
    rules = _with_folders({item.path for item in seen.items if item.path.rpartition(b"/")[2] in _RULES}) - last
    for part in (
        [item for item in seen.items if item.path not in last and item.path not in rules],
        [item for item in seen.items if item.path in rules],
        [item for item in seen.items if item.path in last],
    ):
        if not work.left:
            work.run(part)
    return work.left


def _with_folders(paths: set[bytes]) -> set[bytes]:
    """`paths` and the folders they lie in."""
    found = set(paths)
    for path in paths:
        while (path := path.rpartition(b"/")[0]) and path not in found:
            found.add(path)
    return found


class _Removal:
    def __init__(self, root_fd: int, seen: Survey, report: Callable[[int], None]) -> None:
        self._folders = Folders(root_fd, lift=True)
        self._report = report
        self._seen = seen
        self._inodes = {item.path: item.inode for item in seen.items if item.is_folder}
        self._done = 0
        self._not_empty: set[bytes] = set()
        self.left: list[Gap] = []

    def run(self, items: list[Item]) -> None:
        """Delete `items`, the last first: what a folder holds stands behind the folder."""
        with self._folders:
            for item in reversed(items):
                try:
                    self._one(item)
                except FileNotFoundError:
                    pass  # somebody was quicker
                except OSError as error:
                    if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
                        self._stay(item, f"cannot be deleted: {error.strerror}")
                    elif item.path not in self._not_empty:
                        self._stay(item, "holds something that came while it was deleted")
                self._done += 1
                if not self._done % _CHECK_EVERY:
                    self._report(self._done)

    def _one(self, item: Item) -> None:
        folder, _, name = item.path.rpartition(b"/")
        fd = self._folder(folder)
        if fd is None:
            self._stay(item, "lies in a folder that is another one now")
            return
        found = os.stat(name, dir_fd=fd, follow_symlinks=False)
        if found.st_dev != self._seen.device or not item.same(found):
            self._stay(item, "changed while it was deleted")
            return
        if item.is_folder:
            self._folders.forget(item.path)
        try:
            self._remove(item, name, fd)
        except PermissionError as error:
            if not denied(error) or not self._folders.writable(folder):
                raise
            self._remove(item, name, fd)

    def _remove(self, item: Item, name: bytes, fd: int) -> None:
        if item.is_folder:
            os.rmdir(name, dir_fd=fd)
        else:
            os.unlink(name, dir_fd=fd)

    def _folder(self, path: bytes) -> int | None:
        """The folder `path` while it is the one that was surveyed."""
        fd = self._folders.open(path)
        if path and os.fstat(fd).st_ino != self._inodes.get(path):
            return None
        return fd

    def _stay(self, item: Item, why: str) -> None:
        self.left.append(Gap(show(item.path), "stayed", why))
        folder = item.path
        while folder := folder.rpartition(b"/")[0]:
            self._not_empty.add(folder)
