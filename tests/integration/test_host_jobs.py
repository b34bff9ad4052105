"""Jobs of a host: one lane per host, one place per job, and sweeps that ask every host that is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from billiard.exceptions import SoftTimeLimitExceeded
from celery.exceptions import Ignore

from mothball.client import Fleet
from mothball.doorbell import DoorbellRinger
from mothball.errors import HostOffline, Unavailable
from mothball.registry import Registry
from mothball.settings import Settings
from tasks import services
from tasks.hosts import HostArgs, ask_hosts
from tasks.job import Outcome, execute
from tasks.spec import JobSpec, build_spec
from workers.redis_server import RedisServer

TASK = "unit.place"


class PlaceArgs(HostArgs):
    """A job of a host that names a workspace too."""

    workspace: str | None = None


@pytest.fixture
def here(private_redis: RedisServer, make_settings: Callable[..., Settings]) -> Iterator[services.Services]:
    """The services of a worker on host h1; h2 is online as well, h3 was never announced."""
    services.configure(make_settings(host="h1", redis_timeout=1.0))
    found = services.current()
    for host in ("h1", "h2"):
        found.registry.hosts.heartbeat(host, {})
    yield found
    services.renew()
    services._settings = None


def broker(here: services.Services) -> Any:
    """The broker's database."""
    return redis.Redis.from_url(here.settings.broker_url)


def probe() -> JobSpec:
    """A job of a host that is declared nowhere."""
    options = {"name": TASK, "args": PlaceArgs, "queue": "host", "lane": "place", "time_limit": 20, "soft_time_limit": 10}
    return build_spec(lambda ctx, args: Outcome(result={"host": ctx.host, "fence": ctx.fence}), options, {})


def deliver(job_id: str, kwargs: dict[str, Any]) -> Any:
    """A plain producer's message, heard by this process."""
    request = SimpleNamespace(id=job_id, hostname="w@h")
    task = SimpleNamespace(request=request, update_state=lambda **_: None, backend=SimpleNamespace(), send_event=lambda *_: None)
    return execute(task, probe(), (), kwargs)


def test_requests_for_one_host_join_and_those_for_another_do_not(here: services.Services) -> None:
    submit = here.registry.jobs.submit
    first, second = (submit(TASK, {"host": "h1"}, workspace=None, host="h1", lane="place") for _ in range(2))
    other = submit(TASK, {"host": "h2"}, workspace=None, host="h2", lane="place")
    assert (first.joined, second.joined, other.joined) == (False, True, False)
    assert second.job.id == first.job.id != other.job.id
    assert (first.job.workspace, first.job.host, first.job.queue) == (None, "h1", "host.h1")
    with pytest.raises(HostOffline, match="h3"):
        submit(TASK, {"host": "h3"}, workspace=None, host="h3", lane="place")


def test_a_workspace_that_is_called_like_a_queue_has_a_lane_of_its_own(here: services.Services) -> None:
    """Else its capture would take the place of the host's queued job."""
    here.registry.workspaces.register("host.h1", host="h1", path="/srv/x")
    submit = here.registry.jobs.submit
    mine = submit(TASK, {"host": "h1"}, workspace=None, host="h1", lane="place")
    submit(TASK, {"workspace": "host.h1"}, workspace="host.h1", lane="place")
    assert submit(TASK, {"host": "h1"}, workspace=None, host="h1", lane="place").job.id == mine.job.id


def test_the_producers_api_submits_for_a_host(here: services.Services) -> None:
    with Fleet(settings=here.settings) as fleet:
        submitted = fleet.submit(TASK, {"host": "h2"}, workspace=None, host="h2", lane="place")
        assert (submitted.job.queue, submitted.job.origin) == ("host.h2", "client")
    assert broker(here).llen("host.h2") == 1


def test_a_plain_message_for_this_host_runs_and_holds_no_workspaces_lease(here: services.Services) -> None:
    """Although it names one, which need not even exist: an undelete names a workspace that is gone."""
    outcome = deliver("plain-1", {"host": "h1", "workspace": "o/gone#1"})
    job = here.registry.jobs.get("plain-1")
    assert outcome == {"host": "h1", "fence": job.fence}
    assert (job.state, job.host, job.workspace, job.origin) == ("succeeded", "h1", None, "adopted")


