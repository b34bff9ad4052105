"""What commands share that submit a job and wait for its end."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from mothball import errors
from mothball.cli.output import JobProgress, emit_json, line, note
from mothball.cli.text import escape, parse_duration, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mothball.handles import JobHandle

T = TypeVar("T")
NoWait = Annotated[bool, typer.Option("--no-wait", help="Print the job's id and do not wait for its end.", show_default=False)]
Timeout = Annotated[str | None, typer.Option(help="Longest wait, for example 90s or 10m; the job goes on.")]


def finished(handle: JobHandle[T], label: str, *, no_wait: bool, timeout: str | None, json: bool) -> T | None:
    """The result of a submitted job once it has ended, with progress on a terminal.

    With `no_wait` the job's id is printed instead and the answer is None. Raises what the job ended with, `TimedOut`, and
    `InvalidParams` for a `timeout` that is none.
    """
    if no_wait:
        if json:
            emit_json({"job": handle.id, "joined": handle.joined})
        else:
            joined = " (joined a queued job)" if handle.joined else ""
            line(escape(f"job {handle.id}{joined}; `mothball job {handle.id}` shows it"))
        return None
    try:
        with JobProgress(label, hidden=json) as update:
            return handle.wait(None if timeout is None else parse_duration(timeout), on_poll=update)
    except (KeyboardInterrupt, errors.TimedOut):
        note(f"job {handle.id} goes on: `mothball job {handle.id}` shows it, `mothball cancel {handle.id}` ends it")
        raise


@contextmanager
def counting(label: str, *, hidden: bool) -> Iterator[Callable[[str, int], None]]:
    """A bar on a terminal for work in this process; the function it gives is called with the name and the number of all items."""
    if hidden or not sys.stderr.isatty():
        yield lambda _name, _total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as shown:
        task = shown.add_task(label, total=None)
        yield lambda name, total: shown.update(task, description=f"{label}: {printable(name)}", total=total, advance=1)
