"""Commands about what runs in a workspace: stats, health, ping, ports. Looking is no sign of life: none of them keeps it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from mothball import errors
from mothball.cli.output import JsonFlag, emit_json, line, pairs, table
from mothball.cli.session import open_fleet
from mothball.cli.text import escape, human_bytes, human_seconds, printable, time_text
from mothball.cli.waiting import NoWait, Timeout, finished
from mothball.cli.workspaces import WorkspaceId

if TYPE_CHECKING:
    from collections.abc import Callable

    from mothball.client import Fleet
    from mothball.handles import JobHandle

PANEL = "Runtime"


def add_to(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    for name, command in (("stats", stats), ("health", health), ("ping", ping), ("ports", ports)):
        app.command(name, rich_help_panel=PANEL)(command)


def _ask(
    workspace: str,
    call: Callable[[Fleet], JobHandle[dict[str, Any]]],
    show: Callable[[dict[str, Any]], None],
    *,
    no_wait: bool,
    timeout: str | None,
    json: bool,
) -> dict[str, Any] | None:
    with open_fleet() as fleet:
        result = finished(call(fleet), printable(workspace), no_wait=no_wait, timeout=timeout, json=json)
    if result is None:
        return None
    if json:
        emit_json(result)
    else:
        show(result)
    return result


def stats(workspace: WorkspaceId, *, no_wait: NoWait = False, timeout: Timeout = None, json: JsonFlag = False) -> None:
    """CPU seconds, memory, disk and processes of a workspace; of one that ended the last ones known, marked stale."""
    _ask(workspace, lambda fleet: fleet.stats(workspace), _print_stats, no_wait=no_wait, timeout=timeout, json=json)


def _print_stats(result: dict[str, Any]) -> None:
    def size(name: str) -> str | None:
        return None if result.get(name) is None else human_bytes(result[name])

    pairs(
        (
            ("cpu", None if result.get("cpu_seconds") is None else human_seconds(float(result["cpu_seconds"]))),
            ("memory", size("rss_bytes")),
            ("disk", size("disk_bytes")),
            ("processes", result.get("processes")),
            ("collected", time_text(result.get("collected_at"))),
            ("stale", f"yes, the last ones known: {result.get('reason', '')}" if result.get("stale") else None),
            ("directory", result.get("directory")),
        )
    )


def health(workspace: WorkspaceId, *, no_wait: NoWait = False, timeout: Timeout = None, json: JsonFlag = False) -> None:
    """Is what runs in a workspace well? Exit code 1 when it is not; the reason is printed."""
    result = _ask(workspace, lambda fleet: fleet.health(workspace), _print_health, no_wait=no_wait, timeout=timeout, json=json)
    if result is not None and not result["healthy"]:
        raise errors.NotRunning(f"workspace {workspace!r} is not healthy: {result.get('reason', '')}")


def _print_health(result: dict[str, Any]) -> None:
    line(("healthy" if result["healthy"] else "not healthy") + f": {printable(str(result.get('reason', '')))}")


def ping(workspace: WorkspaceId, *, no_wait: NoWait = False, timeout: Timeout = None, json: JsonFlag = False) -> None:
    """Does what runs in a workspace still live? Exit code 1 when it does not."""
    result = _ask(workspace, lambda fleet: fleet.ping(workspace), _print_ping, no_wait=no_wait, timeout=timeout, json=json)
    if result is not None and not result["alive"]:
        raise errors.NotRunning(f"workspace {workspace!r} does not run: {result.get('reason', '')}")


def _print_ping(result: dict[str, Any]) -> None:
    line(("alive" if result["alive"] else "not alive") + f": {printable(str(result.get('reason', '')))}")


def ports(workspace: WorkspaceId, *, no_wait: NoWait = False, timeout: Timeout = None, json: JsonFlag = False) -> None:
    """What listens in a workspace, and which of it speaks http or https."""

    def show(result: dict[str, Any]) -> None:
        found = result.get("ports", [])
        if not found:
            line(escape(f"nothing listens in {workspace}"))
            return
        table(
            ("ADDRESS", "PORT", "PID", "PROCESS", "URL"),
            (
                (
                    each["address"],
                    each["port"],
                    each.get("pid") or "-",
                    each.get("process") or "-",
                    each.get("url") or each.get("note") or "-",
                )
                for each in found
            ),
            right=("PORT", "PID"),
        )

    _ask(workspace, lambda fleet: fleet.ports(workspace), show, no_wait=no_wait, timeout=timeout, json=json)
