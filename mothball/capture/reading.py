"""Reading files that other people are writing.

A file is read through its folder's descriptor, never through a link, and its stat is compared before and after: what changed
while it was read is read again, and what never holds still is marked ``torn`` instead of being passed off as good.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import time
from bisect import bisect_right
from typing import NamedTuple

from mothball.capture.types import Checkpoint, Entry
from mothball.capture.walk import within_int64
from mothball.store.below import FILE_FLAGS, FOLDER_FLAGS

PAUSES = (0.001, 0.01, 0.05, 0.2)
"""Seconds between two tries at a file that changes while it is read."""
_CHUNK = 1024**2
_CHECK_BYTES = 64 * 1024**2


class Unread(Exception):
    """A file that could not be read; `reason` is the omission's."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


class TooBig(Exception):
    """The file has grown beyond the room that was kept for it."""


class Content(NamedTuple):
    """What was read: the entry as it was then, and whether it changed while it was read."""

    entry: Entry
    torn: bool


class Reader:
    """Opens files below `root_fd` in any order, cheapest in the order of the walk (the open folders form a stack)."""

    def __init__(self, root_fd: int, *, clamp: bool = False) -> None:
        """`clamp`: entries belong to 0:0, whatever the disk says."""
        self.clamp = clamp
        self._root = root_fd
        self._stack: list[tuple[str, int]] = []
        self._folder = ""
        self._fd = root_fd
        self._scratch = bytearray(_CHUNK)

    def close(self) -> None:
        self._pop(0)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _pop(self, depth: int) -> None:
        while len(self._stack) > depth:
            os.close(self._stack.pop()[1])
        self._fd = self._stack[-1][1] if self._stack else self._root
        self._folder = "/".join(name for name, _ in self._stack)

    def _descend(self, folder: str) -> int:
        parts = folder.split("/") if folder else []
        same = 0
        for part, (name, _) in zip(parts, self._stack, strict=False):
            if part != name:
                break
            same += 1
        self._pop(same)
        for part in parts[same:]:
            fd = os.open(part, FOLDER_FLAGS, dir_fd=self._fd)
            # Folder and descriptor move together: a deeper part that has vanished must leave both at what is really open,
            # or the next file would be looked for in the wrong folder.
            self._stack.append((part, fd))
            self._fd = fd
            self._folder = f"{self._folder}/{part}" if self._folder else part
        return self._fd

    def open(self, path: str) -> int:
        """A descriptor of the regular file `path`; raises `Unread`."""
        folder, _, name = path.rpartition("/")
        try:
            return os.open(name, FILE_FLAGS, dir_fd=self._fd if folder == self._folder else self._descend(folder))
        except OSError as error:
            raise unread(error) from error

    def link(self, path: str) -> bytes:
        """The target of a symbolic link; raises `Unread`."""
        folder, _, name = path.rpartition("/")
        try:
            return os.fsencode(os.readlink(name, dir_fd=self._descend(folder)))
        except OSError as error:
            raise unread(error) from error

    def digest(self, entry: Entry, checkpoint: Checkpoint) -> bytes | None:
        """sha256 of a file of any size in bounded memory; None when it is not what the walk saw. Raises `Unread`."""
        fd = self.open(entry.path)
        try:
            sha, done, last = hashlib.sha256(), 0, 0
            data = extents(fd, entry.size) if entry.sparse else [(0, entry.size)]
            with memoryview(self._scratch) as view:
                while done < entry.size:
                    want = min(len(view), entry.size - done)
                    got = fill_sparse(fd, done, view[:want], data)
                    sha.update(view[:got])
                    done += got
                    if got < want:
                        return None
                    if done - last >= _CHECK_BYTES:
                        last = done
                        checkpoint("compare", {"path_bytes": done})
            return sha.digest() if _same(entry, os.fstat(fd)) else None
        except OSError as error:
            raise unread(error) from error
        finally:
            os.close(fd)

    def renew(self, entry: Entry, found: os.stat_result, size: int) -> Entry:
        """`entry` with the facts of a later stat and the `size` really read; another inode is a file of its own."""
        uid, gid = (0, 0) if self.clamp else (found.st_uid, found.st_gid)
        return entry._replace(
            mode=found.st_mode, uid=uid, gid=gid, size=size, mtime_ns=within_int64(found.st_mtime_ns),
            ctime_ns=found.st_ctime_ns, inode=found.st_ino, group=entry.group if found.st_ino == entry.inode else None,
        )  # fmt: skip

    def read_into(self, entry: Entry, view: memoryview) -> Content:
        """Read the whole file to the start of `view`; the result's size says how much. Raises `Unread` and `TooBig`.

        The walk's stat is the "before" of the first try: one fstat per file that holds still.
        """
        fd = self.open(entry[0])
        try:
            size = entry[4]
            if size > len(view):
                raise TooBig
            got = os.readv(fd, [view[:size]])
            if got < size:
                got += _fill(fd, view[got:], size - got)
            if got == size and _same(entry, os.fstat(fd)):
                return Content(entry, False)
            for pause in (0.0, *PAUSES):
                time.sleep(pause)
                before = _regular(os.fstat(fd))
                if before.st_size > len(view):
                    raise TooBig
                got = _fill(fd, view, before.st_size, start=0)
                current = self.renew(entry, before, got)
                if got == before.st_size and _same(current, os.fstat(fd)):
                    return Content(current, False)
            return Content(current, True)
        except OSError as error:
            raise unread(error) from error
        finally:
            os.close(fd)


