"""Commands about a workspace's life: hold, unhold, mark, stop, resume, evict, purge."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mothball import errors
from mothball.cli.output import JsonFlag, emit_json, line, note
from mothball.cli.session import open_fleet, who
from mothball.cli.text import escape, human_bytes, printable
from mothball.cli.waiting import NoWait, Timeout, finished
from mothball.cli.workspaces import WorkspaceId, check_resumed

if TYPE_CHECKING:
    from mothball.registry import Workspace

PANEL = "Lifecycle"
SHOWN = 20
By = Annotated[str, typer.Option(help="Who asks; default: your login name.")]
Reason = Annotated[str, typer.Option(help="Why; kept with it and shown to everybody.")]


def add_to(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    for name, command in (
        ("hold", hold),
        ("unhold", unhold),
        ("mark", mark),
        ("stop", stop),
        ("resume", resume),
        ("evict", evict),
        ("purge", purge),
    ):
        app.command(name, rich_help_panel=PANEL)(command)


def hold(
    workspace: WorkspaceId,
    reason: Annotated[str, typer.Option(help="Why; shown to everybody.", show_default=False)],
    by: By = "",
    json: JsonFlag = False,
) -> None:
    """Veto every reclaim of a workspace until the hold is lifted: no stop, no eviction, no purge, no retention."""
    with open_fleet() as fleet:
        record = fleet.hold(workspace, reason, who(by))
    _answer(record, f"held: {reason}", json)


def unhold(
    workspace: WorkspaceId,
    hold_id: Annotated[str | None, typer.Option("--hold", metavar="HOLD", help="Only this hold, as `show` lists it.")] = None,
    by: By = "",
    json: JsonFlag = False,
) -> None:
    """Lift the holds of a workspace, or one of them."""
    with open_fleet() as fleet:
        record = fleet.unhold(workspace, hold_id, who(by))
    still = f"still held: {len(record.holds)} other {'hold' if len(record.holds) == 1 else 'holds'}"
    _answer(record, still if record.holds else "held no longer", json)


def mark(
    workspace: WorkspaceId,
    state: Annotated[str, typer.Argument(metavar="STATE", help="submitted, merged or active.", show_default=False)],
    reason: Reason = "",
    by: By = "",
    json: JsonFlag = False,
) -> None:
    """Say where its change is: submitted (never evicted), merged, or active again when it was withdrawn."""
    with open_fleet() as fleet:
        record = fleet.mark(workspace, state, by=who(by), reason=reason)
    _answer(record, record.state, json)


def stop(
    workspace: WorkspaceId,
    *,
    force: Annotated[bool, typer.Option("--force", help="Also while somebody works there.", show_default=False)] = False,
    reason: Reason = "",
    by: By = "",
    no_wait: NoWait = False,
    timeout: Timeout = None,
    json: JsonFlag = False,
) -> None:
    """Stop a workspace: evidence, a last capture, its processes ended. Nothing is deleted; `mothball resume` goes on."""
    with open_fleet() as fleet:
        handle = fleet.stop(workspace, force=force, by=who(by), reason=reason)
        result = finished(handle, f"stop {printable(workspace)}", no_wait=no_wait, timeout=timeout, json=json)
    if result is None:
        return
    if json:
        emit_json({"job": handle.id, "result": result})
    elif result["stopped"]:
        _print_stopped(workspace, result)
    if not result["stopped"]:
        raise errors.Busy(what=f"workspace {workspace}", reason=f"it was not stopped: {result['detail']}")


HOW = {
    "was_dead": "nothing ran there",
    "term": "its processes ended when they were asked to",
    "kill": "its processes had to be killed",
}


def _print_stopped(workspace: str, result: dict[str, Any]) -> None:
    captured = result.get("captured")
    parts = [
        HOW.get(result.get("how", ""), ""),
        "" if captured is None else f"generation {captured['generation']} has what it left",
    ]
    parts = [part for part in (*parts, str(result["detail"])) if part]
    line(printable(f"{workspace} is stopped" + (f": {'; '.join(parts)}" if parts else "")))
    line(escape(f"`mothball resume {workspace}` goes on with it"))


def resume(
    workspace: WorkspaceId,
    agent_id: Annotated[str | None, typer.Option(help="Who goes on; a stranded workspace is its agent's alone.")] = None,
    by: By = "",
    json: JsonFlag = False,
) -> None:
    """Bring a stopped or stranded workspace back to active. Starting its processes is the producer's."""
    with open_fleet() as fleet:
        done = fleet.resume(workspace, agent_id=agent_id, by=who(by))
    check_resumed(workspace, done)
    if json:
        emit_json({"outcome": done.outcome, "workspace": done.workspace.to_dict()})
    else:
        line(escape(f"{workspace} is active" + ("" if done.outcome == "ok" else "; it was already")))


