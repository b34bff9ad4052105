"""A worker's side of jobs: claim, keep, report, end. Every call after the claim carries its fence.

A fence that is no longer the newest gets `LeaseLost` and has no effect, so a paused, resurrected or doubled worker can waste
time but never change a record (design, section 4).
"""

from __future__ import annotations

import random
from typing import Any

from mothball.errors import Cancelled, InvalidParams, LeaseLost
from mothball.names import check_host
from mothball.registry import encode, keys
from mothball.registry.connection import Connection
from mothball.registry.records import Adopt, Claim, Doorbell, FailResult, doorbell_of, job_of_flat
from mothball.registry.scripts import Scripts
from mothball.settings import Settings

BACKOFF_MS = (30_000, 60_000, 120_000, 300_000, 600_000)
"""Delay before the next run by failed runs, the last for all that follow (Q-50)."""
MAX_JITTER_PER_MILLE = 100
_MAX_ERROR = 2000
_MAX_WORKER = 255
_RECORD_NUMBERS = ("generation", "bytes", "files", "stored_bytes")
_RECORD_OTHERS = ("snapshots", "crash_reports")


class Runs:
    """The worker's side of `Jobs`."""

    def __init__(self, connection: Connection, scripts: Scripts, settings: Settings) -> None:
        self._connection = connection
        self._scripts = scripts
        self._settings = settings
        self._key = keys.Keys(settings.namespace)

    def claim(
        self,
        id: str,  # noqa: A002
        *,
        host: str,
        worker: str,
        lease_ms: int,
        adopt: Adopt | None = None,
        task: str | None = None,
    ) -> Claim:
        """Ask to run the job whose doorbell was heard; see `Claim.status` for the answers.

        With `run` the workspace's lease is held for `lease_ms` ms under `Claim.fence`. A `worker` (unique in the fleet, one job
        at a time) that asks again while it holds the lease gets the same answer: the first one may have been lost.

        `adopt` makes the record of a message that has none. `task` is the task of the message: a record of another one is
        answered with `mismatch`.
        Raises `InvalidParams`, `Unavailable`.
        """
        if lease_ms <= 0:
            raise InvalidParams(f"lease_ms {lease_ms} must be above 0")
        adopted: tuple[str, ...] = ("0",)
        if adopt is not None:
            workspace = keys.workspace_id(adopt.workspace) if adopt.workspace is not None else ""
            adopted = ("1", _task(adopt.task), encode.arguments(adopt.args), workspace, keys.queue_name(adopt.queue))
        status, fence, flat, bell = self._scripts.run(
            "claim", keys.job_id(id), check_host(host), worker[:_MAX_WORKER], lease_ms, self._settings.max_deliveries,
            "" if task is None else task, *adopted,
        )  # fmt: skip
        job = job_of_flat(flat) if flat else None
        return Claim(status=status, job=job, fence=int(fence), outcome=job.outcome if job else None, next=doorbell_of(bell))

    def renew(self, id: str, fence: int, lease_ms: int) -> bool:  # noqa: A002
        """Keep the lease for `lease_ms` ms from now; True when the job's cancellation was requested.

        A lease that ran out while nobody took over is taken again: an outage of Redis must not cost an hour's work.
        Raises `LeaseLost`, `Unavailable`.
        """
        if lease_ms <= 0:
            raise InvalidParams(f"lease_ms {lease_ms} must be above 0")
        return bool(self._fenced("renew", id, fence, lease_ms)[1] == "1")

    def progress(self, id: str, fence: int, data: dict[str, Any]) -> None:  # noqa: A002
        """Replace the job's progress (JSON, at most 64 KiB). Raises `LeaseLost`."""
        self._checkpoint(id, fence, data)

    def checkpoint(self, id: str, fence: int, progress: dict[str, Any] | None = None) -> None:  # noqa: A002
        """Return when the run may go on and holds its lease now, recording `progress` on the way.

        Raises `Cancelled` when somebody cancelled the job, `LeaseLost` when another run took over.
        """
        if self._checkpoint(id, fence, progress):
            raise Cancelled(job=id)

    def _checkpoint(self, id: str, fence: int, data: dict[str, Any] | None) -> bool:  # noqa: A002
        text = "" if data is None else encode.dumps(data, "progress", encode.MAX_DOCUMENT_BYTES)
        return bool(self._fenced("checkpoint", id, fence, self._settings.lease_seconds * 1000, text)[1] == "1")

    def finish(self, id: str, fence: int, outcome: dict[str, Any], record: dict[str, Any] | None = None) -> Doorbell | None:  # noqa: A002
        """Record success: outcome, workspace record, counters, events, lease, all or nothing. Returns the next waiter's doorbell.

        `record` has fields of the workspace: generation, digest, bytes, files, stored_bytes (what this run added to the store;
        it is added to the record's sum), snapshots, crash_reports. With a record the script also sets last_good_at, clears
        last_error and retry_count and raises high_water_bytes (Q-04, Q-06). A generation below the stored one is refused
        as `LeaseLost`. Safe to repeat when its answer was lost. Raises `LeaseLost`, `InvalidParams`, `Unavailable`.
        """
        text = encode.dumps(outcome, "outcome", encode.MAX_OUTCOME_BYTES)
        return doorbell_of(self._fenced("finish", id, fence, text, *_record_args(record))[1])

    def reword(self, id: str, fence: int, args: dict[str, Any]) -> None:  # noqa: A002
        """Store `args` as the arguments of a running job: those it has, without what the run learned to be secret.

        Who looks at the job, and another run of it, gets these. Safe to repeat. Raises `LeaseLost`, `InvalidParams`, `Unavailable`.
        """
        self._fenced("reword", id, fence, encode.arguments(args))

    def captured(self, id: str, fence: int, record: dict[str, Any]) -> None:  # noqa: A002
        """Record a capture that a run has made on its way, before it is known how the run ends; `record` as in `finish`.

        For jobs that do more after their capture: when that fails, or when they evict the workspace, its record and its tombstone
        name this capture all the same. Safe to repeat. Raises `LeaseLost`, `InvalidParams`, `Unavailable`.
        """
        _, generation, digest, size, files, stored, *_ = _record_args(record)
        self._fenced("note_capture", id, fence, generation, digest, size, files, stored)

    def fail(
        self,
        id: str,  # noqa: A002
        fence: int,
        *,
        code: str,
        message: str,
        retryable: bool,
        blames: bool = True,
    ) -> FailResult:
        """Record a failed run: queued again after `BACKOFF_MS` and up to 10 % jitter (Q-50), or failed for good.

        It has failed for good when it is not `retryable` or this was the last of `max_attempts`. With `blames` the workspace
        keeps the message as last_error (Q-07). Cancelled meanwhile: it ends as cancelled and counts no failure (Q-36).
        Raises `LeaseLost`.
        """
        jitter = random.randint(0, MAX_JITTER_PER_MILLE)  # noqa: S311 - spreads load, guards nothing
        again, blamed = "1" if retryable else "0", "1" if blames else "0"
        text = message[:_MAX_ERROR]
        answer = self._fenced("fail", id, fence, code[:64], text, again, self._settings.max_attempts, jitter, blamed, *BACKOFF_MS)
        return FailResult(state=answer[1], due_at=int(answer[2]) or None, next=doorbell_of(answer[3]))

    def finish_cancelled(self, id: str, fence: int) -> Doorbell | None:  # noqa: A002
        """Record that the run stopped because it was cancelled; never a failure. Returns the next waiter's doorbell."""
        return doorbell_of(self._fenced("finish_cancelled", id, fence)[1])

    def release_lost(self, id: str, fence: int, *, interrupted: bool = False) -> Doorbell | None:  # noqa: A002
        """Put back a run that ended without an outcome (its process died, the worker stops).

        `interrupted` is an orderly shutdown, which does not count towards `max_deliveries`.
        Returns the doorbell to ring now: the job's own, or the next waiter's when the job was cancelled meanwhile. None, and no
        effect, when `fence` is not the newest any more.
        """
        return doorbell_of(self._scripts.run("release_lost", keys.job_id(id), _fence(fence), "1" if interrupted else "0")[1])

    def _fenced(self, name: str, id: str, fence: int, *args: str | int) -> Any:  # noqa: A002
        answer = self._scripts.run(name, keys.job_id(id), _fence(fence), *args)
        if answer[0] == "lost":
            raise LeaseLost(job=id)
        return answer


