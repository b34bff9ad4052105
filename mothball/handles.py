"""Handles of submitted jobs: look at one, wait for it, cancel it; its result comes back as the type its task promises."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from mothball import errors

if TYPE_CHECKING:
    from collections.abc import Callable

    from mothball.capture import CaptureResult
    from mothball.client_base import Connected
    from mothball.registry import Job
    from mothball.store.restore_result import RestoreResult
    from mothball.store.snapshots import SnapshotResult

ResultT = TypeVar("ResultT")

FINAL_STATES = frozenset({"succeeded", "failed", "cancelled", "dead"})
POLL_FIRST_SECONDS = 0.02
POLL_MAX_SECONDS = 0.25
# A short outage (a restart of Redis, a failover) must not end the wait for a job that goes on regardless.
OUTAGE_TOLERATED_SECONDS = 60.0


class JobHandle(Generic[ResultT]):
    """One submitted job. It holds no connection of its own and may be used from any thread.

    `joined` is True when the request was merged into a job that was queued already (Q-31): both producers then hold
    the same job.
    """

    def __init__(self, fleet: Connected, job_id: str, decode: Callable[[dict[str, Any]], ResultT], *, joined: bool = False) -> None:
        self._fleet = fleet
        self._decode = decode
        self.id = job_id
        self.joined = joined

    def __repr__(self) -> str:
        return f"JobHandle(id={self.id!r}, joined={self.joined})"

    def record(self) -> Job:
        """The job's record as it is now; `NotFound` once it is older than ``job_ttl_seconds``."""
        return self._fleet.job_record(self.id)

    @property
    def state(self) -> str:
        """``queued``, ``running``, ``succeeded``, ``failed``, ``cancelled`` or ``dead``."""
        return self.record().state

    @property
    def result(self) -> ResultT:
        """The typed result of a finished job; the job's own error when it failed, `Busy` while it has not finished."""
        job = self.record()
        if job.state not in FINAL_STATES:
            raise errors.Busy(what=f"job {self.id}", reason=f"it is {job.state}; wait() waits for it")
        return self._finished(job)

    def progress(self) -> dict[str, Any]:
        """What the running worker reported last (checkpoint name and counts); empty before the first report."""
        return dict(self.record().progress)

    def cancel(self) -> bool:
        """Ask for cancellation (Q-37): True when the job was queued or running, False when there is nothing left to cancel.

        A running job stops at its next checkpoint; `wait` then raises `Cancelled`.
        """
        return bool(self._fleet.registry.jobs.cancel(self.id).cancelled)

    def wait(self, timeout: float | None = None, *, on_poll: Callable[[Job], None] | None = None) -> ResultT:
        """Wait until the job has ended and return its typed result.

        `timeout` is in seconds; None waits for ever. Raises `TimedOut` when the time is over (the job goes on), or the
        error with which the job ended. `on_poll` is called with the record after each look, at most about four times a second.
        """
        started = time.monotonic()
        pause = POLL_FIRST_SECONDS
        lost_since: float | None = None
        while True:
            now = time.monotonic()
            try:
                job = self.record()
                lost_since = None
            except errors.Unavailable:
                lost_since = lost_since if lost_since is not None else now
                if now - lost_since > OUTAGE_TOLERATED_SECONDS or (timeout is not None and now - started >= timeout):
                    raise
            else:
                if on_poll is not None:
                    on_poll(job)
                if job.state in FINAL_STATES:
                    return self._finished(job)
            left = None if timeout is None else timeout - (time.monotonic() - started)
            if left is not None and left <= 0:
                raise errors.TimedOut(what=f"job {self.id}", seconds=timeout)
            time.sleep(pause if left is None else min(pause, left))
            pause = min(pause * 1.5, POLL_MAX_SECONDS)

    def _finished(self, job: Job) -> ResultT:
        if job.state == "succeeded":
            return self._decode(job.outcome or {})
        if job.state == "cancelled":
            raise errors.Cancelled(job=job.id)
        raise errors.from_code(job.error_code or errors.OperationFailed.code, job.error or f"job {job.id} is {job.state}")


class CaptureJob(JobHandle["CaptureResult"]):
    """A submitted capture; `wait` returns the `CaptureResult`."""

    def __init__(self, fleet: Connected, job_id: str, *, joined: bool = False) -> None:
        super().__init__(fleet, job_id, _capture_result, joined=joined)


class SnapshotJob(JobHandle["SnapshotResult"]):
    """A submitted snapshot; `wait` returns the `SnapshotResult`."""

    def __init__(self, fleet: Connected, job_id: str) -> None:
        super().__init__(fleet, job_id, _snapshot_result)


def _snapshot_result(outcome: dict[str, Any]) -> SnapshotResult:
    import msgspec

    from mothball.store.snapshots import SnapshotResult

    return msgspec.convert(outcome, SnapshotResult, strict=False)


def _capture_result(outcome: dict[str, Any]) -> CaptureResult:
    import msgspec

    from mothball.capture import CaptureResult

    return msgspec.convert(outcome, CaptureResult, strict=False)


class PushResult(NamedTuple):
    """`digest` stands at `reference`; counts of blobs, `bytes` sent."""

    workspace: str
    ref: str
    reference: str
    digest: str
    uploaded: int
    mounted: int
    skipped: int
    bytes: int


class PullResult(NamedTuple):
    """The snapshot `name` of `digest`, fetched from `reference`; counts of blobs, `received` bytes."""

    workspace: str
    name: str
    digest: str
    reference: str
    fetched: int
    skipped: int
    received: int


class RestoreJob(JobHandle["RestoreResult"]):
    """A submitted restore; `wait` returns the `RestoreResult`, with the first actions only."""

    def __init__(self, fleet: Connected, job_id: str) -> None:
        super().__init__(fleet, job_id, _restore_result)


def _restore_result(outcome: dict[str, Any]) -> RestoreResult:
    import msgspec

    from mothball.store.restore_result import RestoreResult

    return msgspec.convert(outcome, RestoreResult, strict=False)


class PushJob(JobHandle[PushResult]):
    """A submitted push; `wait` returns the `PushResult`."""

    def __init__(self, fleet: Connected, job_id: str) -> None:
        super().__init__(fleet, job_id, lambda outcome: PushResult(**_fields(outcome, PushResult._fields)))


class PullJob(JobHandle[PullResult]):
    """A submitted pull; `wait` returns the `PullResult`."""

    def __init__(self, fleet: Connected, job_id: str) -> None:
        super().__init__(fleet, job_id, lambda outcome: PullResult(**_fields(outcome, PullResult._fields)))


def _fields(outcome: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: outcome[name] for name in names}
