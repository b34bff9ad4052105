"""Commands about workspaces: register, ls, show, touch, pin, unpin, release."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mothball import errors
from mothball.cli.output import JsonFlag, emit_json, emit_json_array, line, note, pairs, table
from mothball.cli.session import open_fleet, who
from mothball.cli.text import age, escape, human_bytes, parse_duration, time_text

if TYPE_CHECKING:
    from mothball.registry import Workspace
    from mothball.registry.lifecycle import ResumeResult

PANEL = "Workspaces"
WorkspaceId = Annotated[str, typer.Argument(metavar="ID", help="Workspace id, for example owner/repo#12.", show_default=False)]
MODES = ("ephemeral", "persistent")
HANDLES = {"runc": "container", "docker": "container", "podman": "container", "systemd": "unit", "command": "name"}
"""Drivers that are named on the command line, and the field of their handle."""
RUNTIMES = ", ".join(f"{driver}:{field.upper()}" for driver, field in HANDLES.items())


def add_to(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    for name, command in (
        ("register", register),
        ("ls", ls),
        ("show", show),
        ("touch", touch),
        ("pin", pin),
        ("unpin", unpin),
        ("release", release),
    ):
        app.command(name, rich_help_panel=PANEL)(command)


def register(
    workspace: WorkspaceId,
    *,
    path: Annotated[Path, typer.Option(help="The workspace's directory on its host.", show_default=False)],
    repo: Annotated[str | None, typer.Option(help="Repository; taken from an id like owner/repo#12.")] = None,
    number: Annotated[int | None, typer.Option(help="Number of the issue or pull request.")] = None,
    title: Annotated[str | None, typer.Option(help="What it is about.")] = None,
    agent: Annotated[str | None, typer.Option(help="Name of the agent; default: agent-N of the repository.")] = None,
    agent_id: Annotated[str | None, typer.Option(help="Id of the agent in your own system.")] = None,
    intent: Annotated[str | None, typer.Option(help="What the agent was asked to do.")] = None,
    changeset: Annotated[str | None, typer.Option(help="Id of the change being worked on.")] = None,
    base_commit: Annotated[str | None, typer.Option(help="Commit the work started from.")] = None,
    mode: Annotated[str, typer.Option(help="ephemeral or persistent.")] = MODES[0],
    expires_in: Annotated[str | None, typer.Option(help="Deadline from now: 30m, 24h, 7d.")] = None,
    pinned: Annotated[bool, typer.Option("--pinned", help="Exempt from eviction.", show_default=False)] = False,
    host: Annotated[str | None, typer.Option(help="Host that has the directory; default: this one.")] = None,
    retention: Annotated[str | None, typer.Option(help="Which snapshots are kept; `mothball retention` changes it.")] = None,
    policy: Annotated[
        str | None, typer.Option(help="Its own rules, such as ttl=7d,stop_after=2h; `mothball policy` changes them.")
    ] = None,
    pid: Annotated[int | None, typer.Option(min=2, help="Process that works in it, with all it starts; ended by a stop.")] = None,
    runtime: Annotated[str | None, typer.Option(metavar="DRIVER:NAME", help=f"Or what else runs in it: {RUNTIMES}.")] = None,
    health_url: Annotated[
        str | None, typer.Option(help="Where it says that it is well, such as http://127.0.0.1:8080/healthz.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Register a directory. The same id with the same path again is the same record; nothing is captured yet."""
    if mode not in MODES:
        raise errors.InvalidParams(f"--mode must be ephemeral or persistent, not {mode!r}")
    fields: dict[str, Any] = {
        "repo": repo, "number": number, "title": title, "agent_name": agent, "agent_id": agent_id, "intent": intent,
        "changeset_id": changeset, "base_commit": base_commit, "mode": mode, "pinned": pinned,
        "expires_in_ms": None if expires_in is None else int(parse_duration(expires_in) * 1000),
    }  # fmt: skip
    own: dict[str, Any] = {} if policy is None else _rules(policy)
    if retention is not None:
        own["retention"] = retention
    if own:
        fields["policy"] = own
    if found := _runtime(pid, runtime, health_url, here=host is None):
        fields["runtime"] = found
    if host is not None:
        fields["host"] = host
    else:
        _check_directory(path)
    with open_fleet() as fleet:
        record, created = fleet.register_new(workspace, path, **fields)
    if json:
        emit_json({"created": created, "workspace": record.to_dict()})
        return
    agent_text = f" for {record.agent_name}" if record.agent_name else ""
    line(escape(f"{'registered' if created else 'already registered'} {record.id}: {record.path} on {record.host}{agent_text}"))


