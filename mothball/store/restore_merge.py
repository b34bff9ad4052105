"""What a restore into a folder with content would do: compared first, so that a refusal changes nothing and a dry run tells all."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from typing import Final, Literal

from mothball.errors import AlreadyExists, NoSpace
from mothball.store.below import FILE_FLAGS
from mothball.store.folders import Folders, explained
from mothball.store.left_out import LeftOut
from mothball.store.merge import Found
from mothball.store.read import show
from mothball.store.restore_foreign import Foreign
from mothball.store.restore_mark import MARK
from mothball.store.restore_result import Action
from mothball.store.selection import Patterns, Selection, by_path, estimate

Overwrite = Literal["never", "changed", "always"]
_STEP: Final = 1024**2
_SHOWN: Final = 5


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
        self.inodes: dict[bytes, tuple[int, int]] = {}
        """(device, inode) of what has the right content, by path."""
        self.replaced: list[bytes] = []
        """What is there with another content than captured."""
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

    def made(self) -> list[Found]:
        """All that is to be written, folders too."""
        return [*self.folders, *self.files, *self.links, *(each for names in self.groups.values() for each in names)]

    def actions(self) -> list[Action]:
        """All of it, as a dry run tells it."""
        return [
            *(Action("write", show(path) or ".") for path in sorted(found.row.path for found in self.made())),
            *(Action("metadata", show(found.row.path)) for found in self.metadata),
            *(Action("delete", show(path)) for path in (*self.remove, *self.delete)),
            *(Action("keep", show(path)) for path in self.kept),
        ]


def check_space(fd: int, work: Work, target: str) -> None:
    """A table of contents may claim anything: nothing is written before it is known to fit, else `NoSpace`."""
    disk = os.fstatvfs(fd)
    need = max(estimate(work.files) - work.freed, 0) + max((each.row.size for each in work.files), default=0) * bool(work.freed)
    free = disk.f_bavail * disk.f_frsize
    count = len(work.files) + len(work.links) + len(work.folders)
    if need > free:
        raise NoSpace(f"{target!r} needs {need} bytes and its file system has {free}; nothing was written", need=need, free=free)
    if disk.f_files and count > disk.f_favail:
        raise NoSpace(f"{target!r} needs {count} files, its file system has room for {disk.f_favail}; nothing was written")


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
        delete: tuple[Patterns, LeftOut] | None,
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
        self._inodes = self.work.inodes
        self._links: dict[bytes, int] = {}
        self._grouped = {each.row.path for names in selection.groups.values() for each in names} | selection.groups.keys()
        self._root = os.geteuid() == 0
        self._own = (os.geteuid(), os.getegid())
        self._foreign = Foreign(folders, self._is_known, delete, lambda: tick(self._number))

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
                work.replaced.append(path)
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
            self._foreign.look(path)
        work.delete += self._foreign.delete
        work.kept += self._foreign.kept
        return work

    def _is_known(self, path: bytes) -> bool:
        return path in self._paths or path in self._selection.known or path == MARK

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
        # Further names of it elsewhere would change with it; and only its owner may change it. Names of one file: see `_is_whole`.
        if there.st_nlink > 1 and row.path not in self._grouped:
            return False
        self._links[row.path] = there.st_nlink
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
            fd = os.open(name, FILE_FLAGS, dir_fd=self._folders.open(above))
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
            if self._overwrite != "never" and not (self._one_file(members) and self._is_whole(members)):
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

    def _is_whole(self, members: list[Found]) -> bool:
        """False when their file is to be changed and has more names than these, which would change with it."""
        return all(self._links.get(member.row.path, 0) <= len(members) for member in members)

    def _clear_way(self, path: bytes) -> None:
        """A folder stands where a file must be: it may go when it is empty, or when its content was given up."""
        found = self._foreign.in_way(path)
        if found is None:
            self._in_way.append(path)
        else:
            self.work.remove += found
