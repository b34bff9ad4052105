"""What a command prints: JSON for programs on stdout, tables for people, notes and errors on stderr.

rich is loaded only when a table or a progress bar is drawn.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from mothball.cli.text import escape, human_bytes, json_safe, path_fields, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from mothball.errors import MothballError
    from mothball.registry import Job

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON for programs.", show_default=False)]
# Wide enough for any name: a pipe has no width, and a cut or wrapped digest is of no use to grep.
PIPE_WIDTH = 100_000


def emit_json(value: Any) -> None:
    """One JSON document."""
    sys.stdout.write(json.dumps(json_safe(value), indent=2, ensure_ascii=False) + "\n")


def emit_json_line(value: Any, to: TextIO | None = None) -> None:
    """One JSON document on one line, flushed: for streams; `to` stdout unless that belongs to somebody else."""
    out = sys.stdout if to is None else to
    out.write(json.dumps(json_safe(value), ensure_ascii=False) + "\n")
    out.flush()


def emit_json_array(items: Iterable[Any]) -> None:
    """A JSON array, one element per line, written as it comes: a listing of a million files is never held in memory."""
    separator = "[\n"
    for item in items:
        sys.stdout.write(separator + json.dumps(json_safe(item), ensure_ascii=False))
        separator = ",\n"
    sys.stdout.write("[]\n" if separator == "[\n" else "\n]\n")


def line(text: str = "") -> None:
    """One line on stdout."""
    sys.stdout.write(text + "\n")


def note(text: str) -> None:
    """One line for people on stderr; never part of the machine output."""
    sys.stderr.write(printable(text) + "\n")
    sys.stderr.flush()


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Sequence[str] = (), title: str | None = None) -> None:
    """A table; cells are escaped, columns named in `right` are right-aligned. Only the head when there are no rows."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    tty = sys.stdout.isatty()
    drawn = Table(box=SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False, show_edge=False, header_style="bold")
    for name in columns:
        drawn.add_column(name, justify="right" if name in right else "left", overflow="fold", no_wrap=not tty)
    for row in rows:
        drawn.add_row(*(Text(escape(str(cell))) for cell in row))
    console = Console(file=sys.stdout, width=None if tty else PIPE_WIDTH, highlight=False, emoji=False, markup=False)
    with console.capture() as drawing:
        console.print(drawn)
    sys.stdout.write("".join(text.rstrip() + "\n" for text in drawing.get().splitlines()))


def pairs(values: Iterable[tuple[str, object]]) -> None:
    """``name  value`` lines, aligned; values are escaped, None and empty ones are left out."""
    shown = [(name, escape(str(value))) for name, value in values if value not in (None, "", [], {})]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        line(f"{name:<{width}}  {value}")


def emit_error(error: MothballError, *, as_json: bool, hint: str | None = None) -> None:
    """The one form of an error, on stderr: ``error: <code>: <message>`` or its JSON object on one line."""
    if as_json:
        sys.stderr.write(json.dumps(json_safe({"error": error.to_dict() | ({"hint": hint} if hint else {})}), default=str) + "\n")
    else:
        sys.stderr.write(f"error: {error.code}: {printable(error.message)}\n" + (f"hint: {printable(hint)}\n" if hint else ""))
    sys.stderr.flush()


def with_path(item: dict[str, Any], name: str) -> dict[str, Any]:
    """`item` with ``path`` (and ``path_b64``) in front."""
    return {**path_fields(name), **item}


class JobProgress:
    """Shows a waited-for job on a terminal; silent everywhere else (`hidden`, pipes, CI logs)."""

    def __init__(self, label: str, *, hidden: bool = False) -> None:
        self._label = label
        self._status: Any = None
        if not hidden and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            self._status = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TimeElapsedColumn(),
                console=Console(file=sys.stderr),
                transient=True,
            )
            self._task = self._status.add_task(label, total=None)

    def __enter__(self) -> Callable[[Job], None]:
        if self._status is not None:
            self._status.start()
        return self.update

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()

    def update(self, job: Job) -> None:
        """Redraw from the job's record."""
        if self._status is None:
            return
        done, total = progress_amounts(job.progress)
        self._status.update(self._task, description=f"{self._label}: {describe_progress(job)}", completed=done, total=total)


def progress_amounts(progress: dict[str, Any]) -> tuple[float, float | None]:
    """What is done and the total, from a job's progress; the total is None while it is not known."""
    for done, total in (("bytes", "total_bytes"), ("files", "total_files"), ("current", "total")):
        whole = progress.get(total)
        if isinstance(whole, (int, float)) and whole > 0:
            return min(float(progress.get(done) or 0), float(whole)), float(whole)
    return 0.0, None


def describe_progress(job: Job) -> str:
    """One short line about a job: its state, or the checkpoint with counts while it runs."""
    if job.state != "running" or not job.progress:
        return job.state
    parts = [str(job.progress.get("step") or "running")]
    parts.extend(f"{count:,} {unit}" for unit in ("files", "entries") if isinstance(count := job.progress.get(unit), int))
    if isinstance(size := job.progress.get("bytes"), int):
        parts.append(human_bytes(size))
    return printable(", ".join(parts))
