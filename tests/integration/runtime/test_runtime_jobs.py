"""The jobs that look at runtimes, with a real registry, real processes and the job base around them."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from celery.exceptions import Ignore

from mothball.errors import Cancelled, InvalidParams, NotRunning, OperationFailed
from mothball.registry import Registry, Workspace
from mothball.runtime import handle_of_pid
from mothball.settings import Settings
from tasks import runtime, services
from tasks.context import JobContext
from tasks.job import SPECS, execute
from tests.integration.runtime.support import Bench
from tests.support import eventually
from workers.redis_server import RedisServer

ID = "o/r#1"


class Worker:
    """A worker's process on host h1, without Celery's delivery."""

    def __init__(self, settings: Settings, bench: Bench) -> None:
        services.configure(settings)
        self.settings = settings
        self.bench = bench
        self.registry: Registry = services.current().registry
        self.registry.hosts.heartbeat("h1", {})
        self._count = 0

    def register(self, handle: dict[str, Any] | None, ident: str = ID, path: Path | None = None) -> Workspace:
        record, _ = self.registry.workspaces.register(ident, host="h1", path=str(path or self.bench.folder), runtime=handle)
        return record

    def run(self, task: str, **args: Any) -> dict[str, Any]:
        self._count += 1
        request = SimpleNamespace(id=f"job-{self._count}", hostname="w@h1")
        celery = SimpleNamespace(
            request=request, update_state=lambda **_: None, backend=SimpleNamespace(), send_event=lambda *_: None
        )
        return execute(celery, SPECS[task], (), {"host": "h1", **args})

    def look(self, verb: str, ident: str = ID) -> dict[str, Any]:
        return self.run(f"workspace.{verb}", workspace=ident)

    def record(self, ident: str = ID) -> Workspace:
        return self.registry.workspaces.get(ident)

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event.fields for event in self.registry.events.list(limit=1000) if event.kind == kind]


@pytest.fixture
def worker(private_redis: RedisServer, make_settings: Callable[..., Settings], bench: Bench) -> Iterator[Worker]:
    yield Worker(make_settings(host="h1", workspace_roots=(bench.folder.parent,)), bench)
    services.renew()
    services._settings = None


def started(bench: Bench) -> tuple[Any, dict[str, Any]]:
    process = bench.start("say('up'); sleep()")
    bench.said("up")
    return process, handle_of_pid(process.pid)


def end(process: Any) -> None:
    process.kill()
    process.wait()


def test_n24_stats_are_of_now_and_of_a_dead_one_the_last_known(worker: Worker, bench: Bench) -> None:
    process, handle = started(bench)
    (bench.folder / "data").write_bytes(b"x" * 1_000_000)
    worker.register(handle)
    now = worker.registry.time_ms()
    alive = worker.look("stats")
    assert (alive["stale"], alive["processes"], alive["driver"], alive["host"]) == (False, 1, "process", "h1")
    assert alive["collected_at"] >= now
    assert alive["disk_bytes"] >= 1_000_000
    assert alive["rss_bytes"] > 0
    end(process)
    (bench.folder / "data").unlink()
    dead = worker.look("stats")
    assert dead["stale"]
    assert "has ended" in dead["reason"]
    assert (dead["rss_bytes"], dead["collected_at"]) == (alive["rss_bytes"], alive["collected_at"])
    assert dead["disk_bytes"] < 1_000_000  # the directory is measured all the same


def test_n24_stats_of_one_that_nobody_ever_measured_are_zero_and_stale(worker: Worker, bench: Bench) -> None:
    process, handle = started(bench)
    worker.register(handle)
    end(process)
    found = worker.look("stats")
    assert (found["stale"], found["cpu_seconds"], found["rss_bytes"], found["processes"], found["collected_at"]) == (
        True,
        0,
        0,
        0,
        None,
    )


def test_last_figures_are_not_those_of_an_earlier_workspace_of_that_id(worker: Worker, bench: Bench) -> None:
    process, handle = started(bench)
    worker.register(handle)
    worker.look("stats")
    end(process)
    worker.registry.workspaces.release(ID)
    worker.register(handle)
    assert worker.look("stats")["collected_at"] is None


def test_last_figures_run_out_after_a_day(worker: Worker, bench: Bench) -> None:
    _, handle = started(bench)
    worker.register(handle)
    worker.look("stats")
    with worker.registry._connection.guard() as client:
        left = client.pttl(f"{worker.settings.namespace}:stats:{ID}")
    assert 0 < left <= 86_400_000


def test_n32_looking_is_no_sign_of_life(worker: Worker, bench: Bench) -> None:
    _, handle = started(bench)
    worker.register(handle)
    before = worker.record()
    time.sleep(0.01)
    for verb in ("stats", "health", "ping", "ports"):
        worker.look(verb)
    worker.run("runtime.reconcile")
    after = worker.record()
    assert (after.last_active, after.last_signal, after.signals) == (before.last_active, before.last_signal, before.signals)
    assert after == before


def test_a_look_is_not_delayed_by_a_job_that_works_on_the_workspace(worker: Worker, bench: Bench) -> None:
    _, handle = started(bench)
    worker.register(handle)
    capture = worker.registry.jobs.submit("workspace.capture", {"workspace": ID}, workspace=ID).job
    claim = worker.registry.jobs.claim(capture.id, host="h1", worker="h1/1", lease_ms=60_000)
    assert claim.status == "run"
    assert worker.look("stats")["processes"] == 1
    assert worker.look("ping")["alive"]
    assert worker.registry.jobs.get(capture.id).state == "running"


def test_n23_health_says_why(worker: Worker, bench: Bench) -> None:
    process, handle = started(bench)
    worker.register(handle)
    well = worker.look("health")
    assert (well["healthy"], well["alive"]) == (True, True)
    assert str(process.pid) in well["reason"]
    assert abs(well["checked_at"] - worker.registry.time_ms()) < 10_000
    end(process)
    ill = worker.look("health")
    assert (ill["healthy"], ill["alive"], ill["sure"]) == (False, False, True)
    assert "has ended" in ill["reason"]


def test_n23_without_a_runtime_health_is_what_its_people_say(worker: Worker) -> None:
    worker.register(None)
    alone = worker.look("health")
    assert (alone["healthy"], alone["sure"]) == (False, False)
    worker.registry.presence.heartbeat(ID, "agent-1", 60_000)
    present = worker.look("health")
    assert present["healthy"]
    assert "agent-1 is present" in present["reason"]
    worker.registry.presence.goodbye(ID, "agent-1")
    job = worker.registry.jobs.submit("workspace.capture", {"workspace": ID}, workspace=ID).job
    worker.registry.jobs.claim(job.id, host="h1", worker="h1/1", lease_ms=60_000)
    assert job.id in worker.look("health")["reason"]


def test_n21_ping_and_ports_of_a_dead_one(worker: Worker, bench: Bench) -> None:
    process, handle = started(bench)
    worker.register(handle)
    assert worker.look("ping")["alive"]
    assert worker.look("ports")["ports"] == []
    end(process)
    found = worker.look("ping")
    assert (found["alive"], found["sure"]) == (False, True)
    with pytest.raises(NotRunning, match="has ended"):
        worker.look("ports")


def test_a_workspace_of_another_host_is_not_looked_at_here(worker: Worker) -> None:
    worker.registry.hosts.heartbeat("h2", {})
    worker.registry.workspaces.register("there", host="h2", path="/srv/there")
    with pytest.raises(InvalidParams, match="is on host h2"):
        worker.look("stats", "there")


def test_a_directory_that_is_gone_or_not_allowed_is_said_and_not_read(worker: Worker, bench: Bench, tmp_path: Path) -> None:
    _, handle = started(bench)
    other = tmp_path / "elsewhere"
    other.mkdir()
    worker.register(handle, path=other)
    found = worker.look("stats")
    assert (found["disk_bytes"], found["processes"], found["stale"]) == (None, 1, False)
    assert "not below an allowed root" in found["directory"]
    gone = bench.folder.parent / "gone"
    gone.mkdir()
    worker.register(handle, ident="gone", path=gone)
    gone.rmdir()
    assert "does not exist" in worker.look("stats", "gone")["directory"]


def test_a_handle_that_no_driver_would_take_is_said_and_harms_nobody(worker: Worker, bench: Bench) -> None:
    """Written into Redis by somebody else than us."""
    _, handle = started(bench)
    worker.register(handle)
    with worker.registry._connection.guard() as client:
        client.hset(f"{worker.settings.namespace}:ws:{ID}", "runtime", '{"driver": "runc", "container": "--all"}')
    assert not worker.look("ping")["sure"]
    assert "--all" in worker.look("health")["reason"]
    assert worker.look("stats")["stale"]
    assert worker.run("runtime.reconcile")["skipped"] == {"invalid_params": 1}
    assert worker.record().state == "active"


def hanging_driver(worker: Worker, tmp_path: Path) -> dict[str, Any]:
    """An operator's driver that never answers."""
    folder = tmp_path / "drivers"
    folder.mkdir()
    program = folder / "hangs"
    program.write_text("#!/bin/sh\nsleep 1000\n")
    program.chmod(0o755)
    services.configure(worker.settings.model_copy(update={"runtime_commands": str(folder)}))
    return {"driver": "command", "name": "hangs"}


