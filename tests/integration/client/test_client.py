"""The producers' API on a real Redis, without any worker: submit, join, wait, cancel, outages."""

from __future__ import annotations

import base64
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from mothball import Fleet, errors
from mothball.registry import Registry
from mothball.settings import Settings
from workers.redis_server import RedisServer

WORKSPACE = "owner/repo#1"
OUTCOME = {
    "workspace": WORKSPACE, "digest": "sha256:" + "c" * 64, "parent": None, "generation": 1, "changed": True, "files": 3,
    "bytes": 10, "stored_bytes": 5, "layers": 1, "omitted": {"ignored": 2}, "seconds": 0.1, "of_a_newer_worker": 1,
}  # fmt: skip


@pytest.fixture
def fleet(make_settings: Callable[..., Settings], private_redis: RedisServer) -> Iterator[Fleet]:
    """A fleet whose host has announced itself and has one workspace."""
    with Fleet(settings=make_settings()) as found:
        found.registry.hosts.heartbeat(found.settings.host, {})
        found.register(WORKSPACE, found.settings.workspace_roots[0])
        yield found


def run_job(fleet: Fleet, job_id: str, end: Callable[[Registry, int], Any]) -> None:
    """Play the worker: claim, then `end(registry, fence)`."""
    claim = fleet.registry.jobs.claim(job_id, host=fleet.settings.host, worker="w", lease_ms=30_000)
    assert claim.status == "run"
    end(fleet.registry, claim.fence)


def messages(fleet: Fleet) -> list[dict[str, Any]]:
    """What lies in the host's queue."""
    with redis.Redis.from_url(fleet.settings.broker_url) as client:
        raw: Any = client.lrange(f"host.{fleet.settings.host}", 0, -1)
        return [json.loads(item) for item in raw]


def test_a_submitted_capture_is_a_record_and_one_message_with_the_jobs_id(fleet: Fleet) -> None:
    job = fleet.capture(WORKSPACE, paths=["b", "a", "b"], full=True)
    record = job.record()
    assert (job.state, job.joined, record.task, record.queue) == (
        "queued",
        False,
        "workspace.capture",
        f"host.{fleet.settings.host}",
    )
    assert record.args == {"workspace": WORKSPACE, "paths": ["a", "b"], "full": True, "verify": False}
    [message] = messages(fleet)
    assert (message["headers"]["id"], message["headers"]["task"]) == (job.id, "workspace.capture")


def test_q31_a_second_request_joins_the_queued_job(fleet: Fleet) -> None:
    first = fleet.capture(WORKSPACE, paths=["a"])
    second = fleet.capture(WORKSPACE, paths=["b"], verify=True)
    assert (second.id, second.joined) == (first.id, True)
    args = first.record().args
    assert (args["paths"], args["verify"], args["full"]) == (["a", "b"], True, False)


def test_q31_a_request_without_options_keeps_those_of_the_one_it_joins(fleet: Fleet) -> None:
    first = fleet.capture(WORKSPACE, options={"ignore": ["*.pem"]}, paths=["a"])
    second = fleet.capture(WORKSPACE)
    assert (second.id, second.joined) == (first.id, True)
    assert first.record().args["options"] == {"ignore": ["*.pem"]}
    assert first.record().args["paths"] == ["a"]
    other = fleet.capture(WORKSPACE, options={"ignore": ["*.key"]})
    assert (other.id != first.id, other.joined) == (True, False)


def test_a_crowd_of_requests_for_one_capture_rings_once(fleet: Fleet) -> None:
    """Whoever joins a job that was rung a moment ago adds no message."""
    jobs = [fleet.capture(WORKSPACE) for _ in range(20)]
    assert len({job.id for job in jobs}) == 1
    assert len(messages(fleet)) == 1


def test_a_message_carries_no_arguments(fleet: Fleet) -> None:
    fleet.capture(WORKSPACE, paths=["hush"])
    [message] = messages(fleet)
    assert json.loads(base64.b64decode(message["body"]))[:2] == [[], {}]
    assert "hush" not in json.dumps(message)


