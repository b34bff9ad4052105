"""Jobs through the life of processes: shutdowns, deaths, outages, cancels, and beats."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.fleet import FleetRun
from workers.health import heartbeat_age
from workers.health import main as health
from workers.redis_server import RedisServer


def lines(path: Path) -> list[str]:
    """The lines of a file that may not exist yet."""
    return path.read_text().splitlines() if path.exists() else []


def slow(fleet: FleetRun, seconds: float, *, name: str = "r/a#1", ring: bool = True, deaf: bool = False) -> tuple[str, Path]:
    """Submit a slow job of a workspace; returns its id and the file of its effects."""
    effects = fleet.folder / f"effects-{name.replace('/', '-')}"
    fleet.workspace(name)
    return fleet.submit("probe.slow", ring=ring, workspace=name, seconds=seconds, effects=str(effects), deaf=deaf), effects


def succeeded_once(fleet: FleetRun, job_id: str, effects: Path, *, seconds: float = 30.0) -> None:
    """The job succeeded, its effect happened once and under the last fence, nothing is left behind."""
    job = fleet.finished(job_id, seconds=seconds)
    assert job.state == "succeeded", job
    assert lines(effects) == [f"{job_id} {job.fence}"]
    fleet.until(lambda: fleet.leases() == [], "no lease is left")


def test_sigterm_lets_a_short_job_finish(fleet: FleetRun) -> None:
    """Soft shutdown: a job that ends in time ends as if nothing were."""
    worker = fleet.worker(soft_shutdown_seconds=5)
    job_id, effects = slow(fleet, 1.5)
    fleet.running(job_id)
    worker.signal(signal.SIGTERM)
    worker.wait(20)
    succeeded_once(fleet, job_id, effects, seconds=1)
    assert fleet.job(job_id).deliveries == 1


def test_sigterm_requeues_a_long_job_and_another_worker_finishes_it(fleet: FleetRun) -> None:
    """The lease is given back at once: the next worker does not wait for it to run out (here: 60 s)."""
    worker = fleet.worker("w1", lease_seconds=60, max_deliveries=1)
    job_id, effects = slow(fleet, 4)
    fleet.running(job_id)
    stopped = time.monotonic()
    worker.signal(signal.SIGTERM)
    worker.wait(15)
    assert lines(effects) == []
    assert fleet.job(job_id).state == "queued"
    # An orderly shutdown is no run that vanished: with one allowed, the job would be dead now.
    fleet.worker("w2", lease_seconds=60, max_deliveries=1)
    succeeded_once(fleet, job_id, effects, seconds=25)
    assert time.monotonic() - stopped < 30
    assert fleet.job(job_id).deliveries == 2


def test_a_killed_pool_process_costs_seconds_even_with_a_long_lease(fleet: FleetRun) -> None:
    """The main process notices the death, frees the lease and rings; nobody waits for the lease to run out."""
    worker = fleet.worker(lease_seconds=600)
    job_id, effects = slow(fleet, 1.5)
    job = fleet.running(job_id)
    killed = time.monotonic()
    pid = int((job.worker or "").rpartition("/")[2])
    assert pid in [child.pid for child in worker.children()]
    next(child for child in worker.children() if child.pid == pid).kill()
    succeeded_once(fleet, job_id, effects, seconds=30)
    assert time.monotonic() - killed < 25
    assert worker.alive


def test_a_killed_worker_costs_a_lease_and_a_ring(fleet: FleetRun) -> None:
    """SIGKILL of everything: the lease runs out, beat's ring brings the job back to the next worker."""
    worker = fleet.worker("w1")
    fleet.beat()
    job_id, effects = slow(fleet, 2)
    fleet.running(job_id)
    worker.kill()
    fleet.worker("w2")
    succeeded_once(fleet, job_id, effects, seconds=30)
    assert fleet.job(job_id).deliveries == 2


