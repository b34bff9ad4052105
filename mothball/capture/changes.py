"""What changed between the parent generation and the tree on disk.

Stat first, content second: an entry whose signature is the baseline's is unchanged; of the others every file of the same
size is hashed before it counts as changed, so a `touch`, a `git clone` or a lost stat index costs reading, not storing (D-30).
"""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field

from mothball.capture.baseline import Baseline
from mothball.capture.reading import Reader, TooBig, Unread
from mothball.capture.types import Checkpoint, Entry, Omission

_CHUNK = 1024**2
_CHECK_EVERY = 256


@dataclass
class Changes:
    """The difference, in terms of the new tree's paths."""

    emit: set[str] = field(default_factory=set)
    """Paths that need a member in the layer."""
    times: set[str] = field(default_factory=set)
    """Paths of which only the mtime moved."""
    gone: list[str] = field(default_factory=list)
    """Topmost paths that are no more; each needs a whiteout."""
    replaced: list[str] = field(default_factory=list)
    """Folders that became something else; whatever is below them in lower layers is hidden."""
    omissions: list[Omission] = field(default_factory=list)
    hashes: dict[str, bytes] = field(default_factory=dict)
    """sha256 of what was hashed and found unchanged."""
    stale: bool = False
    """True when the stat index is not what the next capture should compare with."""
    added: int = 0
    modified: int = 0
    deleted: int = 0

    @property
    def any(self) -> bool:
        return bool(self.emit or self.times or self.gone or self.replaced)


