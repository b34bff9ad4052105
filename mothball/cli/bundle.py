"""The command about runtime bundles: bundle, and bundle run."""

from __future__ import annotations

import os
import shlex
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mothball import errors
from mothball.cli.ending import tidy_end
from mothball.cli.local import hosted, load_settings, local_store
from mothball.cli.output import JsonFlag, emit_json, line, note
from mothball.cli.session import open_fleet
from mothball.cli.text import human_bytes, parse_duration, parse_size, printable
from mothball.cli.waiting import NoWait, finished

if TYPE_CHECKING:
    from mothball.package.bundle_run import RunResult
    from mothball.settings import Settings

PANEL = "Crash reports"
EXIT_TIMEOUT = 124
_SIGNALED = 128


def add_to(app: typer.Typer) -> None:
    """Add this module's command to `app`."""
    app.command("bundle", rich_help_panel=PANEL)(bundle)


def bundle(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="ID [REF] | run DIR|PACKAGE.tar [-- CMD...]", help="What to write, or what to run.", show_default=False
        ),
    ],
    *,
    to: Annotated[Path | None, typer.Option(metavar="DIR", help="New directory for the bundle.", show_default=False)] = None,
    rootless: Annotated[bool, typer.Option("--rootless", help="For you instead of root to start.", show_default=False)] = False,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="IMAGE", help="Put an image around it: oci:DIR, oci-archive:FILE or REGISTRY/REPO:TAG.", show_default=False
        ),
    ] = None,
    cmd: Annotated[str | None, typer.Option(metavar="CMD", help="What the bundle starts, in quotes.", show_default=False)] = None,
    writable: Annotated[bool, typer.Option("--writable", help="The command may write into DIR.", show_default=False)] = False,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory limit, such as 2GiB; 0: none. run: 2GiB when root runs it.")
    ] = None,
    timeout: Annotated[str | None, typer.Option(help="Longest run, such as 90s (run: 10m), or longest wait for --host.")] = None,
    host: Annotated[str | None, typer.Option(help="Let the worker of this host write it.", show_default=False)] = None,
    no_wait: NoWait = False,
    json: JsonFlag = False,
) -> int | None:
    """Write a capture as a bundle that runc starts as it is, or run one under limits and leave nothing behind.

    With --to it writes the clear content of a capture: nothing is redacted, as in a restore. `run` starts a bundle without network,
    in namespaces of its own, and exits with the command's exit code (124: its time was over); a crash package is unpacked for it
    and thrown away. The root is read-only unless --writable; /tmp is always writable.
    """
    limit = None if memory is None else parse_size(memory)
    if to is None:
        if words[0] != "run":
            raise errors.InvalidParams("say with --to where the bundle goes, or use `mothball bundle run DIR`")
        if len(words) == 1:
            raise errors.InvalidParams("run needs the directory of a bundle or the file of a package")
        if rootless or base is not None or cmd is not None or host is not None or no_wait:
            raise errors.InvalidParams("`run` takes --timeout, --memory, --writable and --json; the command follows after --")
        seconds = None if timeout is None else parse_duration(timeout)
        return _run(Path(words[1]), words[2:], seconds, limit, writable=writable, json=json)
    if len(words) > 2:  # noqa: PLR2004 - id and ref
        raise errors.InvalidParams("one workspace and one of its captures make a bundle; the command is given with --cmd")
    workspace, ref = words[0], words[1] if len(words) > 1 else "latest"
    command = _words(cmd)
    if host is not None:
        if limit is not None:
            raise errors.InvalidParams("--memory is for a bundle that is written here, or for `run`")
        _there(workspace, ref, to, host, no_wait, timeout, json, rootless=rootless, base=base, command=command, writable=writable)
        return None
    if no_wait or timeout is not None:
        raise errors.InvalidParams("--no-wait and --timeout are for --host or `run`; without them this process writes the bundle")
    _here(workspace, ref, to, json, rootless=rootless, base=base, command=command, writable=writable, memory=limit)
    return None


def _words(cmd: str | None) -> list[str]:
    if cmd is None:
        return []
    try:
        found = shlex.split(cmd)
    except ValueError as error:
        raise errors.InvalidParams(f"--cmd cannot be read: {error}") from None
    if not found:
        raise errors.InvalidParams("--cmd is empty")
    return found