def _rules(text: str) -> dict[str, Any]:
    from mothball.policy import parse_text

    return parse_text(text)


def _runtime(pid: int | None, text: str | None, health_url: str | None, *, here: bool) -> dict[str, Any]:
    """The runtime that ``--pid`` or ``--runtime`` names; the registry checks its fields."""
    found: dict[str, Any] = {}
    if pid is not None:
        if text is not None or not here:
            raise errors.InvalidParams("--pid is for a process of this machine, and instead of --runtime")
        from mothball.runtime import handle_of_pid

        found = dict(handle_of_pid(pid))
    elif text is not None:
        driver, _, name = text.partition(":")
        if text != "none" and (driver not in HANDLES or not name):
            raise errors.InvalidParams(f"--runtime {text!r}: write {RUNTIMES}, or none; a process is named by --pid")
        found = {"driver": driver} | ({HANDLES[driver]: name} if name else {})
    if health_url is not None:
        if not found:
            raise errors.InvalidParams("--health-url needs --pid or --runtime: it is asked where that runs")
        found["health_url"] = health_url
    return found


def _check_directory(path: Path) -> None:
    # Only for this machine: the path of another host cannot be looked at from here, its worker checks it.
    if not path.expanduser().exists():
        raise errors.SourceMissing(path=str(path), reason="it does not exist on this machine; --host names another one")
    if not path.expanduser().is_dir():
        raise errors.SourceMissing(path=str(path), reason="it is not a directory")


def ls(
    repo: Annotated[str | None, typer.Option(help="Only this repository.")] = None,
    host: Annotated[str | None, typer.Option(help="Only this host.")] = None,
    state: Annotated[str | None, typer.Option(help="Only this state.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most this many.")] = 1000,
    json: JsonFlag = False,
) -> None:
    """List the registered workspaces, oldest first."""
    with open_fleet() as fleet:
        found = fleet.list(repo=repo, host=host, state=state, limit=limit)
        now = fleet.registry.time_ms()
    if json:
        emit_json_array(record.to_dict() for record in found)
        return
    table(
        ("ID", "STATE", "HOST", "GEN", "SIZE", "FILES", "CAPTURED", "ACTIVE", "AGENT", "FLAGS"),
        (
            (
                record.id,
                record.state,
                record.host,
                record.generation,
                human_bytes(record.bytes) if record.digest else "-",
                record.files if record.digest else "-",
                age(record.last_good_at, now),
                age(record.last_active, now),
                record.agent_name or "-",
                _flags(record),
            )
            for record in found
        ),
        right=("GEN", "SIZE", "FILES"),
    )


def _flags(record: Workspace) -> str:
    flags = [
        *(["pinned"] if record.pinned else []),
        *(["held"] if record.holds else []),
        *(["failing"] if record.last_error else []),
        *(["rebuilt"] if record.rebuilt_at else []),
    ]
    return ",".join(flags) or "-"


def show(workspace: WorkspaceId, json: JsonFlag = False) -> None:
    """Show everything that is known of one workspace."""
    with open_fleet() as fleet:
        record = fleet.get(workspace)
        now = fleet.registry.time_ms()
    if json:
        emit_json(record.to_dict())
        return
    captured = bool(record.digest)
    pairs(
        (
            ("id", record.id),
            ("state", f"{record.state} ({record.state_reason})" if record.state_reason else record.state),
            ("host", record.host),
            ("path", record.path),
            ("mode", record.mode),
            ("repo", record.repo),
            ("number", record.number),
            ("title", record.title),
            ("agent", record.agent_name),
            ("agent id", record.agent_id),
            ("intent", record.intent),
            ("change", record.changeset_id),
            ("base commit", record.base_commit),
            ("created", f"{time_text(record.created_at)} ({age(record.created_at, now)})"),
            ("active", f"{time_text(record.last_active)} ({age(record.last_active, now)}, {record.last_signal})"),
            ("expires", time_text(record.expires_at) if record.expires_at else None),
            ("pinned", (record.pin_reason or "yes") if record.pinned else None),
            ("holds", "; ".join(_hold_text(hold) for hold in record.holds)),
            ("runtime", _runtime_text(record.runtime)),
            ("policy", ",".join(f"{name}={value}" for name, value in record.policy.items())),
            ("generation", record.generation if captured else "none yet; `mothball capture` makes one"),
            ("digest", record.digest),
            ("size", f"{human_bytes(record.bytes)} in {record.files} files" if captured else None),
            ("snapshots", record.snapshots or None),
            ("largest", human_bytes(record.high_water_bytes) if captured else None),
            ("captured", f"{time_text(record.last_good_at)} ({age(record.last_good_at, now)})" if record.last_good_at else None),
            ("last error", record.last_error),
            ("rebuilt", time_text(record.rebuilt_at) if record.rebuilt_at else None),
            ("unknown", ", ".join(record.unknown)),
        )
    )


