"""Writing the entries of a capture into open folders: content from frames, verified, then owner, mode and times.

Each frame is decompressed once, ahead of the writing and beside it. Files are made by one thread: two of them spend more time
on the interpreter's lock than they win. A file whose content lies in one frame is verified before it is made; a larger one
is removed again when its last byte shows that it is wrong. So nothing wrong stays under a final name.
"""

from __future__ import annotations

import errno
import os
import stat
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from hashlib import sha256
from itertools import chain
from typing import Final

from mothball.errors import OperationFailed
from mothball.store.below import FILE_FLAGS
from mothball.store.folders import Folders, denied, explained
from mothball.store.frames import Frames, Unit
from mothball.store.merge import Found
from mothball.store.read import show
from mothball.store.toc import TocRow

TEMP_PREFIX: Final = b".mothball-restore-"
"""Beginning of the names under which files are written that replace others; left behind only by a process that was killed."""
_NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_SPECIAL_BITS: Final = 0o6000


def free_temp(paths: Iterable[bytes]) -> bytes:
    """A name to write under that is none of a capture's own: it may have been taken of a folder in which a restore was killed."""
    taken = {path.rpartition(b"/")[2] for path in paths if TEMP_PREFIX in path}
    name = TEMP_PREFIX
    while name in taken:
        name += b"-"
    return name


class Tally:
    """What one writer did. Entries, and bytes of content."""

    def __init__(self) -> None:
        self.files = 0
        self.links = 0
        self.bytes = 0
        self.owner_skipped = 0


