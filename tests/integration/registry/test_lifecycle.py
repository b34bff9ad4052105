"""The effects of decisions: evict, strand, abandon, stop, undelete; each happens once, or says why it did not."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from mothball import policy
from mothball.errors import Busy, Gone, InvalidParams, InvalidTransition, LeaseLost, NotFound
from mothball.policy import Facts
from mothball.registry import Claim
from tests.integration.registry.support import HOST, Bench


def facts(bench: Bench, ident: str = "o/r#1", job: str = "") -> Facts:
    found = bench.registry.lifecycle.facts([ident], job=job)[0]
    assert found is not None
    return found


def put(bench: Bench, ident: str, state: str) -> None:
    """The record in a state, with the index of that state."""
    bench.raw.hset(bench.key(f"ws:{ident}"), "state", state)
    if state != "active":
        bench.raw.sadd(bench.key(f"ws:state:{state}"), ident)


def store(bench: Bench, ident: str = "o/r#1", size: int = 100, generation: int = 1) -> None:
    """A capture of `size` bytes, asked for by nobody in particular."""
    claim = bench.run(ident, origin="beat")
    assert claim.job is not None
    fields = {"generation": generation, "digest": "sha256:" + "ab" * 32, "bytes": size, "stored_bytes": size}
    bench.registry.jobs.finish(claim.job.id, claim.fence, {}, fields)


def events(bench: Bench, kind: str) -> list[dict[str, str]]:
    return [each.fields for each in bench.registry.events.list(kind=kind)]


def leftovers(bench: Bench, ident: str = "o/r#1") -> list[str]:
    """Keys that still speak of a workspace, its tombstone, the stream, lists of jobs and the budget left aside."""
    names = []
    for key in bench.raw.scan_iter(bench.key("*")):
        name = key.removeprefix(bench.key(""))
        kind = bench.raw.type(key)
        inside = {
            "set": lambda key=key: bench.raw.sismember(key, ident),
            "zset": lambda key=key: bench.raw.zscore(key, ident) is not None,
        }.get(kind, lambda: False)()
        if inside or name in {f"ws:{ident}", f"presence:{ident}", f"wait:{ident}"}:
            names.append(name)
    return sorted(names)


# -- evict ----------------------------------------------------------------------------------------------------------


def test_b71_an_eviction_leaves_a_tombstone_one_counter_and_one_event(bench: Bench) -> None:
    bench.workspace("o/r#1", expires_in_ms=60_000)
    store(bench)
    assert bench.registry.lifecycle.evict(facts(bench), rule="ttl", detail="too old") == "done"
    with pytest.raises(Gone) as caught:
        bench.registry.workspaces.get("o/r#1")
    assert caught.value.fields["reason"] == "ttl"
    assert bench.counter("evicted:ttl") == 1
    [event] = events(bench, "workspace.evicted")
    assert (event["reason"], event["detail"], event["by"], event["digest"]) == ("ttl", "too old", "policy", "sha256:" + "ab" * 32)
    assert leftovers(bench) == []
    tomb = bench.registry.lifecycle.tombstone("o/r#1")
    assert tomb is not None
    assert (tomb["reason"], tomb["detail"], tomb["receipt"], tomb["digest"]) == ("ttl", "too old", None, "sha256:" + "ab" * 32)
    assert (tomb["record"]["path"], tomb["record"]["generation"]) == ("/ws/o/r#1", 1)
    window = bench.settings.tombstone_seconds * 1000
    assert 0 < bench.raw.pttl(bench.key("ws:gone:o/r#1")) <= window
    assert abs(tomb["until"] - tomb["at"] - window) < 2000


def test_b73_of_many_that_evict_one_workspace_exactly_one_does(bench: Bench) -> None:
    bench.workspace("o/r#1")
    seen = facts(bench)
    handles = [bench.another() for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda handle: handle.lifecycle.evict(seen, rule="ttl"), handles))
    assert sorted(answers) == ["done", *["gone"] * 5]
    assert bench.counter("evicted:ttl") == len(events(bench, "workspace.evicted")) == 1


def touch(bench: Bench) -> None:
    with bench.at(bench.registry.time_ms() + 60_000) as later:
        later.workspaces.touch("o/r#1")


def signal_within_the_debounce(bench: Bench) -> None:
    """It moves no `last_active`, and is yet the first of its name."""
    assert not bench.registry.workspaces.touch("o/r#1", "cpu").moved


def again(bench: Bench) -> None:
    bench.registry.workspaces.release("o/r#1")
    bench.workspace("o/r#1")


def fail(bench: Bench) -> None:
    claim = bench.run(origin="beat")
    assert claim.job is not None
    assert bench.registry.jobs.fail(claim.job.id, claim.fence, code="busy", message="x", retryable=True).state == "queued"


CHANGES: dict[str, Any] = {
    "touched": touch,
    "another signal": signal_within_the_debounce,
    "held": lambda bench: bench.registry.lifecycle.hold("o/r#1", "mine", "me"),
    "pinned": lambda bench: bench.registry.workspaces.pin("o/r#1"),
    "submitted": lambda bench: bench.registry.lifecycle.transition("o/r#1", "submitted"),
    "stopped": lambda bench: put(bench, "o/r#1", "stopped"),
    "captured": store,
    "present": lambda bench: bench.registry.presence.heartbeat("o/r#1", "p", 60_000),
    "a job is queued": lambda bench: bench.submit("o/r#1"),
    "a retry waits": fail,
    "another policy": lambda bench: bench.registry.policies.set_workspace("o/r#1", {"ttl": "never"}),
    "extended": lambda bench: bench.registry.lifecycle.extend(facts(bench), bench.registry.time_ms() + 60_000, "me"),
    "registered anew": again,
}


@pytest.mark.parametrize("change", CHANGES)
def test_n33_what_changed_since_it_was_decided_is_not_evicted(bench: Bench, change: str) -> None:
    bench.workspace("o/r#1")
    seen = facts(bench)
    CHANGES[change](bench)
    assert bench.registry.lifecycle.evict(seen, rule="ttl") == "changed"
    assert bench.registry.workspaces.get("o/r#1").id == "o/r#1"
    assert bench.counter("evicted:ttl") == 0
    assert events(bench, "workspace.evicted") == []


def test_b76_a_live_lease_keeps_a_workspace_from_policy_and_people(bench: Bench) -> None:
    bench.workspace("o/r#1")
    seen = facts(bench)
    claim = bench.run(origin="beat")
    assert claim.job is not None
    for force in (False, True):
        assert bench.registry.lifecycle.evict(seen, rule="ttl", force=force) == "busy"
    now = facts(bench)
    assert now.lease_job == claim.job.id
    assert now.lease_until is not None
    assert now.lease_until > bench.registry.time_ms()
    assert facts(bench, job=claim.job.id).lease_until is None
    bench.registry.jobs.finish(claim.job.id, claim.fence, {})
    assert bench.registry.lifecycle.evict(facts(bench), rule="ttl") == "done"


@pytest.mark.parametrize("state", ["submitted", "stranded"])
def test_d70_work_that_waits_for_a_verdict_or_its_agent_is_never_evicted(bench: Bench, state: str) -> None:
    bench.workspace("o/r#1")
    put(bench, "o/r#1", state)
    assert bench.registry.lifecycle.evict(facts(bench), rule="ttl") == "changed"
    with pytest.raises(InvalidTransition) as caught:
        bench.registry.lifecycle.evict(facts(bench), rule="asked", force=True)
    assert state in caught.value.message
    assert bench.registry.workspaces.get("o/r#1").state == state


def test_d70_a_state_that_nobody_knows_is_kept(bench: Bench) -> None:
    bench.workspace("o/r#1")
    bench.raw.hset(bench.key("ws:o/r#1"), "state", "verifying")
    assert bench.registry.lifecycle.evict(facts(bench), rule="ttl") == "changed"
    assert bench.registry.lifecycle.strand(facts(bench), reason="explicit") == "changed"
    with pytest.raises(InvalidTransition):
        bench.registry.lifecycle.transition("o/r#1", "submitted")


def test_q08_a_pin_keeps_a_workspace_from_the_policy_and_not_from_a_person(bench: Bench) -> None:
    bench.workspace("o/r#1", pinned=True)
    assert bench.registry.lifecycle.evict(facts(bench), rule="budget") == "changed"
    assert bench.registry.lifecycle.evict(facts(bench), rule="asked", force=True, by="me") == "done"
    assert events(bench, "workspace.evicted")[0]["by"] == "me"


def test_a_person_overrules_presence_and_queued_jobs_which_end_as_gone(bench: Bench) -> None:
    bench.workspace("o/r#1")
    bench.registry.presence.heartbeat("o/r#1", "p", 60_000)
    job = bench.submit("o/r#1")
    assert bench.registry.lifecycle.evict(facts(bench), rule="asked", force=True) == "done"
    bench.registry.jobs.ring()
    ended = bench.registry.jobs.get(job.id)
    assert (ended.state, ended.error_code) == ("failed", "gone")


def test_b42_a_hold_prevents_every_eviction_and_release(bench: Bench) -> None:
    bench.workspace("o/r#1")
    record = bench.registry.lifecycle.hold("o/r#1", "for the demo", by="ann")
    assert [(each["reason"], each["by"]) for each in record.holds] == [("for the demo", "ann")]
    with pytest.raises(Busy) as caught:
        bench.registry.lifecycle.evict(facts(bench), rule="asked", force=True)
    assert "ann (for the demo)" in caught.value.message
    with pytest.raises(Busy) as caught:
        bench.registry.workspaces.release("o/r#1")
    assert "ann (for the demo)" in caught.value.message
    assert bench.registry.lifecycle.evict(facts(bench), rule="ttl") == "changed"
    assert bench.registry.lifecycle.unhold("o/r#1").holds == []
    assert bench.registry.workspaces.release("o/r#1")


def test_holds_are_counted_one_by_one_and_ended_by_id_or_all_at_once(bench: Bench) -> None:
    bench.workspace("o/r#1")
    hold = bench.registry.lifecycle.hold
    first = hold("o/r#1", "a", "ann")
    assert hold("o/r#1", "a", "ann").holds == first.holds  # said twice is said once
    both = hold("o/r#1", 'b "x" \\ ä', "ben").holds
    assert [each["id"] for each in both] == ["hold-1", "hold-2"]
    assert both[1]["reason"] == 'b "x" \\ ä'
    with pytest.raises(NotFound):
        bench.registry.lifecycle.unhold("o/r#1", "hold-9")
    assert [each["id"] for each in bench.registry.lifecycle.unhold("o/r#1", "hold-1").holds] == ["hold-2"]
    assert [each["id"] for each in hold("o/r#1", "c").holds] == ["hold-2", "hold-3"]
    assert bench.registry.lifecycle.unhold("o/r#1", by="ann").holds == []
    assert bench.registry.lifecycle.unhold("o/r#1").holds == []
    assert len(events(bench, "workspace.held")) == 3
    assert [each["hold"] for each in events(bench, "workspace.unheld")] == ["hold-2 hold-3", "hold-1"]
    for reason in ("", "  ", "x" * 5000, "a\nb"):
        with pytest.raises(InvalidParams):
            hold("o/r#1", reason)
    for call in (lambda: hold("never", "x"), lambda: bench.registry.lifecycle.unhold("never")):
        with pytest.raises(NotFound):
            call()


def test_holds_are_bounded(bench: Bench) -> None:
    bench.workspace("o/r#1")
    for n in range(50):
        bench.registry.lifecycle.hold("o/r#1", f"reason {n}")
    with pytest.raises(Busy):
        bench.registry.lifecycle.hold("o/r#1", "one more")
    assert len(bench.registry.workspaces.get("o/r#1").holds) == 50


# -- an eviction by the job that holds the lease ---------------------------------------------------------------------


def purge(bench: Bench) -> tuple[Claim, str]:
    bench.workspace("o/r#1")
    job = bench.registry.jobs.submit("workspace.purge", {}, workspace="o/r#1", origin="beat").job.id
    claim = bench.claim(job)
    assert claim.status == "run"
    return claim, job


def test_b74_a_job_evicts_its_own_workspace_with_a_receipt_and_ends_as_usual(bench: Bench) -> None:
    claim, job = purge(bench)
    receipt = {"digest": "sha256:x", "files": 3}
    done = bench.registry.lifecycle.evict(facts(bench, job=job), rule="ttl", receipt=receipt, fence=(job, claim.fence))
    assert done == "done"
    bench.registry.jobs.checkpoint(job, claim.fence)
    bench.registry.jobs.finish(job, claim.fence, {"purged": True}, {"generation": 1, "bytes": 5})
    assert bench.registry.jobs.get(job).outcome == {"purged": True}
    assert leftovers(bench) == []
    tomb = bench.registry.lifecycle.tombstone("o/r#1")
    assert tomb is not None
    assert tomb["receipt"] == receipt


def test_b74_the_end_of_such_a_job_writes_nothing_into_a_new_registration(bench: Bench) -> None:
    claim, job = purge(bench)
    bench.registry.lifecycle.evict(facts(bench, job=job), rule="ttl", fence=(job, claim.fence))
    new = bench.workspace("o/r#1")
    result = bench.registry.jobs.fail(job, claim.fence, code="busy", message="late", retryable=False)
    assert result.state == "failed"
    assert bench.registry.workspaces.get("o/r#1") == new


def test_an_eviction_under_a_lease_that_was_lost_changes_nothing(bench: Bench) -> None:
    claim, job = purge(bench)
    seen = facts(bench, job=job)
    bench.lose_lease(job, "o/r#1")
    other = bench.run("o/r#1")
    assert bench.registry.lifecycle.evict(seen, rule="ttl", fence=(job, claim.fence)) == "changed"
    assert other.job is not None
    assert bench.registry.workspaces.get("o/r#1").fence == other.fence


# -- stop -----------------------------------------------------------------------------------------------------------


def stopping(bench: Bench) -> tuple[Claim, str]:
    bench.workspace("o/r#1")
    job = bench.registry.jobs.submit("workspace.stop", {}, workspace="o/r#1", origin="beat").job.id
    return bench.claim(job), job


def test_n33_a_stop_is_one_counter_and_one_event_under_the_fence_of_its_job(bench: Bench) -> None:
    claim, job = stopping(bench)
    seen = facts(bench, job=job)
    life = bench.registry.lifecycle
    assert life.begin_stop("o/r#1", seen.seen) == "done"
    evidence = {"exit": {"signal": 15}}
    for _ in range(2):  # asked again, because an answer was lost
        assert life.stopped("o/r#1", job=job, fence=claim.fence, rule="stop_after", evidence=evidence, seen=seen.seen) == "done"
    bench.registry.jobs.finish(job, claim.fence, {})
    record = bench.registry.workspaces.get("o/r#1")
    assert (record.state, record.state_reason) == ("stopped", "stop_after")
    assert record.state_since >= record.created_at
    assert record.last_signal == "register"  # ending it was no sign of its life
    assert bench.counter("stopped:stop_after") == 1
    [event] = events(bench, "workspace.stopped")
    assert (event["reason"], event["from"], event["job"]) == ("stop_after", "active", job)
    assert event["evidence"] == '{"exit": {"signal": 15}}'


def test_n33_what_showed_life_since_is_not_stopped(bench: Bench) -> None:
    claim, job = stopping(bench)
    seen = facts(bench, job=job).seen
    touch(bench)
    life = bench.registry.lifecycle
    assert life.begin_stop("o/r#1", seen) == "changed"
    assert life.stopped("o/r#1", job=job, fence=claim.fence, rule="stop_after", seen=seen) == "changed"
    assert bench.registry.workspaces.get("o/r#1").state == "active"
    assert bench.counter("stopped:stop_after") == 0


def test_an_id_that_is_evicted_while_it_is_being_stopped_stays_evicted(bench: Bench) -> None:
    claim, job = stopping(bench)
    seen = facts(bench, job=job)
    life = bench.registry.lifecycle
    assert life.evict(seen, rule="asked", force=True) == "busy"
    bench.lose_lease(job, "o/r#1")
    assert life.evict(seen, rule="asked", force=True) == "done"
    assert life.begin_stop("o/r#1", seen.seen) == "gone"
    assert life.stopped("o/r#1", job=job, fence=claim.fence, rule="stop_after", seen=seen.seen) == "gone"
    assert life.strand(seen, reason="heartbeats") == life.abandon(seen, reason="auto_ttl") == life.evict(seen, rule="ttl") == "gone"
    with pytest.raises(LeaseLost):
        bench.registry.jobs.finish(job, claim.fence, {})
    bench.workspace("o/r#1", path="/new")
    assert life.stopped("o/r#1", job=job, fence=claim.fence, rule="stop_after", seen=seen.seen) == "changed"
    assert life.evict(seen, rule="asked", force=True) == "changed"
    assert bench.registry.workspaces.get("o/r#1").state == "active"


# -- states ---------------------------------------------------------------------------------------------------------


def test_d03_the_table_of_the_scripts_is_that_of_the_policy(bench: Bench) -> None:
    """Every way from every state to every other is tried on a real record."""
    run = bench.registry.slots._scripts.run
    for state in policy.STATES:
        for to in policy.STATES:
            if state == to:
                continue
            ident = f"{state}-{to}"
            bench.workspace(ident)
            put(bench, ident, state)
            status = run("transition", ident, to, "test", "", "", "", "", 0, "")[0]
            assert status == ("done" if to in policy.TRANSITIONS[state] else "state"), (state, to)
            assert bench.registry.workspaces.get(ident).state == (to if status == "done" else state)
        bench.workspace(state)
        put(bench, state, state)
        done = bench.registry.lifecycle.evict(facts(bench, state), rule="ttl") == "done"
        assert done == (policy.EVICTED in policy.TRANSITIONS[state])


def test_d03_work_is_submitted_withdrawn_and_merged_and_nothing_else(bench: Bench) -> None:
    bench.workspace("o/r#1")
    go = bench.registry.lifecycle.transition
    assert go("o/r#1", "submitted", by="me", reason="MR 7").state == "submitted"
    assert go("o/r#1", "submitted").state == "submitted"  # asked twice is done once
    assert go("o/r#1", "active").state == "active"
    for wrong in ("merged", "stopped", "stranded", "abandoned", "evicted", "nonsense"):
        with pytest.raises(InvalidTransition) as caught:
            go("o/r#1", wrong)
        assert caught.value.fields["state"] == "active"
    go("o/r#1", "submitted")
    assert go("o/r#1", "merged").state == "merged"
    put(bench, "o/r#1", "stopped")
    with pytest.raises(InvalidTransition):
        go("o/r#1", "active")  # that is a resume, with its own rules
    assert [kind for kind in bench.kinds() if kind.startswith("workspace.")][1:] == [
        "workspace.submitted", "workspace.withdrawn", "workspace.submitted", "workspace.merged",
    ]  # fmt: skip
    assert events(bench, "workspace.submitted")[-1]["reason"] == "MR 7"
    for ident, error in (("never", NotFound),):
        with pytest.raises(error):
            go(ident, "submitted")


# -- undelete -------------------------------------------------------------------------------------------------------


def test_undelete_brings_everything_back_as_stopped(bench: Bench) -> None:
    before = bench.workspace("o/r#1", title="t", expires_in_ms=60_000, mode="persistent", runtime={"driver": "none"})
    store(bench, size=70)
    bench.registry.lifecycle.hold("o/r#1", "x")
    bench.registry.lifecycle.unhold("o/r#1")
    bench.registry.lifecycle.evict(facts(bench), rule="deadline")
    after = bench.registry.lifecycle.undelete("o/r#1", by="me")
    assert (after.state, after.state_reason) == ("stopped", "undelete")
    assert (after.title, after.path, after.mode) == ("t", before.path, "persistent")
    assert (after.created_at, after.expires_at, after.generation) == (before.created_at, before.expires_at, 1)
    assert (after.digest, after.stored_bytes, after.runtime) == ("sha256:" + "ab" * 32, 70, {"driver": "none"})
    assert after.fence > before.fence
    assert after.registration != before.registration
    assert after.extended_until is not None
    assert after.extended_until > bench.registry.time_ms()
    assert [each.id for each in bench.registry.workspaces.list(repo="o/r", host=HOST)] == ["o/r#1"]
    assert bench.raw.zscore(bench.key("ws:by:deadline"), "o/r#1") == before.expires_at
    assert bench.registry.workspaces.latest_of_repo("o/r", HOST) == "o/r#1"
    assert bench.registry.sessions.states()["stopped"] == 1
    assert bench.registry.lifecycle.tombstone("o/r#1") is None
    assert bench.counter("workspaces_undeleted") == len(events(bench, "workspace.undeleted")) == 1
    assert bench.registry.lifecycle.resume("o/r#1").outcome == "ok"
    assert bench.run("o/r#1").fence > after.fence


def test_undelete_brings_back_what_was_released_too(bench: Bench) -> None:
    bench.workspace("o/r#1")
    bench.registry.workspaces.release("o/r#1", by="me")
    assert bench.registry.lifecycle.undelete("o/r#1").state == "stopped"
    assert events(bench, "workspace.undeleted")[0]["evicted_for"] == "released"


def test_undelete_after_a_new_registration_is_refused_and_changes_nothing(bench: Bench) -> None:
    bench.workspace("o/r#1")
    bench.registry.workspaces.release("o/r#1")
    again = bench.workspace("o/r#1", path="/new")
    with pytest.raises(InvalidTransition) as caught:
        bench.registry.lifecycle.undelete("o/r#1")
    assert "/new" in caught.value.message
    assert bench.registry.workspaces.get("o/r#1") == again
    # and what is released then is the new one
    bench.registry.workspaces.release("o/r#1")
    assert bench.registry.lifecycle.undelete("o/r#1").path == "/new"


def test_undelete_of_what_nobody_remembers_is_not_found(bench: Bench) -> None:
    for ident in ("never", "was"):
        bench.workspace("was")
        bench.registry.workspaces.release("was")
        bench.raw.delete(bench.key("ws:gone:was"))
        with pytest.raises(NotFound):
            bench.registry.lifecycle.undelete(ident)
    bench.raw.hset(bench.key("ws:gone:old"), mapping={"reason": "released", "host": "h1", "fence": "1"})
    with pytest.raises(InvalidTransition) as caught:
        bench.registry.lifecycle.undelete("old")
    assert "older version" in caught.value.message


def test_q17_bytes_move_with_the_burial_and_back_and_q04_high_water_begins_anew(bench: Bench) -> None:
    bench.workspace("o/r#1")
    store(bench, size=5000)
    store(bench, size=2000, generation=2)
    assert bench.registry.workspaces.get("o/r#1").high_water_bytes == 5000
    state = bench.registry.budget.state
    assert (state().loaded, state().retained) == (7000, 0)
    bench.registry.lifecycle.evict(facts(bench), rule="budget")
    assert (state().loaded, state().retained) == (0, 7000)
    after = bench.registry.lifecycle.undelete("o/r#1")
    assert (state().loaded, state().retained) == (7000, 0)
    assert (after.bytes, after.high_water_bytes, after.stored_bytes) == (2000, 2000, 7000)


def test_d13_a_late_caller_is_told_gone_and_makes_no_ghost(bench: Bench) -> None:
    bench.workspace("o/r#1")
    bench.registry.presence.heartbeat("o/r#1", "p", 60_000)
    bench.registry.lifecycle.evict(facts(bench), rule="asked", force=True)
    for call in (
        lambda: bench.registry.workspaces.touch("o/r#1"),
        lambda: bench.registry.presence.heartbeat("o/r#1", "p", 1000),
        lambda: bench.registry.lifecycle.hold("o/r#1", "x"),
        lambda: bench.registry.lifecycle.resume("o/r#1"),
        lambda: bench.registry.lifecycle.transition("o/r#1", "submitted"),
        lambda: bench.registry.policies.set_workspace("o/r#1", {"ttl": "1h"}),
    ):
        with pytest.raises(Gone):
            call()
    assert bench.registry.presence.goodbye("o/r#1", "p") is False
    assert leftovers(bench) == []


@pytest.mark.parametrize("verb", ["pin", "unpin"])
def test_who_pins_or_unpins_says_what_a_record_made_again_does_not_know(bench: Bench, verb: str) -> None:
    ident = bench.workspace("o/r#1").id
    for unknown, left in (('["holds","pin_reason","pinned"]', ["holds"]), ('["pinned"]', [])):
        bench.raw.hset(bench.key(f"ws:{ident}"), mapping={"unknown": unknown, "pinned": ""})
        getattr(bench.registry.workspaces, verb)(ident, "reason")
        record = bench.registry.workspaces.get(ident)
        assert (record.unknown, record.pinned) == (left, verb == "pin")
