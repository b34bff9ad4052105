"""Commands that take captures out of the store and bring them in: export, pull."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mothball import errors
from mothball.cli.ending import tidy_end
from mothball.cli.local import hosted, load_settings, local_store
from mothball.cli.output import JsonFlag, emit_json, line
from mothball.cli.session import open_fleet
from mothball.cli.text import escape, human_bytes, printable
from mothball.cli.waiting import NoWait, Timeout, finished
from mothball.cli.workspaces import WorkspaceId

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mothball.store import Ref, Store

PANEL = "Captures"


def add_to(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    for name, command in (("export", export), ("pull", pull)):
        app.command(name, rich_help_panel=PANEL)(command)


def export(
    workspace: WorkspaceId,
    ref: Annotated[str, typer.Argument(metavar="[REF]", help="latest, snap-3, ... or a digest.")] = "latest",
    *,
    tar: Annotated[str | None, typer.Option(metavar="FILE", help="One tar of the tree; - is stdout.", show_default=False)] = None,
    oci: Annotated[Path | None, typer.Option(metavar="DIR", help="An OCI image layout.", show_default=False)] = None,
    oci_archive: Annotated[
        Path | None, typer.Option(metavar="FILE", help="An OCI image layout as one tar.", show_default=False)
    ] = None,
    push: Annotated[
        str | None, typer.Option(metavar="REGISTRY/REPO:TAG", help="To a registry, as a job of its host.", show_default=False)
    ] = None,
    gzip: Annotated[bool, typer.Option("--gzip", help="For tools that do not know zstd.", show_default=False)] = False,
    zstd: Annotated[bool, typer.Option("--zstd", help="Compress the tar with zstd.", show_default=False)] = False,
    name: Annotated[str | None, typer.Option(metavar="TAG", help="Tag within the layout; default: the ref.")] = None,
    no_wait: NoWait = False,
    timeout: Timeout = None,
    json: JsonFlag = False,
) -> None:
    """Write a capture as a tar or an OCI image, or push it to a registry. What exists already is never replaced."""
    chosen = [
        option for option, value in (("--tar", tar), ("--oci", oci), ("--oci-archive", oci_archive), ("--push", push)) if value
    ]
    if len(chosen) != 1:
        raise errors.InvalidParams("say where to: exactly one of --tar, --oci, --oci-archive and --push")
    if (push is None and (no_wait or timeout is not None)) or (push is not None and (gzip or zstd or name is not None)):
        raise errors.InvalidParams("--no-wait and --timeout are for --push; --gzip, --zstd and --name are not")
    if (zstd and (gzip or tar is None)) or (name is not None and tar is not None):
        raise errors.InvalidParams("--zstd is for --tar and not with --gzip; --name is for --oci and --oci-archive")
    if push is not None:
        _push(workspace, ref, push, no_wait=no_wait, timeout=timeout, json=json)
        return
    with tidy_end():
        if tar is not None:
            _tar(workspace, ref, tar, compression="gzip" if gzip else "zstd" if zstd else "", json=json)
        else:
            _image(workspace, ref, oci, oci_archive, name=name, gzip=gzip, json=json)


def _push(workspace: str, ref: str, to: str, *, no_wait: bool, timeout: str | None, json: bool) -> None:
    from mothball.package.reference import parse_reference

    parse_reference(to)  # a mistyped name should be said here, not by a job
    with open_fleet() as fleet:
        handle = fleet.push(workspace, to, ref=ref)
        result = finished(handle, f"push {printable(workspace)}", no_wait=no_wait, timeout=timeout, json=json)
    if result is None:
        return
    if json:
        emit_json({"job": handle.id, "result": result._asdict()})
        return
    line(escape(f"{result.reference}  {result.digest}"))
    line(
        f"{result.uploaded:,} blobs sent ({human_bytes(result.bytes)}), {result.mounted:,} taken from another repository, "
        f"{result.skipped:,} were there"
    )


def _tar(workspace: str, ref: str, path: str, *, compression: Any, json: bool) -> None:
    from mothball.package.tar import write_tar
    from mothball.package.target import new_file
    from mothball.store.tree import Tree

    to_stdout = path == "-"
    if to_stdout and json:
        raise errors.InvalidParams("with --tar - stdout is the tar; --json has no place there")
    if to_stdout and sys.stdout.isatty():
        raise errors.InvalidParams("a tar is not for a terminal; send it to a file or a pipe")
    store, found = _source(workspace, ref)
    with _progress("export", hidden=json or to_stdout) as progress:
        if to_stdout:
            sys.stdout.flush()
            with Tree.open(store, found.digest) as tree:
                write_tar(tree, sys.stdout.buffer, compression=compression, progress=progress)
            sys.stdout.buffer.flush()
            return
        with new_file(Path(path), store.root) as out, Tree.open(store, found.digest) as tree:
            result = write_tar(tree, out, compression=compression, progress=progress)
    if json:
        emit_json({"path": path, "ref": found.name, "digest": found.digest, **result._asdict()})
    else:
        line(f"{result.sha256}  {escape(path)}")
        line(f"{result.entries:,} entries, {human_bytes(result.bytes)}, from {found.digest}")


def _image(workspace: str, ref: str, oci: Path | None, archive: Path | None, *, name: str | None, gzip: bool, json: bool) -> None:
    from mothball.package.layout import export_archive, export_layout

    store, found = _source(workspace, ref)
    tag = name or found.name
    with _progress("export", hidden=json) as progress:
        if oci is not None:
            result = export_layout(store, found.digest, oci, name=tag, gzip=gzip, progress=progress)
        else:
            assert archive is not None  # noqa: S101 -- one of both was given
            result = export_archive(store, found.digest, archive, name=tag, gzip=gzip, progress=progress)
    transport = "oci" if oci is not None else "oci-archive"
    image = f"{transport}:{result.path}:{result.name}"
    if json:
        emit_json({"path": result.path, "image": image, "ref": found.name, "digest": result.digest, "source": found.digest,
                   "blobs": result.blobs, "bytes": result.bytes})  # fmt: skip
    else:
        line(escape(image))
        line(f"{result.digest}, {result.blobs:,} blobs, {human_bytes(result.bytes)}")


def _source(workspace: str, ref: str) -> tuple[Store, Ref]:
    from mothball.store.artifact import is_crash, no_image

    settings = load_settings()
    hosted(settings, workspace)
    store = local_store(settings)
    found = store.refs(workspace).get(ref)
    if is_crash(found.name):  # what leaves of a crash report is its package, which is redacted
        raise no_image(found.name)
    return store, found


def pull(
    workspace: WorkspaceId,
    reference: Annotated[str, typer.Argument(metavar="REGISTRY/REPO:TAG", help="What to fetch.", show_default=False)],
    *,
    label: Annotated[str, typer.Option(help="One line that names the snapshot.", show_default=False)] = "",
    no_wait: NoWait = False,
    timeout: Timeout = None,
    json: JsonFlag = False,
) -> None:
    """Fetch a capture from a registry to the workspace's host, as its next snapshot."""
    from mothball.package.reference import parse_reference

    parse_reference(reference)
    with open_fleet() as fleet:
        handle = fleet.pull(workspace, reference, label=label)
        result = finished(handle, f"pull {printable(workspace)}", no_wait=no_wait, timeout=timeout, json=json)
    if result is None:
        return
    if json:
        emit_json({"job": handle.id, "result": result._asdict()})
        return
    line(f"{result.name}  {result.digest}")
    line(f"{result.fetched:,} blobs fetched ({human_bytes(result.received)}), {result.skipped:,} were there")


@contextmanager
def _progress(label: str, *, hidden: bool) -> Iterator[Callable[..., None]]:
    """A bar on a terminal for an export of this process."""
    if hidden or not sys.stderr.isatty():
        yield lambda **_kwargs: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as shown:
        task = shown.add_task(label, total=None)

        def update(**done: Any) -> None:
            entries = f"{done['entries']:,} entries, " if "entries" in done else ""
            text = f"{done.get('step', label)}: {entries}{human_bytes(done.get('bytes', 0))}"
            shown.update(task, description=text, completed=done.get("bytes", 0), total=done.get("total_bytes"))

        yield update
