"""Why a workspace is still there, or will not be: its facts, every rule with its result, and what happens next and when.

The same planner and the same decision as the sweeps', so an explanation cannot tell another story than what then happens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from mothball import policy
from mothball.errors import InvalidParams, NotFound
from mothball.policy import Decision, Facts, Policy

if TYPE_CHECKING:
    from mothball.reclaim import Reclaimer
    from mothball.registry.policies import PolicyBook


class Explanation(NamedTuple):
    """Everything that decides about one workspace at `now` (ms of Redis TIME)."""

    now: int
    facts: Facts
    policy: Policy
    levels: dict[str, str]
    """Where each field of the policy comes from: default, setting, fleet, repo <its name> or workspace."""
    decision: Decision
    problem: str
    """Why its policy cannot be read, which keeps it whatever the rules say; '' when it can."""

    def to_dict(self) -> dict[str, Any]:
        """In JSON types: state, signals with their ages, rules with their results, what happens next and when (ms)."""
        facts, decision, now = self.facts, self.decision, self.now
        at = decision.next_at
        return {
            "workspace": facts.id, "host": facts.host, "repo": facts.repo, "now": now, "mode": facts.mode,
            "state": facts.state, "state_reason": facts.state_reason, "state_ms": now - (facts.state_since or facts.created_at),
            "age_ms": now - facts.created_at, "idle_ms": now - facts.last_active, "last_signal": facts.last_signal,
            "signals": [
                {"signal": name, "at": seen, "age_ms": now - seen, "counts": _counts(name, self.policy)}
                for name, seen in sorted(facts.signals.items(), key=lambda each: (-each[1], each[0]))
            ],
            "policy": {name: {"value": value, "from": self.levels[name]} for name, value in policy.to_dict(self.policy).items()},
            "problem": self.problem, "action": decision.action, "rule": decision.rule, "detail": decision.detail,
            "next": {"action": decision.next_action, "at": at, "in_ms": None if at is None else max(0, at - now)},
            "notice": None if decision.notice is None else {"action": decision.notice[0], "due": decision.notice[1]},
            "rules": [rule._asdict() for rule in decision.rules],
        }  # fmt: skip


def explain(reclaimer: Reclaimer, id: str, *, now: int | None = None) -> Explanation:  # noqa: A002
    """The explanation of `id` at `now`, None: the time of Redis. Raises `NotFound`, `Gone` (with the reason), `Unavailable`."""
    registry = reclaimer.registry
    at = registry.time_ms() if now is None else now
    facts = registry.lifecycle.facts([id])[0]
    if facts is None:
        registry.workspaces.get(id)  # says whether it is unknown or gone, and why
        raise NotFound(what="workspace", id=id)
    book = registry.policies.book()
    problem, levels = "", dict.fromkeys(policy.FIELDS, "default")
    try:
        rules, levels = book.of(facts), _levels(book, facts)
    except InvalidParams as error:
        problem, rules = error.message, Policy()
    else:
        facts = _marked(reclaimer, facts, book, at)
    decision = policy.decide(facts, rules, at)
    if problem:
        nothing: dict[str, int | None] = {"evict": None, "stop": None}
        decision = Decision("keep", "policy", f"its policy cannot be read: {problem}", None, None, nothing, None, decision.rules)
    return Explanation(at, facts, rules, levels, decision, problem)


def _marked(reclaimer: Reclaimer, facts: Facts, book: PolicyBook, now: int) -> Facts:
    """`facts` with the marks of cap and budget when a sweep would come upon it: nobody but the walks themselves knows that."""
    for planned in reclaimer.making_room(book, now):
        if planned.facts.id == facts.id:
            return msgspec.structs.replace(facts, over_cap=planned.facts.over_cap, over_budget=planned.facts.over_budget)
    return facts


def _levels(book: PolicyBook, facts: Facts) -> dict[str, str]:
    """Which level says each field; the strongest one wins."""
    found = dict.fromkeys(policy.FIELDS, "default")
    for name, level in book.levels(facts):
        found |= {field: name for field in level if field in found}
    return found


def _counts(signal: str, rules: Policy) -> bool:
    return signal in rules.signals or signal not in policy.SIGNALS
