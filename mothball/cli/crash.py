"""`mothball crash-report`: file what is known of a failure, with the capture of its workspace and a package without secrets."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mothball import errors
from mothball.cli.output import JsonFlag, emit_json, line, note, pairs
from mothball.cli.session import open_fleet, who
from mothball.cli.text import escape, human_bytes, printable
from mothball.cli.waiting import NoWait, Timeout, finished
from mothball.cli.workspaces import WorkspaceId

if TYPE_CHECKING:
    from mothball.client import Fleet
    from mothball.client_crash import CrashResult

PANEL = "Crash reports"
MAX_ERROR = 64 * 1024**2
"""Bytes of an error text that are read; head and tail of it are kept."""
_MEMBER = 1536
"""About what one member costs in a tar beside its content: a header, often a second one, and padding."""
_LINE = 100
"""Characters of a text that a dry run shows."""


def add_to(app: typer.Typer) -> None:
    """Add this module's command to `app`."""
    app.command("crash-report", rich_help_panel=PANEL)(crash_report)


def crash_report(
    workspace: WorkspaceId,
    *,
    error: Annotated[str | None, typer.Option(metavar="TEXT", help="The text of the failure.", show_default=False)] = None,
    error_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="Read it from a file, or - for stdin.", show_default=False)
    ] = None,
    title: Annotated[str, typer.Option(help="One line for lists; default: from the text.", show_default=False)] = "",
    exit_code: Annotated[int | None, typer.Option(help="With which the command ended.", show_default=False)] = None,
    signal: Annotated[str | None, typer.Option(help="That ended it: KILL, SIGSEGV, 11.", show_default=False)] = None,
    log: Annotated[
        str | None, typer.Option(metavar="FILE", help="Log file on the workspace's host; its end is kept.", show_default=False)
    ] = None,
    cgroup: Annotated[str | None, typer.Option(metavar="PATH", help="The cgroup it ran in.", show_default=False)] = None,
    pid: Annotated[int | None, typer.Option(help="A process of it that still runs.", show_default=False)] = None,
    command: Annotated[
        str | None, typer.Option("--cmd", metavar="CMD", help="The command that failed, as a shell has it.", show_default=False)
    ] = None,
    since: Annotated[
        str | None, typer.Option(metavar="REF", help="Compare with this; default: the newest snapshot.", show_default=False)
    ] = None,
    no_package: Annotated[bool, typer.Option("--no-package", help="The report only.", show_default=False)] = False,
    exclude_binaries: Annotated[
        bool, typer.Option("--exclude-binaries", help="Leave binary files out of the package.", show_default=False)
    ] = False,
    base: Annotated[
        str | None, typer.Option(metavar="OCI-REF", help="Image below the workspace in the package.", show_default=False)
    ] = None,
    no_capture: Annotated[bool, typer.Option("--no-capture", help="Take the last capture as it is.", show_default=False)] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be sent, and about how much is packaged.", show_default=False)
    ] = False,
    no_wait: NoWait = False,
    timeout: Timeout = None,
    json: JsonFlag = False,
) -> None:
    """File a crash report: evidence first, then a capture, a report and a package that runc can start, without secrets.

    The package stays on the workspace's host. The same failure again within a day is counted on the first report.
    """
    text = _error_text(error, error_file)
    with open_fleet() as fleet:
        given: dict[str, Any] = {
            "title": title, "exit_code": exit_code, "signal": signal, "log": log, "cgroup": cgroup, "pid": pid,
            "command": _words(command),
        }  # fmt: skip
        if dry_run:
            _estimate(fleet, workspace, fleet.crash_arguments(workspace, error=text, **given), package=not no_package, json=json)
            return
        binaries: Literal["include", "exclude"] = "exclude" if exclude_binaries else "include"
        handle = fleet.crash_report(
            workspace, text, **given, since=since, package=not no_package, binaries=binaries, base=base, capture=not no_capture,
            by=who(""),
        )  # fmt: skip
        result = finished(handle, f"crash report {printable(workspace)}", no_wait=no_wait, timeout=timeout, json=json)
    if result is None:
        return
    if json:
        from dataclasses import asdict

        emit_json({"job": handle.id, "result": asdict(result)})
    else:
        _print(result)


def _print(result: CrashResult) -> None:
    line(escape(result.id))
    if result.repeated:
        line(f"the same failure was reported before; counted there as number {result.count:,}, no new report was made")
    line(escape(result.title))
    if result.source == "last_good":
        note(f"note: the last good capture is packaged, for {result.reason}")
    if result.path:
        where = f"{result.path} on host {result.host}"
        line(escape(where) + f" ({human_bytes(result.bytes)}, {result.files:,} files{', sealed' if result.sealed else ''})")
    total = sum(result.redactions.values())
    if total:
        rules = ", ".join(f"{name} {count:,}" for name, count in result.redactions.items())
        line(escape(f"{total:,} secrets were replaced: {rules}"))
    note(f"`mothball crash-reports show {result.id}` shows it")


def _error_text(error: str | None, file: str | None) -> str:
    if error is not None and file is not None:
        raise errors.InvalidParams("give --error or --error-file, not both")
    if file is None:
        return error or ""
    if file == "-":
        return sys.stdin.buffer.read(MAX_ERROR).decode("utf-8", "surrogateescape")
    try:
        with Path(file).open("rb") as source:
            return source.read(MAX_ERROR).decode("utf-8", "surrogateescape")
    except OSError as problem:
        raise errors.InvalidParams(f"--error-file {file!r} cannot be read: {problem.strerror}") from None


def _words(command: str | None) -> list[str] | None:
    import shlex

    try:
        return None if command is None else shlex.split(command)
    except ValueError as error:
        raise errors.InvalidParams(f"--cmd: {error}") from None


def _estimate(fleet: Fleet, workspace: str, args: dict[str, Any], *, package: bool, json: bool) -> None:
    record = fleet.get(workspace)
    about = record.bytes + record.files * _MEMBER if package else 0
    shown = {name: value for name, value in args.items() if value not in (None, "", [], {})}
    if json:
        emit_json({"dry_run": True, "sent": shown, "files": record.files, "bytes": record.bytes, "package_bytes": about})
        return
    line("nothing was filed; this would be sent:")
    pairs(
        (name, value if len(str(value)) <= _LINE else f"{str(value)[:_LINE]}... ({len(str(value)):,} characters)")
        for name, value in shown.items()
    )
    if not record.digest:
        line("the workspace was never captured: how large it is is not known yet")
    elif package:
        line(f"the package would have about {human_bytes(about)}: {record.files:,} files in the last capture")
