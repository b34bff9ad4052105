"""Hosts with heartbeats, the event stream, counters and the slots of sweeps."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from mothball.errors import InvalidParams, NotFound
from mothball.registry import HostCheck
from tests.integration.registry.support import Bench


def test_a_heartbeat_announces_a_host_and_keeps_what_it_says(bench: Bench) -> None:
    hosts = bench.registry.hosts
    assert not hosts.known("h9")
    with pytest.raises(NotFound):
        hosts.get("h9")
    hosts.heartbeat("h9", {"cpus": 2})
    hosts.heartbeat("h9", {"cpus": 4})
    host = hosts.get("h9")
    assert (host.info, host.online) == ({"cpus": 4}, True)
    assert abs(host.last_seen - bench.registry.time_ms()) < 5000
    assert [each.host for each in hosts.list()] == ["h1", "h9"]
    assert hosts.known("h9")
    assert [event.fields["host"] for event in bench.registry.events.list(kind="host.announced")] == ["h9", "h1"]
    with pytest.raises(InvalidParams):
        hosts.heartbeat("no/host", {})
    with pytest.raises(InvalidParams):
        hosts.heartbeat("h9", {"a": "x" * 70_000})


@pytest.mark.parametrize(("silence", "offline"), [(30_000, False), (30_001, True)])
def test_a_host_is_offline_after_strictly_more_than_its_silence(bench: Bench, silence: int, offline: bool) -> None:
    seen = bench.registry.hosts.get("h1").last_seen
    with bench.at(seen + silence) as registry:
        assert registry.hosts.check().went_offline == (["h1"] if offline else [])


def test_offline_and_online_are_reported_once_per_change(bench: Bench) -> None:
    now = bench.registry.hosts.get("h1").last_seen
    nothing = HostCheck(went_offline=[], came_back=[])
    assert bench.registry.hosts.check() == nothing
    with bench.at(now + 40_000) as registry, ThreadPoolExecutor(4) as pool:
        checks = list(pool.map(lambda _: registry.hosts.check(), range(8)))
        assert sorted(each.went_offline for each in checks) == [[]] * 7 + [["h1"]]
    with bench.at(now + 50_000) as registry:
        registry.hosts.heartbeat("h1", {})
        registry.hosts.heartbeat("h1", {})
        assert registry.hosts.check() == HostCheck(went_offline=[], came_back=["h1"])
        assert registry.hosts.check() == nothing
    with bench.at(now + 90_000) as registry:
        assert registry.hosts.check() == HostCheck(went_offline=["h1"], came_back=[])
        assert registry.hosts.check() == nothing
    assert [kind for kind in bench.kinds() if kind.startswith("host.o")] == ["host.offline", "host.online", "host.offline"]


def test_a_host_that_came_back_between_two_checks_is_no_news(bench: Bench) -> None:
    now = bench.registry.hosts.get("h1").last_seen
    with bench.at(now + 40_000) as registry:
        registry.hosts.heartbeat("h1", {})
        assert registry.hosts.check() == HostCheck(went_offline=[], came_back=[])


def test_online_follows_redis_time(bench: Bench) -> None:
    record = bench.key("host:h1")
    bench.raw.hset(record, "last_seen", bench.registry.time_ms() - 31_000)
    assert not bench.registry.hosts.get("h1").online
    bench.raw.hset(record, "last_seen", bench.registry.time_ms() - 25_000)
    assert bench.registry.hosts.list()[0].online


def test_only_a_host_without_workspaces_is_forgotten(bench: Bench) -> None:
    bench.registry.hosts.heartbeat("h2", {})
    bench.workspace("o/r#1", host="h2")
    seen = bench.registry.hosts.get("h1").last_seen
    with bench.at(seen + bench.settings.tombstone_seconds * 1000 + 5000) as registry:
        assert registry.hosts.check().went_offline == ["h1", "h2"]
        registry.hosts.check()
    assert [each.host for each in bench.registry.hosts.list()] == ["h2"]
    assert not bench.registry.hosts.known("h1")
    assert "host.forgotten" in bench.kinds()


def test_events_are_newest_first_and_filtered(bench: Bench) -> None:
    events = bench.registry.events
    bench.workspace("o/r#1")
    bench.workspace("o/r#2")
    events.add("sweep.done", items=3, note="fine", parts=["a"])
    newest = events.list(limit=1)[0]
    assert (newest.kind, newest.fields) == ("sweep.done", {"items": "3", "note": "fine", "parts": '["a"]'})
    assert abs(newest.at - bench.registry.time_ms()) < 5000
    assert [event.kind for event in events.list()][-1] == "host.announced"
    assert [event.fields["workspace"] for event in events.list(kind="workspace.registered")] == ["o/r#2", "o/r#1"]
    assert [event.kind for event in events.list(workspace="o/r#1")] == ["workspace.registered"]
    assert events.list(kind="nothing") == events.list(limit=0) == []
    assert newest.to_dict()["id"] == newest.id
    with pytest.raises(InvalidParams):
        events.add("Not a kind")


def test_a_filter_reaches_past_the_first_batch(bench: Bench) -> None:
    bench.workspace("o/r#1")
    for n in range(1100):
        bench.registry.events.add("noise", n=n)
    assert len(bench.registry.events.list(workspace="o/r#1")) == 1
    assert len(bench.registry.events.list(limit=1050, kind="noise")) == 1050


def test_about_as_many_events_are_kept_as_the_setting_says(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(events_max=100)
    for n in range(500):
        bench.registry.events.add("noise", n=n)
    assert 100 <= bench.raw.xlen(bench.key("events")) <= 300


def test_follow_yields_what_comes_and_ends_in_time(bench: Bench) -> None:
    first = bench.registry.events.add("one")
    bench.registry.events.add("two")
    assert [event.kind for event in bench.registry.events.follow(after=first, timeout=0)] == ["two"]
    seen: list[str] = []
    thread = threading.Thread(target=lambda: seen.extend(event.kind for event in bench.another().events.follow(timeout=1.5)))
    start = time.monotonic()
    thread.start()
    time.sleep(0.3)
    bench.registry.events.add("three")
    thread.join(10)
    assert seen == ["three"]
    assert 1.3 < time.monotonic() - start < 4


def test_follow_outlives_a_silence_longer_than_the_socket_timeout(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(redis_timeout=0.5)
    assert list(bench.registry.events.follow(timeout=1.5)) == []


def test_one_of_many_claims_a_slot(bench: Bench) -> None:
    now = bench.registry.time_ms() // 10_000 * 10_000
    with bench.at(now) as registry, ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(lambda _: registry.slots.claim("maintenance.ring", 10_000), range(16))) == 1
        assert registry.slots.claim("maintenance.hosts", 10_000)
    with bench.at(now + 9_999) as registry:
        assert not registry.slots.claim("maintenance.ring", 10_000)
    with bench.at(now + 10_000) as registry:
        assert registry.slots.claim("maintenance.ring", 10_000)
    for key in bench.raw.scan_iter(bench.key("slot:*")):
        assert 0 < bench.raw.pttl(key) <= 20_000
    with pytest.raises(InvalidParams):
        bench.registry.slots.claim("x", 0)
    with pytest.raises(InvalidParams):
        bench.registry.slots.claim("not a sweep", 10)


def test_counters_start_empty_and_are_sorted(bench: Bench) -> None:
    assert bench.registry.counters.all() == {}
    bench.workspace("o/r#1")
    bench.submit()
    assert list(bench.registry.counters.all()) == ["jobs_submitted", "workspaces_registered"]
