"""What reclaims a workspace: each rule at its exact millisecond, what protects from it, and what is said about it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

import mothball.registry
from mothball.policy import EVICTED, KIND_OF, RULES, STATES, TRANSITIONS, Decision, Facts, Policy, decide, last_sign, merge

SECOND, MINUTE, HOUR, DAY = 1000, 60_000, 3_600_000, 86_400_000
BORN = 1_736_344_031_000
NOTHING = Policy(ttl=None, cap=None, stranded_for=None)


def facts(**fields: Any) -> Facts:
    """A workspace that was registered at `BORN` and gave no sign of life since."""
    given = {"id": "a/b#1", "host": "h", "state": "active", "created_at": BORN, "last_active": BORN, "last_signal": "register"}
    return Facts(**{**given, "state_since": BORN, **fields})


def said(decision: Decision, rule: str) -> tuple[str, int | None]:
    """What `rule` says, and when that changes."""
    return next((each.result, each.at) for each in decision.rules if each.rule == rule)


# -- boundaries (6.2) ---------------------------------------------------------------------------------------------------

BOUNDARIES: dict[str, tuple[Policy, dict[str, Any], int, str, str]] = {
    "B-71": (Policy(ttl=DAY), {}, DAY + 1, "evict", "ttl"),
    "D-17 max age": (Policy(ttl=None, max_age=4 * HOUR), {}, 4 * HOUR + 1, "evict", "max_age"),
    "D-17 idle": (Policy(ttl=None, idle_ttl=30 * MINUTE), {"last_active": BORN + HOUR}, 90 * MINUTE + 1, "evict", "idle_ttl"),
    "D-15": (NOTHING, {"expires_at": BORN + HOUR}, HOUR, "evict", "deadline"),
    "D-15 persistent": (NOTHING, {"expires_at": BORN + HOUR, "mode": "persistent"}, HOUR, "evict", "deadline"),
    "N-32": (Policy(stop_after=2 * HOUR), {"last_active": BORN + HOUR}, 3 * HOUR + 1, "stop", "stop_after"),
    "N-32 persistent": (Policy(stop_after=HOUR), {"mode": "persistent"}, HOUR + 1, "stop", "stop_after"),
    "D-72": (Policy(stranded_for=4 * HOUR), {"state": "stranded", "state_since": BORN + HOUR}, 5 * HOUR + 1, "abandon", "auto_ttl"),
    "missed heartbeats": (NOTHING, {"present_until": BORN + MINUTE}, MINUTE + 1, "strand", "heartbeats"),
    "missed beyond the limit": (
        Policy(ttl=None, presence_limit=SECOND),
        {"present_until": BORN + MINUTE},
        MINUTE + 1,
        "strand",
        "heartbeats",
    ),
    "B-76 lease": (Policy(ttl=SECOND), {"lease_until": BORN + 30 * SECOND, "lease_job": "j"}, 30 * SECOND + 1, "evict", "ttl"),
    "presence limit": (Policy(ttl=SECOND, presence_limit=HOUR), {"present_until": BORN + DAY}, HOUR + 1, "evict", "ttl"),
    "extended": (Policy(ttl=HOUR), {"extended_until": BORN + 3 * HOUR}, 3 * HOUR + 1, "evict", "ttl"),
    "extended deadline": (NOTHING, {"expires_at": BORN + 1, "extended_until": BORN + 3 * HOUR}, 3 * HOUR, "evict", "deadline"),
}


@pytest.mark.parametrize(("policy", "fields", "first", "action", "rule"), BOUNDARIES.values(), ids=BOUNDARIES)
def test_6_2_a_rule_acts_from_its_first_millisecond_on_and_not_one_earlier(
    policy: Policy, fields: dict[str, Any], first: int, action: str, rule: str
) -> None:
    before, after = (decide(facts(**fields), policy, BORN + first + offset) for offset in (-1, 0))
    assert before.action == "keep"
    assert (before.next_action, before.next_at) == (action, BORN + first)
    assert before.due[KIND_OF[action]] == BORN + first
    assert (after.action, after.rule) == (action, rule)
    assert after.due[KIND_OF[action]] == after.next_at == BORN + first
    assert said(after, rule) == ("fires", None)


def test_b72_q12_the_cap_and_the_budget_fire_for_whom_the_walk_says_and_for_nobody_else() -> None:
    """Counting is the walk's: it says `over` only while the count is strictly above the cap."""
    policy = Policy(ttl=None, cap=100, budget=1 << 30)
    assert decide(facts(), policy, BORN).action == "keep"
    assert decide(facts(over_cap=True), policy, BORN)[:2] == ("evict", "cap")
    assert decide(facts(over_budget=True), policy, BORN)[:2] == ("evict", "budget")
    assert decide(facts(over_cap=True, mode="persistent"), policy, BORN).action == "keep"
    assert decide(facts(over_budget=True, mode="persistent"), policy, BORN)[:2] == ("evict", "budget")


