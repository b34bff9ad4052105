"""Presence and the named signs of life (D-06, D-12, N-32)."""

from __future__ import annotations

import pytest

from mothball import policy
from mothball.errors import Busy, InvalidParams, NotFound
from mothball.policy import Facts, Policy
from mothball.registry import Registry
from tests.integration.registry.support import Bench


def facts(registry: Registry, ident: str = "o/r#1") -> Facts:
    found = registry.lifecycle.facts([ident])[0]
    assert found is not None
    return found


def test_a_heartbeat_says_until_when_it_counts_and_is_a_sign_of_life(bench: Bench) -> None:
    start = bench.workspace("o/r#1").created_at
    with bench.at(start + 40_000) as registry:
        assert registry.presence.heartbeat("o/r#1", "host:1", 60_000) == start + 100_000
        seen = facts(registry)
    assert (seen.present_until, seen.present_by) == (start + 100_000, "host:1")
    record = bench.registry.workspaces.get("o/r#1")
    assert (record.last_active, record.last_signal, record.signals) == (start + 40_000, "heartbeat", {"heartbeat": start + 40_000})
    assert bench.registry.presence.holders("o/r#1") == {"host:1": start + 100_000}
    assert bench.raw.zscore(bench.key("ws:by:active"), "o/r#1") == start + 40_000


def test_the_latest_end_of_all_holders_counts(bench: Bench) -> None:
    start = bench.workspace("o/r#1").created_at
    with bench.at(start) as registry:
        registry.presence.heartbeat("o/r#1", "long", 60_000)
        registry.presence.heartbeat("o/r#1", "short", 1000)
        assert (facts(registry).present_until, facts(registry).present_by) == (start + 60_000, "long")
        registry.presence.heartbeat("o/r#1", "long", 500)  # a shorter promise replaces the longer one
        assert (facts(registry).present_until, facts(registry).present_by) == (start + 1000, "short")


def test_missing_is_not_idle_but_a_goodbye_is(bench: Bench) -> None:
    """Two workspaces fall silent; only the one without a goodbye is stranded."""
    rules = Policy(ttl=None, idle_ttl=None)
    for ident in ("o/r#1", "o/r#2"):
        start = bench.workspace(ident).created_at
        bench.registry.presence.heartbeat(ident, "p", 1000)
    assert bench.registry.presence.goodbye("o/r#2", "p") is True
    assert bench.registry.presence.goodbye("o/r#2", "p") is False
    with bench.at(start + 60_000) as later:
        actions = {ident: policy.decide(facts(later, ident), rules, start + 60_000).action for ident in ("o/r#1", "o/r#2")}
    assert actions == {"o/r#1": "strand", "o/r#2": "keep"}


def test_one_goodbye_does_not_excuse_another_holder(bench: Bench) -> None:
    start = bench.workspace("o/r#1").created_at
    bench.registry.presence.heartbeat("o/r#1", "a", 1000)
    bench.registry.presence.heartbeat("o/r#1", "b", 60_000)
    bench.registry.presence.goodbye("o/r#1", "b")
    with bench.at(start + 120_000) as later:
        decision = policy.decide(facts(later), Policy(ttl=None), start + 120_000)
    assert (decision.action, decision.rule) == ("strand", "heartbeats")


def test_a_heartbeat_in_a_stopped_or_stranded_workspace_counts_and_resumes_nothing(bench: Bench) -> None:
    bench.workspace("o/r#1")
    assert bench.registry.lifecycle.strand(facts(bench.registry), reason="explicit") == "done"
    beat = bench.registry.presence.beat("o/r#1", "p", 60_000)
    assert (beat.state, beat.state_reason) == ("stranded", "explicit")
    now = facts(bench.registry)
    assert policy.decide(now, Policy(stranded_for=1), now.state_since + 10).rule == "presence"  # and keeps it from being abandoned
    assert bench.registry.workspaces.get("o/r#1").state == "stranded"


def test_presence_that_a_policy_limits_does_not_stop_an_eviction_but_a_new_heartbeat_does(bench: Bench) -> None:
    rules = Policy(ttl=50_000, presence_limit=50_000)
    start = bench.workspace("o/r#1").created_at
    bench.registry.presence.heartbeat("o/r#1", "p", 3_600_000)
    with bench.at(start + 60_000) as later:
        seen = facts(later)
        assert policy.decide(seen, rules, start + 60_000).rule == "ttl"
    with bench.at(start + 61_000) as later:
        later.presence.heartbeat("o/r#1", "p", 3_600_000)
        assert later.lifecycle.evict(seen, rule="ttl") == "changed"
        assert later.lifecycle.evict(facts(later), rule="ttl") == "done"


@pytest.mark.parametrize("timeout", [0, -1, 1.5, True, None, 604_800_001])
def test_a_heartbeat_without_a_sensible_end_is_refused(bench: Bench, timeout: object) -> None:
    bench.workspace("o/r#1")
    with pytest.raises(InvalidParams):
        bench.registry.presence.heartbeat("o/r#1", "p", timeout)  # type: ignore[arg-type]
    assert bench.registry.presence.holders("o/r#1") == {}


