"""The life of a job: submit, claim, report, end."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from mothball.errors import Cancelled, Gone, HostOffline, InvalidParams, LeaseLost, NotFound
from mothball.registry import Adopt
from tests.integration.registry.support import HOST, LEASE, TASK, Bench


@pytest.fixture(autouse=True)
def _workspace(bench: Bench) -> None:
    bench.workspace("o/r#1")


def test_a_job_from_submit_to_success(bench: Bench) -> None:
    jobs = bench.registry.jobs
    job = bench.submit(args={"full": True})
    assert (job.state, job.queue, job.host, job.origin, job.args) == ("queued", "host.h1", "h1", "client", {"full": True})
    claim = bench.claim(job.id)
    assert claim.status == "run"
    fence = claim.fence
    assert claim.job is not None
    assert (claim.job.state, claim.job.worker, claim.job.deliveries, claim.job.fence) == ("running", "h1/1", 1, fence)
    lease = bench.key("lease:o/r#1")
    assert bench.raw.hgetall(lease) == {"job": job.id, "fence": str(fence), "host": "h1"}
    assert 0 < bench.raw.pttl(lease) <= LEASE
    jobs.progress(job.id, fence, {"files": 3})
    jobs.checkpoint(job.id, fence)
    jobs.checkpoint(job.id, fence, {"files": 4})
    assert jobs.get(job.id).progress == {"files": 4}
    assert jobs.renew(job.id, fence, LEASE) is False
    record = {"generation": 1, "digest": "sha256:a", "bytes": 100, "files": 2, "stored_bytes": 60}
    assert jobs.finish(job.id, fence, {"digest": "sha256:a"}, record) is None
    done = jobs.get(job.id)
    assert (done.state, done.outcome, done.finished, done.attempts, done.error) == (
        "succeeded",
        {"digest": "sha256:a"},
        True,
        0,
        None,
    )
    assert done.started_at is not None
    assert done.finished_at is not None
    assert done.submitted_at <= done.started_at <= done.finished_at
    ws = bench.registry.workspaces.get("o/r#1")
    assert (ws.generation, ws.digest, ws.bytes, ws.files, ws.stored_bytes) == (1, "sha256:a", 100, 2, 60)
    assert ws.last_good_at == done.finished_at
    # B-44: a capture at regular times must not keep for ever what nobody uses.
    assert (ws.last_active, ws.last_signal, ws.signals) == (ws.created_at, "register", {})
    assert not bench.raw.exists(lease)
    assert bench.kinds()[-4:] == ["job.submitted", "job.started", "workspace.captured", "job.succeeded"]


def test_counters_count_effects_once(bench: Bench) -> None:
    for generation, stored in ((1, 60), (1, 0), (2, 5)):
        claim = bench.run()
        assert claim.job is not None
        for _ in range(2):  # the answer of the first was lost: asked again, nothing counts twice
            bench.registry.jobs.finish(
                claim.job.id, claim.fence, {}, {"generation": generation, "digest": "d", "stored_bytes": stored}
            )
    counters = bench.registry.counters.all()
    assert counters["captures"] == 2
    assert counters["captures_unchanged"] == 1
    assert counters["capture_stored_bytes"] == 65
    assert counters["jobs_succeeded"] == counters[f"jobs_succeeded:{TASK}"] == counters["jobs_submitted"] == 3
    assert bench.registry.workspaces.get("o/r#1").stored_bytes == 65
    assert bench.kinds().count("workspace.captured") == 2
    assert bench.kinds().count("job.succeeded") == 3


def test_q04_the_high_water_mark_is_never_lowered(bench: Bench) -> None:
    for generation, size in enumerate((1000, 5000, 2000), 1):
        claim = bench.run()
        assert claim.job is not None
        bench.registry.jobs.finish(claim.job.id, claim.fence, {}, {"generation": generation, "bytes": size})
    ws = bench.registry.workspaces.get("o/r#1")
    assert (ws.bytes, ws.high_water_bytes) == (2000, 5000)


def test_a_job_without_record_leaves_the_workspace_as_it_is(bench: Bench) -> None:
    claim = bench.run(origin="beat")
    before = bench.registry.workspaces.get("o/r#1")
    assert claim.job is not None
    bench.registry.jobs.finish(claim.job.id, claim.fence, {})
    assert bench.registry.workspaces.get("o/r#1") == before
    assert bench.counter("captures_unchanged") == 0


def test_a_record_may_set_only_what_jobs_set(bench: Bench) -> None:
    claim = bench.run()
    assert claim.job is not None
    for record in ({"path": "/x"}, {"generation": -1}, {"bytes": "5"}, {"files": True}, {"digest": 5}):
        with pytest.raises(InvalidParams):
            bench.registry.jobs.finish(claim.job.id, claim.fence, {}, record)
    bench.registry.jobs.finish(claim.job.id, claim.fence, {}, {"snapshots": 3, "crash_reports": 1})
    ws = bench.registry.workspaces.get("o/r#1")
    assert (ws.snapshots, ws.crash_reports, ws.generation) == (3, 1, 0)


def test_a_job_without_workspace_has_a_lease_and_fence_of_its_own(bench: Bench) -> None:
    job = bench.submit(None)
    assert (job.queue, job.workspace, job.host) == ("control", None, None)
    first = bench.claim(job.id, host="any")
    assert first.status == "run"
    assert bench.claim(job.id, host="other").status == "elsewhere"
    bench.lose_lease(job.id, None)
    second = bench.claim(job.id, host="other")
    assert second.fence > first.fence
    with pytest.raises(LeaseLost):
        bench.registry.jobs.finish(job.id, first.fence, {})
    bench.registry.jobs.finish(job.id, second.fence, {})
    assert bench.state(job.id) == "succeeded"


def test_submit_for_a_workspace_that_is_not_there(bench: Bench) -> None:
    with pytest.raises(NotFound):
        bench.submit("never")
    bench.registry.workspaces.release("o/r#1")
    with pytest.raises(Gone):
        bench.submit("o/r#1")
    assert bench.registry.jobs.list() == []


def test_submit_for_a_host_that_no_worker_announced(bench: Bench) -> None:
    bench.workspace("far", host="silent")
    where: list[dict[str, Any]] = [
        {"workspace": "far"},
        {"workspace": None, "host": "silent"},
        {"workspace": None, "queue": "host.silent"},
    ]
    for fields in where:
        with pytest.raises(HostOffline) as caught:
            bench.submit(**fields)
        assert "silent" in caught.value.message
    bench.registry.hosts.heartbeat("silent", {})
    assert bench.submit("far").queue == "host.silent"


def test_submit_refuses_what_no_worker_could_take(bench: Bench) -> None:
    refused: list[dict[str, Any]] = [
        {"queue": "nowhere"},
        {"queue": "host."},
        {"host": "h2"},
        {"lane": "A lane"},
        {"job_id": "a b"},
        {"job_id": ""},
        {"origin": "me"},
    ]
    for fields in refused:
        with pytest.raises(InvalidParams):
            bench.submit(**fields)
    with pytest.raises(InvalidParams):
        bench.registry.jobs.submit("Not a task", {}, workspace=None)
    assert bench.registry.jobs.list() == []


@pytest.mark.parametrize("lane", [None, "capture"])
def test_arguments_of_a_megabyte_are_refused_and_of_256_kib_accepted(bench: Bench, lane: str | None) -> None:
    with pytest.raises(InvalidParams) as caught:
        bench.submit(args={"note": "x" * 1024**2}, lane=lane)
    assert "262144" in caught.value.message
    room = 256 * 1024 - len('{"note":""}')
    with pytest.raises(InvalidParams):
        bench.submit(args={"note": "x" * (room + 1)}, lane=lane)
    assert bench.submit(args={"note": "x" * room}, lane=lane).state == "queued"


def test_submitting_one_job_id_twice_is_one_job(bench: Bench) -> None:
    first = bench.submit(job_id="mine", args={"n": 1})
    again = bench.registry.jobs.submit(TASK, {"n": 2}, workspace="o/r#1", job_id="mine")
    assert again.job == first
    assert not again.joined
    with pytest.raises(InvalidParams):
        bench.submit(None, job_id="mine")
    assert bench.counter("jobs_submitted") == 1


def test_of_many_claimers_exactly_one_runs(bench: Bench) -> None:
    for _ in range(5):
        job = bench.submit()
        with ThreadPoolExecutor(8) as pool:
            claims = list(pool.map(lambda n, each=job: bench.claim(each.id, pid=n), range(8)))
        assert sorted(claim.status for claim in claims) == ["elsewhere"] * 7 + ["run"]
        winner = next(claim for claim in claims if claim.status == "run")
        bench.registry.jobs.finish(job.id, winner.fence, {})
        assert bench.registry.jobs.get(job.id).deliveries == 1


def test_a_claim_says_why_not(bench: Bench) -> None:
    assert bench.claim("never-heard-of").status == "unknown"
    assert bench.claim("never-heard-of").job is None
    job = bench.submit()
    wrong = bench.claim(job.id, host="h2")
    assert wrong.status == "wrong_host"
    assert wrong.job is not None
    assert wrong.job.queue == "host.h1"
    claim = bench.claim(job.id)
    assert bench.claim(job.id, pid=2).status == "elsewhere"
    bench.registry.jobs.finish(job.id, claim.fence, {"n": 1})
    done = bench.claim(job.id)
    assert (done.status, done.outcome) == ("done", {"n": 1})
    cancelled = bench.submit()
    bench.registry.jobs.cancel(cancelled.id)
    assert bench.claim(cancelled.id).status == "cancelled"
    for bad in ({"lease_ms": 0}, {"host": "no/host"}):
        with pytest.raises(InvalidParams):
            bench.claim(job.id, **bad)


def test_a_plain_message_is_adopted_under_its_own_id(bench: Bench) -> None:
    adopt = Adopt(task=TASK, args={"workspace": "o/r#1"}, workspace="o/r#1")
    claim = bench.registry.jobs.claim("celery-1", host="h2", worker="w", lease_ms=LEASE, adopt=adopt)
    assert claim.status == "wrong_host"
    claim = bench.registry.jobs.claim("celery-1", host=HOST, worker="w", lease_ms=LEASE, adopt=adopt)
    assert claim.status == "run"
    assert claim.job is not None
    assert (claim.job.origin, claim.job.task, claim.job.args) == ("adopted", TASK, {"workspace": "o/r#1"})
    assert bench.counter("jobs_submitted") == 1
    again = bench.registry.jobs.claim("celery-1", host=HOST, worker="v", lease_ms=LEASE, adopt=adopt)
    assert again.status == "elsewhere"
    free = bench.registry.jobs.claim("celery-2", host="x", worker="w", lease_ms=LEASE, adopt=Adopt("sweep", {}, None))
    assert free.status == "run"


def test_an_adopted_message_for_a_workspace_that_is_not_there_is_a_failed_job(bench: Bench) -> None:
    bench.workspace("was")
    bench.registry.workspaces.release("was")
    for ident, workspace, code in (("c1", "never", "not_found"), ("c2", "was", "gone")):
        claim = bench.registry.jobs.claim(ident, host=HOST, worker="w", lease_ms=LEASE, adopt=Adopt(TASK, {}, workspace))
        assert claim.status == "done"
        assert claim.job is not None
        assert (claim.job.state, claim.job.error_code) == ("failed", code)
        assert workspace in (claim.job.error or "")
    with pytest.raises(InvalidParams):
        bench.registry.jobs.claim("c3", host=HOST, worker="w", lease_ms=LEASE, adopt=Adopt(TASK, {"a": "x" * 2**20}, None))


def test_a_queued_job_of_a_released_workspace_ends_as_gone(bench: Bench) -> None:
    job = bench.submit(lane="capture")
    bench.registry.workspaces.release("o/r#1")
    claim = bench.claim(job.id)
    assert claim.status == "done"
    assert bench.registry.jobs.get(job.id).error_code == "gone"
    assert not bench.raw.exists(bench.key("lane:capture:o/r#1"))


def test_q37_cancel_says_whether_there_was_anything_to_cancel(bench: Bench) -> None:
    jobs = bench.registry.jobs
    queued = bench.submit()
    assert jobs.cancel(queued.id) == jobs.cancel(queued.id).__class__(cancelled=True, state="cancelled")
    second = jobs.cancel(queued.id)
    assert (second.cancelled, second.state) == (False, "cancelled")
    with pytest.raises(NotFound):
        jobs.cancel("never")
    assert bench.counter("jobs_cancelled") == 1
    assert bench.kinds().count("job.cancelled") == 1


def test_q36_a_running_job_stops_at_its_next_checkpoint_and_fails_nothing(bench: Bench) -> None:
    jobs = bench.registry.jobs
    claim = bench.run()
    assert claim.job is not None
    ident = claim.job.id
    assert (jobs.cancel(ident).cancelled, jobs.cancel(ident).state) == (True, "running")
    assert jobs.renew(ident, claim.fence, LEASE) is True
    jobs.progress(ident, claim.fence, {"n": 1})
    with pytest.raises(Cancelled):
        jobs.checkpoint(ident, claim.fence)
    jobs.finish_cancelled(ident, claim.fence)
    jobs.finish_cancelled(ident, claim.fence)
    assert bench.state(ident) == "cancelled"
    ws = bench.registry.workspaces.get("o/r#1")
    assert (ws.last_error, ws.retry_count) == ("", 0)
    assert bench.counter("jobs_cancelled") == 1
    # the request dies with its job; the next run of the same workspace never sees it
    after = bench.run()
    assert after.job is not None
    jobs.checkpoint(after.job.id, after.fence)
    jobs.finish(after.job.id, after.fence, {})
    assert jobs.cancel(after.job.id).cancelled is False


def test_q36_a_cancelled_run_that_fails_or_dies_is_cancelled(bench: Bench) -> None:
    jobs = bench.registry.jobs
    for end in ("fail", "lost", "expired", "claimed"):
        claim = bench.run()
        assert claim.job is not None
        ident = claim.job.id
        jobs.cancel(ident)
        if end == "fail":
            assert jobs.fail(ident, claim.fence, code="busy", message="x", retryable=True).state == "cancelled"
        elif end == "lost":
            assert jobs.release_lost(ident, claim.fence) is None
        else:
            bench.lose_lease(ident)
            if end == "expired":
                assert jobs.ring() == []
            else:
                assert bench.claim(ident).status == "cancelled"
        assert bench.state(ident) == "cancelled"
    assert bench.registry.workspaces.get("o/r#1").retry_count == 0
    assert bench.counter("jobs_failed") == 0


def test_a_run_that_finished_before_it_saw_the_cancel_has_succeeded(bench: Bench) -> None:
    claim = bench.run()
    assert claim.job is not None
    bench.registry.jobs.cancel(claim.job.id)
    bench.registry.jobs.finish(claim.job.id, claim.fence, {})
    assert bench.state(claim.job.id) == "succeeded"


def test_lists_are_newest_first_and_filtered(bench: Bench) -> None:
    bench.workspace("o/r#2")
    now = bench.registry.time_ms()
    for n in range(4):
        with bench.at(now + n) as registry:
            registry.jobs.submit(TASK, {}, workspace=f"o/r#{n % 2 + 1}", job_id=f"j{n}")

    def ids(**by: Any) -> list[str]:
        return [job.id for job in bench.registry.jobs.list(**by)]

    assert ids() == ["j3", "j2", "j1", "j0"]
    assert ids(limit=2) == ["j3", "j2"]
    assert ids(workspace="o/r#1") == ["j2", "j0"]
    with bench.at(now + 10) as registry:
        claim = registry.jobs.claim("j0", host=HOST, worker="w", lease_ms=LEASE)
        registry.jobs.fail("j0", claim.fence, code="busy", message="x", retryable=True)
        registry.jobs.claim("j1", host=HOST, worker="w", lease_ms=LEASE)
        registry.jobs.cancel("j2")
    assert ids(state="queued") == ["j3", "j0"]
    assert ids(state="running") == ["j1"]
    assert ids(state="cancelled") == ["j2"]
    assert ids(state="running", workspace="o/r#1") == ids(state="dead") == ids(limit=0) == []
    with pytest.raises(InvalidParams):
        ids(state="asleep")


def test_a_finished_record_runs_out_and_its_index_entries_with_it(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(job_ttl_seconds=60)
    bench.workspace("o/r#1")
    claim = bench.run()
    assert claim.job is not None
    ident = claim.job.id
    assert bench.raw.pttl(bench.key(f"job:{ident}")) == -1
    bench.registry.jobs.finish(ident, claim.fence, {})
    assert 0 < bench.raw.pttl(bench.key(f"job:{ident}")) <= 60_000
    bench.raw.delete(bench.key(f"job:{ident}"))
    assert bench.registry.jobs.list() == []
    with pytest.raises(NotFound):
        bench.registry.jobs.get(ident)
    with bench.at(bench.registry.time_ms() + 61_000) as registry:
        registry.jobs.ring()
    assert not bench.raw.exists(bench.key("jobs:succeeded"), bench.key("jobs:created"))


def test_a_message_of_another_task_does_not_run_the_job(bench: Bench) -> None:
    job = bench.submit()
    claim = bench.registry.jobs.claim(job.id, host=HOST, worker="w", lease_ms=LEASE, task="image.prune")
    assert claim.status == "mismatch"
    assert bench.state(job.id) == "queued"
    assert bench.registry.jobs.claim(job.id, host=HOST, worker="w", lease_ms=LEASE, task=TASK).status == "run"
