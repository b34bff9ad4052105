"""The base of every job: claim, run under a lease, record the outcome. The message is only the doorbell.

Whatever happens to a message (lost, doubled, late, delivered to the wrong host), the record in the registry decides.
So nothing here uses Celery's retries, countdowns or results to steer a job; Celery delivers, limits time and notices
dead processes, and its result backend mirrors the outcome for producers that only know ``send_task``.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

import psutil
import structlog
from billiard.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded, WorkerLostError
from celery import Task, shared_task, states
from celery.exceptions import Ignore, Reject
from pydantic import BaseModel

from mothball.doorbell import HEADER, VERSION
from mothball.errors import Cancelled, InvalidParams, LeaseLost, MothballError, TimedOut, Unavailable, from_code
from mothball.names import QUEUE_CONTROL, host_queue
from mothball.registry import Adopt, Claim, Doorbell, Job, Registry
from tasks import services
from tasks.auto_crash import report_failure
from tasks.context import JobContext, LeaseKeeper, patiently
from tasks.quiet import quiet_error, redacted_arguments
from tasks.spec import JobSpec, build_spec

log = structlog.stdlib.get_logger("mothball.job")
SPECS: dict[str, JobSpec] = {}
"""Every declared job by task name; filled by importing the modules of `tasks.MODULES`."""

CELERY_RETRIES = 10
"""How often Celery itself re-sends a message whose process died; the record's own delivery count decides sooner or later."""

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Outcome:
    """What a task function returns: `result` is stored with the job, `record` are fields to set on the workspace."""

    result: dict[str, Any]
    record: dict[str, Any] | None = field(default=None)