def _there(workspace: str, ref: str, to: Path, host: str, no_wait: bool, timeout: str | None, json: bool, **options: Any) -> None:
    with open_fleet() as fleet:
        if (home := fleet.get(workspace).host) != host:
            raise errors.InvalidParams(f"the captures of {workspace!r} are on host {home!r}; its worker can write the bundle")
        handle = fleet.bundle(workspace, str(to), ref=ref, **options)
        result = finished(handle, f"bundle {printable(workspace)}", no_wait=no_wait, timeout=timeout, json=json)
    if result is not None:
        _print({"job": handle.id, **result}, json=json)


def _here(
    workspace: str, ref: str, to: Path, json: bool, *, rootless: bool, base: str | None, command: list[str], writable: bool,
    memory: int | None,
) -> None:  # fmt: skip
    import msgspec

    from mothball.package.base import open_base
    from mothball.package.bundle import scratch_dir, write_bundle
    from mothball.package.target import check_new, scratch_folder

    settings = load_settings()
    store = local_store(settings)
    check_new(to, settings.store_dir)
    hosted(settings, workspace)
    digest = store.refs(workspace).get(ref).digest
    with tidy_end(), ExitStack() as stack:
        image = None
        if base is not None:
            folder = stack.enter_context(scratch_folder(scratch_dir(settings.data_dir) / "base"))
            image = stack.enter_context(open_base(base, settings, folder))
        result = write_bundle(
            store, digest, to, command=command, rootless=rootless, base=image, writable=writable, memory=memory or None
        )
    _print(msgspec.to_builtins(result), json=json)


def _print(result: dict[str, Any], *, json: bool) -> None:
    if json:
        emit_json(result)
        return
    line(printable(f"{result['path']}  {result['digest']}"))
    line(f"{result['files']:,} files ({human_bytes(result['bytes'])}); starts {printable(shlex.join(result['args']))}")
    if result["base"]:
        line(printable(f"around it {result['base']}  {result['base_digest']}"))
    for each in result["notes"]:
        note(f"note: {each}")
    line(printable(f"run it: mothball bundle run {shlex.quote(result['path'])}"))


# -- run ---------------------------------------------------------------------------------------------------------------


def _run(place: Path, command: list[str], seconds: float | None, memory: int | None, *, writable: bool, json: bool) -> int:
    from mothball.package.bundle_run import DEFAULT_SECONDS, Interrupted, require_runc, run_bundle

    require_runc()  # before a large package is unpacked for it
    settings = load_settings()
    limit = DEFAULT_SECONDS if seconds is None else seconds
    try:
        with tidy_end(), ExitStack() as stack:
            folder = place if place.is_dir() else _unpacked(place, settings, stack)
            result = run_bundle(
                folder, timeout=limit, memory=memory, command=command, writable=True if writable else None,
                output="capture" if json else "inherit", scratch=_scratch(settings),
                stdin=None if json or sys.stdin is None else sys.stdin.buffer,
            )  # fmt: skip
    except Interrupted as error:
        return _SIGNALED + error.number
    if json:
        emit_json({"bundle": os.fspath(place), **result.to_dict()})
    _tell(result, limit)
    return EXIT_TIMEOUT if result.timed_out else result.exit_code


def _scratch(settings: Settings) -> Path:
    from mothball.package.bundle import scratch_dir

    return scratch_dir(settings.data_dir)


def _unpacked(place: Path, settings: Settings, stack: ExitStack) -> Path:
    """The package `place`, unpacked safely to a folder that goes at the end of `stack`."""
    from mothball.package.base_source import open_regular
    from mothball.package.extract import extract
    from mothball.package.target import scratch_folder

    file = stack.enter_context(open_regular(place, printable(os.fspath(place))))
    scratch = stack.enter_context(scratch_folder(_scratch(settings) / "package"))
    folder = scratch / "package"
    folder.mkdir(mode=0o700)
    extract(file, folder, os.fspath(place))
    return folder


def _tell(result: RunResult, limit: float) -> None:
    if result.timed_out:
        note(f"ended after {limit:g} s: its time was over")
    elif result.oom:
        note("the kernel killed a process of it for want of memory (--memory)")
