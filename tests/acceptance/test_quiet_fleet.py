"""Canaries in a plain producer's message are seen by nobody: no event, no ``inspect``, no result, no record, no log, no Flower."""

from __future__ import annotations

import threading
from typing import Any

import redis

from tests.acceptance.fleet import FleetRun

CANARIES = (
    "gh" + "p_" + "Fj39sKq0Zx7Lm2Vb8Nw4Tc6Yd1Re5Ug0Hp3A", "s3cr3t-" + "Argument-91", "x0pt" + "Envir0nment", "URLp4ss" + "word77",
    "T1tl3-" + "Passw0rd",
)  # fmt: skip


def everywhere(fleet: FleetRun) -> str:
    """All keys and values of broker, results and registry."""
    out = []
    for url in (fleet.settings.broker_url, fleet.settings.result_url, fleet.settings.registry_url):
        with redis.Redis.from_url(url) as client:
            out += [repr(client.dump(key)) + repr(key) for key in client.scan_iter()]
            for key in client.scan_iter():
                kind = client.type(key)
                reads: dict[bytes, Any] = {b"hash": client.hgetall, b"string": client.get, b"stream": client.xrange}
                out.append(repr(reads.get(kind, lambda key: b"")(key)))
    return "\n".join(out)


def test_canaries_in_a_plain_message_are_seen_by_nobody(fleet: FleetRun) -> None:
    fleet.worker(worker_concurrency=1)
    fleet.workspace("r/a#1")
    (fleet.folder / "trees" / "r" / "a#1" / "app.py").write_text("print(1)\n")
    producer = fleet.producer()
    events: list[dict[str, Any]] = []
    connection = producer.connection_for_read()
    receiver = producer.events.Receiver(connection, handlers={"*": events.append})
    # In one go: between two captures nobody listens, and what is told meanwhile is lost.
    listener = threading.Thread(target=receiver.capture, kwargs={"wakeup": False})
    listener.start()
    try:
        fleet.until(lambda: any(event["type"] == "worker-heartbeat" for event in events), "worker events arrive")
        sent = producer.send_task(
            "workspace.crash_report", queue="dispatch",
            kwargs={
                "workspace": "r/a#1", "error": f"push with {CANARIES[0]} to https://bot:{CANARIES[3]}@git.example.com failed",
                "title": f"password='{CANARIES[4]}'", "command": ["deploy", "--token", CANARIES[1]],
                "env": {"API_TOKEN": CANARIES[2]},
                "exit_code": 1, "package": False,
            },
        )  # fmt: skip
        # A wrong message is shown in events as well.
        wrong = producer.send_task("workspace.crash_report", queue="dispatch", kwargs={"workspace": "r/a#1", "eror": CANARIES[0]})
        assert fleet.finished(sent.id).state == "succeeded", fleet.job(sent.id)
        assert fleet.finished(wrong.id).error_code == "invalid_params"
        fleet.until(lambda: {sent.id, wrong.id} <= {event.get("uuid") for event in events}, "both jobs' events arrive")
        outcome = repr(sent.get(timeout=10))
        active = repr(producer.control.inspect(timeout=2).active())
        fleet.until(lambda: any(e["type"] == "task-succeeded" and e["uuid"] == sent.id for e in events), "the last event arrives")
    finally:
        receiver.should_stop = True
        listener.join()
        connection.release()
    received = [event for event in events if event["type"] == "task-received" and event["uuid"] == sent.id]
    assert "'error': '[not shown]'" in received[0]["kwargs"], "the event is there, and quiet"
    assert "'exit_code': 1" in received[0]["kwargs"]
    logs = "\n".join(process.text() for process in fleet.processes)
    places = {"events": repr(events), "result": outcome, "inspect": active, "redis": everywhere(fleet), "logs": logs}
    assert [(where, canary) for where, text in places.items() for canary in CANARIES if canary in text] == []