def test_a_job_that_kills_every_process_ends_dead(fleet: FleetRun) -> None:
    """A poison job must not run for ever: after max_deliveries it is dead, with an event, and the next job runs."""
    fleet.worker(max_deliveries=2, lease_seconds=600)
    fleet.beat(max_deliveries=2)
    job_id, effects = slow(fleet, 30)
    killed: set[str] = set()

    def kill_next() -> bool:
        job = fleet.job(job_id)
        if job.state == "running" and job.worker and job.worker not in killed:
            killed.add(job.worker)
            os.kill(int(job.worker.rpartition("/")[2]), signal.SIGKILL)
        return job.state == "dead"

    fleet.until(kill_next, "the job is dead", seconds=60)
    assert len(killed) == 2
    assert lines(effects) == []
    assert fleet.registry.events.list(kind="job.dead")
    after, effects_after = slow(fleet, 0.1)
    succeeded_once(fleet, after, effects_after.with_name(effects.name))


def test_cancel_stops_a_running_job_within_seconds(fleet: FleetRun) -> None:
    """A checkpoint raises; the record says cancelled, AsyncResult says REVOKED, no failure is counted (Q-36)."""
    fleet.worker(lease_seconds=600)
    job_id, effects = slow(fleet, 60)
    fleet.running(job_id)
    asked = time.monotonic()
    assert fleet.registry.jobs.cancel(job_id).cancelled
    job = fleet.finished(job_id, seconds=10)
    assert (job.state, job.attempts) == ("cancelled", 0)
    assert time.monotonic() - asked < 5
    assert lines(effects) == []
    assert fleet.leases() == []
    result = fleet.producer().AsyncResult(job_id)
    fleet.until(lambda: result.state == "REVOKED", "the result says REVOKED")
    again, more = slow(fleet, 0.1)
    assert fleet.finished(again).state == "succeeded", "a cancel must not poison the next run (Q-37)"
    assert len(lines(more)) == 1


def test_cancel_of_a_queued_job_means_it_never_runs(fleet: FleetRun) -> None:
    """Its message arrives later and does nothing."""
    job_id, effects = slow_before_any_worker(fleet)
    assert fleet.registry.jobs.cancel(job_id).cancelled
    fleet.worker()
    after, after_effects = slow(fleet, 0.1, name="r/b#1")
    succeeded_once(fleet, after, after_effects)
    assert fleet.job(job_id).state == "cancelled"
    assert not effects.with_suffix(".started").exists()


def slow_before_any_worker(fleet: FleetRun) -> tuple[str, Path]:
    """Submit to a host that has announced itself but has no worker yet."""
    fleet.registry.hosts.heartbeat(fleet.settings.host, {})
    return slow(fleet, 0.1)


def test_a_job_longer_than_its_lease_keeps_it_without_checkpoints(fleet: FleetRun) -> None:
    """The lease is 3 s and the work 7 s in one piece; the thread renews, and beat's rings find nothing to repeat."""
    fleet.worker(worker_concurrency=2)
    fleet.beat()
    job_id, effects = slow(fleet, 7, deaf=True)
    succeeded_once(fleet, job_id, effects)
    assert fleet.job(job_id).deliveries == 1
    assert len(lines(effects.with_suffix(".started"))) == 1


def test_cancel_reaches_a_job_without_checkpoints_at_its_next_one(fleet: FleetRun) -> None:
    """It works on, but it does not publish."""
    fleet.worker()
    job_id, effects = slow(fleet, 3, deaf=True)
    fleet.until(lambda: fleet.job(job_id).state == "running", "it runs")
    fleet.registry.jobs.cancel(job_id)
    assert fleet.finished(job_id).state == "cancelled"
    assert lines(effects) == []


