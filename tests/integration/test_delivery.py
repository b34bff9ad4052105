"""One delivery of a message in this process, on a real Redis: what a worker's pool process does with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from billiard.exceptions import SoftTimeLimitExceeded
from celery.exceptions import Ignore
from pydantic import BaseModel, ConfigDict

from mothball.doorbell import HEADER, VERSION
from mothball.errors import NotFound
from mothball.registry import Registry
from mothball.settings import Settings
from tasks import services
from tasks.job import Outcome, execute
from tasks.spec import JobSpec, build_spec
from workers import steps
from workers.redis_server import RedisServer

WORKSPACE = "o/r#1"


class Args(BaseModel):
    """Arguments of the probe."""

    model_config = ConfigDict(extra="forbid", strict=True)

    workspace: str


@pytest.fixture
def registry(private_redis: RedisServer, make_settings: Callable[..., Settings]) -> Iterator[Registry]:
    """The registry of a host with one workspace; this process is its worker."""
    settings = make_settings()
    services.configure(settings)
    with Registry.connect(settings) as found:
        found.hosts.heartbeat(settings.host, {})
        found.workspaces.register(WORKSPACE, host=settings.host, path="/srv/x")
        yield found
    services.renew()
    services._settings = None


def probe(function: Callable[..., Any]) -> JobSpec:
    """A task that is declared nowhere."""
    options = {"name": "unit.delivery", "args": Args, "queue": "host", "time_limit": 20, "soft_time_limit": 10}
    return build_spec(function, options, {})


def deliver(spec: JobSpec, job_id: str, kwargs: dict[str, Any], *, ours: bool = True) -> Any:
    """One message for `job_id`."""
    request = SimpleNamespace(id=job_id, hostname="w@h", **({HEADER: VERSION} if ours else {}))
    task = SimpleNamespace(request=request, update_state=lambda **_: None, backend=SimpleNamespace(), send_event=lambda *_: None)
    return execute(task, spec, (), kwargs)


def works(ctx: Any, args: Any) -> Outcome:
    """Succeeds."""
    return Outcome(result={"done": args.workspace})


def test_a_doorbell_without_a_record_runs_nothing_and_makes_no_record(registry: Registry) -> None:
    """The record of a cancelled job has run out, then its old message is read."""
    with pytest.raises(Ignore, match="unknown"):
        deliver(probe(works), "old-1", {"workspace": WORKSPACE})
    with pytest.raises(NotFound):
        registry.jobs.get("old-1")
    assert deliver(probe(works), "plain-1", {"workspace": WORKSPACE}, ours=False) == {"done": WORKSPACE}


def test_a_doorbell_needs_no_arguments_of_its_own(registry: Registry) -> None:
    job = registry.jobs.submit("unit.delivery", {"workspace": WORKSPACE}, workspace=WORKSPACE).job
    assert deliver(probe(works), job.id, {}) == {"done": WORKSPACE}


def test_a_message_of_one_task_never_runs_the_job_of_another(registry: Registry) -> None:
    job = registry.jobs.submit("unit.other", {"workspace": WORKSPACE}, workspace=WORKSPACE).job
    with pytest.raises(Ignore, match="mismatch"):
        deliver(probe(works), job.id, {"workspace": WORKSPACE}, ours=False)
    assert registry.jobs.get(job.id).deliveries == 0


def test_a_soft_time_limit_between_a_request_and_its_answer_is_recorded_all_the_same(registry: Registry) -> None:
    """The answer left in the interrupted connection must not be taken for that of the next request, nor in the next job."""

    def interrupted(ctx: Any, args: Any) -> Outcome:
        with ctx.registry._connection.guard() as client:
            pool = client.connection_pool
            connection = pool.get_connection()
            connection.send_command("PING")
            pool.release(connection)
        raise SoftTimeLimitExceeded

    jobs = [registry.jobs.submit("unit.delivery", {"workspace": WORKSPACE}, workspace=WORKSPACE).job.id for _ in range(2)]
    before = services.current()
    with pytest.raises(Ignore, match="will be retried"):
        deliver(probe(interrupted), jobs[0], {})
    job = registry.jobs.get(jobs[0])
    assert (job.state, job.error_code, job.attempts) == ("queued", "timeout", 1)
    assert services.current() is not before
    assert deliver(probe(works), jobs[1], {}) == {"done": WORKSPACE}


def test_the_queued_job_of_a_task_nobody_knows_ends_with_its_code(registry: Registry) -> None:
    """A misspelt name would otherwise be rung for ever; other states and other tasks' jobs are left alone."""
    job = registry.jobs.submit("unit.misspelt", {"workspace": WORKSPACE}, workspace=WORKSPACE).job
    steps.end_unknown(job.id, "unit.another")
    assert registry.jobs.get(job.id).state == "queued"
    steps.end_unknown(job.id, "unit.misspelt")
    ended = registry.jobs.get(job.id)
    assert (ended.state, ended.error_code) == ("failed", "unknown_task")
    assert "unit.misspelt" in (ended.error or "")
    steps.end_unknown(job.id, "unit.misspelt")
    for odd in ("no-such-job", "", "\ud800", "x" * 1000):
        steps.end_unknown(odd, "unit.misspelt")
    assert registry.jobs.ring() == []