@pytest.mark.parametrize("holder", ["", "x" * 201, "a\nb", None, 5])
def test_a_holder_without_a_name_is_refused(bench: Bench, holder: object) -> None:
    bench.workspace("o/r#1")
    for call in (bench.registry.presence.goodbye, lambda each, name: bench.registry.presence.heartbeat(each, name, 1000)):
        with pytest.raises(InvalidParams):
            call("o/r#1", holder)  # type: ignore[arg-type]


def test_presence_of_what_is_not_there(bench: Bench) -> None:
    with pytest.raises(NotFound):
        bench.registry.presence.heartbeat("never", "p", 1000)
    assert bench.registry.presence.goodbye("never", "p") is False


def test_the_list_of_holders_is_bounded_and_drops_only_who_is_missing(bench: Bench) -> None:
    start = bench.workspace("o/r#1").created_at
    with bench.at(start) as registry:
        for n in range(256):
            registry.presence.heartbeat("o/r#1", f"h{n}", 1000 if n else 600_000)
        with pytest.raises(Busy):
            registry.presence.heartbeat("o/r#1", "one more", 1000)
        registry.presence.heartbeat("o/r#1", "h1", 1000)  # who is on the list stays on it
    with bench.at(start + 5000) as later:
        later.presence.heartbeat("o/r#1", "one more", 1000)
        holders = later.presence.holders("o/r#1")
    assert {"h0", "one more"} <= set(holders)
    assert 100 < len(holders) < 256
    assert any(end < start + 5000 for end in holders.values())  # that somebody is missing is not forgotten


def test_each_signal_keeps_its_own_last_time(bench: Bench) -> None:
    start = bench.workspace("o/r#1").created_at
    with bench.at(start + 40_000) as registry:
        registry.workspaces.touch("o/r#1", "cpu")
    with bench.at(start + 50_000) as registry:
        # Within the debounce of the last sign of any name, and yet the first of its own.
        result = registry.workspaces.touch("o/r#1", "exec")
        assert (result.moved, result.last_active, result.signal) == (False, start + 40_000, "cpu")
    assert bench.registry.workspaces.get("o/r#1").signals == {"cpu": start + 40_000, "exec": start + 50_000}


@pytest.mark.parametrize(("elapsed", "moved"), [(30_000, False), (30_001, True)])
def test_d06_the_debounce_of_each_signal_is_strict(bench: Bench, elapsed: int, moved: bool) -> None:
    start = bench.workspace("o/r#1").created_at + 100_000
    for at in (start, start + elapsed):
        with bench.at(at) as registry:
            registry.workspaces.touch("o/r#1", "file")
    assert bench.registry.workspaces.get("o/r#1").signals == {"file": start + elapsed if moved else start}


def test_invented_signals_do_not_make_a_record_grow_without_end(bench: Bench) -> None:
    bench.workspace("o/r#1")
    for n in range(300):
        bench.registry.workspaces.touch("o/r#1", f"s{n}")
    assert bench.raw.hlen(bench.key("ws:o/r#1")) <= 110


def test_d12_one_touch_moves_time_index_and_signal_together_and_marks_nothing(bench: Bench) -> None:
    start = bench.workspace("o/r#1").created_at
    due = bench.registry.lifecycle.due
    for kind in ("evict", "stop"):
        bench.registry.lifecycle.rescore(kind, [(*place, start + 500_000) for place in due(kind, 10)])
    with bench.at(start + 31_000) as registry:
        registry.workspaces.touch("o/r#1", "exec")
    assert bench.raw.hmget(bench.key("ws:o/r#1"), "last_active", "last_signal", "sig:exec") == [
        str(start + 31_000), "exec", str(start + 31_000),
    ]  # fmt: skip
    assert bench.raw.zscore(bench.key("ws:by:active"), "o/r#1") == start + 31_000
    assert [bench.registry.lifecycle.due_at(kind, "o/r#1") for kind in ("evict", "stop")] == [start + 500_000] * 2


@pytest.mark.parametrize("origin", ["client", "beat", "adopted"])
@pytest.mark.parametrize("end", ["finish", "fail", "lost"])
def test_b44_a_job_that_ran_is_no_sign_of_life_whoever_asked_for_it(bench: Bench, origin: str, end: str) -> None:
    before = bench.workspace("o/r#1")
    job = bench.registry.jobs.submit("workspace.capture", {}, workspace="o/r#1", origin=origin).job.id
    claim = bench.claim(job)
    if end == "finish":
        bench.registry.jobs.finish(job, claim.fence, {})
    elif end == "fail":
        bench.registry.jobs.fail(job, claim.fence, code="busy", message="x", retryable=False)
    else:
        bench.registry.jobs.release_lost(job, claim.fence)
    after = bench.registry.workspaces.get("o/r#1")
    assert (after.last_active, after.last_signal, after.signals) == (before.last_active, "register", {})
