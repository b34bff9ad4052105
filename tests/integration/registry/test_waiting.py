"""Wait lists: jobs of one workspace take turns."""

from __future__ import annotations

from mothball.registry import Doorbell
from tests.integration.registry.support import Bench


def waiters(bench: Bench, count: int) -> tuple[str, int, list[str]]:
    """A running job with its fence, and `count` jobs that wait behind it."""
    bench.workspace("o/r#1")
    claim = bench.run()
    assert claim.job is not None
    jobs = [bench.submit().id for _ in range(count)]
    for ident in jobs:
        assert bench.claim(ident).status == "waiting"
    return claim.job.id, claim.fence, jobs


def name(bell: Doorbell | None) -> str | None:
    return bell.job if bell else None


def test_waiters_are_handed_the_lease_in_the_order_they_came(bench: Bench) -> None:
    running, fence, jobs = waiters(bench, 3)
    for ident in jobs:
        assert bench.claim(ident).status == "waiting"  # heard twice, on the list once
    order = []
    while bell := bench.registry.jobs.finish(running, fence, {}):
        order.append(bell.job)
        claim = bench.claim(bell.job)
        assert claim.status == "run"
        running, fence = bell.job, claim.fence
    assert order == jobs
    assert not bench.raw.exists(bench.key("wait:o/r#1"), bench.key("waiting"))
    assert {job.deliveries for job in bench.registry.jobs.list()} == {1}


def test_every_way_a_run_ends_hands_over(bench: Bench) -> None:
    jobs = bench.registry.jobs
    running, fence, (a, b, c, d) = waiters(bench, 4)
    assert name(jobs.fail(running, fence, code="busy", message="x", retryable=True).next) == a
    fence = bench.claim(a).fence
    assert name(jobs.fail(a, fence, code="busy", message="x", retryable=False).next) == b
    fence = bench.claim(b).fence
    jobs.cancel(b)
    assert name(jobs.finish_cancelled(b, fence)) == c
    fence = bench.claim(c).fence
    jobs.cancel(c)
    assert name(jobs.release_lost(c, fence)) == d
    assert bench.claim(d).status == "run"


def test_a_lost_run_goes_on_before_those_who_wait(bench: Bench) -> None:
    running, fence, (a,) = waiters(bench, 1)
    assert name(bench.registry.jobs.release_lost(running, fence)) == running
    claim = bench.claim(running)
    assert claim.status == "run"
    assert name(bench.registry.jobs.finish(running, claim.fence, {})) == a


def test_a_cancelled_waiter_is_passed_over(bench: Bench) -> None:
    running, fence, (a, b) = waiters(bench, 2)
    assert bench.registry.jobs.cancel(a).cancelled
    assert bench.raw.lrange(bench.key("wait:o/r#1"), 0, -1) == [b]
    assert name(bench.registry.jobs.finish(running, fence, {})) == b


def test_a_waiter_makes_no_noise_while_the_lease_lives(bench: Bench) -> None:
    _, _, jobs = waiters(bench, 2)
    with bench.at(bench.registry.time_ms() + 25_000) as registry:
        assert registry.jobs.ring() == []
    assert [job.state for job in bench.registry.jobs.list(state="queued")] == ["queued"] * len(jobs)


def test_the_ring_hands_over_when_the_run_that_should_have_died(bench: Bench) -> None:
    running, _, (a, b) = waiters(bench, 2)
    bench.lose_lease(running)
    now = bench.registry.time_ms() + 31_000
    with bench.at(now) as registry:
        assert [bell.job for bell in registry.jobs.ring()] == [running, a]
        assert registry.jobs.ring() == []
    with bench.at(now + 15_000) as registry:  # none of them came: ring again, and let the next one try
        assert {bell.job for bell in registry.jobs.ring()} == {running, a, b}


def test_the_ring_waits_on_while_the_lease_is_renewed(bench: Bench) -> None:
    running, fence, (a,) = waiters(bench, 1)
    bench.registry.jobs.renew(running, fence, 500_000)
    with bench.at(bench.registry.time_ms() + 40_000) as registry:
        assert registry.jobs.ring() == []
    assert bench.raw.zscore(bench.key("waiting"), "o/r#1") > bench.registry.time_ms() + 400_000
    assert name(bench.registry.jobs.finish(running, fence, {})) == a


