"""Workspace records: register, look, touch, pin, release."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from mothball.errors import AlreadyExists, Busy, Gone, InvalidParams, NotFound
from mothball.registry import Registry
from tests.integration.registry.support import HOST, Bench


def test_q03_a_new_record_starts_from_zero(bench: Bench) -> None:
    record, created = bench.registry.workspaces.register("o/r#7", host=HOST, path="/ws/7", title="t", policy={"capture": {}})
    assert created
    assert (record.state, record.mode, record.fence, record.generation, record.digest) == ("active", "ephemeral", 0, 0, None)
    assert (record.bytes, record.high_water_bytes, record.retry_count, record.last_error, record.last_good_at) == (
        0,
        0,
        0,
        "",
        None,
    )
    assert record.created_at == record.last_active
    assert record.last_signal == "register"
    assert abs(record.created_at - bench.registry.time_ms()) < 5000
    assert bench.registry.workspaces.get("o/r#7") == record
    assert record.to_dict()["policy"] == {"capture": {}}


def test_b06_repo_and_number_follow_from_the_id(bench: Bench) -> None:
    assert (bench.workspace("owner/name#12").repo, bench.registry.workspaces.get("owner/name#12").number) == ("owner/name", 12)
    plain = bench.workspace("plain-id")
    assert (plain.repo, plain.number, plain.agent_name) == (None, None, None)


def test_registering_twice_is_the_same_record_and_changes_nothing(bench: Bench) -> None:
    first = bench.workspace("o/r#1", title="one")
    second, created = bench.registry.workspaces.register("o/r#1", host=HOST, path="/ws/o/r#1", title="two")
    assert not created
    assert second == first
    assert bench.counter("workspaces_registered") == 1
    assert bench.kinds().count("workspace.registered") == 1


@pytest.mark.parametrize("other", [{"path": "/elsewhere"}, {"host": "h2"}])
def test_the_same_id_with_another_path_or_host_already_exists(bench: Bench, other: dict[str, str]) -> None:
    bench.workspace("o/r#1")
    with pytest.raises(AlreadyExists) as caught:
        bench.workspace("o/r#1", **other)
    assert "/ws/o/r#1" in caught.value.message
    assert bench.registry.workspaces.get("o/r#1").path == "/ws/o/r#1"


def test_d11_of_many_that_register_one_id_at_once_exactly_one_creates(bench: Bench) -> None:
    def register(n: int) -> str:
        try:
            _, created = bench.registry.workspaces.register("o/r#1", host=HOST, path=f"/ws/{n % 2}")
        except AlreadyExists:
            return "refused"
        return "created" if created else "same"

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(register, range(16)))
    assert answers.count("created") == 1
    assert answers.count("refused") == 8
    assert bench.registry.workspaces.count() == 1


def test_b29_no_moment_shows_a_record_without_its_indexes_or_the_reverse(bench: Bench) -> None:
    """The reference inserted and trimmed in two steps and was over its cap in between; here every step is one script."""
    ids = [f"o/r#{number}" for number in range(20)]
    done = threading.Event()
    seen: list[list[int]] = []

    def watch() -> None:
        while not done.is_set() or not seen:
            pipe = bench.raw.pipeline(transaction=True)
            for ident in ids:
                pipe.exists(bench.key(f"ws:{ident}"))
            for index in ("by:created", "by:active"):
                pipe.zcard(bench.key(f"ws:{index}"))
            for index in ("repo:o/r", f"host:{HOST}"):
                pipe.scard(bench.key(f"ws:{index}"))
            *records, created, active, repo, host = pipe.execute()
            seen.append([sum(records), created, active, repo, host])

    def churn(registry: Registry) -> None:
        for _ in range(10):
            for ident in ids:
                registry.workspaces.register(ident, host=HOST, path=f"/ws/{ident}")
                registry.workspaces.release(ident)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(churn, [bench.another() for _ in range(3)]))
    finally:
        done.set()
        watcher.join()
    assert [counts for counts in seen if len(set(counts)) > 1] == []
    assert {counts[0] for counts in seen} - {0}, "the watcher saw nothing but an empty registry"


@pytest.mark.parametrize(
    "ident",
    ["", "a/../b", "..", "x" * 129, "-a", "a b", "a\nb", "ä", "by:created", "gone:x", "repo:x", "host:x", "good:x", None, 5],
)
def test_b06_an_id_that_is_none_is_refused_everywhere(bench: Bench, ident: str) -> None:
    for call in (
        lambda: bench.workspace(ident),
        lambda: bench.registry.workspaces.get(ident),
        lambda: bench.registry.workspaces.touch(ident),
        lambda: bench.registry.workspaces.release(ident),
        lambda: bench.registry.jobs.submit("t", {}, workspace=ident) if ident else bench.workspace(ident),
    ):
        with pytest.raises(InvalidParams):
            call()


def test_b06_an_id_of_128_characters_is_fine(bench: Bench) -> None:
    assert bench.workspace("x" * 128).id == "x" * 128


@pytest.mark.parametrize(
    "fields",
    [
        {"path": "relative"},
        {"path": "/a/../b"},
        {"path": "/a\0b"},
        {"path": "/" + "x" * 5000},
        {"host": "no/host"},
        {"mode": "eternal"},
        {"expires_in_ms": 0},
        {"expires_in_ms": True},
        {"number": -1},
        {"repo": "a b"},
        {"title": "x" * 5000},
        {"policy": {"a": "x" * 70_000}},
        {"runtime": {"a": object()}},
    ],
)
def test_fields_that_make_no_sense_are_refused_and_leave_nothing(bench: Bench, fields: dict[str, object]) -> None:
    with pytest.raises(InvalidParams):
        bench.workspace("o/r#1", **fields)
    assert bench.registry.workspaces.count() == 0


def test_a_path_that_is_not_utf8_keeps_its_bytes(bench: Bench) -> None:
    path = b"/ws/caf\xe9".decode("utf-8", "surrogateescape")
    bench.workspace("odd", path=path)
    assert bench.registry.workspaces.get("odd").path == path


def test_d05_agents_are_numbered_per_repo_and_never_reused(bench: Bench) -> None:
    names = [bench.workspace(f"o/{repo}#{n}").agent_name for repo, n in (("a", 1), ("b", 1), ("a", 2))]
    assert names == ["agent-1", "agent-1", "agent-2"]
    bench.workspace("o/a#1")  # the same record again takes no number
    assert bench.registry.workspaces.release("o/a#2")
    assert bench.workspace("o/a#2").agent_name == "agent-3"
    assert bench.workspace("o/a#4", agent_name="mine").agent_name == "mine"
    assert bench.workspace("o/a#5").agent_name == "agent-4"


def test_d14_lists_are_sorted_by_creation_and_id_and_filtered(bench: Bench) -> None:
    now = bench.registry.time_ms()
    for offset, ident, host in ((2, "o/a#1", "h1"), (1, "o/b#1", "h1"), (1, "o/a#9", "h2"), (1, "o/a#2", "h1")):
        with bench.at(now + offset) as registry:
            registry.workspaces.register(ident, host=host, path="/p")

    def ids(**by: Any) -> list[str]:
        return [each.id for each in bench.registry.workspaces.list(**by)]

    assert ids() == ["o/a#2", "o/a#9", "o/b#1", "o/a#1"]
    assert ids(repo="o/a") == ["o/a#2", "o/a#9", "o/a#1"]
    assert ids(repo="o/a", host="h1") == ["o/a#2", "o/a#1"]
    assert ids(host="h2") == ["o/a#9"]
    assert ids(limit=2) == ["o/a#2", "o/a#9"]
    assert ids(state="active", limit=1) == ["o/a#2"]
    assert ids(state="stopped") == ids(repo="none") == ids(host="none") == ids(limit=0) == []
    assert bench.registry.workspaces.count() == 4


def test_lists_longer_than_one_batch_are_whole(bench: Bench) -> None:
    for n in range(450):
        bench.workspace(f"w{n}")
    assert len(bench.registry.workspaces.list(host=HOST)) == len(bench.registry.workspaces.list()) == 450
    assert len(bench.registry.workspaces.list(limit=333)) == 333


@pytest.mark.parametrize(("elapsed", "moved"), [(29_999, False), (30_000, False), (30_001, True)])
def test_d06_a_touch_moves_only_when_strictly_more_than_30_s_passed(bench: Bench, elapsed: int, moved: bool) -> None:
    record = bench.workspace("o/r#1")
    with bench.at(record.last_active + elapsed) as registry:
        result = registry.workspaces.touch("o/r#1", "git")
    now = record.last_active + elapsed
    assert (result.moved, result.last_active, result.signal) == (
        (True, now, "git") if moved else (False, record.last_active, "register")
    )
    after = bench.registry.workspaces.get("o/r#1")
    assert (after.last_active, after.last_signal) == (result.last_active, result.signal)
    assert bench.raw.zscore(bench.key("ws:by:active"), "o/r#1") == result.last_active


def test_d06_touches_closer_together_than_the_debounce_never_add_up(bench: Bench) -> None:
    start = bench.workspace("o/r#1").last_active
    moved = []
    for elapsed in range(0, 100_000, 10_000):
        with bench.at(start + elapsed) as registry:
            if registry.workspaces.touch("o/r#1").moved:
                moved.append(elapsed)
    assert moved == [40_000, 80_000]


def test_touch_of_what_is_not_there(bench: Bench) -> None:
    with pytest.raises(NotFound):
        bench.registry.workspaces.touch("never")
    bench.workspace("was")
    bench.registry.workspaces.release("was")
    with pytest.raises(Gone):
        bench.registry.workspaces.touch("was")
    with pytest.raises(InvalidParams):
        bench.registry.workspaces.touch("was", "Not A Signal")


def test_q08_pin_and_unpin_leave_one_event_per_change(bench: Bench) -> None:
    bench.workspace("o/r#1")
    for _ in range(2):
        record = bench.registry.workspaces.pin("o/r#1", "demo", by="me")
    assert (record.pinned, record.pin_reason) == (True, "demo")
    assert not bench.registry.workspaces.unpin("o/r#1").pinned
    assert [kind for kind in bench.kinds() if "pin" in kind] == ["workspace.pinned", "workspace.unpinned"]
    pinned = bench.registry.events.list(kind="workspace.pinned")[0]
    assert (pinned.fields["by"], pinned.fields["reason"]) == ("me", "demo")
    with pytest.raises(NotFound):
        bench.registry.workspaces.pin("never")


def test_d15_a_deadline_is_indexed_by_redis_time(bench: Bench) -> None:
    record = bench.workspace("o/r#1", expires_in_ms=60_000, mode="persistent")
    assert record.expires_at == record.created_at + 60_000
    assert bench.raw.zscore(bench.key("ws:by:deadline"), "o/r#1") == record.expires_at
    bench.workspace("o/r#2")
    assert bench.raw.zcard(bench.key("ws:by:deadline")) == 1


def test_b42_release_is_idempotent_and_leaves_a_tombstone(bench: Bench) -> None:
    bench.workspace("o/r#1", expires_in_ms=60_000)
    assert bench.registry.workspaces.release("never") is False
    assert bench.registry.workspaces.release("o/r#1", by="me") is True
    assert bench.registry.workspaces.release("o/r#1") is False
    with pytest.raises(Gone) as caught:
        bench.registry.workspaces.get("o/r#1")
    assert caught.value.fields["reason"] == "released"
    with pytest.raises(NotFound):
        bench.registry.workspaces.get("never")
    left = {bench.raw.type(key) for key in bench.raw.scan_iter(bench.key("ws:*"))}
    assert left == {"hash"}
    assert [*bench.raw.scan_iter(bench.key("ws:*"))] == [bench.key("ws:gone:o/r#1")]
    ttl = bench.raw.pttl(bench.key("ws:gone:o/r#1"))
    assert 0 < ttl <= bench.settings.tombstone_seconds * 1000
    assert bench.counter("workspaces_released") == 1
    assert bench.kinds().count("workspace.released") == 1


def test_b42_release_under_a_live_lease_is_busy(bench: Bench) -> None:
    bench.workspace("o/r#1")
    claim = bench.run("o/r#1")
    with pytest.raises(Busy) as caught:
        bench.registry.workspaces.release("o/r#1")
    assert claim.job is not None
    assert claim.job.id in caught.value.message
    bench.registry.jobs.finish(claim.job.id, claim.fence, {})
    assert bench.registry.workspaces.release("o/r#1")


def test_b30_registering_again_goes_on_with_fence_and_generation(bench: Bench) -> None:
    bench.workspace("o/r#1")
    claim = bench.run("o/r#1")
    assert claim.job is not None
    bench.registry.jobs.finish(claim.job.id, claim.fence, {}, {"generation": 4, "digest": "sha256:4"})
    bench.registry.workspaces.release("o/r#1")
    record, created = bench.registry.workspaces.register("o/r#1", host=HOST, path="/other")
    assert created
    assert record.generation == 4
    assert record.fence > claim.fence
    assert bench.run("o/r#1").fence > record.fence
    assert bench.registry.workspaces.get("o/r#1").path == "/other"


def test_a_tombstone_that_ran_out_answers_not_found(bench: Bench) -> None:
    bench.workspace("o/r#1")
    bench.registry.workspaces.release("o/r#1")
    bench.raw.pexpire(bench.key("ws:gone:o/r#1"), 1)
    bench.raw.delete(bench.key("ws:gone:o/r#1"))
    with pytest.raises(NotFound):
        bench.registry.workspaces.get("o/r#1")


def test_the_latest_capture_of_a_repo_on_a_host(bench: Bench) -> None:
    now = bench.registry.time_ms()
    for n, (ident, host) in enumerate((("o/a#1", "h1"), ("o/a#2", "h1"), ("o/a#3", "h2"), ("o/a#4", "h1"))):
        bench.registry.hosts.heartbeat(host, {})
        bench.workspace(ident, host=host)
        if ident != "o/a#4":
            with bench.at(now + n) as registry:
                job = registry.jobs.submit("t", {}, workspace=ident).job.id
                claim = registry.jobs.claim(job, host=host, worker="w", lease_ms=1000)
                registry.jobs.finish(job, claim.fence, {}, {"generation": 1, "digest": "d"})
    latest = bench.registry.workspaces.latest_of_repo
    assert latest("o/a", "h1", exclude="o/a#4") == "o/a#2"
    assert latest("o/a", "h1", exclude="o/a#2") == "o/a#1"
    assert latest("o/a", "h2", exclude="o/a#3") is None
    assert latest("o/b", "h1") is None
    bench.registry.workspaces.release("o/a#2")
    assert latest("o/a", "h1") == "o/a#1"


def test_touch_debounce_follows_the_setting(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(touch_debounce_seconds=0)
    record = bench.workspace("o/r#1")
    with bench.at(record.last_active) as registry:
        assert not registry.workspaces.touch("o/r#1").moved
    with bench.at(record.last_active + 1) as registry:
        assert registry.workspaces.touch("o/r#1").moved


def test_a_list_reads_no_more_than_it_was_asked_for(bench: Bench) -> None:
    for n in range(450):
        bench.workspace(f"w{n:03}")

    def reads() -> int:
        return int(bench.raw.info("commandstats").get("cmdstat_hgetall", {"calls": 0})["calls"])

    ids = [each.id for each in bench.registry.workspaces.list()]
    assert ids == [f"w{n:03}" for n in range(450)]
    assert [each.id for each in bench.registry.workspaces.list(state="active", limit=250)] == ids[:250]
    for limit, most in ((0, 0), (-1, 0), (3, 3)):
        for state in (None, "active"):
            before = reads()
            assert len(bench.registry.workspaces.list(state=state, limit=limit)) == max(limit, 0)
            assert reads() - before <= (most if state is None or most == 0 else 200)