class Comparison:
    """Compares the walk's entries with a baseline; `run` once."""

    def __init__(self, baseline: Baseline, reader: Reader, *, again: Iterable[str] | None, checkpoint: Checkpoint) -> None:
        self._baseline = baseline
        self._reader = reader
        self._again = tuple(again or ())
        self._again_below = tuple(f"{path}/" if path else "" for path in self._again)
        self._checkpoint = checkpoint
        self._changes = Changes()
        self._scratch = bytearray(_CHUNK)
        self._hashed = 0
        self._paths: set[str] = set()

    def run(self, entries: list[Entry]) -> Changes:
        """Decide for every entry; raises what `checkpoint` raises. Entries that cannot be read become omissions and are gone."""
        signatures = self._baseline.signatures
        suspects = [entry for entry in entries if signatures.get(entry[0]) != entry[1:8]]
        if self._again:
            known = {entry.path for entry in suspects}
            suspects += [entry for entry in entries if entry.path not in known and self._read_again(entry.path)]
            order = {entry.path: number for number, entry in enumerate(entries)}
            suspects.sort(key=lambda entry: order[entry.path])
        changes = self._changes
        changes.stale = bool(suspects)
        if suspects:
            self._paths = {entry.path for entry in entries}
            groups = self._groups(entries, suspects)
            for entry in suspects:
                if entry.group not in groups:
                    self._decide(entry)
            for members in groups.values():
                self._decide_group(members)
            self._part_links()
        unread = {omission.path for omission in changes.omissions}
        if unread or len(entries) != len(signatures) or changes.added:
            self._find_gone(entries, unread)
        return changes

    def _read_again(self, path: str) -> bool:
        return path in self._again or path.startswith(self._again_below)

    @staticmethod
    def _groups(entries: list[Entry], suspects: list[Entry]) -> dict[tuple[int, int] | None, list[Entry]]:
        """Hard link groups with more than one name in the tree, of which at least one is suspect."""
        wanted = {entry.group for entry in suspects if entry.group}
        found: dict[tuple[int, int] | None, list[Entry]] = {}
        if wanted:
            for entry in entries:
                if entry.group in wanted:
                    found.setdefault(entry.group, []).append(entry)
        return {group: members for group, members in found.items() if len(members) > 1}

    def _decide(self, entry: Entry) -> None:
        changes, old = self._changes, self._baseline.signatures.get(entry.path)
        if old is None:
            changes.added += 1
            changes.emit.add(entry.path)
            return
        kind = stat.S_IFMT(entry.mode)
        if stat.S_IFMT(old[0]) != kind:
            if stat.S_ISDIR(old[0]):
                changes.replaced.append(entry.path)
            changes.modified += 1
            changes.emit.add(entry.path)
            return
        same_meta = old[:3] == entry[1:4]
        if kind == stat.S_IFDIR:
            if not same_meta:
                changes.modified += 1
            if not same_meta or entry.mtime_ns != old[4]:
                changes.emit.add(entry.path)
        elif not same_meta or self._was_linked(entry.path) or not self._same_content(entry):
            if not self._was_omitted(entry.path):
                changes.modified += 1
                changes.emit.add(entry.path)
        elif entry.mtime_ns != old[4]:
            changes.times.add(entry.path)

    def _part_links(self) -> None:
        """A row that links to a name which is about to be written anew must not become a link to that other file."""
        emit = self._changes.emit
        for path, first in self._baseline.links.items():
            if first in emit and path in self._paths:
                emit.add(path)

    def _was_linked(self, path: str) -> bool:
        """True for a name that was a link to another one which is still there: it must become a file of its own."""
        first = self._baseline.links.get(path)
        return first is not None and first in self._paths

    def _was_omitted(self, path: str) -> bool:
        return bool(self._changes.omissions) and self._changes.omissions[-1].path == path

    def _decide_group(self, members: list[Entry]) -> None:
        """All names of a file go into one layer: a hard link cannot point into a lower one."""
        baseline, changes, first = self._baseline, self._changes, members[0]
        old = baseline.signatures.get(first.path)
        same_meta = old is not None and old[:3] == first[1:4]
        same = same_meta and first.path not in baseline.links and self._same_content(first)
        if self._was_omitted(first.path):
            changes.omissions.pop()  # the next name may still be there; packing finds out
        if same and old is not None:
            before = {path for path, target in baseline.links.items() if target == first.path and path in self._paths}
            if before == {entry.path for entry in members[1:]} <= baseline.signatures.keys():
                for entry in members:
                    changes.hashes[entry.path] = changes.hashes[first.path]
                    if entry.mtime_ns != baseline.signatures[entry.path][4]:
                        changes.times.add(entry.path)
                return
        content = changes.hashes.get(first.path) or self._content(first)
        for entry in members:
            was = baseline.signatures.get(entry.path)
            if was is None:
                changes.added += 1
            elif was[:4] != entry[1:5] or baseline.sha(entry.path) != content:
                changes.modified += 1
            if was is not None and stat.S_ISDIR(was[0]):
                changes.replaced.append(entry.path)
            changes.emit.add(entry.path)

    def _same_content(self, entry: Entry) -> bool:
        try:
            if stat.S_ISLNK(entry.mode):
                sha = hashlib.sha256(self._reader.link(entry.path)).digest()
            elif entry.size != self._baseline.signatures[entry.path][3]:
                return False
            else:
                sha = self._hash(entry)
        except Unread as why:
            self._changes.omissions.append(Omission(entry.path, why.reason, entry.size, why.detail))
            return False
        if sha != self._baseline.sha(entry.path):
            return False
        self._changes.hashes[entry.path] = sha
        return True

    def _content(self, entry: Entry) -> bytes:
        try:
            return self._hash(entry)
        except Unread:  # packing finds out and says so
            return b""

    def _hash(self, entry: Entry) -> bytes:
        """sha256 of the file; of one that changes meanwhile an impossible one, so that it is packed and judged there."""
        self._hashed += 1
        if not self._hashed % _CHECK_EVERY:
            self._checkpoint("compare", {"files": self._hashed})
        if entry.size <= _CHUNK:
            with memoryview(self._scratch) as view:
                try:
                    got = self._reader.read_into(entry, view)
                except TooBig:
                    return b""
                return b"" if got.torn or got.entry is not entry else hashlib.sha256(view[: entry.size]).digest()
        return self._reader.digest(entry, self._checkpoint) or b""

    def _find_gone(self, entries: list[Entry], unread: set[str]) -> None:
        """Paths of the parent that the tree no longer has; only the topmost get a whiteout."""
        here = {entry.path for entry in entries}
        if unread:
            here -= unread
        folders = {entry.path for entry in entries if stat.S_ISDIR(entry.mode)}
        changes = self._changes
        for path in self._baseline.signatures:
            if path not in here:
                changes.deleted += 1
                if path.rpartition("/")[0] in folders:
                    changes.gone.append(path)
