"""The command that looks after one host: doctor."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mothball import errors
from mothball.cli.output import JsonFlag, emit_json, line, note
from mothball.cli.text import escape, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mothball.doctor.checks import Check
    from mothball.doctor.rebuild import Rebuilt
    from mothball.settings import Settings

PANEL = "Fleet"
DETAILS_SHOWN = 20
_SAID = {
    "rebuilt": "record made again", "missing": "would be made again", "exists": "has a record", "other_host": "left alone",
    "gone": "was released", "released": "was released", "empty": "never captured", "impossible": "cannot be rebuilt",
}  # fmt: skip
_QUIET = {"exists", "gone", "released", "empty"}


def add_to(app: typer.Typer) -> None:
    """Add this module's command to `app`."""
    app.command("doctor", rich_help_panel=PANEL)(doctor)


def doctor(
    rebuild_registry: Annotated[
        bool,
        typer.Option(
            "--rebuild-registry", help="Make the records of this host's workspaces again from its store, after Redis was lost.",
            show_default=False,
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --rebuild-registry: only say what would be made.", show_default=False)
    ] = False,
    json: JsonFlag = False,
) -> None:  # fmt: skip
    """Look at this host: Redis, clock, worker, roots, store, space, damaged captures, lost records. Exit code 1 on a problem."""
    if dry_run and not rebuild_registry:
        raise errors.InvalidParams("--dry-run belongs to --rebuild-registry; the checks of doctor change nothing anyway")
    if rebuild_registry:
        _rebuild(dry_run=dry_run, json=json)
    else:
        _diagnose(json=json)


def _diagnose(*, json: bool) -> None:
    from mothball.doctor.checks import Check, diagnose

    found: list[Check] = []
    try:
        settings = _settings()
    except errors.ConfigError as error:
        checks: Iterator[Check] = iter([Check("settings", "problem", error.message, "docs/settings.md lists every setting")])
    else:
        checks = diagnose(settings, progress=_Counter("reading captures", hidden=json))
    for check in checks:
        found.append(check)
        if not json:
            _print(check)
    problems = [check for check in found if check.state == "problem"]
    if json:
        emit_json({"healthy": not problems, "checks": [check.to_dict() for check in found]})
    if problems:
        raise errors.OperationFailed(f"this host needs attention: {', '.join(check.name for check in problems)}")
    if not json:
        line("healthy")


def _print(check: Check) -> None:
    line(printable(f"{check.state:<8} {check.name:<9} {check.message}"))
    for detail in check.details[:DETAILS_SHOWN]:
        line(printable(f"{'':<18} - {detail}"))
    if len(check.details) > DETAILS_SHOWN:
        line(f"{'':<18} - and {len(check.details) - DETAILS_SHOWN} more; --json has them all")
    if check.hint and check.state != "ok":
        line(printable(f"{'':<18} {check.hint}"))


def _rebuild(*, dry_run: bool, json: bool) -> None:
    from mothball.doctor.rebuild import rebuild
    from mothball.registry import Registry
    from mothball.store import Store

    settings = _settings()
    with Registry.connect(settings) as registry, _progress("rebuild", hidden=json) as progress:
        found = rebuild(registry, Store(settings.store_dir), settings.host, dry_run=dry_run, progress=progress)
    if json:
        emit_json({"dry_run": dry_run, "workspaces": [each.to_dict() for each in found]})
    else:
        for each in found:
            _print_rebuilt(each)
        counts = {status: sum(each.status == status for each in found) for status in _SAID}
        line("; ".join(f"{count:,} {_SAID[status]}" for status, count in counts.items() if count) or "this store has no captures")
    failed = sum(each.status == "impossible" for each in found)
    damaged = sum(bool(each.problems or each.damaged) for each in found)
    if failed or damaged:
        raise errors.Corrupt(what="the store", reason=f"{failed} workspaces cannot be rebuilt, {damaged} have damaged captures")


def _print_rebuilt(each: Rebuilt) -> None:
    name = each.workspace or each.folder
    if each.status not in _QUIET or each.problems or each.damaged:
        known = f": generation {each.generation}, {each.snapshots} snapshots, {each.path}" if each.path else ""
        line(escape(f"{name} {_SAID[each.status]}{known}"))
    if each.reason and each.status not in _QUIET:
        line(escape(f"  {each.reason}"))
    if each.status in {"rebuilt", "missing"} and not each.path_exists:
        line(escape(f"  its directory {each.path} is not there"))
    if each.unknown:
        line(f"  not known: {', '.join(each.unknown)}")
    for problem in (*each.problems, *(f"{ref}: {reason}" for ref, reason in each.damaged.items())):
        line(printable(f"  damaged: {problem}"))


def _settings() -> Settings:
    from mothball.settings import Settings

    return Settings.load()


class _Counter:
    """Says on a terminal, now and then, how far a long look has come."""

    def __init__(self, label: str, *, hidden: bool) -> None:
        self._label = label
        self._shown = sys.stderr.isatty() and not hidden

    def __call__(self, done: int, total: int) -> None:
        if self._shown and done % 1000 == 0:
            note(f"{self._label}: {done:,} of {total:,} workspaces")


@contextmanager
def _progress(label: str, *, hidden: bool) -> Iterator[Callable[[int, int], None]]:
    if hidden or not sys.stderr.isatty():
        yield lambda _done, _total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns: tuple[Any, ...] = (TextColumn(label, markup=False), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as shown:
        task = shown.add_task(label, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)
