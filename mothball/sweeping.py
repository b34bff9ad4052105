"""What the planner says is done here: one effect per workspace, for the fleet's own sweeps and for one that a person asks for.

Nothing is decided here. Evicting, stranding and abandoning are effects of the registry; stopping and purging are jobs of the host
that has the workspace. Each effect compares the record with what the decision saw, so a sweep of the fleet that runs at the same
time does no harm, and is done none.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from mothball import errors
from mothball.reclaim import PURGE_TASK, stops_first

if TYPE_CHECKING:
    from mothball.client_base import Connected
    from mothball.reclaim import Plan, Planned
    from mothball.registry import Registry


class Request(NamedTuple):
    """A job that does the rest of an effect. In the lane of its kind it joins one that somebody else asked for already.

    `lane` is None for one that joins none.
    """

    task: str
    args: dict[str, Any]
    lane: str | None


def effect(registry: Registry, planned: Planned, by: str, *, host_gone: bool = False) -> tuple[str, str, Request | None]:
    """Do what was planned: the name of the effect, its outcome (``done`` or why not), and the job that is to be submitted for it.

    Evicting, stranding and abandoning are done when this returns; stopping and purging are that job. One in which processes may run
    is stopped first, and evicted by the next sweep; unless its host is gone for good (`host_gone`). Raises what the registry does.
    """
    facts, decision, lifecycle = planned.facts, planned.decision, registry.lifecycle
    purge = decision.action == "evict" and planned.policy.purge
    if decision.action == "stop" or (decision.action == "evict" and not purge and stops_first(facts) and not host_gone):
        seen = {"generation": facts.generation, "last_active": facts.last_active, "force": False}
        return "stopping", "done", _request("workspace.stop", planned, by, **seen)
    if purge:
        return "purging", "done", _request(PURGE_TASK, planned, by)
    if decision.action == "evict":
        return "evicted", lifecycle.evict(facts, rule=decision.rule, detail=decision.detail, by=by, above=planned.limit), None
    if decision.action == "strand":
        answer = lifecycle.strand(facts, reason=decision.rule, by=by)
        return "stranded", answer, _left_behind(registry, planned, by) if answer == "done" else None
    return "abandoned", lifecycle.abandon(facts, reason=decision.rule, by=by), None


def _left_behind(registry: Registry, planned: Planned, by: str) -> Request:
    """What its producer left behind, however it ended: a crash report has that captured as well (design, section 7)."""
    workspace, why = planned.facts.id, planned.decision
    if registry.settings.auto_crash_report == "off":
        return Request("workspace.capture", {"workspace": workspace}, "capture")
    about = {"title": f"stranded: {why.rule}", "error": why.detail, "package": False, "auto": True, "by": by}
    return Request("workspace.crash_report", {"workspace": workspace, **about}, None)


def _request(task: str, planned: Planned, by: str, **args: Any) -> Request:
    about = {"workspace": planned.facts.id, "rule": planned.decision.rule, "detail": planned.decision.detail, "by": by}
    return Request(task, {**about, **args}, task.partition(".")[2])


def carry_out(fleet: Connected, plan: Plan, by: str) -> dict[str, Any]:
    """Do what `plan` says; what was done by rule, what was skipped by reason, and the jobs that do the rest.

    One that cannot be reclaimed is counted and costs no other; `Unavailable` ends it.
    """
    done: dict[str, Counter[str]] = {name: Counter() for name in ("evicted", "stopping", "stranded", "abandoned", "purging")}
    skipped = Counter(plan.skipped)
    jobs: list[str] = []
    for planned in plan.items:
        try:
            name, answer, request = effect(fleet.registry, planned, by)
            if request is not None:
                jobs.append(fleet.submit(request.task, request.args, workspace=planned.facts.id, lane=request.lane).job.id)
        except errors.Unavailable:
            raise
        except errors.MothballError as error:
            skipped[error.code] += 1
            continue
        if answer == "done":
            done[name][planned.decision.rule] += 1
        else:
            skipped[answer] += 1
    counts = {name: dict(sorted(found.items())) for name, found in done.items()}
    return {**counts, "skipped": dict(sorted(skipped.items())), "jobs": jobs, "remaining": plan.remaining}
