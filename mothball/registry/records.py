"""The records of the job life: what scripts return, as frozen structs. Times are ms of Redis TIME."""

from __future__ import annotations

from typing import Any

import msgspec

from mothball.registry import encode
from mothball.registry.scripts import pairs

QUEUED, RUNNING, SUCCEEDED, FAILED, CANCELLED, DEAD = "queued", "running", "succeeded", "failed", "cancelled", "dead"
FINAL_STATES = (SUCCEEDED, FAILED, CANCELLED, DEAD)
STATES = (QUEUED, RUNNING, *FINAL_STATES)


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One run of a task and all its repetitions.

    `attempts` are runs that failed, `deliveries` runs that began. `due_at` is the time of the next retry, None when none is
    planned. `joined` counts the requests that this job answers besides its own. `origin` is client, adopted or beat.
    """

    id: str
    task: str
    args: dict[str, Any]
    workspace: str | None
    host: str | None
    queue: str
    state: str
    lane: str | None
    submitted_at: int
    started_at: int | None
    finished_at: int | None
    attempts: int
    deliveries: int
    fence: int
    worker: str | None
    progress: dict[str, Any]
    outcome: dict[str, Any] | None
    error_code: str | None
    error: str | None
    cancel_requested: bool
    due_at: int | None
    origin: str
    joined: int

    @property
    def finished(self) -> bool:
        """True in a state that the job never leaves."""
        return self.state in FINAL_STATES

    def to_dict(self) -> dict[str, Any]:
        """The record in JSON types."""
        return msgspec.structs.asdict(self)


class Doorbell(msgspec.Struct, frozen=True):
    """A message that has to be published: the job's id is the Celery task id. The arguments stay in the job's record."""

    job: str
    task: str
    queue: str


class Adopt(msgspec.Struct, frozen=True):
    """What a message without a record says: enough to make one (origin `adopted`). `queue` counts only without workspace."""

    task: str
    args: dict[str, Any]
    workspace: str | None
    queue: str = "control"


class SubmitResult(msgspec.Struct, frozen=True):
    """The job that will do the work, whether it is one that was queued before, and whether the caller has to ring its doorbell.

    `ring` is False for a job that was rung within `queued_ring_after_seconds` or that waits for something a doorbell cannot hasten.
    """

    job: Job
    joined: bool
    ring: bool


class Claim(msgspec.Struct, frozen=True):
    """Answer to a claim; `status` is one of

    run (the caller holds the lease under `fence`), done (succeeded or failed: `outcome`), cancelled, dead, elsewhere (running
    under a live lease), waiting (on the wait list of its workspace), wrong_host (`job.queue` says where), not_due, unknown,
    mismatch (the job is one of another task than the message).
    `next` is the doorbell of another job that became free to run because this one ended here.
    """

    status: str
    job: Job | None
    fence: int
    outcome: dict[str, Any] | None
    next: Doorbell | None = None


class CancelResult(msgspec.Struct, frozen=True):
    """Whether anything was there to cancel (Q-37), and the job's state: `running` stops at its next checkpoint."""

    cancelled: bool
    state: str


class FailResult(msgspec.Struct, frozen=True):
    """What a failed run leads to: `queued` again at `due_at` (ms), `failed` or `cancelled`; `next`: the next waiter's doorbell."""

    state: str
    due_at: int | None
    next: Doorbell | None


def job_of(record: dict[str, str]) -> Job:
    """The HASH of a job as a record; a field an older version did not write has its empty value."""
    get = record.get
    return Job(
        id=record["id"],
        task=get("task", ""),
        args=encode.loads(get("args")) or {},
        workspace=get("workspace") or None,
        host=get("host") or None,
        queue=get("queue", ""),
        state=get("state", ""),
        lane=get("lane") or None,
        submitted_at=int(get("submitted_at", "0")),
        started_at=int(get("started_at") or 0) or None,
        finished_at=int(get("finished_at") or 0) or None,
        attempts=int(get("attempts", "0")),
        deliveries=int(get("deliveries", "0")),
        fence=int(get("fence", "0")),
        worker=get("worker") or None,
        progress=encode.loads(get("progress")) or {},
        outcome=encode.loads(get("outcome")),
        error_code=get("error_code") or None,
        error=get("error") or None,
        cancel_requested=get("cancel_requested") == "1",
        due_at=int(get("due_at") or 0) or None,
        origin=get("origin", "client"),
        joined=int(get("joined", "0")),
    )


def job_of_flat(flat: list[str]) -> Job:
    """A job as a script returns it."""
    return job_of(pairs(flat))


def doorbell_of(flat: list[str]) -> Doorbell | None:
    """A doorbell as a script returns it; an empty list is none."""
    return Doorbell(job=flat[0], task=flat[1], queue=flat[2]) if flat else None