class Unpacker:
    """Makes entries below `folders`. With `replace` each is made under the name `temp` and then takes the place of what is there.

    Only one unpacker may use `temp`. `tally` counts. Errors are ours and name the path.
    """

    def __init__(self, frames: Frames, folders: Folders, *, replace: bool, temp: bytes = TEMP_PREFIX) -> None:
        self.tally = Tally()
        self.folders = folders
        self._frames = frames
        self._replace = replace
        self._temp = temp
        self._root = os.geteuid() == 0
        self._own = (os.geteuid(), os.getegid())
        # Not so on a file system that gives every file its folder's group.
        self._as_made = os.fstat(folders.root).st_gid == self._own[1]

    def unit(self, unit: Unit, tick: Callable[[], None]) -> None:
        """The files of one frame. `tick` is called at least once per frame; what it raises ends the work."""
        rest: Iterable[Found] = unit
        if not self._replace and unit[0].row.size:
            rest = self._small_files(unit)
        for found in rest:
            self.file(found, tick)
        tick()

    def _small_files(self, unit: Unit) -> list[Found]:
        """The hot path: new files that lie whole in one frame. Returns those that do not."""
        frame = memoryview(self._frames.frame(unit[0].layer, unit[0].row.frame))
        tally, give = self.tally, self._give
        rest: list[Found] = []
        folder, above = self.folders.root, b""
        path = b""
        try:
            for found in unit:
                row = found.row
                path, size, offset = row.path, row.size, row.offset
                content = frame[offset : offset + size]
                if len(content) != size or row.extents is not None:
                    rest.append(found)
                    continue
                if sha256(content).digest() != row.sha256:
                    raise self._frames.mismatch(found)
                cut = path.rfind(b"/")
                if path[: max(cut, 0)] != above:
                    above = path[: max(cut, 0)]
                    folder = self.folders.open(above)
                name = path[cut + 1 :]
                fd = os.open(name, _NEW, 0o600, dir_fd=folder)
                try:
                    if os.write(fd, content) != size:
                        os.lseek(fd, 0, os.SEEK_SET)
                        _write(fd, content)
                    mode = row.mode
                    made_so = self._as_made and (row.uid, row.gid) == self._own
                    if not made_so and not give(row, partial(os.fchown, fd, row.uid, row.gid)):
                        mode &= ~_SPECIAL_BITS
                    os.fchmod(fd, mode)
                    os.utime(fd, ns=(found.mtime_ns, found.mtime_ns))
                except BaseException:
                    with suppress(OSError):
                        os.unlink(name, dir_fd=folder)
                    raise
                finally:
                    os.close(fd)
                tally.files += 1
                tally.bytes += size
        except OSError as error:
            raise explained(error, path) from error
        return rest

    def file(self, found: Found, tick: Callable[[], None] = lambda: None) -> None:
        """One file with its content; raises `Corrupt` when it does not verify, and then leaves nothing."""
        row = found.row
        pieces = self._frames.pieces(found)
        first = next(pieces, memoryview(b""))
        if len(first) == row.size and row.sha256 and sha256(first).digest() != row.sha256:
            raise self._frames.mismatch(found)

        def make(folder: int, name: bytes) -> None:
            fd = os.open(name, _NEW, 0o600, dir_fd=folder)
            try:
                if len(first) != row.size or row.extents is not None:
                    self._stream(fd, found, chain((first,), pieces), tick)
                else:
                    _write(fd, first)
                self._dress(fd, row, found.mtime_ns)
            except BaseException:
                with suppress(OSError):
                    os.unlink(name, dir_fd=folder)
                raise
            finally:
                os.close(fd)

        self._make(row.path, make)
        self.tally.files += 1
        self.tally.bytes += row.size

    def link(self, found: Found) -> None:
        """One symbolic link; where it leads to is not looked at."""
        row = found.row

        def make(folder: int, name: bytes) -> None:
            os.symlink(row.link, name, dir_fd=folder)
            try:
                self._dress_link(folder, name, found, None)
            except BaseException:
                with suppress(OSError):
                    os.unlink(name, dir_fd=folder)
                raise

        self._make(row.path, make)
        self.tally.links += 1

    def further(self, first: bytes, found: Found) -> None:
        """Another name of the file `first`, which has been made."""
        above, _, base = first.rpartition(b"/")

        def make(folder: int, name: bytes) -> None:
            held = os.dup(folder)  # opening the first name's folder may close this one
            try:
                os.link(base, name, src_dir_fd=self.folders.open(above), dst_dir_fd=held, follow_symlinks=False)
            finally:
                os.close(held)

        self._make(found.row.path, make)
        self.tally.files += 1

    def folder(self, found: Found) -> None:
        """One new folder, for its owner alone until `dress_folder`."""

        def make(folder: int, name: bytes) -> None:
            os.mkdir(name, 0o700, dir_fd=folder)

        self._in_folder(found.row.path, make)

    def dress_folder(self, found: Found) -> None:
        """Owner, mode and time of a folder; only when nothing more is written into it."""
        row = found.row
        try:
            self._dress(self.folders.open(row.path), row, found.mtime_ns)
        except OSError as error:
            raise explained(error, row.path) from error
        self.folders.lifted.pop(row.path, None)

    def metadata(self, found: Found, inode: tuple[int, int]) -> None:
        """Owner, mode and time of what is there with the right content; `inode`: its (device, inode) when it was seen."""
        row = found.row
        above, _, name = row.path.rpartition(b"/")
        try:
            folder = self.folders.open(above)
            if row.type == "l":
                self._dress_link(folder, name, found, inode)
                return
            fd = os.open(name, FILE_FLAGS, dir_fd=folder)
            try:
                now = os.fstat(fd)
                if (now.st_dev, now.st_ino) != inode:
                    raise _swapped(row.path)
                self._dress(fd, row, found.mtime_ns)
            finally:
                os.close(fd)
        except OSError as error:
            raise explained(error, row.path) from error

    def remove(self, path: bytes) -> bool:
        """Remove a file, link or empty folder; False when it is a folder that is not empty (any more), or a mount point."""
        gone = True

        def make(folder: int, name: bytes) -> None:
            nonlocal gone
            try:
                if stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                    os.rmdir(name, dir_fd=folder)
                else:
                    os.unlink(name, dir_fd=folder)
            except FileNotFoundError:
                pass
            except OSError as error:
                if error.errno not in {errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY}:  # the last: mounted there
                    raise
                gone = False

        self.folders.forget(path)
        self._in_folder(path, make)
        return gone

    def _make(self, path: bytes, make: Callable[[int, bytes], None]) -> None:
        if not self._replace:
            self._in_folder(path, make)
            return

        def take_place(folder: int, name: bytes) -> None:
            held = os.dup(folder)
            try:
                with suppress(FileNotFoundError):
                    os.unlink(self._temp, dir_fd=held)  # of a run that was killed
                make(held, self._temp)
                try:
                    os.rename(self._temp, name, src_dir_fd=held, dst_dir_fd=held)
                finally:
                    # Still there after a rename between two names of one file, which does nothing.
                    with suppress(FileNotFoundError):
                        os.unlink(self._temp, dir_fd=held)
            finally:
                os.close(held)

        self._in_folder(path, take_place)

    def _in_folder(self, path: bytes, make: Callable[[int, bytes], None]) -> None:
        above, _, name = path.rpartition(b"/")
        try:
            try:
                make(self.folders.open(above), name)
            except OSError as error:
                if not denied(error) or not self.folders.writable(above):
                    raise
                make(self.folders.open(above), name)
        except OSError as error:
            raise explained(error, path) from error

    def _stream(self, fd: int, found: Found, pieces: Iterable[memoryview], tick: Callable[[], None]) -> None:
        row = found.row
        sha = sha256()
        place = 0
        if row.extents is not None:
            os.ftruncate(fd, row.size)
        for piece in pieces:
            tick()
            sha.update(piece)
            if row.extents is None:
                _write(fd, piece)
            elif not _write_data(fd, piece, place, row.extents):
                raise self._frames.mismatch(found)
            place += len(piece)
            self.tally.bytes += len(piece)
        self.tally.bytes -= row.size  # `file` counts it
        if row.sha256 and sha.digest() != row.sha256:
            raise self._frames.mismatch(found)

    def _dress(self, fd: int, row: TocRow, mtime_ns: int) -> None:
        mode = row.mode
        if not self._give(row, lambda: os.fchown(fd, row.uid, row.gid)):
            mode &= ~_SPECIAL_BITS  # setuid to whoever restores is not what was captured
        os.fchmod(fd, mode)
        os.utime(fd, ns=(mtime_ns, mtime_ns))

    def _dress_link(self, folder: int, name: bytes, found: Found, inode: tuple[int, int] | None) -> None:
        """Owner and time of a symbolic link: of the one just made, or of that very `inode`."""
        # Through a descriptor: by its name it might be what somebody put in its place, a name of a file elsewhere.
        handle = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        try:
            now = os.fstat(handle)
            if not stat.S_ISLNK(now.st_mode) or (now.st_nlink != 1 if inode is None else (now.st_dev, now.st_ino) != inode):
                raise _swapped(found.row.path)
            itself = f"/proc/self/fd/{handle}"  # the link, not what it leads to; the calls for descriptors refuse this one
            self._give(found.row, lambda: os.chown(itself, found.row.uid, found.row.gid))
            os.utime(itself, ns=(found.mtime_ns, found.mtime_ns))
        finally:
            os.close(handle)

    def _give(self, row: TocRow, chown: Callable[[], None]) -> bool:
        """Set the owner; False (and counted) when this user or this file system cannot."""
        if (row.uid, row.gid) == self._own and not self._root:
            return True
        try:
            if self._root:
                chown()
                return True
        except OSError as error:
            if error.errno not in {errno.EPERM, errno.EINVAL, errno.ENOTSUP}:
                raise
        self.tally.owner_skipped += 1
        return False


def _swapped(path: bytes) -> OperationFailed:
    return OperationFailed(f"{show(path)!r} was replaced while it was restored; run it again")


def _write(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _write_data(fd: int, piece: memoryview, place: int, extents: Sequence[tuple[int, int]]) -> bool:
    """Write what of `piece`, which belongs at `place`, lies in `extents`; False when something outside them is not zero."""
    number = max(bisect_right(extents, (place, 1 << 63)) - 1, 0)
    done, end = place, place + len(piece)
    while done < end:
        offset, length = extents[number] if number < len(extents) else (end, 0)
        if offset + length <= done and number < len(extents):
            number += 1
            continue
        hole_end = min(max(offset, done), end)
        hole = bytes(piece[done - place : hole_end - place])
        if hole.count(0) != len(hole):
            return False
        stop = min(offset + length, end)
        done = hole_end
        while done < stop:
            done += os.pwrite(fd, piece[done - place : stop - place], done)
        number += 1
    return True
