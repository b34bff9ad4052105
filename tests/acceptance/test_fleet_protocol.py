"""What happens to messages: ours, other code bases', and those that no worker should believe."""

from __future__ import annotations

from typing import Any

import kombu
import pytest
import redis
from celery.exceptions import QueueNotFound

from mothball.doorbell import DoorbellRinger
from mothball.registry import Doorbell
from tests.acceptance.fleet import FleetRun
from workers.app import make_app


def broker(fleet: FleetRun) -> redis.Redis:
    """The broker's database."""
    return redis.Redis.from_url(fleet.settings.broker_url)


def still_works(fleet: FleetRun) -> None:
    """The worker survived: the next job succeeds, and quickly."""
    fleet.workspace("still#1")
    job = fleet.submit("probe.slow", workspace="still#1", seconds=0.0, effects=str(fleet.folder / "still"))
    assert fleet.finished(job, seconds=10).state == "succeeded"


def event(fleet: FleetRun, kind: str) -> dict[str, str]:
    """The fields of the first event of `kind`, once there is one."""
    return fleet.until(lambda: fleet.registry.events.list(kind=kind), f"event {kind}")[0].fields


def test_a_job_runs_once_and_its_outcome_is_in_the_record(fleet: FleetRun) -> None:
    """The plain way: submit, ring, run, finish; no lease stays behind."""
    fleet.worker()
    fleet.workspace("r/a#1")
    effects = fleet.folder / "effects"
    job = fleet.finished(fleet.submit("probe.slow", workspace="r/a#1", seconds=0.1, effects=str(effects)))
    assert (job.state, job.deliveries, job.attempts) == ("succeeded", 1, 0), job
    assert job.outcome == {"slept": 0.1, "fence": job.fence}
    assert effects.read_text().splitlines() == [f"{job.id} {job.fence}"]
    assert fleet.leases() == []


def test_a_doubled_doorbell_has_one_effect(fleet: FleetRun) -> None:
    """Ten messages for one job, before, during and after its run: one delivery counts, one effect happens."""
    fleet.worker(worker_concurrency=3)
    fleet.workspace("r/a#1")
    effects = fleet.folder / "effects"
    job_id = fleet.submit("probe.slow", ring=False, workspace="r/a#1", seconds=1.0, effects=str(effects))
    record = fleet.job(job_id)
    bell = Doorbell(job=job_id, task=record.task, queue=record.queue)
    for _ in range(6):
        fleet.ringer.ring(bell)
    job = fleet.finished(job_id)
    for _ in range(4):
        fleet.ringer.ring(bell)
    fleet.until(lambda: broker(fleet).llen(record.queue) == 0, "all messages are taken")
    still_works(fleet)
    assert (job.state, fleet.job(job_id).deliveries) == ("succeeded", 1)
    assert len(effects.read_text().splitlines()) == 1


def test_a_plain_send_task_through_dispatch_is_adopted_and_forwarded_to_the_host(fleet: FleetRun) -> None:
    """Another code base knows only a task name: any worker takes the message, the right host runs it, AsyncResult delivers."""
    other = fleet.settings.host + "-other"
    fleet.worker("w1")
    fleet.workspace("r/there#1", host=other)
    producer = fleet.producer()
    effects = str(fleet.folder / "effects")
    result = producer.send_task(
        "probe.slow", kwargs={"workspace": "r/there#1", "seconds": 0.1, "effects": effects}, queue="dispatch"
    )
    # Only w1 lives, and it is the wrong host: it must forward and not run.
    fleet.until(lambda: broker(fleet).llen(f"host.{other}") == 1, "the message is forwarded to its host's queue")
    assert fleet.job(result.id).state == "queued"
    fleet.worker("w2", host=other)
    outcome = result.get(timeout=20, disable_sync_subtasks=False)
    job = fleet.job(result.id)
    assert outcome == {"slept": 0.1, "fence": job.fence}
    assert (job.state, job.origin, job.deliveries) == ("succeeded", "adopted", 1)
    assert (job.worker or "").startswith("w2@")


def test_a_job_of_a_host_runs_there_whoever_hears_of_it(fleet: FleetRun) -> None:
    """Submitted, or sent by a plain producer through dispatch: the worker of that host does it, under no workspace's lease."""
    other, effects = fleet.settings.host + "-other", fleet.folder / "places"
    fleet.worker("w1")
    result = fleet.producer().send_task("probe.place", kwargs={"host": other, "effects": str(effects)}, queue="dispatch")
    fleet.until(lambda: fleet.job(result.id).error_code == "host_offline", "a host that nobody announced is refused")
    fleet.worker("w2", host=other)
    result = fleet.producer().send_task("probe.place", kwargs={"host": other, "effects": str(effects)}, queue="dispatch")
    assert result.get(timeout=20) == {"host": other}
    job = fleet.job(result.id)
    assert (job.state, job.origin, job.workspace, job.host, job.queue) == ("succeeded", "adopted", None, other, f"host.{other}")
    job = fleet.finished(fleet.submit("probe.place", host=fleet.settings.host, effects=str(effects)))
    assert (job.state, job.outcome) == ("succeeded", {"host": fleet.settings.host}), job
    assert effects.read_text().split() == [other, fleet.settings.host]
    assert fleet.leases() == []


