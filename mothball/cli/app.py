"""Builds the application and runs it with the one error handler.

Nothing heavy is imported here: `mothball --help` must answer at once, so the registry, the settings and the capture
code are imported inside the commands that need them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mothball import __version__, errors
from mothball.cli import (
    bundle,
    collect,
    crash,
    crash_reports,
    doctor,
    fleet,
    image_cache,
    jobs,
    lifecycle,
    look,
    policies,
    reclaim,
    restore,
    runtime,
    seal,
    sessions,
    snapshots,
    store,
    transfer,
    workspaces,
)
from mothball.cli import exec as exec_
from mothball.cli.output import emit_error

if TYPE_CHECKING:
    from collections.abc import Sequence

EXIT_INTERRUPTED = 130
EXIT_PIPE = 141
DEBUG_HINT = "MOTHBALL_LOG_LEVEL=debug shows where it happened"
HINTS: dict[type[errors.MothballError], str] = {
    errors.Unavailable: "`mothball up` starts a fleet on this machine; MOTHBALL_REDIS_URL or MOTHBALL_DATA_DIR names another one",
}


def _version(value: bool) -> None:
    if value:
        sys.stdout.write(f"mothball {__version__}\n")
        raise typer.Exit


def _root(
    _version_asked: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.", show_default=False)
    ] = False,
) -> None:
    """Captures, snapshots, packages, stops and reclaims workspaces on a fleet of hosts.

    New here? `mothball demo` shows the whole story on a real tree; `mothball up` starts a fleet on this machine.
    Settings are MOTHBALL_* variables; `mothball status` prints them.
    """


def build_app() -> typer.Typer:
    """The operators' commands; `workers.main` adds those that start processes."""
    app = typer.Typer(name="mothball", no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich")
    app.callback()(_root)
    workspaces.add_to(app)
    sessions.add_to(app)
    lifecycle.add_to(app)
    reclaim.add_to(app)
    policies.add_to(app)
    runtime.add_to(app)
    exec_.add_to(app)
    crash.add_to(app)
    crash_reports.add_to(app)
    jobs.add_to(app)
    snapshots.add_to(app)
    look.add_to(app)
    store.add_to(app)
    restore.add_to(app)
    transfer.add_to(app)
    collect.add_to(app)
    fleet.add_to(app)
    image_cache.add_to(app)
    doctor.add_to(app)
    bundle.add_to(app)
    seal.add_to(app)
    return app


def run(app: typer.Typer, argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; every error ends as one clear line (or JSON object) on stderr."""
    args = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in args[: args.index("--") if "--" in args else len(args)]
    _prepare_streams()
    try:
        code = _invoke(app, args)
        sys.stdout.flush()
    except BrokenPipeError:
        return _pipe_closed()
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except SystemExit as error:
        # typer answers EPIPE by itself with exit code 1 and a stdout that swallows everything.
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except errors.MothballError as error:
        emit_error(error, as_json=as_json, hint=HINTS.get(type(error)))
        return error.exit_code
    except Exception as error:
        return _unexpected(error, as_json=as_json)
    return code


def _invoke(app: typer.Typer, args: list[str]) -> int:
    named = [info for info in app.registered_commands if args and info.name == args[0]]
    groups = [info for info in app.registered_groups if args and info.name == args[0]]
    if named or groups:  # reading the options of every other command takes longer than some commands do
        app.registered_commands, app.registered_groups = named, groups
    command = typer.main.get_command(app)
    try:
        outcome = command.main(args=args, prog_name="mothball", standalone_mode=False)
    except typer.Abort:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        raise
    except Exception as error:
        # The parser's own errors; the class moved between typer's releases, its two members did not.
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            if type(error).__name__ == "NoArgsIsHelpError":
                sys.stdout.write(error.format_message() + "\n")
                return 0
            context = getattr(error, "ctx", None)
            path = getattr(context, "command_path", None) or "mothball"
            raise errors.InvalidParams(f"{error.format_message().rstrip('.')}; see `{path} --help`") from None
        raise
    return outcome if isinstance(outcome, int) and not isinstance(outcome, bool) else 0


def _prepare_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        reconfigure: Any = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            # A terminal that is not UTF-8 must not turn a listing into a UnicodeEncodeError.
            reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("warning: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


def _pipe_closed() -> int:
    # The reader left (`| head`). Without this the interpreter complains again while it flushes at exit.
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_PIPE


def _unexpected(error: Exception, *, as_json: bool) -> int:
    debug = False
    try:
        from mothball.settings import Settings

        debug = Settings.load().log_level == "debug"
    except errors.MothballError:
        pass
    if debug:
        import traceback

        traceback.print_exception(error, file=sys.stderr)
    text = str(error) or type(error).__name__
    wrapped = errors.OperationFailed(text if isinstance(error, OSError) else f"{type(error).__name__}: {text}")
    emit_error(wrapped, as_json=as_json, hint=None if debug else DEBUG_HINT)
    return wrapped.exit_code
