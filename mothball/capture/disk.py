"""What differs between a capture and the directory as it is now.

The directory is walked exactly as a capture walks it: same root, same ignore rules, never through a link. A file whose stat
is that of the workspace's stat index has the content that the index says; every other one of the same size is hashed, so
the answer is that of a capture and not a guess by times.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal

from mothball.capture.baseline import Baseline, load_index
from mothball.capture.reading import Reader, Unread
from mothball.capture.root import open_root
from mothball.capture.types import CaptureOptions, Omission
from mothball.capture.types import Entry as DiskEntry
from mothball.capture.walk import Walker
from mothball.errors import NotFound, Oversize, SourceMissing
from mothball.settings import Settings
from mothball.store import RefIndex, Store
from mothball.store.diff import Change, change_of
from mothball.store.merge import Found
from mothball.store.read import clean_path, show
from mothball.store.refs import LATEST
from mothball.store.toc import sort_key
from mothball.store.tree import READ_LIMIT, Entry, Tree, entry_of

Progress = Callable[[str, dict[str, Any]], None]
_TYPES: dict[int, Literal["file", "dir", "symlink"]] = {stat.S_IFREG: "file", stat.S_IFDIR: "dir", stat.S_IFLNK: "symlink"}
_NO_LAYER = -1


class DiskComparison:
    """One look at a directory beside a capture. `changes` once; `omissions` is whole after it, `read` works until the end."""

    def __init__(self, tree: Tree, root_fd: int, options: CaptureOptions, store: Store, refs: RefIndex, progress: Progress) -> None:
        self.omissions: list[Omission] = []
        """What the ignore rules or the file system keep out of a capture; a capture now would not have it."""
        self._tree = tree
        self._progress = progress
        self._reader = Reader(root_fd, clamp=options.owner == "clamp")
        own_store = store.root.stat()
        found = Walker(root_fd, options, progress, skip=(own_store.st_dev, own_store.st_ino)).run()
        self._entries = found.entries
        self.omissions += found.omissions
        latest = refs.find(LATEST)
        # Of use whatever capture is compared: the index says what the files of this very stat hold.
        self._index: Baseline | None = load_index(store, refs.folder.name, latest.digest, options.owner) if latest else None
        self._trusted = latest is not None and latest.digest == tree.digest
        """The index is of this very capture: a stat that is in it says that nothing differs at all."""

    def changes(self, prefix: str | bytes = "") -> Iterator[Change]:
        """What a capture now would change, sorted by path; with `prefix` only that path and below. `NotFound` when neither has it.

        A file that a rule leaves out now and the capture has is ``deleted``; `omissions` has the reason.
        """
        folder = clean_path(prefix)
        mine = [entry for entry in self._entries if _below(os.fsencode(entry.path), folder)]
        root = self._tree.locate(folder)
        if root is None and not mine:
            raise NotFound(f"neither in the capture nor on disk: {show(folder)}", what="file", id=show(folder))
        captured = self._captured(folder, root)
        disk = iter(mine)
        old, new = next(captured, None), next(disk, None)
        while old is not None or new is not None:
            order = _order(old, new)
            change = self._change(old if order <= 0 else None, new if order >= 0 else None)
            if change is not None:
                yield change
            old = next(captured, None) if order <= 0 else old
            new = next(disk, None) if order >= 0 else new

    def read(self, path: str) -> bytes:
        """The content of a file on disk as it is now; raises `SourceMissing` and, over `READ_LIMIT` bytes, `Oversize`."""
        try:
            fd = self._reader.open(path)
        except Unread as why:
            raise SourceMissing(path=show(os.fsencode(path)), reason=f"it is {why.reason}") from None
        with os.fdopen(fd, "rb") as file:
            data = file.read(READ_LIMIT + 1)
        if len(data) > READ_LIMIT:
            raise Oversize(what=f"file {show(os.fsencode(path))}", size=len(data), limit=READ_LIMIT)
        return data

    def close(self) -> None:
        """Close what `read` uses."""
        self._reader.close()

    def __enter__(self) -> DiskComparison:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _captured(self, folder: bytes, root: Found | None) -> Iterator[Found]:
        if root is not None:
            yield root
            if root.row.type == "d":
                yield from self._tree.below(folder)

    def _change(self, old: Found | None, new: DiskEntry | None) -> Change | None:
        if self._trusted and new is not None and self._index and self._index.signatures.get(new.path) == new.signature:
            return None
        before = entry_of(old) if old is not None else None
        if new is None:
            return change_of(before, None)
        try:
            return change_of(before, self._entry(new, before))
        except Unread as why:
            self.omissions.append(Omission(new.path, why.reason, new.size, why.detail))
            return change_of(before, None)

    def _entry(self, entry: DiskEntry, before: Entry | None) -> Entry:
        """The entry on disk as a capture would have it. Content is read only when that decides something."""
        kind = _TYPES[stat.S_IFMT(entry.mode)]
        sha = link = None
        if kind == "symlink":
            link = os.fsdecode(self._reader.link(entry.path))
        elif kind == "file" and (
            before is None or before.type not in {"file", "hardlink"} or before.size != entry.size or not entry.size
        ):
            pass  # it differs whatever it holds
        elif kind == "file":
            sha = self._sha(entry)
        return Entry(
            entry.path, kind, stat.S_IMODE(entry.mode), entry.uid, entry.gid, entry.mtime_ns,
            entry.size if kind == "file" else 0, sha, link, _NO_LAYER,
        )  # fmt: skip

    def _sha(self, entry: DiskEntry) -> str | None:
        if self._index is not None and self._index.signatures.get(entry.path) == entry.signature:
            return self._index.sha(entry.path).hex()
        found = self._reader.digest(entry, self._progress)
        if found is None:  # it changes while it is read: a content of its own, whatever it will be
            return hashlib.sha256(os.urandom(32)).hexdigest()
        return found.hex()


@contextmanager
def compare_with_disk(
    tree: Tree, path: str, settings: Settings, options: CaptureOptions, *, store: Store, workspace: str,
    progress: Progress = lambda _name, _data: None,
) -> Iterator[DiskComparison]:  # fmt: skip
    """Compare `tree`, a capture of `workspace`, with the directory `path`; nothing is written.

    Raises `SourceMissing`, `PathNotAllowed`, `Oversize` as a capture does, and what `progress` raises.
    """
    with (
        open_root(path, settings.workspace_roots) as root_fd,
        DiskComparison(tree, root_fd, options, store, store.refs(workspace), progress) as comparison,
    ):
        yield comparison


def _below(path: bytes, folder: bytes) -> bool:
    return not folder or path == folder or path.startswith(folder + b"/")


def _order(old: Found | None, new: DiskEntry | None) -> int:
    if old is None or new is None:
        return -1 if new is None else 1
    one, other = sort_key(old.row.path), sort_key(os.fsencode(new.path))
    return (one > other) - (one < other)