def test_a_plain_message_for_another_host_goes_there(here: services.Services) -> None:
    with pytest.raises(Ignore, match="wrong_host"):
        deliver("plain-2", {"host": "h2"})
    job = here.registry.jobs.get("plain-2")
    assert (job.state, job.host, job.queue) == ("queued", "h2", "host.h2")
    assert broker(here).llen("host.h2") == 1


def test_a_plain_message_for_a_host_nobody_announced_fails_with_its_code(here: services.Services) -> None:
    """Instead of lying for ever in a queue that nobody reads."""
    with pytest.raises(HostOffline, match="h3"):
        deliver("plain-3", {"host": "h3"})
    job = here.registry.jobs.get("plain-3")
    assert (job.state, job.error_code) == ("failed", "host_offline")
    assert broker(here).llen("host.h3") == 0
    assert here.registry.jobs.ring() == []


def test_a_sweep_asks_each_host_that_is_online_once(here: services.Services) -> None:
    away = int(here.registry.time_ms()) - here.settings.host_offline_seconds * 1000 - 60_000
    here.registry.hosts.heartbeat("h4", {})
    client = redis.Redis.from_url(here.settings.registry_url)
    client.hset(f"{here.settings.namespace}:host:h4", "last_seen", away)
    assert ask_hosts(here, TASK, {"deep": True}, "place") == {"asked": 2, "joined": 0, "failed": 0}
    assert ask_hosts(here, TASK, {"deep": True}, "place") == {"asked": 0, "joined": 2, "failed": 0}
    jobs = here.registry.jobs.list()
    assert sorted((job.host, job.origin, tuple(job.args.items())) for job in jobs) == [
        (host, "beat", (("deep", True), ("host", host))) for host in ("h1", "h2")
    ]
    assert [broker(here).llen(f"host.{host}") for host in ("h1", "h2", "h4")] == [1, 1, 0], "a joined job was rung already"


def test_one_bad_host_does_not_end_the_sweep(here: services.Services, monkeypatch: pytest.MonkeyPatch) -> None:
    submit = here.registry.jobs.submit

    def sometimes(task: str, args: dict[str, Any], **fields: Any) -> Any:
        if args["host"] == "h1":
            raise RecursionError("deep")
        return submit(task, args, **fields)

    monkeypatch.setattr(here.registry.jobs, "submit", sometimes)
    assert ask_hosts(here, TASK, {}, "place") == {"asked": 1, "joined": 0, "failed": 1}


def test_a_broker_that_is_away_costs_the_doorbells_only_and_a_time_limit_ends_the_sweep(
    here: services.Services, make_settings: Callable[..., Settings]
) -> None:
    """The records are written: maintenance.ring rings for them."""
    nowhere = make_settings(redis_url="redis://127.0.0.1:1", redis_timeout=0.5)
    deaf = services.Services(pid=here.pid, settings=nowhere, registry=here.registry, ringer=DoorbellRinger(nowhere))
    assert ask_hosts(deaf, TASK, {}, "place") == {"asked": 2, "joined": 0, "failed": 0}
    assert {job.state for job in here.registry.jobs.list()} == {"queued"}

    def limit(_: object) -> None:
        raise SoftTimeLimitExceeded

    late = SimpleNamespace(settings=here.settings, registry=here.registry, ringer=SimpleNamespace(ring=limit))
    here.registry.jobs.cancel(here.registry.jobs.list()[0].id)
    with pytest.raises(SoftTimeLimitExceeded):
        ask_hosts(late, TASK, {}, "place")  # type: ignore[arg-type]  # only its ringer differs


def test_a_registry_that_is_away_is_said_once(make_settings: Callable[..., Settings]) -> None:
    settings = make_settings(redis_timeout=0.5)
    here = services.Services(pid=0, settings=settings, registry=Registry.connect(settings), ringer=DoorbellRinger(settings))
    with pytest.raises(Unavailable):
        ask_hosts(here, TASK, {}, "place")
