"""Leases, uses and last prunes of image caches in the registry; N-01, N-07, N-10 and the turns of hosts."""

from __future__ import annotations

import uuid
from collections import Counter

import pytest

from mothball.errors import Busy, HostOffline, InvalidParams, LeaseLost
from mothball.registry import caches as module
from mothball.registry.caches import offset_ms
from tests.integration.registry.support import HOST, Bench

DIR = "/var/cache/oci"
A, B, C = ("a" * 64, "b" * 64, "c" * 64)
DAY = 86_400_000


def lease_id() -> str:
    return str(uuid.uuid4())


def cache_keys(bench: Bench) -> list[str]:
    return sorted(bench.raw.scan_iter(bench.key("cache:*")))


def test_n07_a_lease_holds_until_it_runs_out_and_can_be_renewed_meanwhile(bench: Bench) -> None:
    one, start = lease_id(), bench.registry.time_ms()
    with bench.at(start) as now:
        taken = now.caches.lease(HOST, DIR, one, lasts_ms=10_000, by="build")
        assert (taken.began, taken.until) == (start, start + 10_000)
    with bench.at(start + 9_000) as later:
        renewed = later.caches.renew(HOST, DIR, one, lasts_ms=10_000, by="build")
        assert (renewed.began, renewed.until) == (start, start + 19_000)
    with bench.at(start + 19_001) as late, pytest.raises(LeaseLost, match="a prune may have begun"):
        late.caches.renew(HOST, DIR, one, lasts_ms=10_000)


def test_n07_leases_are_of_one_host_and_one_folder(bench: Bench) -> None:
    caches, one, two = bench.registry.caches, lease_id(), lease_id()
    caches.lease(HOST, DIR, one, lasts_ms=60_000, by="first")
    caches.lease(HOST, DIR, two, lasts_ms=60_000, by="second")
    assert {each.by for each in caches.leases(HOST, DIR)} == {"first", "second"}
    assert caches.leases("h2", DIR) == caches.leases(HOST, DIR + "2") == []
    assert caches.drop(HOST, DIR, one)
    assert not caches.drop(HOST, DIR, one)
    assert [each.id for each in caches.leases(HOST, DIR)] == [two]
    assert all(0 <= each.age < 60_000 for each in caches.leases(HOST, DIR))


