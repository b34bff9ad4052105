"""Commands that look into captures: files, cat, diff. They need no worker, and without Redis they read what this host has."""

from __future__ import annotations

import os
import stat
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mothball import errors
from mothball.cli.local import here, hosted, load_settings, local_store
from mothball.cli.output import JsonFlag, emit_json, emit_json_array, line, note, with_path
from mothball.cli.text import escape, human_bytes, printable, time_text
from mothball.cli.workspaces import WorkspaceId

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from mothball.store.diff import Change, DiffTotals
    from mothball.store.tree import Entry, Tree

PANEL = "Captures"
DISK = "disk"
BATCH = 1000
"""Lines written at once: a write per line costs more than the line."""
AtRef = Annotated[str, typer.Option("--at", metavar="REF", help="A ref (latest, snap-1, ...) or a digest.")]
_TYPE_BITS = {"file": stat.S_IFREG, "dir": stat.S_IFDIR, "symlink": stat.S_IFLNK, "hardlink": stat.S_IFREG}
_LETTERS = {"added": "A", "deleted": "D", "changed": "M", "type": "T", "mode": "P", "owner": "O", "time": "t"}


def add_to(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    for name, command in (("files", files), ("cat", cat), ("diff", diff)):
        app.command(name, rich_help_panel=PANEL)(command)


def files(
    workspace: WorkspaceId,
    path: Annotated[str, typer.Argument(metavar="[PATH]", help="Only below this folder.", show_default=False)] = "",
    at: AtRef = "latest",
    long: Annotated[bool, typer.Option("--long", "-l", help="Mode, owner, size and time as well.", show_default=False)] = False,
    json: JsonFlag = False,
) -> None:
    """List what a capture holds."""
    folder = path.strip("/")
    with _tree(workspace, at) as tree:
        # A path that is not there is an error, not an empty listing.
        entry = tree.stat(folder)
        if json:
            emit_json_array(with_path(_entry_fields(each), each.path) for each in _entries(tree, entry))
        elif long:
            _print_lines(_long_line(each) for each in _entries(tree, entry))
        elif entry.type == "dir":
            for names in tree.names(folder):
                _print_names(names)
        else:
            line(escape(entry.path))


def _entries(tree: Tree, entry: Entry) -> Iterator[Entry]:
    return tree.walk(entry.path) if entry.type == "dir" else iter([entry])


def _print_names(names: list[bytes]) -> None:
    """Many names with one look at all of them together: nearly none has a character that must not reach a terminal."""
    text = b"\n".join(names).decode("utf-8", "surrogateescape")
    if "\\" not in text and text.replace("\n", "").isprintable() and text.count("\n") == len(names) - 1:
        line(text)
    else:
        _print_lines(escape(os.fsdecode(name)) for name in names)


def _print_lines(lines: Iterable[str]) -> None:
    batch: list[str] = []
    for text in lines:
        batch.append(text)
        if len(batch) == BATCH:
            line("\n".join(batch))
            batch.clear()
    if batch:
        line("\n".join(batch))


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


def diff(
    workspace: WorkspaceId,
    before: Annotated[str, typer.Argument(metavar="[A]", help="A ref or a digest.")] = "latest",
    after: Annotated[str, typer.Argument(metavar="[B]", help="A ref, a digest, or disk: the directory as it is now.")] = DISK,
    path: Annotated[str, typer.Argument(metavar="[PATH]", help="Only this path and what lies below.", show_default=False)] = "",
    *,
    stat: Annotated[bool, typer.Option("--stat", help="Only the totals.", show_default=False)] = False,
    unified: Annotated[
        bool, typer.Option("--unified", "-u", help="The lines of text files up to 256 KiB, as a patch for git.", show_default=False)
    ] = False,
    name_only: Annotated[bool, typer.Option("--name-only", help="Only the paths.", show_default=False)] = False,
    times: Annotated[bool, typer.Option("--times", help="Also where only the time differs.", show_default=False)] = False,
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Exit with 1 when anything differs.", show_default=False)] = False,
    json: JsonFlag = False,
) -> None:
    """What makes B of A: A added, D deleted, M changed, T another type, P mode, O owner (t time, with --times)."""
    if stat + unified + name_only > 1 or (unified and json):
        raise errors.InvalidParams("--stat, --unified and --name-only exclude each other, and --unified has no JSON form")
    if before == DISK:
        raise errors.InvalidParams("the directory on disk can only be B: it is what is there now")
    from mothball.store.diff import DiffTotals

    totals = DiffTotals()
    shown = 0
    with _changes(workspace, before, after, path.strip("/"), hidden=json) as (changes, readers):

        def wanted() -> Iterator[Change]:
            nonlocal shown
            for change in changes:
                totals.count(change)
                if times or change.kind != "time":
                    shown += 1
                    yield change

        if stat:
            for _ in wanted():
                pass
            _print_totals(totals, json=json)
        elif json:
            emit_json_array(with_path(_change_fields(change, name_only=name_only), change.path) for change in wanted())
        elif name_only:
            _print_lines(escape(change.path) or "." for change in wanted())
        elif unified:
            _print_patch(wanted(), *readers)
        else:
            _print_lines(_change_line(change) for change in wanted())
    if exit_code and shown:
        raise typer.Exit(1)


@contextmanager
def _changes(
    workspace: str, before: str, after: str, path: str, *, hidden: bool
) -> Iterator[tuple[Iterator[Change], tuple[Callable[[str], bytes], Callable[[str], bytes]]]]:
    """The changes, and what reads a file of either side."""
    from mothball.store.diff import diff as diff_trees
    from mothball.store.tree import Tree

    settings = load_settings()
    record = hosted(settings, workspace)
    store = local_store(settings)
    refs = store.refs(workspace)
    ref = refs.get(before)
    with Tree.open(store, ref.digest) as a:
        if after != DISK:
            with Tree.open(store, refs.get(after).digest) as b:
                yield diff_trees(a, b, path), (a.read, b.read)
            return
        from mothball.capture import CaptureOptions
        from mothball.capture.disk import compare_with_disk

        folder = record.path if record else ref.get("path")
        options = CaptureOptions.merge(settings, record.policy.get("capture", {}) if record else {})
        with compare_with_disk(a, folder, settings, options, store=store, workspace=workspace) as disk:
            yield disk.changes(path), (a.read, disk.read)
            if disk.omissions and not hidden:
                note(f"note: {len(disk.omissions):,} paths on disk are left out, as a capture would; `mothball capture` says why")


def _change_fields(change: Change, *, name_only: bool) -> dict[str, Any]:
    if name_only:
        return {"kind": change.kind}
    return {
        "kind": change.kind,
        "differs": list(change.aspects),
        "before": _entry_fields(change.before) if change.before else None,
        "after": _entry_fields(change.after) if change.after else None,
    }


def _change_line(change: Change) -> str:
    before, after = change.before, change.after
    notes = []
    if before and after:
        if change.kind == "type":
            notes.append(f"{before.type}, now {after.type}")
        if "mode" in change.aspects:
            notes.append(f"mode {before.mode:04o}, now {after.mode:04o}")
        if "owner" in change.aspects:
            notes.append(f"owner {before.uid}:{before.gid}, now {after.uid}:{after.gid}")
    entry = after or before
    slash = "/" if entry and entry.type == "dir" else ""
    return f"{_LETTERS[change.kind]} {escape(change.path) or '.'}{slash if change.path else ''}" + (
        f"  ({'; '.join(notes)})" if notes else ""
    )


def _print_totals(totals: DiffTotals, *, json: bool) -> None:
    import msgspec

    if json:
        emit_json(msgspec.to_builtins(totals))
        return
    words = (
        ("added", totals.added), ("deleted", totals.deleted), ("changed", totals.changed), ("with another mode", totals.mode),
        ("with another owner", totals.owner), ("with another time", totals.time),
    )  # fmt: skip
    line(", ".join(f"{count:,} {word}" for word, count in words if count) or "no difference")
    if totals.bytes_added or totals.bytes_deleted:
        line(f"{human_bytes(totals.bytes_added)} in what is new or changed, {human_bytes(totals.bytes_deleted)} before")


def _print_patch(changes: Iterator[Change], before: Callable[[str], bytes], after: Callable[[str], bytes]) -> None:
    from mothball.store.textdiff import patch

    terminal = sys.stdout.isatty()
    sys.stdout.flush()
    for change in changes:
        for text in patch(change, before, after):
            if terminal:  # a file's escape sequences must not reach it; a pipe gets the very bytes
                line(printable(os.fsdecode(text.removesuffix(b"\n")).replace("\t", "    ")))
            else:
                sys.stdout.buffer.write(text)
    sys.stdout.buffer.flush()


@contextmanager
def _tree(workspace: str, at: str) -> Iterator[Tree]:
    from mothball.store.tree import Tree

    settings = load_settings()
    here(settings, workspace)
    store = local_store(settings)
    with Tree.open(store, store.refs(workspace).get(at).digest) as tree:
        yield tree
