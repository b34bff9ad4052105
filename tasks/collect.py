"""Collection of a host's store, and the way back from its trash."""

from __future__ import annotations

from typing import Any

import structlog
from pydantic import Field

from mothball.registry.standing import StoreFacts
from mothball.settings import Settings
from mothball.store import Store
from mothball.store.reserve import Reserve
from mothball.store.snapshots import snapshots
from tasks.context import JobContext, patiently
from tasks.hosts import HostArgs, ask_hosts
from tasks.job import Outcome, job_task
from tasks.services import Services
from tasks.spec import WorkspaceId
from tasks.sweep import sweep_task

log = structlog.stdlib.get_logger("mothball.collect")

COLLECT_TASK, COLLECT_LANE = "store.collect", "collect"
UNDELETED_LISTED = 200
"""Captures of an undelete that its outcome lists; an outcome has a limit, and thousands may come back at once."""
LISTED = 100
"""Items of each list of the report that the outcome holds; the command line on the host itself prints them all."""


class CollectArgs(HostArgs):
    """Arguments of store.collect."""

    dry_run: bool = Field(default=False, description="say what would go; nothing is opened for writing")
    empty_trash: bool = Field(default=False, description="delete what is in the trash now, and give up undelete")
    forget_orphans: list[str] = Field(default=[], max_length=LISTED, description="ids of orphans to give up")


class UndeleteArgs(HostArgs):
    """Arguments of store.undelete."""

    workspace: WorkspaceId = Field(description="id of a workspace, registered or not")
    ref: str | None = Field(default=None, description="name or digest; null: everything of it that is in the trash")


@job_task(name=COLLECT_TASK, args=CollectArgs, queue="host", lane=COLLECT_LANE, time_limit=7200, soft_time_limit=7140)
def collect_store(ctx: JobContext, args: CollectArgs) -> Outcome:
    """Move what nothing refers to into the trash, and delete what has been there for its time."""
    from mothball.store.collect import collect

    settings, facts = ctx.settings, StoreFacts(ctx.registry.workspaces, ctx.host, ctx.registry.crashes)
    before = {} if args.dry_run else patiently(lambda: ctx.registry.budget.stored(ctx.host))
    report = collect(
        _store(settings),
        grace_s=settings.collect_grace_seconds,
        trash_s=settings.trash_seconds,
        tombstone_s=settings.tombstone_seconds,
        facts=facts,
        dry_run=args.dry_run,
        empty_trash=args.empty_trash,
        forget_orphans=args.forget_orphans,
        reserve_bytes=settings.reserve_bytes,
        progress=ctx.checkpoint,
    )
    if not args.dry_run:
        patiently(
            lambda: ctx.registry.hosts.note_collected(
                ctx.host, moved=report.moved_blobs, moved_bytes=report.moved_bytes, deleted=report.deleted_blobs,
                freed_bytes=report.deleted_bytes, layouts=len(report.removed),
            )
        )  # fmt: skip
        found = {usage.name: usage.charged for usage in report.workspaces}
        patiently(lambda: ctx.registry.budget.measure(ctx.host, before, found))
    log.info(
        "collected", dry_run=args.dry_run, moved=report.moved_bytes, deleted=report.deleted_bytes, waiting=report.waiting_bytes,
        trash=report.trash_bytes, missing=len(report.missing), orphans=len(report.orphans), seconds=report.seconds,
    )  # fmt: skip
    for digest, ref in report.missing[:LISTED]:
        log.error("a blob is missing", blob=digest, ref=ref)
    return Outcome(result=report.to_dict(LISTED))


@job_task(name="store.undelete", args=UndeleteArgs, queue="host", time_limit=180, soft_time_limit=120)
def undelete_refs(ctx: JobContext, args: UndeleteArgs) -> Outcome:
    """Bring captures that were forgotten, or whose workspace was released, back from the trash of this host."""
    from mothball.store.trash import undelete

    store = _store(ctx.settings)
    # On a full disk too: what comes back needs no room but for its index.
    reserve = Reserve(store, ctx.settings.reserve_bytes)
    back = reserve.spend_when_full(lambda: undelete(store, args.workspace, args.ref))
    count = len(snapshots(store.refs(args.workspace)))
    registered = patiently(lambda: ctx.registry.workspaces.note_snapshots(args.workspace, ctx.host, count))
    refs = [{"was": each.was, "name": each.name, "digest": each.digest, "problem": each.problem} for each in back]
    refs.sort(key=lambda each: not each["problem"])  # what could not come back is what must be said
    names = [each.name for each in back if each.name]
    patiently(lambda: ctx.registry.events.add("workspace.undeleted", workspace=args.workspace, refs=names, host=ctx.host))
    log.info("undeleted", of=args.workspace, refs=names, registered=registered)
    more = max(0, len(refs) - UNDELETED_LISTED)
    return Outcome(
        result={"workspace": args.workspace, "refs": refs[:UNDELETED_LISTED], "refs_more": more, "registered": registered}
    )


def _store(settings: Settings) -> Store:
    return Store(settings.store_dir, fsync=settings.fsync)


@sweep_task(name="maintenance.collect", every=lambda settings: settings.collect_seconds, soft_time_limit=45, time_limit=60)
def collect_all(here: Services) -> dict[str, Any]:
    """Ask every host that is online to collect its store, and heal the budget of what nobody else can free."""
    here.registry.budget.heal()
    return ask_hosts(here, COLLECT_TASK, {"dry_run": False}, COLLECT_LANE)
