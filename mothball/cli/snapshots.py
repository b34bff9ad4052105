"""Commands about snapshots: snapshot, snapshots, keep, forget, retain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mothball import errors
from mothball.cli.local import hosted, load_settings, local_store
from mothball.cli.output import JsonFlag, emit_json, emit_json_array, line, note, table
from mothball.cli.session import open_fleet
from mothball.cli.text import age, escape, human_bytes, human_seconds, printable, time_text
from mothball.cli.waiting import NoWait, Timeout, counting, finished
from mothball.cli.workspaces import WorkspaceId

if TYPE_CHECKING:
    from mothball.registry import Workspace
    from mothball.retention import Decision, Policy
    from mothball.store.snapshots import Snapshot, SnapshotResult

PANEL = "Captures"
TAKEN_SHOWN = 50
SnapshotNames = Annotated[list[str], typer.Argument(metavar="SNAP...", help="Names, such as snap-3.", show_default=False)]


def add_to(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    for name, command in (
        ("snapshot", snapshot),
        ("snapshots", snapshots),
        ("keep", keep),
        ("forget", forget),
        ("retain", retain),
        ("retention", retention),
    ):
        app.command(name, rich_help_panel=PANEL)(command)


def snapshot(
    workspace: WorkspaceId,
    *,
    fresh: Annotated[bool, typer.Option("--fresh", help="Capture first, in the same job.", show_default=False)] = False,
    label: Annotated[str, typer.Option(help="One line that names it.", show_default=False)] = "",
    note_text: Annotated[str, typer.Option("--note", help="Text to keep with it.", show_default=False)] = "",
    keep_it: Annotated[bool, typer.Option("--keep", help="Retention never takes it.", show_default=False)] = False,
    no_wait: NoWait = False,
    timeout: Timeout = None,
    json: JsonFlag = False,
) -> None:
    """Number the current capture as the next snap-N. Numbers are never given twice."""
    with open_fleet() as fleet:
        handle = fleet.snapshot(workspace, fresh=fresh, label=label, note=note_text, keep=keep_it)
        result = finished(handle, f"snapshot {printable(workspace)}", no_wait=no_wait, timeout=timeout, json=json)
    if result is None:
        return
    if json:
        emit_json({"job": handle.id, "result": result.to_dict()})
    else:
        _print_snapshot(result)


def _print_snapshot(result: SnapshotResult) -> None:
    line(f"{result.name}  {result.digest}")
    label = f"{escape(result.label)}: " if result.label else ""
    kept = ", kept" if result.keep else ""
    line(f"{label}generation {result.generation}, {_many(result.files, 'file')}, {human_bytes(result.bytes)}{kept}")
    if result.captured is not None:
        line("captured for it" if result.captured.get("changed") else "nothing had changed since the last capture")
        omitted: dict[str, int] = result.captured.get("omitted") or {}
        for reason, count in sorted(omitted.items()):
            line(f"left out: {count:,} {printable(reason)}")


def snapshots(workspace: WorkspaceId, json: JsonFlag = False) -> None:
    """List the snapshots in this host's store, oldest first, and what retention would do with each."""
    from mothball.store.snapshots import snapshots as snapshots_of

    settings = load_settings()
    record = hosted(settings, workspace)
    found = snapshots_of(local_store(settings).refs(workspace))
    policy, now = _policy(record)
    decisions = _decisions(policy, found, now)
    if json:
        emit_json_array(_fields(each, decision, policy) for each, decision in zip(found, decisions, strict=True))
        return
    table(
        ("SNAPSHOT", "WHEN", "KEEP", "GEN", "FILES", "SIZE", "LABEL", "RETENTION"),
        (
            (
                each.name,
                age(each.at, now) if now else time_text(each.at),
                "yes" if each.keep else "-",
                each.generation,
                each.files,
                human_bytes(each.bytes),
                each.label or "-",
                _fate(decision, policy, now),
            )
            for each, decision in zip(found, decisions, strict=True)
        ),
        right=("GEN", "FILES", "SIZE"),
    )
    if isinstance(policy, str):
        note(f"retention leaves this workspace alone: {policy}")
    elif policy is not None:
        note(f"retention: {policy.text}")


