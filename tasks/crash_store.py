"""Crash reports that are there: delete one, show one, make the package of one, and the retention of all (B-58)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import structlog

from mothball.errors import AlreadyExists, InvalidParams
from mothball.registry import Crash
from mothball.store import Store
from tasks.context import JobContext, patiently
from tasks.crash_args import CrashDeleteArgs, CrashPackageArgs, CrashRetainArgs, CrashShowArgs
from tasks.hosts import ask_hosts
from tasks.job import Outcome, job_task
from tasks.restore import hard_limit, soft_limit
from tasks.services import Services
from tasks.sweep import sweep_task

log = structlog.stdlib.get_logger("mothball.crash")

RETAIN_TASK, RETAIN_LANE = "crash.retain", "crash_retain"
_SHORT_SOFT, _SHORT_HARD = 120, 180
_RETAIN_SOFT, _RETAIN_HARD = 1700, 1800
SHOWN_BYTES: Final = 192 * 1024
"""Most bytes of a report that travel as a job's result; of a longer one the log and the patch are shortened."""


@job_task(name="crash.delete", args=CrashDeleteArgs, queue="host", time_limit=_SHORT_HARD, soft_time_limit=_SHORT_SOFT)
def delete_report(ctx: JobContext, args: CrashDeleteArgs) -> Outcome:
    """Delete a crash report: its package, its ref, its record, in this order."""
    from mothball.crash.retention import delete

    record = patiently(lambda: ctx.registry.crashes.get(args.report))
    gone = delete(_store(ctx), ctx.registry, ctx.settings, record, reason="deleted", by=args.by or "somebody")
    log.info("crash report deleted", report=record.id, by=args.by)
    return Outcome(result={"report": record.id, "deleted": gone, "bytes": record.bytes})


@job_task(name="crash.show", args=CrashShowArgs, queue="host", time_limit=_SHORT_HARD, soft_time_limit=_SHORT_SOFT)
def show_report(ctx: JobContext, args: CrashShowArgs) -> Outcome:
    """The record and the report, for those who are on another host."""
    record = patiently(lambda: ctx.registry.crashes.get(args.report))
    document, cut = shortened(load(_store(ctx), _here(ctx, record)), SHOWN_BYTES)
    return Outcome(result={"record": record.to_dict(), "report": document, "cut": cut})


@job_task(name="crash.package", args=CrashPackageArgs, queue="host", time_limit=hard_limit, soft_time_limit=soft_limit)
def package_report(ctx: JobContext, args: CrashPackageArgs) -> Outcome:
    """Write the package of a crash report that has none; of one that has, say where it is."""
    from mothball.crash.publish import package, sealing
    from mothball.redact import redactor_for

    record = _here(ctx, patiently(lambda: ctx.registry.crashes.get(args.report)))
    if record.path and Path(record.path).is_file():
        return Outcome(result=_packaged(record, made=False))

    def tick(*, step: str = "pack", **counts: Any) -> None:
        ctx.checkpoint(step, **counts)

    seal = sealing(ctx.settings)
    store = _store(ctx)
    document = load(store, record)
    try:
        made = package(
            store, record.digest, document, redactor=patiently(lambda: redactor_for(ctx.settings, ctx.registry)),
            settings=ctx.settings, seal=seal, binaries=args.binaries, base=args.base,
            roots=ctx.settings.workspace_roots, tick=tick,
        )  # fmt: skip
    except AlreadyExists:
        # Another run was quicker, or was killed before it could say so.
        return Outcome(result=_packaged(_noted(ctx, record), made=False))
    noted = patiently(
        lambda: ctx.registry.crashes.packaged(
            record.id, path=made.path, sha256=made.sha256, bytes=made.bytes, files=made.facts.files, sealed=made.sealed
        )
    )
    log.info("crash report packaged", report=record.id, path=made.path, bytes=made.bytes)
    return Outcome(result=_packaged(noted, made=True))


