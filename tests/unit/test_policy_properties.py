"""`policy.decide` under any facts and any policy: total, pure, in order, monotone in time, and right about what comes next.

Times are small numbers around a few limits, so that most examples stand on a boundary or one ms beside it.
"""

from __future__ import annotations

import copy
from typing import Any

import msgspec
from hypothesis import event, given, settings
from hypothesis import strategies as st

from mothball.policy import KIND_OF, RULES, SIGNALS, STATES, Facts, Policy, decide

BORN = 1_000_000
NEAR = st.integers(0, 40)
MOMENT = NEAR.map(lambda offset: BORN + offset)
LIMIT = st.none() | st.integers(1, 40)


def seldom(strategy: st.SearchStrategy[Any], otherwise: Any = None) -> st.SearchStrategy[Any]:
    """What hides other rules, in one of six examples."""
    return st.integers(0, 5).flatmap(lambda number: strategy if number == 0 else st.just(otherwise))


SIGNAL = st.sampled_from((*SIGNALS, "register", "resume", "stats", "attach", ""))

POLICIES = st.builds(
    Policy, ttl=LIMIT, idle_ttl=LIMIT, max_age=LIMIT, stop_after=LIMIT, presence_limit=LIMIT, stranded_for=LIMIT,
    notice_before=LIMIT, signals=st.sets(st.sampled_from(SIGNALS)).map(tuple), cap=st.none() | st.just(100),
    budget=st.none() | st.just(1 << 30),
)  # fmt: skip
UNANNOUNCED = POLICIES.map(lambda policy: msgspec.structs.replace(policy, notice_before=None))
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "mode": st.sampled_from(["ephemeral", "persistent"]),
    "last_active": MOMENT,
    "last_signal": SIGNAL,
    "state_since": MOMENT,
    "expires_at": seldom(st.integers(BORN + 1, BORN + 40)),
    "extended_until": seldom(MOMENT),
    "noticed": st.dictionaries(st.sampled_from(["evict", "stop"]), MOMENT),
    "lease_until": seldom(MOMENT),
    "present_until": seldom(MOMENT),
    "signals": st.dictionaries(SIGNAL, MOMENT, max_size=3),
    "over_cap": seldom(st.just(True), False),
    "over_budget": seldom(st.just(True), False),
}
LASTING: dict[str, st.SearchStrategy[Any]] = {
    "holds": st.just([{"id": "h", "reason": "r"}]),
    "pinned": st.just(True),
    "queued": st.integers(1, 3),
    "unknown": st.just(("policy",)),
}


def workspaces(states: st.SearchStrategy[str], lasting: bool = True) -> st.SearchStrategy[Facts]:
    """Any facts; with `lasting` also what protects a workspace for as long as nobody takes it away."""
    fixed = st.fixed_dictionaries(
        {"id": st.just("w"), "host": st.just("h"), "created_at": st.just(BORN), "state": states, **FIELDS}
    )
    rare = seldom(st.fixed_dictionaries({}, optional=LASTING if lasting else {}), {})
    return st.builds(lambda fields, more: Facts(**fields, **more), fixed, rare)


ANY = workspaces(st.just("active") | st.sampled_from((*STATES, "unheard-of")))
MOVING = workspaces(st.just("active") | st.sampled_from(STATES), lasting=False)


def expected(facts: Facts, policy: Policy, now: int) -> tuple[str, str]:
    """The design's order as plain conditions, for policies without notices."""
    if facts.holds:
        return "keep", "hold"
    if facts.pinned:
        return "keep", "pin"
    if facts.unknown or facts.state not in STATES:
        return "keep", "unknown"
    if facts.lease_until is not None and now <= facts.lease_until:
        return "keep", "lease"
    if facts.queued:
        return "keep", "queued"
    age, put_off = now - facts.created_at, facts.extended_until is not None and now <= facts.extended_until
    if (
        facts.present_until is not None
        and now <= facts.present_until
        and not (policy.presence_limit and age > policy.presence_limit)
    ):
        return "keep", "presence"
    if facts.state == "submitted":
        return "keep", "submitted"
    if facts.state == "stranded":
        gone = policy.stranded_for is not None and now - facts.state_since > policy.stranded_for
        return ("abandon", "auto_ttl") if gone else ("keep", "stranded")
    if facts.state == "active" and facts.present_until is not None and now > facts.present_until:
        return "strand", "heartbeats"
    if facts.state == "abandoned":
        return "evict", "abandoned"
    ephemeral = facts.mode == "ephemeral"
    signs = [*facts.signals.items(), (facts.last_signal, facts.last_active)]
    counted = [at for name, at in signs if name in policy.signals or name not in (*SIGNALS, "stats")]
    idle = now - max([facts.created_at, *counted])
    if facts.expires_at is not None and now >= facts.expires_at and not (put_off and now < (facts.extended_until or 0)):
        return "evict", "deadline"
    if policy.max_age is not None and age > policy.max_age and not put_off:
        return "evict", "max_age"
    if ephemeral and policy.ttl is not None and age > policy.ttl and not put_off:
        return "evict", "ttl"
    if ephemeral and policy.idle_ttl is not None and idle > policy.idle_ttl and not put_off:
        return "evict", "idle_ttl"
    if facts.state == "active" and policy.stop_after is not None and idle > policy.stop_after and not put_off:
        return "stop", "stop_after"
    if ephemeral and facts.over_cap:
        return "evict", "cap"
    if facts.over_budget:
        return "evict", "budget"
    return "keep", "none"


@settings(max_examples=200, deadline=None)
@given(ANY, UNANNOUNCED, MOMENT)
def test_issue_point_1_the_order_and_every_boundary_are_those_of_the_design(facts: Facts, policy: Policy, now: int) -> None:
    found = decide(facts, policy, now)
    event(f"{found.action} {found.rule}")
    assert found[:2] == expected(facts, policy, now)


