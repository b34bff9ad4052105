"""Jobs that look at what runs in a workspace (N-20 to N-26), and the one that finds runtimes that died unseen (N-34).

They are jobs of the host and hold no workspace's lease: a capture that takes an hour does not keep anybody from looking, and
nothing here is a sign of life. What a driver cannot answer, because it hangs or is not allowed here, is said in the answer: looking
again by itself would not help whoever asked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import structlog
from pydantic import Field

from mothball import runtime
from mothball.errors import InvalidParams, MothballError, NotRunning, OperationFailed, Unavailable
from mothball.purge import put_back_interrupted
from mothball.registry import Workspace, encode
from mothball.runtime.health import Health, check_health
from mothball.runtime.ports import probe
from mothball.runtime.usage import disk_bytes
from tasks.context import JobContext, patiently
from tasks.hosts import Bells, HostArgs
from tasks.job import Outcome, job_task
from tasks.services import current
from tasks.spec import WorkspaceId

log = structlog.stdlib.get_logger("mothball.runtime")

RECONCILE_TASK = "runtime.reconcile"
RECONCILE_LANE = "reconcile"
RECONCILE_SECONDS = 240.0
"""A reconcile looks at no further workspace after this; the next one begins with those it left out."""
CAPTURE_TASK, CAPTURE_LANE = "workspace.capture", "capture"
MOST_ON_A_HOST = 100_000
LISTED = 200
_HUNG = "timeout"

T = TypeVar("T")


class LookArgs(HostArgs):
    """Arguments of the jobs that look at one workspace."""

    workspace: WorkspaceId = Field(description="id of a workspace of that host")


@job_task(name="workspace.stats", args=LookArgs, queue="host", blames=False, time_limit=90, soft_time_limit=80)
def stats(ctx: JobContext, args: LookArgs) -> Outcome:
    """CPU seconds, memory, processes and allocated bytes of the directory; the last known ones, marked stale, of what is dead."""
    record = _record(ctx, args)
    figures, reason = _figures(ctx, record)
    disk, complete, note = _disk(ctx, record)
    now = patiently(ctx.registry.time_ms)
    if figures is not None:
        fresh = {**figures, "disk_bytes": disk, "disk_complete": complete, "collected_at": now, "stale": False}
        patiently(lambda: ctx.registry.stats.put(record.id, record.registration, fresh))
    else:
        known = patiently(lambda: ctx.registry.stats.get(record.id, record.registration)) or _NEVER
        # The directory is there whether anything runs or not, so its figure is of now.
        fresh = {**known, "disk_bytes": disk, "disk_complete": complete, "stale": True, "reason": reason}
    if note:
        fresh["directory"] = note
    return Outcome(result={**_head(ctx, record), **fresh})


@job_task(name="workspace.health", args=LookArgs, queue="host", blames=False, time_limit=60, soft_time_limit=50)
def health(ctx: JobContext, args: LookArgs) -> Outcome:
    """Whether what runs there is well, and the reason (N-23)."""
    record = _record(ctx, args)
    now = patiently(ctx.registry.time_ms)
    found = _health(ctx, record, now)
    return Outcome(
        result={
            **_head(ctx, record), "healthy": found.healthy, "reason": found.reason, "alive": found.alive, "sure": found.sure,
            "status": found.status, "checked_at": now,
        }
    )  # fmt: skip


@job_task(name="workspace.ping", args=LookArgs, queue="host", blames=False, time_limit=60, soft_time_limit=50)
def ping(ctx: JobContext, args: LookArgs) -> Outcome:
    """Whether what runs there is alive; asks the driver alone, no port of the workspace."""
    record = _record(ctx, args)
    found = _alive(ctx, record)
    now = patiently(ctx.registry.time_ms)
    return Outcome(
        result={
            **_head(ctx, record), "alive": found.alive, "reason": found.reason, "sure": found.sure, "facts": found.facts,
            "answered_at": now,
        }
    )  # fmt: skip


@job_task(name="workspace.ports", args=LookArgs, queue="host", blames=False, time_limit=60, soft_time_limit=50)
def ports(ctx: JobContext, args: LookArgs) -> Outcome:
    """Where it listens, and which ports speak http or https (N-26)."""
    record = _record(ctx, args)
    driver = _driver(ctx, record)
    found = _final(driver.ports)
    ctx.checkpoint("probing", ports=len(found))
    now = patiently(ctx.registry.time_ms)
    return Outcome(result={**_head(ctx, record), "ports": probe(found), "checked_at": now})


@job_task(name=RECONCILE_TASK, args=HostArgs, queue="host", lane=RECONCILE_LANE, time_limit=300, soft_time_limit=290)
def reconcile(ctx: JobContext, args: HostArgs) -> Outcome:
    """Active workspaces of this host whose runtime is surely dead are stopped from now on, reason ``lost`` (N-34).

    Directories that an interrupted purge moved aside get their names again.
    """
    return Outcome(result=_Reconcile(ctx).run())


_NEVER: dict[str, Any] = {"cpu_seconds": 0.0, "rss_bytes": 0, "processes": 0, "collected_at": None}


class _Reconcile:
    """One look at every active workspace of the host. One that hangs or fails costs itself and no other."""

    def __init__(self, ctx: JobContext) -> None:
        self._ctx = ctx
        self._end = time.monotonic() + RECONCILE_SECONDS
        self._hung: set[str] = set()
        self.lost: list[str] = []
        self.put_back: list[str] = []
        self.skipped: dict[str, int] = {}

    def run(self) -> dict[str, Any]:
        ctx = self._ctx
        known = patiently(lambda: ctx.registry.workspaces.list(host=ctx.host, limit=MOST_ON_A_HOST))
        for record in known:
            self._put_back(record)
        found = [each for each in known if each.state == "active"]
        having = [each for each in found if each.runtime.get("driver", "none") != "none"]
        # Each run begins elsewhere: what hangs at the front must not keep the rest from ever being looked at.
        start = ctx.fence * 97 % len(having) if having else 0
        checked = 0
        for record in having[start:] + having[:start]:
            if time.monotonic() >= self._end:
                break
            ctx.checkpoint("looking", checked=checked, of=len(having), lost=len(self.lost))
            checked += 1
            try:
                why = self._one(record)
            except Unavailable:
                raise
            except MothballError as error:
                why = error.code
                log.warning("runtime not looked at", workspace=record.id, error=error.message)
            if why:
                self.skipped[why] = self.skipped.get(why, 0) + 1
        remaining = len(having) - checked
        if self.lost:
            log.warning("runtimes were lost", count=len(self.lost), workspaces=self.lost[:LISTED])
        return {
            "checked": checked, "without_runtime": len(found) - len(having), "lost": self.lost[:LISTED],
            "lost_count": len(self.lost), "put_back": self.put_back[:LISTED], "skipped": self.skipped, "remaining": remaining,
        }  # fmt: skip

    def _put_back(self, record: Workspace) -> None:
        """A purge that was killed when it had moved the directory aside, and then cancelled, is run by nobody again."""
        try:
            if not put_back_interrupted(
                record.path, workspace=record.id, registration=record.registration, settings=self._ctx.settings
            ):
                return
        except (MothballError, OSError) as error:  # a purge that is running, most likely
            log.warning("what a purge moved aside stays there", workspace=record.id, error=str(error))
            return
        self.put_back.append(record.id)
        log.warning("an interrupted purge had moved it aside; it is back in its place", workspace=record.id, path=record.path)

    def _one(self, record: Workspace) -> str:
        """Look at one workspace; why nothing came of it, empty for one that lives or is lost."""
        ctx = self._ctx
        kind = str(record.runtime.get("driver"))
        if kind in self._hung:
            return _HUNG  # the same daemon: a second wait of ten seconds would teach nothing
        driver = runtime.driver_for(record.runtime, ctx.settings, path=record.path)
        try:
            found = driver.alive()
            if found.alive:
                self._keep(record, driver)
                return ""
        except MothballError as error:
            if error.code == _HUNG and kind in {"docker", "podman", "systemd"}:
                self._hung.add(kind)
            raise
        if not found.sure:
            return "unsure"
        return self._lose(record, found)

    def _keep(self, record: Workspace, driver: runtime.Driver) -> None:
        """Note what it uses: the last known figures, should it be dead the next time (N-25)."""
        ctx = self._ctx
        known = ctx.registry.stats.get(record.id, record.registration) or {}
        try:
            figures = _plain(driver.stats(None))
        except NotRunning:
            return
        # The directory is measured only for somebody who asks: that may take its time.
        figures |= {name: known[name] for name in ("disk_bytes", "disk_complete") if name in known}
        figures |= {"collected_at": ctx.registry.time_ms(), "stale": False}
        ctx.registry.stats.put(record.id, record.registration, figures)

    def _lose(self, record: Workspace, found: runtime.Alive) -> str:
        ctx = self._ctx
        facts = ctx.registry.lifecycle.facts([record.id])[0]
        if facts is None or facts.state != "active" or facts.registration != record.registration:
            return "changed"
        if facts.present_until is not None and facts.present_until > ctx.registry.time_ms():
            return "presence"  # somebody says that he works there, and he should know
        text = encode.dumps(record.runtime, "runtime", encode.MAX_DOCUMENT_BYTES)
        outcome = ctx.registry.lifecycle.lost(facts, runtime=text, detail=found.reason, evidence=found.facts)
        if outcome != "done":
            return outcome
        self.lost.append(record.id)
        log.warning("runtime lost", workspace=record.id, reason=found.reason)
        self._capture(record)
        return ""

    def _capture(self, record: Workspace) -> None:
        """What it left behind is captured, if its directory is still there. The workspace is stopped either way."""
        ctx = self._ctx
        try:
            with _directory(ctx, record):
                pass
            submitted = ctx.registry.jobs.submit(
                CAPTURE_TASK, {"workspace": record.id}, workspace=record.id, lane=CAPTURE_LANE, origin="beat"
            )
        except MothballError as error:
            log.warning("lost without a capture", workspace=record.id, error=error.message)
            return
        if submitted.ring:
            Bells(current()).ring(submitted.job)


def _record(ctx: JobContext, args: LookArgs) -> Workspace:
    record = patiently(lambda: ctx.registry.workspaces.get(args.workspace))
    if record.host != ctx.host:
        raise InvalidParams(f"workspace {record.id} is on host {record.host}, not on {ctx.host}; ask there")
    return record


def _head(ctx: JobContext, record: Workspace) -> dict[str, Any]:
    return {
        "workspace": record.id, "host": ctx.host, "state": record.state, "driver": record.runtime.get("driver", "none"),
    }  # fmt: skip


def _driver(ctx: JobContext, record: Workspace) -> runtime.Driver:
    return _final(lambda: runtime.driver_for(record.runtime, ctx.settings, path=record.path))


def _final(call: Callable[[], T]) -> T:
    """`call()`; what may pass later is an answer all the same: nobody waits half a minute to look again."""
    try:
        return call()
    except MothballError as error:
        if not error.retryable:
            raise
        raise OperationFailed(error.message, reason=error.message) from None


def _figures(ctx: JobContext, record: Workspace) -> tuple[dict[str, Any] | None, str]:
    """What the runtime uses now, or None and why nobody can say."""
    if record.state not in {"active", "submitted"}:
        return None, f"the workspace is {record.state}"
    try:
        driver = runtime.driver_for(record.runtime, ctx.settings, path=record.path)
        found = driver.alive()
        if not found.alive:
            return None, found.reason
        return _plain(driver.stats(None)), ""
    except Unavailable:
        raise
    except MothballError as error:
        return None, error.message


def _plain(found: runtime.Stats) -> dict[str, Any]:
    return {"cpu_seconds": found.cpu_seconds, "rss_bytes": found.rss_bytes, "processes": found.processes}


@contextmanager
def _directory(ctx: JobContext, record: Workspace) -> Iterator[int]:
    """A descriptor of the workspace's directory, which must lie below an allowed root. Raises `PathNotAllowed`, `SourceMissing`."""
    from mothball.capture.root import open_root

    with open_root(record.path, ctx.settings.workspace_roots) as fd:
        yield fd