def test_an_adopted_message_for_an_unknown_workspace_fails_with_its_code(fleet: FleetRun) -> None:
    """The plain producer gets the code's exception by name, the record has the code."""
    fleet.worker()
    result = fleet.producer().send_task(
        "probe.slow", kwargs={"workspace": "no/such#1", "seconds": 0.1, "effects": "/dev/null"}, queue="dispatch"
    )
    with pytest.raises(Exception, match="no/such#1") as caught:
        result.get(timeout=20)
    assert type(caught.value).__name__ == "NotFound"
    job = fleet.job(result.id)
    assert (job.state, job.error_code, job.attempts) == ("failed", "not_found", 0)


@pytest.mark.parametrize(
    ("kwargs", "args", "said"),
    [
        ({"workspace": 7, "seconds": "soon", "effects": "x"}, (), "workspace: Input should be a valid string; seconds: "),
        ({"workspace": "r/a#1", "seconds": 1.0, "effects": "x", "twice": True}, (), "twice: Extra inputs are not permitted"),
        ({"workspace": "r/a#1"}, (), "seconds: Field required; effects: Field required"),
        ({}, ("r/a#1", 1.0, "x"), "arguments must be given by name"),
        ({"workspace": "r/a#1", "seconds": 1.0, "effects": "x" * 1_000_000}, (), "262144"),
    ],
    ids=["types", "extra", "missing", "positional", "megabyte"],
)
def test_bad_arguments_fail_the_job_with_invalid_params(
    fleet: FleetRun, kwargs: dict[str, Any], args: tuple[Any, ...], said: str
) -> None:
    """Wrong types, extra, missing, positional or a megabyte of arguments: one clear error in the record and for the producer."""
    fleet.worker()
    fleet.workspace("r/a#1")
    result = fleet.producer().send_task("probe.slow", args=args, kwargs=kwargs, queue="dispatch")
    with pytest.raises(Exception, match=r"probe\.slow|arguments") as caught:
        result.get(timeout=20)
    assert type(caught.value).__name__ == "InvalidParams"
    job = fleet.job(result.id)
    assert (job.state, job.error_code) == ("failed", "invalid_params"), job
    assert said in (job.error or ""), job.error
    assert len(job.error or "") < 1000
    assert len(str(job.args)) < 1000, "refused arguments must not be stored"
    assert fleet.leases() == []
    still_works(fleet)


def test_an_unknown_task_leaves_an_event_and_an_error_for_the_producer(fleet: FleetRun) -> None:
    """NotRegistered through AsyncResult, an event for the operator, and the worker goes on."""
    fleet.worker()
    result = fleet.producer().send_task("workspace.levitate", kwargs={"workspace": "x"}, queue="dispatch")
    fields = event(fleet, "message.unknown_task")
    assert (fields["task"], fields["job"], fields["queue"]) == ("workspace.levitate", result.id, "dispatch")
    with pytest.raises(Exception, match=r"workspace\.levitate"):
        result.get(timeout=10)
    still_works(fleet)


def test_a_job_of_an_unknown_task_fails_with_its_code_and_is_rung_no_more(fleet: FleetRun) -> None:
    """A misspelt name in a producer: one clear error instead of a job that waits for ever."""
    fleet.worker()
    fleet.workspace("r/a#1")
    job = fleet.finished(fleet.submit("probe.slwo", workspace="r/a#1"))
    assert (job.state, job.error_code) == ("failed", "unknown_task")
    assert "probe.slwo" in (job.error or "")
    assert fleet.leases() == []
    still_works(fleet)


def test_an_old_doorbell_of_a_job_that_is_forgotten_runs_nothing(fleet: FleetRun) -> None:
    """Cancelled, its record run out, and only then its message is read."""
    fleet.worker()
    fleet.workspace("r/a#1")
    fleet.ringer.ring(Doorbell(job="forgotten-1", task="probe.slow", queue=f"host.{fleet.settings.host}"))
    fleet.until(lambda: broker(fleet).llen(f"host.{fleet.settings.host}") == 0, "the message is taken")
    still_works(fleet)
    assert [job.id for job in fleet.registry.jobs.list() if job.id == "forgotten-1"] == []


