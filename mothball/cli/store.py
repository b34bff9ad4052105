"""Checking this host's store: verify."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from mothball import errors
from mothball.cli.local import hosted, load_settings, local_store
from mothball.cli.output import JsonFlag, emit_json, line
from mothball.cli.text import human_bytes, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PANEL = "Captures"
PROBLEMS_SHOWN = 20


def add_to(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    app.command("verify", rich_help_panel=PANEL)(verify)


def verify(
    workspace: Annotated[str | None, typer.Argument(metavar="[ID]", help="Only this workspace.", show_default=False)] = None,
    deep: Annotated[bool, typer.Option("--deep", help="Check every file as well, not only blobs.", show_default=False)] = False,
    json: JsonFlag = False,
) -> None:
    """Check this host's store: recompute the digests of what the captures refer to. Exit code 1 when something is damaged."""
    settings = load_settings()
    if workspace is not None:
        hosted(settings, workspace)
    from mothball.store.verify import verify as verify_store

    with _progress("verify", hidden=json) as progress:
        report = verify_store(local_store(settings), workspace, deep, progress)
    damage = [{"digest": item.digest, "refs": list(item.refs), "reason": item.reason} for item in report.problems]
    if json:
        emit_json({"checked": report.checked, "bytes": report.bytes, "refs": report.refs, "problems": damage})
    else:
        for item in damage[:PROBLEMS_SHOWN]:
            users = ", ".join(map(str, item["refs"])) or "nothing"
            line(printable(f"damaged: {item['digest']}: {item['reason']} (used by {users})"))
        line(f"{report.checked:,} blobs of {_count(report.refs)} captures checked, {human_bytes(report.bytes)}")
    if damage:
        raise errors.Corrupt(what="the store", reason=f"{len(damage)} problems; `mothball capture --full` writes a fresh layer")
    if not json:
        line("everything is as it was written")


def _count(refs: object) -> int:
    return refs if isinstance(refs, int) else len(list(refs))  # type: ignore[call-overload]


@contextmanager
def _progress(label: str, *, hidden: bool) -> Iterator[Callable[..., None]]:
    if hidden or not sys.stderr.isatty():
        yield lambda *_args, **_kwargs: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn

    with Progress(
        SpinnerColumn(), TextColumn("{task.description}", markup=False), console=Console(file=sys.stderr), transient=True
    ) as shown:
        task = shown.add_task(label, total=None)

        def update(*, blobs: int, bytes: int) -> None:  # noqa: A002 - the reader's names
            shown.update(task, description=f"{label}: {blobs:,} blobs, {human_bytes(bytes)}")

        yield update