def _disk(ctx: JobContext, record: Workspace) -> tuple[int | None, bool, str]:
    """Allocated bytes of the directory, whether all of it was seen, and what is wrong with it."""
    try:
        with _directory(ctx, record) as fd:
            return (*disk_bytes(fd), "")
    except MothballError as error:
        return None, False, error.message


def _alive(ctx: JobContext, record: Workspace) -> runtime.Alive:
    """What the driver says; what it cannot say is not alive, and not sure."""
    try:
        return runtime.driver_for(record.runtime, ctx.settings, path=record.path).alive()
    except Unavailable:
        raise
    except MothballError as error:
        return runtime.Alive(alive=False, reason=error.message, sure=False)


def _health(ctx: JobContext, record: Workspace, now: int) -> Health:
    if record.state not in {"active", "submitted"}:
        return Health(healthy=False, reason=f"the workspace is {record.state}", alive=False, sure=True)
    if record.runtime.get("driver", "none") == "none":
        return _by_presence(ctx, record, now)
    try:
        return check_health(runtime.driver_for(record.runtime, ctx.settings, path=record.path), record.runtime)
    except Unavailable:
        raise
    except MothballError as error:
        return Health(healthy=False, reason=error.message, alive=False, sure=False)


def _by_presence(ctx: JobContext, record: Workspace, now: int) -> Health:
    """Of a workspace without a runtime only its people can say that it is well: by a heartbeat or by a job that works on it."""
    facts = patiently(lambda: ctx.registry.lifecycle.facts([record.id]))[0]
    if facts is not None and facts.present_until is not None and facts.present_until > now:
        left = (facts.present_until - now) / 1000
        return Health(healthy=True, reason=f"{facts.present_by} is present for {left:.0f} s more", alive=True, sure=True)
    if facts is not None and facts.lease_until is not None:
        return Health(healthy=True, reason=f"job {facts.lease_job} works on it", alive=True, sure=True)
    return Health(healthy=False, reason="no runtime is recorded, nobody is present and no job works on it", alive=False, sure=False)
