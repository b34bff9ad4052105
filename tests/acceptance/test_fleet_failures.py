"""Runs that go wrong: what the record says, what is retried, what a plain producer sees."""

from __future__ import annotations

import base64
import os
import signal
import socket
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.acceptance.fleet import FleetRun
from tests.acceptance.test_fleet_life import slow, succeeded_once
from workers.config import flower_command
from workers.redis_server import RedisServer


def faulty(fleet: FleetRun, how: str) -> str:
    """Submit a job that goes wrong."""
    fleet.workspace("r/f#1")
    return fleet.submit("probe.faulty", workspace="r/f#1", how=how)


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("bug", "operation_failed", "ZeroDivisionError: a bug"),
        ("corrupt", "corrupt", "it went wrong"),
        ("invalid_params", "invalid_params", "it went wrong"),
        ("path_not_allowed", "path_not_allowed", "it went wrong"),
    ],
)
def test_what_will_not_get_better_fails_at_once(fleet: FleetRun, how: str, code: str, said: str) -> None:
    """No retry; the code is in the record, the exception's name reaches AsyncResult, the lease is free."""
    fleet.worker(auto_crash_report="off")  # a report of the failure would hold the lease in its turn
    job = fleet.finished(faulty(fleet, how))
    assert (job.state, job.error_code, job.attempts, job.deliveries) == ("failed", code, 1, 1), job
    assert said in (job.error or "")
    assert fleet.registry.workspaces.get("r/f#1").last_error
    with pytest.raises(Exception, match=r"it went wrong|a bug"):
        fleet.producer().AsyncResult(job.id).get(timeout=10)
    assert fleet.leases() == []


@pytest.mark.parametrize(
    ("how", "code"),
    [
        ("disk", "operation_failed"),
        ("memory", "operation_failed"),
        ("no_space", "no_space"),
        ("busy", "busy"),
        ("unavailable", "unavailable"),
        ("soft", "timeout"),
        ("hard", "timeout"),
    ],
)
def test_q50_what_may_get_better_is_retried_after_half_a_minute(fleet: FleetRun, how: str, code: str) -> None:
    """The record says when; the worker lives; the result says RETRY and not FAILURE (but for a process that was killed)."""
    worker = fleet.worker(lease_seconds=600)
    job_id = faulty(fleet, how)
    fleet.until(lambda: fleet.job(job_id).attempts == 1, "the run failed", seconds=30)
    job = fleet.job(job_id)
    assert (job.state, job.error_code) == ("queued", code), job
    assert 29_000 < (job.due_at or 0) - fleet.registry.time_ms() < 33_000
    assert fleet.leases() == []
    if how != "hard":
        result = fleet.producer().AsyncResult(job_id)
        fleet.until(lambda: result.state == "RETRY", "the result says RETRY")
    after, effects = slow(fleet, 0.1)
    succeeded_once(fleet, after, effects)
    assert worker.alive


def test_the_last_attempt_fails_for_good_and_reaches_the_producer(fleet: FleetRun) -> None:
    """With one attempt allowed, the first failure is the last."""
    fleet.worker(max_attempts=1)
    job = fleet.finished(faulty(fleet, "no_space"))
    assert (job.state, job.error_code) == ("failed", "no_space")
    with pytest.raises(Exception, match="it went wrong: no_space"):
        fleet.producer().AsyncResult(job.id).get(timeout=10)


def test_a_main_process_killed_alone_doubles_nothing(fleet: FleetRun) -> None:
    """Its orphaned pool process may finish the job or die with it; either way there is one effect."""
    worker = fleet.worker("w1")
    fleet.beat()
    job_id, effects = slow(fleet, 3)
    fleet.running(job_id)
    os.kill(worker.popen.pid, signal.SIGKILL)
    fleet.worker("w2")
    succeeded_once(fleet, job_id, effects, seconds=40)


def test_a_worker_that_starts_before_redis_waits_for_it(fleet: FleetRun, private_redis: RedisServer) -> None:
    """A fleet that boots in any order: no crash loop, no lost job."""
    private_redis.kill()
    worker = fleet.worker(ready=False)
    beat = fleet.beat()
    fleet.until(lambda: "Cannot connect to" in worker.text(), "the worker tries")
    assert worker.alive and beat.alive
    private_redis.start()
    fleet.until(lambda: " ready." in worker.text(), "the worker is ready", seconds=40)
    job_id, effects = slow(fleet, 0.1, ring=False)
    succeeded_once(fleet, job_id, effects, seconds=30)


def test_flower_shows_the_fleet_reads_only_and_asks_for_the_password(fleet: FleetRun) -> None:
    """Started by our command: health is open, the API wants the password, and nothing can be changed through it."""
    fleet.worker()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = fleet.with_settings(flower_basic_auth="ops:open-sesame", flower_port=port)
    flower = fleet._start("flower", flower_command(settings))
    base = f"http://127.0.0.1:{port}"

    def answer(path: str, *, password: str = "", post: bool = False) -> int:
        request = urllib.request.Request(base + path, data=b"" if post else None)
        if password:
            request.add_header("Authorization", "Basic " + base64.b64encode(f"ops:{password}".encode()).decode())
        try:
            with urllib.request.urlopen(request, timeout=5) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            error.close()
            return error.code

    fleet.until(lambda: answer("/healthcheck") == 200, "flower is up", seconds=30)
    assert answer("/api/workers") == 401
    assert answer("/api/workers", password="guess") == 401
    assert answer("/api/workers", password="open-sesame") == 200
    assert answer("/api/worker/shutdown/w1@x", password="open-sesame", post=True) in {401, 403, 405}
    assert "open-sesame" not in flower.text()
    assert "open-sesame" not in Path(f"/proc/{flower.popen.pid}/cmdline").read_text()
