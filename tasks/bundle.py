"""workspace.bundle: a capture as a directory that runc starts, on the workspace's host."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import structlog
from pydantic import BaseModel, ConfigDict, Field

from mothball.package.bundle_spec import MAX_ARGS
from mothball.store import Store
from mothball.store.refs import LATEST
from tasks.context import JobContext
from tasks.job import Outcome, job_task
from tasks.restore import MAX_PATH, MAX_REFERENCE, hard_limit, soft_limit
from tasks.spec import WorkspaceId

log = structlog.stdlib.get_logger("mothball.bundle")


class BundleArgs(BaseModel):
    """Arguments of workspace.bundle."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    workspace: WorkspaceId = Field(description="id of a registered workspace")
    ref: str = Field(default=LATEST, description="which capture: latest, snap-3, a crash report or a digest")
    to: str = Field(max_length=MAX_PATH, description="new directory on that host, below one of its workspace roots")
    rootless: bool = Field(default=False, description="for the user of the worker instead of root")
    base: str | None = Field(default=None, max_length=MAX_REFERENCE, description="OCI image around the workspace")
    command: list[str] = Field(default=[], max_length=MAX_ARGS, description="what it starts")
    writable: bool = Field(default=False, description="the command may write into rootfs")


@job_task(name="workspace.bundle", args=BundleArgs, queue="host", time_limit=hard_limit, soft_time_limit=soft_limit, blames=False)
def bundle(ctx: JobContext, args: BundleArgs) -> Outcome:
    """Write a capture of the workspace as a runtime bundle to a new directory of its host."""
    from mothball.package.base import open_base
    from mothball.package.bundle import check_place, scratch_dir, write_bundle
    from mothball.package.target import scratch_folder

    store = Store(ctx.settings.store_dir, fsync=ctx.settings.fsync)
    roots = ctx.settings.workspace_roots
    check_place(Path(args.to), store, roots)  # before a base image is fetched for an hour
    ref = store.refs(args.workspace).get(args.ref)

    def report(*, step: str, **counts: Any) -> None:
        ctx.checkpoint(step, **counts)

    with ExitStack() as stack:
        base = None
        if args.base is not None:
            folder = stack.enter_context(scratch_folder(scratch_dir(ctx.settings.data_dir) / "base"))
            base = stack.enter_context(open_base(args.base, ctx.settings, folder, report, roots=roots))
        result = write_bundle(
            store, ref.digest, Path(args.to), command=args.command, rootless=args.rootless, writable=args.writable, base=base,
            roots=roots, tick=report,
        )  # fmt: skip
    log.info("bundle written", path=result.path, digest=result.digest, files=result.files, bytes=result.bytes)
    return Outcome(result={"workspace": args.workspace, "ref": ref.name, **msgspec.to_builtins(result)})