def _fill(fd: int, view: memoryview, size: int, start: int | None = None) -> int:
    """Read `size` bytes (fewer at the end of the file) into `view`; `start` 0 goes back to the beginning first."""
    if start is not None:
        os.lseek(fd, start, os.SEEK_SET)
    got = 0
    while got < size:
        count = os.readv(fd, [view[got:size]])
        if not count:
            break
        got += count
    return got


def _regular(found: os.stat_result) -> os.stat_result:
    if not stat.S_ISREG(found.st_mode):
        raise Unread("vanished", "something else has its name now")
    return found


def _same(entry: Entry, found: os.stat_result) -> bool:
    return (
        (found.st_mtime_ns == entry.mtime_ns or within_int64(found.st_mtime_ns) == entry.mtime_ns)
        and found.st_size == entry.size
        and found.st_ctime_ns == entry.ctime_ns
        and found.st_ino == entry.inode
    )


def unread(error: OSError) -> Unread:
    """The omission that an error of the system means; an error that says nothing about the file is raised again."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.EISDIR, errno.ESTALE):
        return Unread("vanished", "" if error.errno == errno.ENOENT else "something else has its name now")
    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        raise error
    return Unread("unreadable", error.strerror or "")


def extents(fd: int, size: int) -> list[tuple[int, int]]:
    """(offset, length) of the data of a sparse file; one extent when the file system cannot tell."""
    found: list[tuple[int, int]] = []
    position = 0
    try:
        while position < size:
            begin = os.lseek(fd, position, os.SEEK_DATA)
            end = os.lseek(fd, begin, os.SEEK_HOLE)
            if begin >= size:
                break
            found.append((begin, min(end, size) - begin))
            position = end
    except OSError as error:
        if error.errno != errno.ENXIO:  # ENXIO: only a hole is left
            return [(0, size)]
    return found


def fill_sparse(fd: int, position: int, view: memoryview, data: list[tuple[int, int]]) -> int:
    """Fill `view` with the file from `position` on, holes as zeros without reading them; fewer bytes at the file's end."""
    index = bisect_right(data, (position, 0))
    if index and sum(data[index - 1]) > position:
        index -= 1
    filled = 0
    while filled < len(view):
        at = position + filled
        begin, length = data[index] if index < len(data) else (position + len(view), 0)
        if at < begin:
            gap = min(begin - at, len(view) - filled)
            view[filled : filled + gap] = bytes(gap)
            filled += gap
            continue
        os.lseek(fd, at, os.SEEK_SET)
        part = min(begin + length - at, len(view) - filled)
        got = _fill(fd, view[filled:], part)
        filled += got
        if got < part:
            break
        index += 1
    return filled
