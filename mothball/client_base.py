"""What every call of the producers' API stands on: settings, connections that open on first use, submitting and finding jobs."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Self

from mothball import errors
from mothball.handles import JobHandle

if TYPE_CHECKING:
    from types import TracebackType

    from mothball.doorbell import DoorbellRinger
    from mothball.registry import Job, Registry, SubmitResult
    from mothball.settings import Settings

logger = logging.getLogger("mothball.client")


class Connected:
    """The fleet behind one Redis. Thread-safe; nothing is sent before the first call."""

    def __init__(self, redis_url: str | None = None, *, settings: Settings | None = None) -> None:
        """`redis_url` without a database number; without it ``MOTHBALL_REDIS_URL`` or the running `mothball up` counts.

        Nothing is sent yet: the first call connects.
        """
        if settings is None:
            from mothball.settings import Settings

            settings = Settings.load(**({"redis_url": redis_url} if redis_url is not None else {}))
        elif redis_url is not None:
            raise errors.InvalidParams("give redis_url or settings, not both")
        self.settings = settings
        self._registry: Registry | None = None
        self._ringer: DoorbellRinger | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close both connections; the next call would open them again."""
        registry, self._registry = self._registry, None
        ringer, self._ringer = self._ringer, None
        if ringer is not None:
            ringer.close()
        if registry is not None:
            registry.close()

    @property
    def registry(self) -> Registry:
        """The shared registry, for what this class does not wrap."""
        if self._registry is None:
            from mothball.registry import Registry

            self._registry = Registry.connect(self.settings)
        return self._registry

    def submit(
        self, task: str, args: dict[str, Any], *, workspace: str | None, lane: str | None = None, host: str | None = None
    ) -> SubmitResult:
        """Write the job's record, then ring the worker's doorbell unless it was rung a moment ago.

        With `host` and no `workspace` it is a job of that host. Requests of one `lane` join while one is queued, and their
        booleans are OR-ed: a dry run needs a lane of its own (or none), or it would turn the real one into a dry run.
        Once this returns the job is safe: when the doorbell cannot be rung, ``maintenance.ring`` rings it later. Raises
        `Unavailable` when the record could not be written, `InvalidParams`, `NotFound`, `Gone` or `HostOffline`.
        """
        submitted = self.registry.jobs.submit(task, args, workspace=workspace, lane=lane, host=host)
        if submitted.ring:
            self._ring(submitted.job)
        return submitted

    def job(self, job_id: str) -> JobHandle[dict[str, Any]]:
        """A handle for an existing job of any kind; its result is the stored outcome as a dict. `NotFound` when unknown."""
        self.job_record(job_id)
        return JobHandle(self, job_id, dict)

    def job_record(self, job_id: str) -> Job:
        """The record of one job; `NotFound` when unknown or older than ``job_ttl_seconds``."""
        return self.registry.jobs.get(job_id)

    def jobs(self, *, state: str | None = None, workspace: str | None = None, limit: int = 100) -> list[Job]:
        """At most `limit` jobs, newest first."""
        return self.registry.jobs.list(state=state, workspace=workspace, limit=limit)

    def _ring(self, job: Job) -> None:
        from mothball.doorbell import DoorbellRinger
        from mothball.registry import Doorbell

        try:
            if self._ringer is None:
                self._ringer = DoorbellRinger(self.settings)
            self._ringer.ring(Doorbell(job=job.id, task=job.task, queue=job.queue))
        except errors.MothballError as error:
            # The record is written: refusing now would make the caller submit a second job for the same work.
            logger.warning("job %s is recorded, but its doorbell could not be rung (%s); maintenance.ring will", job.id, error)
