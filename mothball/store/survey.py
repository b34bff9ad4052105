"""The survey: everything that is reachable in a store, and every reason not to trust that knowledge.

A collector deletes what it did not find here. So an index or a manifest that cannot be read is not skipped: it is named, and
as long as there is one nothing is deleted at all, for what it would have led to looks exactly like garbage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, Protocol

import msgspec

from mothball.errors import Corrupt, MothballError
from mothball.names import slug
from mothball.store import Ref
from mothball.store.blobs import check_digest
from mothball.store.manifest import PREFIX, Descriptor, reach
from mothball.store.marks import Marks, Usage
from mothball.store.snapshots import whole
from mothball.store.view import Layout, StoreView

_BYTES = PREFIX + "bytes"
Standing = Literal["known", "elsewhere", "gone", "unknown"]
"""What the registry says of a workspace: it has a record, or one on another host, or a tombstone, or none of these."""
Progress = Callable[..., None]
"""Called as ``progress(step, **counts)``, often; what it raises ends the collection, which may be begun again at any time."""


class Facts(Protocol):
    """What the registry knows. Without it no layout is ever removed."""

    def standing(self, workspace: str) -> Standing:
        """Asked again right before anything is done about a layout."""

    def registered(self) -> Iterable[tuple[str, str | None]]:
        """(id, digest of the latest capture or None) of every workspace with a record on this host."""


class Survey:
    """What is reachable, by whom, and what could not be read."""

    def __init__(self, view: StoreView, facts: Facts | None, progress: Progress) -> None:
        self._view = view
        self._facts = facts
        self._progress = progress
        self.layouts: list[Layout] = []
        self.damage: list[str] = []
        self.marks = Marks()
        self.live: set[str] = set()
        """Folder names of the workspaces that the registry knows on this host."""

    def run(self) -> Survey:
        """Read every index and every manifest. What `progress` raises goes through, damage does not."""
        for folder in self._view.folders():
            try:
                self.layouts.append(_slim(self._view.layout(folder)))
            except (MothballError, OSError) as error:
                self.damage.append(
                    f"{_said(error)}: put {folder / 'index.json'} back from a backup, or move that folder out of the store to give "
                    "up its captures"
                )
        self._lost_indexes()
        # The accounts count a blob once for each repo, so its workspaces come together.
        for layout in sorted(self.layouts, key=lambda each: (each.repo, each.folder.name)):
            self._mark(layout)
        return self

    def _lost_indexes(self) -> None:
        """An index that is gone looks like a workspace that was never captured. The registry knows better."""
        for workspace, digest in self._facts.registered() if self._facts else ():
            name = slug(workspace)
            self.live.add(name)
            if digest is None or not self._view.has_blob(digest):
                continue
            folder = self._view.root / "workspaces" / name
            if not (folder / "index.json").is_file():
                self.damage.append(
                    f"workspace {workspace!r} was captured as {digest}, and its index {folder / 'index.json'} is gone: put it back "
                    f"from a backup, capture the workspace again, or release it (`mothball release`) to give up its captures"
                )

    def _mark(self, layout: Layout) -> None:
        if not layout.refs:
            return
        marks = self.marks
        marks.owner(layout.name, layout.repo)
        seen: set[str] = set()
        for ref in layout.refs:
            marks.capture(whole(ref.get("bytes")))
            if ref.digest in seen:
                continue
            seen.add(ref.digest)
            self._progress("mark", captures=len(seen), blobs=marks.count)
            try:
                for blob in _named(self._view, ref):
                    marks.add(blob.digest, blob.size)
            except (MothballError, OSError) as error:
                self.damage.append(
                    f"capture {ref.name} of workspace {layout.name!r}: {_said(error)}: `mothball verify --repair-from` brings "
                    "blobs back from a registry, `mothball forget` gives a snapshot up, `mothball capture --full` replaces latest; "
                    f"for a workspace that is registered nowhere, moving {layout.folder} out of the store gives its captures up"
                )

    def missing(self) -> list[tuple[str, str]]:
        """(digest, ``workspace:ref``) of reachable blobs that are neither in the store nor in the trash."""
        found: dict[str, str] = {}
        for layout in self.layouts:
            for ref in layout.refs:
                for blob in _named(self._view, ref):
                    if blob.digest not in found and not self._view.has_blob(blob.digest):
                        found[blob.digest] = f"{layout.name}:{ref.name}"
        return sorted(found.items())

    def forgotten(self, expired: set[Path]) -> Marks:
        """The accounts of what can be undeleted: blobs that only buried refs still name, without the files `expired`."""
        out = Marks()
        last: str | None = None
        for entry in sorted(self._view.buried(expired), key=lambda each: (each.ref.get("repo"), each.workspace)):
            if entry.workspace != last:
                out.owner(entry.workspace, entry.ref.get("repo"))
                last = entry.workspace
            try:
                blobs = _named(self._view, entry.ref)
            except (MothballError, OSError):  # nobody reaches it: it only cannot be undeleted
                continue
            for blob in blobs:
                if not self.marks.has(blob.digest[7:]):
                    out.add(blob.digest, blob.size)
        return out

    def usage(self, expired: set[Path]) -> tuple[list[Usage], list[Usage]]:
        """(per workspace, per repo), the largest first; `expired` are files of buried refs that go, or went."""
        forgotten = self.forgotten(expired)
        for mine, theirs in ((self.marks.workspaces, forgotten.workspaces), (self.marks.repos, forgotten.repos)):
            by_name = {usage.name: usage for usage in mine}
            for usage in theirs:
                if usage.exclusive:
                    if usage.name not in by_name:
                        mine.append(by_name.setdefault(usage.name, Usage(usage.name, usage.repo)))
                    by_name[usage.name].reclaimable = usage.exclusive
        released = {layout.name: layout.released.at for layout in self.layouts if layout.released}
        for usage in self.marks.workspaces:
            usage.released_at = released.get(usage.name)
        return sorted(self.marks.workspaces, key=_largest), sorted(self.marks.repos, key=_largest)


def _slim(layout: Layout) -> Layout:
    """The layout without most of what its refs say: for a hundred thousand of them that would be most of the memory."""
    refs = [Ref(ref.name, ref.digest, ref.size, {_BYTES: ref.get("bytes")}) for ref in layout.refs]
    return msgspec.structs.replace(layout, refs=refs)


def _named(view: StoreView, ref: Ref) -> list[Descriptor]:
    """All that a ref keeps; a crash report keeps the capture it is about."""
    blobs = reach(view.manifest, ref.digest, ref.size)
    for blob in blobs:
        try:
            check_digest(blob.digest)
        except MothballError as error:
            raise Corrupt(what=f"manifest {ref.digest}", reason=error.message) from None
    return blobs


def _said(error: MothballError | OSError) -> str:
    return error.message if isinstance(error, MothballError) else f"{error.filename}: {error.strerror}"


def _largest(usage: Usage) -> tuple[int, str]:
    return -usage.stored, usage.name
