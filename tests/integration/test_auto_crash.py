"""Crash reports that the fleet files by itself: for what, how often, and never about themselves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mothball.errors import Busy, MothballError, NoSpace, OperationFailed, TimedOut, Unavailable
from mothball.registry import Job
from mothball.settings import Settings
from tasks import capture as capturing
from tasks import services
from tasks.auto_crash import report_failure
from tasks.job import SPECS, record_hard_timeout
from tests.integration.crashing import ID, Crashing
from workers.redis_server import RedisServer

REPORT = "workspace.crash_report"
CANARY = "ghp_" + "Aut0matic0Canary" * 2


@pytest.fixture
def make_here(
    redis_server: RedisServer, make_settings: Callable[..., Settings], tmp_path: Path
) -> Iterator[Callable[..., Crashing]]:
    made: list[Crashing] = []

    def make(**settings: Any) -> Crashing:
        made.append(Crashing(make_settings(**{"max_attempts": 1, **settings}), tmp_path / f"ws-{len(made)}"))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def here(make_here: Callable[..., Crashing]) -> Crashing:
    return make_here()


def reports(here: Crashing) -> list[Job]:
    return [job for job in here.registry.jobs.list() if job.task == REPORT]


def failing(here: Crashing, monkeypatch: pytest.MonkeyPatch, error: Exception) -> str:
    """A capture job that fails with `error`; its id."""

    def fails(*_: Any, **__: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(capturing, "capture_now", fails)
        job = here.submit("workspace.capture").id
        here.fails(job)
    return job


@pytest.mark.parametrize(
    ("setting", "error", "filed"),
    [
        ("workspace", OperationFailed(reason="boom"), True),
        ("workspace", TimedOut(what="x", seconds=1), True),
        ("workspace", ValueError("a bug"), True),
        ("workspace", NoSpace(path="/x"), False),
        ("workspace", Unavailable(url="x", reason="y"), False),
        ("workspace", Busy(what="x", reason="y"), False),
        ("all", NoSpace(path="/x"), True),
        ("all", Busy(what="x", reason="y"), False),
        ("off", OperationFailed(reason="boom"), False),
    ],
)
def test_what_is_reported_is_what_the_setting_says(
    make_here: Callable[..., Crashing], monkeypatch: pytest.MonkeyPatch, setting: str, error: Exception, filed: bool
) -> None:
    here = make_here(auto_crash_report=setting)
    failed = failing(here, monkeypatch, error)
    assert here.registry.jobs.get(failed).state == "failed"
    found = reports(here)
    assert len(found) == filed
    if filed:
        args = found[0].args
        assert (args["workspace"], args["auto"], args["package"], args["failed_job"]) == (ID, True, False, failed)
        assert args["title"].startswith("workspace.capture failed: ")


def test_the_report_of_a_failed_job_is_filed_with_what_is_there(here: Crashing, monkeypatch: pytest.MonkeyPatch) -> None:
    here.run("workspace.capture")
    shutil.rmtree(here.folder)
    failed = here.submit("workspace.capture").id
    assert here.fails(failed).code == "source_missing"
    [report] = reports(here)
    result = here.deliver(report.id)
    assert (result["source"], result["path"]) == ("last_good", "")
    record = here.crash(result["id"])
    assert (record.auto, record.by, record.title) == (True, "fleet", "workspace.capture failed: source_missing")
    assert "does not exist" in here.document(record.id)["error"]["text"]


def test_one_failed_job_has_one_report_however_often_its_end_is_told(here: Crashing, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = failing(here, monkeypatch, OperationFailed(reason="boom"))
    for _ in range(3):
        report_failure(failed, "operation_failed", "boom", blames=True)
        with pytest.raises(MothballError):
            here.deliver(failed)
    assert len(reports(here)) == 1


def test_a_job_that_is_retried_has_not_failed_yet(make_here: Callable[..., Crashing], monkeypatch: pytest.MonkeyPatch) -> None:
    here = make_here(max_attempts=2)
    failed = failing(here, monkeypatch, TimedOut(what="x", seconds=1))
    assert here.registry.jobs.get(failed).state == "queued"
    assert reports(here) == []


def test_a_dead_job_is_reported(make_here: Callable[..., Crashing]) -> None:
    here = make_here(max_deliveries=1)
    job = here.submit("workspace.capture").id
    here.registry.jobs.claim(job, host=here.settings.host, worker="gone/1", lease_ms=60_000)
    here.lose_lease(job)
    here.registry.jobs.ring()
    here.fails(job)
    assert here.registry.jobs.get(job).state == "dead"
    [report] = reports(here)
    assert report.args["title"] == "workspace.capture failed: dead"
    assert "ended without an outcome" in report.args["error"]


def test_a_hard_time_limit_that_ends_a_job_for_good_is_reported(here: Crashing, monkeypatch: pytest.MonkeyPatch) -> None:
    job = here.submit("workspace.capture").id
    here.registry.jobs.claim(job, host=here.settings.host, worker="w/1", lease_ms=60_000)
    monkeypatch.setattr("tasks.job._is_my_child", lambda _worker: True)
    record_hard_timeout(job, 60.0)
    assert here.registry.jobs.get(job).state == "failed"
    assert [each.args["title"] for each in reports(here)] == ["workspace.capture failed: timeout"]


def test_a_failing_report_is_never_reported(here: Crashing) -> None:
    shutil.rmtree(here.folder)
    here.fails(here.fleet.crash_report(ID, "boom").id)
    assert len(reports(here)) == 1
    assert not SPECS[REPORT].blames


def test_cancelled_and_refused_jobs_and_those_that_say_nothing_of_the_workspace_are_not_reported(here: Crashing) -> None:
    cancelled = here.submit("workspace.capture").id
    here.registry.jobs.cancel(cancelled)
    with pytest.raises(Exception, match="cancelled"):
        here.deliver(cancelled)
    here.fails(here.submit("workspace.capture", full="yes").id)
    here.fails(here.submit("workspace.restore", to="/nowhere/at/all").id)
    here.fails(here.submit("store.verify", host=here.settings.host, level="nonsense").id)
    assert reports(here) == []


def test_trouble_with_the_report_leaves_the_jobs_own_outcome(here: Crashing, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = services.current().registry

    def down(*_: Any, **__: Any) -> Any:
        raise Unavailable(url="x", reason="y")

    failed = failing(here, monkeypatch, NoSpace(path="/x"))
    for trouble in (down, lambda *_a, **_k: 1 / 0):
        with monkeypatch.context() as patch:
            patch.setattr(registry.jobs, "submit", trouble)
            assert not report_failure(failed, "operation_failed", "boom", blames=True)
    assert not report_failure("unknown", "operation_failed", "boom", blames=True)
    assert reports(here) == []
    assert report_failure(failed, "operation_failed", "boom", blames=True)


def test_the_message_of_a_failed_job_comes_without_secrets(here: Crashing, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(here, monkeypatch, OperationFailed(reason=f"git: cannot fetch with {CANARY}\x1b[31m"))
    [report] = reports(here)
    assert CANARY not in json.dumps(report.to_dict())
    assert "[redacted:" in report.args["error"]
    assert "\x1b" not in report.args["error"]


def test_the_same_failure_of_many_jobs_is_one_report(here: Crashing, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(3):
        failing(here, monkeypatch, OperationFailed(reason="boom"))
    results = [here.deliver(job.id) for job in reports(here)]
    assert len({result["id"] for result in results}) == 1
    assert sorted(result["count"] for result in results) == [1, 2, 3]
    assert (here.counter("crash_reports"), here.counter("crash_repeats")) == (1, 2)