# -- what protects ------------------------------------------------------------------------------------------------------

PROTECTIONS: list[Any] = [
    ("hold", {"holds": [{"id": "h1", "reason": "post-mortem", "by": "ann"}]}, "post-mortem"),
    ("pin", {"pinned": True, "pin_reason": "demo on friday"}, "demo on friday"),
    ("lease", {"lease_until": BORN + 9 * DAY, "lease_job": "job-7"}, "job-7"),
    ("queued", {"queued": 2}, "2 of its jobs"),
    ("presence", {"present_until": BORN + 9 * DAY, "present_by": "agent-3"}, "agent-3"),
    ("submitted", {"state": "submitted"}, "submitted"),
    ("unknown", {"unknown": ("holds", "policy", "state")}, "policy"),
    ("unknown", {"state": "dreaming"}, "dreaming"),
]
THREATS: list[Any] = [
    pytest.param(Policy(ttl=SECOND, idle_ttl=SECOND, max_age=SECOND, stop_after=SECOND), {"expires_at": BORN + 1}, id="time"),
    pytest.param(NOTHING, {"over_cap": True, "over_budget": True}, id="B-72 Q-08 cap and budget"),
]


@pytest.mark.parametrize(("policy", "threat"), THREATS)
@pytest.mark.parametrize(("rule", "fields", "says"), PROTECTIONS)
def test_b76_q08_d70_what_is_protected_is_kept_from_every_rule_and_says_why(
    rule: str, fields: dict[str, Any], says: str, policy: Policy, threat: dict[str, Any]
) -> None:
    assert decide(facts(**threat), policy, BORN + DAY).action == "evict"
    kept = decide(facts(**{**threat, **fields}), policy, BORN + DAY)
    assert (kept.action, kept.rule) == ("keep", rule)
    assert says in kept.detail
    assert said(kept, rule)[0] == "keeps"


def test_of_several_protections_the_first_in_order_is_named() -> None:
    named = [(rule, fields) for rule, fields, _ in PROTECTIONS if "state" not in fields or rule == "submitted"]
    assert [rule for rule, _ in named] == ["hold", "pin", "lease", "queued", "presence", "submitted", "unknown"]
    order = [*named[:2], named[6], *named[2:6]]
    for place in range(len(order)):
        everything_from_here = {name: value for _, fields in order[place:] for name, value in fields.items()}
        assert decide(facts(**everything_from_here), Policy(ttl=SECOND), BORN + DAY).rule == order[place][0]


def test_a_stop_comes_before_the_cap_and_the_cap_before_the_budget() -> None:
    pressed = facts(over_cap=True, over_budget=True)
    assert decide(pressed, Policy(stop_after=HOUR), BORN + HOUR).rule == "cap"
    assert decide(pressed, Policy(stop_after=HOUR), BORN + HOUR + 1)[:2] == ("stop", "stop_after")
    assert decide(facts(over_budget=True), Policy(stop_after=HOUR), BORN + HOUR)[:2] == ("evict", "budget")


def test_protection_without_an_end_leaves_nothing_due_and_one_with_an_end_leaves_it_due_then() -> None:
    policy, late = Policy(ttl=SECOND, stop_after=SECOND), BORN + HOUR
    for rule, fields, _ in PROTECTIONS:
        kept = decide(facts(**fields), policy, late)
        if rule in {"lease", "presence"}:
            assert kept.due["evict" if rule == "lease" else "stop"] == BORN + 9 * DAY + 1
        elif rule == "queued":
            assert kept.due["evict"] == late + MINUTE
        else:
            assert kept.due == {"evict": None, "stop": None}
            assert kept[3:5] == (None, None)


def test_the_lease_of_the_asking_job_does_not_protect_from_it_and_that_of_another_one_does() -> None:
    held = facts(lease_until=BORN + DAY, lease_job="stopper")
    policy = Policy(stop_after=SECOND)
    assert decide(held, policy, BORN + MINUTE).rule == "lease"
    assert decide(held, policy, BORN + MINUTE, job="stopper").action == "stop"
    assert decide(held, policy, BORN + MINUTE, job="another").rule == "lease"
    assert decide(facts(lease_until=BORN + DAY), policy, BORN + MINUTE, job="").rule == "lease"


