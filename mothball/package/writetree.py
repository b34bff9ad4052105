"""Entries as files below one folder that nobody else fills: each folder opened from the one above it, never through a link.

What leads out while writing is not resolved and then compared, it cannot be followed at all: a link where a folder should be
is an error of the kernel's (B-115, B-116: names with ``..`` came out of the tar and were joined).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final

from mothball.errors import InvalidParams
from mothball.package.rootfs import SAFE_BITS, RootEntry
from mothball.store.below import FOLDER_FLAGS
from mothball.store.folders import Folders, explained
from mothball.store.read import show

_NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_HOLE: Final = 64 * 1024
"""Zeros in pieces of at least so many bytes are left out of the disk: a sparse file stays one."""


class TreeWriter:
    """Writes entries below the empty folder `folder`. Use it in a ``with`` block, then call `finish`.

    Everything belongs to whoever runs this, or to `owner` (uid, gid), which only root may give. Setuid and setgid are never set.
    Errors name `what`.
    """

    def __init__(self, folder: Path, what: str, *, owner: tuple[int, int] | None = None, tick: Callable[[], None] | None = None):
        self.files = self.folders = self.links = 0
        """Regular files (names of them), folders and symbolic links written."""
        self.bytes = 0
        self._what = what
        self._owner = owner
        self._tick = tick or (lambda: None)
        self._root = os.open(folder, FOLDER_FLAGS)
        self._folders = Folders(self._root)
        self._dress: dict[bytes, tuple[int, int]] = {}
        self._implied: set[bytes] = set()

    def __enter__(self) -> TreeWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._folders.close()
        os.close(self._root)

    def add(self, entry: RootEntry) -> None:
        """Write one entry. `InvalidParams` when its name was used before, or a link stands where a folder must be."""
        if not entry.path:
            self._dress[b""] = (entry.mode, entry.mtime_ns)
            return
        above, _, name = entry.path.rpartition(b"/")
        try:
            try:
                self._make(entry, self._folders.open(above), name)
            except FileNotFoundError:
                if entry.kind == "h":
                    self._require_target(entry)
                self._imply(above)
                self._make(entry, self._folders.open(above), name)
        except FileExistsError:
            if entry.kind != "d" or entry.path not in self._implied:
                raise InvalidParams(f"{self._what} has {show(entry.path)!r} twice; it was not unpacked") from None
            self._implied.discard(entry.path)
            self._dress[entry.path] = (entry.mode, entry.mtime_ns)
        except OSError as error:
            raise explained(error, entry.path) from error

    def finish(self) -> None:
        """Give folders their modes and times, the deepest first."""
        for path in sorted(self._dress, key=lambda each: each.count(b"/") + bool(each), reverse=True):
            mode, mtime_ns = self._dress[path]
            try:
                fd = self._folders.open(path)
                if self._owner:
                    os.fchown(fd, *self._owner)
                os.utime(fd, ns=(mtime_ns, mtime_ns))
                os.fchmod(fd, mode & (SAFE_BITS | stat.S_ISVTX))
            except OSError as error:
                raise explained(error, path) from error
        self._dress.clear()

    def _make(self, entry: RootEntry, folder: int, name: bytes) -> None:
        if entry.kind == "d":
            os.mkdir(name, 0o700, dir_fd=folder)
            self._dress[entry.path] = (entry.mode, entry.mtime_ns)
            self.folders += 1
        elif entry.kind == "l":
            os.symlink(entry.link, name, dir_fd=folder)
            if self._owner:
                os.chown(name, *self._owner, dir_fd=folder, follow_symlinks=False)
            os.utime(name, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=folder, follow_symlinks=False)
            self.links += 1
        elif entry.kind == "h":
            self._link(entry, folder, name)
            self.files += 1
        else:
            self._file(entry, folder, name)
            self.files += 1
            self._tick()

    def _file(self, entry: RootEntry, folder: int, name: bytes) -> None:
        fd = os.open(name, _NEW, 0o600, dir_fd=folder)
        try:
            place = 0
            for piece in entry.pieces():
                if len(piece) < _HOLE or piece.count(0) != len(piece):
                    view = memoryview(piece)
                    while view:
                        done = os.pwrite(fd, view, place)
                        view, place = view[done:], place + done
                else:
                    place += len(piece)
                self.bytes += len(piece)
                self._tick()
            os.ftruncate(fd, place)
            if self._owner:
                os.fchown(fd, *self._owner)
            os.fchmod(fd, entry.mode & SAFE_BITS)
            os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))
        finally:
            os.close(fd)

    def _link(self, entry: RootEntry, folder: int, name: bytes) -> None:
        above, _, base = entry.link.rpartition(b"/")
        held = os.dup(folder)  # opening the first name's folder may close this one
        try:
            source = self._folders.open(above)
            if not stat.S_ISREG(os.stat(base, dir_fd=source, follow_symlinks=False).st_mode):
                raise InvalidParams(
                    f"{self._what} has the hard link {show(entry.path)!r} to {show(entry.link)!r}, which is no file in it"
                )
            os.link(base, name, src_dir_fd=source, dst_dir_fd=held, follow_symlinks=False)
        finally:
            os.close(held)

    def _require_target(self, entry: RootEntry) -> None:
        above, _, base = entry.link.rpartition(b"/")
        with suppress(OSError):
            os.stat(base, dir_fd=self._folders.open(above), follow_symlinks=False)
            return
        raise InvalidParams(
            f"{self._what} has the hard link {show(entry.path)!r} to {show(entry.link)!r}, which is not in it before"
        )

    def _imply(self, path: bytes) -> None:
        """Make the folders above an entry that came without them."""
        parts = path.split(b"/")
        for count in range(1, len(parts) + 1):
            place = b"/".join(parts[:count])
            with suppress(FileExistsError):
                os.mkdir(parts[count - 1], 0o700, dir_fd=self._folders.open(b"/".join(parts[: count - 1])))
                self._dress[place] = (0o755, 0)
                self._implied.add(place)
                self.folders += 1
