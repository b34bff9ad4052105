"""A sweep that a person asks for: what the planner says is done now, by the same effects as those of the fleet's own sweeps.

Nothing is decided here. Evicting, stranding and abandoning are effects of the registry; stopping and purging are jobs of the host
that has the workspace. Each effect compares the record with what the decision saw, so a sweep of the fleet that runs at the same
time does no harm, and is done none.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from mothball import errors

if TYPE_CHECKING:
    from mothball.client_base import Connected
    from mothball.reclaim import Plan, Planned


def carry_out(fleet: Connected, plan: Plan, by: str) -> dict[str, Any]:
    """Do what `plan` says; what was done by rule, what was skipped by reason, and the jobs that do the rest.

    One that cannot be reclaimed is counted and costs no other; `Unavailable` ends it.
    """
    done: dict[str, Counter[str]] = {name: Counter() for name in ("evicted", "stopping", "stranded", "abandoned", "purging")}
    skipped = Counter(plan.skipped)
    jobs: list[str] = []
    for planned in plan.items:
        try:
            name, answer = _act(fleet, planned, by, jobs)
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


def _act(fleet: Connected, planned: Planned, by: str, jobs: list[str]) -> tuple[str, str]:
    facts, decision, lifecycle = planned.facts, planned.decision, fleet.registry.lifecycle
    if decision.action == "stop":
        args = {"generation": facts.generation, "last_active": facts.last_active, "force": False}
        return "stopping", _submit(fleet, "workspace.stop", planned, args, by, jobs)
    if decision.action == "evict":
        if planned.policy.purge:
            return "purging", _submit(fleet, "workspace.purge", planned, {}, by, jobs)
        return "evicted", lifecycle.evict(facts, rule=decision.rule, detail=decision.detail, by=by, above=planned.limit)
    if decision.action == "strand":
        answer = lifecycle.strand(facts, reason=decision.rule, by=by)
        if answer == "done":
            jobs.append(fleet.submit("workspace.capture", {"workspace": facts.id}, workspace=facts.id, lane="capture").job.id)
        return "stranded", answer
    return "abandoned", lifecycle.abandon(facts, reason=decision.rule, by=by)


def _submit(fleet: Connected, task: str, planned: Planned, args: dict[str, Any], by: str, jobs: list[str]) -> str:
    """One job per workspace: in the lane of the sweeps it joins the one that they have submitted already."""
    id, decision = planned.facts.id, planned.decision  # noqa: A001 - the record's own name for it
    given = {"workspace": id, "rule": decision.rule, "detail": decision.detail, "by": by, **args}
    jobs.append(fleet.submit(task, given, workspace=id, lane=task.partition(".")[2]).job.id)
    return "done"
