"""The base of the sweeps: what beat sends at an interval, however many beats there are.

A sweep has no job record. Each run claims the slot of its interval in the registry, so a second beat, a backlog or a
restart costs one skipped message and nothing else. A sweep is level-triggered: a missed run costs one interval.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog
from billiard.exceptions import SoftTimeLimitExceeded
from celery import shared_task
from celery.exceptions import Ignore

from mothball.errors import Unavailable
from mothball.settings import Settings
from tasks import services
from tasks.spec import Limits, Seconds, check_limits, check_name, resolve_limits

log = structlog.stdlib.get_logger("mothball.sweep")
SWEEPS: dict[str, SweepSpec] = {}
"""Every declared sweep by task name; workers/schedule.py makes one beat entry of each."""

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class SweepSpec:
    """One declared sweep."""

    name: str
    every: Callable[[Settings], int]
    time_limit: Seconds
    soft_time_limit: Seconds
    function: Callable[[services.Services], dict[str, Any]]

    def limits(self, settings: Settings) -> Limits:
        """The time limits under `settings`; raises `ConfigError` when they contradict each other."""
        return resolve_limits(self.name, self.soft_time_limit, self.time_limit, settings)


def sweep_task(*, name: str, every: Callable[[Settings], int], time_limit: Seconds, soft_time_limit: Seconds) -> Callable[[F], F]:
    """Declare a sweep that runs once per `every` seconds on any worker. Raises `TypeError` at import when contradictory.

    The function takes the process's `Services` and returns what it did as JSON types (logged, not stored).
    """

    def declare(function: F) -> F:
        check_name(name, SWEEPS)
        check_limits(name, soft_time_limit, time_limit)
        if not callable(every):
            raise TypeError(f"task {name}: every must be a function of the settings that returns seconds, not {every!r}")
        spec = SweepSpec(name=name, every=every, time_limit=time_limit, soft_time_limit=soft_time_limit, function=function)
        SWEEPS[name] = spec

        def run() -> dict[str, Any]:
            return sweep(spec)

        run.__name__ = getattr(function, "__name__", "run")
        run.__doc__ = function.__doc__
        run.__module__ = function.__module__
        # Early ack: a lost sweep is replaced by the next one, a redelivered one would only find its slot taken.
        shared_task(name=name, ignore_result=True, acks_late=False)(run)
        return function

    return declare


def sweep(spec: SweepSpec) -> dict[str, Any]:
    """Run `spec` if this interval's slot is still free, else end quietly with Celery's `Ignore`."""
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(task=spec.name)
    here = services.current()
    started = time.monotonic()
    try:
        if not here.registry.slots.claim(spec.name, spec.every(here.settings) * 1000):
            raise Ignore("another run has this slot")
        done = spec.function(here)
    except Unavailable as error:
        log.warning("sweep skipped; the next one does its work", error=error.message)
        raise Ignore("unavailable") from None
    except SoftTimeLimitExceeded:
        services.renew()
        raise
    finally:
        structlog.contextvars.clear_contextvars()
    if any(done.values()):
        log.info("swept", sweep=spec.name, seconds=round(time.monotonic() - started, 3), **done)
    return done