def test_two_jobs_of_one_workspace_never_overlap(fleet: FleetRun) -> None:
    """The second waits for the lease and is rung by the first one's end, not by a timer."""
    fleet.worker(worker_concurrency=3, lease_seconds=600)
    jobs = [slow(fleet, 1.0)[0] for _ in range(3)]
    started = time.monotonic()
    done = [fleet.finished(job) for job in jobs]
    assert time.monotonic() - started < 15
    spans = sorted((job.started_at or 0, job.finished_at or 0) for job in done)
    assert all(earlier[1] <= later[0] for earlier, later in itertools.pairwise(spans)), spans


def test_redis_restart_in_the_middle_of_a_job_doubles_nothing(fleet: FleetRun, private_redis: RedisServer) -> None:
    """Killed and started again on its files while the job runs: one effect, one success, heartbeats go on."""
    worker = fleet.worker()
    fleet.beat()
    job_id, effects = slow(fleet, 4)
    fleet.running(job_id)
    time.sleep(1.2)  # appendfsync everysec: what was acknowledged a second ago is on disk
    private_redis.kill()
    time.sleep(1)
    private_redis.start()
    succeeded_once(fleet, job_id, effects, seconds=40)
    seen = fleet.registry.hosts.get(fleet.settings.host).last_seen
    fleet.until(lambda: fleet.registry.hosts.get(fleet.settings.host).last_seen > seen, "heartbeats go on", seconds=30)
    assert worker.alive
    after, after_effects = slow(fleet, 0.1, name="r/b#1")
    succeeded_once(fleet, after, after_effects)


def test_redis_frozen_while_a_job_runs(fleet: FleetRun, private_redis: RedisServer) -> None:
    """Redis stops answering for longer than the lease: the run goes on, or is repeated; one effect."""
    fleet.worker(redis_timeout=1)
    fleet.beat()
    job_id, effects = slow(fleet, 3)
    fleet.running(job_id)
    private_redis.freeze()
    time.sleep(5)
    private_redis.thaw()
    succeeded_once(fleet, job_id, effects, seconds=60)


def test_a_worker_paused_past_its_lease_does_not_publish(fleet: FleetRun) -> None:
    """Two workers believe they hold the job: only the one with the newest fence has an effect."""
    first = fleet.worker("w1")
    fleet.beat()
    job_id, effects = slow(fleet, 3)
    fleet.running(job_id)
    first.signal_all(signal.SIGSTOP)
    fleet.worker("w2")
    succeeded_once(fleet, job_id, effects, seconds=40)
    assert (fleet.job(job_id).worker or "").startswith("w2@")
    first.signal_all(signal.SIGCONT)
    fleet.until(lambda: "lease lost" in first.text(), "the paused run learns that it was replaced", seconds=15)
    assert len(lines(effects)) == 1
    assert len(lines(effects.with_suffix(".started"))) == 2


def test_a_task_without_checkpoints_that_was_paused_does_not_publish_either(fleet: FleetRun) -> None:
    """Its last checkpoint before the effect asks the registry, however long ago the one before was."""
    first = fleet.worker("w1")
    fleet.beat()
    job_id, effects = slow(fleet, 2, deaf=True)
    fleet.until(lambda: fleet.job(job_id).state == "running", "it runs")
    first.signal_all(signal.SIGSTOP)
    fleet.worker("w2")
    succeeded_once(fleet, job_id, effects, seconds=40)
    first.signal_all(signal.SIGCONT)
    fleet.until(lambda: "lease lost" in first.text(), "the paused run learns that it was replaced", seconds=15)
    assert len(lines(effects)) == 1


def test_b11_d18_beat_alone_finds_a_job_whose_message_was_lost(fleet: FleetRun) -> None:
    """The schedule is on by default and acts: nobody rang for this job, and it runs."""
    fleet.worker()
    fleet.beat()
    job_id, effects = slow(fleet, 0.1, ring=False)
    succeeded_once(fleet, job_id, effects, seconds=20)