def _hold_text(hold: Any) -> str:
    if not isinstance(hold, dict):
        return str(hold)
    return f"{hold.get('id', '')}: {hold.get('reason', '')}" + (f" (by {hold['by']})" if hold.get("by") else "")


def _runtime_text(runtime: dict[str, Any]) -> str:
    driver = runtime.get("driver")
    if driver in {None, "none"}:
        return ""
    return f"{driver} " + " ".join(f"{name}={value}" for name, value in runtime.items() if name != "driver")


def touch(
    workspace: WorkspaceId,
    signal: Annotated[str, typer.Option(help="What showed that the workspace is in use.")] = "touch",
    resume: Annotated[bool, typer.Option("--resume", help="Also bring a stopped one back.", show_default=False)] = False,
    agent_id: Annotated[str | None, typer.Option(help="With --resume: who goes on with a stranded one.")] = None,
    json: JsonFlag = False,
) -> None:
    """Say that the workspace is in use; touches within 30 s of each other are one."""
    with open_fleet() as fleet:
        resumed = None
        if resume and (state := fleet.get(workspace).state) in {"stopped", "stranded"}:
            resumed = fleet.resume(workspace, agent_id=agent_id, by=who(""))
            check_resumed(workspace, resumed)
            note(f"note: {workspace} was {state}, and is active again")
        result = fleet.touch(workspace, signal)
    if json:
        told = {"moved": result.moved, "last_active": result.last_active, "signal": result.signal}
        emit_json(told | ({"resumed": resumed is not None} if resume else {}))
        return
    moved = "moved to" if result.moved else "stays at"
    line(escape(f"last activity {moved} {time_text(result.last_active)} ({result.signal})"))


def check_resumed(workspace: str, done: ResumeResult) -> None:
    """Raise what came of a resume that did not bring the workspace back (D-73, D-76)."""
    reason = done.workspace.state_reason
    if done.outcome == "contended":
        why = f"job {done.job} is ending it; try again when it is done" if done.job else "it has changed meanwhile; try again"
        raise errors.ResumeContended(id=workspace, reason=why)
    if done.outcome == "other_agent":
        agent = done.workspace.agent_id or "(none was named when it was registered)"
        raise errors.Stranded(id=workspace, reason=reason, agent=agent)
    if done.outcome == "abandoned":
        raise errors.Abandoned(id=workspace, reason=reason)
    if done.outcome == "not_stranded" and done.workspace.state != "active":
        raise errors.InvalidTransition(id=workspace, state=done.workspace.state, wanted="active")


def pin(
    workspace: WorkspaceId,
    reason: Annotated[str, typer.Option(help="Why; shown to everybody.")] = "",
    by: Annotated[str, typer.Option(help="Who asks.")] = "",
    json: JsonFlag = False,
) -> None:
    """Exempt a workspace from eviction; it still counts in the budget."""
    with open_fleet() as fleet:
        record = fleet.pin(workspace, reason, by)
    _answer(record, "pinned", json)


def unpin(workspace: WorkspaceId, json: JsonFlag = False) -> None:
    """Take the pin away."""
    with open_fleet() as fleet:
        record = fleet.unpin(workspace)
    _answer(record, "no longer pinned", json)


def _answer(record: Workspace, text: str, json: bool) -> None:
    if json:
        emit_json(record.to_dict())
    else:
        line(escape(f"{record.id} is {text}"))


def release(
    workspace: WorkspaceId,
    by: Annotated[str, typer.Option(help="Who asks.")] = "",
    json: JsonFlag = False,
) -> None:
    """Forget a workspace. Its directory is not touched; doing it twice, or for an unknown id, is no error."""
    with open_fleet() as fleet:
        released = fleet.release(workspace, by)
    if json:
        emit_json({"id": workspace, "released": released})
    else:
        line(escape(f"{workspace} released" if released else f"{workspace} was not registered"))
