"""Collection: what nothing refers to goes to the trash, and from there, after its time, for good (design, section 5).

Only one runs at a time, beside any number of writers and readers. A blob is taken when no index led to it and its age is above
the grace that every writer stays below; age is looked at again under the store's lock, batch by batch, so a blob that
somebody touched meanwhile stays. The cutoff is fixed when the collection begins: whatever is used later is younger.
A kill at any point leaves blobs here or in the trash, never nowhere, and the next collection goes on from there.
"""

from __future__ import annotations

import os
import stat
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Final

import msgspec

from mothball.errors import Corrupt, NotFound
from mothball.store import Store
from mothball.store.below import FOLDER_FLAGS
from mothball.store.blobs import file_lock, full_disk_is_no_space
from mothball.store.layouts import Layouts, drop_caches, stale_caches
from mothball.store.marks import Usage
from mothball.store.quarantine import TOTAL, Mover, read_total
from mothball.store.reserve import Reserve
from mothball.store.survey import Facts, Progress, Survey
from mothball.store.trash import Trash
from mothball.store.view import BLOB_NAME, StoreView

HOLD_SECONDS: Final = 0.08
"""How long a batch keeps writers waiting; then come `PAUSE_SECONDS` in which they get the lock."""
PAUSE_SECONDS: Final = 0.004
FUTURE_SECONDS: Final = 3600.0
"""A time stamp so far ahead was written by a clock that was wrong; it counts from now on instead of keeping garbage for years."""
LISTED: Final = 100
"""Names of each kind that a report lists."""
_RAW: Final = 32
_LOOK_EVERY: Final = 2048


class Freed(msgspec.Struct, frozen=True):
    """`bytes` that the first collection after `at` (ms, this host's clock, full hours) gives back."""

    at: int
    bytes: int


class CollectReport(msgspec.Struct, kw_only=True):
    """What a collection did, or with `dry_run` would do. Sizes are bytes, as the blobs have them.

    `reachable`: what captures need. `moved`: to the trash now. `waiting`: unreachable and younger than the grace. `deleted`:
    from the trash, for good. `trash`: still there, for `undelete`. `missing` are reachable blobs that are nowhere.
    """

    dry_run: bool
    reachable_blobs: int = 0
    reachable_bytes: int = 0
    moved_blobs: int = 0
    moved_bytes: int = 0
    waiting_blobs: int = 0
    waiting_bytes: int = 0
    deleted_blobs: int = 0
    deleted_bytes: int = 0
    trash_blobs: int = 0
    trash_bytes: int = 0
    put_back: int = 0
    refs_expired: int = 0
    temp_files: int = 0
    strange: int = 0
    missing: list[tuple[str, str]] = []
    released: list[str] = []
    removed: list[str] = []
    orphans: list[str] = []
    skipped: list[str] = []
    freed: list[Freed] = []
    workspaces: list[Usage] = []
    repos: list[Usage] = []
    reserve_bytes: int = 0
    seconds: float = 0.0

    def to_dict(self, limit: int | None = None) -> dict[str, object]:
        """JSON types; with `limit` only so many of each list, and ``<name>_more`` says how many were left out."""
        out: dict[str, object] = {}
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if not isinstance(value, list):
                out[name] = value
                continue
            shown = value if limit is None else value[:limit]
            out[name] = [item.to_dict() if isinstance(item, Usage) else msgspec.to_builtins(item) for item in shown]
            if len(shown) < len(value):
                out[f"{name}_more"] = len(value) - len(shown)
        return out


def collect(
    store: Store,
    *,
    grace_s: float,
    trash_s: float,
    tombstone_s: float,
    facts: Facts | None = None,
    dry_run: bool = False,
    empty_trash: bool = False,
    forget_orphans: Iterable[str] = (),
    reserve_bytes: int = 0,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.time,
) -> CollectReport:
    """Collect `store`. Without `facts` layouts are left alone; `empty_trash` gives up `undelete`, never the grace.

    Raises `Busy` when another collection runs, `Corrupt` when an index or a manifest cannot be read (nothing is deleted then, and
    the message names each), `NotFound` for an orphan that is none, `NoSpace` when even the reserve was not enough.
    """
    forget = set(forget_orphans)

    def once() -> CollectReport:
        return _Collection(
            store, grace_s, trash_s, tombstone_s, facts, empty_trash, forget, progress or (lambda _step, **_counts: None), clock
        ).run(act=not dry_run)

    if dry_run:
        return once()
    store.prepare()
    reserve = Reserve(store, reserve_bytes)
    with full_disk_is_no_space(store.root), _alone(store, reserve):
        reserve.spend_when_full(Trash(store).prepare)
        report = reserve.spend_when_full(once)
        report.reserve_bytes = reserve.make()
        return report