def test_a_pickle_message_is_refused_and_never_loaded(fleet: FleetRun) -> None:
    """Whoever reaches the broker must not run code in a worker: the message is refused, noted, and gone."""
    fleet.worker()
    trap = fleet.folder / "pickled"

    class Trap:
        def __reduce__(self) -> Any:
            return (open, (str(trap), "w"))

    with kombu.Connection(fleet.settings.broker_url) as connection:
        kombu.Producer(connection).publish(
            [[], {"workspace": Trap()}, {}], exchange="", routing_key="control", serializer="pickle",
            headers={"task": "probe.slow", "id": "pickled-1", "lang": "py"},
        )  # fmt: skip
    fields = event(fleet, "message.rejected")
    assert (fields["job"], fields["content_type"]) == ("pickled-1", "application/x-python-serialize")
    still_works(fleet)
    assert not trap.exists()


@pytest.mark.parametrize(
    "raw",
    [
        b"garbage, not JSON",
        b"[1, 2, 3]",
        b"{}",
        b'{"body": "e30=", "headers": {"task": "probe.slow", "id": "x"}, "content-type": "application/json"}',
        b"\xff\xfe\x00",
    ],
    ids=["text", "list", "empty", "no-properties", "bytes"],
)
def test_garbage_in_a_queue_is_noted_and_does_not_kill_the_worker(fleet: FleetRun, raw: bytes) -> None:
    """Anything that reaches the list (a wrong client, a wrong database number) is taken out, noted, and survived."""
    worker = fleet.worker()
    broker(fleet).lpush("control", raw)
    event(fleet, "message.undecodable")
    still_works(fleet)
    assert worker.alive


@pytest.mark.parametrize("body", ["bm90IGpzb24=", "WzEsMiwzXQ==", "e30="], ids=["not-json", "not-a-call", "object"])
def test_a_task_message_with_a_broken_body_does_not_kill_the_worker(fleet: FleetRun, body: str) -> None:
    """A well-formed envelope around a body that is no call."""
    worker = fleet.worker()
    with kombu.Connection(fleet.settings.broker_url) as connection:
        channel = connection.default_channel
        message = channel.prepare_message(
            body, content_type="application/json", content_encoding="utf-8",
            headers={"task": "probe.slow", "id": "broken-1", "lang": "py"},
            properties={"body_encoding": "base64", "correlation_id": "broken-1", "delivery_mode": 2},
        )  # fmt: skip
        message["properties"]["delivery_tag"] = "tag-1"
        message["properties"]["delivery_info"] = {"exchange": "", "routing_key": "control"}
        broker(fleet).lpush("control", kombu.utils.json.dumps(message))
    fleet.until(lambda: broker(fleet).llen("control") == 0, "the message is taken")
    still_works(fleet)
    assert worker.alive


def test_a_queue_nobody_declares_is_an_error(fleet: FleetRun) -> None:
    """A misspelt queue must not become a silent list that nobody reads."""
    app = make_app(fleet.settings)
    with pytest.raises(QueueNotFound):
        app.send_task("workspace.capture", kwargs={"workspace": "x"}, queue="contorl")
    assert broker(fleet).keys("contorl*") == []


def test_a_job_for_a_host_waits_for_that_host_only(fleet: FleetRun) -> None:
    """Disk-bound work never runs on a machine that does not have the disk."""
    fleet.worker("w1")
    far = fleet.settings.host + "-far"
    fleet.registry.hosts.heartbeat(far, {})
    fleet.workspace("r/far#1", host=far)
    job_id = fleet.submit("probe.slow", workspace="r/far#1", seconds=0.0, effects=str(fleet.folder / "far"))
    still_works(fleet)
    assert fleet.job(job_id).state == "queued"
    fleet.worker("w2", host=far)
    assert fleet.finished(job_id).state == "succeeded"


def test_a_ringer_reuses_its_connection_and_survives_a_restart_of_redis(fleet: FleetRun, private_redis: Any) -> None:
    """One connection for many doorbells; after a restart the first ring already works."""
    ringer = DoorbellRinger(fleet.settings)
    bell = Doorbell(job="j", task="probe.slow", queue="nobody")
    for _ in range(20):
        ringer.ring(bell)
    names = [client["name"] for client in broker(fleet).client_list()]
    assert names.count("mothball-doorbell") <= 2, "kombu's channel has one for publishing and one for itself"
    private_redis.kill()
    private_redis.start()
    ringer.ring(bell)
    assert broker(fleet).llen("nobody") >= 1
    ringer.close()