def test_wait_returns_the_typed_result_and_ignores_fields_of_newer_workers(fleet: Fleet) -> None:
    from mothball.capture import CaptureResult

    job = fleet.capture(WORKSPACE)
    worker = threading.Timer(0.3, run_job, (fleet, job.id, lambda registry, fence: registry.jobs.finish(job.id, fence, OUTCOME)))
    worker.start()
    looks: list[str] = []
    result = job.wait(10, on_poll=lambda record: looks.append(record.state))
    worker.join()
    assert isinstance(result, CaptureResult)
    assert (result.digest, result.files, result.omitted) == (OUTCOME["digest"], 3, {"ignored": 2})
    assert job.result == result
    assert looks[0] == "queued"
    assert looks[-1] == "succeeded"


def test_wait_times_out_and_the_job_goes_on(fleet: Fleet) -> None:
    job = fleet.capture(WORKSPACE)
    started = time.monotonic()
    with pytest.raises(errors.TimedOut, match=job.id):
        job.wait(0.4)
    assert 0.4 <= time.monotonic() - started < 2
    assert job.state == "queued"
    with pytest.raises(errors.Busy):
        _ = job.result


def test_wait_zero_looks_once(fleet: Fleet) -> None:
    job = fleet.capture(WORKSPACE)
    with pytest.raises(errors.TimedOut):
        job.wait(0)
    run_job(fleet, job.id, lambda registry, fence: registry.jobs.finish(job.id, fence, OUTCOME))
    assert job.wait(0).generation == 1


@pytest.mark.parametrize(
    ("code", "error"),
    [("no_space", errors.NoSpace), ("source_missing", errors.SourceMissing), ("from_the_future", errors.OperationFailed)],
)
def test_wait_raises_the_jobs_own_error(fleet: Fleet, code: str, error: type[errors.MothballError]) -> None:
    job = fleet.capture(WORKSPACE)
    run_job(
        fleet,
        job.id,
        lambda registry, fence: registry.jobs.fail(job.id, fence, code=code, message="what happened", retryable=False),
    )
    with pytest.raises(error, match="what happened"):
        job.wait(5)
    with pytest.raises(error, match="what happened"):
        _ = job.result


def test_q37_cancel_of_a_queued_job_ends_it_and_a_second_cancel_finds_nothing(fleet: Fleet) -> None:
    job = fleet.capture(WORKSPACE)
    assert job.cancel() is True
    assert job.cancel() is False
    with pytest.raises(errors.Cancelled):
        job.wait(5)


def test_cancel_of_a_running_job_is_a_request_to_its_worker(fleet: Fleet) -> None:
    job = fleet.capture(WORKSPACE)

    def work(registry: Registry, fence: int) -> None:
        registry.jobs.progress(job.id, fence, {"step": "read", "files": 2})
        assert job.progress() == {"step": "read", "files": 2}
        assert job.cancel() is True
        assert job.state == "running"
        with pytest.raises(errors.Cancelled):
            registry.jobs.checkpoint(job.id, fence)
        registry.jobs.finish_cancelled(job.id, fence)

    run_job(fleet, job.id, work)
    with pytest.raises(errors.Cancelled):
        job.wait(5)


def test_a_job_is_found_again_by_its_id_and_an_unknown_id_is_not_found(fleet: Fleet) -> None:
    job = fleet.capture(WORKSPACE)
    again = fleet.job(job.id)
    run_job(fleet, job.id, lambda registry, fence: registry.jobs.finish(job.id, fence, OUTCOME))
    assert again.wait(5)["digest"] == OUTCOME["digest"]
    assert [record.id for record in fleet.jobs(workspace=WORKSPACE)] == [job.id]
    with pytest.raises(errors.NotFound):
        fleet.job("nobody")


def test_capture_of_an_unknown_a_released_and_an_unannounced_workspace(fleet: Fleet) -> None:
    with pytest.raises(errors.NotFound):
        fleet.capture("nobody")
    assert fleet.release(WORKSPACE) is True
    assert fleet.release(WORKSPACE) is False
    with pytest.raises(errors.Gone):
        fleet.capture(WORKSPACE)
    fleet.register("elsewhere", "/srv/x", host="other")
    with pytest.raises(errors.HostOffline, match="other"):
        fleet.capture("elsewhere")
    assert messages(fleet) == []


@pytest.mark.parametrize("bad", ["", "../x", "a/../b", "a" * 129, "-x", "a b", None])
def test_a_bad_id_is_refused_before_anything_is_sent(bad: Any) -> None:
    fleet = Fleet("redis://127.0.0.1:1")
    for call in (fleet.get, fleet.capture, fleet.touch, fleet.pin, fleet.release):
        with pytest.raises(errors.InvalidParams):
            call(bad)


