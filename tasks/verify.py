"""Verification of a host's store: is everything there that the captures refer to, and is it what was written?"""

from __future__ import annotations

from typing import Any, Literal

import structlog
from pydantic import Field

from mothball.capture.listing import RESULT_BYTES, fitting
from mothball.settings import Settings
from mothball.store import Store
from tasks.context import JobContext, patiently
from tasks.hosts import HostArgs, ask_hosts
from tasks.job import Outcome, job_task
from tasks.services import Services
from tasks.spec import WorkspaceId
from tasks.sweep import sweep_task

log = structlog.stdlib.get_logger("mothball.verify")

VERIFY_TASK, VERIFY_LANE = "store.verify", "verify"
NAMED = 20
"""Damaged blobs, and captures, that the event and the log name; the outcome has more."""
REFS = 100
"""Captures that the outcome names for one blob."""
_SOFT_MARGIN_SECONDS = 60


class VerifyArgs(HostArgs):
    """Arguments of store.verify."""

    workspace: WorkspaceId | None = Field(default=None, description="only the captures of this workspace")
    level: Literal["structure", "sample", "deep", "content"] = Field(default="structure", description="how much is read")
    sample_percent: float | None = Field(
        default=None, gt=0, le=100, description="share of the bytes of level sample; null: the setting"
    )
    seed: int | None = Field(default=None, ge=0, description="chooses the sample; null: any")
    repair_from: str | None = Field(default=None, description="REGISTRY/REPO from which damaged blobs are fetched again")


def hard_limit(settings: Settings) -> int:
    """Hard time limit of a verification, seconds."""
    return settings.transfer_time_limit


def soft_limit(settings: Settings) -> int:
    """Soft time limit of a verification, seconds: a minute less, or half of a limit shorter than two minutes."""
    return settings.transfer_time_limit - min(_SOFT_MARGIN_SECONDS, settings.transfer_time_limit // 2)


@job_task(name=VERIFY_TASK, args=VerifyArgs, queue="host", lane=VERIFY_LANE, time_limit=hard_limit, soft_time_limit=soft_limit)
def verify_store(ctx: JobContext, args: VerifyArgs) -> Outcome:
    """Check the store of this host; damage is in the outcome, in an event and in the log, and does not fail the job."""
    from mothball.package.mend import verify_and_repair

    settings = ctx.settings
    verified = verify_and_repair(
        Store(settings.store_dir, fsync=settings.fsync),
        settings,
        args.workspace,
        args.level,
        sample=args.sample_percent or settings.verify_sample_percent,
        seed=args.seed,
        source=args.repair_from,
        progress=lambda **counts: ctx.checkpoint(str(counts.pop("step", "verify")), **counts),
    )
    report = verified.report
    if report.problems:
        digests = sorted({problem.digest for problem in report.problems if problem.digest})
        refs = sorted({ref for problem in report.problems for ref in problem.refs})
        patiently(
            lambda: ctx.registry.events.add(
                "store.damaged",
                host=ctx.host,
                problems=len(report.problems),
                blobs=digests[:NAMED],
                refs=refs[:NAMED],
                level=args.level,
            )
        )
        for problem in report.problems[:NAMED]:
            log.error("damaged", blob=problem.digest, refs=problem.refs[:NAMED], reason=problem.reason)
    repaired = verified.repair.repaired if verified.repair else []
    if repaired:
        patiently(lambda: ctx.registry.events.add("store.repaired", host=ctx.host, blobs=repaired[:NAMED], source=args.repair_from))
    log.info(
        "verified", level=args.level, blobs=report.checked, bytes=report.bytes, hashed_bytes=report.hashed_bytes,
        problems=len(report.problems), repaired=len(repaired),
    )  # fmt: skip
    return Outcome(result=_bounded(verified.to_dict()))


def _bounded(result: dict[str, Any]) -> dict[str, Any]:
    """`result` as Redis can hold it: each list cut, with the number of what is missing beside it."""
    for problem in result["problems"]:
        refs = fitting(problem["refs"][:REFS], RESULT_BYTES // 8)
        problem["refs"], problem["refs_more"] = refs, len(problem["refs"]) - len(refs)
    for name in ("problems", "repaired", "unrepaired"):
        whole = result[name]
        result[name] = fitting(whole, RESULT_BYTES)
        result[f"{name}_more"] = len(whole) - len(result[name])
    return result


@sweep_task(name="maintenance.verify", every=lambda settings: settings.verify_seconds, soft_time_limit=45, time_limit=60)
def verify_all(here: Services) -> dict[str, Any]:
    """Ask every host that is online to verify a sample of its store."""
    return ask_hosts(here, VERIFY_TASK, {"level": "sample"}, VERIFY_LANE)
