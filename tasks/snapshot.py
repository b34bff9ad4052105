"""Snapshots: number a capture, protect it, forget it; and the retention that forgets by rule."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import structlog
from pydantic import BaseModel, ConfigDict, Field

from mothball.errors import InvalidParams, NotFound
from mothball.settings import Settings
from mothball.store import RefIndex, Store
from mothball.store.reserve import Reserve
from mothball.store.retain import Retained, retain
from mothball.store.snapshots import SnapshotResult, add_snapshot, as_snapshot, check_label, check_note, mark_all, snapshots
from mothball.store.snapshots import forget as forget_snapshots
from tasks.capture import CaptureArgs, CaptureOptions, capture_now, hard_limit, soft_limit
from tasks.context import JobContext, patiently
from tasks.hosts import HostArgs, ask_hosts
from tasks.job import Outcome, job_task
from tasks.services import Services
from tasks.spec import WorkspaceId
from tasks.sweep import sweep_task

log = structlog.stdlib.get_logger("mothball.snapshot")

RETAIN_TASK, RETAIN_LANE = "store.retain", "retain"
MAX_NAMED = 1000
_SHORT_SOFT, _SHORT_HARD = 120, 180
"""Seconds for a change of one index: a few file operations, and a lock that others hold for as little."""
_RETAIN_SOFT, _RETAIN_HARD = 1700, 1800


class SnapshotArgs(CaptureArgs):
    """Arguments of workspace.snapshot; those of a capture count only with `fresh`."""

    fresh: bool = Field(default=False, description="capture first, in the same job")
    label: str = Field(default="", description="one line that names it")
    note: str = Field(default="", description="text kept with it")
    keep: bool = Field(default=False, description="retention never takes it")


class _NamedSnapshots(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    workspace: WorkspaceId = Field(description="id of a registered workspace")
    snapshots: list[str] = Field(min_length=1, max_length=MAX_NAMED, description="names, such as snap-3")


class KeepArgs(_NamedSnapshots):
    """Arguments of workspace.keep; null leaves what is there."""

    keep: bool | None = Field(default=True, description="set the keep flag, or lift it")
    label: str | None = Field(default=None, description="a new label")
    note: str | None = Field(default=None, description="a new note")


class ForgetArgs(_NamedSnapshots):
    """Arguments of workspace.forget."""

    reason: str = Field(default="", max_length=500, description="why, for the trash and the event")


class RetainArgs(HostArgs):
    """Arguments of store.retain."""

    dry_run: bool = Field(default=False, description="say what would go and why; change nothing")
    workspace: WorkspaceId | None = Field(default=None, description="only this workspace")


@job_task(name="workspace.snapshot", args=SnapshotArgs, queue="host", time_limit=hard_limit, soft_time_limit=soft_limit)
def snapshot(ctx: JobContext, args: SnapshotArgs) -> Outcome:
    """Give the workspace's current capture (with `fresh`: the one made now) the next number (B-41)."""
    check_label(args.label)  # before an hour's capture, not after it
    check_note(args.note)
    captured, record = None, None
    if args.fresh:
        captured, record = capture_now(ctx, args)
        refs = _store(ctx.settings).refs(args.workspace)
    elif args.full or args.verify or args.paths is not None or args.options != CaptureOptions():
        raise InvalidParams("paths, full, verify and options say how to capture, and without `fresh` nothing is captured")
    else:
        # The layout may be that of an earlier life under the same id, in another directory: its latest is nobody's now.
        if patiently(lambda: ctx.registry.workspaces.get(args.workspace)).digest is None:
            raise _uncaptured(ctx, args.workspace)
        refs = _fenced(ctx, args.workspace)
    ctx.checkpoint("snapshot")
    ref = add_snapshot(
        refs,
        fence=ctx.fence,
        job=ctx.job.id,
        at_ms=patiently(ctx.registry.time_ms),
        label=args.label,
        note=args.note,
        keep=args.keep,
    )
    _note(ctx, refs, made=ref.name, digest=ref.digest)
    made = as_snapshot(ref)
    log.info("snapshotted", snapshot=made.name, digest=made.digest, generation=made.generation, keep=made.keep)
    result = SnapshotResult(**made.to_dict(), workspace=args.workspace, captured=captured.to_dict() if captured else None)
    return Outcome(result=result.to_dict(), record=record)


@job_task(name="workspace.keep", args=KeepArgs, queue="host", time_limit=_SHORT_HARD, soft_time_limit=_SHORT_SOFT, blames=False)
def keep(ctx: JobContext, args: KeepArgs) -> Outcome:
    """Set or lift the keep flag of snapshots, or change their texts; all of them or none."""
    refs = _fenced(ctx, args.workspace)
    marked = mark_all(refs, args.snapshots, keep=args.keep, label=args.label, note=args.note, fence=ctx.fence, job=ctx.job.id)
    log.info("marked", snapshots=[each.name for each in marked], keep=args.keep)
    names = [each.name for each in marked]  # not what is said of them: a thousand would be more than an outcome holds
    return Outcome(result={"workspace": args.workspace, "snapshots": names})


