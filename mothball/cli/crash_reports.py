"""`mothball crash-reports`: list, show, fetch, delete, keep, retain."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Literal

import typer

from mothball import errors
from mothball.cli.output import JsonFlag, emit_json, emit_json_array, line, note, pairs, table
from mothball.cli.session import open_fleet, who
from mothball.cli.text import age, escape, human_bytes, parse_duration, printable, time_text
from mothball.cli.waiting import NoWait, Timeout, counting, finished

if TYPE_CHECKING:
    from mothball.client import Fleet
    from mothball.registry import Crash

PANEL = "Crash reports"
Report = Annotated[
    str, typer.Argument(metavar="REPORT", help="Its id, the beginning of it, or its last 8 digits.", show_default=False)
]
Host = Annotated[str | None, typer.Option(help="Host whose reports they are; default: this one, at once.")]
_PIECE = 1024**2
_SHOWN_TITLE = 60


def add_to(app: typer.Typer) -> None:
    """Add this module's group of commands to `app`."""
    group = typer.Typer(help=reports.__doc__, invoke_without_command=True, no_args_is_help=False)
    group.callback()(reports)
    for name, command in (("show", show), ("fetch", fetch), ("delete", delete), ("keep", keep), ("retain", retain)):
        group.command(name)(command)
    app.add_typer(group, name="crash-reports", rich_help_panel=PANEL)


def reports(
    context: typer.Context,
    repo: Annotated[str | None, typer.Option(help="Only of this repository.", show_default=False)] = None,
    workspace: Annotated[str | None, typer.Option(help="Only of this workspace.", show_default=False)] = None,
    host: Annotated[str | None, typer.Option(help="Only of this host.", show_default=False)] = None,
    since: Annotated[str | None, typer.Option(metavar="AGE", help="Not older than, such as 7d.", show_default=False)] = None,
    limit: Annotated[int, typer.Option(min=1, help="Most that are listed.")] = 50,
    json: JsonFlag = False,
) -> None:
    """List crash reports, newest first; show, fetch, delete or keep one."""
    if context.invoked_subcommand is not None:
        return
    with open_fleet() as fleet:
        now = fleet.registry.time_ms()
        oldest = None if since is None else now - int(parse_duration(since) * 1000)
        found = fleet.crash_reports(workspace=workspace, repo=repo, host=host, since_ms=oldest, limit=limit)
    if json:
        emit_json_array(each.to_dict() for each in found)
        return
    table(
        ("REPORT", "WHEN", "TIMES", "WORKSPACE", "HOST", "SIZE", "KEEP", "TITLE"),
        (
            (
                each.id, age(each.last_at or each.at, now), each.count, each.workspace, each.host,
                human_bytes(each.bytes) if each.path else "-", "yes" if each.keep else "-", each.title[:_SHOWN_TITLE],
            )
            for each in found
        ),
        right=("TIMES", "SIZE"),
    )  # fmt: skip


def show(
    report: Report,
    *,
    patch: Annotated[
        bool, typer.Option("--patch", help="Also the changes since the last good snapshot.", show_default=False)
    ] = False,
    log: Annotated[bool, typer.Option("--log", help="Also the end of the log.", show_default=False)] = False,
    timeout: Timeout = None,
    json: JsonFlag = False,
) -> None:
    """Show what is known of a failure. From another host than the report's, long texts come shortened."""
    with open_fleet() as fleet:
        record = fleet.registry.crashes.get(report)
        document, cut = _document(fleet, record, timeout=timeout, json=json)
    if json:
        emit_json({"record": record.to_dict(), "report": document, "cut": cut})
        return
    _print_record(record)
    _print_document(document, patch=patch, log=log)
    for each in cut:
        note(f"note: {each}; host {record.host} has all of it")


def _document(fleet: Fleet, record: Crash, *, timeout: str | None, json: bool) -> tuple[dict[str, Any], list[str]]:
    """The report from this host's store, else by way of the host that has it."""
    if record.host == fleet.settings.host:
        import json as codec

        from mothball.cli.local import local_store
        from mothball.store.artifact import find_report, load_report

        store = local_store(fleet.settings)
        ref = find_report(store, record.workspace, record.id)
        found: dict[str, Any] = codec.loads(load_report(store, ref.digest))
        return found, []
    handle = fleet.crash_show(record.id)
    answer = finished(handle, f"show {printable(record.id)}", no_wait=False, timeout=timeout, json=json)
    assert answer is not None  # noqa: S101 - it was waited for
    return answer["report"], list(answer["cut"])


