"""workspace.capture: the content of a workspace, stored as the next generation of its OCI image."""

from __future__ import annotations

from typing import Any, Literal

import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mothball.admission import admit
from mothball.capture import CaptureRequest, CaptureResult
from mothball.errors import InvalidParams
from mothball.registry.kept import kept_record
from mothball.settings import Settings
from tasks.context import JobContext, patiently
from tasks.job import Outcome, job_task
from tasks.spec import WorkspaceId, condense

log = structlog.stdlib.get_logger("mothball.capture")
_SOFT_MARGIN_SECONDS = 60
_STEP_BYTES = 1024**2
"""Least by which the promise of a capture grows while it writes."""


class CaptureOptions(BaseModel):
    """Overrides of the host's capture settings for one workspace or one capture; unset ones follow the settings."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    profile: Literal["full", "light"] | None = None
    max_file_bytes: int | None = Field(default=None, ge=0)
    max_total_bytes: int | None = Field(default=None, ge=0)
    max_files: int | None = Field(default=None, ge=1)
    use_gitignore: bool | None = None
    exclude_caches: bool | None = None
    one_file_system: bool | None = None
    owner: Literal["captured", "clamp"] | None = None
    ignore: list[str] | None = None


class CaptureArgs(BaseModel):
    """Arguments of workspace.capture."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    workspace: WorkspaceId = Field(description="id of a registered workspace")
    paths: list[str] | None = Field(default=None, description="read these again even if their stat says unchanged")
    full: bool = Field(default=False, description="write one fresh layer instead of a difference")
    verify: bool = Field(default=False, description="read back what was written")
    options: CaptureOptions = CaptureOptions()


def hard_limit(settings: Settings) -> int:
    """Hard time limit of a capture, seconds."""
    return settings.capture_time_limit


def soft_limit(settings: Settings) -> int:
    """Soft time limit of a capture, seconds: a minute to record why, or half of a limit shorter than two minutes."""
    return settings.capture_time_limit - min(_SOFT_MARGIN_SECONDS, settings.capture_time_limit // 2)


@job_task(
    name="workspace.capture", args=CaptureArgs, queue="host", lane="capture", time_limit=hard_limit, soft_time_limit=soft_limit
)
def capture(ctx: JobContext, args: CaptureArgs) -> Outcome:
    """Capture the workspace into this host's store and record the new generation, if anything changed."""
    result, record = capture_now(ctx, args)
    return Outcome(result=result.to_dict(), record=record)


def capture_now(ctx: JobContext, args: CaptureArgs, *, admission: bool = True) -> tuple[CaptureResult, dict[str, Any]]:
    """The capture itself, under the fence of the running job: its result, and what the workspace's record has to say of it.

    For every job that begins with a capture. The record's fields belong into that job's outcome. Without `admission` the fleet's
    budget is not asked: the last capture before a workspace is stopped or its directory goes must not fail for want of room.
    """
    # Here and not above: beat and Flower import this module too and never capture.
    from mothball.capture import capture_workspace

    workspace = ctx.registry.workspaces.get(args.workspace)
    parent = None
    if workspace.repo and not workspace.digest:
        parent = ctx.registry.workspaces.latest_of_repo(workspace.repo, ctx.host, exclude=workspace.id)
    result = capture_workspace(
        CaptureRequest(
            workspace=workspace.id,
            path=workspace.path,
            repo=workspace.repo or None,
            job=ctx.job.id,
            fence=ctx.fence,
            paths=tuple(args.paths) if args.paths is not None else None,
            full=args.full,
            verify=args.verify,
            parent_candidate=parent,
            options=merged_options(workspace.policy, args.options),
            host=ctx.host,
            generation_floor=workspace.generation,
            record=kept_record(workspace),
        ),
        ctx.settings,
        checkpoint=_Gate(ctx, workspace.id, _budget(ctx) if admission else None),
    )
    record = {
        "generation": result.generation,
        "digest": result.digest,
        "bytes": result.bytes,
        "files": result.files,
        "stored_bytes": result.stored_bytes,
    }
    log.info(
        "captured", repo=workspace.repo, number=workspace.number, changed=result.changed, **record, added=result.added,
        modified=result.modified, deleted=result.deleted, omitted=result.omitted, torn=len(result.torn), seconds=result.seconds,
    )  # fmt: skip
    return result, record


def _budget(ctx: JobContext) -> int | None:
    """The fleet's byte budget, None when there is none. By a policy that nobody can read no capture is refused."""
    try:
        return patiently(ctx.registry.policies.book).fleet_policy().budget
    except InvalidParams as error:
        log.warning("the fleet's policy cannot be read; captured without a budget", error=error.message)
        return None


class _Gate:
    """The checkpoints of a capture, and the budget at each of them: promised before the first byte is written, and again before
    ``latest`` moves when more was written than promised, so that a capture over the budget leaves the last good one alone (Q-15).
    """

    def __init__(self, ctx: JobContext, workspace: str, limit: int | None) -> None:
        self._ctx = ctx
        self._workspace = workspace
        self._limit = limit
        self._promised = 0

    def __call__(self, name: str, progress: dict[str, Any]) -> None:
        self._ctx.checkpoint(name, **progress)
        if self._limit is None:
            return
        need = int(progress.get("need_bytes" if name == "plan" else "stored_bytes", 0))
        if need <= self._promised or (name not in {"plan", "publish"} and self._reserved_ahead(need, self._limit)):
            return
        self._admit(need, self._limit)

    def _reserved_ahead(self, need: int, limit: int) -> bool:
        """More than `need`, so that a capture that outgrows its promise need not ask at every frame; nobody is evicted for that."""
        ahead = need + max(_STEP_BYTES, need // 4)
        budget, job = self._ctx.registry.budget, self._ctx.job.id
        if patiently(lambda: budget.reserve(job, self._ctx.fence, bytes=ahead, limit=limit)).ok:
            self._promised = ahead
        return self._promised >= need

    def _admit(self, need: int, limit: int) -> None:
        admitted = patiently(
            lambda: admit(
                self._ctx.registry, job=self._ctx.job.id, fence=self._ctx.fence, workspace=self._workspace, need=need, limit=limit,
                look=lambda: self._ctx.checkpoint("budget"),
            )
        )  # fmt: skip
        self._promised = need
        if admitted.evicted:
            log.info("evicted to make room", evicted=admitted.evicted[:20], count=len(admitted.evicted), need=need)


def merged_options(policy: dict[str, Any], options: CaptureOptions) -> dict[str, Any]:
    """The workspace's own capture options, overridden by those of this request; raises `InvalidParams` for a wrong policy."""
    try:
        defaults = CaptureOptions.model_validate(policy.get("capture", {}))
    except ValidationError as error:
        raise InvalidParams(f"the workspace's capture policy: {condense(error)}") from None
    return {**defaults.model_dump(exclude_none=True), **options.model_dump(exclude_none=True)}
