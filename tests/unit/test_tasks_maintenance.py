"""The ring sweep: one bad job costs its own doorbell and no other; events about hostile messages are written all the same."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from billiard.exceptions import SoftTimeLimitExceeded

from mothball.errors import Unavailable
from mothball.registry import Doorbell
from tasks import services
from tasks.maintenance import ring
from workers import steps


def fake(errors: dict[str, Exception]) -> tuple[Any, list[str]]:
    """Services with four doorbells to ring, those of `errors` failing; and the list of what was tried."""
    tried: list[str] = []

    def one(bell: Doorbell) -> None:
        tried.append(bell.job)
        if bell.job in errors:
            raise errors[bell.job]

    bells = [Doorbell(job=name, task="t.t", queue="control") for name in "abcd"]
    jobs = SimpleNamespace(ring=lambda limit: bells)
    return SimpleNamespace(registry=SimpleNamespace(jobs=jobs), ringer=SimpleNamespace(ring=one)), tried


def test_a_doorbell_that_cannot_be_rung_does_not_stop_the_others() -> None:
    here, tried = fake({"a": RecursionError("deep"), "c": UnicodeEncodeError("utf-8", "\ud800", 0, 1, "no")})
    assert ring(here) == {"rung": 2, "failed": 2}
    assert tried == ["a", "b", "c", "d"]


def test_a_broker_that_is_away_and_a_time_limit_end_the_sweep() -> None:
    away = Unavailable(url="redis://x", reason="refused")
    here, tried = fake({"a": away, "b": away})
    assert ring(here) == {"rung": 0, "failed": 2}
    assert tried == ["a", "b"]
    here, _ = fake({"b": SoftTimeLimitExceeded()})
    with pytest.raises(SoftTimeLimitExceeded):
        ring(here)


def test_an_event_about_text_that_is_no_utf8_is_written_and_no_error_ends_the_consumer(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[dict[str, str]] = []

    def add(kind: str, **fields: str) -> None:
        for value in fields.values():
            value.encode()
        written.append({"kind": kind, **fields})
        if kind == "bad":
            raise ZeroDivisionError

    here = SimpleNamespace(settings=SimpleNamespace(host="h1"), registry=SimpleNamespace(events=SimpleNamespace(add=add)))
    monkeypatch.setattr(services, "current", lambda: here)
    steps.write_event("message.rejected", task="\ud800x")
    steps.write_event("bad")
    assert written == [{"kind": "message.rejected", "host": "h1", "task": "\\ud800x"}, {"kind": "bad", "host": "h1"}]
