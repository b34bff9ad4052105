"""Fencing: who lost the lease can waste time and change nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mothball.errors import InvalidParams, LeaseLost
from mothball.registry import Claim, Registry
from tests.integration.registry.support import LEASE, Bench

WRITES: dict[str, Callable[[Registry, str, int], object]] = {
    "renew": lambda r, ident, fence: r.jobs.renew(ident, fence, LEASE),
    "progress": lambda r, ident, fence: r.jobs.progress(ident, fence, {"stale": True}),
    "checkpoint": lambda r, ident, fence: r.jobs.checkpoint(ident, fence),
    "finish": lambda r, ident, fence: r.jobs.finish(ident, fence, {"stale": True}, {"generation": 99, "digest": "stale"}),
    "fail": lambda r, ident, fence: r.jobs.fail(ident, fence, code="busy", message="stale", retryable=True),
    "finish_cancelled": lambda r, ident, fence: r.jobs.finish_cancelled(ident, fence),
}


def everything(bench: Bench) -> dict[str, object]:
    """All of the registry's content but leases' remaining time."""
    read = {"hash": bench.raw.hgetall, "string": bench.raw.get, "set": bench.raw.smembers, "stream": bench.raw.xrange}
    read["zset"] = lambda key: bench.raw.zrange(key, 0, -1, withscores=True)
    read["list"] = lambda key: bench.raw.lrange(key, 0, -1)
    return {key: read[bench.raw.type(key)](key) for key in bench.raw.scan_iter(bench.key("*"))}


def taken_over(bench: Bench) -> tuple[str, Claim, Claim]:
    """A job whose first run lost its lease to a second."""
    bench.workspace("o/r#1")
    old = bench.run()
    assert old.job is not None
    bench.lose_lease(old.job.id)
    new = bench.claim(old.job.id)
    assert new.status == "run"
    assert new.fence > old.fence
    return old.job.id, old, new


@pytest.mark.parametrize("write", WRITES)
def test_a_write_of_a_run_that_was_taken_over_is_refused_and_changes_nothing(bench: Bench, write: str) -> None:
    ident, old, new = taken_over(bench)
    before = everything(bench)
    with pytest.raises(LeaseLost):
        WRITES[write](bench.registry, ident, old.fence)
    assert everything(bench) == before
    bench.registry.jobs.finish(ident, new.fence, {"fresh": True}, {"generation": 1, "digest": "fresh"})
    after = everything(bench)
    if write != "progress":
        with pytest.raises(LeaseLost):
            WRITES[write](bench.registry, ident, old.fence)
    assert everything(bench) == after
    assert bench.registry.workspaces.get("o/r#1").digest == "fresh"


def test_release_lost_of_a_run_that_was_taken_over_changes_nothing(bench: Bench) -> None:
    ident, old, _ = taken_over(bench)
    before = everything(bench)
    assert bench.registry.jobs.release_lost(ident, old.fence) is None
    assert everything(bench) == before


@pytest.mark.parametrize("write", WRITES)
def test_a_run_overtaken_by_another_job_of_the_workspace_is_refused(bench: Bench, write: str) -> None:
    bench.workspace("o/r#1")
    old = bench.run()
    assert old.job is not None
    bench.lose_lease(old.job.id)
    other = bench.run()
    assert other.fence > old.fence
    with pytest.raises(LeaseLost):
        WRITES[write](bench.registry, old.job.id, old.fence)
    # not even when that other job has come and gone
    assert other.job is not None
    bench.registry.jobs.finish(other.job.id, other.fence, {})
    with pytest.raises(LeaseLost):
        WRITES[write](bench.registry, old.job.id, old.fence)
    assert bench.registry.workspaces.get("o/r#1").generation == 0


@pytest.mark.parametrize("write", WRITES)
def test_a_run_of_a_workspace_released_meanwhile_is_refused(bench: Bench, write: str) -> None:
    bench.workspace("o/r#1")
    old = bench.run()
    assert old.job is not None
    bench.lose_lease(old.job.id)
    bench.registry.workspaces.release("o/r#1")
    for _ in range(2):
        with pytest.raises(LeaseLost):
            WRITES[write](bench.registry, old.job.id, old.fence)
        bench.workspace("o/r#1", path="/new")  # a namesake must not be written to either
    ws = bench.registry.workspaces.get("o/r#1")
    assert (ws.generation, ws.last_error, ws.digest) == (0, "", None)


@pytest.mark.parametrize("write", WRITES)
def test_a_run_that_the_ring_put_back_is_refused(bench: Bench, write: str) -> None:
    bench.workspace("o/r#1")
    old = bench.run()
    assert old.job is not None
    bench.lose_lease(old.job.id)
    assert [bell.job for bell in bench.registry.jobs.ring()] == [old.job.id]
    with pytest.raises(LeaseLost):
        WRITES[write](bench.registry, old.job.id, old.fence)
    assert bench.state(old.job.id) == "queued"


def test_a_lease_that_ran_out_unnoticed_is_taken_again(bench: Bench) -> None:
    bench.workspace("o/r#1")
    claim = bench.run()
    assert claim.job is not None
    ident, lease = claim.job.id, bench.key("lease:o/r#1")
    bench.lose_lease(ident)
    bench.registry.jobs.renew(ident, claim.fence, LEASE)
    assert bench.raw.hget(lease, "job") == ident
    assert bench.registry.jobs.ring() == []
    bench.lose_lease(ident)
    bench.registry.jobs.checkpoint(ident, claim.fence)
    assert bench.raw.pttl(lease) > 0
    assert bench.claim(ident, pid=2).status == "elsewhere"
    bench.lose_lease(ident)
    bench.registry.jobs.finish(ident, claim.fence, {}, {"generation": 1})
    assert bench.registry.workspaces.get("o/r#1").generation == 1


def test_a_checkpoint_never_shortens_or_lengthens_a_live_lease(bench: Bench) -> None:
    bench.workspace("o/r#1")
    claim = bench.claim(bench.submit().id, lease_ms=500_000)
    assert claim.job is not None
    bench.registry.jobs.checkpoint(claim.job.id, claim.fence)
    assert bench.raw.pttl(bench.key("lease:o/r#1")) > 400_000
    bench.registry.jobs.renew(claim.job.id, claim.fence, 1000)
    assert bench.raw.pttl(bench.key("lease:o/r#1")) <= 1000


def test_a_generation_below_the_stored_one_is_refused(bench: Bench) -> None:
    bench.workspace("o/r#1")
    for generation in (5, 5):
        claim = bench.run()
        assert claim.job is not None
        bench.registry.jobs.finish(claim.job.id, claim.fence, {}, {"generation": generation, "digest": "five"})
    claim = bench.run()
    assert claim.job is not None
    before = everything(bench)
    with pytest.raises(LeaseLost):
        bench.registry.jobs.finish(claim.job.id, claim.fence, {}, {"generation": 4, "digest": "four"})
    assert everything(bench) == before


def test_finish_releases_only_its_own_lease(bench: Bench) -> None:
    bench.workspace("o/r#1")
    claim = bench.run()
    assert claim.job is not None
    lease = bench.key("lease:o/r#1")
    bench.raw.hset(lease, "fence", str(claim.fence + 1))
    with pytest.raises(LeaseLost):
        bench.registry.jobs.finish(claim.job.id, claim.fence, {})
    assert bench.raw.exists(lease)


def test_fences_only_grow(bench: Bench) -> None:
    bench.workspace("o/r#1")
    fences = []
    for _ in range(5):
        claim = bench.run()
        assert claim.job is not None
        fences.append(claim.fence)
        bench.registry.jobs.finish(claim.job.id, claim.fence, {})
    assert fences == sorted(set(fences))


@pytest.mark.parametrize("fence", [-1, True, "1", 1.0])
def test_a_fence_is_a_whole_number(bench: Bench, fence: int) -> None:
    with pytest.raises(InvalidParams):
        bench.registry.jobs.checkpoint("j", fence)


@pytest.mark.parametrize("workspace", ["o/r#1", None])
def test_a_fence_does_not_repeat_when_redis_lost_its_last_writes(bench: Bench, workspace: str | None) -> None:
    bench.workspace("o/r#1")
    job = bench.submit(workspace)
    record = bench.key(f"ws:{workspace}" if workspace else f"job:{job.id}")
    before = bench.raw.hget(record, "fence")
    first = bench.claim(job.id)
    bench.lose_lease(job.id, workspace)
    bench.raw.hset(record, "fence", before)
    with bench.at(bench.registry.time_ms() + 10) as later:  # no server starts again within a millisecond
        second = bench.claim(job.id, registry=later)
    assert second.status == "run"
    assert second.fence > first.fence
    with pytest.raises(LeaseLost):
        bench.registry.jobs.finish(job.id, first.fence, {})


def test_a_worker_that_asks_again_hears_that_it_runs(bench: Bench) -> None:
    """The first answer was lost on the way: the run is its own."""
    bench.workspace("o/r#1")
    job = bench.submit()
    first = bench.claim(job.id, lease_ms=1000)
    again = bench.claim(job.id)
    assert (again.status, again.fence) == ("run", first.fence)
    assert again.job is not None
    assert again.job.deliveries == 1
    assert bench.raw.pttl(bench.key("lease:o/r#1")) > 1000
    assert bench.claim(job.id, pid=2).status == "elsewhere"
    assert bench.kinds().count("job.started") == 1
    bench.lose_lease(job.id)
    assert bench.claim(job.id).fence > first.fence, "without its lease it is a new run"
