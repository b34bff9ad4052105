"""A record costs at most 1.5 KB of Redis memory, its share of every index included."""

from __future__ import annotations

from typing import Any

from tests.integration.registry.support import HOST, Bench

LIMIT = 1536
MANY = 2000


def fields(n: int) -> dict[str, Any]:
    """A workspace as an agent registers it, with texts of usual length."""
    return {
        "path": f"/srv/workspaces/owner-repo{n % 20}-{n}", "title": "Fix the parser of dates in the importer",
        "agent_id": f"agent-{n:08d}", "intent": "make the importer accept ISO dates",
        "base_commit": f"{n:040x}", "runtime": {"driver": "process", "pid": 10_000 + n, "start_time": 88_123_450 + n},
    }  # fmt: skip


def memory(bench: Bench) -> int:
    """Bytes of every key that holds workspaces, their overhead included; records are measured whole and not by samples."""
    return sum(bench.raw.memory_usage(key, samples=0) for key in bench.raw.scan_iter(bench.key("ws:*"), count=1000))


def test_a_registered_captured_and_touched_record_costs_at_most_one_and_a_half_kilobytes(bench: Bench) -> None:
    for n in range(MANY):
        bench.workspace(f"owner/repo{n % 20}#{n}", **fields(n))
    registered = memory(bench) / MANY
    # A real capture of each would only make the test slow: one is made, and the others get what it wrote.
    with bench.at(bench.registry.time_ms() + 60_000) as later:
        job = later.jobs.submit("workspace.capture", {}, workspace="owner/repo0#0").job.id
        claim = later.jobs.claim(job, host=HOST, worker="w", lease_ms=1000)
        record = {
            "generation": 12,
            "digest": "sha256:" + "ab" * 32,
            "bytes": 123_456_789,
            "files": 4321,
            "stored_bytes": 12_345_678,
        }
        later.jobs.finish(job, claim.fence, {}, record)
        later.workspaces.note_snapshots("owner/repo0#0", HOST, 3, made="snap-3")
    model = bench.raw.hgetall(bench.key("ws:owner/repo0#0"))
    for n in range(MANY):
        own = bench.raw.hgetall(bench.key(f"ws:owner/repo{n % 20}#{n}"))
        bench.raw.hset(bench.key(f"ws:owner/repo{n % 20}#{n}"), mapping={**model, **own})
        bench.raw.zadd(bench.key(f"ws:good:{HOST}:owner/repo{n % 20}"), {f"owner/repo{n % 20}#{n}": 1_700_000_000_000 + n})
    # What a sweep leaves of a workspace that its policy never stops.
    due = bench.registry.lifecycle.due("stop", MANY)
    bench.registry.lifecycle.rescore("stop", [(*place, None) for place in due])
    captured = memory(bench) / MANY
    assert registered <= LIMIT, registered
    assert captured <= LIMIT, captured
    assert captured > registered > 500, "the measure sees the records"


def test_a_record_writes_nothing_that_is_empty(bench: Bench) -> None:
    bench.workspace("plain")
    assert sorted(bench.raw.hgetall(bench.key("ws:plain"))) == [
        "created_at", "fence", "generation", "host", "id", "last_active", "last_signal", "mode", "path", "registration", "state",
        "stored_bytes",
    ]  # fmt: skip


def test_a_long_path_does_not_change_the_form_of_a_record_on_our_own_server(bench: Bench) -> None:
    bench.workspace(
        "plain", path="/" + "x" * 400, policy={"ttl": "7d", "idle_ttl": "2d", "retention": "last=10,within=7d,daily=14,weekly=8"}
    )
    assert bench.raw.object("encoding", bench.key("ws:plain")) in {"listpack", "ziplist"}
    assert bench.raw.memory_usage(bench.key("ws:plain"), samples=0) < LIMIT