@contextmanager
def _alone(store: Store, reserve: Reserve) -> Iterator[None]:
    path = store.root / "collect.lock"
    # On a full disk even an empty file may have no place.
    reserve.spend_when_full(lambda: path.touch(0o600))
    with file_lock(path, "the collection of this host's store", wait=0):
        yield


class _Collection:
    def __init__(
        self, store: Store, grace_s: float, trash_s: float, tombstone_s: float, facts: Facts | None, empty_trash: bool,
        forget: set[str], progress: Progress, clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self._store = store
        self._view = StoreView(store)
        self._facts = facts
        self._progress = progress
        self._empty = empty_trash
        self._forget = forget
        self._started = time.monotonic()
        self._clock = clock
        self._now = clock()
        self._cutoff = self._now - grace_s
        self._grace_s, self._trash_s, self._tombstone_s = grace_s, trash_s, tombstone_s
        self._freed: dict[int, int] = defaultdict(int)
        self._expired: set[Path] = set()

    def run(self, *, act: bool) -> CollectReport:
        report = self._report = CollectReport(dry_run=not act)
        survey = self._survey = Survey(self._view, self._facts, self._progress).run()
        if survey.damage:
            more = f"; and {len(survey.damage) - LISTED} more" if len(survey.damage) > LISTED else ""
            raise Corrupt("nothing was collected, for not all captures can be read: " + "; ".join(survey.damage[:LISTED]) + more)
        self._act = act
        self._layouts()
        if act:
            report.temp_files = self._store.blobs.sweep_temp()
        report.reachable_blobs, report.reachable_bytes = survey.marks.count, survey.marks.bytes
        # Before the trash is emptied: a buried ref must go before its blobs do.
        self._expire_refs()
        reachable_here = self._blobs()
        self._trash()
        if reachable_here < survey.marks.count:
            report.missing = survey.missing()
        report.workspaces, report.repos = survey.usage(self._expired)
        report.freed = [Freed(hour * 3_600_000, size) for hour, size in sorted(self._freed.items())]
        report.seconds = round(time.monotonic() - self._started, 6)
        return report

    # -- layouts -------------------------------------------------------------------------------------------------------

    def _layouts(self) -> None:
        report, survey = self._report, self._survey
        if self._facts is None:
            if self._forget:
                raise NotFound("without the registry nobody can tell what is an orphan", what="orphan", id=min(self._forget))
            return
        judge = Layouts(
            self._store, self._facts, now_ms=int(self._now * 1000), tombstone_s=self._tombstone_s, grace_s=self._grace_s
        )
        decided = [(layout, judge.judge(layout, survey.live, self._forget)) for layout in survey.layouts]
        if unknown := self._forget - {layout.workspace for layout, each in decided if each == "mark"}:
            orphans = ", ".join(judge.orphans[:LISTED]) or "none"
            raise NotFound(f"{min(unknown)!r} is no orphan of this store; it has: {orphans}", what="orphan", id=min(unknown))
        for layout, each in decided if self._act else ():
            self._progress("layouts", current=layout.name)
            judge.act(layout, each)
        caches = stale_caches(self._view, self._cutoff)
        if self._act:
            drop_caches(self._store, caches)
        report.released, report.removed = judge.marked, judge.removed
        report.orphans, report.skipped = judge.orphans, judge.skipped

    # -- blobs ---------------------------------------------------------------------------------------------------------

    def _blobs(self) -> int:
        """Move what is unreachable and old; returns how many reachable blobs are in their place."""
        marks, report = self._survey.marks, self._report
        found = 0
        # 32 bytes each: a listing of texts would be what breaks a small host whose store is all garbage.
        loose = bytearray()
        has = marks.has
        with self._view.blobs() as entries:
            for number, entry in enumerate(entries):
                name = entry.name
                if has(name):
                    found += 1
                elif BLOB_NAME.match(name):
                    loose += bytes.fromhex(name)
                else:
                    report.strange += 1
                if not number % _LOOK_EVERY:
                    self._progress("look", blobs=number)
        with Mover(self._store, int(self._now * 1000)) if self._act else nullcontext() as mover:
            start = 0
            while start < len(loose):
                with self._store.blobs.collecting() if mover else nullcontext():
                    start = self._batch(loose, start, mover)
                self._progress("move", blobs=report.moved_blobs, bytes=report.moved_bytes)
                if mover and start < len(loose):
                    time.sleep(PAUSE_SECONDS)
        return found

    def _batch(self, loose: bytearray, start: int, mover: Mover | None) -> int:
        """Take blobs from `start` on for as long as writers may be kept waiting; returns where the next batch begins."""
        report = self._report
        # A clock that was set back meanwhile makes what is being captured now look older than the beginning of this collection.
        cutoff = min(self._cutoff, self._clock() - self._grace_s)
        until = time.monotonic() + HOLD_SECONDS
        folder = mover.source if mover else None
        while start < len(loose):
            name = loose[start : start + _RAW].hex()
            start += _RAW
            try:
                # Without a descriptor of the folder, as in a dry run, by its path.
                path = name if folder is not None else str(self._view.blobs_folder / name)
                found = os.stat(path, dir_fd=folder, follow_symlinks=False)
                if not stat.S_ISREG(found.st_mode):
                    report.strange += 1
                elif found.st_mtime < cutoff:
                    if mover:
                        mover.move(name, found.st_size)
                    report.moved_blobs += 1
                    report.moved_bytes += found.st_size
                    if mover is None:
                        self._count_in_trash(1, found.st_size, self._now, expired=self._empty or self._trash_s <= 0)
                else:
                    if mover and found.st_mtime > self._now + FUTURE_SECONDS:
                        os.utime(path, dir_fd=folder, follow_symlinks=False)
                    report.waiting_blobs += 1
                    report.waiting_bytes += found.st_size
                    self._free_at(min(found.st_mtime, self._now) + self._grace_s + self._trash_s, found.st_size)
            except FileNotFoundError:  # the same content, collected and written again, or a hand in the store
                continue
            if time.monotonic() > until:
                break
        return start

    # -- trash ---------------------------------------------------------------------------------------------------------

    def _expire_refs(self) -> None:
        for path in self._view.ref_files():
            with suppress(FileNotFoundError):
                age = self._now - path.lstat().st_mtime
                if age < -FUTURE_SECONDS and self._act:
                    os.utime(path)
                if self._empty or age >= self._trash_s:
                    self._report.refs_expired += 1
                    self._expired.add(path)
                    if self._act:
                        path.unlink()
        if self._act:
            _drop_empty(Trash(self._store).refs)

    def _trash(self) -> None:
        for run, folder in self._view.runs():
            at = run / 1000
            if at > self._now + FUTURE_SECONDS:
                at = self._now
                if self._act:
                    folder = folder.rename(Trash(self._store).free_run(int(at * 1000)))  # noqa: PLW2901 - the same run, a true name
            expired = self._empty or at + self._trash_s <= self._now
            self._empty_run(folder, at, expired=expired)
        if self._act:
            _drop_empty(Trash(self._store).blobs)

    def _empty_run(self, folder: Path, at: float, *, expired: bool) -> None:
        """Put back what is reachable, and when the run's time is over delete the rest."""
        has, report = self._survey.marks.has, self._report
        trash = Trash(self._store)
        names: list[str] = []
        with self._view.in_run(folder) as entries:
            for entry in entries:
                name = entry.name
                if entry.is_dir(follow_symlinks=False):
                    report.strange += 1
                elif has(name) and not (self._view.blobs_folder / name).exists():
                    report.put_back += 1
                    if self._act:
                        trash.put_back(f"sha256:{name}")
                elif name != TOTAL:
                    names.append(name)
        size = self._size(folder, names)
        if expired and self._act:
            self._delete(folder, names)
        self._count_in_trash(len(names), size, at, expired=expired)

    def _size(self, folder: Path, names: list[str]) -> int:
        """Bytes of the blobs `names`; by what the run wrote down when it is still whole, else one look at each."""
        total = read_total(folder)
        if total is not None and total.blobs == len(names):
            return total.bytes
        size = 0
        fd = os.open(folder, FOLDER_FLAGS)
        try:
            for name in names:
                with suppress(FileNotFoundError):
                    size += os.stat(name, dir_fd=fd, follow_symlinks=False).st_size
        finally:
            os.close(fd)
        return size

    def _delete(self, folder: Path, names: list[str]) -> None:
        fd = os.open(folder, FOLDER_FLAGS)
        try:
            for number, name in enumerate([*names, TOTAL]):
                if not number % _LOOK_EVERY:
                    self._progress("delete", blobs=number)
                with suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=fd)
        finally:
            os.close(fd)

    def _count_in_trash(self, blobs: int, size: int, at: float, *, expired: bool) -> None:
        report = self._report
        if expired:
            report.deleted_blobs += blobs
            report.deleted_bytes += size
        else:
            report.trash_blobs += blobs
            report.trash_bytes += size
            self._free_at(at + self._trash_s, size)

    def _free_at(self, at: float, size: int) -> None:
        self._freed[int(at // 3600) + 1] += size


def _drop_empty(folder: Path) -> None:
    """Remove the empty folders in `folder`."""
    with suppress(FileNotFoundError):
        for path in folder.iterdir():
            with suppress(OSError):  # not empty, or not a folder
                path.rmdir()