def test_d17_d15_a_persistent_one_goes_by_its_deadline_and_max_age_only() -> None:
    policy = Policy(ttl=SECOND, idle_ttl=SECOND, cap=1, max_age=2 * DAY)
    lasting = facts(mode="persistent", over_cap=True)
    assert decide(lasting, policy, BORN + 2 * DAY).action == "keep"
    assert decide(lasting, policy, BORN + 2 * DAY + 1)[:2] == ("evict", "max_age")
    kept = decide(lasting, policy, BORN)
    assert [said(kept, rule)[0] for rule in ("ttl", "idle_ttl", "cap")] == ["exempt"] * 3


def test_d17_the_reason_of_an_eviction_is_the_first_rule_in_order_with_its_inputs() -> None:
    both = Policy(ttl=HOUR, idle_ttl=30 * MINUTE)
    old = facts(last_active=BORN + 10 * MINUTE, last_signal="exec")
    assert decide(old, both, BORN + 41 * MINUTE).rule == "idle_ttl"
    assert "(exec) was 31m ago, idle_ttl=30m" in decide(old, both, BORN + 41 * MINUTE).detail
    assert decide(old, both, BORN + 2 * HOUR).rule == "ttl"
    assert decide(old, both, BORN + 2 * HOUR).detail == "it is 2h old, ttl=1h"


# -- states -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", STATES)
def test_n32_d03_only_an_active_one_is_stopped_or_stranded(state: str) -> None:
    policy = Policy(ttl=None, stop_after=SECOND, stranded_for=None)
    stopped = decide(facts(state=state), policy, BORN + HOUR).action == "stop"
    stranded = decide(facts(state=state, present_until=BORN + 1), policy, BORN + HOUR).action == "strand"
    assert stopped is stranded is (state == "active")


@pytest.mark.parametrize(
    ("state", "evicted"), [("active", True), ("merged", True), ("stopped", True), ("submitted", False), ("stranded", False)]
)
def test_d70_d71_an_expired_one_is_evicted_from_every_state_but_submitted_and_stranded(state: str, evicted: bool) -> None:
    worst = facts(state=state, expires_at=BORN + 1, over_cap=True, over_budget=True)
    policy = Policy(ttl=SECOND, max_age=SECOND, stranded_for=None)
    assert (decide(worst, policy, BORN + DAY).action == "evict") is evicted


def test_d72_a_stranded_one_is_abandoned_in_time_and_an_abandoned_one_evicted_at_once() -> None:
    stranded = facts(state="stranded", state_reason="heartbeats")
    waiting = decide(stranded, Policy(), BORN + HOUR)
    assert (waiting.action, waiting.rule, waiting.next_action) == ("keep", "stranded", "abandon")
    assert waiting.due == {"evict": None, "stop": BORN + 4 * HOUR + 1}
    assert "heartbeats" in decide(stranded, Policy(), BORN + DAY).detail
    assert decide(stranded, NOTHING, BORN + 400 * DAY)[:2] == ("keep", "stranded")
    assert decide(facts(state="abandoned"), NOTHING, BORN)[:2] == ("evict", "abandoned")


def test_missing_is_not_idle_who_said_goodbye_is_idle_and_who_vanished_is_stranded() -> None:
    policy = Policy(ttl=None, stop_after=MINUTE)
    assert decide(facts(), policy, BORN + HOUR).action == "stop"
    vanished = decide(facts(present_until=BORN + 1, present_by="agent-3"), policy, BORN + HOUR)
    assert (vanished.action, vanished.rule) == ("strand", "heartbeats")
    assert "agent-3" in vanished.detail


def test_the_crash_path_comes_before_every_expiry() -> None:
    policy = Policy(ttl=SECOND, max_age=SECOND, stop_after=SECOND)
    lost = facts(present_until=BORN + 1, expires_at=BORN + 1, over_cap=True, over_budget=True)
    found = decide(lost, policy, BORN + HOUR)
    assert found.action == "strand"
    assert found.due == {"evict": None, "stop": BORN + HOUR}  # what follows is for the state that it has then