def test_a_driver_that_hangs_costs_its_limit_and_the_next_one_is_looked_at(
    worker: Worker, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mothball.runtime.command.CALL_SECONDS", 0.5)
    process, handle = started(bench)
    worker.register(hanging_driver(worker, tmp_path), ident="hangs", path=bench.folder / "hangs")
    worker.register(handle)
    end(process)
    began = time.monotonic()
    found = worker.run("runtime.reconcile")
    assert time.monotonic() - began < 5
    assert (found["lost"], found["skipped"]) == ([ID], {"timeout": 1})
    assert worker.record("hangs").state == "active"
    assert worker.look("ping", "hangs")["sure"] is False
    assert "did not finish within" in worker.look("health", "hangs")["reason"]
    assert worker.look("stats", "hangs")["stale"]
    # An error and not a retry in half a minute: somebody waits for the answer.
    with pytest.raises(OperationFailed, match="did not finish within"):
        worker.look("ports", "hangs")


def test_n34_a_runtime_that_died_unseen_is_stopped_once_with_its_reason_and_captured(worker: Worker, bench: Bench) -> None:
    process, handle = started(bench)
    living, living_handle = started(bench)
    worker.register(handle)
    worker.register(living_handle, ident="lives", path=bench.folder / "lives")
    worker.register(None, ident="none", path=bench.folder / "none")
    end(process)
    found = worker.run("runtime.reconcile")
    assert (found["lost"], found["checked"], found["without_runtime"], found["remaining"]) == ([ID], 2, 1, 0)
    lost = worker.record()
    assert (lost.state, lost.state_reason) == ("stopped", "lost")
    assert worker.record("lives").state == worker.record("none").state == "active"
    assert worker.registry.counters.all()["stopped:lost"] == 1
    events = worker.events("workspace.stopped")
    assert [(event["workspace"], event["reason"]) for event in events] == [(ID, "lost")]
    assert "has ended" in events[0]["detail"]
    captures = [job for job in worker.registry.jobs.list() if job.task == "workspace.capture"]
    assert [(job.workspace, job.state) for job in captures] == [(ID, "queued")]
    assert worker.run("runtime.reconcile")["lost"] == []
    assert worker.registry.counters.all()["stopped:lost"] == 1
    assert living.poll() is None
    # What it used is known, although nobody had asked while it lived.
    worker.run("runtime.reconcile")
    end(living)
    known = worker.look("stats", "lives")
    assert (known["stale"], known["processes"]) == (True, 1)


def test_n34_a_dead_runtime_whose_directory_is_gone_too_is_stopped_without_a_capture(worker: Worker, bench: Bench) -> None:
    process, handle = started(bench)
    folder = bench.folder / "vanishes"
    folder.mkdir()
    worker.register(handle, path=folder)
    end(process)
    shutil.rmtree(folder)
    assert worker.run("runtime.reconcile")["lost"] == [ID]
    assert [job for job in worker.registry.jobs.list() if job.task == "workspace.capture"] == []


def test_n34_what_cannot_be_seen_is_not_lost(worker: Worker, bench: Bench) -> None:
    _, handle = started(bench)
    worker.register({**handle, "pid_ns": "pid:[1]"})
    found = worker.run("runtime.reconcile")
    assert (found["lost"], found["skipped"]) == ([], {"unsure": 1})
    assert worker.record().state == "active"


def test_n34_one_in_which_somebody_is_present_is_not_lost_until_he_is_missed(worker: Worker, bench: Bench) -> None:
    process, handle = started(bench)
    worker.register(handle)
    end(process)
    worker.registry.presence.heartbeat(ID, "agent-1", 60_000)
    assert worker.run("runtime.reconcile")["skipped"] == {"presence": 1}
    worker.registry.presence.goodbye(ID, "agent-1")
    assert worker.run("runtime.reconcile")["lost"] == [ID]


def test_n34_one_that_a_job_works_on_or_that_has_a_new_runtime_is_left_to_the_next_time(
    worker: Worker, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, handle = started(bench)
    _, newer = started(bench)
    worker.register(handle)
    end(process)
    job = worker.registry.jobs.submit("workspace.capture", {"workspace": ID}, workspace=ID).job
    worker.registry.jobs.claim(job.id, host="h1", worker="h1/1", lease_ms=60_000)
    assert worker.run("runtime.reconcile")["skipped"] == {"busy": 1}
    worker.registry.jobs.cancel(job.id)
    claim = worker.registry.jobs.get(job.id)
    worker.registry.jobs.finish_cancelled(job.id, claim.fence)
    lost = worker.registry.lifecycle.lost

    def meanwhile(*args: Any, **fields: Any) -> Any:
        worker.register(newer)  # between the look and its effect
        return lost(*args, **fields)

    monkeypatch.setattr(worker.registry.lifecycle, "lost", meanwhile)
    assert worker.run("runtime.reconcile")["skipped"] == {"changed": 1}
    assert worker.record().state == "active"


def test_a_reconcile_stops_at_its_time_and_says_what_remains_and_the_next_begins_elsewhere(
    worker: Worker, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, handle = started(bench)
    for number in range(5):
        worker.register(handle, ident=f"w{number}", path=bench.folder / str(number))
    monkeypatch.setattr(runtime, "RECONCILE_SECONDS", 0.0)
    assert (worker.run("runtime.reconcile")["checked"], worker.run("runtime.reconcile")["remaining"]) == (0, 5)
    monkeypatch.undo()
    assert worker.run("runtime.reconcile")["checked"] == 5


def test_a_cancelled_reconcile_ends_between_two_workspaces(worker: Worker, bench: Bench) -> None:
    process, handle = started(bench)
    worker.register(handle)
    end(process)
    job = worker.registry.jobs.submit("runtime.reconcile", {"host": "h1"}, workspace=None, host="h1", lane="reconcile").job
    claimed = worker.registry.jobs.claim(job.id, host="h1", worker="h1/1", lease_ms=60_000)
    worker.registry.jobs.cancel(job.id)
    context = JobContext(settings=worker.settings, registry=worker.registry, job=job, fence=claimed.fence)
    context.note_cancel()
    with pytest.raises(Cancelled):
        SPECS["runtime.reconcile"].function(context, runtime.HostArgs(host="h1"))
    assert worker.record().state == "active"


def test_two_requests_to_reconcile_a_host_are_one_job(worker: Worker) -> None:
    submit = worker.registry.jobs.submit
    first, second = (submit("runtime.reconcile", {"host": "h1"}, workspace=None, host="h1", lane="reconcile") for _ in range(2))
    assert (first.joined, second.joined) == (False, True)
    assert eventually(lambda: worker.registry.jobs.get(first.job.id).state == "queued")
    with pytest.raises((Ignore, InvalidParams)):
        worker.run("workspace.ping", workspace="..")
