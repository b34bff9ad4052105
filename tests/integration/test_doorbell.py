"""The doorbell on a real server: the message Celery expects, clear errors in time, one connection, safe across a fork."""

from __future__ import annotations

import base64
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable

import pytest
import redis
from celery import Celery

from mothball.doorbell import DoorbellRinger
from mothball.errors import InvalidParams, Unavailable
from mothball.registry import Doorbell
from mothball.settings import Settings
from workers.redis_server import RedisServer

MakeSettings = Callable[..., Settings]
BELL = Doorbell(job="job-1", task="workspace.capture", queue="host.h1")


def broker(settings: Settings) -> redis.Redis:
    """The broker's database."""
    return redis.Redis.from_url(settings.broker_url)


def test_the_message_is_what_celery_itself_would_publish(private_redis: RedisServer, make_settings: MakeSettings) -> None:
    """Same envelope, same body, same headers as far as a worker reads them, and one of ours; straight in the queue's list."""
    settings = make_settings()
    DoorbellRinger(settings).ring(BELL)
    assert broker(settings).keys("*") == [BELL.queue.encode()], "nothing else is left in the broker"
    app = Celery("theirs", broker=settings.broker_url, set_as_current=False)
    app.conf.task_default_exchange = ""
    app.send_task(BELL.task, kwargs={}, task_id=BELL.job, queue=BELL.queue)
    app.close()
    theirs, ours = (json.loads(raw) for raw in broker(settings).lrange(BELL.queue, 0, -1))
    assert set(ours) == set(theirs)
    for part in ("content-type", "content-encoding"):
        assert ours[part] == theirs[part]
    assert json.loads(base64.b64decode(ours["body"])) == json.loads(base64.b64decode(theirs["body"]))
    for name in ("lang", "task", "id", "root_id", "parent_id", "group", "eta", "expires", "retries", "timelimit"):
        assert ours["headers"][name] == theirs["headers"][name], name
    assert set(ours["headers"]) - set(theirs["headers"]) == {"mothball"}
    assert ours["headers"]["mothball"] == 1
    assert json.loads(base64.b64decode(ours["body"]))[:2] == [[], {}], "the arguments stay in the record"
    assert "ignore_result" not in ours["headers"], "the task's own setting must count"
    assert ours["properties"]["correlation_id"] == BELL.job
    assert ours["properties"]["delivery_info"] == {"exchange": "", "routing_key": BELL.queue}


def test_redis_down_is_unavailable_within_ten_seconds_and_names_no_password(
    private_redis: RedisServer, make_settings: MakeSettings
) -> None:
    """A producer is told at once, and where, and the ringer works again as soon as Redis does."""
    settings = make_settings(redis_timeout=60, lease_seconds=120)
    password = private_redis.url.partition("//:")[2].partition("@")[0]
    ringer = DoorbellRinger(settings)
    ringer.ring(BELL)
    private_redis.kill()
    started = time.monotonic()
    with pytest.raises(Unavailable) as caught:
        ringer.ring(BELL)
    assert time.monotonic() - started < 10
    assert password not in str(caught.value) + repr(caught.value.fields)
    assert f"127.0.0.1:{private_redis.port}" in caught.value.message
    private_redis.start()
    ringer.ring(BELL)
    ringer.close()


def test_a_frozen_redis_is_unavailable_within_ten_seconds(private_redis: RedisServer, make_settings: MakeSettings) -> None:
    """Connected, and connecting anew, with a setting that would allow a minute."""
    settings = make_settings(redis_timeout=60, lease_seconds=120)
    ringer = DoorbellRinger(settings)
    ringer.ring(BELL)
    os.kill(private_redis.pid, signal.SIGSTOP)
    try:
        for _ in range(2):
            started = time.monotonic()
            with pytest.raises(Unavailable):
                ringer.ring(BELL)
            assert time.monotonic() - started < 10
    finally:
        os.kill(private_redis.pid, signal.SIGCONT)
    ringer.ring(BELL)
    ringer.close()


