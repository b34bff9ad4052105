"""Image caches of a host: pruned each day and under pressure, verified, brought back, measured.

Jobs of a host, one per cache. What they do is in `mothball.ocicache`; which caches there are is said in that host's settings.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import structlog
from billiard.exceptions import SoftTimeLimitExceeded
from pydantic import Field, field_validator, model_validator

from mothball import cache_fields, durations
from mothball.errors import InvalidParams, Unavailable
from mothball.pruning import END_QUARANTINE, LIST_TASK, PRUNE_TASK, UNDELETE_TASK, VERIFY_TASK, CacheRun, lane_of
from mothball.registry import Host
from mothball.settings import Settings
from tasks.context import JobContext, patiently
from tasks.hosts import Bells, HostArgs
from tasks.job import Outcome, job_task
from tasks.services import Services
from tasks.sweep import sweep_task

log = structlog.stdlib.get_logger("mothball.cache")

CALM_SECONDS = 900
"""How long a cache is not asked again that could not bring its disk below the low mark."""
TURNS = 24
"""Looks per interval at whose turn it is; a host is at most this share of the interval late."""
_MOST_PATH = 4096
_GIVE_UP_AFTER = 2
_MOST_DIGESTS = 1000


class CacheArgs(HostArgs):
    """Arguments of every job about a cache."""

    dir: str = Field(min_length=1, max_length=_MOST_PATH, description="folder of the cache, as that host's settings declare it")


class PruneArgs(CacheArgs):
    """Arguments of image.cache.prune."""

    policy: dict[str, Any] = Field(default={}, description="words of a policy that count over those of the cache, for this run")
    dry_run: bool = Field(default=False, description="say what would go; nothing is changed")
    everything: bool = Field(default=False, description="empty the cache, whatever its policy says")
    pressure: bool = Field(default=False, description="only while the disk is above its high mark, down to its low mark")
    reason: str = Field(default="asked", pattern=r"^(asked|schedule|pressure|quarantine)$", description="why, for event and log")

    @field_validator("policy")
    @classmethod
    def _is_a_policy(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            return cache_fields.check(value)
        except InvalidParams as error:
            raise ValueError(error.message) from None

    @model_validator(mode="after")
    def _one_thing(self) -> PruneArgs:
        if self.everything and (self.policy or self.pressure):
            raise ValueError("everything leaves nothing for a policy or for pressure to decide; say one of them")
        return self


class VerifyArgs(CacheArgs):
    """Arguments of image.cache.verify."""

    delete: bool = Field(default=True, description="delete what is not what its name says; it is pulled again")


class CacheUndeleteArgs(CacheArgs):
    """Arguments of image.cache.undelete."""

    digests: list[str] = Field(default=[], max_length=_MOST_DIGESTS, description="what to bring back; empty: all in quarantine")


class ListArgs(CacheArgs):
    """Arguments of image.cache.ls."""

    unused_for: str | None = Field(default=None, description="duration after which a blob counts as unused; null: the policy's")

    @field_validator("unused_for")
    @classmethod
    def _is_a_duration(cls, value: str | None) -> str | None:
        try:
            if value is not None and durations.parse(value, "unused_for") is None:
                raise ValueError("unused_for must end")
        except InvalidParams as error:
            raise ValueError(error.message) from None
        return value


@job_task(name=PRUNE_TASK, args=PruneArgs, queue="host", time_limit=7200, soft_time_limit=7140)
def prune_cache(ctx: JobContext, args: PruneArgs) -> Outcome:
    """Take out of one cache what its policy says, least recently used first; what is young, open, leased or kept stays."""
    run = CacheRun(ctx.settings, args.dir, ctx.registry, patiently)
    result = run.prune(
        args.policy, dry_run=args.dry_run, everything=args.everything, pressure=args.pressure, tick=_tick(ctx, "prune", run, args)
    )
    run.note(result, f"{ctx.job.id}:{ctx.fence}", reason=args.reason)
    if args.pressure and not args.dry_run:
        _still_full(ctx, run.cache.path, result)
    log.info(
        "cache pruned", dir=run.cache.path, kind=result["kind"], freed=result["bytes_freed"], blobs=result["blobs_freed"],
        dry_run=args.dry_run, reason=args.reason, kept=result["kept"], errors=len(result["errors"]), seconds=result["seconds"],
    )  # fmt: skip
    return Outcome(result=result)


@job_task(name=VERIFY_TASK, args=VerifyArgs, queue="host", time_limit=7200, soft_time_limit=7140)
def verify_cache(ctx: JobContext, args: VerifyArgs) -> Outcome:
    """Read every entry of one cache and delete those whose content is not what their name says (N-04)."""
    run = CacheRun(ctx.settings, args.dir, ctx.registry, patiently)
    result = run.verify(delete=args.delete, tick=_tick(ctx, "verify"))
    if result["bad"] or result["missing"]:
        missing = len(result["missing"])
        log.warning("cache damaged", dir=run.cache.path, bad=result["bad"], deleted=result["deleted"], missing=missing)
    return Outcome(result=result)


@job_task(name=UNDELETE_TASK, args=CacheUndeleteArgs, queue="host", time_limit=1800, soft_time_limit=1740)
def undelete_cache(ctx: JobContext, args: CacheUndeleteArgs) -> Outcome:
    """Bring back what a policy removed from one cache and is still in quarantine."""
    run = CacheRun(ctx.settings, args.dir, ctx.registry, patiently)
    result = run.undelete(args.digests, tick=_tick(ctx, "undelete"))
    if result["blobs"]:
        fields = {"host": ctx.host, "dir": run.cache.path, "blobs": result["blobs"], "bytes": result["bytes"]}
        patiently(lambda: ctx.registry.events.add("cache.undeleted", **fields))
    return Outcome(result=result)


@job_task(name=LIST_TASK, args=ListArgs, queue="host", time_limit=1800, soft_time_limit=1740)
def list_cache(ctx: JobContext, args: ListArgs) -> Outcome:
    """Measure one cache: size, count, oldest, newest, unused. Nothing is changed."""
    run = CacheRun(ctx.settings, args.dir, ctx.registry, patiently)
    span = None if args.unused_for is None else durations.parse(args.unused_for, "unused_for")
    return Outcome(result=run.usage(unused_for_ms=span, tick=_tick(ctx, "measure")))


def _tick(ctx: JobContext, step: str, run: CacheRun | None = None, args: PruneArgs | None = None) -> Callable[[int], None]:
    """Checkpoints of the run; a prune also says again and again that it runs, so that a same request gets its result."""
    lasts = ctx.settings.lease_seconds * 1000
    next_note = 0.0

    def tick(entries: int) -> None:
        nonlocal next_note
        ctx.checkpoint(step, blobs=entries)
        if run is None or args is None or time.monotonic() < next_note:
            return
        next_note = time.monotonic() + lasts / 3000
        lane = lane_of(ctx.job.args)
        try:
            ctx.registry.caches.note_running(ctx.host, run.cache.path, lane, ctx.job.id, lasts)
        except Unavailable as error:
            log.warning("a same request would not find this run", error=error.message)

    tick(0)
    return tick


def _still_full(ctx: JobContext, path: str, result: dict[str, Any]) -> None:
    """A disk that stays full although its cache gave what it could: say so, and leave the cache in peace for a while.

    A cache that still has what may go gave all it was asked for, and one that was not looked at, for the disk was no longer full,
    was asked for nothing: when pulls fill the disk again, both are asked again. So is one of which some is on the disk for another
    minute, and one that was left alone as another cache of its disk was being pruned.
    """
    if result["kept"].get("used") or result["quarantined_bytes"] or not result["kind"]:
        return
    try:
        figures = os.statvfs(path)
    except OSError:
        return
    used = figures.f_blocks - figures.f_bfree
    percent = 100 * used / max(used + figures.f_bavail, 1)
    looked_at = result["kept"] or result["blobs_freed"]
    if percent <= (ctx.settings.cache_low_percent if looked_at else ctx.settings.cache_high_percent):
        return
    patiently(lambda: ctx.registry.caches.calm(ctx.host, path, CALM_SECONDS * 1000))
    if percent > ctx.settings.cache_high_percent:
        log.warning("the disk stays full", dir=path, used_percent=round(percent, 1), kept=result["kept"])
        fields = {"host": ctx.host, "dir": path, "used_percent": round(percent, 1), "kept": result["kept"]}
        patiently(lambda: ctx.registry.events.add("cache.disk_full", **fields))


# -- sweeps ------------------------------------------------------------------------------------------------------------


def turn_seconds(settings: Settings) -> int:
    """How often it is looked whose turn it is."""
    return max(1, settings.cache_seconds // TURNS)


@sweep_task(name="maintenance.image_cache", every=turn_seconds, soft_time_limit=45, time_limit=60)
def prune_caches(here: Services) -> dict[str, Any]:
    """Ask each host once per interval, at its own moment of it, to prune its caches by their policies; and to end quarantines."""
    interval = here.settings.cache_seconds * 1000
    over = here.registry.caches.over()

    def mine(host: Host) -> list[dict[str, Any]]:
        found = _announced(host)
        return found if found and here.registry.caches.due(host.host, interval) else []

    done = _ask(here, mine, "schedule", lambda host: here.registry.caches.give_turn_back(host, interval))
    # After the others: whoever is asked to prune ends his quarantine with that.
    ended = _ask(here, lambda host: _over(host, over), "quarantine", lambda _host: None) if over else {"asked": 0, "failed": 0}
    return {**done, "failed": done["failed"] + ended["failed"], "quarantines": ended["asked"]}


def _over(host: Host, over: list[tuple[str, str]]) -> list[dict[str, Any]]:
    return [{"dir": folder} for name, folder in over if name == host.host]


def pressure_seconds(settings: Settings) -> int:
    """How often the disks' figures are looked at."""
    return settings.cache_pressure_seconds


