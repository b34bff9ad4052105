"""`mothball exec`: run a command in a workspace, and file a crash report when it fails."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from mothball import errors
from mothball.cli.output import JsonFlag, emit_error, emit_json_line, note
from mothball.cli.session import open_fleet, who
from mothball.cli.text import human_bytes, parse_size, printable
from mothball.cli.workspaces import WorkspaceId

if TYPE_CHECKING:
    from mothball.client import Fleet
    from mothball.client_crash import CrashJob, CrashResult
    from mothball.crash.watch import Watched
    from mothball.registry import Workspace

PANEL = "Crash reports"
EXIT_NOT_FOUND = 127
_LEAST_MEMORY = 1024**2
_QUEUED_SECONDS = 2.0
"""So long it is waited for a worker to take up the report,"""
_MADE_SECONDS = 10.0
"""and so long for it to be made: whoever sits there wants its id, and whoever runs a build its end."""


def add_to(app: typer.Typer) -> None:
    """Add this module's command to `app`."""
    app.command("exec", rich_help_panel=PANEL)(execute)


def execute(
    workspace: WorkspaceId,
    command: Annotated[list[str], typer.Argument(metavar="-- CMD...", help="The command, after --.", show_default=False)],
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory limit, such as 2GiB, where a cgroup can be made.", show_default=False)
    ] = None,
    log: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write its output to FILE; a report keeps the end.", show_default=False)
    ] = None,
    no_report: Annotated[bool, typer.Option("--no-report", help="File no crash report.", show_default=False)] = False,
    json: JsonFlag = False,
) -> int:
    """Run a command in a workspace's directory, and file a crash report when it fails.

    The workspace is in use while it runs. At a terminal it has one of its own, else its output passes through; signals are passed
    on, and the exit code is its own (128 and the number for a signal). A failure that somebody asked for (Ctrl-C, kill) files no
    report. MOTHBALL_* variables do not reach the command: with the fleet's password, what runs in a workspace could change every
    other one. With --json the last line of standard error is an object that says how it ended; all before it is the command's.
    """
    from mothball.crash.watch import find, watch

    limit = None if memory is None else parse_size(memory)
    if limit is not None and limit < _LEAST_MEMORY:
        raise errors.InvalidParams("--memory must be at least 1MiB")
    with open_fleet() as fleet:
        record = fleet.get(workspace)
        place = _directory(fleet, record)
        try:
            find(command, place)
        except errors.NotFound as error:
            emit_error(error, as_json=json)
            return EXIT_NOT_FOUND
        with ExitStack() as stack:
            # Until the report is filed: a workspace whose command has just crashed is not idle.
            stack.enter_context(fleet.active(workspace))
            file = stack.enter_context(_open_log(log)) if log is not None else None
            ended = watch(command, cwd=place, env=_environment(), memory=limit, log=file)
            if limit is not None and ended.no_cgroup and not json:
                note(f"note: it ran without the memory limit: {ended.no_cgroup}")
            filed = _report(fleet, workspace, command, ended, log) if ended.failed and not no_report else {}
            if json:
                _tell(workspace, ended, filed)
            elif filed:
                _note(command, ended, filed)
        return ended.status


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("MOTHBALL_")}


def _directory(fleet: Fleet, record: Workspace) -> Path:
    if record.host != fleet.settings.host:
        raise errors.InvalidParams(f"workspace {record.id!r} lies on host {record.host!r}: run this there")
    place = Path(record.path)
    if not place.is_dir():
        raise errors.SourceMissing(f"{record.path!r} is not there: nothing can run in it", path=record.path, reason="no directory")
    return place


def _open_log(path: Path) -> BinaryIO:
    """A new file, or one that is appended to; never through a link."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        return os.fdopen(os.open(path, flags, 0o600), "ab")
    except OSError as error:
        raise errors.InvalidParams(f"--log {str(path)!r} cannot be written: {error.strerror}") from None


def _report(fleet: Fleet, workspace: str, command: list[str], ended: Watched, log: Path | None) -> dict[str, Any]:
    """File the report: its job, or why there is none. What goes wrong with it changes nothing: the command's exit code counts."""
    try:
        job = fleet.crash_report(
            workspace,
            _without_secrets(fleet, ended.output),
            exit_code=ended.exit_code,
            signal=ended.signal,
            command=command,
            env=_environment(),
            cgroup=ended.cgroup,
            log=None if log is None else str(log.absolute()),
            by=who(""),
        )
    except errors.MothballError as error:
        return {"error": error.to_dict()}
    try:
        result = _soon(job)
    except errors.MothballError as error:
        return {"job": job.id, "error": error.to_dict()}
    except KeyboardInterrupt:  # ends the waiting only
        result = None
    return {"job": job.id} if result is None else {"job": job.id, "report": result.id, "count": result.count}


def _soon(job: CrashJob) -> CrashResult | None:
    """What was made of it within seconds, None while it waits or is made; raises what the job failed with."""
    from mothball.handles import FINAL_STATES

    for seconds in (_QUEUED_SECONDS, _MADE_SECONDS):
        try:
            return job.wait(seconds)
        except errors.TimedOut:
            state = job.state
            if state in FINAL_STATES:  # it was the job that took too long
                raise
            if state != "running":
                return None
    return None


def _note(command: list[str], ended: Watched, filed: dict[str, Any]) -> None:
    """The report's id when it was made at once; else its job, which goes on without us."""
    note(f"{printable(command[0])} {_how(ended)}")
    job, report, error = filed.get("job"), filed.get("report"), filed.get("error")
    if error is not None and job is None:
        note(f"error: no crash report could be filed: {error['code']}: {error['message']}")
    elif error is not None:
        note(f"error: the crash report was not made: {error['code']}: {error['message']} (`mothball job {job}` shows it)")
    elif report is None:
        note(f"crash report: job {job} (`mothball job {job}` follows it, `mothball crash-reports` lists them)")
    elif filed["count"] > 1:
        note(f"crash report: {report}, where the same failure is counted as number {filed['count']:,}")
    else:
        note(f"crash report: {report} (`mothball crash-reports show {report}` shows it)")


def _tell(workspace: str, ended: Watched, filed: dict[str, Any]) -> None:
    cgroup = ended.cgroup or {}
    facts = {
        "workspace": workspace, "exit_code": ended.exit_code, "signal": ended.signal, "core_dumped": ended.core_dumped,
        "asked": ended.asked, "oom_killed": ended.oom_killed, "seconds": round(ended.seconds, 3),
        "output_bytes": ended.output_bytes, "memory_peak": cgroup.get("memory_peak"), "no_cgroup": ended.no_cgroup,
        "job": filed.get("job"), "report": filed.get("report"), "error": filed.get("error"),
    }  # fmt: skip
    emit_json_line(facts, to=sys.stderr)


def _without_secrets(fleet: Fleet, output: str) -> str:
    """`output` without the secrets that its environment gave to the command: `set -x` prints them without their names."""
    from mothball.redact import redactor_for

    redactor = redactor_for(fleet.settings, fleet.registry)
    redactor.env(os.environ)
    redactor.remember()
    return redactor.text(output)


def _how(ended: Watched) -> str:
    if ended.oom_killed:
        peak = (ended.cgroup or {}).get("memory_peak")
        return "was killed for want of memory" + (f", at {human_bytes(peak)}" if peak else "")
    if ended.signal is not None:
        from mothball.crash.given import signal_name

        return f"was killed by {signal_name(ended.signal)}" + (", with a core dump" if ended.core_dumped else "")
    return f"failed with exit code {ended.exit_code}"
