"""The Celery application: the one module that imports `celery.Celery`."""

from __future__ import annotations

from celery import Celery, signals

from mothball.settings import Settings
from tasks import services
from workers import logs, schedule, steps
from workers.config import celery_config


def make_app(settings: Settings) -> Celery:
    """An app for `settings`. Tasks of this process, and of the children it forks, use the same settings."""
    services.configure(settings)
    app = Celery("mothball", set_as_current=True)
    app.config_from_object(celery_config(settings))
    app.steps["worker"].add(steps.HostStep)
    logs.connect(settings)
    steps.connect()
    signals.beat_init.connect(schedule.run_at_start, weak=False, dispatch_uid="mothball.run_at_start")
    return app


app = make_app(Settings.load())
