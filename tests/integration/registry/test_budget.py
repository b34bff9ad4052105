"""The byte budget: what counts, what is promised, and that neither outlives what it stands for."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from mothball.errors import InvalidParams, LeaseLost
from mothball.registry import BudgetState, Recovered
from tests.integration.registry.support import HOST, Bench


def sums(bench: Bench) -> tuple[int, int, int]:
    """(loaded, reserved, retained)"""
    state = bench.registry.budget.state()
    return state.loaded, state.reserved, state.retained


def running(bench: Bench, ident: str = "o/r#1") -> tuple[str, int]:
    claim = bench.run(ident)
    assert claim.job is not None
    return claim.job.id, claim.fence


def store(bench: Bench, ident: str, stored: int, *, size: int | None = None) -> None:
    """A capture of `ident` that added `stored` bytes."""
    bench.workspace(ident)
    job, fence = running(bench, ident)
    generation = bench.registry.workspaces.get(ident).generation + 1
    record = {
        "generation": generation,
        "digest": f"sha256:{ident}",
        "bytes": stored if size is None else size,
        "stored_bytes": stored,
    }
    bench.registry.jobs.finish(job, fence, {}, record)


def records(bench: Bench) -> int:
    """What the records themselves say is stored."""
    return sum(each.stored_bytes for each in bench.registry.workspaces.list())


def test_q10_loaded_is_the_sum_of_what_registered_workspaces_store(bench: Bench) -> None:
    assert bench.registry.budget.state(10) == BudgetState(10, 0, 0, 0, 0)
    store(bench, "o/r#1", 100)
    store(bench, "o/r#2", 30)
    store(bench, "o/r#1", 5)
    assert sums(bench) == (135, 0, 0)
    assert records(bench) == 135


def test_q10_over_begins_strictly_above_the_limit() -> None:
    def state(limit: int | None) -> BudgetState:
        return BudgetState(limit, loaded=70, reserved=30, retained=500, high_water=100)

    assert (state(100).over, state(99).over, state(None).over, state(100).committed) == (0, 1, 0, 100)
    assert state(99).to_dict() == {
        "limit": 99, "loaded": 70, "reserved": 30, "retained": 500, "high_water": 100, "committed": 100,
    }  # fmt: skip


def test_q12_at_the_limit_a_job_is_admitted_and_a_byte_above_it_is_not(bench: Bench) -> None:
    store(bench, "o/r#1", 60)
    bench.workspace("o/r#2")
    job, fence = running(bench, "o/r#2")
    over = bench.registry.budget.reserve(job, fence, bytes=41, limit=100)
    assert not over.ok
    assert (over.before.loaded, over.before.reserved, over.before.limit) == (60, 0, 100)
    assert sums(bench) == (60, 0, 0), "what does not fit changes nothing"
    assert bench.registry.budget.reserve(job, fence, bytes=40, limit=100).ok
    assert sums(bench) == (60, 40, 0)


def test_q12_a_job_has_one_reservation_which_another_call_replaces(bench: Bench) -> None:
    bench.workspace("o/r#1")
    job, fence = running(bench)
    budget = bench.registry.budget
    for need, ok, reserved in ((40, True, 40), (40, True, 40), (100, True, 100), (101, False, 100), (10, True, 10), (0, True, 0)):
        result = budget.reserve(job, fence, bytes=need, limit=100)
        assert (result.ok, result.before.reserved) == (ok, 0), "its own reservation is not in its own way"
        assert budget.state().reserved == reserved


def test_q14_two_jobs_never_get_the_same_room(bench: Bench, make_bench: Callable[..., Bench]) -> None:
    jobs = []
    for n in range(16):
        bench.workspace(f"o/r#{n}")
        jobs.append((*running(bench, f"o/r#{n}"), bench.another()))
    barrier, admitted = threading.Barrier(len(jobs)), []

    def ask(job: str, fence: int, registry: object) -> None:
        barrier.wait()
        if registry.budget.reserve(job, fence, bytes=10, limit=75).ok:  # type: ignore[attr-defined]
            admitted.append(job)

    threads = [threading.Thread(target=ask, args=each) for each in jobs]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(admitted) == 7
    assert sums(bench) == (0, 70, 0)


def test_q15_a_publication_moves_bytes_from_reserved_to_loaded_exactly_once(bench: Bench) -> None:
    bench.workspace("o/r#1")
    job, fence = running(bench)
    assert bench.registry.budget.reserve(job, fence, bytes=80, limit=100).ok
    record = {"generation": 1, "digest": "sha256:d", "bytes": 200, "stored_bytes": 60}
    for _ in range(3):  # the answer may be lost on the way
        bench.registry.jobs.finish(job, fence, {}, record)
    assert sums(bench) == (60, 0, 0)
    assert bench.registry.budget.state().high_water == 80, "the reservation became the bytes; both were never there together"
    assert bench.raw.exists(bench.key("budget:reserved")) == 0


def test_q14_a_stale_run_neither_reserves_nor_refunds_nor_publishes(bench: Bench) -> None:
    bench.workspace("o/r#1")
    job, old = running(bench)
    budget, jobs = bench.registry.budget, bench.registry.jobs
    assert budget.reserve(job, old, bytes=50, limit=100).ok
    bench.lose_lease(job)
    claim = bench.claim(job, pid=2)
    assert claim.status == "run"
    assert budget.reserve(job, claim.fence, bytes=20, limit=100).ok
    for call in (
        lambda: budget.reserve(job, old, bytes=90, limit=100),
        lambda: budget.refund(job, old),
        lambda: jobs.finish(job, old, {}, {"generation": 1, "stored_bytes": 50}),
    ):
        with pytest.raises(LeaseLost):
            call()
    assert sums(bench) == (0, 20, 0)


@pytest.mark.parametrize(
    "end",
    [
        lambda jobs, job, fence: jobs.fail(job, fence, code="busy", message="x", retryable=True),
        lambda jobs, job, fence: jobs.fail(job, fence, code="corrupt", message="x", retryable=False),
        lambda jobs, job, fence: jobs.finish_cancelled(job, fence),
        lambda jobs, job, fence: jobs.release_lost(job, fence),
        lambda jobs, job, fence: jobs.release_lost(job, fence, interrupted=True),
        lambda jobs, job, fence: jobs.finish(job, fence, {}),
    ],
    ids=["retry", "failed", "cancelled", "lost", "interrupted", "nothing stored"],
)
def test_q14_any_end_of_a_run_refunds_its_reservation(bench: Bench, end: Callable[..., object]) -> None:
    bench.workspace("o/r#1")
    job, fence = running(bench)
    assert bench.registry.budget.reserve(job, fence, bytes=50, limit=100).ok
    end(bench.registry.jobs, job, fence)
    assert sums(bench) == (0, 0, 0)
    assert bench.raw.exists(bench.key("budget:reserved")) == 0


def test_q14_the_reservation_of_a_killed_worker_is_refunded_by_the_ring(bench: Bench) -> None:
    bench.workspace("o/r#1")
    job, fence = running(bench)
    assert bench.registry.budget.reserve(job, fence, bytes=50, limit=100).ok
    bench.lose_lease(job)
    assert sums(bench) == (0, 50, 0), "until somebody has found it dead it may still be alive"
    bench.registry.jobs.ring()
    assert sums(bench) == (0, 0, 0)


def test_q14_a_job_given_up_after_too_many_lost_runs_keeps_nothing(bench: Bench) -> None:
    bench.workspace("o/r#1")
    job, fence = running(bench)
    assert bench.registry.budget.reserve(job, fence, bytes=50, limit=100).ok
    bench.raw.hset(bench.key(f"job:{job}"), "deliveries", bench.settings.max_deliveries)
    bench.lose_lease(job)
    assert bench.claim(job).status == "dead"
    assert sums(bench) == (0, 0, 0)


def test_q14_a_job_may_give_back_its_reservation_and_ask_again(bench: Bench) -> None:
    bench.workspace("o/r#1")
    job, fence = running(bench)
    budget = bench.registry.budget
    assert budget.reserve(job, fence, bytes=50, limit=100).ok
    budget.refund(job, fence)
    budget.refund(job, fence)
    assert sums(bench) == (0, 0, 0)
    assert budget.reserve(job, fence, bytes=100, limit=100).ok


def test_q14_a_reservation_of_a_record_that_was_deleted_by_hand_is_healed(bench: Bench) -> None:
    bench.workspace("o/r#1")
    bench.workspace("o/r#2")
    (gone, fence), (lives, other) = running(bench, "o/r#1"), running(bench, "o/r#2")
    budget = bench.registry.budget
    assert budget.reserve(gone, fence, bytes=50, limit=100).ok
    assert budget.reserve(lives, other, bytes=20, limit=100).ok
    assert budget.heal() == 0
    bench.raw.delete(bench.key(f"job:{gone}"))
    assert budget.heal() == 1
    assert sums(bench) == (0, 20, 0)


def test_q04_the_high_water_mark_of_a_record_is_never_lowered_by_a_smaller_capture(bench: Bench) -> None:
    for size in (1000, 5000, 2000):
        store(bench, "o/r#1", 1, size=size)
    record = bench.registry.workspaces.get("o/r#1")
    assert (record.bytes, record.high_water_bytes) == (2000, 5000)


def test_q04_the_high_water_mark_of_the_budget_stays_when_bytes_go(bench: Bench) -> None:
    store(bench, "o/r#1", 100)
    bench.workspace("o/r#2")
    job, fence = running(bench, "o/r#2")
    assert bench.registry.budget.reserve(job, fence, bytes=900, limit=1000).ok
    bench.registry.jobs.finish_cancelled(job, fence)
    store(bench, "o/r#1", 50)
    assert bench.registry.budget.state().high_water == 1000


def test_q17_what_a_released_workspace_stored_is_retained_and_no_longer_counted(bench: Bench) -> None:
    store(bench, "o/r#1", 100)
    store(bench, "o/r#2", 30)
    bench.registry.workspaces.release("o/r#1")
    assert sums(bench) == (30, 0, 100)
    bench.workspace("o/r#3")
    job, fence = running(bench, "o/r#3")
    assert bench.registry.budget.reserve(job, fence, bytes=70, limit=100).ok, "retained bytes go by themselves"


def test_q04_q17_registered_again_its_captures_count_again_and_its_high_water_begins_anew(bench: Bench) -> None:
    store(bench, "o/r#1", 100, size=5000)
    bench.registry.workspaces.release("o/r#1")
    bench.workspace("o/r#1")
    record = bench.registry.workspaces.get("o/r#1")
    assert (record.stored_bytes, record.high_water_bytes) == (100, 0)
    assert sums(bench) == (100, 0, 0)
    store(bench, "o/r#1", 20, size=700)
    assert bench.registry.workspaces.get("o/r#1").high_water_bytes == 700
    assert sums(bench) == (120, 0, 0) == (records(bench), 0, 0)


def test_q17_registered_on_another_host_the_old_ones_captures_stay_retained(bench: Bench) -> None:
    store(bench, "o/r#1", 100)
    bench.registry.workspaces.release("o/r#1")
    bench.registry.hosts.heartbeat("h2", {})
    bench.registry.workspaces.register("o/r#1", host="h2", path="/ws/x")
    assert sums(bench) == (0, 0, 100)
    assert bench.registry.budget.measure(HOST, {}, {}) == 1
    assert sums(bench) == (0, 0, 0), "the collection of the old host has seen that they are gone"


def test_q16_a_collection_says_what_its_host_still_holds(bench: Bench) -> None:
    for ident, stored in (("o/r#1", 100), ("o/r#2", 30), ("o/r#3", 7)):
        store(bench, ident, stored)
    bench.registry.workspaces.release("o/r#2")
    bench.registry.workspaces.release("o/r#3")
    budget = bench.registry.budget
    before = budget.stored(HOST)
    assert before == {"o/r#1": 100}
    assert budget.measure(HOST, before, {"o/r#1": 60, "o/r#2": 25, "an-orphan": 4}) == 4
    assert sums(bench) == (60, 0, 29)
    assert bench.registry.workspaces.get("o/r#1").stored_bytes == 60
    assert budget.measure(HOST, budget.stored(HOST), {"o/r#1": 60, "o/r#2": 25, "an-orphan": 4}) == 0
    assert budget.measure(HOST, budget.stored(HOST), {}) == 3
    assert sums(bench) == (0, 0, 0)
    assert bench.raw.exists(bench.key("budget:retained")) == 0


def test_q16_a_measurement_never_overwrites_a_capture_that_it_may_not_have_seen(bench: Bench) -> None:
    for n in (1, 2, 3):
        store(bench, f"o/r#{n}", 100)
    budget = bench.registry.budget
    before = budget.stored(HOST)
    store(bench, "o/r#1", 11)
    running(bench, "o/r#2")
    bench.registry.workspaces.release("o/r#3")
    bench.workspace("o/r#3")
    store(bench, "o/r#3", 5)
    bench.workspace("o/r#4")
    assert budget.measure(HOST, before, {"o/r#1": 1, "o/r#2": 2, "o/r#3": 3, "o/r#4": 4}) == 0
    assert budget.stored(HOST) == {"o/r#1": 111, "o/r#2": 100, "o/r#3": 105, "o/r#4": 0}
    assert sums(bench) == (316, 0, 0)


def test_q16_a_record_that_was_made_again_from_the_store_is_counted_by_the_next_collection(bench: Bench) -> None:
    store(bench, "o/r#1", 100)
    bench.registry.workspaces.release("o/r#1")
    bench.raw.delete(bench.key("ws:gone:o/r#1"))
    found = Recovered(
        id="o/r#1", host=HOST, path="/ws/o/r#1", fence=1, generation=1, digest="sha256:" + "a" * 64, bytes=100, files=1,
        high_water_bytes=100, snapshots=0, crash_reports=0, last_good_at=None, created_at=1, kept={"repo": "o/r"},
    )  # fmt: skip
    assert bench.registry.rebuilds.record(found).status == "rebuilt"
    assert sums(bench) == (0, 0, 100)
    budget = bench.registry.budget
    budget.measure(HOST, budget.stored(HOST), {"o/r#1": 90})
    assert sums(bench) == (90, 0, 0)


def test_q16_what_was_retained_on_a_forgotten_host_is_dropped(bench: Bench) -> None:
    store(bench, "o/r#1", 100)
    bench.registry.hosts.heartbeat("h2", {})
    bench.registry.workspaces.register("o/r#2", host="h2", path="/ws/x")
    job = bench.submit("o/r#2").id
    claim = bench.claim(job, host="h2")
    bench.registry.jobs.finish(job, claim.fence, {}, {"generation": 1, "stored_bytes": 40})
    for n in (1, 2):
        bench.registry.workspaces.release(f"o/r#{n}")
    assert sums(bench) == (0, 0, 140)
    assert bench.registry.budget.heal() == 0
    bench.raw.delete(bench.key("host:h2"))
    assert bench.registry.budget.heal() == 1
    assert sums(bench) == (0, 0, 100)


def test_a_record_of_an_older_version_is_counted_when_it_changes_and_never_below_zero(bench: Bench) -> None:
    for n, stored in ((1, 100), (2, 40)):
        bench.workspace(f"o/r#{n}")
        bench.raw.hset(bench.key(f"ws:o/r#{n}"), "stored_bytes", stored)
    assert sums(bench) == (0, 0, 0)
    bench.registry.workspaces.release("o/r#1")
    assert sums(bench) == (0, 0, 100), "what was never counted is not taken off"
    store(bench, "o/r#2", 2)
    assert sums(bench) == (42, 0, 100)


def test_bytes_are_whole_and_not_negative(bench: Bench) -> None:
    bench.workspace("o/r#1")
    job, fence = running(bench)
    for wrong in (-1, True, 1.5, 2**60):
        with pytest.raises(InvalidParams):
            bench.registry.budget.reserve(job, fence, bytes=wrong, limit=1)  # type: ignore[arg-type]
    assert bench.registry.budget.reserve(job, fence, bytes=2**52, limit=2**53 - 1).ok
    assert sums(bench) == (0, 2**52, 0)
