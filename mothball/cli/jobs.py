"""Commands about work: capture, jobs, job, cancel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mothball import errors
from mothball.cli.output import JobProgress, JsonFlag, describe_progress, emit_json, emit_json_array, line, note, pairs, table
from mothball.cli.session import open_fleet
from mothball.cli.text import age, escape, human_bytes, human_seconds, parse_duration, parse_size, printable, time_text
from mothball.cli.workspaces import WorkspaceId

if TYPE_CHECKING:
    from mothball.capture import CaptureResult
    from mothball.registry import Job

PANEL = "Jobs"
JobId = Annotated[str, typer.Argument(metavar="JOB", help="Job id, as `capture` and `jobs` print it.", show_default=False)]

OMISSION_HINTS = {
    "ignored": "an ignore rule says so; see .mothballignore and --gitignore",
    "too_large": "over the size cap of a file; raise --max-file-bytes or use --profile full",
    "unreadable": "the worker's user may not read it",
    "special": "sockets, FIFOs and devices are never opened",
    "vanished": "deleted while it was read; capture again",
    "whiteout_name": "an image cannot hold names that begin with .wh.",
    "other_filesystem": "mounted from elsewhere; MOTHBALL_ONE_FILE_SYSTEM=false goes in",
}
SHOWN_PATHS = 3


def add_to(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    for name, command in (("capture", capture), ("jobs", jobs), ("job", job), ("cancel", cancel)):
        app.command(name, rich_help_panel=PANEL)(command)


def capture(
    workspace: WorkspaceId,
    *,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the end and print the result.", show_default=False)] = False,
    timeout: Annotated[str | None, typer.Option(help="Longest wait, for example 90s or 10m; implies --wait.")] = None,
    path: Annotated[
        list[str] | None, typer.Option("--path", help="Read this file again even if it looks unchanged; repeatable.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Write one fresh layer.", show_default=False)] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Read back what was written.", show_default=False)] = False,
    profile: Annotated[str | None, typer.Option(help="full: any size; light: at most 1 MiB per file.")] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Pattern to leave out, as in .gitignore; repeatable.")] = None,
    gitignore: Annotated[bool | None, typer.Option("--gitignore/--no-gitignore", help="Obey .gitignore files.")] = None,
    exclude_caches: Annotated[
        bool | None, typer.Option("--exclude-caches/--no-exclude-caches", help="Leave out folders tagged CACHEDIR.TAG.")
    ] = None,
    max_file_bytes: Annotated[str | None, typer.Option(help="Largest file, for example 20MiB.")] = None,
    max_total_bytes: Annotated[str | None, typer.Option(help="Largest workspace, for example 2GiB.")] = None,
    max_files: Annotated[int | None, typer.Option(min=1, help="Most entries.")] = None,
    json: JsonFlag = False,
) -> None:
    """Capture a workspace as an OCI image. A request that arrives while one is queued joins it."""
    options: dict[str, Any] = {
        "profile": profile,
        "ignore": list(ignore) if ignore else None,
        "use_gitignore": gitignore,
        "exclude_caches": exclude_caches,
        "max_file_bytes": None if max_file_bytes is None else parse_size(max_file_bytes),
        "max_total_bytes": None if max_total_bytes is None else parse_size(max_total_bytes),
        "max_files": max_files,
    }
    seconds = None if timeout is None else parse_duration(timeout)
    given = {name: value for name, value in options.items() if value is not None}
    with open_fleet() as fleet:
        handle = fleet.capture(workspace, paths=path or None, full=full, verify=verify, options=given)
        if not wait and seconds is None:
            if json:
                emit_json({"job": handle.id, "joined": handle.joined})
            else:
                joined = " (joined a queued job)" if handle.joined else ""
                line(escape(f"job {handle.id}{joined}; `mothball job {handle.id}` shows it"))
            return
        try:
            with JobProgress(f"capture {printable(workspace)}", hidden=json) as update:
                result = handle.wait(seconds, on_poll=update)
        except (KeyboardInterrupt, errors.TimedOut):
            note(f"job {handle.id} goes on: `mothball job {handle.id}` shows it, `mothball cancel {handle.id}` ends it")
            raise
    if json:
        emit_json({"job": handle.id, "joined": handle.joined, "result": result.to_dict()})
    else:
        _print_capture(result)


def _print_capture(result: CaptureResult) -> None:
    line(result.digest)
    if result.changed:
        parts = [f"{count:,} {word}" for count, word in _changes(result) if count]
        line(f"generation {result.generation}: {', '.join(parts) or 'metadata changed'}")
    else:
        line(f"unchanged since generation {result.generation}")
    squashed = ", written afresh" if result.squashed else ""
    line(
        f"{result.files:,} files, {human_bytes(result.bytes)}; {human_bytes(result.stored_bytes)} added to the store, "
        f"{result.layers} {'layer' if result.layers == 1 else 'layers'}{squashed}; {human_seconds(result.seconds)}"
    )
    for reason, count in sorted(result.omitted.items()):
        hint = OMISSION_HINTS.get(reason, "")
        line(f"left out: {count:,} {printable(reason)}" + (f" ({hint})" if hint else ""))
        of_reason = [str(item.get("path", "")) for item in result.omissions if item.get("reason") == reason]
        for name in of_reason[:SHOWN_PATHS]:
            line(f"  {printable(name)}")
        if count > SHOWN_PATHS:
            line(f"  and {count - min(len(of_reason), SHOWN_PATHS):,} more; --json has the list")
    for name in result.torn:
        line(f"torn: {printable(name)} changed while it was read")

    for state in result.git:
        line(printable(_git_line(state)))


def _git_line(state: dict[str, Any]) -> str:
    """`.git` itself is left out, so people want to know what of it exists nowhere else."""
    parts = [f"{state.get('branch') or 'detached'} at {str(state.get('head') or 'no commit')[:12]}"]
    if state.get("dirty"):
        parts.append("uncommitted changes")
    parts += [
        f"{state[key]} {text}" for key, text in (("unpushed", "commits not pushed"), ("stashes", "stashes")) if state.get(key)
    ]
    if state.get("error"):
        parts.append(str(state["error"]))
    return f"git {state.get('path') or '.'}: {', '.join(parts)}"


def _changes(result: CaptureResult) -> tuple[tuple[int, str], ...]:
    return (result.added, "added"), (result.modified, "modified"), (result.deleted, "deleted")


def jobs(
    state: Annotated[str | None, typer.Option(help="queued, running, succeeded, failed, cancelled or dead.")] = None,
    workspace: Annotated[str | None, typer.Option(help="Only this workspace.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most this many.")] = 100,
    json: JsonFlag = False,
) -> None:
    """List jobs, newest first."""
    with open_fleet() as fleet:
        found = fleet.jobs(state=state, workspace=workspace, limit=limit)
        now = fleet.registry.time_ms()
    if json:
        emit_json_array(record.to_dict() for record in found)
        return
    table(
        ("JOB", "TASK", "WORKSPACE", "STATE", "SUBMITTED", "TOOK", "RUNS", "NOTE"),
        (
            (
                record.id,
                record.task,
                record.workspace or "-",
                record.state,
                age(record.submitted_at, now),
                _took(record, now),
                record.deliveries,
                _note(record),
            )
            for record in found
        ),
        right=("TOOK", "RUNS"),
    )


def _took(record: Job, now: int) -> str:
    if not record.started_at:
        return "-"
    return human_seconds(max((record.finished_at or now) - record.started_at, 0) / 1000)


def _note(record: Job) -> str:
    if record.error_code and record.state != "succeeded":
        return f"{record.error_code}: {record.error}"
    if record.state == "running":
        return ("cancelling; " if record.cancel_requested else "") + describe_progress(record)
    return "-"


def job(job_id: JobId, json: JsonFlag = False) -> None:
    """Show one job: where it is, how often it ran, what came of it."""
    with open_fleet() as fleet:
        record = fleet.job_record(job_id)
        now = fleet.registry.time_ms()
    if json:
        emit_json(record.to_dict())
        return
    pairs(
        (
            ("job", record.id),
            ("task", record.task),
            ("workspace", record.workspace),
            ("state", record.state + (" (cancel requested)" if record.cancel_requested else "")),
            ("queue", record.queue),
            ("worker", record.worker),
            ("origin", record.origin),
            ("submitted", f"{time_text(record.submitted_at)} ({age(record.submitted_at, now)})"),
            ("started", time_text(record.started_at) if record.started_at else None),
            ("finished", time_text(record.finished_at) if record.finished_at else None),
            ("took", _took(record, now) if record.started_at else None),
            ("next try", time_text(record.due_at) if record.due_at and record.state == "queued" else None),
            ("runs", f"{record.deliveries} ({record.attempts} failed)" if record.attempts else record.deliveries),
            ("joined", record.joined or None),
            ("progress", describe_progress(record) if record.state == "running" else None),
            ("error", f"{record.error_code}: {record.error}" if record.error_code else None),
        )
    )
    for name, value in (record.outcome or {}).items():
        if isinstance(value, (str, int, float, bool)):
            line(f"  {printable(name)}: {printable(str(value))}")


def cancel(job_id: JobId, json: JsonFlag = False) -> None:
    """Cancel a job: at once while it is queued, at its next checkpoint while it runs."""
    with open_fleet() as fleet:
        result = fleet.registry.jobs.cancel(job_id)
    if json:
        emit_json({"job": job_id, "cancelled": result.cancelled, "state": result.state})
    elif not result.cancelled:
        line(escape(f"nothing to cancel: job {job_id} is {result.state}"))
    elif result.state == "running":
        line(escape(f"job {job_id} stops at its next checkpoint"))
    else:
        line(escape(f"job {job_id} is cancelled"))
