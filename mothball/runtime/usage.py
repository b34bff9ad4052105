"""What processes and a directory use: CPU seconds, resident memory, allocated bytes on disk (N-24)."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterable
from contextlib import suppress

from mothball.runtime.driver import Stats
from mothball.runtime.proc import TICKS, Proc
from mothball.store.below import FOLDER_FLAGS

DISK_SECONDS = 20.0
"""How long a directory is measured; a job of the host that only wants to know must not hold one of its processes for an hour."""
MAX_DEPTH = 256
"""One descriptor is held per level; what lies deeper is not counted, and the answer says that it is not complete."""
_BLOCK = 512


def stats_of(
    processes: Iterable[Proc], path: str | None, *, cpu_seconds: float | None = None, rss_bytes: int | None = None
) -> Stats:
    """The figures of `processes` and of directory `path`; `cpu_seconds` and `rss_bytes` when somebody keeps a better account."""
    living = list(processes)
    disk, complete = (None, True) if path is None else disk_bytes(path)
    return Stats(
        cpu_seconds=round(sum(each.cpu_ticks for each in living) / TICKS if cpu_seconds is None else cpu_seconds, 3),
        rss_bytes=sum(each.rss_bytes for each in living) if rss_bytes is None else rss_bytes,
        disk_bytes=disk,
        processes=len(living),
        disk_complete=complete,
    )


def disk_bytes(path: str | int, *, seconds: float = DISK_SECONDS) -> tuple[int | None, bool]:
    """Bytes that the directory's files and folders take on their disk, and whether everything was seen within `seconds`.

    Blocks, not apparent sizes; a file with several names counts once; links are not followed and other file systems are not
    entered. (None, False) when the directory itself is gone, is a link or cannot be opened. `path` may be a descriptor of it.
    """
    measure = _Measure(time.monotonic() + seconds)
    if isinstance(path, int):
        measure.root(path)
        return measure.bytes, measure.complete
    try:
        fd = os.open(path, FOLDER_FLAGS)
    except OSError:
        return None, False
    try:
        measure.root(fd)
    finally:
        os.close(fd)
    return measure.bytes, measure.complete


class _Measure:
    """One walk through directory descriptors: whoever swaps a folder for a link meanwhile hides it, and reaches nothing else."""

    def __init__(self, deadline: float) -> None:
        self.bytes = 0
        self.complete = True
        self._deadline = deadline
        self._linked: set[int] = set()
        self._device = 0

    def root(self, fd: int) -> None:
        """Measure the folder `fd` and everything below it."""
        top = os.fstat(fd)
        self._device = top.st_dev
        self.bytes += top.st_blocks * _BLOCK
        self._folder(fd, 0)

    def _folder(self, fd: int, depth: int) -> None:
        try:
            with os.scandir(fd) as scan:
                for entry in scan:
                    # At each name: a single folder may hold millions.
                    if time.monotonic() >= self._deadline:
                        self.complete = False
                        return
                    self._entry(fd, entry, depth)
        except OSError:
            self.complete = False

    def _entry(self, fd: int, entry: os.DirEntry[str], depth: int) -> None:
        try:
            found = entry.stat(follow_symlinks=False)
        except OSError:
            return  # gone since it was listed
        if found.st_dev != self._device:
            return
        if not stat.S_ISDIR(found.st_mode):
            if found.st_nlink > 1:
                if found.st_ino in self._linked:
                    return
                self._linked.add(found.st_ino)
            self.bytes += found.st_blocks * _BLOCK
            return
        self.bytes += found.st_blocks * _BLOCK
        if depth >= MAX_DEPTH:
            self.complete = False
            return
        with suppress(FileNotFoundError):
            try:
                deeper = os.open(entry.name, FOLDER_FLAGS, dir_fd=fd)
            except (PermissionError, NotADirectoryError):
                self.complete = False
                return
            try:
                self._folder(deeper, depth + 1)
            finally:
                os.close(deeper)
