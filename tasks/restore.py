"""workspace.restore and store.restore: a capture as a directory, on the workspace's host or, from a registry, on any host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import structlog
from pydantic import BaseModel, ConfigDict, Field

from mothball.errors import LeaseLost, MothballError
from mothball.settings import Settings
from mothball.store import Store
from mothball.store.refs import LATEST
from tasks.context import JobContext
from tasks.hosts import HostArgs
from tasks.job import Outcome, job_task
from tasks.spec import WorkspaceId

log = structlog.stdlib.get_logger("mothball.restore")
MAX_PATH = 4096
MAX_REFERENCE = 1000
_SOFT_MARGIN_SECONDS = 60


class _Where(BaseModel):
    """What both jobs take: where to, what of the capture, and what happens to what is there."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    to: str = Field(max_length=MAX_PATH, description="directory on that host, below one of its workspace roots")
    include: list[str] = Field(default=[], description="only what these patterns choose")
    overwrite: Literal["never", "changed", "always"] | None = Field(default=None, description="for a target with content")
    delete_extra: bool = Field(default=False, description="delete what the capture does not have")
    dry_run: bool = Field(default=False, description="say what would be done")


class RestoreArgs(_Where):
    """Arguments of workspace.restore."""

    workspace: WorkspaceId = Field(description="id of a registered workspace")
    ref: str = Field(default=LATEST, description="which capture: latest, snap-3 or a digest")


class HostRestoreArgs(_Where, HostArgs):
    """Arguments of store.restore."""

    source: str = Field(max_length=MAX_REFERENCE, description="what, REGISTRY/REPO:TAG or REGISTRY/REPO@sha256:...")


def hard_limit(settings: Settings) -> int:
    """Hard time limit of a restore, seconds."""
    return settings.transfer_time_limit


def soft_limit(settings: Settings) -> int:
    """Soft time limit, seconds: a minute to record why, or half of a limit shorter than two minutes."""
    return settings.transfer_time_limit - min(_SOFT_MARGIN_SECONDS, settings.transfer_time_limit // 2)


@job_task(name="workspace.restore", args=RestoreArgs, queue="host", time_limit=hard_limit, soft_time_limit=soft_limit, blames=False)
def restore(ctx: JobContext, args: RestoreArgs) -> Outcome:
    """Write a capture of the workspace to a directory of its host."""
    store = Store(ctx.settings.store_dir, fsync=ctx.settings.fsync)
    with _given_up(ctx, args):
        ref = store.refs(args.workspace).get(args.ref)
        return Outcome(result={"workspace": args.workspace, "ref": ref.name, **_restore(ctx, store, ref.digest, args)})


@job_task(name="store.restore", args=HostRestoreArgs, queue="host", time_limit=hard_limit, soft_time_limit=soft_limit)
def store_restore(ctx: JobContext, args: HostRestoreArgs) -> Outcome:
    """Fetch a capture from a registry and write it to a directory of this host; no workspace and no ref is made for it."""
    from mothball.package.remote import pull
    from mothball.store.restore import check_target

    check_target(Path(args.to), roots=ctx.settings.workspace_roots, store=ctx.settings.store_dir)  # before an hour's transfer
    store = Store(ctx.settings.store_dir, fsync=ctx.settings.fsync)
    store.prepare()

    def report(*, step: str = "pull", **counts: Any) -> None:
        ctx.checkpoint(step, **counts)

    with _given_up(ctx, args):
        pulled = pull(store, args.source, ctx.settings, progress=report)
        return Outcome(result={"host": ctx.host, "source": pulled.reference, **_restore(ctx, store, pulled.digest, args)})


def _restore(ctx: JobContext, store: Store, digest: str, args: _Where) -> dict[str, Any]:
    # Here and not above: beat and Flower import this module too and never restore.
    from mothball.store.restore import bounded
    from mothball.store.restore import restore as restore_tree
    from mothball.store.tree import Tree

    with Tree.open(store, digest) as tree:
        result = restore_tree(
            tree, Path(args.to), include=tuple(args.include), overwrite=args.overwrite, delete_extra=args.delete_extra,
            dry_run=args.dry_run, progress=lambda step, counts: ctx.checkpoint(step, **counts),
            roots=ctx.settings.workspace_roots, by=ctx.job.id,
        )  # fmt: skip
    counts = {key: value for key, value in result.to_dict().items() if key not in {"actions", "target", "digest"}}
    log.info("restored", target=result.target, digest=digest, **counts)
    return bounded(result).to_dict()


@contextmanager
def _given_up(ctx: JobContext, args: _Where) -> Iterator[None]:
    """Around all that may end the job: when it ends for good, what any of its runs left beside the target is removed."""
    try:
        yield
    except LeaseLost:
        raise  # another run of this job goes on with what was written
    except Exception as error:
        if _is_last(ctx, error) and not args.dry_run:
            _discard(Path(args.to), ctx)
        raise


def _is_last(ctx: JobContext, error: Exception) -> bool:
    """True when no further run of this job will go on with what was written."""
    final = isinstance(error, MothballError) and not error.retryable
    return final or ctx.job.attempts + 1 >= ctx.settings.max_attempts


def _discard(target: Path, ctx: JobContext) -> None:
    from mothball.store.restore import discard

    with suppress(MothballError, OSError):  # the error that ended the job is the one to tell
        if discard(target, roots=ctx.settings.workspace_roots, store=ctx.settings.store_dir, by=ctx.job.id):
            log.info("removed what was written so far", target=str(target))
