"""The ring: doorbells that have to be rung again, each at its time and never twice at once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from tests.integration.registry.support import HOST, LEASE, TASK, Bench


def test_the_pause_between_doorbells_of_a_queued_job_doubles_up_to_its_limit(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(queued_ring_after_seconds=15, queued_ring_max_seconds=100)
    bench.workspace("o/r#1")
    job = bench.submit(args={"full": True})
    now = job.submitted_at
    pauses = []
    for _ in range(6):
        low, high = 0, 1_000_000
        while high - low > 1:  # the first ms at which it rings
            middle = (low + high) // 2
            due = bench.raw.zscore(bench.key("jobs:ring"), job.id) <= now + middle
            low, high = (low, middle) if due else (middle, high)
        with bench.at(now + low) as registry:
            assert registry.jobs.ring() == []
        with bench.at(now + high) as registry:
            bells = registry.jobs.ring()
        assert [(bell.job, bell.task, bell.queue) for bell in bells] == [(job.id, TASK, "host.h1")]
        pauses.append(high)
        now += high
    assert pauses == [15_000, 30_000, 60_000, 100_000, 100_000, 100_000]


def test_two_rings_at_once_never_hand_out_the_same_doorbell(bench: Bench) -> None:
    for n in range(60):
        bench.workspace(f"w{n}")
    queued = {bench.submit(f"w{n}").id for n in range(20)}
    lost = set()
    due = set()
    for n in range(20, 60):
        claim = bench.run(f"w{n}")
        assert claim.job is not None
        if n < 40:
            bench.lose_lease(claim.job.id, f"w{n}")
            lost.add(claim.job.id)
        else:
            bench.registry.jobs.fail(claim.job.id, claim.fence, code="busy", message="x", retryable=True)
            due.add(claim.job.id)
    with bench.at(bench.registry.time_ms() + 100_000) as registry, ThreadPoolExecutor(4) as pool:
        rung = [bell.job for bells in pool.map(lambda _: registry.jobs.ring(limit=7), range(24)) for bell in bells]
    assert sorted(rung) == sorted(queued | lost | due)


def test_a_ring_hands_out_no_more_than_its_limit(bench: Bench) -> None:
    bench.workspace("o/r#1")
    for _ in range(10):
        bench.submit()
    with bench.at(bench.registry.time_ms() + 20_000) as registry:
        assert [len(registry.jobs.ring(limit=4)) for _ in range(4)] == [4, 4, 2, 0]


def test_a_run_whose_lease_ran_out_goes_back_to_the_queue_and_is_rung(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    bench.workspace("o/r#1")
    claim = bench.claim(bench.submit(lane="capture").id, lease_ms=40)
    assert claim.job is not None
    ident = claim.job.id
    assert bench.registry.jobs.ring() == []
    while bench.raw.exists(bench.key("lease:o/r#1")):
        pass
    assert [bell.job for bell in bench.registry.jobs.ring()] == [ident]
    assert bench.registry.jobs.ring() == []
    job = bench.registry.jobs.get(ident)
    assert (job.state, job.worker, job.attempts) == ("queued", None, 0)
    assert bench.kinds()[-1] == "job.lost"
    assert bench.counter("jobs_lost") == 1
    again = bench.claim(ident)
    assert again.status == "run"
    assert again.fence > claim.fence


def test_a_renewed_run_is_left_alone(bench: Bench) -> None:
    bench.workspace("o/r#1")
    claim = bench.run()
    assert claim.job is not None
    bench.registry.jobs.renew(claim.job.id, claim.fence, 600_000)
    with bench.at(bench.registry.time_ms() + 60_000) as registry:
        assert registry.jobs.ring() == []
    # even when the index says otherwise: the lease itself decides
    bench.raw.zadd(bench.key("jobs:running"), {claim.job.id: 1})
    assert bench.registry.jobs.ring() == []
    assert bench.state(claim.job.id) == "running"
    assert bench.raw.zscore(bench.key("jobs:running"), claim.job.id) > bench.registry.time_ms() + 500_000


def test_index_entries_without_a_record_are_dropped(bench: Bench) -> None:
    for index in ("running", "due", "ring", "queued"):
        bench.raw.zadd(bench.key(f"jobs:{index}"), {"ghost": 1})
    bench.raw.zadd(bench.key("waiting"), {"ghost": 1})
    assert bench.registry.jobs.ring() == []
    assert bench.registry.jobs.list(state="queued") == []
    left = [index for index in ("running", "due", "ring") if bench.raw.exists(bench.key(f"jobs:{index}"))]
    assert left == []
    assert not bench.raw.exists(bench.key("waiting"))


def test_claimed_and_finished_jobs_are_not_rung(bench: Bench) -> None:
    bench.workspace("o/r#1")
    one, two, three = (bench.submit(args={"n": n}).id for n in range(3))
    claim = bench.claim(one)
    bench.registry.jobs.finish(one, claim.fence, {})
    claim = bench.claim(two)
    bench.registry.jobs.renew(two, claim.fence, 500_000)
    bench.registry.jobs.cancel(three)
    with bench.at(bench.registry.time_ms() + 100_000) as registry:
        assert registry.jobs.ring() == []


def test_an_emptied_broker_costs_no_job(bench: Bench) -> None:
    """Nobody rang, nobody heard: the record alone brings every job to its end."""
    bench.workspace("o/r#1")
    ids = {bench.submit().id for _ in range(5)}
    now = bench.registry.time_ms()
    done: set[str] = set()
    for step in range(1, 20):
        with bench.at(now + step * 15_000) as registry:
            for bell in registry.jobs.ring():
                claim = registry.jobs.claim(bell.job, host=HOST, worker="w", lease_ms=LEASE)
                if claim.status == "run":
                    registry.jobs.finish(bell.job, claim.fence, {})
                    done.add(bell.job)
    assert done == ids