def _fence(fence: int) -> str:
    if isinstance(fence, bool) or not isinstance(fence, int) or fence < 0:
        raise InvalidParams(f"fence {fence!r} must be a whole number, 0 or more")
    return str(fence)


def _task(task: str) -> str:
    return keys.word(task, "task name")


def _record_args(record: dict[str, Any] | None) -> list[str]:
    if record is None:
        return ["0", "", "", "", "", ""]
    unknown = sorted(set(record) - {*_RECORD_NUMBERS, *_RECORD_OTHERS, "digest"})
    if unknown:
        raise InvalidParams(f"a job does not set {', '.join(unknown)} on a workspace")
    numbers: dict[str, str] = {}
    for name in (*_RECORD_NUMBERS, *_RECORD_OTHERS):
        value = record.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise InvalidParams(f"{name} {value!r} must be a whole number, 0 or more")
        numbers[name] = "" if value is None else str(value)
    digest = record.get("digest") or ""
    if not isinstance(digest, str) or len(digest) > _MAX_WORKER:
        raise InvalidParams("digest must be a text such as sha256:<hex>")
    out = ["1", numbers["generation"], digest, numbers["bytes"], numbers["files"], numbers["stored_bytes"]]
    for name in _RECORD_OTHERS:
        if numbers[name]:
            out += [name, numbers[name]]
    return out
