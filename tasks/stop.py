"""workspace.stop: evidence, a last capture, the end of its processes, state `stopped` (N-33, N-35). Nothing is deleted."""

from __future__ import annotations

import os
import time
from typing import Any

import structlog
from pydantic import Field

from mothball.capture import CaptureResult
from mothball.durations import ago
from mothball.errors import LeaseLost, PathNotAllowed, SourceMissing
from tasks.capture import hard_limit, soft_limit
from tasks.context import JobContext, patiently
from tasks.ending import EndArgs, Ending, captured_dict
from tasks.job import Outcome, job_task

log = structlog.stdlib.get_logger("mothball.stop")


class StopArgs(EndArgs):
    """Arguments of workspace.stop."""

    generation: int | None = Field(default=None, ge=0, description="the generation that was seen; null: any")
    last_active: int | None = Field(default=None, ge=0, description="the last sign of life that was seen, ms; null: any")


@job_task(name="workspace.stop", args=StopArgs, queue="host", lane="stop", time_limit=hard_limit, soft_time_limit=soft_limit)
def stop(ctx: JobContext, args: StopArgs) -> Outcome:
    """Stop the workspace, unless it was used since that was decided. A capture that fails stops nothing and fails the job."""
    ending = Ending(ctx, args)
    if ending.facts.state == "stopped":
        # A run that died between the effect and its outcome finds its own work; what it captured stands in the record.
        return _outcome(args, stopped=True, detail="it is stopped already")
    if kept := _kept(ending, args):
        log.info("not stopped", reason=kept)
        return _outcome(args, stopped=False, detail=kept)
    alive, evidence = ending.evidence()
    if not args.asked and alive.alive and (sign := _sign_of_life(ending)):
        log.info("not stopped", reason=sign)
        return _outcome(args, stopped=False, detail=sign)
    ctx.checkpoint("capture")
    captured, directory = _capture(ending)
    # Whatever happened during a long capture (a touch, a hold, a heartbeat) counts: this is the last moment in which it can.
    if kept := _kept(ending, args, again=True):
        log.info("not stopped", reason=kept)
        return _outcome(args, stopped=False, detail=kept, captured=captured)
    ctx.checkpoint("stop", alive=alive.alive)
    stopped = ending.end_processes()
    evidence |= {"how": stopped.how, **({"end": stopped.facts} if stopped.facts else {})}
    if stopped.how != "was_dead" and directory == "there":
        ctx.checkpoint("capture again")
        captured, directory = _capture(ending)
    seen = tuple(pair for pair in ending.facts.seen if pair[0] in {"registration", "runtime"})
    answer = patiently(
        lambda: ctx.registry.lifecycle.stopped(
            args.workspace, job=ctx.job.id, fence=ctx.fence, rule=args.rule, detail=args.detail, evidence=evidence, seen=seen,
            by=args.by or "somebody",
        )
    )  # fmt: skip
    if answer != "done":
        ending.look_again()
        if ending.runtime_since(seen):
            detail = "its processes are ended, and another runtime was registered meanwhile"
            return _outcome(args, stopped=False, detail=detail, captured=captured)
        if ending.facts.state == "active":
            raise LeaseLost(job=ctx.job.id)
        return _outcome(
            args, stopped=False, detail=f"its processes are ended; it is {ending.facts.state} by now", captured=captured
        )
    detail = args.detail or ("its directory is gone; only its processes were ended" if directory == "gone" else "")
    log.info("stopped", rule=args.rule, how=stopped.how, directory=directory)
    return _outcome(args, stopped=True, detail=detail, captured=captured, directory=directory, how=stopped.how, evidence=evidence)


def _kept(ending: Ending, args: StopArgs, *, again: bool = False) -> str:
    """Why a policy's stop is not done (any more); empty when it is. A person's is refused with an error instead."""
    if again:
        seen = ending.facts.seen
        ending.look_again()
        if not args.asked and ending.used_since(seen):
            return "it was used while its last capture was made"
        if ending.runtime_since(seen):
            ending.refuse("another runtime was registered while its last capture was made; ask again if that is to be stopped too")
    if args.asked:
        if ending.facts.state != "active":
            raise ending.not_in_state("stopped")
        if veto := ending.veto():
            ending.refuse(veto)
        return ""
    given = (("generation", args.generation), ("last_active", args.last_active))
    expected = [(name, str(value)) for name, value in given if value is not None]
    if not again and expected and patiently(lambda: ending.ctx.registry.lifecycle.begin_stop(args.workspace, expected)) != "done":
        return "it was used since that was decided"
    # What has expired is stopped too, before its record goes.
    return ending.decided_otherwise("stop", "evict")


def _capture(ending: Ending) -> tuple[CaptureResult | None, str]:
    """The capture and ``there``, or None and ``gone`` when there is no directory. Every other failure ends the stop."""
    try:
        return ending.capture(), "there"
    except SourceMissing as error:
        # Only when there is nothing: a folder that cannot be listed has content that nobody has captured.
        if os.path.lexists(ending.workspace.path):
            raise
        log.warning("its directory is gone", error=error.message)
        return None, "gone"


def _sign_of_life(ending: Ending) -> str:
    """What shows that it is in use although nobody said so: its processes compute, or its files change. That is then recorded."""
    policy = ending.policy
    limit = {"stop_after": policy.stop_after, "idle_ttl": policy.idle_ttl}.get(ending.args.rule)
    if limit is None:
        return ""  # age, a deadline and limits on all together do not ask whether it is in use
    if "cpu" in policy.signals and (percent := ending.computes()) is not None and percent >= policy.cpu_busy:
        _touch(ending, "cpu")
        return f"its processes compute ({percent:.0f} % of a core)"
    if "file" in policy.signals:
        age = _youngest_ms(ending)
        if age is not None and age <= limit:
            _touch(ending, "file")
            return f"a file of it changed {ago(age)} ago"
    return ""


def _touch(ending: Ending, signal: str) -> None:
    patiently(lambda: ending.ctx.registry.workspaces.touch(ending.args.workspace, signal))


def _youngest_ms(ending: Ending) -> int | None:
    """How long ago anything in its directory was last written, ms by this host's own clock; None when that is not known.

    A change lies after the last known sign of life, or it is what that sign was about. Changes in the future (a clock that was set)
    say nothing.
    """
    from mothball.capture.root import open_root
    from mothball.purge.survey import survey

    ctx = ending.ctx
    since = patiently(ctx.registry.time_ms) - ending.facts.last_active
    now = time.time_ns()
    try:
        with open_root(ending.workspace.path, ctx.settings.workspace_roots) as root:
            items = survey(root, lambda name, data: ctx.checkpoint(name, **data)).items
    except (SourceMissing, PathNotAllowed, OSError) as error:
        log.warning("cannot see whether its files change", error=str(error))
        return None
    ages = [(now - item.ctime_ns) // 1_000_000 for item in items if item.ctime_ns <= now]
    youngest = min(ages, default=None)
    return youngest if youngest is not None and youngest < since else None


def _outcome(
    args: StopArgs, *, stopped: bool, detail: str, captured: CaptureResult | None = None, directory: str = "", how: str = "",
    evidence: dict[str, Any] | None = None,
) -> Outcome:  # fmt: skip
    result = {
        "workspace": args.workspace, "stopped": stopped, "rule": args.rule, "detail": detail, "how": how, "directory": directory,
        "captured": captured_dict(captured), "evidence": evidence or {},
    }  # fmt: skip
    return Outcome(result=result)
