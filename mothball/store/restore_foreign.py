"""What in a restore's target is foreign, and what of it may be deleted.

Never: a `.git`, what the capture left out or its rules would leave out, and what is mounted below the target. What must not go
keeps the folders above it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from mothball.store.below import read_small
from mothball.store.folders import Folders, explained
from mothball.store.ignore import IgnoreRules
from mothball.store.left_out import CACHE_TAG, IGNORE_FILE_LIMIT, WHITEOUT, LeftOut, is_cache
from mothball.store.selection import Patterns
from mothball.store.unpack import TEMP_PREFIX

GIT: Final = b".git"
_TAG: Final = CACHE_TAG.encode()
_SLASH: Final = ord("/")


class Foreign:
    """Sorts what is found below `folders.root` into `delete`, what a folder holds before it, and `kept`.

    `known`: paths of the capture. `wanted`: what of the foreign is to go, and what never; without it nothing goes but what a
    killed restore left. `tick` is called often.
    """

    def __init__(
        self, folders: Folders, known: Callable[[bytes], bool], wanted: tuple[Patterns, LeftOut] | None, tick: Callable[[], None]
    ) -> None:
        self.delete: list[bytes] = []
        self.kept: list[bytes] = []
        self._folders = folders
        self._known = known
        self._wanted = wanted
        self._tick = tick
        self._mount = _mount(folders.root)

    def look(self, folder: bytes) -> None:
        """Look at what is directly in a folder of the capture, and below what is foreign of it."""
        names = self._names(folder)
        found = [(name, kind) for name, kind in names if not self._known(folder + b"/" + name if folder else name)]
        leftovers = [name for name, kind in found if name.startswith(TEMP_PREFIX) and not stat.S_ISDIR(kind)]
        self.delete += [folder + b"/" + name if folder else name for name in leftovers]
        if self._wanted is None or len(found) == len(leftovers):
            return
        patterns, left_out = self._wanted
        shut = left_out.within(folder) or self._shut(folder, names)
        rules = left_out.inside(folder, self._read)
        for name, kind in found:
            path = folder + b"/" + name if folder else name
            is_folder = stat.S_ISDIR(kind)
            if (name.startswith(TEMP_PREFIX) and not is_folder) or not patterns.chooses(path, is_folder):
                continue
            if shut or not self._free(path, kind, rules):
                self.kept.append(path)
                continue
            below = list(self._below(path, rules)) if is_folder else []
            stay = [each for each, free in below if not free]
            above = {each[:at] for each in stay for at, byte in enumerate(each) if byte == _SLASH}
            self.kept += stay
            self.delete += [each for each, free in (*below, (path, True)) if free and each not in above]

    def in_way(self, path: bytes) -> list[bytes] | None:
        """What must go with a folder where a file has to be, itself last; None when something of it must not."""
        if not self._names(path) and not self._shut(path, []):
            return [path]
        if self._wanted is None or self._shut(path, self._names(path)) or self._wanted[1].within(path):
            return None
        found = list(self._below(path, self._wanted[1].inside(path.rpartition(b"/")[0], self._read)))
        return [*(each for each, _ in found), path] if all(free for _, free in found) else None

    def _below(self, folder: bytes, rules: IgnoreRules) -> Iterator[tuple[bytes, bool]]:
        """Everything below, what a folder holds before it, and whether it may be deleted; what may not is not entered."""
        stack: list[tuple[bytes, bool]] = [(folder, False)]
        while stack:
            path, seen = stack.pop()
            if seen:
                yield path, True
                continue
            self._tick()
            if path != folder:
                stack.append((path, True))
            for name, kind in self._names(path):
                each = path + b"/" + name
                if not self._free(each, kind, rules):
                    yield each, False
                elif stat.S_ISDIR(kind):
                    stack.append((each, False))
                else:
                    yield each, True

    def _free(self, path: bytes, kind: int, rules: IgnoreRules) -> bool:
        """True for what a capture would have had, and so did not have because it was not there."""
        assert self._wanted is not None  # noqa: S101 - nobody asks when nothing is to be deleted
        left_out, name, is_folder = self._wanted[1], path.rpartition(b"/")[2], stat.S_ISDIR(kind)
        if name == GIT or name.startswith(WHITEOUT) or left_out.holds(path):
            return False
        if rules.active() and rules.ignored(os.fsdecode(path), is_folder):
            return False
        if is_folder:
            return not self._shut(path, None)
        if stat.S_ISREG(kind):
            cap = left_out.rules.max_file_bytes
            return cap is None or self._size(path) <= cap
        return stat.S_ISLNK(kind)  # a capture has no sockets, FIFOs and devices

    def _shut(self, folder: bytes, names: list[tuple[bytes, int]] | None) -> bool:
        """True for a folder whose content is none of the capture's: mounted there, or marked as a cache. None: not listed yet."""
        try:
            fd = self._folders.open(folder)
            if _mount(fd) != self._mount:
                return True
            tagged = names is None or any(name == _TAG for name, _ in names)
            return bool(folder and tagged and self._wanted and self._wanted[1].rules.caches and is_cache(fd))
        except OSError as error:
            raise explained(error, folder) from error

    def _size(self, path: bytes) -> int:
        above, _, name = path.rpartition(b"/")
        with suppress(FileNotFoundError):
            return os.stat(name, dir_fd=self._folders.open(above), follow_symlinks=False).st_size
        return 0

    def _read(self, folder: bytes, name: str) -> bytes | None:
        try:
            return read_small(self._folders.open(folder), name, IGNORE_FILE_LIMIT)
        except OSError:
            return None

    def _names(self, folder: bytes) -> list[tuple[bytes, int]]:
        self._tick()
        try:
            with os.scandir(self._folders.open(folder)) as entries:
                return sorted((os.fsencode(entry.name), _kind(entry)) for entry in entries)
        except OSError as error:
            raise explained(error, folder) from error


def _kind(entry: os.DirEntry[str]) -> int:
    """The type bits, without asking the file system where it has said them already; 0 for what is none of the usual."""
    if entry.is_symlink():
        return stat.S_IFLNK
    if entry.is_dir(follow_symlinks=False):
        return stat.S_IFDIR
    return stat.S_IFREG if entry.is_file(follow_symlinks=False) else 0


def _mount(fd: int) -> tuple[int, bytes]:
    """What tells one mount from another. The device alone does not: a bind mount has that of the folder it shows."""
    device = os.fstat(fd).st_dev
    with suppress(OSError):
        lines = Path(f"/proc/self/fdinfo/{fd}").read_bytes().splitlines()
        return device, next((line for line in lines if line.startswith(b"mnt_id:")), b"")
    return device, b""
