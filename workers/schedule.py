"""The beat schedule: one entry per declared sweep, on by default (B-11: a sweep that nobody starts never sweeps)."""

from __future__ import annotations

from typing import Any

import structlog

from mothball.names import QUEUE_CONTROL
from mothball.settings import Settings
from tasks.sweep import SWEEPS

log = structlog.stdlib.get_logger("mothball.beat")

EXPIRES_SHARE = 0.9
"""A sweep's message expires after this share of its interval, so a backlog of identical sweeps drops itself."""


def beat_schedule(settings: Settings) -> dict[str, dict[str, Any]]:
    """Celery's ``beat_schedule``: entry name = task name, schedule in seconds, queue control, expires below the interval."""
    entries: dict[str, dict[str, Any]] = {}
    for name, spec in sorted(SWEEPS.items()):
        seconds = float(spec.every(settings))
        entries[name] = {
            "task": name,
            "schedule": seconds,
            "options": {"queue": QUEUE_CONTROL, "expires": seconds * EXPIRES_SHARE},
        }
    return entries


def run_at_start(sender: Any, **_: object) -> None:
    """Send each sweep once when beat starts: a new interval entry would first fire after one whole interval.

    The slot makes a restart loop harmless. A broker that is away must not stop beat from starting.
    """
    app = sender.app
    for name, entry in app.conf.beat_schedule.items():
        try:
            app.send_task(entry["task"], **{"ignore_result": True, "retry": False, **entry["options"]})
        except Exception as error:  # any trouble here only means: the first tick does it
            log.warning("not sent at start; the first tick does it", sweep=name, error=type(error).__name__)
