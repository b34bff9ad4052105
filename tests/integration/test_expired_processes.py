"""What has expired while processes run in it is stopped first, with a last capture, and evicted then: nothing is left behind."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mothball.errors import Busy, Gone
from mothball.settings import Settings
from tasks import services
from tasks.lifecycle import sweep_expired
from tests.integration.ending import ID, Host, ended
from workers.redis_server import RedisServer

SLEEPS = "print('ready', flush=True)\nimport time\nwhile True: time.sleep(60)"
COMPUTES = "print('ready', flush=True)\nwhile True: pass"


@pytest.fixture
def host(private_redis: RedisServer, make_settings: Callable[..., Settings], tmp_path: Path) -> Iterator[Host]:
    found = Host(make_settings(fsync=False, redis_timeout=1.0), tmp_path / "tree")
    yield found
    found.close()


def sweep(host: Host) -> dict[str, Any]:
    host.raw.zadd(host.key("ws:due:evict"), {ID: 0})
    return sweep_expired(services.current())


def test_b74_an_expired_workspace_is_stopped_with_a_last_capture_and_then_evicted(host: Host) -> None:
    process = host.start(SLEEPS, policy={"ttl": "10m", "stop_grace": "1s"})
    host.idle()
    done = sweep(host)
    assert (done["evicted"], done["stopped"]) == ({}, 1)
    (job,) = host.registry.jobs.list(workspace=ID)
    assert (job.task, job.args["rule"]) == ("workspace.stop", "ttl")
    assert sweep(host)["skipped"] == {"queued": 1}
    result = host.deliver(job)
    assert (result["stopped"], result["rule"], ended(process)) == (True, "ttl", -signal.SIGTERM)
    assert (host.record.state, host.record.generation) == ("stopped", 1)
    assert sweep_expired(services.current())["evicted"] == {"ttl": 1}
    with pytest.raises(Gone, match="ttl"):
        _ = host.record
    assert host.counters()["stopped:ttl"] == host.counters()["evicted:ttl"] == 1


def test_what_is_too_old_is_stopped_however_busy_it_is_and_what_seems_idle_is_not(host: Host) -> None:
    host.start(COMPUTES, policy={"ttl": "never", "idle_ttl": "10m", "stop_grace": "1s", "cpu_busy": 1})
    host.idle()
    assert sweep(host)["stopped"] == 1
    (job,) = host.registry.jobs.list(workspace=ID)
    assert host.deliver(job)["stopped"] is False
    assert (host.record.state, host.record.last_signal) == ("active", "cpu")
    host.registry.policies.set_workspace(ID, {"ttl": "10m", "stop_grace": "1s"}, "a test")
    assert sweep(host)["stopped"] == 1
    assert host.deliver(next(each for each in host.registry.jobs.list(workspace=ID) if each.id != job.id))["stopped"] is True


def test_b72_above_the_cap_the_oldest_is_stopped_and_nobody_else_goes_in_its_place(host: Host) -> None:
    host.registry.policies.set_fleet({"cap": 1}, "a test")
    host.start(SLEEPS)
    host.idle(60)
    host.registry.workspaces.register("younger", host=host.settings.host, path="/srv/younger")
    first, again = sweep(host), sweep(host)
    assert (first["stopped"], first["evicted"], again["evicted"]) == (1, {}, {})
    (job,) = host.registry.jobs.list(workspace=ID)
    assert host.deliver(job)["stopped"] is True
    assert sweep(host)["evicted"] == {"cap": 1}
    assert [each.id for each in host.registry.workspaces.list()] == ["younger"]


def test_a_host_that_is_gone_for_good_cannot_stop_anything_and_keeps_nothing(host: Host) -> None:
    host.start(SLEEPS, policy={"ttl": "10m"})
    host.idle()
    seen = host.registry.time_ms() - 600_000
    name = host.settings.host
    host.raw.hset(host.key(f"host:{name}"), "last_seen", seen)
    host.raw.zadd(host.key("hosts"), {name: seen})
    assert sweep(host)["skipped"] == {"host_offline": 1}
    seen -= 3_600_000
    host.raw.hset(host.key(f"host:{name}"), "last_seen", seen)
    host.raw.zadd(host.key("hosts"), {name: seen})
    assert sweep(host)["evicted"] == {"ttl": 1}


def test_a_person_who_evicts_what_runs_is_told_to_stop_it_first(host: Host) -> None:
    host.start(SLEEPS)
    with pytest.raises(Busy, match="mothball stop"):
        host.fleet.evict(ID, by="me")
    host.fleet.evict(ID, by="me", force=True)
    with pytest.raises(Gone):
        _ = host.record