def evict(
    workspace: WorkspaceId,
    *,
    force: Annotated[
        bool, typer.Option("--force", help="Also while a producer is present or jobs are queued.", show_default=False)
    ] = False,
    reason: Reason = "",
    by: By = "",
    json: JsonFlag = False,
) -> None:
    """Drop a workspace's record now. Directory and captures stay, and `mothball undelete` brings it back for a while."""
    with open_fleet() as fleet:
        fleet.evict(workspace, force=force, by=who(by), reason=reason)
        seconds = fleet.settings.tombstone_seconds
    if json:
        emit_json({"id": workspace, "evicted": True})
    else:
        from mothball.durations import show

        line(escape(f"{workspace} is evicted; `mothball undelete {workspace}` brings it back within {show(seconds * 1000)}"))


def purge(
    workspace: WorkspaceId,
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what is missing; delete nothing.", show_default=False)] = False,
    force: Annotated[bool, typer.Option("--force", help="Delete even what no capture holds.", show_default=False)] = False,
    i_know: Annotated[bool, typer.Option("--i-know", help="With --force: it is gone for good.", show_default=False)] = False,
    reason: Reason = "",
    by: By = "",
    no_wait: NoWait = False,
    timeout: Timeout = None,
    json: JsonFlag = False,
) -> None:
    """Evict a workspace and delete its directory: only when a capture that was read back holds all of it."""
    if force and not i_know and not dry_run:
        raise errors.InvalidParams(
            "--force deletes what no capture holds, for good; say --i-know as well, or look first: `mothball purge ID --dry-run`"
        )
    with open_fleet() as fleet:
        handle = fleet.purge(workspace, force=force, i_know=i_know, dry_run=dry_run, by=who(by), reason=reason)
        result = finished(handle, f"purge {printable(workspace)}", no_wait=no_wait, timeout=timeout, json=json)
    if result is None:
        return
    if json:
        emit_json({"job": handle.id, "result": result})
    else:
        _print_purged(workspace, result, dry_run=dry_run)


def _print_purged(workspace: str, result: dict[str, Any], *, dry_run: bool) -> None:
    missing = [str(each) for each in result["missing"]]
    receipt = result["receipt"]
    if dry_run and missing:
        line(escape(f"{workspace} would not be purged"))
    elif dry_run:
        first = f"; {result['uncaptured']:,} changes are captured first" if result["uncaptured"] else ""
        line(escape(f"{workspace} can be purged{first}"))
    else:
        forced = ", although something was missing" if missing else ""
        line(escape(f"{workspace} is purged{forced}; `mothball undelete {workspace}` and `mothball restore` bring it back"))
    for text in missing[:SHOWN]:
        line(f"  missing: {printable(text)}")
    more = len(missing) + result.get("missing_more", 0) - SHOWN
    if more > 0:
        line(f"  and {more:,} more; --json has them")
    if receipt and receipt["digest"]:
        back = "read back" if receipt["verified_at"] else "not read back"
        line(f"receipt: {receipt['digest']}, {receipt['files']:,} files, {human_bytes(receipt['bytes'])}, {back}")
    if dry_run and missing:
        note("note: `--force --i-know` overrules all but a hold and the state; an event keeps who did and what was missing")


def _answer(record: Workspace, text: str, json: bool) -> None:
    if json:
        emit_json(record.to_dict())
    else:
        line(escape(f"{record.id} is {text}"))
