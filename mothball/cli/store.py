"""Commands that read this host's store: files, cat, verify. They need no worker, and reading needs no Redis either."""

from __future__ import annotations

import os
import stat
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mothball import errors
from mothball.cli.output import JsonFlag, emit_json, emit_json_array, line, note, with_path
from mothball.cli.session import open_fleet
from mothball.cli.text import escape, human_bytes, printable, time_text
from mothball.cli.workspaces import WorkspaceId
from mothball.names import check_workspace_id

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mothball.settings import Settings
    from mothball.store import Store
    from mothball.store.tree import Entry, Tree

PANEL = "Captures"
PROBLEMS_SHOWN = 20
AtRef = Annotated[str, typer.Option("--at", metavar="REF", help="A ref (latest, ...) or a digest.")]
_TYPE_BITS = {"file": stat.S_IFREG, "dir": stat.S_IFDIR, "symlink": stat.S_IFLNK, "hardlink": stat.S_IFREG}


def add_to(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    for name, command in (("files", files), ("cat", cat), ("verify", verify)):
        app.command(name, rich_help_panel=PANEL)(command)


def files(
    workspace: WorkspaceId,
    path: Annotated[str, typer.Argument(metavar="[PATH]", help="Only below this folder.", show_default=False)] = "",
    at: AtRef = "latest",
    long: Annotated[bool, typer.Option("--long", "-l", help="Mode, owner, size and time as well.", show_default=False)] = False,
    json: JsonFlag = False,
) -> None:
    """List what a capture holds."""
    with _tree(workspace, at) as tree:
        entries = _entries(tree, path.strip("/") if path != "/" else "")
        if json:
            emit_json_array(with_path(_entry_fields(entry), entry.path) for entry in entries)
            return
        for entry in entries:
            line(_long_line(entry) if long else escape(entry.path))


def _entries(tree: Tree, path: str) -> Iterator[Entry]:
    if not path:
        return (entry for entry in tree.walk("") if entry.path)
    # A path that is not there is an error, not an empty listing.
    entry = tree.stat(path)
    return iter(tree.walk(path)) if entry.type == "dir" else iter([entry])


def _entry_fields(entry: Entry) -> dict[str, Any]:
    return {
        "type": entry.type,
        "mode": f"{entry.mode:04o}",
        "uid": entry.uid,
        "gid": entry.gid,
        "mtime_ns": entry.mtime_ns,
        "size": entry.size,
        "sha256": entry.sha256,
        "link": entry.link,
    }


def _long_line(entry: Entry) -> str:
    mode = stat.filemode(_TYPE_BITS.get(entry.type, 0) | entry.mode)
    arrow = {"symlink": " -> ", "hardlink": " = "}.get(entry.type)
    link = f"{arrow}{escape(entry.link)}" if arrow and entry.link else ""
    when = time_text(entry.mtime_ns // 1_000_000)
    return f"{mode} {entry.uid:>5} {entry.gid:>5} {human_bytes(entry.size):>8} {when:>20} {escape(entry.path)}{link}"


def cat(
    workspace: WorkspaceId,
    path: Annotated[str, typer.Argument(metavar="PATH", help="File of the capture.", show_default=False)],
    at: AtRef = "latest",
) -> None:
    """Write one file of a capture to stdout, byte for byte."""
    with _tree(workspace, at) as tree:
        sys.stdout.flush()
        tree.copy(path, sys.stdout.buffer)
        sys.stdout.buffer.flush()


def verify(
    workspace: Annotated[str | None, typer.Argument(metavar="[ID]", help="Only this workspace.", show_default=False)] = None,
    deep: Annotated[bool, typer.Option("--deep", help="Check every file as well, not only blobs.", show_default=False)] = False,
    json: JsonFlag = False,
) -> None:
    """Check this host's store: recompute the digests of what the captures refer to. Exit code 1 when something is damaged."""
    settings = _settings()
    if workspace is not None:
        _check_host(settings, workspace)
    from mothball.store.verify import verify as verify_store

    with _progress("verify", hidden=json) as progress:
        report = verify_store(_store(settings), workspace, deep, progress)
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


def _settings() -> Settings:
    from mothball.settings import Settings

    return Settings.load()


def _store(settings: Settings) -> Store:
    from mothball.store import Store

    return Store(settings.store_dir)


@contextmanager
def _tree(workspace: str, at: str) -> Iterator[Tree]:
    from mothball.store.tree import Tree

    settings = _settings()
    _check_host(settings, workspace)
    store = _store(settings)
    digest = store.refs(workspace).get(at).digest
    with Tree.open(store, digest) as tree:
        yield tree


def _check_host(settings: Settings, workspace: str) -> None:
    """Refuse to read what may be stale: the captures of a workspace are on its own host.

    Without Redis, or for a workspace that was released, what lies in this store is still readable: that is what one needs
    after a disaster.
    """
    check_workspace_id(workspace)
    kept = _store(settings).refs(workspace).exists
    try:
        with open_fleet() as fleet:
            host = fleet.get(workspace).host
    except (errors.NotFound, errors.Gone, errors.Unavailable) as error:
        if not kept:
            raise
        note(f"note: {error.message}; reading what this host's store has")
        return
    if host != settings.host:
        raise errors.HostOffline(
            f"workspace {workspace!r} lives on host {host!r} and its captures are in that host's store; run this command there",
            host=host,
        )
    if not kept:
        raise errors.NotFound(
            f"workspace {workspace!r} has no capture in {os.fspath(settings.store_dir)} yet; `mothball capture` makes one",
            what="capture",
            id=workspace,
        )
