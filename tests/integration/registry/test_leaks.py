"""Every key has a TTL or stands on the list of those that may stand."""

from __future__ import annotations

from fnmatch import fnmatchcase

from mothball.policy import Facts
from mothball.registry import Adopt, keys
from tests.integration.registry.support import HOST, LEASE, Bench


def standing(bench: Bench) -> list[str]:
    """Keys without a TTL, without the namespace."""
    names = keys.Keys(bench.settings.namespace)
    return sorted(names.bare(key) for key in bench.raw.scan_iter(bench.key("*"), count=1000) if bench.raw.pttl(key) == -1)


def allowed(name: str, *patterns: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def life(bench: Bench) -> None:
    """States, holds, notices, policies, an eviction and an undelete."""
    registry = bench.registry
    lifecycle = registry.lifecycle

    def facts(ident: str) -> Facts:
        found = lifecycle.facts([ident])[0]
        assert found is not None
        return found

    lifecycle.hold("o/r#1", "x")
    lifecycle.unhold("o/r#1")
    for ident in ("o/r#4", "o/r#5"):
        registry.presence.goodbye(ident, "p")
    assert lifecycle.noticed(facts("o/r#4"), "evict", registry.time_ms() + 1000)
    assert lifecycle.extend(facts("o/r#4"), registry.time_ms() + 60_000)
    assert lifecycle.evict(facts("o/r#4"), rule="ttl") == "done"
    assert lifecycle.undelete("o/r#4").state == "stopped"
    assert lifecycle.resume("o/r#4").outcome == "ok"
    assert lifecycle.strand(facts("o/r#5"), reason="explicit") == "done"
    assert lifecycle.resume("o/r#5").outcome == "ok"
    lifecycle.transition("o/r#5", "submitted")
    lifecycle.transition("o/r#5", "active")
    registry.policies.set_fleet({"ttl": "5h"})
    registry.policies.set_repo("o/r", {"ttl": "4h"})
    registry.policies.set_workspace("o/r#5", {"ttl": "3h"})
    while registry.policies.heal()["walking"]:
        pass


def live(bench: Bench) -> None:
    """Something of everything a fleet does, all of it brought to an end."""
    registry = bench.registry
    jobs = registry.jobs
    registry.hosts.heartbeat("h2", {})
    registry.slots.claim("maintenance.ring", 10_000)
    for n in range(6):
        bench.workspace(f"o/r#{n}", expires_in_ms=60_000)
        registry.workspaces.touch(f"o/r#{n}")
        registry.presence.heartbeat(f"o/r#{n}", "p", 60_000)
    registry.workspaces.pin("o/r#0", "x")
    life(bench)
    done = bench.run("o/r#0", lane="capture")
    waiting = bench.submit("o/r#0", lane="capture")
    assert bench.claim(waiting.id).status == "waiting"
    assert done.job is not None
    bell = jobs.finish(done.job.id, done.fence, {}, {"generation": 1, "digest": "d", "bytes": 1, "files": 1, "stored_bytes": 1})
    assert bell is not None
    jobs.finish(bell.job, bench.claim(bell.job).fence, {})
    retried = bench.run("o/r#1", lane="capture")
    assert retried.job is not None
    result = jobs.fail(retried.job.id, retried.fence, code="busy", message="x", retryable=True)
    with bench.at(result.due_at or 0) as later:
        later.jobs.ring()
        claim = later.jobs.claim(retried.job.id, host=HOST, worker="w", lease_ms=LEASE)
        later.jobs.fail(retried.job.id, claim.fence, code="busy", message="x", retryable=False)
    queued = bench.submit("o/r#2", lane="capture")
    jobs.cancel(queued.id)
    lost = bench.run("o/r#3", lane="capture")
    assert lost.job is not None
    waiter = bench.submit("o/r#3", lane="capture")
    bench.claim(waiter.id)
    bench.raw.hset(bench.key(f"job:{lost.job.id}"), "deliveries", bench.settings.max_deliveries)
    bench.lose_lease(lost.job.id, "o/r#3")
    assert bench.claim(lost.job.id).status == "dead"
    jobs.finish(waiter.id, bench.claim(waiter.id).fence, {})
    adopted = jobs.claim("plain", host=HOST, worker="w", lease_ms=LEASE, adopt=Adopt("image.prune", {}, None))
    jobs.release_lost("plain", adopted.fence)
    jobs.finish("plain", bench.claim("plain").fence, {})
    orphan = bench.submit("o/r#4", lane="capture")
    registry.workspaces.release("o/r#4")
    bench.claim(orphan.id)
    with bench.at(registry.time_ms() + 60_000) as later:
        later.hosts.check()
        assert later.jobs.ring() == []


def test_after_a_full_life_every_key_runs_out_or_may_stand(bench: Bench) -> None:
    live(bench)
    found = standing(bench)
    records = [name for name in found if name in {f"ws:o/r#{n}" for n in (0, 1, 2, 3, 5)}]
    assert len(records) == 5
    leaked = [name for name in found if name not in records and not allowed(name, *keys.STANDING)]
    assert leaked == []
    busy = [
        key
        for key in bench.raw.scan_iter(bench.key("*"))
        if allowed(keys.Keys(bench.settings.namespace).bare(key), *keys.WHILE_BUSY)
    ]
    assert busy == []


def test_a_fleet_without_workspaces_and_jobs_leaves_only_what_is_bounded(bench: Bench) -> None:
    live(bench)
    for n in range(6):
        bench.registry.workspaces.release(f"o/r#{n}")
    with bench.at(bench.registry.time_ms() + 1000 * (bench.settings.job_ttl_seconds + 60)) as later:
        later.jobs.ring()
    assert standing(bench) == [
        "agents:o/r", "budget", "budget:retained", "counters", "events", "host:h1", "host:h2", "hosts", "hosts:offline", "policies",
    ]  # fmt: skip


def test_while_busy_only_the_named_keys_stand(bench: Bench) -> None:
    bench.workspace("o/r#1")
    bench.run("o/r#1", lane="capture")
    assert bench.claim(bench.submit("o/r#1", lane="capture").id).status == "waiting"
    extra = [name for name in standing(bench) if not allowed(name, *keys.STANDING, *keys.WHILE_BUSY, "ws:o/r#1", "job:*")]
    assert extra == []
    assert allowed("waiting", *keys.WHILE_BUSY)


def test_the_list_of_a_workspaces_jobs_is_bounded(bench: Bench) -> None:
    bench.workspace("o/r#1")
    bench.raw.zadd(bench.key("jobs:ws:o/r#1"), {f"old{n}": n for n in range(1500)})
    bench.submit("o/r#1")
    assert bench.raw.zcard(bench.key("jobs:ws:o/r#1")) == 1000
    assert bench.raw.pttl(bench.key("jobs:ws:o/r#1")) > 0
