"""The running job as its task sees it: checkpoints, progress, and the thread that keeps its lease.

Between two checkpoints a run may be paused for longer than its lease (a stopped machine, a swapped process) while
another worker takes over. So a checkpoint with a new name asks the registry, and only then may the task go on to
publish; everything in between is throttled.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

import structlog

from mothball.errors import Cancelled, LeaseLost, MothballError, Unavailable
from mothball.registry import Job, Registry
from mothball.settings import Settings

REDIS_PATIENCE_SECONDS = 60.0
"""How long a running job waits for a registry that does not answer before it gives up its run (a restart takes seconds)."""

TICK_SECONDS = 0.5
"""Least time between two throttled checkpoints: bounds both the registry's load and how late a cancel is noticed."""

T = TypeVar("T")
log = structlog.stdlib.get_logger("mothball.job")


def patiently(call: Callable[[], T], *, seconds: float = REDIS_PATIENCE_SECONDS) -> T:
    """`call()`, repeated while it raises `Unavailable` and `seconds` have not passed since the first try.

    Only for calls that may be applied twice: an answer can be lost after the effect.
    """
    started, pause = time.monotonic(), 0.1
    while True:
        try:
            return call()
        except Unavailable as error:
            if time.monotonic() - started + pause > seconds:
                raise
            log.warning("the registry does not answer; waiting", error=error.message)
        time.sleep(pause)
        pause = min(pause * 2, 2.0)


class JobContext:
    """What a task function gets beside its arguments."""

    def __init__(self, *, settings: Settings, registry: Registry, job: Job, fence: int) -> None:
        """`fence` is the number this run got with its lease; every write carries it."""
        self.settings = settings
        self.registry = registry
        self.job = job
        self.fence = fence
        self._cancelled = threading.Event()
        self._lost = threading.Event()
        self._name: str | None = None
        self._next_tick = 0.0

    @property
    def host(self) -> str:
        """The host this run is on."""
        return self.settings.host

    def checkpoint(self, name: str, /, **progress: Any) -> None:
        """A place where the job may stop. Raises `Cancelled` or `LeaseLost`; records `progress` (JSON values).

        A `name` that differs from the last one always asks the registry, waiting for it up to a minute (then
        `Unavailable`); repeating the same name asks at most twice a second and goes on when Redis is away.
        """
        self._raise_if_noted()
        now = time.monotonic()
        fresh = name != self._name
        if not fresh and now < self._next_tick:
            return
        self._name, self._next_tick = name, now + TICK_SECONDS
        try:
            if fresh:
                patiently(lambda: self._ask(name, progress))
            else:
                self._ask(name, progress)
        except Unavailable:
            if fresh:
                raise
        self._raise_if_noted()

    def note_cancel(self) -> None:
        """Make the next checkpoint raise `Cancelled`."""
        self._cancelled.set()

    def note_lost(self) -> None:
        """Make the next checkpoint raise `LeaseLost`."""
        self._lost.set()

    def _ask(self, name: str, progress: dict[str, Any]) -> None:
        self.registry.jobs.checkpoint(self.job.id, self.fence, {"step": name, **progress})

    def _raise_if_noted(self) -> None:
        # A lost lease outranks a cancel: whoever holds the lease now answers for the job, and its cancel too.
        if self._lost.is_set():
            raise LeaseLost(job=self.job.id)
        if self._cancelled.is_set():
            raise Cancelled(job=self.job.id)


class LeaseKeeper:
    """Renews a running job's lease every third of it, from a thread, so that long C calls in the task do no harm.

    It notes a cancel request or a lost lease in the context; an unreachable registry is simply asked again.
    """

    def __init__(self, context: JobContext) -> None:
        self._context = context
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name=f"lease-{context.job.id}", daemon=True)

    def __enter__(self) -> LeaseKeeper:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # Not joined: the thread may be waiting for a frozen Redis, and a late renewal cannot hurt: the fence is checked.
        self._stop.set()

    def _keep(self) -> None:
        context = self._context
        lease_ms = context.settings.lease_seconds * 1000
        period = context.settings.lease_seconds / 3
        while not self._stop.wait(period):
            try:
                if context.registry.jobs.renew(context.job.id, context.fence, lease_ms):
                    context.note_cancel()
            except LeaseLost:
                if not self._stop.is_set():
                    context.note_lost()
                return
            except MothballError as error:
                log.warning("the lease could not be renewed; trying again", job=context.job.id, error=error.message)
