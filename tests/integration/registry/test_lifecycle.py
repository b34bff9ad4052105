"""The effects of decisions: evict, strand, abandon, stop, resume, undelete; each happens once, or says why it did not."""

from __future__ import annotations

import pytest

from mothball import policy
from mothball.errors import Busy, Gone, InvalidTransition, NotFound, Stranded
from mothball.policy import Facts
from tests.integration.registry.support import HOST, Bench


def facts(bench: Bench, ident: str = "o/r#1") -> Facts:
    found = bench.registry.lifecycle.facts([ident])[0]
    assert found is not None
    return found


def strand(bench: Bench, ident: str = "o/r#1") -> None:
    assert bench.registry.lifecycle.strand(facts(bench, ident), reason="explicit") == "done"


def test_b71_an_eviction_leaves_a_tombstone_one_counter_and_one_event(bench: Bench) -> None:
    bench.workspace("o/r#1", expires_in_ms=60_000)
    assert bench.registry.lifecycle.evict(facts(bench), rule="ttl", detail="too old") == "done"
    with pytest.raises(Gone) as caught:
        bench.registry.workspaces.get("o/r#1")
    assert caught.value.fields["reason"] == "ttl"
    assert bench.counter("evicted:ttl") == 1
    [event] = [each for each in bench.registry.events.list() if each.kind == "workspace.evicted"]
    assert (event.fields["reason"], event.fields["detail"], event.fields["by"]) == ("ttl", "too old", "policy")
    assert [*bench.raw.scan_iter(bench.key("ws:*"))] == [bench.key("ws:gone:o/r#1")]
    tomb = bench.registry.lifecycle.tombstone("o/r#1")
    assert tomb is not None
    assert (tomb["reason"], tomb["detail"], tomb["receipt"]) == ("ttl", "too old", None)
    assert tomb["record"]["path"] == "/ws/o/r#1"


def test_what_changed_since_it_was_decided_is_not_evicted(bench: Bench) -> None:
    bench.workspace("o/r#1")
    seen = facts(bench)
    with bench.at(seen.last_active + 60_000) as later:
        later.workspaces.touch("o/r#1")
    assert bench.registry.lifecycle.evict(seen, rule="ttl") == "changed"
    assert bench.registry.workspaces.get("o/r#1").state == "active"
    assert bench.counter("evicted:ttl") == 0


def test_undelete_brings_everything_back_as_stopped(bench: Bench) -> None:
    before = bench.workspace("o/r#1", title="t", expires_in_ms=60_000)
    bench.registry.lifecycle.evict(facts(bench), rule="ttl")
    after = bench.registry.lifecycle.undelete("o/r#1", by="me")
    assert (after.state, after.title, after.path, after.created_at) == ("stopped", "t", before.path, before.created_at)
    assert after.fence > before.fence
    assert after.registration != before.registration
    assert [each.id for each in bench.registry.workspaces.list(repo="o/r", host=HOST)] == ["o/r#1"]
    assert bench.registry.lifecycle.tombstone("o/r#1") is None
    with pytest.raises(NotFound):
        bench.registry.lifecycle.undelete("never")


def test_undelete_after_a_new_registration_is_refused(bench: Bench) -> None:
    bench.workspace("o/r#1")
    bench.registry.workspaces.release("o/r#1")
    again = bench.workspace("o/r#1", path="/new")
    with pytest.raises(InvalidTransition):
        bench.registry.lifecycle.undelete("o/r#1")
    assert bench.registry.workspaces.get("o/r#1") == again


def test_d73_a_stranded_one_comes_back_only_for_its_agent(bench: Bench) -> None:
    bench.workspace("o/r#1", agent_id="a1")
    strand(bench)
    assert bench.registry.lifecycle.resume("o/r#1", agent_id="a2").outcome == "other_agent"
    with pytest.raises(Stranded):
        bench.workspace("o/r#1", agent_id="a2")
    assert bench.registry.lifecycle.resume("o/r#1", agent_id="a1").outcome == "ok"
    assert bench.registry.lifecycle.resume("o/r#1", agent_id="a1").outcome == "already_resumed"
    assert {name: bench.counter(f"resumed:{name}") for name in ("ok", "other_agent", "already_resumed")} == {
        "ok": 1,
        "other_agent": 2,
        "already_resumed": 1,
    }


def test_d03_the_table_of_the_scripts_is_that_of_the_policy(bench: Bench) -> None:
    """Every way from every state to every other is tried on a real record."""
    for n, state in enumerate(policy.STATES):
        for to in policy.STATES:
            ident = f"w{n}-{to}"
            bench.workspace(ident)
            bench.raw.hset(bench.key(f"ws:{ident}"), "state", state)
            seen = facts(bench, ident)
            if state == to:
                continue
            status = bench.registry.slots._scripts.run("transition", ident, to, "test", "", "", "", "", 0, "", *())
            assert (status[0] == "done") == (to in policy.TRANSITIONS[state]), (state, to, status)
            assert bench.registry.workspaces.get(ident).state == (to if status[0] == "done" else state)
            del seen
        ident = f"w{n}-evicted"
        bench.workspace(ident)
        bench.raw.hset(bench.key(f"ws:{ident}"), "state", state)
        done = bench.registry.lifecycle.evict(facts(bench, ident), rule="ttl") == "done"
        assert done == (policy.EVICTED in policy.TRANSITIONS[state])


def test_a_hold_prevents_every_eviction_and_release(bench: Bench) -> None:
    bench.workspace("o/r#1")
    record = bench.registry.lifecycle.hold("o/r#1", "for the demo", by="ann")
    assert [(each["reason"], each["by"]) for each in record.holds] == [("for the demo", "ann")]
    with pytest.raises(Busy):
        bench.registry.lifecycle.evict(facts(bench), rule="asked", force=True)
    with pytest.raises(Busy):
        bench.registry.workspaces.release("o/r#1")
    assert bench.registry.lifecycle.evict(facts(bench), rule="ttl") == "changed"
    assert bench.registry.lifecycle.unhold("o/r#1").holds == []
    assert bench.registry.workspaces.release("o/r#1")