def _policy(record: Workspace | None) -> tuple[Policy | str | None, int]:
    """The policy of a workspace and the time of the registry in ms; (None, 0) when there is no record."""
    if record is None:
        return None, 0
    with open_fleet() as fleet:
        return fleet.registry.retentions.of(record), fleet.registry.time_ms()


def _decisions(policy: Policy | str | None, found: list[Snapshot], now: int) -> list[Decision | None]:
    from mothball.retention import decide

    if policy is None or isinstance(policy, str):
        return [None] * len(found)
    return list(decide(policy, found, now))


def _fields(each: Snapshot, decision: Decision | None, policy: Policy | str | None) -> dict[str, Any]:
    if decision is None:
        fate = None if policy is None else {"keep": True, "reasons": [str(policy)], "due_at": None}
    else:
        fate = {"keep": decision.keep, "reasons": decision.reasons, "due_at": decision.due_at}
    return {**each.to_dict(), "retention": fate}


def _fate(decision: Decision | None, policy: Policy | str | None, now: int) -> str:
    if decision is None:
        return "-" if policy is None else "left alone"
    if not decision.keep:
        return f"goes: {'; '.join(decision.reasons)}"
    until = f", for {human_seconds((decision.due_at - now) / 1000)} more" if decision.due_at is not None else ""
    return f"stays: {'; '.join(decision.reasons)}{until}"


def keep(
    workspace: WorkspaceId,
    names: SnapshotNames,
    *,
    off: Annotated[bool, typer.Option("--off", help="Lift the flag.", show_default=False)] = False,
    label: Annotated[str | None, typer.Option(help="Change the label as well.", show_default=False)] = None,
    note_text: Annotated[str | None, typer.Option("--note", help="Change the note as well.", show_default=False)] = None,
    no_wait: NoWait = False,
    timeout: Timeout = None,
    json: JsonFlag = False,
) -> None:
    """Protect snapshots: neither retention nor `forget` takes them until --off lifts that."""
    with open_fleet() as fleet:
        handle = fleet.keep(workspace, names, keep=not off, label=label, note=note_text)
        result = finished(handle, f"keep {printable(workspace)}", no_wait=no_wait, timeout=timeout, json=json)
    if result is None:
        return
    if json:
        emit_json({"job": handle.id, "result": result})
        return
    line(escape(f"{', '.join(result['snapshots'])}: {'kept no longer' if off else 'kept'}"))


def forget(
    workspace: WorkspaceId,
    names: SnapshotNames,
    *,
    reason: Annotated[str, typer.Option(help="Why; shown by `undelete` and `events`.", show_default=False)] = "",
    no_wait: NoWait = False,
    timeout: Timeout = None,
    json: JsonFlag = False,
) -> None:
    """Forget snapshots. They can be undeleted for a while; a collection gives their bytes back later."""
    with open_fleet() as fleet:
        handle = fleet.forget(workspace, names, reason=reason)
        result = finished(handle, f"forget {printable(workspace)}", no_wait=no_wait, timeout=timeout, json=json)
    if result is None:
        return
    if json:
        emit_json({"job": handle.id, "result": result})
        return
    if result["forgotten"]:
        line(escape(f"forgotten: {', '.join(result['forgotten'])}"))
    if result["already"]:
        line(escape(f"had gone before: {', '.join(result['already'])}"))