def test_many_threads_on_a_frozen_redis_are_all_told_within_ten_seconds(
    private_redis: RedisServer, make_settings: MakeSettings
) -> None:
    """They share one connection; none may wait its turn behind the timeouts of the others."""
    ringer = DoorbellRinger(make_settings())
    ringer.ring(BELL)
    private_redis.freeze()
    took: list[float] = []

    def ring() -> None:
        started = time.monotonic()
        with pytest.raises(Unavailable):
            ringer.ring(BELL)
        took.append(time.monotonic() - started)

    threads = [threading.Thread(target=ring) for _ in range(6)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        private_redis.thaw()
    assert len(took) == 6
    assert max(took) < 10
    ringer.ring(BELL)
    ringer.close()


def test_callbacks_that_have_no_form_in_json_are_invalid_params(private_redis: RedisServer, make_settings: MakeSettings) -> None:
    """A typed error, and the ringer rings on."""
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    ringer = DoorbellRinger(make_settings())
    for chain in (object(), deep):
        with pytest.raises(InvalidParams, match="job-1"):
            ringer.ring(BELL, embed={"chain": chain})
    ringer.ring(BELL)
    ringer.close()


def test_a_restarted_redis_costs_no_doorbell(private_redis: RedisServer, make_settings: MakeSettings) -> None:
    """The idle socket is dead; the ring opens a new one by itself."""
    settings = make_settings()
    ringer = DoorbellRinger(settings)
    ringer.ring(BELL)
    before = broker(settings).llen(BELL.queue)
    private_redis.stop()
    private_redis.start()
    ringer.ring(BELL)
    assert broker(settings).llen(BELL.queue) == before + 1
    ringer.close()


def test_a_wrong_password_is_unavailable_and_not_repeated_in_the_message(
    private_redis: RedisServer, make_settings: MakeSettings
) -> None:
    """The server's text about it must not leak what was tried."""
    settings = make_settings(redis_url=f"redis://:wrong-and-secret@127.0.0.1:{private_redis.port}")
    with pytest.raises(Unavailable) as caught:
        DoorbellRinger(settings).ring(BELL)
    assert "wrong-and-secret" not in str(caught.value) + repr(caught.value.fields)


def test_connections_are_reused_by_all_threads(private_redis: RedisServer, make_settings: MakeSettings) -> None:
    """Two hundred rings from eight threads arrive, over the two connections of one kombu channel."""
    settings = make_settings()
    ringer = DoorbellRinger(settings)
    threads = [threading.Thread(target=lambda: [ringer.ring(BELL) for _ in range(25)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert broker(settings).llen(BELL.queue) == 200
    names = [client["name"] for client in broker(settings).client_list()]
    assert names.count("mothball-doorbell") <= 2
    assert int(broker(settings).info("stats")["total_connections_received"]) < 20
    ringer.close()


def _ring_in_child(ringer: DoorbellRinger, times: int) -> None:
    for _ in range(times):
        ringer.ring(BELL)
    ringer.close()


def test_a_fork_shares_no_socket(private_redis: RedisServer, make_settings: MakeSettings) -> None:
    """Parent and children ring at once with a ringer that was connected before the fork; every message arrives whole."""
    settings = make_settings()
    ringer = DoorbellRinger(settings)
    ringer.ring(BELL)
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_ring_in_child, args=(ringer, 50)) for _ in range(3)]
    for child in children:
        child.start()
    for _ in range(50):
        ringer.ring(BELL)
    for child in children:
        child.join(30)
    assert [child.exitcode for child in children] == [0, 0, 0]
    raw = broker(settings).lrange(BELL.queue, 0, -1)
    assert len(raw) == 201
    assert len({json.loads(item)["properties"]["delivery_tag"] for item in raw}) == 201
    ringer.close()
