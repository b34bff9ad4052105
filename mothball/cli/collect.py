"""Commands that give a store's bytes back: collect, undelete."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mothball import errors
from mothball.cli.local import load_settings, local_store
from mothball.cli.output import JsonFlag, emit_json, emit_json_array, line, note, table
from mothball.cli.session import open_fleet, who
from mothball.cli.text import age, escape, human_bytes, printable, time_text
from mothball.cli.waiting import NoWait, Timeout, finished
from mothball.names import check_workspace_id

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mothball.client import Fleet
    from mothball.registry import Workspace
    from mothball.settings import Settings

PANEL = "Captures"
SHOWN = 20
HostOption = Annotated[str | None, typer.Option(help="Host whose store it is; default: this one, at once.")]


def add_to(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    for name, command in (("collect", collect), ("undelete", undelete)):
        app.command(name, rich_help_panel=PANEL)(command)


def collect(
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go; write nothing.", show_default=False)] = False,
    empty_trash: Annotated[
        bool, typer.Option("--empty-trash", help="Delete what is in the trash now; gives up undelete.", show_default=False)
    ] = False,
    forget_orphan: Annotated[
        list[str] | None,
        typer.Option(metavar="ID", help="Give up the captures of a workspace that no registry knows; repeatable."),
    ] = None,
    host: HostOption = None,
    no_wait: NoWait = False,
    timeout: Timeout = None,
    json: JsonFlag = False,
) -> None:
    """Give back what no capture needs: first to the trash, after its time for good. What is young is never taken."""
    if host is None:
        if no_wait or timeout is not None:
            raise errors.InvalidParams("--no-wait and --timeout are for a job; give --host as well")
        job, result = None, _collect_here(dry_run, empty_trash, forget_orphan or [], json=json)
    else:
        with open_fleet() as fleet:
            handle = fleet.collect(host, dry_run=dry_run, empty_trash=empty_trash, forget_orphans=forget_orphan or [])
            answer = finished(handle, f"collect {printable(host)}", no_wait=no_wait, timeout=timeout, json=json)
        if answer is None:
            return
        job, result = handle.id, answer
    if json:
        emit_json(result if job is None else {"job": job, "result": result})
    else:
        _print(result)
    if result["missing"]:
        raise errors.Corrupt(
            what="the store", reason=f"{len(result['missing'])} blobs that captures need are missing; `mothball verify` says more"
        )


def _collect_here(dry_run: bool, empty_trash: bool, orphans: list[str], *, json: bool) -> dict[str, Any]:
    from mothball.registry.standing import StoreFacts
    from mothball.store.collect import collect as collect_store

    settings = load_settings()
    with _registry(settings) as fleet, _progress(hidden=json) as show:
        before = fleet.registry.budget.stored(settings.host) if fleet and not dry_run else {}
        report = collect_store(
            local_store(settings),
            grace_s=settings.collect_grace_seconds,
            trash_s=settings.trash_seconds,
            tombstone_s=settings.tombstone_seconds,
            facts=StoreFacts(fleet.registry.workspaces, settings.host, fleet.registry.crashes) if fleet else None,
            dry_run=dry_run,
            empty_trash=empty_trash,
            forget_orphans=orphans,
            reserve_bytes=settings.reserve_bytes,
            progress=show,
        )
        if fleet and not dry_run:
            try:
                fleet.registry.hosts.note_collected(
                    settings.host, moved=report.moved_blobs, moved_bytes=report.moved_bytes, deleted=report.deleted_blobs,
                    freed_bytes=report.deleted_bytes, layouts=len(report.removed),
                )  # fmt: skip
                fleet.registry.budget.measure(settings.host, before, {each.name: each.charged for each in report.workspaces})
            except errors.Unavailable as error:
                note(f"note: the collection is done, and not counted: {error.message}")
    return report.to_dict()


@contextmanager
def _progress(*, hidden: bool) -> Iterator[Callable[..., None]]:
    if hidden or not sys.stderr.isatty():
        yield lambda _step, **_counts: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as shown:
        task = shown.add_task("collect", total=None)

        def update(step: str, **counts: object) -> None:
            blobs = counts.get("blobs")
            shown.update(task, description=f"collect: {step}" + (f", {blobs:,} blobs" if isinstance(blobs, int) else ""))

        yield update


@contextmanager
def _registry(settings: Settings) -> Iterator[Fleet | None]:
    """The fleet, None when Redis does not answer: blobs can be collected then, layouts cannot."""
    with open_fleet() as fleet:
        try:
            fleet.registry.ping()
            found: Fleet | None = fleet
        except errors.Unavailable as error:
            note(f"note: {error.message}; layouts of released workspaces are left alone on {settings.host}")
            found = None
        yield found


def _print(result: dict[str, Any]) -> None:
    dry = result["dry_run"]
    _usage("WORKSPACE", result["workspaces"], result.get("workspaces_more", 0))
    if len(result["repos"]) > 1:
        _usage("REPO", result["repos"], result.get("repos_more", 0))
    for label, what, text in (
        ("needed", "reachable", "by captures"),
        ("would go" if dry else "moved", "moved", "to the trash"),
        ("waiting", "waiting", "that nothing refers to, younger than the grace"),
        ("to delete" if dry else "deleted", "deleted", "from the trash, for good"),
        ("trash", "trash", "that `mothball undelete` can bring back"),
    ):
        line(f"{label:<10} {human_bytes(result[f'{what}_bytes'])} in {result[f'{what}_blobs']:,} blobs {text}")
    for freed in result["freed"][:SHOWN]:
        line(f"free       {human_bytes(freed['bytes'])} with the first collection after {time_text(freed['at'])}")
    if result["put_back"]:
        line(f"put back   {result['put_back']:,} blobs that a capture needs were in the trash")
    for name, text in (
        ("released", "released, its captures leave when its tombstone does"),
        ("removed", "left the store; its captures are in the trash"),
        ("orphans", "not registered on this host; kept. `mothball collect --forget-orphan` gives it up"),
        ("skipped", "left for the next collection"),
    ):
        for item in result[name][:SHOWN]:
            line(f"{name:<10} {printable(str(item))}: {text}")
        if len(result[name]) > SHOWN:
            line(f"{name:<10} and {len(result[name]) - SHOWN:,} more; --json has them")
    for digest, ref in result["missing"][:SHOWN]:
        line(printable(f"missing    {digest}, which {ref} needs"))
    if result["strange"]:
        line(f"strange    {result['strange']:,} files among the blobs are none; they are left alone")


def _usage(head: str, rows: list[dict[str, Any]], more: int) -> None:
    columns = ("LOGICAL", "STORED", "SHARED", "EXCLUSIVE", "RECLAIMABLE")
    table(
        (head, "CAPTURES", *columns),
        ((row["name"] or "-", row["captures"], *(human_bytes(row[each.lower()]) for each in columns)) for row in rows[:SHOWN]),
        right=("CAPTURES", *columns),
    )
    if len(rows) + more > SHOWN:
        line(f"and {len(rows) + more - SHOWN:,} more; --json has them")
    line()


def undelete(
    workspace: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="Workspace; without it: list.", show_default=False)
    ] = None,
    ref: Annotated[
        str | None, typer.Argument(metavar="[REF]", help="Name or digest; default: all of it.", show_default=False)
    ] = None,
    *,
    host: HostOption = None,
    no_wait: NoWait = False,
    timeout: Timeout = None,
    json: JsonFlag = False,
) -> None:
    """Bring a workspace back that was evicted or released, else its forgotten captures. Without ID: list those captures."""
    if workspace is None:
        if host is not None:
            raise errors.InvalidParams("the list is that of this host; run it there, or name a workspace")
        _list_trash(json=json)
        return
    check_workspace_id(workspace)
    if host is None:
        if no_wait or timeout is not None:
            raise errors.InvalidParams("--no-wait and --timeout are for a job; give --host as well")
        if ref is None and (record := _workspace_back(workspace)) is not None:
            _print_workspace_back(record, json=json)
            return
        job, result = None, _undelete_here(workspace, ref)
    else:
        with open_fleet() as fleet:
            handle = fleet.undelete(workspace, ref, host=host)
            answer = finished(handle, f"undelete {printable(workspace)}", no_wait=no_wait, timeout=timeout, json=json)
        if answer is None:
            return
        job, result = handle.id, answer
    if json:
        emit_json(result if job is None else {"job": job, "result": result})
    else:
        _print_undeleted(workspace, result)
    if lost := sum(1 for each in result["refs"] if each["problem"]):
        raise errors.OperationFailed(
            reason=f"{lost} of {len(result['refs']) + result['refs_more']} captures cannot come back; the others are back"
        )


def _workspace_back(workspace: str) -> Workspace | None:
    """The record brought back from its tombstone; None when there is none to come back, or no Redis that knows."""
    with open_fleet() as fleet:
        try:
            if fleet.registry.lifecycle.tombstone(workspace) is None:
                return None
            return fleet.undelete_workspace(workspace, by=who(""))
        except errors.Unavailable as error:
            note(f"note: {error.message}; only captures can be brought back without it")
            return None


def _print_workspace_back(record: Workspace, *, json: bool) -> None:
    if json:
        emit_json({"workspace": record.id, "record": record.to_dict(), "refs": [], "refs_more": 0, "registered": True})
        return
    captures = f"generation {record.generation} and its snapshots are as they were" if record.digest else "it has no capture"
    line(escape(f"{record.id} is back on {record.host}, {record.state}; {captures}"))
    if record.extended_until:
        line(f"no rule that depends on time takes it before {time_text(record.extended_until)}")
    line(escape(f"`mothball resume {record.id}` goes on with it, `mothball hold {record.id} --reason ...` keeps it"))


def _print_undeleted(workspace: str, result: dict[str, Any]) -> None:
    for each in result["refs"]:
        if each["problem"]:
            note(printable(f"lost: {each['problem']}"))
            continue
        renamed = "" if each["name"] == each["was"] else f" (it was {each['was']}, which names another capture now)"
        line(escape(f"{each['name']}  {each['digest']}{renamed}"))
    if result["refs_more"]:
        line(f"and {result['refs_more']:,} more")
    if not result["registered"]:
        note(f"note: workspace {workspace!r} is not registered here; `mothball doctor --rebuild-registry` makes its record again")


def _undelete_here(workspace: str, ref: str | None) -> dict[str, Any]:
    from mothball.store.reserve import Reserve
    from mothball.store.snapshots import snapshots
    from mothball.store.trash import undelete as bring_back

    settings = load_settings()
    store = local_store(settings)
    reserve = Reserve(store, settings.reserve_bytes)
    back = reserve.spend_when_full(lambda: bring_back(store, workspace, ref))
    registered = False
    try:
        with open_fleet() as fleet:
            count = len(snapshots(store.refs(workspace)))
            registered = fleet.registry.workspaces.note_snapshots(workspace, settings.host, count)
            names = [each.name for each in back if each.name]
            fleet.registry.events.add("workspace.undeleted", workspace=workspace, refs=names, host=settings.host)
    except errors.Unavailable as error:
        note(f"note: {error.message}; the store has it back, the registry does not know")
    refs = [{"was": each.was, "name": each.name, "digest": each.digest, "problem": each.problem} for each in back]
    return {"workspace": workspace, "refs": refs, "refs_more": 0, "registered": registered}


def _list_trash(*, json: bool) -> None:
    from mothball.store.trash import Trash

    found = Trash(local_store(load_settings())).buried()
    if json:
        emit_json_array(
            {"workspace": each.workspace, "name": each.ref.name, "digest": each.ref.digest, "reason": each.reason, "at": each.at}
            for each in found
        )
        return
    now = time.time_ns() // 1_000_000
    table(
        ("WORKSPACE", "CAPTURE", "FORGOTTEN", "WHY", "DIGEST"),
        ((each.workspace, each.ref.name, age(each.at, now), each.reason, each.ref.digest) for each in found),
    )