@job_task(name="workspace.forget", args=ForgetArgs, queue="host", time_limit=_SHORT_HARD, soft_time_limit=_SHORT_SOFT, blames=False)
def forget(ctx: JobContext, args: ForgetArgs) -> Outcome:
    """Take snapshots out of the workspace's index; they stay in the trash for a while. It works on a full disk."""
    refs = _reserve(ctx).spend_when_full(lambda: _fenced(ctx, args.workspace))
    reason = f"forgotten: {args.reason}" if args.reason else "forgotten"
    done = _reserve(ctx).spend_when_full(
        partial(
            forget_snapshots, _store(ctx.settings), args.workspace, args.snapshots, reason=reason,
            at_ms=patiently(ctx.registry.time_ms), fence=ctx.fence, job=ctx.job.id,
        )
    )  # fmt: skip
    gone = [each.name for each in done.gone]
    _note(ctx, refs, forgotten=gone, reason=reason)
    log.info("forgotten", snapshots=gone, already=len(done.already))
    return Outcome(result={"workspace": args.workspace, "forgotten": gone, "already": done.already})


@job_task(name=RETAIN_TASK, args=RetainArgs, queue="host", lane=RETAIN_LANE, time_limit=_RETAIN_HARD, soft_time_limit=_RETAIN_SOFT)
def retain_store(ctx: JobContext, args: RetainArgs) -> Outcome:
    """Apply to each workspace of this host the retention of its own policy, else that of the settings."""
    registry = ctx.registry
    wanted = patiently(lambda: list(registry.retentions.of_host(ctx.host, args.workspace)))
    store = _store(ctx.settings)

    places = {workspace: place for place, (workspace, _) in enumerate(wanted, 1)}

    def each(workspace: str) -> None:
        ctx.checkpoint("retain", current=places[workspace], total=len(wanted))

    def done(retained: Retained) -> None:
        if not args.dry_run:
            gone = [taken.name for taken in retained.taken]
            patiently(
                lambda: registry.workspaces.note_snapshots(
                    retained.workspace, ctx.host, retained.count, forgotten=gone, reason=f"retention {retained.policy}"
                )
            )

    now_ms = patiently(registry.time_ms)
    report = retain(store, wanted, now_ms=now_ms, dry_run=args.dry_run, reserve=_reserve(ctx), each=each, done=done)
    for workspace, error in report.failed:
        log.warning("retention failed", workspace=workspace, error=error)
    log.info("retained", workspaces=report.workspaces, removed=report.removed, failed=len(report.failed), dry_run=args.dry_run)
    return Outcome(result=report.to_dict())


def _store(settings: Settings) -> Store:
    return Store(settings.store_dir, fsync=settings.fsync)


def _reserve(ctx: JobContext) -> Reserve:
    return Reserve(_store(ctx.settings), ctx.settings.reserve_bytes)


def _fenced(ctx: JobContext, workspace: str) -> RefIndex:
    """The index of a workspace that has captures here, with this run's fence taken; raises `NotFound`, `LeaseLost`."""
    refs = _store(ctx.settings).refs(workspace)
    if not refs.exists:
        raise _uncaptured(ctx, workspace)
    refs.take_fence(ctx.fence, ctx.job.id)
    return refs


def _uncaptured(ctx: JobContext, workspace: str) -> NotFound:
    return NotFound(
        f"workspace {workspace!r} has no capture on host {ctx.host!r} yet; a fresh snapshot (--fresh) makes one first",
        what="capture",
        id=workspace,
    )


def _note(
    ctx: JobContext, refs: RefIndex, *, made: str = "", digest: str = "", forgotten: Sequence[str] = (), reason: str = ""
) -> None:
    """Tell the registry how many snapshots there are now, from the index as it is."""
    count = len(snapshots(refs))
    patiently(
        lambda: ctx.registry.workspaces.note_snapshots(
            refs.workspace, ctx.host, count, made=made, digest=digest, job=ctx.job.id, forgotten=forgotten, reason=reason
        )
    )


@sweep_task(name="maintenance.retain", every=lambda settings: settings.retain_seconds, soft_time_limit=45, time_limit=60)
def retain_all(here: Services) -> dict[str, Any]:
    """Ask every host that is online to apply retention to its store."""
    return ask_hosts(here, RETAIN_TASK, {"dry_run": False}, RETAIN_LANE)