def lua_moves() -> tuple[dict[str, set[str]], set[str]]:
    text = (Path(mothball.registry.__file__).parent / "lua" / "state.lua").read_text()
    moves = re.search(r"^local MOVES = \{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL)
    evictable = re.search(r"^local EVICTABLE = \{(.*?)\}", text, re.MULTILINE)
    assert moves
    assert evictable
    rows = re.findall(r"^\s*(\w+) = \{(.*?)\},$", moves[1], re.MULTILINE)
    return {name: set(re.findall(r"(\w+) = true", row)) for name, row in rows}, set(re.findall(r"(\w+) = true", evictable[1]))


def test_d03_the_scripts_of_the_registry_enforce_the_same_table_of_states() -> None:
    """Burial and the way back from it are not moves of a record: they stand beside the table there."""
    moves, evictable = lua_moves()
    assert moves == {state: set(to) - {EVICTED} for state, to in TRANSITIONS.items() if state != EVICTED}
    assert evictable == {state for state, to in TRANSITIONS.items() if EVICTED in to}
    assert set(moves) == set(STATES)
    assert TRANSITIONS[EVICTED] == {"stopped"}


# -- signs of life ------------------------------------------------------------------------------------------------------


def test_n32_only_signals_that_the_policy_counts_are_signs_of_life() -> None:
    busy = facts(
        last_active=BORN + 9 * MINUTE, last_signal="cpu",
        signals={"register": BORN, "touch": BORN + MINUTE, "cpu": BORN + 9 * MINUTE, "file": BORN + 5 * MINUTE},
    )  # fmt: skip
    assert last_sign(busy, Policy()) == (BORN + 9 * MINUTE, "cpu")
    assert last_sign(busy, Policy(signals=("touch", "file"))) == (BORN + 5 * MINUTE, "file")
    assert last_sign(busy, Policy(signals=("heartbeat",))) == (BORN, "register")
    quiet = merge({"signals": ["touch"], "stop_after": "1m"})
    assert decide(busy, quiet, BORN + 2 * MINUTE + 1).action == "stop"
    assert decide(busy, quiet, BORN + 2 * MINUTE).action == "keep"


@pytest.mark.parametrize("signal", ["stats", "health", "ping", "ports"])
def test_n32_looking_at_a_workspace_never_keeps_it_alive(signal: str) -> None:
    watched = facts(last_active=BORN + HOUR, last_signal=signal, signals={signal: BORN + HOUR})
    assert last_sign(watched, Policy()) == (BORN, "register")


def test_being_resumed_always_counts_and_so_does_a_signal_nobody_knows() -> None:
    for signal in ("resume", "register", "attach", ""):
        assert last_sign(facts(last_active=BORN + HOUR, last_signal=signal), Policy(signals=("touch",)))[0] == BORN + HOUR
    assert last_sign(facts(signals={"resume": BORN + HOUR}), Policy(signals=("touch",))) == (BORN + HOUR, "resume")


# -- notices ------------------------------------------------------------------------------------------------------------

WARNED = Policy(ttl=HOUR, stop_after=None, notice_before=10 * MINUTE)


def test_a_notice_opens_exactly_its_time_before_and_nothing_happens_without_it() -> None:
    opens, first = BORN + 50 * MINUTE + 1, BORN + HOUR + 1
    early = decide(facts(), WARNED, opens - 1)
    assert (early.notice, early.due["evict"], early.next_at) == (None, opens, first)
    assert decide(facts(), WARNED, opens).notice == ("evict", first)
    told = facts(noticed={"evict": first})
    waiting = decide(told, WARNED, opens)
    assert (waiting.action, waiting.notice, waiting.due["evict"]) == ("keep", None, first)
    assert decide(told, WARNED, first - 1).action == "keep"
    assert decide(told, WARNED, first)[:2] == ("evict", "ttl")


def test_a_notice_that_comes_late_still_warns_for_its_whole_time() -> None:
    late = BORN + 3 * HOUR
    found = decide(facts(), WARNED, late)
    assert (found.action, found.notice) == ("keep", ("evict", late + 10 * MINUTE))
    assert said(found, "ttl") == ("later", late + 10 * MINUTE)
    told = facts(noticed={"evict": late + 10 * MINUTE})
    assert decide(told, WARNED, late + 10 * MINUTE - 1).action == "keep"
    assert decide(told, WARNED, late + 10 * MINUTE).action == "evict"


def test_what_was_protected_past_its_limit_is_warned_in_full_once_nothing_protects_it() -> None:
    until = BORN + 2 * HOUR
    leased = decide(facts(lease_until=until, lease_job="j"), WARNED, BORN + 90 * MINUTE)
    assert (leased.notice, leased.due["evict"]) == (None, until + 1)
    assert (leased.next_action, leased.next_at) == ("evict", until + 1 + 10 * MINUTE)
    assert decide(facts(), WARNED, until + 1).notice == ("evict", until + 1 + 10 * MINUTE)


def test_a_sign_of_life_or_an_extension_after_a_notice_asks_for_a_new_one() -> None:
    policy = Policy(ttl=None, stop_after=HOUR, notice_before=10 * MINUTE)
    told = facts(noticed={"stop": BORN + HOUR + 1})
    touched = msgspec.structs.replace(told, last_active=BORN + 55 * MINUTE, last_signal="touch")
    first = BORN + 115 * MINUTE + 1
    assert decide(touched, policy, BORN + HOUR + 1).due["stop"] == first - 10 * MINUTE
    assert decide(touched, policy, first - 10 * MINUTE).notice == ("stop", first)
    extended = msgspec.structs.replace(told, extended_until=BORN + 3 * HOUR)
    assert decide(extended, policy, BORN + 170 * MINUTE + 1).notice == ("stop", BORN + 3 * HOUR + 1)
    assert decide(extended, policy, BORN + 3 * HOUR).action == "keep"


def test_a_warning_is_never_longer_than_the_limit_it_announces_so_a_short_deadline_stays_exact() -> None:
    short = facts(expires_at=BORN + MINUTE)
    assert decide(short, WARNED, BORN).notice == ("evict", BORN + MINUTE)
    assert decide(facts(expires_at=BORN + MINUTE, noticed={"evict": BORN + MINUTE}), WARNED, BORN + MINUTE).rule == "deadline"


def test_what_is_protected_or_not_a_matter_of_time_is_not_announced() -> None:
    late = BORN + 2 * HOUR
    for _, fields, _ in PROTECTIONS:
        assert decide(facts(**fields), WARNED, late).notice is None
    assert decide(facts(over_cap=True), WARNED, BORN)[:2] == ("evict", "cap")
    assert decide(facts(over_budget=True), WARNED, BORN)[:2] == ("evict", "budget")
    assert decide(facts(present_until=BORN + 1), WARNED, late)[:2] == ("strand", "heartbeats")
    assert decide(facts(state="abandoned"), WARNED, late)[:2] == ("evict", "abandoned")


def test_an_eviction_is_announced_also_while_the_workspace_waits_for_its_stop() -> None:
    policy = Policy(ttl=2 * HOUR, stop_after=HOUR, notice_before=10 * MINUTE)
    stopping = decide(facts(noticed={"stop": BORN + HOUR + 1}), policy, BORN + 115 * MINUTE)
    assert (stopping.action, stopping.notice) == ("stop", ("evict", BORN + 125 * MINUTE))


def test_of_two_notices_one_is_given_and_the_other_is_due_right_after() -> None:
    policy, now = Policy(ttl=HOUR, stop_after=50 * MINUTE, notice_before=30 * MINUTE), BORN + 40 * MINUTE
    both = decide(facts(), policy, now)
    assert both.notice == ("evict", now + 30 * MINUTE)
    assert both.due == {"evict": now, "stop": now + 1}
    other = decide(facts(noticed=dict([both.notice])), policy, now)
    assert other.notice == ("stop", now + 30 * MINUTE)
    nearer = decide(facts(noticed={}), Policy(ttl=HOUR, stop_after=40 * MINUTE, notice_before=15 * MINUTE), BORN + 26 * MINUTE)
    assert nearer.notice == ("stop", BORN + 41 * MINUTE)


def test_nothing_waits_behind_what_still_has_to_be_announced_for_that_may_be_late() -> None:
    policy = Policy(ttl=None, max_age=HOUR, stop_after=30 * MINUTE, notice_before=10 * MINUTE)
    found = decide(facts(noticed={"stop": BORN + 3 * HOUR}), policy, BORN)
    assert (found.next_action, found.next_at) == ("evict", BORN + HOUR + 1)
    assert found.due == {"evict": BORN + 50 * MINUTE + 1, "stop": BORN + 3 * HOUR}


# -- what is said -------------------------------------------------------------------------------------------------------


def test_every_rule_is_explained_in_its_order_whatever_decides() -> None:
    for decision in (decide(facts(pinned=True), Policy(), BORN + DAY), decide(facts(state="stranded"), NOTHING, BORN)):
        assert tuple(each.rule for each in decision.rules) == RULES
        assert all(each.detail and each.result in {"keeps", "fires", "later", "off", "exempt"} for each in decision.rules)
    pinned = decide(facts(pinned=True), Policy(), BORN + DAY + 1)
    assert said(pinned, "ttl") == ("fires", None)  # it would, were it not pinned: that is what an operator wants to know
    assert said(pinned, "max_age")[0] == said(pinned, "hold")[0] == "off"
    assert said(pinned, "auto_ttl")[0] == "exempt"


def test_time_that_runs_backwards_a_second_changes_nothing_but_the_moment() -> None:
    for policy in (Policy(stop_after=HOUR), WARNED):
        found = decide(facts(), policy, BORN - SECOND)
        assert found.action == "keep"
        assert "0s" in next(each.detail for each in found.rules if each.rule == "ttl")
