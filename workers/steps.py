"""Boot steps and hooks of the worker's main process: announce the host, write the heartbeat, note messages nobody can run."""

from __future__ import annotations

import os
import platform
from importlib import import_module
from typing import Any

import structlog
from celery import bootsteps, signals
from celery.worker.consumer.consumer import Consumer

import mothball
from mothball.errors import MothballError, UnknownTask
from mothball.settings import Settings
from tasks import services
from tasks.job import SPECS, ring_quietly
from tasks.sweep import SWEEPS
from workers import transport
from workers.cache_disks import CacheDisks
from workers.config import heartbeat_file
from workers.queues import queue_names

log = structlog.stdlib.get_logger("mothball.worker")
_SHOWN_CHARS = 200


class HostStep(bootsteps.StartStopStep):
    """Announces the host to the registry and writes the heartbeat file, at start and every ``heartbeat_seconds``.

    It runs on the worker's event loop on purpose: a loop that hangs must look dead.
    """

    requires = ("celery.worker.components:Timer",)

    def __init__(self, parent: Any, **kwargs: Any) -> None:
        self.timer: Any = None
        self.disks: CacheDisks | None = None
        super().__init__(parent, **kwargs)

    def start(self, parent: Any) -> None:
        """Beat once at once: a producer may submit work for this host as soon as it is announced."""
        self.disks = CacheDisks(services.settings())
        beat(parent, self.disks)
        seconds = services.settings().heartbeat_seconds
        self.timer = parent.timer.call_repeatedly(seconds, beat, (parent, self.disks), priority=10)

    def stop(self, parent: Any) -> None:
        """Stop beating and remove the file: a stopped worker is not alive."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        heartbeat_file(services.settings(), _name(parent)).unlink(missing_ok=True)

    def terminate(self, parent: Any) -> None:
        """The cold end of a soft shutdown; Celery would otherwise skip `stop`."""
        self.stop(parent)


def beat(worker: Any, disks: CacheDisks) -> None:
    """One heartbeat: the file always, the registry when it answers. Never raises: it must not end the timer."""
    settings = services.settings()
    try:
        file = heartbeat_file(settings, _name(worker))
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        file.touch(mode=0o600)
    except OSError as error:
        log.error("the heartbeat file cannot be written", error=str(error))
    try:
        services.current().registry.hosts.heartbeat(settings.host, host_info(settings, worker, disks))
    except MothballError as error:
        log.warning("the registry did not take the heartbeat", error=error.message)


def host_info(settings: Settings, worker: Any, disks: CacheDisks) -> dict[str, Any]:
    """What a host says about itself: JSON types, no secrets."""
    return {
        "version": mothball.__version__,
        "python": platform.python_version(),
        "worker": str(worker.hostname),
        "pid": os.getpid(),
        "concurrency": settings.worker_concurrency,
        "queues": list(queue_names(settings.host)),
        "tasks": sorted({*SPECS, *SWEEPS}),
        "data_dir": str(settings.data_dir),
        "workspace_roots": [str(root) for root in settings.workspace_roots],
        "image_caches": disks.look(),
        "image_cache_high": settings.cache_high_percent,
        "image_cache_low": settings.cache_low_percent,
    }


def _name(worker: Any) -> str:
    return str(worker.hostname).partition("@")[0]


class RecordingConsumer(Consumer):
    """Celery's consumer, except that a message nobody can read leaves an event and not only a log line."""

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        """Note and acknowledge a body that is not what its content type says."""
        super().on_decode_error(message, exc)
        record("message.undecodable", message, exc)


def connect() -> None:
    """Connect the hooks below to Celery's signals."""
    signals.task_unknown.connect(on_unknown_task, weak=False, dispatch_uid="mothball.unknown")
    signals.task_rejected.connect(on_rejected, weak=False, dispatch_uid="mothball.rejected")
    signals.celeryd_init.connect(on_worker_init, weak=False, dispatch_uid="mothball.transport")


def on_worker_init(**_: object) -> None:
    """Before a worker connects: its broker must survive items that are no messages. Other processes consume nothing."""
    transport.install()
    transport.on_unreadable[:] = [on_unreadable]
    # Loaded once before the pool forks: each child shares the pages, and no job pays for the import.
    import_module("mothball.capture.capture")


def on_unreadable(queue: str, error: Exception) -> None:
    """An item of a queue that is no message at all, or one that made Celery's own handler fail."""
    write_event("message.undecodable", queue=queue, reason=f"{type(error).__name__}: {error}")


def on_unknown_task(message: Any = None, name: str = "", id: str = "", **_: object) -> None:  # noqa: A002 - Celery's name
    """A task this worker does not have: Celery has stored NotRegistered for the producer; this is for the operator."""
    record("message.unknown_task", message, None, task=name, job=id)
    end_unknown(id, name)


def end_unknown(job_id: str, task: str) -> None:
    """Fail the queued job of a task that this worker does not have, else its doorbell would be rung for ever. Never raises."""
    try:
        here = services.current()
        jobs, settings = here.registry.jobs, here.settings
        claim = jobs.claim(
            job_id, host=settings.host, worker=f"{settings.host}/{os.getpid()}", lease_ms=settings.lease_seconds * 1000, task=task
        )
        bell = claim.next
        if claim.status == "run":
            error = UnknownTask(task=task)
            bell = jobs.fail(job_id, claim.fence, code=error.code, message=error.message, retryable=False).next
        if bell is not None:
            ring_quietly(bell)
    except Exception as error:  # the id is anybody's text, and nothing may end the consumer; the lease runs out by itself
        log.warning("the job of an unknown task could not be ended", job=job_id[:_SHOWN_CHARS], error=str(error)[:_SHOWN_CHARS])


def on_rejected(message: Any = None, exc: Exception | None = None, **_: object) -> None:
    """A message of no known form, or of a content type that is refused (pickle)."""
    record("message.rejected", message, exc)


def record(kind: str, message: Any, exc: Exception | None, **fields: str) -> None:
    """Write an event about a message. Never raises, never repeats the body: it may be hostile, huge or secret."""
    headers = getattr(message, "headers", None) or {}
    about = {
        "task": str(headers.get("task", "")),
        "job": str(headers.get("id", "")),
        "content_type": str(getattr(message, "content_type", "")),
        "queue": str((getattr(message, "delivery_info", None) or {}).get("routing_key", "")),
        "reason": f"{type(exc).__name__}: {exc}" if exc is not None else "",
        **fields,
    }
    log.error(kind, **{key: value[:_SHOWN_CHARS] for key, value in about.items()})
    write_event(kind, **about)


def write_event(kind: str, **fields: str) -> None:
    """Add an event of this host; never raises."""
    try:
        here = services.current()
        here.registry.events.add(kind, host=here.settings.host, **{key: _shown(value) for key, value in fields.items()})
    except Exception as error:  # of a message that may be anything; the consumer that calls this must go on
        log.warning("the event could not be written", kind=kind, error=f"{type(error).__name__}: {error}"[:_SHOWN_CHARS])


def _shown(value: str) -> str:
    # JSON may hold halves of characters, which have no form in UTF-8.
    return value[:_SHOWN_CHARS].encode("utf-8", "backslashreplace").decode()
