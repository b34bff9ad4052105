"""A producer's side of jobs: submit, look, cancel; and the ring that repeats doorbells."""

from __future__ import annotations

import uuid
from typing import Any

from mothball.errors import HostOffline, InvalidParams, NotFound
from mothball.names import check_host
from mothball.registry import encode, keys
from mothball.registry.records import (
    FINAL_STATES,
    QUEUED,
    RUNNING,
    STATES,
    CancelResult,
    Doorbell,
    Job,
    SubmitResult,
    doorbell_of,
    job_of,
    job_of_flat,
)
from mothball.registry.runs import Runs
from mothball.registry.workspaces import missing

_ORIGINS = ("client", "adopted", "beat")
_BATCH = 200


class Jobs(Runs):
    """The jobs of the fleet: what remains to be done, by whom, and whether a write is still allowed."""

    def submit(
        self,
        task: str,
        args: dict[str, Any],
        *,
        workspace: str | None,
        lane: str | None = None,
        job_id: str | None = None,
        origin: str = "client",
        host: str | None = None,
        queue: str | None = None,
    ) -> SubmitResult:
        """Record a job, or join the queued one of the same `lane` and workspace (Q-30, Q-31). The caller rings when `ring` says so.

        Without `workspace` but with `host` it is a job of that host: it holds no workspace's lease and joins per host.

        Joining unites lists (sorted), ORs booleans and takes the larger integer; any value wins over null, otherwise the later.
        Requests whose `options` differ do not join; empty ones join any.
        The queue is that of the workspace's host, of `host`, or `control`, unless `queue` is given. A `job_id` that exists
        is that job (asking twice is harmless). Raises `NotFound` or `Gone` for the workspace, `HostOffline` for a host
        that no worker has announced, `InvalidParams` (arguments above 256 KiB, unknown queue), `Unavailable`.
        """
        id = keys.job_id(job_id) if job_id is not None else str(uuid.uuid4())  # noqa: A001
        name = keys.word(task, "task name")
        if origin not in _ORIGINS:
            raise InvalidParams(f"origin {origin!r}: use one of {', '.join(_ORIGINS)}")
        text, parts = (encode.arguments(args), "") if lane is None else encode.lane_arguments(args)
        answer = self._scripts.run(
            "submit",
            id,
            name,
            text,
            parts,
            keys.workspace_id(workspace) if workspace is not None else "",
            keys.word(lane, "lane") if lane is not None else "",
            check_host(host) if host is not None else "",
            keys.queue_name(queue) if queue is not None else "",
            origin,
            encode.MAX_ARGS_BYTES,
        )
        if answer[0] == "ok":
            return SubmitResult(job=job_of_flat(answer[2]), joined=answer[1] == "joined", ring=answer[3] == 1)
        if answer[0] == "host_offline":
            raise HostOffline(host=answer[1])
        if answer[0] == "other_host":
            raise InvalidParams(f"workspace {workspace!r} is on host {answer[1]!r}, not on {host!r}")
        if answer[0] == "mismatch":
            raise InvalidParams(f"job id {id!r} belongs to another request ({job_of_flat(answer[1]).task})")
        raise missing(answer[0], workspace or "", answer[1])

    def get(self, id: str) -> Job:  # noqa: A002
        """The job; raises `NotFound` for an unknown one and for one whose record has run out."""
        with self._connection.guard() as client:
            record = client.hgetall(self._key("job", keys.job_id(id)))
        if not record:
            raise NotFound(what="job", id=id)
        return job_of(record)

    def cancel(self, id: str) -> CancelResult:  # noqa: A002
        """Cancel: queued at once, running at the next checkpoint, finished not at all (Q-37). Raises `NotFound`."""
        answer = self._scripts.run("cancel", keys.job_id(id))
        if answer[0] == "not_found":
            raise NotFound(what="job", id=id)
        return CancelResult(cancelled=answer[1] == 1, state=answer[2])

    def ring(self, limit: int = 500) -> list[Doorbell]:
        """At most `limit` doorbells to ring (again): lost runs, due retries, wait lists without a lease, jobs queued too long.

        Lost runs are put back into the queue here. A job whose workspace was released ends here as failed; one whose host is
        offline is set aside until `hosts.check()` finds the host again. Handing a doorbell out moves its next time on (doubling
        up to `queued_ring_max_seconds`), so two rings at once never hand out the same.
        """
        answer = self._scripts.run("ring", limit)
        return [bell for flat in answer if (bell := doorbell_of(flat)) is not None]

    def _indexes(self, state: str | None, workspace: str | None) -> list[str]:
        if workspace is not None:
            return [self._key("jobs", "ws", keys.workspace_id(workspace))]
        if state in FINAL_STATES:
            return [self._key("jobs", str(state))]
        if state == QUEUED:
            return [self._key("jobs", "queued"), self._key("jobs", "due")]
        return [self._key("jobs", "running" if state == RUNNING else "created")]

    def _newest(self, index: str, state: str | None, limit: int) -> list[Job]:
        found: list[Job] = []
        start = 0
        with self._connection.guard() as client:
            while len(found) < limit:
                ids = client.zrange(index, start, start + _BATCH - 1, desc=True)
                pipe = client.pipeline(transaction=False)
                for each in ids:
                    pipe.hgetall(self._key("job", each))
                jobs = [job_of(record) for record in pipe.execute() if record.get("id")]
                found += [job for job in jobs if state is None or job.state == state]
                start += _BATCH
                if len(ids) < _BATCH:
                    break
        return found

    def list(self, *, state: str | None = None, workspace: str | None = None, limit: int = 100) -> list[Job]:
        """The newest `limit` jobs by submit time, newest first; of one state or workspace if asked. Reads indexes only."""
        if state is not None and state not in STATES:
            raise InvalidParams(f"state {state!r}: use one of {', '.join(STATES)}")
        if limit <= 0:
            return []
        found: dict[str, Job] = {}  # by id: a job that moves between indexes meanwhile is listed once
        for index in self._indexes(state, workspace):
            found |= {job.id: job for job in self._newest(index, state, limit)}
        return sorted(found.values(), key=lambda job: (job.submitted_at, job.id), reverse=True)[:limit]