def test_paths_must_be_texts_with_a_form_in_json(fleet: Fleet) -> None:
    for bad in ("abc", [1], ["\udcff"]):
        with pytest.raises(errors.InvalidParams):
            fleet.capture(WORKSPACE, paths=bad)  # type: ignore[arg-type]
    with pytest.raises(errors.InvalidParams):
        fleet.capture(WORKSPACE, paths=["x" * 1000] * 2 + [f"{number}" * 100 for number in range(10_000)])
    assert messages(fleet) == []


def test_register_keeps_one_record_and_cleans_the_path(fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    record, created = fleet.register_new("w2", "a/../a")
    assert (record.path, record.host, created) == (str(tmp_path / "a"), fleet.settings.host, True)
    assert fleet.register_new("w2", tmp_path / "a") == (record, False)
    with pytest.raises(errors.AlreadyExists):
        fleet.register("w2", tmp_path)
    for bad in ("", "a\0b", "\udcff"):
        with pytest.raises(errors.InvalidParams):
            fleet.register("w3", bad)
    with pytest.raises(errors.InvalidParams, match="absolute"):
        fleet.register("w3", "relative", host="other")


def test_touch_pin_and_list_go_through(fleet: Fleet) -> None:
    assert fleet.touch(WORKSPACE, "git").moved is False
    assert fleet.pin(WORKSPACE, "keep", "me").pin_reason == "keep"
    assert fleet.get(WORKSPACE).pinned
    assert not fleet.unpin(WORKSPACE).pinned
    assert [record.id for record in fleet.list(repo="owner/repo")] == [WORKSPACE]


def test_redis_down_when_submitting_is_unavailable_within_10_s(fleet: Fleet, private_redis: RedisServer) -> None:
    private_redis.kill()
    started = time.monotonic()
    with pytest.raises(errors.Unavailable) as caught:
        fleet.capture(WORKSPACE)
    assert time.monotonic() - started < 10
    assert private_redis.url.split("@")[0].split(":")[-1] not in str(caught.value)


def test_redis_frozen_when_submitting_is_unavailable_within_10_s(fleet: Fleet, private_redis: RedisServer) -> None:
    fleet.capture(WORKSPACE)
    private_redis.freeze()
    started = time.monotonic()
    try:
        with pytest.raises(errors.Unavailable):
            fleet.capture(WORKSPACE)
        assert time.monotonic() - started < 10
    finally:
        private_redis.thaw()


def test_a_doorbell_that_cannot_be_rung_is_a_warning_and_the_job_is_safe(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise errors.Unavailable(url="redis://***@broker", reason="refused")

    monkeypatch.setattr("mothball.doorbell.DoorbellRinger.ring", refuse)
    with caplog.at_level(logging.WARNING, logger="mothball.client"):
        job = fleet.capture(WORKSPACE)
    assert job.state == "queued"
    assert job.id in caplog.text


def test_wait_survives_a_restart_of_redis(fleet: Fleet, private_redis: RedisServer) -> None:
    job = fleet.capture(WORKSPACE)
    run_job(fleet, job.id, lambda registry, fence: None)
    ends: list[Any] = []

    def outage() -> None:
        private_redis.stop()
        time.sleep(0.5)
        private_redis.start()
        fence = fleet.registry.jobs.get(job.id).fence
        fleet.registry.jobs.finish(job.id, fence, OUTCOME)
        ends.append(time.monotonic())

    breaker = threading.Timer(0.2, outage)
    breaker.start()
    result = job.wait(30)
    breaker.join()
    assert result.generation == 1
    assert ends


def test_wait_during_an_outage_still_ends_at_its_timeout(fleet: Fleet, private_redis: RedisServer) -> None:
    job = fleet.capture(WORKSPACE)
    private_redis.kill()
    started = time.monotonic()
    with pytest.raises(errors.Unavailable):
        job.wait(1.0)
    assert time.monotonic() - started < 5


def test_url_and_settings_together_are_refused(make_settings: Callable[..., Settings]) -> None:
    with pytest.raises(errors.InvalidParams):
        Fleet("redis://127.0.0.1:1", settings=make_settings())
