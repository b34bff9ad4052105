"""Is everything in a directory held by a capture? File by file, by content.

The stat index that makes captures cheap is not asked here: it says what a file held when its times were looked at, and a page that
is written through a mapping moves no time. What is about to be deleted is read once more and compared by its sha256.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator
from typing import Literal

from mothball.capture.reading import Reader, Unread
from mothball.capture.types import CaptureOptions, Omission
from mothball.capture.types import Entry as DiskEntry
from mothball.capture.walk import Walker
from mothball.errors import SourceMissing
from mothball.purge.receipt import Gap, Report
from mothball.store import Store
from mothball.store.below import identity
from mothball.store.diff import compare
from mothball.store.merge import Found
from mothball.store.read import show
from mothball.store.toc import sort_key
from mothball.store.tree import Entry, Tree, entry_of

_IGNORED = "ignored"
_TYPES: dict[int, Literal["file", "dir", "symlink"]] = {stat.S_IFREG: "file", stat.S_IFDIR: "dir", stat.S_IFLNK: "symlink"}
_NO_LAYER = -1


class Look:
    """What a look found. `omitted` counts what no capture takes, by reason."""

    def __init__(self) -> None:
        self.gaps: list[Gap] = []
        """What no capture would hold, now or later."""
        self.changed: list[Gap] = []
        """What differs from the capture: a new one would hold it."""
        self.omitted: Counter[str] = Counter()
        self.captured: set[bytes] = set()
        """Paths that the capture holds as they are, folders included."""
        self.uncaptured: set[bytes] = set()
        """Paths that the next capture would hold."""
        self.files = 0
        self.bytes = 0


def look(
    root_fd: int, tree: Tree | None, options: CaptureOptions, store: Store, report: Report, *, content: bool, partly: bool = False
) -> Look:
    """Compare the directory `root_fd` with the capture `tree`; None: there is none, and everything is missing.

    Without `content`, files of the same size, mode and times count as the same. With `partly`, a deletion has begun: what the
    capture has and the disk has not is no difference, nor are the times of folders. Raises `Oversize`, `SourceMissing`, `Corrupt`
    as a capture does, and what `report` raises.
    """
    found = Look()
    walked = Walker(root_fd, options, report, skip=identity(store.root) or (0, 0)).run()
    for omission in walked.omissions:
        _omitted(found, omission)
    with Reader(root_fd, clamp=options.owner == "clamp") as reader:
        held = _held(tree) if tree is not None else iter(())
        old = next(held, None)
        for entry in walked.entries:
            path = os.fsencode(entry.path)
            key = sort_key(path)
            while old is not None and sort_key(old.row.path) < key:
                if not partly:
                    found.changed.append(Gap(show(old.row.path), "changed", "is in the capture and not on disk any more"))
                old = next(held, None)
            if old is None or old.row.path != path:
                found.uncaptured.add(path)
                found.changed.append(Gap(show(path), "not_captured", "is not in the capture" if tree is not None else ""))
                continue
            difference = _difference(entry_of(old), entry, reader, report, content=content, partly=partly)
            old = next(held, None)
            if isinstance(difference, Unread):
                _omitted(found, Omission(entry.path, difference.reason, entry.size, difference.detail))
            elif difference:
                found.uncaptured.add(path)
                found.changed.append(Gap(show(path), "changed", f"differs from the capture ({difference})"))
            else:
                found.captured.add(path)
                if stat.S_ISREG(entry.mode):
                    found.files += 1
                    found.bytes += entry.size
        while old is not None and not partly:
            found.changed.append(Gap(show(old.row.path), "changed", "is in the capture and not on disk any more"))
            old = next(held, None)
    return found


def _omitted(found: Look, omission: Omission) -> None:
    found.omitted[omission.reason] += 1
    if omission.reason != _IGNORED:
        detail = f"is not captured: {omission.reason.replace('_', ' ')}" + (f" ({omission.detail})" if omission.detail else "")
        found.gaps.append(Gap(show(os.fsencode(omission.path)), omission.reason, detail))


def _held(tree: Tree) -> Iterator[Found]:
    root = tree.locate(b"")
    if root is None:
        raise SourceMissing(path="", reason="its capture has no root folder")
    yield root
    yield from tree.below()


def _difference(
    before: Entry, entry: DiskEntry, reader: Reader, report: Report, *, content: bool, partly: bool
) -> str | Unread | None:
    """What differs between an entry of the capture and the same path on disk; `Unread` when that cannot be found out."""
    kind = _TYPES[stat.S_IFMT(entry.mode)]
    sha = link = None
    try:
        if kind == "symlink":
            link = os.fsdecode(reader.link(entry.path))
        elif kind == "file" and before.type in {"file", "hardlink"} and before.size == entry.size:
            if content and entry.size:
                read = reader.digest(entry, report)
                if read is None:
                    return "it changes while it is read"
                sha = read.hex()
            else:
                sha = before.sha256
    except Unread as why:
        return why
    after = Entry(
        before.path, kind, stat.S_IMODE(entry.mode), entry.uid, entry.gid, entry.mtime_ns,
        entry.size if kind == "file" else 0, sha, link, _NO_LAYER,
    )  # fmt: skip
    aspects = set(compare(before, after))
    if kind == "dir" and (partly or not before.path):
        aspects -= {"time", "mode"}  # a deletion moves both; of the root, so does what is done beside it
    return ", ".join(sorted(aspects)) or None
