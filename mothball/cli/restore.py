"""The command that brings a capture back as a directory: restore."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mothball import errors
from mothball.cli.local import hosted, load_settings, local_store
from mothball.cli.output import JsonFlag, emit_json, line, note
from mothball.cli.session import open_fleet
from mothball.cli.text import human_bytes, human_seconds, printable
from mothball.cli.waiting import NoWait, Timeout, finished

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mothball.store.restore_result import RestoreResult

PANEL = "Captures"
ACTIONS_SHOWN = 20


def add_to(app: typer.Typer) -> None:
    """Add this module's command to `app`."""
    app.command("restore", rich_help_panel=PANEL)(restore)


def restore(
    workspace: Annotated[str | None, typer.Argument(metavar="[ID]", help="Id of the workspace.", show_default=False)] = None,
    ref: Annotated[str, typer.Argument(metavar="[REF]", help="latest, snap-3, ... or a digest.")] = "latest",
    *,
    to: Annotated[Path, typer.Option(metavar="DIR", help="New or empty directory; see --overwrite.", show_default=False)],
    include: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Only what matches, as in .gitignore; repeatable.")
    ] = None,
    overwrite: Annotated[
        str | None, typer.Option(metavar="never|changed|always", help="What happens to what is in DIR.", show_default=False)
    ] = None,
    delete_extra: Annotated[
        bool, typer.Option("--delete-extra", help="Delete what the capture does not have, but no .git.", show_default=False)
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, write nothing.", show_default=False)] = False,
    host: Annotated[str | None, typer.Option(help="Let a worker of this host do it.", show_default=False)] = None,
    source: Annotated[
        str | None, typer.Option("--from", metavar="REGISTRY/REPO:TAG", help="Fetch the capture from there.", show_default=False)
    ] = None,
    no_wait: NoWait = False,
    timeout: Timeout = None,
    json: JsonFlag = False,
) -> None:
    """Write a capture to a directory. A new one is there whole or not at all; an interrupted restore goes on where it was."""
    if workspace is None and source is None:
        raise errors.InvalidParams("say which workspace, or with --from where to fetch the capture from")
    if source is not None and (workspace is not None or ref != "latest"):
        raise errors.InvalidParams("with --from the capture is that of the registry; leave ID and REF out")
    if host is None and (no_wait or timeout is not None):
        raise errors.InvalidParams("--no-wait and --timeout are for --host; without it this process restores")
    options: dict[str, Any] = {
        "include": tuple(include or ()),
        "overwrite": overwrite,
        "delete_extra": delete_extra,
        "dry_run": dry_run,
    }
    if source is not None:
        from mothball.package.reference import parse_reference

        parse_reference(source)  # a mistyped name should be said here, not by a job
    if host is not None:
        with open_fleet() as fleet:
            handle = fleet.restore(workspace, str(to), ref=ref, host=host, source=source, **options)
            result = finished(
                handle, f"restore {printable(workspace or source or '')}", no_wait=no_wait, timeout=timeout, json=json
            )
        if result is not None:
            _print(result, json=json, job=handle.id)
        return
    _print(_here(workspace, ref, to, source, options, json=json), json=json)


def _here(workspace: str | None, ref: str, to: Path, source: str | None, options: dict[str, Any], *, json: bool) -> RestoreResult:
    from mothball.store.restore import check_target
    from mothball.store.restore import restore as restore_tree
    from mothball.store.tree import Tree

    settings = load_settings()
    store = local_store(settings)
    target = to.expanduser().absolute()
    target = target.resolve() if target.name == ".." else target
    with _progress("restore", hidden=json) as progress:
        if source is not None:
            from mothball.package.remote import pull

            check_target(target, roots=None, store=settings.store_dir)

            def report(*, step: str = "pull", **counts: Any) -> None:
                progress(step, counts)

            digest = pull(store, source, settings, progress=report).digest
        else:
            assert workspace is not None  # noqa: S101 - checked above
            hosted(settings, workspace)
            digest = store.refs(workspace).get(ref).digest
        try:
            with Tree.open(store, digest) as tree:
                return restore_tree(tree, target, progress=progress, **options)
        except KeyboardInterrupt:
            if not options["dry_run"]:
                how = "the same command goes on" if options["overwrite"] is None else "--overwrite changed goes on"
                note(
                    f"interrupted; {how} where this one ended. What a new directory has so far waits beside it under a hidden name"
                )
            raise


def _print(result: RestoreResult, *, json: bool, job: str | None = None) -> None:
    if json:
        emit_json({**({"job": job} if job else {}), **result.to_dict()})
        return
    shown = result.actions if result.dry_run else result.actions[:ACTIONS_SHOWN]
    for action in shown:
        line(f"{action.action:<8}  {printable(action.path)}")
    if more := len(result.actions) - len(shown) + result.further_actions:
        line(f"and {more:,} more")
    verb = "would be written" if result.dry_run else "written"
    parts = [f"{result.written:,} entries {verb} ({human_bytes(result.written_bytes)})"]
    for count, text in (
        (result.unchanged, "were there already" if result.resumed else "unchanged"),
        (result.metadata, "with other owner, mode or time"),
        (result.kept, "kept as they are"),
        (result.deleted, "deleted" if not result.dry_run else "would be deleted"),
    ):
        if count:
            parts.append(f"{count:,} {text}")
    line(printable(f"{result.target}  {result.digest}"))
    line(f"{', '.join(parts)}; {human_seconds(result.seconds)}")
    if result.owner_skipped:
        note(
            f"{result.owner_skipped:,} entries belong to you instead of their owner, which only root may set; "
            "their setuid and setgid bits are left off"
        )


@contextmanager
def _progress(label: str, *, hidden: bool) -> Iterator[Callable[[str, dict[str, Any]], None]]:
    """A bar on a terminal for a restore of this process."""
    if hidden or not sys.stderr.isatty():
        yield lambda _step, _counts: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as shown:
        task = shown.add_task(label, total=None)

        def update(step: str, counts: dict[str, Any]) -> None:
            parts = [step]
            if "files" in counts:
                parts.append(f"{counts['files']:,} files")
            if "bytes" in counts:
                parts.append(human_bytes(counts["bytes"]))
            unit = "bytes" if counts.get("total_bytes") else "files"
            total = counts.get(f"total_{unit}") or None
            shown.update(task, description=f"{label}: {', '.join(parts)}", completed=counts.get(unit, 0), total=total)

        yield update
