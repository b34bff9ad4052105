"""Deleting what lies in an aside, through descriptors, and counting what that frees: disk bytes, each file with its last name."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Final, NamedTuple

from mothball.ocicache.scan import BLOCK
from mothball.ocicache.system import mount_of, open_folder
from mothball.ocicache.table import Links
from mothball.ocicache.types import Tick

_CHUNK: Final = 65_536
"""Names that are sorted by inode at a time, as ``rm`` does: in the order of names a disk is read all over, again and again."""
_SOME: Final = 8192
_DEPTH: Final = 64
_TRIES: Final = 10
_COUNTED: Final = 400
"""Levels that are looked at for a figure: each takes a descriptor."""
_DEEP: Final = ".mothball-deep-"

Note = Callable[[str, str], None]
"""Told of what stayed: its path and why."""


class Spare(NamedTuple):
    """What may have to stay of the folder `folder` (below the one that is emptied): a file whose name `plain` matches never does;
    about anything else `back` is asked, and True means that it is elsewhere by now."""

    folder: str
    plain: Callable[[str], object]
    back: Callable[[int, os.DirEntry[str]], bool]


class Tally:
    """Files and the bytes that they free. `others`: links, pipes and the like."""

    def __init__(self) -> None:
        self.files = 0
        self.others = 0
        self.bytes = 0


def remove_content(fd: int, tick: Tick, note: Note, spare: Spare | None = None, *, rest_until: float = 0.0) -> Tally:
    """Delete everything in the folder `fd`, never beyond its mount; what cannot be deleted is noted and stays.

    `rest_until` (monotonic): no folder goes before, and when the last file is gone earlier it is waited for and looked again.
    Somebody who found the way to a folder before it got another name may still make a file in it, and not in one that is gone.
    """
    work = _Removal(fd, tick, note, spare, rest_until)
    work.empty(fd, "", 0)
    if work.rest():
        work.empty(fd, "", 0)
    while work.deep and work.moved:
        # Folders deeper than there are descriptors were moved to the top, which is where they are emptied now.
        work.moved = False
        work.empty(fd, "", 0)
    return work.tally


def count_content(fd: int, tick: Tick, *, skip: Callable[[int, os.DirEntry[str]], bool] | None = None, depth: int = 0) -> Tally:
    """What `remove_content` would free, without what `skip` says (given a folder and an entry), down to the level `depth`."""
    deepest = depth
    tally, links = Tally(), Links()
    mount, seen = mount_of(fd), 0

    def count(folder: int, depth: int) -> None:
        nonlocal seen
        with os.scandir(folder) as listed:
            for entry in listed:
                seen += 1
                if not seen % _SOME:
                    tick(seen)
                if skip is not None and depth <= deepest and skip(folder, entry):
                    continue
                with suppress(OSError):
                    found = entry.stat(follow_symlinks=False)
                    if not stat.S_ISDIR(found.st_mode):
                        if stat.S_ISREG(found.st_mode):
                            tally.files += 1
                        else:
                            tally.others += 1
                        tally.bytes += links.last(found.st_ino, found.st_nlink, found.st_blocks * BLOCK)
                    elif depth < _COUNTED:
                        below = open_folder(entry.name, folder)
                        try:
                            if mount_of(below) == mount:
                                count(below, depth + 1)
                        finally:
                            os.close(below)

    count(fd, 0)
    return tally


class _Removal:
    def __init__(self, fd: int, tick: Tick, note: Note, spare: Spare | None, rest_until: float) -> None:
        self._rest_until = rest_until
        self._late = False
        self._top = fd
        self._mount = mount_of(fd)
        self._tick = tick
        self._note = note
        self._spare = spare
        self.tally = Tally()
        self.deep = 0
        self.moved = False

    def rest(self) -> bool:
        """Wait until folders may go; True when there was something to wait for."""
        left = self._rest_until - time.monotonic()
        if left <= 0:
            return False
        time.sleep(left)
        self._late = True
        return True

    def empty(self, fd: int, path: str, depth: int) -> bool:
        """Delete what is in the folder; True when nothing is left."""
        stayed: set[str] = set()
        while True:
            went = False
            with os.scandir(fd) as listed:
                left: Iterator[os.DirEntry[str]] = listed
                if stayed:
                    left = (each for each in listed if each.name not in stayed)
                while entries := list(islice(left, _CHUNK)):
                    went |= self._some(fd, self._going(fd, entries, path), path, depth, stayed)
            # Once more: a pull may still write into it, and not every file system lists well while names go.
            if not went:
                return not stayed

    def _going(self, fd: int, entries: list[os.DirEntry[str]], path: str) -> list[tuple[int, str, bool]]:
        """(inode, name, is a folder) of those that go."""
        spare = self._spare
        if spare is None or path.rstrip("/") != spare.folder:
            return [(each.inode(), each.name, each.is_dir(follow_symlinks=False)) for each in entries]
        plain, back = spare.plain, spare.back
        return [
            (each.inode(), each.name, each.is_dir(follow_symlinks=False))
            for each in entries
            # Few come late, and nobody has asked yet whether one of them is to stay.
            if (not self._late and plain(each.name) and each.is_file(follow_symlinks=False)) or not back(fd, each)
        ]

    def _some(self, fd: int, chunk: list[tuple[int, str, bool]], path: str, depth: int, stayed: set[str]) -> bool:
        """By inode, which is how they lie on the disk. True when one went."""
        chunk.sort()
        went = False
        # A hundred thousand of them: no call but the two that the kernel must have.
        state, unlink, regular = os.stat, os.unlink, stat.S_ISREG
        files = size = others = 0
        for _, name, is_folder in chunk:
            try:
                if is_folder:
                    went |= self._folder(fd, name, path, depth, stayed)
                    continue
                found = state(name, dir_fd=fd, follow_symlinks=False)
                unlink(name, dir_fd=fd)
            except FileNotFoundError:
                continue
            except OSError as error:
                if not (isinstance(error, PermissionError) and _lift(fd) and self._again(fd, name)):
                    stayed.add(name)
                    self._note(f"{path}{name}", f"cannot be deleted: {error.strerror}")
                continue
            files += 1
            if not regular(found.st_mode):
                others += 1
            if found.st_nlink < 2:  # noqa: PLR2004 - that was the last name
                size += found.st_blocks
            if not files % 1000:
                self._tick(self.tally.files + files)
        self.tally.files += files - others
        self.tally.others += others
        self.tally.bytes += size * BLOCK
        return went or files > 0

    def _again(self, fd: int, name: str) -> bool:
        try:
            found = os.stat(name, dir_fd=fd, follow_symlinks=False)
            os.unlink(name, dir_fd=fd)
        except OSError:
            return False
        if stat.S_ISREG(found.st_mode):
            self.tally.files += 1
        else:
            self.tally.others += 1
        self.tally.bytes += found.st_blocks * BLOCK if found.st_nlink < 2 else 0  # noqa: PLR2004 - the last name
        return True

    def _folder(self, fd: int, name: str, path: str, depth: int, stayed: set[str]) -> bool:
        if depth >= _DEPTH:
            self.deep += 1
            os.rename(name, f"{_DEEP}{self.deep}", src_dir_fd=fd, dst_dir_fd=self._top)
            self.moved = True
            return True
        try:
            below = open_folder(name, fd)
        except PermissionError:
            if not _lift(fd, name):
                raise
            below = open_folder(name, fd)
        try:
            # A bind mount of this very file system is another place, too: what is in it was never part of the cache.
            if mount_of(below) != self._mount:
                stayed.add(name)
                self._note(f"{path}{name}", "another file system is mounted there; unmount it")
                return False
            if not self._emptied(below, name, fd, f"{path}{name}/", depth + 1):
                stayed.add(name)
                return False
        finally:
            os.close(below)
        return True

    def _emptied(self, below: int, name: str, fd: int, path: str, depth: int) -> bool:
        """Empty the folder and remove it, as often as something comes into it in between; False when something stays."""
        for left in range(_TRIES, -1, -1):
            if not self.empty(below, path, depth) or (self.rest() and not self.empty(below, path, depth)):
                return False
            try:
                os.rmdir(name, dir_fd=fd)
            except OSError as error:
                if error.errno != errno.ENOTEMPTY or not left:
                    raise
            else:
                return True
        return False


def _lift(fd: int, name: str = ".") -> bool:
    """Give the owner of a folder his permissions, if that is us."""
    try:
        handle = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
    except OSError:
        return False
    try:
        mode = os.fstat(handle).st_mode
        if mode & 0o700 == 0o700:  # noqa: PLR2004 - all of the owner's permissions
            return False
        Path(f"/proc/self/fd/{handle}").chmod(stat.S_IMODE(mode) | 0o700)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True