def _print_record(record: Crash) -> None:
    package = (
        f"{record.path} on host {record.host}"
        if record.path
        else f"none; `mothball crash-reports fetch` makes one on {record.host}"
    )
    sealed = ", sealed" if record.sealed else ""
    size = f" ({human_bytes(record.bytes)}, {record.files:,} files{sealed})" if record.path else ""
    pairs(
        [
            ("report", record.id), ("workspace", record.workspace), ("host", record.host), ("when", time_text(record.at)),
            ("times", f"{record.count:,}, last {time_text(record.last_at)}" if record.count > 1 else ""),
            ("by", record.by), ("kept", "yes" if record.keep else ""), ("package", package + size), ("sha256", record.sha256),
            ("capture", f"{record.digest}, generation {record.generation}"),
            ("signature", record.signature),
        ]
    )  # fmt: skip


def _print_document(document: dict[str, Any], *, patch: bool, log: bool) -> None:
    evidence, error, capture = document["evidence"], document["error"], document["capture"]
    ended = evidence.get("exit") or {}
    killed = ended.get("oom_killed")
    oom = "" if killed is None else f"{'yes' if killed else 'no'}: {ended.get('oom_evidence', '')}"
    pairs(
        [
            ("command", " ".join(evidence.get("command") or [])), ("exit code", ended.get("code")),
            ("signal", ended.get("signal_name")),
            ("oom", oom),
            ("captured", f"the last good one, for {capture['reason']}" if capture.get("reason") else capture.get("source")),
            ("secrets", f"{document['redactions']['total']:,} replaced in the report" if document["redactions"]["total"] else ""),
        ]
    )  # fmt: skip
    line()
    line(printable(error["title"]))
    _text(error["text"])
    if error["truncated"]:
        note(f"note: the error text had {human_bytes(error['bytes'])}; its beginning and its end are kept")
    since = document.get("since")
    if since:
        totals = since.get("totals") or {}
        changed = ", ".join(f"{count:,} {name}" for name, count in totals.items() if isinstance(count, int) and count)
        line()
        line(escape(f"since {since.get('ref') or since.get('digest')}: {changed or since.get('error') or 'nothing changed'}"))
        if patch:
            _text(since.get("patch") or "")
    tail = evidence.get("log") or {}
    if log and tail.get("text"):
        line()
        line(escape(f"the end of {tail.get('path')}:"))
        _text(tail["text"])
    elif log:
        note(f"note: no log: {tail.get('error') or 'none was named'}")


def _text(text: str) -> None:
    """A text of several lines; whatever is in it, it stays text."""
    for each in text.split("\n"):
        line(printable(each.replace("\t", "    ")))