def test_leases_that_ran_out_make_room_and_a_full_list_says_so(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_LEASES", 2)
    start = bench.registry.time_ms()
    with bench.at(start) as now:
        for lasts in (5_000, 60_000):
            now.caches.lease(HOST, DIR, lease_id(), lasts_ms=lasts)
        with pytest.raises(Busy, match="held on it already"):
            now.caches.lease(HOST, DIR, lease_id(), lasts_ms=5_000)
    with bench.at(start + 6_000) as later:
        later.caches.lease(HOST, DIR, lease_id(), lasts_ms=5_000)


@pytest.mark.parametrize(("lasts", "by"), [(0, ""), (True, ""), (86_400_001, ""), (5_000, "a\nb"), (5_000, "x" * 201)])
def test_a_lease_with_nonsense_is_refused(bench: Bench, lasts: int, by: str) -> None:
    with pytest.raises(InvalidParams):
        bench.registry.caches.lease(HOST, DIR, lease_id(), lasts_ms=lasts, by=by)


def test_n10_uses_are_remembered_as_ages_by_the_registrys_clock(bench: Bench) -> None:
    start = bench.registry.time_ms()
    with bench.at(start - 5_000) as before:
        assert before.caches.used(HOST, DIR, [A, f"sha256:{B}"]) == 2
    with bench.at(start - 1_000) as between:
        assert between.caches.used(HOST, DIR, [B]) == 2
    a, b, c = bench.registry.caches.ages(HOST, DIR, [f"sha256:{A}", f"sha256:{B}", f"sha256:{C}"])
    assert a is not None and b is not None and c is None
    assert 4_000 <= a - b <= 4_001 and 1_000 <= b < 60_000
    assert bench.registry.caches.ages(HOST, DIR, []) == []
    assert bench.registry.caches.ages("h2", DIR, [A]) == [None]


def test_n10_only_the_latest_uses_are_remembered_however_many_there_are(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_USED", 3)
    start = bench.registry.time_ms()
    for n in range(5):
        with bench.at(start - 5_000 + n * 1000) as now:
            assert now.caches.used(HOST, DIR, [f"{n:064x}"]) == min(n + 1, 3)
    known = [age is not None for age in bench.registry.caches.ages(HOST, DIR, [f"{n:064x}" for n in range(5)])]
    assert known == [False, False, True, True, True]


def test_thousands_of_digests_at_once_are_taken_in_pieces(bench: Bench) -> None:
    digests = [f"{n:064x}" for n in range(2_500)]
    assert bench.registry.caches.used(HOST, DIR, digests) == 2_500
    assert None not in bench.registry.caches.ages(HOST, DIR, digests)


def test_a_use_that_nobody_could_look_up_is_refused(bench: Bench) -> None:
    for wrong in ("latest", "sha256:abc", "sha512:" + "a" * 128, A.upper(), f"{A}\n"):
        with pytest.raises(InvalidParams, match="no digest"):
            bench.registry.caches.used(HOST, DIR, [wrong])
    with pytest.raises(HostOffline):
        bench.registry.caches.used("never-announced", DIR, [A])
    assert cache_keys(bench) == []


def test_n01_a_prune_is_counted_once_however_often_it_is_said(bench: Bench) -> None:
    caches = bench.registry.caches
    result = {"bytes_freed": 4096, "blobs_freed": 2, "errors": [], "leaked_asides": 0}
    assert caches.note_pruned(HOST, DIR, "job:1", result, reason="schedule")
    assert not caches.note_pruned(HOST, DIR, "job:1", result, reason="schedule")
    assert caches.note_pruned(HOST, DIR, "job:2", {**result, "bytes_freed": 1, "blobs_freed": 1}, reason="asked")
    counters = bench.registry.counters.all()
    assert {name: counters[name] for name in ("cache_prunes", "cache_freed_bytes", "cache_freed_blobs")} == {
        "cache_prunes": 2, "cache_freed_bytes": 4097, "cache_freed_blobs": 3,
    }  # fmt: skip
    told = bench.registry.events.list(kind="cache.pruned")
    assert [event.fields["reason"] for event in told] == ["asked", "schedule"]
    assert told[1].fields == {"host": HOST, "dir": DIR, "freed_bytes": "4096", "freed_blobs": "2", "reason": "schedule"}
    last = caches.last(HOST, DIR)
    assert last is not None
    assert last.result["bytes_freed"] == 1
    assert caches.last(HOST, "/other") is None


def test_a_prune_that_changed_nothing_is_counted_and_makes_no_event_unless_something_is_wrong(bench: Bench) -> None:
    result = {"bytes_freed": 0, "blobs_freed": 0, "errors": [], "leaked_asides": 0}
    assert bench.registry.caches.note_pruned(HOST, DIR, "1", result, reason="schedule")
    assert bench.registry.events.list(kind="cache.pruned") == []
    assert bench.registry.caches.note_pruned(HOST, DIR, "2", {**result, "errors": [{"path": "x"}]}, reason="schedule")
    assert len(bench.registry.events.list(kind="cache.pruned")) == 1
    assert bench.registry.counters.all()["cache_prunes"] == 2


def test_a_damaged_last_result_is_no_result(bench: Bench) -> None:
    result = {"bytes_freed": 0, "blobs_freed": 0}
    bench.registry.caches.note_pruned(HOST, DIR, "1", result, reason="asked")
    [name] = cache_keys(bench)
    assert bench.registry.caches.last(HOST, DIR) is not None
    for broken in ("{", "[]", "3", "[" * 5000):
        bench.raw.hset(name, "result", broken)
        assert bench.registry.caches.last(HOST, DIR) is None


def test_each_host_has_one_turn_per_interval_at_its_own_moment(bench: Bench) -> None:
    interval = DAY
    begin = (bench.registry.time_ms() // interval) * interval + offset_ms(HOST, interval)
    with bench.at(begin) as first:
        assert [first.caches.due(HOST, interval) for _ in range(3)] == [True, False, False]
        assert first.caches.due("h2", interval)
    with bench.at(begin + interval - 1) as end:
        assert not end.caches.due(HOST, interval)
    with bench.at(begin + interval) as following:
        assert following.caches.due(HOST, interval)


def test_a_turn_that_was_of_no_use_can_be_given_back(bench: Bench) -> None:
    caches = bench.registry.caches
    assert caches.due(HOST, DAY)
    caches.give_turn_back(HOST, DAY)
    assert caches.due(HOST, DAY)
    assert not caches.due(HOST, DAY)


def test_the_moments_of_a_thousand_hosts_are_spread_over_the_day() -> None:
    hours = Counter(offset_ms(f"host-{n}", DAY) // 3_600_000 for n in range(1000))
    assert set(hours) == set(range(24))
    assert max(hours.values()) < 1000 / 24 * 2
    assert offset_ms("host-1", DAY) == offset_ms("host-1", DAY)


def test_every_key_of_a_cache_runs_out(bench: Bench) -> None:
    caches = bench.registry.caches
    caches.lease(HOST, DIR, lease_id(), lasts_ms=5_000)
    caches.used(HOST, DIR, [A])
    caches.note_pruned(HOST, DIR, "1", {"bytes_freed": 0, "blobs_freed": 0}, reason="asked")
    caches.note_running(HOST, DIR, "cache-x", "job-1", 5_000)
    caches.calm(HOST, DIR, 5_000)
    caches.quarantined(HOST, DIR, 5_000)
    assert caches.running(HOST, DIR, "cache-x") == "job-1"
    assert caches.running(HOST, DIR, "cache-y") is None
    assert caches.calmed(HOST, DIR)
    assert not caches.calmed(HOST, "/other")
    found = cache_keys(bench)
    assert len(found) == 6
    assert all(bench.raw.pttl(name) > 0 for name in found)


def test_a_longer_lease_is_not_cut_by_a_shorter_one(bench: Bench) -> None:
    caches = bench.registry.caches
    caches.lease(HOST, DIR, lease_id(), lasts_ms=600_000)
    caches.lease(HOST, DIR, lease_id(), lasts_ms=1_000)
    [name] = cache_keys(bench)
    assert bench.raw.pttl(name) > 500_000


def test_a_path_with_colons_and_bytes_that_are_no_text_is_a_cache_of_its_own(bench: Bench) -> None:
    caches = bench.registry.caches
    for odd in ("/a:b", "/a", "/" + "x" * 4000, "/caf\udce9"):
        caches.lease(HOST, odd, lease_id(), lasts_ms=5_000, by="x")
        assert len(caches.leases(HOST, odd)) == 1
