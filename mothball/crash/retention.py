"""What is deleted of a crash report, in which order, by whom it is decided, and how what a kill left half is found and ended.

The package goes first, then the ref of the report (its blobs go by way of the trash), the record last: as long as anything is left,
the record names it. `heal` brings the three together again: records without files, files without record, deletions that were begun.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from mothball.crash.keep import choose
from mothball.crash.packages import PackageFile, list_packages, remove_package
from mothball.errors import Corrupt, InvalidParams, MothballError, NotFound, OperationFailed
from mothball.store import Ref, Store
from mothball.store.artifact import forget_report, is_crash, load_report, note_keep, subject_of
from mothball.store.snapshots import whole
from mothball.store.view import StoreView

if TYPE_CHECKING:
    from mothball.registry import Crash, Registry
    from mothball.settings import Settings

ORPHAN_MS: Final = 7 * 24 * 3600 * 1000
"""Age at which a package that neither a record nor the store knows was left by a job that will not come back."""
LISTED: Final = 100
_ALL: Final = 10**9
Each = Callable[..., None]


class Note(msgspec.Struct, frozen=True):
    """A report and what is said of it: why it went, or what is wrong with it."""

    report: str
    reason: str


class Retained(msgspec.Struct, kw_only=True):
    """What was deleted (a dry run: would be) and what was brought together again; the lists have at most 100 entries each."""

    host: str
    dry_run: bool
    reports: int = 0
    removed: int = 0
    removed_bytes: int = 0
    taken: list[Note] = []
    """Why each went: ``age``, ``count``, ``bytes``, or ``deleted`` for a deletion that was begun before."""
    found: list[str] = []
    """Reports of the store that the registry did not know (any more)."""
    lost: list[str] = []
    """Records whose report and package are both gone."""
    without_package: list[str] = []
    """Reports whose package is gone."""
    orphans: list[str] = []
    """Packages that belonged to nothing."""
    failed: list[Note] = []

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return msgspec.to_builtins(self)  # type: ignore[no-any-return]


def delete(store: Store, registry: Registry, settings: Settings, record: Crash, *, reason: str, by: str) -> bool:
    """Delete the report of `record`, whose host this is: package, report, record. False when it was gone.

    A run that was killed may be repeated. Raises `InvalidParams` for a report of another host, `OperationFailed` when the package
    cannot be removed, `Corrupt` for an index that cannot be read.
    """
    if record.host != settings.host:
        raise InvalidParams(f"crash report {record.id} is on host {record.host!r}, not on {settings.host!r}")
    try:
        registry.crashes.deleting(record.id, by)
    except NotFound:
        return False
    remove_package(settings.crash_dir, record.id)
    forget_report(store, record.workspace, record.id, reason=f"crash report deleted: {reason}", at_ms=registry.time_ms())
    return registry.crashes.drop(record.id, reason=reason, by=by)


def retain(store: Store, registry: Registry, settings: Settings, *, dry_run: bool, each: Each = lambda **_: None) -> Retained:
    """Heal, then delete what is too old, too many or too large together (B-58). One bad report never ends it."""
    out = Retained(host=settings.host, dry_run=dry_run)
    heal(store, registry, settings, out, dry_run=dry_run, each=each)
    records = {record.id: record for record in registry.crashes.list(host=settings.host, limit=_ALL)}
    out.reports = len(records)
    chosen = choose(
        list(records.values()), now=registry.time_ms(), keep_seconds=settings.crash_keep_seconds,
        keep_count=settings.crash_keep_count, keep_bytes=settings.crash_keep_bytes,
    )  # fmt: skip
    for place, (id, why) in enumerate(chosen, 1):  # noqa: A001
        each(step="retain", current=place, total=len(chosen))
        _take(store, registry, settings, records[id], why, out, dry_run=dry_run)
    return out


def _take(store: Store, registry: Registry, settings: Settings, record: Crash, why: str, out: Retained, *, dry_run: bool) -> None:
    try:
        if not dry_run and not delete(store, registry, settings, record, reason=why, by="retention"):
            return
    except (MothballError, OSError) as error:
        _note(out.failed, Note(record.id, str(error)[:300]))
        return
    out.removed += 1
    out.removed_bytes += record.bytes
    _note(out.taken, Note(record.id, why))


def heal(
    store: Store, registry: Registry, settings: Settings, out: Retained, *, dry_run: bool = False, each: Each = lambda **_: None
) -> None:
    """Bring records, reports and packages of this host together again.

    Raises `OperationFailed` when there are records and no store at all: a disk that is not mounted is no reason to forget anything.
    """
    # Read in the order in which they are made, last first: what is made meanwhile has its files when its record is seen.
    records = {record.id: record for record in registry.crashes.list(host=settings.host, limit=_ALL)}
    if records and not (store.root / "workspaces").is_dir():
        raise OperationFailed(
            reason=f"there are {len(records)} crash reports of this host and no store at {store.root}; is its disk mounted?"
        )
    refs = {ref.name: (workspace, ref) for workspace, ref in _refs(store, out)}
    files = {found.id: found for found in list_packages(settings.crash_dir)}
    now = registry.time_ms()
    for place, record in enumerate(records.values(), 1):
        each(step="heal", current=place, total=len(records))
        if record.deleting:
            _take(store, registry, settings, record, "deleted", out, dry_run=dry_run)
        elif record.id not in refs and record.id not in files:
            _lost(store, registry, record, out, dry_run=dry_run)
        elif record.path and record.id not in files:
            _note(out.without_package, record.id)
            if not dry_run:
                registry.crashes.packaged(record.id, path="", sha256="", bytes=0, files=record.files, sealed=False)
        if not dry_run and record.id in refs and (refs[record.id][1].get("keep") == "1") != record.keep:
            _keep(store, record, out)
    old = (settings.capture_time_limit + settings.transfer_time_limit) * 1000
    for id, (workspace, ref) in refs.items():  # noqa: A001
        if id not in records and now - whole(ref.get("at")) > old:
            each(step="heal", current=0, total=0)
            _adopt(store, registry, settings, workspace, ref, files.get(id), out, dry_run=dry_run)
    for id, found in files.items():  # noqa: A001
        if id not in records and id not in refs and now - found.at > ORPHAN_MS:
            _note(out.orphans, id)
            if not dry_run:
                remove_package(settings.crash_dir, id)


def _lost(store: Store, registry: Registry, record: Crash, out: Retained, *, dry_run: bool) -> None:
    """Forget a record whose report and package are gone, unless the report came while this read, or nobody can say."""
    try:
        if store.refs(record.workspace).find(record.id) is not None:
            return
    except (MothballError, OSError) as error:
        _note(out.failed, Note(record.id, str(error)[:300]))
        return
    _note(out.lost, record.id)
    if not dry_run:
        registry.crashes.drop(record.id, reason="lost", by="retention")


def _keep(store: Store, record: Crash, out: Retained) -> None:
    """That a report is kept is known to its files too: a registry may be lost."""
    try:
        note_keep(store, record.workspace, record.id, keep=record.keep)
    except (MothballError, OSError) as error:
        _note(out.failed, Note(record.id, str(error)[:300]))


def forget_hosts(registry: Registry, settings: Settings) -> int:
    """Forget the reports of hosts that nobody knows any more when they are older than retention keeps them; how many.

    Nobody else can: their files are where nobody looks. Should such a host come back, its own retention finds them again.
    """
    if not settings.crash_keep_seconds:
        return 0
    before = registry.time_ms() - settings.crash_keep_seconds * 1000
    known: dict[str, bool] = {}
    gone = 0
    for record in registry.crashes.list(limit=_ALL):
        if record.keep or not 0 < record.at < before:
            continue
        if record.host not in known:
            known[record.host] = registry.hosts.known(record.host)
        if not known[record.host]:
            gone += registry.crashes.drop(record.id, reason="host forgotten", by="retention")
    return gone


def _refs(store: Store, out: Retained) -> Iterator[tuple[str, Ref]]:
    """(workspace, ref) of every crash report in the store. An index that cannot be read is said and costs only its own."""
    view = StoreView(store)
    for folder in view.folders():
        try:
            layout = view.layout(folder)
        except (MothballError, OSError) as error:
            _note(out.failed, Note(folder.name, str(error)[:300]))
            continue
        for ref in layout.refs:
            workspace = ref.get("workspace") or layout.workspace
            if is_crash(ref.name) and workspace:
                yield workspace, ref


def _adopt(
    store: Store, registry: Registry, settings: Settings, workspace: str, ref: Ref, package: PackageFile | None, out: Retained, *,
    dry_run: bool,
) -> None:  # fmt: skip
    """The record of a report that only the store knows: Redis was lost, or somebody undeleted it."""
    try:
        record = record_of(store, settings.host, workspace, ref, package)
        if dry_run or registry.crashes.adopt(record):
            _note(out.found, record.id)
    except (MothballError, OSError, KeyError, TypeError, ValueError) as error:
        _note(out.failed, Note(ref.name, str(error)[:300]))


def record_of(store: Store, host: str, workspace: str, ref: Ref, package: PackageFile | None) -> Crash:
    """The record of a report as its files tell it. Raises `Corrupt`, and what a hostile document makes of the types."""
    from mothball.registry import Crash

    try:
        told = msgspec.json.decode(load_report(store, ref.digest), type=_Told)
    except msgspec.MsgspecError as error:
        raise Corrupt(what=f"crash report {ref.name}", reason=f"its report.json cannot be read: {error}") from None
    sha256, size = _hashed(package)
    return Crash(
        id=ref.name, workspace=workspace, repo=told.workspace.repo, number=told.workspace.number, host=host, at=told.at,
        signature=told.error.signature, title=told.error.title[:200], digest=subject_of(store, ref.digest).digest,
        generation=told.capture.generation, artifact=ref.digest, source=told.capture.source, path=package.path if package else "",
        keep=ref.get("keep") == "1",
        sha256=sha256, bytes=size, files=told.capture.files, sealed=bool(package and package.sealed), by="",
    )  # fmt: skip


class _Where(msgspec.Struct):
    repo: str | None = None
    number: int | None = None


class _Error(msgspec.Struct):
    title: str = ""
    signature: str = ""


class _Capture(msgspec.Struct):
    generation: int = 0
    source: str = ""
    files: int = 0


class _Told(msgspec.Struct):
    at: int
    workspace: _Where
    error: _Error
    capture: _Capture


def _hashed(package: PackageFile | None) -> tuple[str, int]:
    if package is None:
        return "", 0
    import hashlib

    with Path(package.path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest(), package.bytes


def _note(out: list[Any], item: Any) -> None:
    if len(out) < LISTED:
        out.append(item)