@sweep_task(name="maintenance.image_cache_pressure", every=pressure_seconds, soft_time_limit=45, time_limit=60)
def prune_full_disks(here: Services) -> dict[str, Any]:
    """Ask for the caches of disks that are fuller than their host's high mark, by the figures of its heartbeats."""

    def full(host: Host) -> list[dict[str, Any]]:
        high = host.info.get("image_cache_high")
        limit = high if isinstance(high, int | float) and not isinstance(high, bool) else here.settings.cache_high_percent
        over = [each for each in _announced(host) if _used(each) > limit]
        return [each for each in over if not here.registry.caches.calmed(host.host, each["dir"])]

    return _ask(here, full, "pressure", lambda _host: None)


def _announced(host: Host) -> list[dict[str, Any]]:
    """The caches that a host announced, as far as they can be read: another version may have written it."""
    found = host.info.get("image_caches")
    if not isinstance(found, list):
        return []
    return [each for each in found if isinstance(each, dict) and isinstance(each.get("dir"), str)]


def _used(cache: dict[str, Any]) -> float:
    percent = cache.get("used_percent")
    return float(percent) if isinstance(percent, int | float) and not isinstance(percent, bool) else 0.0


def _ask(
    here: Services, wanted: Callable[[Host], list[dict[str, Any]]], reason: str, undone: Callable[[str], None]
) -> dict[str, Any]:
    """A job per cache that `wanted` names, of every host that is online; one bad host never ends it."""
    bells = Bells(here)
    asked = joined = failed = in_a_row = 0
    for host in (each for each in here.registry.hosts.list() if each.online):
        try:
            for cache in wanted(host):
                args: dict[str, Any] = {"host": host.host, "dir": cache["dir"], "reason": reason, "pressure": reason == "pressure"}
                if reason == "quarantine":
                    args["policy"] = END_QUARANTINE
                submitted = here.registry.jobs.submit(
                    PRUNE_TASK, args, workspace=None, host=host.host, lane=lane_of(args), origin="beat"
                )
                asked, joined = asked + (not submitted.joined), joined + submitted.joined
                if submitted.ring:
                    bells.ring(submitted.job)
                if reason != "pressure":
                    here.registry.caches.asked(host.host, cache["dir"])
            in_a_row = 0
        except SoftTimeLimitExceeded:
            raise
        except Exception as error:  # whatever is wrong with one host, the others are asked
            failed, in_a_row = failed + 1, in_a_row + 1
            log.warning("host not asked", asking=PRUNE_TASK, host=host.host, error=f"{type(error).__name__}: {error}"[:500])
            if not isinstance(error, Unavailable):
                undone(host.host)
            elif in_a_row >= _GIVE_UP_AFTER:
                break
    return {"asked": asked, "joined": joined, "failed": failed}