class JobTask(Task[Any, Any]):
    """Celery's side of a job: what the main process does when a pool process ends without an outcome."""

    abstract = True
    typing = False
    acks_late = True
    reject_on_worker_lost = True
    retry_on_worker_lost = True
    max_retries = CELERY_RETRIES
    # Not Celery's 180 s: a countdown is a message held in one worker's memory. The record's lease spaces the runs.
    default_retry_delay = 0
    throws = (MothballError,)
    Request = "tasks.quiet:QuietRequest"
    secret: tuple[str, ...] = ()
    """Names of arguments that nobody is shown."""

    def on_retry(self, exc: Exception, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        """In the main process, after a pool process died: free the job's lease at once instead of waiting for it to run out."""
        if isinstance(exc, WorkerLostError):
            release_dead(task_id, self.request)

    def on_failure(self, exc: Exception, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        """In the main process, after the hard time limit killed a pool process: record why."""
        if isinstance(exc, TimeLimitExceeded):
            record_hard_timeout(task_id, self.time_limit)


def job_task(**options: Any) -> Callable[[F], F]:
    """Declare a job. Raises `TypeError` at import for an option that is unknown, missing or contradicts another.

    Options: ``name`` (family.verb), ``args`` (pydantic model that forbids extras), ``queue`` ('host' or 'control'),
    ``time_limit`` and ``soft_time_limit`` (seconds, or functions of the settings), ``lane`` (name, default none),
    ``ignore_result`` (default False), ``blames`` (default True: the workspace remembers its failures), ``secret`` (names of
    arguments that are redacted before a plain producer's message becomes a record). The function takes ``(ctx: JobContext,
    args)`` and returns an `Outcome`; it stays directly callable, the Celery task is registered under its name.
    """

    def declare(function: F) -> F:
        spec = build_spec(function, options, SPECS)
        SPECS[spec.name] = spec

        def run(task: Any, *args: Any, **kwargs: Any) -> Any:
            return execute(task, spec, args, kwargs)

        run.__name__ = getattr(function, "__name__", "run")
        run.__doc__ = function.__doc__
        run.__module__ = function.__module__
        shared_task(name=spec.name, base=JobTask, bind=True, ignore_result=spec.ignore_result, secret=spec.secret)(run)
        return function

    return declare


def execute(task: Any, spec: JobSpec, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """One delivery of a message: claim the job and, if the claim says so, run it.

    Returns the outcome. Ends with Celery's `Ignore` when this delivery has nothing (more) to do, and with a
    `MothballError` when the job has failed for good.
    """
    job_id = str(task.request.id)
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(job=job_id, task=spec.name)
    try:
        return _Delivery(task, spec, job_id).handle(args, kwargs)
    except SoftTimeLimitExceeded:
        services.renew()
        raise
    finally:
        structlog.contextvars.clear_contextvars()


class _Delivery:
    """One delivered message and what becomes of it."""

    def __init__(self, task: Any, spec: JobSpec, job_id: str) -> None:
        self.task = task
        self.spec = spec
        self.job_id = job_id
        self.services = services.current()
        self.jobs = self.services.registry.jobs

    def handle(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        settings = self.services.settings
        # Our own doorbell comes after its record: when there is none, it has run out, and the job must not begin again.
        try:
            adopt, refused = (None, None) if is_doorbell(self.task.request) else self._adoption(args, kwargs)
            claim = patiently(
                lambda: self.jobs.claim(
                    self.job_id, host=settings.host, worker=worker_name(self.task.request),
                    lease_ms=settings.lease_seconds * 1000, adopt=adopt, task=self.spec.name,
                )
            )  # fmt: skip
        except Unavailable as error:
            # Back into the queue, not dropped: a message from a plain producer has no record yet that could ring again.
            raise Reject(error.message, requeue=True) from None
        self._ring(claim.next)
        if claim.status == "run":
            return self._run(claim, refused)
        return self._not_run(claim)

    def _adoption(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Adopt, InvalidParams | None]:
        """The record to make when there is none. Refused arguments are not stored (they may be a megabyte) and must
        not wait for the lease of a workspace they may not even name, so such a record has neither."""
        try:
            parsed = self.spec.parse(args, kwargs)
            host = self.spec.host_of(parsed)
        except InvalidParams as error:
            return Adopt(task=self.spec.name, args={}, workspace=None), error
        queue = host_queue(host) if host is not None else QUEUE_CONTROL
        here, names = self.services, self.spec.secret
        kept = patiently(lambda: redacted_arguments(names, kwargs, here.settings, here.registry))
        return Adopt(task=self.spec.name, args=kept, workspace=self.spec.workspace_of(parsed), queue=queue), None

    def _not_run(self, claim: Claim) -> dict[str, Any]:
        job = claim.job
        if claim.status == "dead" and job is not None:
            report_failure(job.id, "dead", job.error or "", blames=self.spec.blames)
        if claim.status in {"done", "dead", "cancelled"} and job is not None:
            return self._deliver(job)
        if claim.status == "wrong_host" and job is not None:
            self._forward(job)
        if claim.status == "mismatch":
            log.warning("this message has the id of another task's job", other=job.task if job is not None else "")
        log.info("nothing to do for this message", status=claim.status)
        raise Ignore(claim.status)

    def _deliver(self, job: Job) -> dict[str, Any]:
        """The stored outcome of a finished job, once more: the producer may be waiting for this very message."""
        if job.state == "succeeded":
            return dict(job.outcome or {})
        if job.state == "cancelled":
            self._mirror_cancelled()
        raise from_code(job.error_code or "operation_failed", job.error or f"job {job.id} is {job.state}")

    def _forward(self, job: Job) -> None:
        """Hand the message to the queue the record names, callbacks and all; the registry rings again if this fails."""
        request = self.task.request
        embed = {name: getattr(request, name, None) for name in ("callbacks", "errbacks", "chain", "chord")}
        try:
            self.services.ringer.ring(Doorbell(job=job.id, task=job.task, queue=job.queue), embed=embed)
            log.info("forwarded", queue=job.queue)
        except MothballError as error:
            log.warning("could not forward; the registry rings later", queue=job.queue, error=error.message)

    def _run(self, claim: Claim, refused: InvalidParams | None) -> dict[str, Any]:
        job = claim.job
        assert job is not None  # noqa: S101 - a claim that says 'run' carries the record
        if job.workspace:
            structlog.contextvars.bind_contextvars(workspace=job.workspace)
        registry, settings = self.services.registry, self.services.settings
        context = JobContext(settings=settings, registry=registry, job=job, fence=claim.fence)
        log.info("started", fence=claim.fence, delivery=job.deliveries)
        try:
            try:
                with LeaseKeeper(context):
                    outcome = self.spec.function(context, self._arguments(job, refused))
                    return self._finish(claim.fence, outcome)
            except SoftTimeLimitExceeded:
                limit = self.spec.limits(settings).soft
                self._reconnect()
                return self._fail(claim.fence, TimedOut(what=f"job {job.id}", seconds=limit), retryable=True)
            except Cancelled:
                return self._cancelled(claim.fence)
            except LeaseLost as error:
                return self._superseded(error)
            except MothballError as error:
                return self._fail(claim.fence, error, retryable=error.retryable)
            except (Ignore, Reject):
                raise
            except Exception as error:
                log.exception("the task raised something that is no MothballError")
                unexpected = MothballError(reason=f"{type(error).__name__}: {error}")
                # Trouble with disk, memory or network may pass; a bug will not.
                return self._fail(claim.fence, unexpected, retryable=isinstance(error, (OSError, MemoryError)))
        except Unavailable as error:
            # The outcome cannot be recorded now. The lease runs out and maintenance.ring brings the job back.
            log.error("the registry is gone; the job will be repeated", error=error.message)
            raise Ignore("unavailable") from None
        except (SystemExit, KeyboardInterrupt):
            self._abandoned(claim.fence)
            raise

    def _reconnect(self) -> None:
        services.renew()
        self.services = services.current()
        self.jobs = self.services.registry.jobs

    def _arguments(self, job: Job, refused: InvalidParams | None) -> BaseModel:
        """The record's arguments, which may have been joined by other requests since the message was sent."""
        if refused is not None and not job.args:
            raise refused
        return self.spec.parse((), job.args)

    def _finish(self, fence: int, outcome: Outcome) -> dict[str, Any]:
        try:
            self._ring(patiently(lambda: self.jobs.finish(self.job_id, fence, outcome.result, outcome.record)))
        except LeaseLost as error:
            return self._superseded(error)
        log.info("succeeded")
        return outcome.result

    def _fail(self, fence: int, error: MothballError, *, retryable: bool) -> dict[str, Any]:
        error = quiet_error(error)
        try:
            failed = patiently(
                lambda: self.jobs.fail(
                    self.job_id, fence, code=error.code, message=error.message, retryable=retryable, blames=self.spec.blames
                )
            )
        except LeaseLost as lost:
            return self._superseded(lost)
        self._ring(failed.next)
        log.warning("failed", code=error.code, error=error.message, state=failed.state, due_at=failed.due_at)
        if failed.state == "queued":
            self._store(lambda: self.task.update_state(state=states.RETRY, meta=error))
            raise Ignore("will be retried")
        report_failure(self.job_id, error.code, error.message, blames=self.spec.blames)
        raise error from None  # what it came from may quote a secret, and Celery keeps the traceback

    def _cancelled(self, fence: int) -> NoReturn:
        try:
            self._ring(patiently(lambda: self.jobs.finish_cancelled(self.job_id, fence)))
        except LeaseLost as lost:
            self._superseded(lost)
        log.info("cancelled")
        self._mirror_cancelled()

    def _mirror_cancelled(self) -> NoReturn:
        """Show REVOKED to `AsyncResult` and Flower: a cancelled run is not a failure."""
        task = self.task
        self._store(lambda: task.backend.mark_as_revoked(self.job_id, "cancelled", request=task.request, store_result=True))
        self._store(lambda: task.send_event("task-revoked", terminated=False, signum=None, expired=False))
        raise Ignore("cancelled")

    def _superseded(self, error: LeaseLost) -> dict[str, Any]:
        """Another run took over, or this very outcome was applied and only its answer got lost: the record knows."""
        job = patiently(lambda: self.jobs.get(self.job_id))
        log.warning("lease lost", state=job.state, error=error.message)
        if job.state in {"succeeded", "failed", "cancelled", "dead"}:
            return self._deliver(job)
        raise Ignore("lease lost")

    def _abandoned(self, fence: int) -> None:
        """The worker is being stopped: give the lease back now, so that the next worker need not wait for it to run out.

        The interrupted code may have been in the middle of a Redis answer, hence a connection of its own; Celery may
        send SIGTERM twice, and the second must not interrupt this.
        """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            registry = Registry.connect(self.services.settings)
            try:
                doorbell = registry.jobs.release_lost(self.job_id, fence, interrupted=True)
            finally:
                registry.close()
            log.warning("stopped by a worker shutdown; back in the queue")
            self._ring(doorbell)
        except MothballError as error:
            log.warning("stopped by a worker shutdown; the lease will run out", error=error.message)

    def _ring(self, doorbell: Doorbell | None) -> None:
        if doorbell is not None:
            ring_quietly(doorbell)

    def _store(self, write: Callable[[], Any]) -> None:
        """Mirror a state into Celery's result backend; the record is written already, so trouble here is only logged."""
        try:
            write()
        except Exception as error:  # backends raise anything, and none of it may undo a recorded outcome
            log.warning("the result backend did not take the state", error=type(error).__name__)


def worker_name(request: Any) -> str:
    """``<node>/<pid>`` of the process that runs the request."""
    return f"{request.hostname}/{os.getpid()}"


def ring_quietly(doorbell: Doorbell) -> bool:
    """Ring; False when that failed (maintenance.ring rings again)."""
    try:
        services.current().ringer.ring(doorbell)
    except MothballError as error:
        log.warning("doorbell not rung; the registry rings later", job=doorbell.job, error=error.message)
        return False
    return True


def is_doorbell(request: Any) -> bool:
    """True for a message of ours, whose arguments stand in the job's record."""
    return getattr(request, HEADER, None) == VERSION


def release_dead(job_id: str, request: Any) -> None:
    """Free the lease of a job whose pool process died on this node, and ring for it and for whoever waits.

    Only when the record says that the run belongs to this node: a duplicate delivery that died must not take the lease
    away from the run that holds it. Never raises; the lease runs out by itself if this fails.
    """
    try:
        here = services.current()
        job = here.registry.jobs.get(job_id)
        if job.state != "running" or not _died_here(job.worker, request.hostname):
            return
        doorbell = here.registry.jobs.release_lost(job_id, job.fence)
        log.warning("the process of a job died; its lease is free again", job=job_id, worker=job.worker)
        if doorbell is not None:
            ring_quietly(doorbell)
    except MothballError as error:
        log.warning("the lease of a dead process will run out", job=job_id, error=error.message)


def _died_here(worker: str | None, node: str) -> bool:
    """True when ``<node>/<pid>`` is of this node and its process has ended (a zombie has)."""
    name, _, pid = (worker or "").rpartition("/")
    if name != node or not pid.isdigit():
        return False
    try:
        return psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False


def _is_my_child(worker: str | None) -> bool:
    try:
        return psutil.Process(int((worker or "").rpartition("/")[2])).ppid() == os.getpid()
    except (ValueError, psutil.Error):
        return False


def record_hard_timeout(job_id: str, limit: float | None) -> None:
    """Fail the run whose pool process the hard time limit is about to kill, so that it is retried with backoff, not at once."""
    try:
        jobs = services.current().registry.jobs
        job = jobs.get(job_id)
        if job.state == "running" and _is_my_child(job.worker):
            error = TimedOut(what=f"job {job_id}", seconds=limit or 0)
            blames = job.task not in SPECS or SPECS[job.task].blames
            failed = jobs.fail(job_id, job.fence, code=error.code, message=error.message, retryable=True, blames=blames)
            if failed.next is not None:
                ring_quietly(failed.next)
            report_failure(job_id, error.code, error.message, blames=blames)
    except MothballError as error:
        log.warning("the hard time limit could not be recorded", job=job_id, error=error.message)
