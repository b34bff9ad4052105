"""The end of a layout: a workspace's folder leaves the store only on positive evidence that the workspace was released.

A registry that lost its data knows no workspace at all, and that must never empty a store. So a collector that sees the
tombstone of a workspace writes ``released`` into its layout; only when the tombstone's time is over, and there is still no
record, the captures go to the trash. Without that mark the layout is an orphan, which is reported and kept.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from contextlib import suppress
from typing import Literal

import msgspec

from mothball.errors import MothballError, NoSpace
from mothball.store import RefIndex, Store
from mothball.store.blobs import full_disk_is_no_space, replace_file
from mothball.store.manifest import MEDIA_INDEX, canonical
from mothball.store.refs import LAST_SNAPSHOT, RELEASED
from mothball.store.survey import Facts, Standing
from mothball.store.trash import Trash
from mothball.store.view import Layout, Released, StoreView

_FUTURE_MS = 3_600_000
"""A mark so far ahead was written by a clock that was wrong; it is written again, instead of keeping the layout for years."""
Fate = Literal["keep", "mark", "unmark", "remove", "orphan"]
FIXED = ("index.json", "oci-layout", "blobs", "fence", RELEASED, "lock")
"""What a layout consists of, in the order in which it is taken apart: without an index there is nothing to lose any more."""

STUB = ("index.json", "oci-layout", "blobs")
"""What stays of a layout that gave numbers to snapshots."""


def fate(layout: Layout, standing: Standing, now_ms: int, tombstone_ms: int) -> Fate:
    """What becomes of a layout. Pure, so that a dry run says what a collection does."""
    if standing == "known":
        return "unmark" if layout.released else "keep"
    if standing == "gone":
        return "keep" if layout.released and layout.released.at <= now_ms + _FUTURE_MS else "mark"
    # A workspace that is registered on another host is captured there; to this store it is as unknown as one without a record.
    if layout.released is None:
        return "orphan"
    if layout.released.at > now_ms + _FUTURE_MS:
        return "mark"
    return "remove" if now_ms >= layout.released.at + tombstone_ms else "keep"


class Layouts:
    """Decides and acts on the layouts of one store. `now_ms` is this host's clock; the lists say what was (or would be) done."""

    def __init__(self, store: Store, facts: Facts, *, now_ms: int, tombstone_s: float, grace_s: float) -> None:
        self._store = store
        self._facts = facts
        self._now = now_ms
        self._tombstone_ms = int(tombstone_s * 1000)
        self._young = now_ms / 1000 - grace_s
        self.marked: list[str] = []
        self.removed: list[str] = []
        self.orphans: list[str] = []
        self.skipped: list[str] = []

    def judge(self, layout: Layout, live: set[str], forget: set[str]) -> Fate:
        """The fate of `layout`, noted in the lists; nothing is done yet."""
        if layout.workspace is None:
            if not layout.indexed and layout.folder.name not in live and self._bare(layout):
                self.removed.append(layout.name)
                return "remove"
            if layout.refs:
                self.orphans.append(layout.name)
            return "keep"
        found = fate(layout, self._facts.standing(layout.workspace), self._now, self._tombstone_ms)
        if found == "orphan" and layout.workspace in forget:
            found = "mark"
        if found == "remove" and self._in_use(layout):
            found = "keep"
        lists = {"mark": self.marked, "remove": self.removed, "orphan": self.orphans}
        if found in lists:
            lists[found].append(layout.name)
        return found

    def act(self, layout: Layout, decided: Fate) -> None:
        """Do what `judge` said. A layout that is in use by now is left for the next collection."""
        try:
            with full_disk_is_no_space(layout.folder):
                self._do(layout, decided)
        except NoSpace:
            raise
        except (MothballError, OSError) as error:
            self.skipped.append(f"{layout.name}: {error}")
            if layout.name in self.removed:
                self.removed.remove(layout.name)
            if layout.name in self.marked:
                self.marked.remove(layout.name)

    def _do(self, layout: Layout, decided: Fate) -> None:
        if decided == "mark" and layout.workspace is not None:
            index = self._index(layout)
            with index.locked():
                # A capture takes the mark away under this lock, with its fence; one that began since must not find it again.
                standing = self._facts.standing(layout.workspace)
                if standing == "known":
                    raise MothballError(reason="it came back into use")
                reason = "released" if standing == "gone" else "an orphan that somebody gave up"
                reason = layout.released.reason if layout.released else reason
                data = canonical(msgspec.to_builtins(Released(layout.workspace, self._now, reason)))
                replace_file(layout.folder / RELEASED, data, self._store.blobs.temp, sync=self._store.fsync)
        elif decided == "unmark":
            (layout.folder / RELEASED).unlink(missing_ok=True)
        elif decided == "remove":
            self._remove(layout)

    def _remove(self, layout: Layout) -> None:
        if layout.folder.is_symlink():
            raise MothballError(reason="its folder is a link, and nothing is deleted through one; remove the link by hand")
        index = self._index(layout)
        with index.locked():
            # Between the decision and the lock somebody may have registered the workspace again, or captured it.
            now = StoreView(self._store).layout(layout.folder)
            if layout.workspace is None:
                sure = not now.indexed and self._bare(now)
            else:
                standing = self._facts.standing(layout.workspace)
                sure = fate(now, standing, self._now, self._tombstone_ms) == "remove" and not self._in_use(now)
            if not sure:
                raise MothballError(reason="it came back into use")
            if foreign := sorted({path.name for path in layout.folder.iterdir()} - set(FIXED)):
                raise MothballError(reason=f"it holds {foreign[0]!r}, which is not of Mothball's making")
            trash = Trash(self._store)
            for ref in now.refs:
                trash.bury_ref(layout.name, ref, "released", self._now)
            drop_caches(self._store, [layout.folder.name])
            stays = self._leave_numbers(index)
            for name in FIXED:
                if name not in stays:
                    (layout.folder / name).unlink(missing_ok=True)
            if not stays:
                layout.folder.rmdir()

    def _leave_numbers(self, index: RefIndex) -> tuple[str, ...]:
        """What has to stay so that no snapshot number is given twice: an empty index that knows the last one (B-30)."""
        last = index.last_snapshot
        if not last:
            return ()
        empty = {"schemaVersion": 2, "mediaType": MEDIA_INDEX, "manifests": [], "annotations": {LAST_SNAPSHOT: str(last)}}
        replace_file(index.folder / "index.json", canonical(empty), self._store.blobs.temp, sync=self._store.fsync)
        return STUB

    def _index(self, layout: Layout) -> RefIndex:
        index = RefIndex(self._store.root, layout.workspace or "unknown", fsync=self._store.fsync)
        index.folder = layout.folder
        return index

    def _in_use(self, layout: Layout) -> bool:
        """True when a capture began here within the grace: it may not have published yet."""
        return any(_mtime(layout, name) > self._young for name in ("fence", "index.json"))

    def _bare(self, layout: Layout) -> bool:
        """True for a layout that never had a capture, holds nothing but its fixed parts and was not touched for long."""
        try:
            names = {path.name for path in layout.folder.iterdir()}
        except OSError:
            return False
        return names <= set(FIXED) and all(_mtime(layout, name) <= self._young for name in (*names, "."))


def _mtime(layout: Layout, name: str) -> float:
    try:
        return (layout.folder / name).lstat().st_mtime
    except FileNotFoundError:
        return 0.0


def stale_caches(view: StoreView, young: float) -> list[str]:
    """Names of cache folders whose layout is gone. A cache may be deleted at any time; `young` spares a capture that begins."""
    here = {folder.name for folder in view.folders()}
    found = []
    with suppress(FileNotFoundError):
        for path in view.cache.iterdir():
            with suppress(FileNotFoundError):
                if path.is_dir() and path.name not in here and path.lstat().st_mtime <= young:
                    found.append(path.name)
    return found


def drop_caches(store: Store, names: Iterable[str]) -> None:
    """Remove these cache folders."""
    for name in names:
        shutil.rmtree(store.cache / name, ignore_errors=True)