def retain(
    workspace: Annotated[str | None, typer.Argument(metavar="[ID]", help="Only this workspace.", show_default=False)] = None,
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go and why.", show_default=False)] = False,
    host: Annotated[str | None, typer.Option(help="Host whose store it is; default: this one, at once.")] = None,
    no_wait: NoWait = False,
    timeout: Timeout = None,
    json: JsonFlag = False,
) -> None:
    """Apply retention now: forget the snapshots that no rule keeps. Exit code 1 when a workspace failed."""
    if host is None:
        if no_wait or timeout is not None:
            raise errors.InvalidParams("--no-wait and --timeout are for a job; give --host as well")
        result = _retain_here(workspace, dry_run=dry_run, hidden=json)
        job = None
    else:
        with open_fleet() as fleet:
            handle = fleet.retain(host, workspace=workspace, dry_run=dry_run)
            answer = finished(handle, f"retain {printable(host)}", no_wait=no_wait, timeout=timeout, json=json)
        if answer is None:
            return
        result, job = answer, handle.id
    if json:
        emit_json({"job": job, "result": result})
    else:
        _print_retained(result)
    if result["failed"]:
        raise errors.OperationFailed(reason=f"retention failed for {len(result['failed'])} workspaces")


def _retain_here(workspace: str | None, *, dry_run: bool, hidden: bool) -> dict[str, Any]:
    from mothball.names import check_workspace_id
    from mothball.store.reserve import Reserve
    from mothball.store.retain import Retained, retain

    settings = load_settings()
    store = local_store(settings)
    if workspace is not None:
        check_workspace_id(workspace)
    with open_fleet() as fleet, counting("retain", hidden=hidden) as count:
        registry = fleet.registry.workspaces

        def done(retained: Retained) -> None:
            if not dry_run:
                gone = [taken.name for taken in retained.taken]
                reason = f"retention {retained.policy}"
                registry.note_snapshots(retained.workspace, settings.host, retained.count, forgotten=gone, reason=reason)

        wanted = list(fleet.registry.retentions.of_host(settings.host, workspace))
        now = fleet.registry.time_ms()
        reserve = Reserve(store, settings.reserve_bytes)
        report = retain(
            store, wanted, now_ms=now, dry_run=dry_run, reserve=reserve, each=lambda name: count(name, len(wanted)), done=done
        )
    return report.to_dict()


def retention(
    workspace: WorkspaceId,
    rules: Annotated[
        str | None,
        typer.Argument(metavar="[RULES]", help="last, within, hourly, daily, weekly, monthly; or all.", show_default=False),
    ] = None,
    *,
    default: Annotated[bool, typer.Option("--default", help="Follow the host's settings.", show_default=False)] = False,
    json: JsonFlag = False,
) -> None:
    """Show or change which snapshots of a workspace are kept, for example last=10,within=7d,daily=14."""
    if rules is not None and default:
        raise errors.InvalidParams("give rules or --default, not both")
    with open_fleet() as fleet:
        changed = rules is not None or default
        record = fleet.set_retention(workspace, rules) if changed else fleet.get(workspace)
        own = "retention" in record.policy
        policy = fleet.registry.retentions.of(record) if own or record.host == fleet.settings.host else None
    text = policy if policy is None or isinstance(policy, str) else policy.text
    if json:
        emit_json({"workspace": record.id, "retention": text, "own": own})
        return
    where = "its own" if own else f"from the settings of host {record.host}"
    line(
        escape(
            f"{text}  ({where})" if text is not None else f"it has none of its own and follows the settings of host {record.host}"
        )
    )


def _print_retained(result: dict[str, Any]) -> None:
    for item in result["taken"][:TAKEN_SHOWN]:
        why = "; ".join(item["reasons"])
        line(escape(f"{item['workspace']}  {item['name']}  {time_text(item['at'])}  {why}"))
    if result["removed"] > len(result["taken"][:TAKEN_SHOWN]):
        line(f"and {result['removed'] - len(result['taken'][:TAKEN_SHOWN]):,} more; --json has the list")
    for item in result["skipped"]:
        line(escape(f"left alone: {item['workspace']}: {item['reason']}"))
    for item in result["failed"]:
        note(f"failed: {item['workspace']}: {item['error']}")
    what = "would go" if result["dry_run"] else "forgotten"
    line(f"{_many(result['removed'], 'snapshot')} {what}, {result['kept']:,} stay, in {_many(result['workspaces'], 'workspace')}")


def _many(count: int, word: str) -> str:
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"