def fetch(
    report: Report,
    *,
    to: Annotated[Path, typer.Option(metavar="FILE", help="New file; it is never replaced.", show_default=False)],
    exclude_binaries: Annotated[
        bool, typer.Option("--exclude-binaries", help="Make a package without binary files.", show_default=False)
    ] = False,
    base: Annotated[
        str | None, typer.Option(metavar="OCI-REF", help="Make a package with this image below the workspace.", show_default=False)
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Write a report's package to a file, on the report's host; one that has none is packaged now."""
    with open_fleet() as fleet:
        record = fleet.registry.crashes.get(report)
        if record.host != fleet.settings.host:
            where = f", as {record.path}" if record.path else ""
            raise errors.HostOffline(
                f"crash report {record.id} is on host {record.host!r}{where}; run this command there, or copy the file from there",
                host=record.host,
            )
        if record.path and not exclude_binaries and base is None and not _removed(record):
            sha256, size, files = *_copied(record, to, fleet.settings.store_dir), record.files
        else:
            made = _package_to(fleet, record, to, binaries="exclude" if exclude_binaries else "include", base=base, hidden=json)
            sha256, size, files = made.sha256, made.bytes, made.facts.files
    if json:
        emit_json({"report": record.id, "path": os.fspath(to), "sha256": sha256, "bytes": size, "files": files})
    else:
        line(f"{sha256}  {escape(os.fspath(to))}")
        line(f"{human_bytes(size)}, {files:,} files; unpacked, it is a bundle: `mothball bundle run` starts it with runc")


def _opened(record: Crash) -> BinaryIO:
    try:
        return Path(record.path).open("rb")
    except OSError as error:
        reason = f"the package of {record.id} cannot be read at {record.path}: {error.strerror or error}"
        raise errors.NotFound(reason, what="package", id=record.id) from None


def _copied(record: Crash, to: Path, store: Path) -> tuple[str, int]:
    """Copy the package as it is, and refuse one that is not what was written."""
    import hashlib

    from mothball.package.target import new_file

    sha, size = hashlib.sha256(), 0
    with _opened(record) as source, new_file(to, store) as out:
        os.fchmod(out.fileno(), 0o600)
        while piece := source.read(_PIECE):
            sha.update(piece)
            size += len(piece)
            out.write(piece)
        if sha.hexdigest() != record.sha256:
            raise errors.Corrupt(what=f"the package {record.path}", reason=f"its sha256 is {sha.hexdigest()}, not {record.sha256}")
    return sha.hexdigest(), size


def _removed(record: Crash) -> bool:
    """Somebody removed the package by hand: the report and its capture are still there to make it again."""
    gone = not os.path.lexists(record.path)
    if gone:
        note(f"note: {record.path} is gone; its package is made again")
    return gone


def _package_to(
    fleet: Fleet, record: Crash, to: Path, *, binaries: Literal["include", "exclude"], base: str | None, hidden: bool
) -> Any:
    from mothball.cli.local import local_store
    from mothball.crash.publish import package, sealing
    from mothball.redact import redactor_for

    settings = fleet.settings
    document, _ = _document(fleet, record, timeout=None, json=True)
    with counting("package", hidden=hidden) as count:
        return package(
            local_store(settings), record.digest, document, redactor=redactor_for(settings, fleet.registry), settings=settings,
            to=to, seal=sealing(settings), binaries=binaries, base=base, tick=lambda *, step="pack", **_: count(step, 0),
        )  # fmt: skip


def delete(
    report: Report,
    *,
    forget: Annotated[
        bool, typer.Option("--forget", help="Its host is gone for good: forget the record only.", show_default=False)
    ] = False,
    no_wait: NoWait = False,
    timeout: Timeout = None,
    json: JsonFlag = False,
) -> None:
    """Delete a report: its package at once; its capture, when nothing else needs it, by way of the trash."""
    with open_fleet() as fleet:
        if forget:
            record = fleet.crash_forget(report, by=who(""))
            if json:
                emit_json({"job": None, "result": {"report": record.id, "deleted": True, "bytes": 0}})
            else:
                line(escape(f"{record.id}: forgotten; what host {record.host} has of it was not touched"))
            return
        try:
            handle = fleet.crash_delete(report, by=who(""))
        except errors.HostOffline as error:
            raise errors.HostOffline(f"{error.message}; when it is gone for good, --forget", **error.fields) from None
        result = finished(handle, f"delete {printable(report)}", no_wait=no_wait, timeout=timeout, json=json)
    if result is None:
        return
    if json:
        emit_json({"job": handle.id, "result": result})
    else:
        line(escape(f"{result['report']}: deleted" if result["deleted"] else f"{result['report']}: was deleted before"))


def keep(
    report: Report,
    *,
    off: Annotated[bool, typer.Option("--off", help="Lift the flag.", show_default=False)] = False,
    json: JsonFlag = False,
) -> None:
    """Protect a report: retention never deletes it until --off lifts that."""
    with open_fleet() as fleet:
        record = fleet.crash_keep(report, not off, by=who(""))
    if json:
        emit_json(record.to_dict())
    else:
        line(escape(f"{record.id}: {'kept' if record.keep else 'kept no longer'}"))


def retain(
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go and why.", show_default=False)] = False,
    host: Host = None,
    no_wait: NoWait = False,
    timeout: Timeout = None,
    json: JsonFlag = False,
) -> None:
    """Delete the reports that are too old, too many or too large together, and mend what a kill left half."""
    if host is None:
        if no_wait or timeout is not None:
            raise errors.InvalidParams("--no-wait and --timeout are for a job; give --host as well")
        from mothball.cli.local import local_store
        from mothball.crash.retention import retain as retain_here

        with open_fleet() as fleet, counting("retain", hidden=json) as count:
            settings = fleet.settings
            done = retain_here(
                local_store(settings), fleet.registry, settings, dry_run=dry_run,
                each=lambda *, step, total, **_: count(step, total),
            )  # fmt: skip
        result, job = done.to_dict(), None
    else:
        with open_fleet() as fleet:
            handle = fleet.crash_retain(host, dry_run=dry_run)
            answer = finished(handle, f"retain {printable(host)}", no_wait=no_wait, timeout=timeout, json=json)
        if answer is None:
            return
        result, job = answer, handle.id
    if json:
        emit_json({"job": job, "result": result})
    else:
        _print_retained(result)
    if result["failed"]:
        raise errors.OperationFailed(reason=f"{len(result['failed'])} crash reports could not be looked after")


def _print_retained(result: dict[str, Any]) -> None:
    for each in result["taken"]:
        line(escape(f"{each['report']}  {each['reason']}"))
    for title in ("found", "lost", "without_package", "orphans"):
        for name in result[title]:
            line(escape(f"{name}  {title.replace('_', ' ')}"))
    for each in result["failed"]:
        note(f"failed: {each['report']}: {each['reason']}")
    what = "would go" if result["dry_run"] else "deleted"
    size = human_bytes(result["removed_bytes"])
    line(f"{result['removed']:,} of {result['reports']:,} crash reports {what}, {size}")