@job_task(
    name=RETAIN_TASK, args=CrashRetainArgs, queue="host", lane=RETAIN_LANE, time_limit=_RETAIN_HARD, soft_time_limit=_RETAIN_SOFT
)
def retain_reports(ctx: JobContext, args: CrashRetainArgs) -> Outcome:
    """Delete this host's crash reports that are too old, too many or too large together, and mend what a kill left half."""
    from mothball.crash.retention import retain

    def each(*, step: str = "retain", **counts: Any) -> None:
        ctx.checkpoint(step, **counts)

    done = retain(_store(ctx), ctx.registry, ctx.settings, dry_run=args.dry_run, each=each)
    for note in done.failed:
        log.warning("a crash report was kept", report=note.report, error=note.reason)
    log.info("crash reports retained", reports=done.reports, removed=done.removed, dry_run=args.dry_run)
    return Outcome(result=done.to_dict())


@sweep_task(
    name="maintenance.crash_retain", every=lambda settings: settings.crash_retain_seconds, soft_time_limit=45, time_limit=60
)
def retain_all(here: Services) -> dict[str, Any]:
    """Ask every host that is online to apply retention to its crash reports; forget the old ones of hosts that nobody knows."""
    from mothball.crash.retention import forget_hosts

    asked = ask_hosts(here, RETAIN_TASK, {"dry_run": False}, RETAIN_LANE)
    return {**asked, "forgotten": forget_hosts(here.registry, here.settings)}


def load(store: Store, record: Crash) -> dict[str, Any]:
    """The report of `record`, whose host this is. Raises `NotFound`, `Corrupt`."""
    from mothball.store.artifact import find_report, load_report

    found: dict[str, Any] = json.loads(load_report(store, find_report(store, record.workspace, record.id).digest))
    return found


def shortened(document: dict[str, Any], limit: int) -> tuple[dict[str, Any], list[str]]:
    """`document` of at most about `limit` bytes of JSON, and what was shortened for that: the longest texts first."""
    cut: list[str] = []
    evidence = dict(document.get("evidence") or {})
    since = document.get("since") or {}
    log_text = (evidence.get("log") or {}).get("text", "")
    texts = {"log": log_text, "patch": since.get("patch", ""), "error": document["error"]["text"]}
    out = dict(document)
    for name in sorted(texts, key=lambda each: -len(texts[each])):
        over = len(json.dumps(out, ensure_ascii=False).encode("utf-8", "replace")) - limit
        if over <= 0:
            return out, cut
        kept = texts[name][over + 200 :] if name != "patch" else texts[name][: max(0, len(texts[name]) - over - 200)]
        cut.append(f"{name}: {len(texts[name]) - len(kept)} characters are left out here")
        if name == "log":
            evidence["log"] = {**evidence["log"], "text": kept}
            out["evidence"] = evidence
        elif name == "patch":
            out["since"] = {**since, "patch": kept}
        else:
            out["error"] = {**document["error"], "text": kept}
    for name in ("omissions", "package", "since"):
        if len(json.dumps(out, ensure_ascii=False).encode("utf-8", "replace")) > limit and out.get(name):
            cut.append(f"{name}: left out here")
            out[name] = None
    return out, cut


def _noted(ctx: JobContext, record: Crash) -> Crash:
    """The record with the package that is on disk."""
    from mothball.crash.packages import list_packages
    from mothball.crash.retention import _hashed

    found = next((each for each in list_packages(ctx.settings.crash_dir) if each.id == record.id), None)
    if found is None:
        return patiently(lambda: ctx.registry.crashes.get(record.id))
    sha256, size = _hashed(found)
    return patiently(
        lambda: ctx.registry.crashes.packaged(
            record.id, path=found.path, sha256=sha256, bytes=size, files=record.files, sealed=found.sealed
        )
    )


def _packaged(record: Crash, *, made: bool) -> dict[str, Any]:
    return {
        "report": record.id, "host": record.host, "made": made, "path": record.path, "sha256": record.sha256, "bytes": record.bytes,
        "files": record.files, "sealed": record.sealed,
    }  # fmt: skip


def _here(ctx: JobContext, record: Crash) -> Crash:
    if record.host != ctx.host:
        raise InvalidParams(f"crash report {record.id} is on host {record.host!r}, not on {ctx.host!r}")
    return record


def _store(ctx: JobContext) -> Store:
    return Store(ctx.settings.store_dir, fsync=ctx.settings.fsync)
