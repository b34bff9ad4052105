"""The walk: everything below a root, in order, through directory descriptors.

Nothing outside the root can be reached: each folder is opened relative to its parent's descriptor with ``O_NOFOLLOW``,
so swapping a folder for a symbolic link while the walk runs gains an attacker an omission, not a file of the host. FIFOs,
sockets and devices are never opened (B-26). What is left out is recorded with its reason (B-24, B-25).
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from mothball.capture.types import CaptureOptions, Checkpoint, Entry, Omission
from mothball.errors import Oversize, SourceMissing
from mothball.store.below import FOLDER_FLAGS, read_small
from mothball.store.ignore import IgnoreRules
from mothball.store.left_out import CACHE_TAG, IGNORE_FILE_LIMIT, ignore_files, is_cache

MAX_DEPTH = 256
"""A descriptor and two Python frames per level are held; deeper folders are recorded as unreadable."""
RESCANS = 3
"""A folder that changes while it is listed is listed again, this often."""
CHECK_EVERY = 4096

_INT64 = 2**63 - 1
_S_IFMT, _S_IFDIR, _S_IFREG, _S_IFLNK = 0o170000, stat.S_IFDIR, stat.S_IFREG, stat.S_IFLNK


def within_int64(nanoseconds: int) -> int:
    """A time as 64 bits can hold it (1677 to 2262); file systems hold more, and one such file must not stop a capture."""
    return min(max(nanoseconds, -_INT64), _INT64)


@dataclass
class Found:
    """What a walk found; `entries` in the order of the layer: folders before their content, names by their bytes."""

    entries: list[Entry] = field(default_factory=list)
    omissions: list[Omission] = field(default_factory=list)
    repositories: list[str] = field(default_factory=list)
    """Folders that hold a ``.git``, relative to the root."""
    files: int = 0
    bytes: int = 0
    """Content of the files; that of hard links once."""


class Walker:
    """One walk; `run` once."""

    def __init__(self, root_fd: int, options: CaptureOptions, checkpoint: Checkpoint, skip: tuple[int, int] = (0, 0)) -> None:
        """`skip`: (device, inode) of Mothball's own store, which must not capture itself."""
        self._skip = skip
        self._clamp = options.owner == "clamp"
        self._root = root_fd
        self._options = options
        self._checkpoint = checkpoint
        self._found = Found()
        self._linked: set[tuple[int, int]] = set()

    def run(self) -> Found:
        """Walk; raises `Oversize` when a budget of the workspace is passed, and what `checkpoint` raises."""
        root = os.fstat(self._root)
        self._device = root.st_dev
        uid, gid = (0, 0) if self._clamp else (root.st_uid, root.st_gid)
        self._found.entries.append(Entry("", root.st_mode, uid, gid, 0, within_int64(root.st_mtime_ns), 0, 0))
        try:
            self._folder(self._root, "", IgnoreRules.root(self._options.ignore), 0)
        except PermissionError as error:
            raise SourceMissing(f"the workspace's folder cannot be listed: {error.strerror}") from error
        return self._found

    def _omit(self, path: str, reason: str, size: int | None = 0, detail: str = "") -> None:
        self._found.omissions.append(Omission(path, reason, size, detail))

    def _list(self, fd: int) -> list[os.DirEntry[str]]:
        for _ in range(RESCANS):
            before = os.fstat(fd).st_mtime_ns
            with os.scandir(fd) as scan:
                listing = list(scan)
            if os.fstat(fd).st_mtime_ns == before:
                break
        # Sorting texts is sorting bytes only while all names are ASCII: undecodable bytes are spelled as surrogates.
        plain = "".join([item.name for item in listing]).isascii()
        listing.sort(key=_by_name if plain else _by_bytes)
        return listing

    def _folder(self, fd: int, prefix: str, rules: IgnoreRules, depth: int) -> None:  # noqa: PLR0915  # one hot loop, calls in it cost a tenth
        listing = self._list(fd)
        names, texts = self._ignore_texts(fd, prefix, listing)
        rules = rules.descend(prefix, texts, names)
        if prefix and self._options.exclude_caches and _is_cache(fd, listing):
            self._omit(prefix, "ignored", None, CACHE_TAG)
            listing = [item for item in listing if item.name == CACHE_TAG]
        entries, active, cap, clamp = self._found.entries, rules.active(), self._options.file_cap, self._clamp
        add, new = entries.append, tuple.__new__  # skips the keyword handling of a named tuple: a third of its cost
        files = size_sum = 0
        for item in listing:
            name = item.name
            path = f"{prefix}/{name}" if prefix else name
            if name == ".git":
                self._found.repositories.append(prefix)
                continue
            try:
                st = item.stat(follow_symlinks=False)
            except FileNotFoundError:
                self._omit(path, "vanished")
                continue
            kind = st.st_mode & _S_IFMT
            uid, gid = (0, 0) if clamp else (st.st_uid, st.st_gid)
            mtime = st.st_mtime_ns
            if not -_INT64 <= mtime <= _INT64:
                mtime = within_int64(mtime)
            if active and rules.ignored(path, kind == _S_IFDIR):
                self._omit(path, "ignored", None if kind == _S_IFDIR else st.st_size)
            elif name.startswith(".wh."):
                self._omit(path, "whiteout_name", None if kind == _S_IFDIR else st.st_size)
            elif st.st_dev != self._device and self._options.one_file_system:
                self._omit(path, "other_filesystem", None if kind == _S_IFDIR else st.st_size)
                if kind == _S_IFDIR:
                    add(Entry(path, st.st_mode, uid, gid, 0, mtime, 0, 0))
            elif kind == _S_IFREG:
                if cap is not None and st.st_size > cap:
                    self._omit(path, "too_large", st.st_size)
                    continue
                size = st.st_size
                files += 1
                size_sum += size if st.st_nlink == 1 else 0
                group = (st.st_dev, st.st_ino) if st.st_nlink > 1 else None
                if group and group not in self._linked:
                    self._found.bytes += size
                    self._linked.add(group)
                add(new(Entry, (path, st.st_mode, uid, gid, size, mtime, st.st_ctime_ns, st.st_ino,
                                group, st.st_blocks * 512 < size)))  # fmt: skip
            elif kind == _S_IFDIR and (st.st_dev, st.st_ino) == self._skip:
                self._omit(path, "ignored", None, "the store of Mothball itself")
            elif kind == _S_IFDIR:
                add(Entry(path, st.st_mode, uid, gid, 0, mtime, 0, 0))
                self._enter(fd, name, path, rules, depth + 1)
            elif kind == _S_IFLNK:
                add(Entry(path, st.st_mode, uid, gid, 0, mtime, st.st_ctime_ns, st.st_ino))
            else:
                self._omit(path, "special", 0, _KINDS.get(kind, ""))
            if not len(entries) % CHECK_EVERY:
                self._check_budgets()
        self._found.files += files
        self._found.bytes += size_sum
        if not depth:
            self._check_budgets()

    def _enter(self, parent: int, name: str, path: str, rules: IgnoreRules, depth: int) -> None:
        if depth > MAX_DEPTH:
            self._omit(path, "unreadable", None, f"deeper than {MAX_DEPTH} folders")
            return
        try:
            fd = os.open(name, FOLDER_FLAGS, dir_fd=parent)
        except (FileNotFoundError, NotADirectoryError):
            self._omit(path, "vanished", None)
            return
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                raise  # it says nothing about the folder, and everything below would be left out
            self._omit(path, "unreadable", None, error.strerror or "")
            return
        try:
            self._folder(fd, path, rules, depth)
        except (PermissionError, FileNotFoundError) as error:
            self._omit(path, "unreadable", None, error.strerror or "")
        finally:
            os.close(fd)

    def _ignore_texts(self, fd: int, prefix: str, listing: Sequence[os.DirEntry[str]]) -> tuple[list[str], list[bytes]]:
        """Names and texts of the ignore files of this folder, the weaker one first: a later rule wins."""
        wanted = ignore_files(gitignore=self._options.use_gitignore)
        there = {item.name for item in listing if item.name in wanted}
        names: list[str] = []
        texts: list[bytes] = []
        for name in wanted:
            if name in there:
                text = read_small(fd, name, IGNORE_FILE_LIMIT)
                if text is None:
                    path = f"{prefix}/{name}" if prefix else name
                    self._omit(path, "unreadable", 0, "an ignore file that cannot be read rules nothing")
                else:
                    names.append(name)
                    texts.append(text)
        return names, texts

    def _check_budgets(self) -> None:
        found, options = self._found, self._options
        if len(found.entries) > options.max_files:
            raise Oversize(
                f"the workspace has more than {options.max_files} entries (max_files); nothing was written",
                what="workspace", size=len(found.entries), limit=options.max_files,
            )  # fmt: skip
        if options.max_total_bytes and found.bytes > options.max_total_bytes:
            raise Oversize(
                f"the workspace has more than {options.max_total_bytes} bytes (max_total_bytes); nothing was written",
                what="workspace", size=found.bytes, limit=options.max_total_bytes,
            )  # fmt: skip
        self._checkpoint("walk", {"entries": len(found.entries)})


_KINDS = {stat.S_IFIFO: "fifo", stat.S_IFSOCK: "socket", stat.S_IFCHR: "character device", stat.S_IFBLK: "block device"}


_by_name = attrgetter("name")


def _by_bytes(item: os.DirEntry[str]) -> bytes:
    return os.fsencode(item.name)


def _is_cache(fd: int, listing: Sequence[os.DirEntry[str]]) -> bool:
    return any(item.name == CACHE_TAG for item in listing) and is_cache(fd)
