"""workspace.push and workspace.pull: captures to a registry and back, as jobs of the workspace's host."""

from __future__ import annotations

from typing import Any

import msgspec
import structlog
from pydantic import BaseModel, ConfigDict, Field

from mothball.registry import Workspace
from mothball.registry.kept import kept_record
from mothball.settings import Settings
from mothball.store import Store
from mothball.store.manifest import PREFIX, load_config, load_manifest
from mothball.store.refs import LATEST, Ref, RefIndex
from mothball.store.snapshots import add_snapshot, as_snapshot, check_label, clean_states, snapshots
from tasks.context import JobContext, patiently
from tasks.job import Outcome, job_task
from tasks.spec import WorkspaceId

log = structlog.stdlib.get_logger("mothball.transfer")
PULLED_FROM = PREFIX + "pulled-from"
MAX_REFERENCE = 1000
MAX_GIT = 64 * 1024
"""Characters of a pulled image's git state that an index keeps."""
MAX_DIGITS = 18
"""Digits of a pulled image's counts: what 64 bits hold."""
_SOFT_MARGIN_SECONDS = 60


class _TransferArgs(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    workspace: WorkspaceId = Field(description="id of a registered workspace")


class PushArgs(_TransferArgs):
    """Arguments of workspace.push."""

    ref: str = Field(default=LATEST, description="which capture: latest, snap-3 or a digest")
    to: str = Field(max_length=MAX_REFERENCE, description="where to, REGISTRY/REPO:TAG")


class PullArgs(_TransferArgs):
    """Arguments of workspace.pull."""

    reference: str = Field(max_length=MAX_REFERENCE, description="what, REGISTRY/REPO:TAG or REGISTRY/REPO@sha256:...")
    label: str = Field(default="", description="one line that names the snapshot")


def hard_limit(settings: Settings) -> int:
    """Hard time limit of a push or pull, seconds."""
    return settings.transfer_time_limit


def soft_limit(settings: Settings) -> int:
    """Soft time limit, seconds: a minute to record why, or half of a limit shorter than two minutes."""
    return settings.transfer_time_limit - min(_SOFT_MARGIN_SECONDS, settings.transfer_time_limit // 2)


@job_task(name="workspace.push", args=PushArgs, queue="host", time_limit=hard_limit, soft_time_limit=soft_limit, blames=False)
def push(ctx: JobContext, args: PushArgs) -> Outcome:
    """Bring a capture of the workspace to a registry; what is there already is not sent."""
    # Here and not above: beat and Flower import this module too and never speak to a registry of images.
    from mothball.package.remote import push as push_capture

    store = Store(ctx.settings.store_dir, fsync=ctx.settings.fsync)
    ref = store.refs(args.workspace).get(args.ref)
    ctx.checkpoint("push", ref=ref.name)
    pushed = push_capture(store, ref.digest, args.to, ctx.settings, progress=_reporter(ctx))
    result = {"workspace": args.workspace, "ref": ref.name, **msgspec.structs.asdict(pushed)}
    log.info("pushed", **{key: value for key, value in result.items() if key != "workspace"})
    return Outcome(result=result)


@job_task(name="workspace.pull", args=PullArgs, queue="host", time_limit=hard_limit, soft_time_limit=soft_limit, blames=False)
def pull(ctx: JobContext, args: PullArgs) -> Outcome:
    """Bring a capture from a registry into this host's store, as the workspace's next snapshot."""
    from mothball.package.remote import pull as pull_capture

    check_label(args.label)  # before an hour's transfer, not after it
    workspace = ctx.registry.workspaces.get(args.workspace)
    store = Store(ctx.settings.store_dir, fsync=ctx.settings.fsync)
    store.prepare()
    refs = store.refs(args.workspace)
    refs.prepare()
    refs.take_fence(ctx.fence, ctx.job.id)
    ctx.checkpoint("pull")
    pulled = pull_capture(store, args.reference, ctx.settings, progress=_reporter(ctx))
    ctx.checkpoint("snapshot")
    source = Ref("", pulled.digest, pulled.size, {**_annotations(store, pulled.digest, workspace), PULLED_FROM: pulled.reference})
    ref = add_snapshot(
        refs, fence=ctx.fence, job=ctx.job.id, at_ms=patiently(ctx.registry.time_ms), label=args.label, source=source
    )
    _note(ctx, refs, ref)
    made = as_snapshot(ref)
    moved = {"reference": pulled.reference, "fetched": pulled.fetched, "skipped": pulled.skipped, "received": pulled.bytes}
    log.info("pulled", snapshot=made.name, digest=made.digest, **moved)
    return Outcome(result={"workspace": args.workspace, **made.to_dict(), **moved})


def _annotations(store: Store, digest: str, workspace: Workspace) -> dict[str, str]:
    """What the image says of itself, for listings, checked for its form only, as it comes from elsewhere; and whose it is now:
    a registry that is lost is made again from these notes, also for a workspace that was never captured itself."""
    manifest = load_manifest(store.blobs, digest)
    config = load_config(store.blobs, manifest).get("config")
    labels = config.get("Labels") if isinstance(config, dict) else None
    label = labels.get(PREFIX + "git") if isinstance(labels, dict) else None
    git = clean_states(label, MAX_GIT)
    if label is not None and not git:
        log.warning("pulled without its git state", manifest=digest, reason="the image's label is none, or too large")
    found = {PREFIX + key: manifest.annotations.get(PREFIX + key, "") for key in ("files", "bytes")}
    counts = {key: text for key, text in found.items() if text.isascii() and text.isdecimal() and len(text) <= MAX_DIGITS}
    state = {PREFIX + "git": git} if git else {}
    mine = {"workspace": workspace.id, "repo": workspace.repo or "", "host": workspace.host, "record": kept_record(workspace)}
    return {**{PREFIX + key: value for key, value in mine.items()}, **counts, **state}


def _note(ctx: JobContext, refs: RefIndex, ref: Ref) -> None:
    count = len(snapshots(refs))
    patiently(
        lambda: ctx.registry.workspaces.note_snapshots(
            refs.workspace, ctx.host, count, made=ref.name, digest=ref.digest, job=ctx.job.id
        )
    )


def _reporter(ctx: JobContext) -> Any:
    """A transfer's progress as checkpoints of the job; a new step asks the registry, the rest is throttled."""

    def report(*, step: str = "", **fields: Any) -> None:
        ctx.checkpoint(step or "transfer", **fields)

    return report