@settings(deadline=None)
@given(ANY, POLICIES, st.integers(0, 1 << 52))
def test_issue_point_1_decide_is_total_and_pure(facts: Facts, policy: Policy, now: int) -> None:
    before = copy.deepcopy(facts)
    found = decide(facts, policy, now)
    assert found == decide(facts, policy, now)
    assert facts == before
    assert tuple(each.rule for each in found.rules) == RULES
    assert found.detail
    assert all(each.detail for each in found.rules)
    said = {each.rule: each.result for each in found.rules}
    if found.rule != "none":
        assert said[found.rule] == ("keeps" if found.action == "keep" else "fires")


@settings(deadline=None)
@given(ANY, POLICIES, MOMENT, st.sampled_from(["hold", "pin", "lease", "queued", "presence", "submitted"]))
def test_issue_point_1_holds_pins_leases_and_submitted_always_win(facts: Facts, policy: Policy, now: int, how: str) -> None:
    protection: dict[str, dict[str, Any]] = {
        "hold": {"holds": [{"id": "h"}]}, "pin": {"pinned": True}, "lease": {"lease_until": now}, "queued": {"queued": 1},
        "presence": {"present_until": now}, "submitted": {"state": "submitted"},
    }  # fmt: skip
    if how == "presence":
        policy = msgspec.structs.replace(policy, presence_limit=None)
    found = decide(msgspec.structs.replace(facts, **protection[how]), policy, now)
    assert found.action == "keep"
    assert found.notice is None
    assert all(at is None or at > now for at in found.due.values())


@settings(max_examples=150, deadline=None)
@given(MOVING, POLICIES, MOMENT, st.integers(0, 60))
def test_issue_point_1_what_acts_goes_on_acting_as_time_passes(facts: Facts, policy: Policy, now: int, later: int) -> None:
    """Monotone in time: whoever looks later finds no reason to keep what had to go, and every single rule goes on firing."""
    first, second = decide(facts, policy, now), decide(facts, policy, now + later)
    event(f"{first.action} -> {second.action}")
    if first.action != "keep":
        assert second.action != "keep"
    if first.action == "evict" and first.rule not in {"cap", "budget"}:
        assert second.action in {"evict", "strand"}
    if first.action in {"strand", "abandon"}:
        assert second[:2] == first[:2]
    fires = [{each.rule for each in decision.rules if each.result == "fires"} for decision in (first, second)]
    assert fires[0] <= fires[1]


@settings(deadline=None)
@given(MOVING, UNANNOUNCED, MOMENT, st.integers(1, 40))
def test_a_sign_of_life_never_brings_anything_nearer(facts: Facts, policy: Policy, now: int, more: int) -> None:
    alive = msgspec.structs.replace(facts, last_active=facts.last_active + more)
    for before, after in zip(decide(facts, policy, now).due.values(), decide(alive, policy, now).due.values(), strict=True):
        # An eviction may come to be due where a stop stood before it; nothing else comes sooner.
        if before is not None and after is not None and not (facts.over_cap or facts.over_budget):
            assert after >= before


@settings(max_examples=200, deadline=None)
@given(ANY, POLICIES, MOMENT, st.sets(st.integers(0, 90), max_size=6))
def test_due_is_right_nothing_happens_before_it_and_something_does_at_it(
    facts: Facts, policy: Policy, now: int, later: set[int]
) -> None:
    found = decide(facts, policy, now)
    for kind, due in found.due.items():
        given_now = found.notice is not None and found.notice[0] == kind
        if KIND_OF.get(found.action) == kind or given_now:
            assert due == now
            continue
        assert due is None or due > now
        if facts.queued:  # only a look in a minute tells whether the job is gone
            continue
        looks = {now + offset for offset in later} | ({due - 1} if due is not None else {BORN + 200})
        for at in (look for look in looks if due is None or look < due):
            seen = decide(facts, policy, at)
            assert KIND_OF.get(seen.action) != kind
            assert seen.notice is None or seen.notice[0] != kind or found.notice is not None or at == now
        # Where something acts or presses already, what would follow is only an early look; the next decision knows better.
        if due is not None and found.action == "keep" and found.notice is None and not (facts.over_cap or facts.over_budget):
            then = decide(facts, policy, due)
            assert KIND_OF.get(then.action) == kind or then.notice is not None


@settings(max_examples=150, deadline=None)
@given(MOVING, POLICIES, MOMENT)
def test_sweeps_that_follow_due_miss_nothing_and_announce_before_they_act(facts: Facts, policy: Policy, now: int) -> None:
    """A workspace as sweeps see it: they look when something is due, note what they announce, and end with the first effect."""
    told: dict[str, int] = dict(facts.noticed)
    at, looks = now, 0
    first = decide(facts, policy, now)
    while looks < 20:
        looks += 1
        found = decide(msgspec.structs.replace(facts, noticed=dict(told)), policy, at)
        if found.action != "keep":
            break
        if found.notice is not None:
            kind, due = found.notice
            assert due >= at
            assert policy.notice_before is not None
            assert told.get(kind, 0) < due
            told[kind] = due
            continue
        moments = [due for due in found.due.values() if due is not None]
        if not moments:
            break
        assert min(moments) > at
        at = min(moments)
    assert looks < 20
    assert (found.action == "keep") is (first.next_action is None)
    if found.action != "keep" and first.action == "keep":
        assert (found.action, at) == (first.next_action, first.next_at)
        if found.rule in {"deadline", "max_age", "ttl", "idle_ttl", "stop_after"} and policy.notice_before is not None:
            assert told[KIND_OF[found.action]] <= at
