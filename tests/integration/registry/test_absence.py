"""Jobs whose workspace or host is not there any more, or not at the moment."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.integration.registry.support import HOST, TASK, Bench


@pytest.fixture(autouse=True)
def _workspace(bench: Bench) -> None:
    bench.workspace("o/r#1")


def away(bench: Bench) -> int:
    """Host h1 is offline; returns the moment at which that was found."""
    now = bench.registry.time_ms() + 60_000
    with bench.at(now) as registry:
        assert registry.hosts.check().went_offline == [HOST]
    return now


@pytest.mark.parametrize("host", ["h1", "h2"])
def test_a_job_of_an_earlier_registration_never_runs_in_the_next(bench: Bench, host: str) -> None:
    job = bench.submit()
    fenced = bench.submit()
    bench.registry.workspaces.release("o/r#1")
    bench.registry.hosts.heartbeat(host, {})
    bench.workspace("o/r#1", host=host, path="/new")
    for ident in (job.id, fenced.id):
        assert bench.claim(ident).status == "done"
        ended = bench.registry.jobs.get(ident)
        assert (ended.state, ended.error_code) == ("failed", "gone")
        assert "registered again" in (ended.error or "")
    assert bench.claim(bench.submit().id, host=host).status == "run"


def test_registrations_of_one_millisecond_are_told_apart(bench: Bench) -> None:
    with bench.at(bench.registry.time_ms()) as registry:
        registry.workspaces.register("same", host=HOST, path="/one")
        job = registry.jobs.submit(TASK, {}, workspace="same").job
        registry.workspaces.release("same")
        registry.workspaces.register("same", host=HOST, path="/two")
        assert bench.claim(job.id, registry=registry).status == "done"


def test_a_request_does_not_join_a_job_of_an_earlier_registration(bench: Bench) -> None:
    old = bench.submit(lane="capture")
    bench.registry.workspaces.release("o/r#1")
    bench.workspace("o/r#1", path="/new")
    new = bench.registry.jobs.submit(TASK, {}, workspace="o/r#1", lane="capture")
    assert not new.joined
    assert bench.registry.jobs.ring() == []
    assert bench.state(old.id) == "failed"
    assert bench.registry.jobs.submit(TASK, {}, workspace="o/r#1", lane="capture").job.id == new.job.id


def test_the_ring_ends_the_queued_jobs_of_a_released_workspace_of_a_dead_host(bench: Bench) -> None:
    job = bench.submit()
    now = away(bench)
    with bench.at(now) as registry:
        assert registry.jobs.ring() == []
        assert bench.raw.zscore(bench.key("jobs:away:h1"), job.id) == job.submitted_at
    bench.registry.workspaces.release("o/r#1")
    with bench.at(now + 1) as registry:
        assert registry.jobs.ring() == []
    assert bench.registry.jobs.get(job.id).error_code == "gone"
    assert not bench.raw.exists(bench.key("jobs:away:h1"), bench.key("jobs:ring"), bench.key("jobs:queued"))


def test_a_retry_of_a_released_workspace_ends_at_the_next_ring(bench: Bench) -> None:
    claim = bench.run()
    assert claim.job is not None
    bench.registry.jobs.fail(claim.job.id, claim.fence, code="busy", message="x", retryable=True)
    bench.registry.workspaces.release("o/r#1")
    assert bench.registry.jobs.ring() == []
    assert bench.state(claim.job.id) == "failed"
    assert not bench.raw.exists(bench.key("jobs:due"))


def test_jobs_of_a_host_that_is_away_are_rung_when_it_comes_back(bench: Bench) -> None:
    queued = bench.submit().id
    run = bench.run()
    assert run.job is not None
    bench.registry.jobs.fail(run.job.id, run.fence, code="busy", message="x", retryable=True)
    lost = bench.run()
    assert lost.job is not None
    bench.lose_lease(lost.job.id)
    elsewhere = bench.submit(None).id
    now = away(bench)
    rung = []
    for minute in range(1, 60):
        with bench.at(now + minute * 60_000) as registry:
            rung += [bell.job for bell in registry.jobs.ring()]
    assert set(rung) == {elsewhere}, "a doorbell at the door of an empty house"
    assert {job.id for job in bench.registry.jobs.list(state="queued")} == {queued, run.job.id, lost.job.id, elsewhere}
    assert bench.raw.pttl(bench.key("jobs:ws:o/r#1")) == -1
    with bench.at(now + 3_600_000) as registry:
        registry.hosts.heartbeat(HOST, {})
        assert registry.hosts.check().came_back == [HOST]
        assert {bell.job for bell in registry.jobs.ring()} - {elsewhere} == {queued, run.job.id, lost.job.id}
    assert not bench.raw.exists(bench.key("jobs:away:h1"))
    assert bench.raw.pttl(bench.key("jobs:ws:o/r#1")) > 0


@pytest.mark.parametrize("end", ["cancel", "run"])
def test_a_job_that_ends_while_its_host_is_away_leaves_nothing(bench: Bench, end: str) -> None:
    job = bench.submit()
    now = away(bench)
    with bench.at(now) as registry:
        registry.jobs.ring()
        if end == "cancel":
            registry.jobs.cancel(job.id)
        else:  # its old message is heard before the check
            registry.jobs.finish(job.id, bench.claim(job.id, registry=registry).fence, {})
    assert not bench.raw.exists(bench.key("jobs:away:h1"))


def test_a_host_with_workspaces_does_not_keep_others_from_being_forgotten(bench: Bench) -> None:
    for n in range(600):
        bench.raw.sadd(bench.key(f"ws:host:old{n}"), "w")
        bench.raw.zadd(bench.key("hosts:offline"), {f"old{n}": n})
    bench.registry.hosts.heartbeat("h9", {})
    with bench.at(bench.registry.time_ms() + bench.settings.tombstone_seconds * 1000 + 5000) as registry:
        registry.hosts.check()
        registry.hosts.check()
    assert not bench.registry.hosts.known("h9")
    assert bench.registry.hosts.known(HOST)


def test_the_list_of_a_workspaces_jobs_outlives_the_longest_pause(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(job_ttl_seconds=60, queued_ring_max_seconds=600)
    bench.workspace("o/r#1")
    bench.submit()
    assert 655_000 < bench.raw.pttl(bench.key("jobs:ws:o/r#1")) <= 660_000
