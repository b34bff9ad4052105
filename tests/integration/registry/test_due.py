"""When the sweeps look at which workspace: marks, compared scores, walks of the indexes, and a Redis that goes back in time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mothball import policy
from mothball.errors import InvalidParams
from mothball.policy import Facts, Policy
from mothball.registry import Registry
from tests.integration.registry.support import HOST, Bench

KINDS = ("evict", "stop")


def facts(registry: Registry, ident: str = "o/r#1") -> Facts:
    found = registry.lifecycle.facts([ident])[0]
    assert found is not None
    return found


def settle(bench: Bench, at: int | None = None) -> int:
    """As after a sweep that found nothing to do: every workspace is looked at again at `at`, an hour from now."""
    at = bench.registry.time_ms() + 3_600_000 if at is None else at
    for kind in KINDS:
        bench.registry.lifecycle.rescore(kind, [(*place, at) for place in bench.registry.lifecycle.due(kind, 1000)])
    return at


def due(bench: Bench, kind: str = "evict") -> list[str]:
    return [ident for ident, _ in bench.registry.lifecycle.due(kind, 1000)]


def stop(bench: Bench, ident: str = "o/r#1") -> None:
    job = bench.registry.jobs.submit("workspace.stop", {}, workspace=ident, origin="beat").job.id
    claim = bench.claim(job)
    assert bench.registry.lifecycle.stopped(ident, job=job, fence=claim.fence, rule="stop_after") == "done"
    bench.registry.jobs.finish(job, claim.fence, {})


MARKING: dict[str, Callable[[Bench], Any]] = {
    "the first heartbeat": lambda bench: bench.registry.presence.heartbeat("o/r#1", "p", 1000),
    "unpin": lambda bench: bench.registry.workspaces.unpin("o/r#1"),
    "unhold": lambda bench: bench.registry.lifecycle.unhold("o/r#1"),
    "submit": lambda bench: bench.registry.lifecycle.transition("o/r#1", "submitted"),
    "strand": lambda bench: bench.registry.lifecycle.strand(facts(bench.registry, "o/r#2"), reason="explicit"),
    "stop": lambda bench: stop(bench, "o/r#2"),
    "its own policy": lambda bench: bench.registry.policies.set_workspace("o/r#1", {"ttl": "1h"}),
    "retention": lambda bench: bench.registry.retentions.set("o/r#1", "last=1"),
    "extension": lambda bench: bench.registry.lifecycle.extend(facts(bench.registry), bench.registry.time_ms() + 60_000),
    "register": lambda bench: bench.workspace("o/r#3"),
    "undelete": lambda bench: (bench.registry.workspaces.release("o/r#2"), bench.registry.lifecycle.undelete("o/r#2")),
}


@pytest.mark.parametrize("change", MARKING)
def test_what_may_bring_a_sweeps_work_forward_marks_the_workspace(bench: Bench, change: str) -> None:
    bench.workspace("o/r#1", pinned=True)
    bench.registry.lifecycle.hold("o/r#1", "x")
    bench.workspace("o/r#2")
    settle(bench)
    assert due(bench, "evict") == due(bench, "stop") == []
    MARKING[change](bench)
    assert len(due(bench, "evict")) == 1
    assert due(bench, "evict") == due(bench, "stop")


def test_signs_of_life_only_put_things_off_and_mark_nothing(bench: Bench) -> None:
    start = bench.workspace("o/r#1").created_at
    bench.registry.presence.heartbeat("o/r#1", "p", 1000)
    settle(bench)
    with bench.at(start + 60_000) as later:
        later.workspaces.touch("o/r#1")
        later.presence.heartbeat("o/r#1", "p", 60_000)
        later.lifecycle.hold("o/r#1", "x")
    assert due(bench) == []
    with bench.at(start + 61_000) as later:
        later.presence.heartbeat("o/r#1", "p", 1)  # a promise that ends earlier than the one before
    assert bench.registry.lifecycle.due("evict", 10, start + 60_999) == []
    assert [ident for ident, _ in bench.registry.lifecycle.due("evict", 10, start + 61_000)] == ["o/r#1"]


def test_a_score_is_only_replaced_as_it_was_read(bench: Bench) -> None:
    """A sweep that decided before a change cannot put the workspace off, not even when both fall into one millisecond."""
    now = bench.workspace("o/r#1").created_at
    with bench.at(now) as registry:
        seen = registry.lifecycle.due("evict", 10)
        registry.lifecycle.hold("o/r#1", "x")
        registry.lifecycle.unhold("o/r#1")
        assert registry.lifecycle.due("evict", 10) != seen
        assert registry.lifecycle.rescore("evict", [(*seen[0], now + 1000)]) == 0
        assert [ident for ident, _ in registry.lifecycle.due("evict", 10)] == ["o/r#1"]
        again = registry.lifecycle.due("evict", 10)
        assert registry.lifecycle.rescore("evict", [(*again[0], now + 1000)]) == 1
        assert registry.lifecycle.due("evict", 10) == []
        assert registry.lifecycle.due_at("evict", "o/r#1") == now + 1000


def test_what_is_never_due_by_time_leaves_the_index_and_so_does_what_is_gone(bench: Bench) -> None:
    bench.workspace("o/r#1")
    bench.raw.zadd(bench.key("ws:due:evict"), {"ghost": 5})
    places = bench.registry.lifecycle.due("evict", 10)
    assert bench.registry.lifecycle.rescore("evict", [(ident, score, None) for ident, score in places]) == 2
    assert bench.raw.exists(bench.key("ws:due:evict")) == 0
    bench.raw.zadd(bench.key("ws:due:evict"), {"ghost": 5})
    assert bench.registry.lifecycle.rescore("evict", [("ghost", 5, 10_000)]) == 1
    assert bench.raw.exists(bench.key("ws:due:evict")) == 0
    assert bench.registry.lifecycle.rescore("stop", []) == 0


def test_a_sweep_that_decided_by_the_policies_of_before_puts_nothing_off(bench: Bench) -> None:
    bench.workspace("o/r#1")
    book = bench.registry.policies.book()
    bench.registry.policies.set_fleet({"ttl": "1s"})
    [place] = bench.registry.lifecycle.due("evict", 10)
    late = bench.registry.time_ms() + 86_400_000
    assert bench.registry.lifecycle.rescore("evict", [(*place, late)], version=book.version) == 0
    assert due(bench) == ["o/r#1"]
    assert bench.registry.lifecycle.rescore("evict", [(*place, late)], version=bench.registry.policies.book().version) == 1


def test_due_pages_in_order_and_up_to_a_time(bench: Bench) -> None:
    for n in range(5):
        bench.workspace(f"w{n}")
    bench.raw.zadd(bench.key("ws:due:stop"), {f"w{n}": 1000 + n for n in range(5)})
    stop_due = bench.registry.lifecycle.due
    assert stop_due("stop", 2) == [("w0", 1000), ("w1", 1001)]
    assert stop_due("stop", 2, start=2) == [("w2", 1002), ("w3", 1003)]
    assert stop_due("stop", 10, 1002) == [("w0", 1000), ("w1", 1001), ("w2", 1002)]
    assert bench.registry.lifecycle.due_count("stop", 1002) == 3
    assert bench.registry.lifecycle.due_count("stop") == 5
    assert stop_due("stop", 0) == []
    for call in (stop_due, bench.registry.lifecycle.due_count):
        with pytest.raises(InvalidParams):
            call("other", 1)


def test_b72_the_oldest_come_first_equally_old_ones_by_id(bench: Bench) -> None:
    now = bench.registry.time_ms()
    for offset, idents in ((2, ["o/a#1"]), (1, ["o/b#1", "o/a#9", "o/a#2"]), (3, ["plain"])):
        with bench.at(now + offset) as registry:
            for ident in idents:
                registry.workspaces.register(ident, host=HOST, path="/p")
    oldest = bench.registry.lifecycle.oldest
    wanted = ["o/a#2", "o/a#9", "o/b#1", "o/a#1", "plain"]
    assert [ident for ident, _ in oldest(10)] == wanted
    assert [ident for ident, _ in oldest(10, repo="o/a")] == ["o/a#2", "o/a#9", "o/a#1"]
    for repo, ids in ((None, wanted), ("o/a", ["o/a#2", "o/a#9", "o/a#1"])):
        walked, after = [], None
        while page := oldest(1, after, repo):
            walked.append(page[0][0])
            after = page[-1]
        assert walked == ids
    # The place of one that was evicted meanwhile is still a place.
    after = ("o/a#9", now + 1)
    bench.registry.workspaces.release("o/a#9")
    assert oldest(2, after) == [("o/b#1", now + 1), ("o/a#1", now + 2)]
    assert oldest(0) == oldest(5, repo="none") == []
    assert bench.registry.workspaces.count("o/a") == 2


def test_q05_the_least_active_come_first(bench: Bench) -> None:
    now = bench.registry.time_ms()
    for n in range(700):
        bench.workspace(f"w{n:03}")
    with bench.at(now + 60_000) as later:
        later.workspaces.touch("w000")
    found = bench.registry.lifecycle.least_active(10_000)
    assert len(found) == 700
    assert found[-1] == ("w000", now + 60_000)
    walked: list[tuple[str, int]] = []
    while page := bench.registry.lifecycle.least_active(130, walked[-1] if walked else None):
        walked += page
    assert walked == found


def test_reading_facts_of_many_takes_few_round_trips_and_changes_nothing(bench: Bench) -> None:
    for n in range(50):
        bench.workspace(f"w{n}")
    before = {key: bench.raw.dump(key) for key in bench.raw.scan_iter(bench.key("*"))}
    found = bench.registry.lifecycle.facts([*(f"w{n}" for n in range(50)), "never"])
    assert [each.id if each else None for each in found] == [*(f"w{n}" for n in range(50)), None]
    assert {key: bench.raw.dump(key) for key in bench.raw.scan_iter(bench.key("*"))} == before
    assert bench.registry.lifecycle.facts([]) == []


def test_facts_say_what_the_record_and_its_surroundings_say(bench: Bench) -> None:
    bench.workspace("o/r#1", mode="persistent", expires_in_ms=60_000, policy={"ttl": "2h", "retention": "last=1"})
    running = bench.run("o/r#1")
    bench.claim(bench.submit("o/r#1").id)
    assert running.job is not None
    seen = facts(bench.registry)
    assert (seen.repo, seen.mode, seen.state, seen.driver, seen.queued) == ("o/r", "persistent", "active", "none", 1)
    assert (seen.lease_job, seen.policy) == (running.job.id, {"ttl": "2h", "retention": "last=1"})
    assert dict(seen.seen)["registration"] == seen.registration != ""


# -- notices --------------------------------------------------------------------------------------------------------


def test_a_notice_is_given_once_per_action_and_time(bench: Bench) -> None:
    bench.workspace("o/r#1")
    life = bench.registry.lifecycle
    at = bench.registry.time_ms() + 60_000
    seen = facts(bench.registry)
    assert life.noticed(seen, "evict", at, rule="ttl", detail="d") is True
    assert life.noticed(seen, "evict", at) is False
    seen = facts(bench.registry)
    assert seen.noticed == {"evict": at}
    assert life.noticed(seen, "evict", at) is False
    assert life.noticed(seen, "stop", at) is True
    assert life.noticed(facts(bench.registry), "evict", at + 1) is True
    assert facts(bench.registry).noticed == {"evict": at + 1, "stop": at}
    found = bench.registry.events.list(kind="workspace.notice")
    assert [(each.fields["action"], each.fields["due"]) for each in found] == [
        ("evict", str(at + 1)), ("stop", str(at)), ("evict", str(at)),
    ]  # fmt: skip
    assert (bench.counter("notices:evict"), bench.counter("notices:stop")) == (2, 1)
    with pytest.raises(InvalidParams):
        life.noticed(seen, "purge", at)
    bench.registry.workspaces.release("o/r#1")
    assert life.noticed(seen, "evict", at + 2) is False


def test_an_extension_puts_off_what_depends_on_time_so_many_times_and_no_more(bench: Bench) -> None:
    bench.workspace("o/r#1")
    life, now = bench.registry.lifecycle, bench.registry.time_ms()
    stale = facts(bench.registry)
    assert life.extend(stale, now + 60_000, "hook", most=2) is True
    assert life.extend(stale, now + 90_000, "hook", most=2) is False  # decided before that extension
    assert life.extend(facts(bench.registry), now + 50_000, "hook", most=2) is False  # says nothing new
    assert life.extend(facts(bench.registry), now + 90_000, "hook", most=2) is True
    assert life.extend(facts(bench.registry), now + 99_000, "hook", most=2) is False
    assert life.extend(facts(bench.registry), 5, "hook", most=9) is False
    seen = facts(bench.registry)
    assert (seen.extended_until, seen.extensions) == (now + 90_000, 2)
    assert policy.decide(seen, Policy(ttl=1), now + 90_000).action == "keep"
    assert policy.decide(seen, Policy(ttl=1), now + 90_001).action == "evict"
    assert len(bench.registry.events.list(kind="workspace.extended")) == bench.counter("extensions") == 2
    for wrong in (0, -1, 10**14):
        with pytest.raises(InvalidParams):
            life.extend(seen, wrong)


# -- a Redis that took over and is a second behind --------------------------------------------------------------------


def test_redis_may_go_back_a_second_and_nothing_breaks(bench: Bench) -> None:
    now = bench.registry.time_ms() + 100_000
    with bench.at(now) as registry:
        registry.workspaces.register("o/r#1", host=HOST, path="/1", expires_in_ms=3_600_000)
        registry.presence.heartbeat("o/r#1", "p", 60_000)
        registry.workspaces.register("o/r#2", host=HOST, path="/2")
    rules = Policy(ttl=1, idle_ttl=1, stop_after=1, max_age=1)
    with bench.at(now - 1000) as behind:
        record = behind.workspaces.get("o/r#2")
        touched = behind.workspaces.touch("o/r#2")
        assert (touched.moved, touched.last_active) == (False, record.last_active)
        assert policy.decide(facts(behind, "o/r#2"), rules, now - 1000).action == "keep"
        assert behind.presence.heartbeat("o/r#1", "p", 60_000) == now + 59_000
        assert facts(behind).last_active == now  # times of a record never fall back
        assert behind.lifecycle.strand(facts(behind, "o/r#2"), reason="explicit") == "done"
        back = behind.lifecycle.resume("o/r#2").workspace
        assert (back.state, back.last_active) == ("active", now)
        fence = back.fence
        assert behind.lifecycle.evict(facts(behind, "o/r#2"), rule="ttl") == "done"
        again = behind.lifecycle.undelete("o/r#2")
        assert again.fence > fence
        assert (again.created_at, again.last_active) == (now, now)
        first = again
        for _ in range(3):  # within one millisecond, and every life has a fence and a name of its own
            assert behind.lifecycle.evict(facts(behind, "o/r#2"), rule="asked", force=True) == "done"
            second = behind.lifecycle.undelete("o/r#2")
            assert second.fence > first.fence
            assert second.registration != first.registration
            first = second
        behind.workspaces.release("o/r#2")
        new, _ = behind.workspaces.register("o/r#2", host=HOST, path="/2")
        assert new.fence > first.fence
        marked = behind.lifecycle.due_count("evict", now)
    assert marked == 2
    with bench.at(now + 1) as later:
        assert policy.decide(facts(later), rules, now + 1).rule == "presence"


def test_d02_a_deadline_is_a_time_of_redis_and_survives_everything(bench: Bench) -> None:
    now = bench.registry.time_ms()
    with bench.at(now) as registry:
        registry.workspaces.register("o/r#1", host=HOST, path="/1", mode="persistent", expires_in_ms=60_000)
    for step in (
        lambda: stop(bench),
        lambda: bench.registry.lifecycle.resume("o/r#1"),
        lambda: bench.registry.workspaces.release("o/r#1"),
        lambda: bench.registry.lifecycle.undelete("o/r#1"),
    ):
        step()
    seen = facts(bench.registry)
    assert (seen.expires_at, seen.mode) == (now + 60_000, "persistent")
    plain = Policy(ttl=1, idle_ttl=1)
    assert policy.decide(seen, plain, (seen.extended_until or 0) - 1).action == "keep"
    assert policy.decide(seen, plain, (seen.extended_until or 0)).rule == "deadline"