def test_a_waiter_that_another_message_claimed_leaves_the_list(bench: Bench) -> None:
    running, _, (a,) = waiters(bench, 1)
    bench.lose_lease(running)
    assert bench.claim(a).status == "run"
    assert not bench.raw.exists(bench.key("wait:o/r#1"), bench.key("waiting"))


def test_a_run_that_lost_its_lease_to_a_waiter_waits_in_turn(bench: Bench) -> None:
    running, _, (a,) = waiters(bench, 1)
    bench.lose_lease(running)
    fence = bench.claim(a).fence
    assert bench.claim(running).status == "waiting"
    assert bench.state(running) == "queued"
    assert name(bench.registry.jobs.finish(a, fence, {})) == running


def test_a_dead_job_hands_over(bench: Bench) -> None:
    running, _, (a,) = waiters(bench, 1)
    bench.raw.hset(bench.key(f"job:{running}"), "deliveries", bench.settings.max_deliveries)
    bench.lose_lease(running)
    claim = bench.claim(running)
    assert claim.status == "dead"
    assert name(claim.next) == a


def test_waiters_of_a_released_workspace_end_as_gone_without_a_doorbell(bench: Bench) -> None:
    running, _, jobs = waiters(bench, 3)
    bench.lose_lease(running)
    assert bench.registry.workspaces.release("o/r#1")
    assert bench.registry.jobs.ring() == []
    for ident in (running, *jobs):
        assert bench.claim(ident).status == "done"
        assert bench.registry.jobs.get(ident).error_code == "gone"


def test_workspaces_do_not_wait_for_each_other(bench: Bench) -> None:
    waiters(bench, 1)
    bench.workspace("o/r#2")
    assert bench.claim(bench.submit("o/r#2").id).status == "run"


def due_retry_heard_early(bench: Bench) -> tuple[str, str, int, int]:
    """A retry whose time has come, on the wait list behind a running job: retry, runner, its fence, now."""
    bench.workspace("o/r#1")
    retry = bench.run()
    assert retry.job is not None
    due = bench.registry.jobs.fail(retry.job.id, retry.fence, code="busy", message="x", retryable=True).due_at
    assert due is not None
    with bench.at(due + 10) as registry:
        runner = bench.claim(bench.submit().id, registry=registry)
        assert runner.job is not None
        assert bench.claim(retry.job.id, registry=registry).status == "waiting"
    return retry.job.id, runner.job.id, runner.fence, due + 10


def test_a_due_retry_that_waits_is_not_rung_by_its_time_as_well(bench: Bench) -> None:
    retry, runner, fence, now = due_retry_heard_early(bench)
    assert not bench.raw.exists(bench.key("jobs:due"))
    with bench.at(now) as registry:
        assert registry.jobs.ring() == []
        assert registry.jobs.get(retry).due_at is None
        assert bench.claim(retry, registry=registry).status == "waiting"
        assert bench.raw.lrange(bench.key("wait:o/r#1"), 0, -1) == [retry]
        assert name(registry.jobs.finish(runner, fence, {})) == retry


def test_a_request_that_wakes_a_waiter_does_not_leave_it_on_the_list_twice(bench: Bench) -> None:
    retry, _, _, now = due_retry_heard_early(bench)
    bench.raw.hset(bench.key(f"job:{retry}"), "due_at", now)  # as an older version left it
    with bench.at(now) as registry:
        assert bench.claim(retry, registry=registry).status == "waiting"
    assert bench.raw.lrange(bench.key("wait:o/r#1"), 0, -1) == [retry]


def test_a_retry_whose_time_has_not_come_holds_up_no_waiter(bench: Bench) -> None:
    running, fence, (a, b) = waiters(bench, 2)
    bench.raw.hset(bench.key(f"job:{a}"), "due_at", bench.registry.time_ms() + 60_000)
    assert name(bench.registry.jobs.finish(running, fence, {})) == b
    assert bench.raw.hget(bench.key(f"job:{a}"), "waiting") == ""


def test_an_entry_of_the_wait_list_without_a_record_makes_none(bench: Bench) -> None:
    running, _, (a,) = waiters(bench, 1)
    bench.raw.rpush(bench.key("wait:o/r#1"), "ghost")
    bench.lose_lease(running)
    assert bench.registry.workspaces.release("o/r#1")
    assert bench.registry.jobs.ring() == []
    assert not bench.raw.exists(bench.key("job:ghost"), bench.key("jobs:ring"))
    assert bench.state(a) == "failed"