def test_beat_sweeps_at_once_when_it_starts(fleet: FleetRun) -> None:
    """A restart must not cost an interval (here: 300 s): the sweeps are sent when beat starts."""
    fleet.worker(ring_seconds=300)
    job_id, effects = slow(fleet, 0.1, ring=False)
    time.sleep(1.5)
    fleet.beat(ring_seconds=300)
    succeeded_once(fleet, job_id, effects, seconds=15)


def test_two_beats_sweep_once_per_slot(fleet: FleetRun) -> None:
    """However many beats run, each slot of each sweep has one winner; the others' messages end quietly."""
    fleet.worker(worker_concurrency=2)
    ring, hosts = "maintenance.ring", "maintenance.check_hosts"
    names: dict[str, str] = {}
    received: Counter[str] = Counter()
    succeeded: Counter[str] = Counter()
    stop = threading.Event()
    app = fleet.producer()

    def count(event: dict[str, Any]) -> None:
        if event["type"] == "task-received":
            names[event["uuid"]] = event["name"]
            received[event["name"]] += 1
        elif event["type"] == "task-succeeded":
            succeeded[names.get(event["uuid"], "")] += 1

    def listen() -> None:
        from celery import events

        with app.connection() as connection:
            receiver = events.EventReceiver(connection, app=app, handlers={"*": count})
            while not stop.is_set():
                with contextlib.suppress(TimeoutError):
                    for _ in receiver.itercapture(limit=None, timeout=0.5, wakeup=False):
                        if stop.is_set():
                            break

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    time.sleep(0.5)
    started = time.monotonic()
    fleet.beat("beat-1", host_offline_seconds=300)
    fleet.beat("beat-2", host_offline_seconds=300)
    fleet.until(lambda: received[ring] >= 12 and received[hosts] >= 2, "both beats have sent", seconds=40)
    stop.set()
    listener.join(5)
    slots = time.monotonic() - started + 1
    # One ring per second, sent by both: received about twice as often as it succeeded.
    assert 3 <= succeeded[ring] <= slots + 1, (received, succeeded, slots)
    assert received[ring] >= succeeded[ring] + 3, (received, succeeded)
    # Every other sweep's slot is far longer than this test: one winner each (two when a slot's border fell within).
    others = {name: number for name, number in succeeded.items() if name.startswith("maintenance.") and name != ring}
    assert hosts in others, succeeded
    assert all(number <= 2 for number in others.values()), succeeded


def test_the_heartbeat_file_is_young_while_the_worker_lives_and_gone_after(
    fleet: FleetRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Liveness is the file's age, also while the only pool process is busy."""
    for key, value in {"host": fleet.settings.host, "data_dir": str(fleet.settings.data_dir)}.items():
        monkeypatch.setenv(f"MOTHBALL_{key.upper()}", value)
    assert health([]) == 1, "no worker yet"
    worker = fleet.worker(fleet.settings.host)
    job_id, _ = slow(fleet, 30)
    fleet.running(job_id)
    time.sleep(2.5)
    assert (heartbeat_age(fleet.settings) or 99) < 2
    assert health(["--ready"]) == 0
    assert "limit 15 s" in capsys.readouterr().out
    info = fleet.registry.hosts.get(fleet.settings.host).info
    assert {"maintenance.check_hosts", "maintenance.ring", "probe.slow", "workspace.capture"} <= set(info["tasks"])
    worker.signal(signal.SIGTERM)
    worker.wait(20)
    assert heartbeat_age(fleet.settings) is None


def test_no_log_line_shows_the_password(fleet: FleetRun, private_redis: RedisServer) -> None:
    """Neither while running nor while the broker is away."""
    worker, beat = fleet.worker(), fleet.beat()
    password = private_redis.url.partition("//:")[2].partition("@")[0]
    assert len(password) > 8
    private_redis.kill()
    fleet.until(lambda: "Trying again" in worker.text() or "lost" in worker.text(), "the worker misses its broker")
    time.sleep(2)
    assert password not in worker.text()
    assert password not in beat.text()
    private_redis.start()
