"""Failed runs: when they are tried again, and when no more (Q-06, Q-07, Q-50, Q-51)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mothball.registry import BACKOFF_MS, FailResult
from tests.integration.registry.support import HOST, LEASE, TASK, Bench


def fail(bench: Bench, ident: str, fence: int, *, retryable: bool = True, message: str = "boom") -> FailResult:
    return bench.registry.jobs.fail(ident, fence, code="no_space", message=message, retryable=retryable)


def test_q50_delays_and_jitter(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(max_attempts=8)
    assert BACKOFF_MS == (30_000, 60_000, 120_000, 300_000, 600_000)
    bench.workspace("o/r#1")
    now = bench.registry.time_ms()
    jitters = set()
    ident = bench.submit().id
    for attempt in range(1, 8):
        with bench.at(now) as registry:
            claim = registry.jobs.claim(ident, host=HOST, worker="w", lease_ms=LEASE)
            assert claim.status == "run"
            result = registry.jobs.fail(ident, claim.fence, code="busy", message="x", retryable=True)
        delay = BACKOFF_MS[min(attempt, 5) - 1]
        assert result.state == "queued"
        assert result.due_at is not None
        assert delay <= result.due_at - now <= delay * 1.1
        jitters.add((result.due_at - now - delay) / delay)
        with bench.at(result.due_at - 1) as registry:
            assert registry.jobs.claim(ident, host=HOST, worker="w", lease_ms=LEASE).status == "not_due"
            assert registry.jobs.ring() == []
        now = result.due_at  # due at equality
    assert len(jitters) > 1
    assert bench.registry.jobs.get(ident).attempts == 7


def test_q50_the_last_attempt_has_failed_for_good(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(max_attempts=2)
    bench.workspace("o/r#1")
    claim = bench.run()
    assert claim.job is not None
    ident = claim.job.id
    first = fail(bench, ident, claim.fence)
    assert first.state == "queued"
    assert first.due_at is not None
    with bench.at(first.due_at) as registry:
        claim = registry.jobs.claim(ident, host=HOST, worker="w", lease_ms=LEASE)
    last = bench.registry.jobs.fail(ident, claim.fence, code="no_space", message="full", retryable=True)
    assert (last.state, last.due_at) == ("failed", None)
    job = bench.registry.jobs.get(ident)
    assert (job.attempts, job.deliveries, job.error_code, job.error) == (2, 2, "no_space", "full")
    assert bench.raw.pttl(bench.key(f"job:{ident}")) > 0
    assert (bench.counter("jobs_failed"), bench.counter(f"jobs_failed:{TASK}"), bench.counter("jobs_retried")) == (1, 1, 1)
    assert bench.kinds()[-2:] == ["job.started", "job.failed"]


def test_a_fatal_error_is_not_tried_again(bench: Bench) -> None:
    bench.workspace("o/r#1")
    claim = bench.run()
    assert claim.job is not None
    assert fail(bench, claim.job.id, claim.fence, retryable=False).state == "failed"
    assert bench.counter("jobs_retried") == 0
    assert bench.registry.workspaces.release("o/r#1")  # the lease is gone


def test_q07_the_workspace_remembers_failures_until_q06_a_success(bench: Bench) -> None:
    bench.workspace("o/r#1")
    for n in (1, 2):
        claim = bench.run()
        assert claim.job is not None
        fail(bench, claim.job.id, claim.fence, retryable=False, message=f"no {n}")
        ws = bench.registry.workspaces.get("o/r#1")
        assert (ws.last_error, ws.retry_count) == (f"no {n}", n)
    claim = bench.run()
    assert claim.job is not None
    bench.registry.jobs.finish(claim.job.id, claim.fence, {}, {"generation": 1})
    ws = bench.registry.workspaces.get("o/r#1")
    assert (ws.last_error, ws.retry_count) == ("", 0)
    assert ws.last_good_at is not None


def test_a_failure_reported_twice_counts_once(bench: Bench) -> None:
    bench.workspace("o/r#1")
    claim = bench.run()
    assert claim.job is not None
    first = fail(bench, claim.job.id, claim.fence)
    assert fail(bench, claim.job.id, claim.fence) == first
    assert bench.registry.jobs.get(claim.job.id).attempts == 1
    final = bench.run()
    assert final.job is not None
    for _ in range(2):
        assert fail(bench, final.job.id, final.fence, retryable=False).state == "failed"
    assert bench.counter("jobs_failed") == 1
    assert bench.registry.workspaces.get("o/r#1").retry_count == 2


def test_q51_a_request_joins_a_job_that_waits_out_its_backoff_and_wakes_it(bench: Bench) -> None:
    bench.workspace("o/r#1")
    job = bench.submit(args={"paths": ["a"]}, lane="capture")
    claim = bench.claim(job.id)
    fail(bench, job.id, claim.fence)
    assert bench.claim(job.id).status == "not_due"
    assert bench.raw.zscore(bench.key("jobs:ring"), job.id) is None  # its own time rings it, nothing else
    again = bench.registry.jobs.submit(TASK, {"paths": ["b"]}, workspace="o/r#1", lane="capture")
    assert again.joined
    assert (again.job.id, again.job.args, again.job.due_at) == (job.id, {"paths": ["a", "b"]}, None)
    assert again.ring
    assert bench.registry.jobs.ring() == []  # the caller rings; the ring only repeats it
    assert bench.claim(job.id).status == "run"


def test_q51_a_failed_run_does_not_steal_the_lane_of_the_job_queued_behind_it(bench: Bench) -> None:
    bench.workspace("o/r#1")
    first = bench.submit(lane="capture")
    claim = bench.claim(first.id)
    second = bench.submit(lane="capture")
    fail(bench, first.id, claim.fence)
    assert bench.submit(lane="capture").id == second.id
    assert bench.registry.jobs.get(first.id).state == "queued"


def test_a_due_retry_is_rung_once(bench: Bench) -> None:
    bench.workspace("o/r#1")
    claim = bench.run()
    assert claim.job is not None
    result = bench.registry.jobs.fail(claim.job.id, claim.fence, code="busy", message="x", retryable=True)
    assert result.due_at is not None
    with bench.at(result.due_at) as registry:
        assert [bell.job for bell in registry.jobs.ring()] == [claim.job.id]
        assert registry.jobs.ring() == []
        assert registry.jobs.claim(claim.job.id, host=HOST, worker="w", lease_ms=LEASE).status == "run"
    assert bench.registry.jobs.get(claim.job.id).due_at is None


def test_dead_after_too_many_runs_without_an_outcome(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(max_deliveries=3)
    bench.workspace("o/r#1")
    ident = bench.submit(lane="capture").id
    for delivery in (1, 2, 3):
        claim = bench.claim(ident)
        assert claim.status == "run"
        assert claim.job is not None
        assert claim.job.deliveries == delivery
        if delivery % 2:
            bell = bench.registry.jobs.release_lost(ident, claim.fence)
            assert bell is not None
            assert bell.job == ident
        else:
            bench.lose_lease(ident)
    claim = bench.claim(ident)
    assert claim.status == "dead"
    job = bench.registry.jobs.get(ident)
    assert (job.state, job.deliveries, job.error_code) == ("dead", 3, "operation_failed")
    assert "3 runs" in (job.error or "")
    assert bench.counter("jobs_dead") == 1
    assert bench.kinds()[-1] == "job.dead"
    assert bench.claim(ident).status == "dead"
    assert bench.registry.workspaces.get("o/r#1").last_error == job.error
    assert not bench.raw.exists(bench.key("lane:capture:o/r#1"), bench.key("lease:o/r#1"))
    assert bench.raw.pttl(bench.key(f"job:{ident}")) > 0


def test_failed_runs_do_not_count_as_runs_without_an_outcome(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(max_deliveries=1, max_attempts=4)
    bench.workspace("o/r#1")
    now = bench.registry.time_ms()
    ident = bench.submit().id
    for state in ("queued", "queued", "queued", "failed"):
        with bench.at(now) as registry:
            claim = registry.jobs.claim(ident, host=HOST, worker="w", lease_ms=LEASE)
            assert claim.status == "run"
            result = registry.jobs.fail(ident, claim.fence, code="busy", message="x", retryable=True)
        assert result.state == state
        now = result.due_at or now


def test_a_lost_run_is_back_in_the_queue_at_once(bench: Bench) -> None:
    bench.workspace("o/r#1")
    job = bench.submit(lane="capture", args={"full": True})
    claim = bench.claim(job.id)
    bell = bench.registry.jobs.release_lost(job.id, claim.fence)
    assert bell is not None
    assert (bell.job, bell.task, bell.queue) == (job.id, TASK, "host.h1")
    assert bench.state(job.id) == "queued"
    assert bench.submit(lane="capture").id == job.id  # it holds its lane again
    assert bench.claim(job.id).fence > claim.fence
    assert bench.counter("jobs_lost") == 1
    assert bench.registry.workspaces.get("o/r#1").retry_count == 0


@pytest.mark.parametrize("code", ["x" * 200, ""])
def test_long_errors_are_cut(bench: Bench, code: str) -> None:
    bench.workspace("o/r#1")
    claim = bench.run()
    assert claim.job is not None
    bench.registry.jobs.fail(claim.job.id, claim.fence, code=code, message="m" * 10_000, retryable=False)
    job = bench.registry.jobs.get(claim.job.id)
    assert len(job.error or "") == 2000
    assert len(job.error_code or "") <= 64


def test_orderly_shutdowns_are_not_lost_runs(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(max_deliveries=2)
    bench.workspace("o/r#1")
    ident = bench.submit().id
    for _ in range(5):
        claim = bench.claim(ident)
        assert claim.status == "run"
        bell = bench.registry.jobs.release_lost(ident, claim.fence, interrupted=True)
        assert bell is not None
        assert bell.job == ident
    assert (bench.counter("jobs_lost"), bench.kinds().count("job.interrupted")) == (0, 5)
    for _ in range(2):
        claim = bench.claim(ident)
        assert claim.status == "run"
        bench.registry.jobs.release_lost(ident, claim.fence)
    assert bench.claim(ident).status == "dead"
    assert "2 runs" in (bench.registry.jobs.get(ident).error or "")
