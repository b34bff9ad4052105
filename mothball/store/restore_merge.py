"""What a restore into a folder with content would do: compared first, so that a refusal changes nothing and a dry run tells all."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property
from typing import Final, Literal

from mothball.errors import AlreadyExists
from mothball.store.folders import Folders, explained
from mothball.store.merge import Found
from mothball.store.read import show
from mothball.store.selection import Patterns, Selection, by_path
from mothball.store.unpack import TEMP_PREFIX

Overwrite = Literal["never", "changed", "always"]
_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_STEP: Final = 1024**2
_SHOWN: Final = 5
GIT: Final = b".git"


class Work:
    """What is to be done below an open folder. Lists of rows or paths; `kept` and `deleted` say what stays and what goes."""

    def __init__(self, selection: Selection) -> None:
        self.folders: list[Found] = selection.folders
        """To be made, parents first."""
        self.dress: list[Found] = selection.folders
        """Folders whose owner, mode and time are to be set at the end."""
        self.files: list[Found] = selection.files
        self.links: list[Found] = selection.links
        self.groups: dict[bytes, list[Found]] = selection.groups
        self.metadata: list[Found] = []
        """Files and links whose content is right and whose owner, mode or time is not."""
        self.remove: list[bytes] = []
        """In the way of something else: files where folders must be, and folders (after what they hold) where files must be."""
        self.delete: list[bytes] = []
        """Foreign, to be deleted; what a folder holds comes before it."""
        self.kept: list[bytes] = []
        self.unchanged = 0
        self.freed = 0
        """Bytes on disk of the files that are replaced."""

    @cached_property
    def count(self) -> int:
        """Files to be written, each once however many names it has."""
        return len(self.files)

    @cached_property
    def size(self) -> int:
        """Bytes of content to be written; asked for only when `files` is complete."""
        return sum(found.row.size for found in self.files)


class Omitted:
    """What a capture left out, as its config says: it is not foreign because it is not in the capture. Names as in JSON."""

    def __init__(self, paths: frozenset[str], *, cut: bool) -> None:
        self.paths = paths
        self.cut = cut

    def holds(self, path: bytes) -> bool:
        """True for an omitted path."""
        return path.decode("utf-8", "backslashreplace") in self.paths


class Comparison:
    """Compares a selection with the folder open as `folders.root`. `work` says what follows; nothing is written.

    Something in the way of a file that would lose what nobody asked to lose is `AlreadyExists`, before anything is done.
    """

    def __init__(
        self,
        selection: Selection,
        folders: Folders,
        overwrite: Overwrite,
        *,
        delete: tuple[Patterns, Omitted] | None,
        tick: Callable[[int], None],
    ) -> None:
        """`delete`: what of the foreign is to go, and what never; None leaves all of it. `tick` gets the entries seen, often."""
        self.work = Work(selection)
        self._selection = selection
        self._folders = folders
        self._overwrite = overwrite
        self._delete = delete
        self._tick = tick
        self._write: set[bytes] = set()
        self._make: set[bytes] = set()
        self._in_way: list[bytes] = []
        self._paths = {found.row.path for found in selection.entries}
        self._number = 0
        self._hashes: dict[tuple[int, int], bytes] = {}
        self._inodes: dict[bytes, tuple[int, int]] = {}
        self._root = os.geteuid() == 0
        self._own = (os.geteuid(), os.getegid())
        self._device = os.fstat(folders.root).st_dev

    def run(self) -> Work:
        """Look at everything."""
        work = self.work
        absent: bytes | None = None  # below it nothing is there
        closed: bytes | None = None  # below it nothing is written
        entered: list[bytes] = []
        work.dress = []
        for number, found in enumerate(sorted(self._selection.entries, key=by_path)):
            self._number = number
            self._tick(number)
            path, kind = found.row.path, found.row.type
            if closed is not None and path.startswith(closed):
                work.kept.append(path)
                continue
            if absent is not None and path.startswith(absent):
                self._new(found)
                continue
            there = self._stat(path)
            if kind == "d":
                if there is None:
                    self._new(found)
                    absent = path + b"/"
                elif stat.S_ISDIR(there.st_mode):
                    entered.append(path)
                    if self._overwrite != "never" and path in self._selection.named:
                        work.dress.append(found)
                elif self._overwrite == "never":
                    work.kept.append(path)
                    closed = path + b"/"
                else:
                    work.remove.append(path)
                    self._new(found)
                    absent = path + b"/"
            elif there is None:
                self._new(found)
            elif self._overwrite == "never":
                work.kept.append(path)
            elif stat.S_ISDIR(there.st_mode):
                self._clear_way(path)
                self._new(found)
            elif self._overwrite == "always" or not self._same(found, there):
                work.freed += there.st_blocks * 512 if there.st_nlink == 1 else 0
                self._new(found)
        if self._in_way:
            shown = ", ".join(repr(show(path)) for path in self._in_way[:_SHOWN])
            more = f" and {len(self._in_way) - _SHOWN} more" if len(self._in_way) > _SHOWN else ""
            raise AlreadyExists(
                f"folders with content stand where the capture has files: {shown}{more}; move them away"
                + ("" if self._delete else " or delete what is foreign too (delete_extra)")
                + "; nothing was changed"
            )
        self._sort_out()
        for path in entered:
            self._foreign(path)
        return work

    # -- looking -------------------------------------------------------------------------------------------------------

    def _stat(self, path: bytes) -> os.stat_result | None:
        if not path:
            return os.fstat(self._folders.root)
        above, _, name = path.rpartition(b"/")
        try:
            return os.stat(name, dir_fd=self._folders.open(above), follow_symlinks=False)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise explained(error, path) from error

    def _new(self, found: Found) -> None:
        path = found.row.path
        if found.row.type == "d":
            self._make.add(path)
            self.work.dress.append(found)
        else:
            self._write.add(path)

    def _same(self, found: Found, there: os.stat_result) -> bool:
        """True when the content is that of the capture; what else differs is noted, or makes it differ."""
        row = found.row
        if row.type == "l":
            same = stat.S_ISLNK(there.st_mode) and self._target(row.path) == row.link
        else:
            same = stat.S_ISREG(there.st_mode) and there.st_size == row.size and self._hash(row.path, there) == row.sha256
        if not same:
            return False
        self._inodes[row.path] = (there.st_dev, there.st_ino)
        if self._dressed(found, there):
            return True
        # Further names of the file elsewhere would change with it; and only its owner may change it.
        if row.type == "f" and row.path not in self._selection.groups and there.st_nlink > 1:
            return False
        if not self._root and there.st_uid != self._own[0]:
            return False
        self.work.metadata.append(found)
        return True

    def _dressed(self, found: Found, there: os.stat_result) -> bool:
        row = found.row
        owner = (there.st_uid, there.st_gid) == (row.uid, row.gid)
        if row.type == "l":
            return there.st_mtime_ns == found.mtime_ns and (owner or not self._root)
        mode = row.mode if owner else row.mode & 0o1777
        return there.st_mtime_ns == found.mtime_ns and stat.S_IMODE(there.st_mode) == mode and (owner or not self._root)

    def _target(self, path: bytes) -> bytes | None:
        above, _, name = path.rpartition(b"/")
        with suppress(OSError):
            return os.readlink(name, dir_fd=self._folders.open(above))
        return None

    def _hash(self, path: bytes, there: os.stat_result) -> bytes | None:
        """sha256 of the file on disk; None when it cannot be read or is another file by now."""
        key = (there.st_dev, there.st_ino)
        if there.st_nlink > 1 and key in self._hashes:
            return self._hashes[key]
        above, _, name = path.rpartition(b"/")
        try:
            fd = os.open(name, _READ, dir_fd=self._folders.open(above))
        except OSError:
            return None
        sha = hashlib.sha256()
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                return None
            while piece := os.read(fd, _STEP):
                sha.update(piece)
                self._tick(self._number)  # a large file must not hold up a cancel
        except OSError:
            return None  # a bad sector, perhaps: it is written anew
        finally:
            os.close(fd)
        if there.st_nlink > 1:
            self._hashes[key] = sha.digest()
        return sha.digest()

    # -- deciding ------------------------------------------------------------------------------------------------------

    def _sort_out(self) -> None:
        """The rows to be written, and which of them are names of one file."""
        work, every = self.work, self._selection
        chosen, write = self._write, self._write
        work.folders = [found for found in every.folders if found.row.path in self._make]
        work.links = [found for found in every.links if found.row.path in chosen]
        work.groups = {}
        first_of: dict[bytes, Found] = {}
        for found in every.files:
            names = every.groups.get(found.row.path)
            if not names:
                continue
            members = [found, *names]
            if self._overwrite != "never" and not self._one_file(members):
                write.update(member.row.path for member in members)
            missing = [member for member in members if member.row.path in write]
            if missing:
                first_of[found.row.path] = missing[0]
                work.groups[missing[0].row.path] = missing[1:]
        work.files = [
            first_of.get(found.row.path, found) for found in every.files if found.row.path in write or found.row.path in first_of
        ]
        work.metadata = [found for found in work.metadata if found.row.path not in write]
        done = len(write) + len(self._make) + len(work.kept) + len(work.metadata)
        work.unchanged = max(every.count - done, 0)

    def _one_file(self, members: list[Found]) -> bool:
        """True when the names are names of one file on disk, all of them right."""
        inodes = {self._inodes.get(member.row.path) for member in members}
        return len(inodes) == 1 and None not in inodes

    def _clear_way(self, path: bytes) -> None:
        """A folder stands where a file must be: it may go when it is empty, or when its content was given up."""
        found = list(self._below(path))
        if not found:
            self.work.remove.append(path)
        elif self._delete is None or any(not free for _, free in found):
            self._in_way.append(path)
        else:
            self.work.remove += [*(each for each, _ in found), path]

    def _foreign(self, folder: bytes) -> None:
        """What in an entered folder the capture does not have. What a killed restore left is deleted in any case."""
        for name, is_folder in self._names(folder):
            path = folder + b"/" + name if folder else name
            if path in self._paths or path in self._selection.known:
                continue
            if name.startswith(TEMP_PREFIX) and not is_folder:
                self.work.delete.append(path)
                continue
            if self._delete is None or not self._delete[0].chooses(path, is_folder):
                continue
            if not self._free(path, is_folder):
                self.work.kept.append(path)
                continue
            below = list(self._below(path)) if is_folder else []
            # A folder that holds something to be kept stays, and with it the folders between.
            stay = [each for each, free in below if not free]
            self.work.kept += stay
            self.work.delete += [
                each for each, free in (*below, (path, True)) if free and not any(one.startswith(each + b"/") for one in stay)
            ]

    def _below(self, folder: bytes) -> Iterator[tuple[bytes, bool]]:
        """Everything below, what a folder holds before it, and whether it may be deleted; what may not is not entered."""
        stack: list[tuple[bytes, bool]] = [(folder, False)]
        while stack:
            path, seen = stack.pop()
            if seen:
                yield path, True
                continue
            if path != folder:
                stack.append((path, True))
            for name, is_folder in self._names(path):
                each = path + b"/" + name
                if not self._free(each, is_folder):
                    yield each, False
                elif is_folder:
                    stack.append((each, False))
                else:
                    yield each, True

    def _free(self, path: bytes, is_folder: bool) -> bool:
        """False for what is never deleted: `.git`, what the capture left out, and what is mounted there."""
        if path.rpartition(b"/")[2] == GIT:
            return False
        if self._delete is not None and self._delete[1].holds(path):
            return False
        there = self._stat(path) if is_folder else None
        return there is None or there.st_dev == self._device

    def _names(self, folder: bytes) -> list[tuple[bytes, bool]]:
        try:
            with os.scandir(self._folders.open(folder)) as entries:
                return sorted((os.fsencode(entry.name), entry.is_dir(follow_symlinks=False)) for entry in entries)
        except OSError as error:
            raise explained(error, folder) from error
