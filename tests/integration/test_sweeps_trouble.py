"""The sweeps in trouble: many at once, several sweepers, damaged records, contradictions, hosts and clocks that are gone."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from billiard.exceptions import SoftTimeLimitExceeded

import tasks.lifecycle
from mothball.errors import InvalidParams, Unavailable
from mothball.policy import Facts
from mothball.registry import Registry
from mothball.settings import Settings
from tasks import services
from tasks.lifecycle import stop_stale, sweep_expired
from tests.integration.registry.support import Bench
from tests.integration.sweeping import DAY, HOUR, MINUTE, SECOND, Sweeping


def many(fleet: Sweeping, number: int, age: int) -> None:
    """`number` workspaces that are `age` ms old."""
    for each in range(number):
        fleet.registry.workspaces.register(f"w{each:05}", host="h1", path=f"/srv/w{each}")
    then = fleet.now - age
    pipe = fleet.raw.pipeline(transaction=False)
    for each in range(number):
        pipe.hset(fleet.key(f"ws:w{each:05}"), mapping={"created_at": then + each, "last_active": then + each})
        pipe.zadd(fleet.key("ws:by:created"), {f"w{each:05}": then + each})
    pipe.execute()


# -- many --------------------------------------------------------------------------------------------------------------


def test_thousands_that_expired_at_once_go_in_batches_and_others_are_served_in_between(make_fleet: Callable[..., Sweeping]) -> None:
    fleet = make_fleet(sweep_batch=50, events_max=100_000)
    fleet.policy(cap="never")
    many(fleet, 3000, 25 * HOUR)
    fleet.add("young")
    waits: list[float] = []
    stop = threading.Event()
    other = Registry.connect(fleet.settings)

    def work() -> None:
        while not stop.is_set():
            before = time.monotonic()
            other.workspaces.touch("young")
            waits.append(time.monotonic() - before)
            time.sleep(0.005)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        done = fleet.sweep()
    finally:
        stop.set()
        worker.join()
        other.close()
    assert (done["evicted"], done["remaining"]) == ({"ttl": 3000}, 0)
    assert fleet.ids() == ["young"]
    assert fleet.counters("evicted:") == {"evicted:ttl": 3000}
    assert len(waits) > 20
    assert max(waits) < 1, "somebody waited for the sweep"


def test_a_sweep_that_had_its_time_stops_at_a_batch_and_says_what_remains(
    make_fleet: Callable[..., Sweeping], monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = make_fleet(sweep_batch=50)
    fleet.policy(cap=10)
    many(fleet, 200, 25 * HOUR)
    with monkeypatch.context() as patch:
        patch.setattr(tasks.lifecycle, "MOST_SECONDS", 0)
        done = fleet.sweep()
    assert (done["evicted"], done["remaining"]) == ({"ttl": 50}, 150), "the cap waits too"
    assert fleet.sweep()["evicted"] == {"ttl": 150}


def test_kept_ones_at_the_front_do_not_hide_those_behind_them(make_fleet: Callable[..., Sweeping]) -> None:
    fleet = make_fleet(sweep_batch=10)
    many(fleet, 60, 25 * HOUR)
    for each in range(50):
        fleet.registry.workspaces.pin(f"w{each:05}")
    done = fleet.sweep()
    assert (done["evicted"], done["skipped"]) == ({"ttl": 10}, {"pin": 50})
    assert fleet.sweep()["skipped"] == {}, "what only a person can change is not looked at again and again"
    fleet.registry.workspaces.unpin("w00000")
    assert fleet.sweep()["evicted"] == {"ttl": 1}


# -- several at once ---------------------------------------------------------------------------------------------------


def test_four_sweepers_at_once_produce_each_effect_once(make_fleet: Callable[..., Sweeping]) -> None:
    fleet = make_fleet(sweep_batch=20, events_max=100_000)
    fleet.policy(cap=60, stop_after="2h")
    many(fleet, 300, HOUR)
    for each in range(100):
        fleet.age(f"w{each:05}", DAY)
    for each in range(250, 300):
        fleet.age(f"w{each:05}", 3 * HOUR)
    results = fleet.at_once(sweep_expired, 4)
    assert all(isinstance(done, dict) for done in results), results
    total: Counter[str] = Counter()
    for done in results:
        total.update(done["evicted"])
    assert total == {"ttl": 100, "cap": 140}
    assert fleet.counters("evicted:") == {"evicted:cap": 140, "evicted:ttl": 100}
    assert Counter(rule for _, rule in fleet.evicted()) == total
    assert len({each for each, _ in fleet.evicted()}) == 240
    assert len(fleet.ids()) == 60, "the cap exactly"


def test_four_sweepers_at_once_ask_for_each_stop_once_and_strand_once(make_fleet: Callable[..., Sweeping]) -> None:
    fleet = make_fleet(sweep_batch=7)
    fleet.policy(stop_after="2h")
    for each in range(30):
        fleet.add(f"idle{each}", 3 * HOUR)
        fleet.add(f"missed{each}")
        fleet.registry.presence.heartbeat(f"missed{each}", "agent", SECOND)
        fleet.age(f"missed{each}", MINUTE)
    results = fleet.at_once(stop_stale, 4)
    assert all(isinstance(done, dict) for done in results), results
    assert sum(done["stranded"].get("heartbeats", 0) for done in results) == 30
    assert fleet.counters("stranded:") == {"stranded:heartbeats": 30}
    assert len(fleet.events("workspace.stranded")) == 30
    assert len(fleet.jobs("workspace.stop")) == len(fleet.jobs("workspace.crash_report")) == 30


def test_what_changes_while_it_is_decided_is_left_alone(fleet: Sweeping, monkeypatch: pytest.MonkeyPatch) -> None:
    """A touch, a pin, a job and a heartbeat between the look and the act: the act finds that it was about another workspace."""
    fleet.policy(ttl="never", idle_ttl="1h")
    for name in ("touched", "pinned", "queued", "present", "idle"):
        fleet.add(name, 2 * HOUR)
    read = fleet.registry.lifecycle.facts

    def meanwhile(ids: Any, **more: Any) -> list[Facts | None]:
        found = read(ids, **more)
        fleet.registry.workspaces.touch("touched")
        fleet.registry.workspaces.pin("pinned")
        fleet.registry.jobs.submit("workspace.capture", {"workspace": "queued"}, workspace="queued", lane="capture")
        fleet.registry.presence.heartbeat("present", "agent", 60_000)
        return found

    monkeypatch.setattr(fleet.registry.lifecycle, "facts", meanwhile)
    done = fleet.sweep()
    assert (done["evicted"], done["skipped"]) == ({"idle_ttl": 1}, {"changed": 4})
    assert sorted(fleet.ids()) == ["pinned", "present", "queued", "touched"]


def test_an_id_that_is_evicted_while_its_stop_waits_is_gone_for_the_stop(fleet: Sweeping) -> None:
    fleet.policy(stop_after="2h")
    fleet.add("w", 3 * HOUR)
    fleet.stale()
    [job] = fleet.jobs("workspace.stop")
    assert fleet.registry.lifecycle.evict(fleet.facts("w"), rule="asked", by="ann", force=True) == "done"
    claim = fleet.registry.jobs.claim(job.id, host="h1", worker="h1/1", lease_ms=30_000)
    assert claim.status == "done"
    assert claim.job is not None
    assert (claim.job.state, claim.job.error_code) == ("failed", "gone")
    assert fleet.stale()["remaining"] == 0


# -- damage and contradictions -----------------------------------------------------------------------------------------


def test_one_damaged_record_is_kept_and_told_and_costs_no_other(fleet: Sweeping) -> None:
    for name in ("a", "damaged", "z"):
        fleet.add(name, 25 * HOUR)
    fleet.raw.hset(fleet.key("ws:damaged"), "created_at", "yesterday")
    done = fleet.sweep()
    assert (done["evicted"], done["skipped"]) == ({"ttl": 2}, {"unreadable": 1})
    assert fleet.raw.exists(fleet.key("ws:damaged"))
    assert [each for each, _ in fleet.plan("evict", now=fleet.now + 2 * MINUTE).problems] == ["damaged"]


def test_a_policy_that_cannot_be_read_keeps_its_workspace_and_a_fleet_policy_keeps_all(fleet: Sweeping) -> None:
    """Fail closed (D-70)."""
    for name in ("a", "b"):
        fleet.add(name, 25 * HOUR)
    fleet.set("a", policy='{"ttl": "soon"}')
    done = fleet.sweep()
    assert (done["evicted"], done["skipped"]) == ({"ttl": 1}, {"policy": 1})
    fleet.add("c", 25 * HOUR)
    fleet.raw.hset(fleet.key("policies"), "fleet", '{"ttl": -1}')
    done = fleet.sweep()
    assert (done["evicted"], done["skipped"]) == ({}, {"policy": 1})
    assert sorted(fleet.ids()) == ["a", "c"]


def test_a_contradictory_policy_is_refused_when_it_is_set(fleet: Sweeping) -> None:
    fleet.policy(idle_ttl="2h")
    with pytest.raises(InvalidParams, match="stop_after=3h must be less than idle_ttl=2h"):
        fleet.registry.policies.set_fleet({"idle_ttl": "2h", "stop_after": "3h"})
    assert fleet.registry.policies.book().fleet == {"idle_ttl": "2h"}


def test_a_bug_that_meets_one_workspace_costs_only_that_one(fleet: Sweeping, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", "c"):
        fleet.add(name, 25 * HOUR)
    evict = fleet.registry.lifecycle.evict

    def sometimes(facts: Facts, **more: Any) -> Any:
        if facts.id == "b":
            raise RecursionError("deep")
        return evict(facts, **more)

    with monkeypatch.context() as patch:
        patch.setattr(fleet.registry.lifecycle, "evict", sometimes)
        done = fleet.sweep()
        assert (done["evicted"], done["skipped"], done["remaining"]) == ({"ttl": 2}, {"failed": 1}, 0)
    fleet.age("b", 2 * MINUTE)
    assert fleet.sweep()["evicted"] == {"ttl": 1}


def test_a_registry_that_goes_away_ends_the_sweep_and_the_next_one_goes_on(
    fleet: Sweeping, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c", "d"):
        fleet.add(name, 25 * HOUR)
    calls: list[str] = []

    def away(facts: Facts, **_: Any) -> Any:
        calls.append(facts.id)
        raise Unavailable(url="redis://x", reason="refused")

    with monkeypatch.context() as patch:
        patch.setattr(fleet.registry.lifecycle, "evict", away)
        done = fleet.sweep()
    assert len(calls) == 2, "each call may wait for seconds"
    assert (done["evicted"], done["skipped"], done["remaining"]) == ({}, {"unavailable": 2}, 4)
    assert fleet.sweep()["evicted"] == {"ttl": 4}


def test_a_time_limit_ends_the_sweep_at_once(fleet: Sweeping, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet.add("a", 25 * HOUR)

    def late(*_: Any, **__: Any) -> Any:
        raise SoftTimeLimitExceeded

    monkeypatch.setattr(fleet.registry.lifecycle, "evict", late)
    with pytest.raises(SoftTimeLimitExceeded):
        fleet.sweep()


def test_a_broker_that_is_away_costs_the_doorbells_only(fleet: Sweeping, make_settings: Callable[..., Settings]) -> None:
    from mothball.doorbell import DoorbellRinger

    fleet.policy(stop_after="2h")
    for number in range(4):
        fleet.add(f"w{number}", 3 * HOUR)
    nowhere = make_settings(redis_url="redis://127.0.0.1:1", redis_timeout=0.5)
    deaf = services.Services(pid=0, settings=fleet.settings, registry=fleet.registry, ringer=DoorbellRinger(nowhere))
    started = time.monotonic()
    assert stop_stale(deaf)["stopped"] == 4
    assert time.monotonic() - started < 5
    assert len(fleet.registry.jobs.list(state="queued")) == 4


# -- hosts and clocks --------------------------------------------------------------------------------------------------


def silent(fleet: Sweeping, host: str, ms: int) -> None:
    """`host` was last heard `ms` ago."""
    fleet.registry.hosts.heartbeat(host, {})
    fleet.raw.hset(fleet.key(f"host:{host}"), "last_seen", fleet.now - ms)
    for index in ("hosts", "hosts:online"):
        fleet.raw.zadd(fleet.key(index), {host: fleet.now - ms})
    fleet.registry.hosts.check()


def test_of_a_host_that_is_gone_nothing_is_stopped_and_what_expired_is_evicted(fleet: Sweeping) -> None:
    fleet.policy(stop_after="2h")
    silent(fleet, "dead", 2 * HOUR)
    fleet.add("stale", 3 * HOUR, host="dead")
    fleet.add("expired", 25 * HOUR, host="dead")
    fleet.add("unknown", 3 * HOUR, host="never-announced")
    fleet.add("mine", 3 * HOUR)
    done = fleet.stale()
    assert (done["stopped"], done["skipped"]) == (1, {"host_offline": 2})
    assert [job.workspace for job in fleet.jobs("workspace.stop")] == ["mine"]
    assert fleet.sweep()["evicted"] == {"ttl": 1}


def test_a_job_that_waits_for_a_host_that_is_gone_for_good_keeps_nothing(fleet: Sweeping) -> None:
    """A host of minutes ago may be back in minutes, and its job with it."""
    for host, hours in (("dead", 2 * HOUR), ("away", 10 * MINUTE)):
        silent(fleet, host, hours)
        fleet.add(f"on-{host}", 25 * HOUR, host=host)
        fleet.registry.jobs.submit("workspace.capture", {"workspace": f"on-{host}"}, workspace=f"on-{host}")
    done = fleet.sweep()
    assert (done["evicted"], done["skipped"]) == ({"ttl": 1}, {"queued": 1})
    assert fleet.ids() == ["on-away"]


def test_the_clock_of_a_worker_decides_nothing(fleet: Sweeping, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet.policy(stop_after="2h")
    fleet.add("w")
    for jump in (400 * 86_400, -400 * 86_400):
        real = time.time
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda real=real, jump=jump: real() + jump)
            assert fleet.sweep()["evicted"] == {}
            assert fleet.stale()["stopped"] == 0
    fleet.age("w", 25 * HOUR)
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: 0.0)
        assert fleet.sweep()["evicted"] == {"ttl": 1}


def test_a_redis_that_goes_back_a_second_breaks_nothing(fleet: Sweeping) -> None:
    """A failover to a machine whose clock is behind: ages are negative for a moment, and nothing happens by that."""
    fleet.policy(stop_after="2h")
    fleet.add("young")
    fleet.registry.presence.heartbeat("young", "agent", 60_000)
    fleet.age("young", -SECOND)  # it is from a second ahead
    fleet.add("old", 25 * HOUR)
    bench = Bench(fleet.settings)
    try:
        with bench.at(fleet.now - SECOND) as behind:
            other = services.Services(pid=0, settings=fleet.settings, registry=behind, ringer=fleet.here.ringer)
            assert sweep_expired(other)["evicted"] == {"ttl": 1}
            assert stop_stale(other)["stopped"] == 0
    finally:
        bench.close()
    assert fleet.ids() == ["young"]
    assert fleet.state("young") == "active"
