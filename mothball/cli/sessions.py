"""The command about who works in a repository: sessions."""

from __future__ import annotations

from typing import Annotated

import typer

from mothball.cli.output import JsonFlag, emit_json_array, line, table
from mothball.cli.session import open_fleet
from mothball.cli.text import escape

PANEL = "Workspaces"


def add_to(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    app.command("sessions", rich_help_panel=PANEL)(sessions)


def sessions(
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Repository, for example owner/repo.", show_default=False)],
    exclude: Annotated[str | None, typer.Option(metavar="ID", help="Leave this workspace out: your own.")] = None,
    json: JsonFlag = False,
) -> None:
    """Who works in a repository, oldest first: agent, intent, change, state, and since when."""
    with open_fleet() as fleet:
        found = fleet.sessions(repo, exclude=exclude)
    if json:
        emit_json_array(found)
        return
    if not found:
        line(escape(f"nobody works in {repo}" + (" besides" if exclude else "")))
        return
    from mothball.durations import ago

    table(
        ("SESSION", "AGENT", "STATE", "SINCE", "CHANGE", "INTENT"),
        (
            (
                each["session_id"], each["agent_name"] or "-", each["state"], ago(each["elapsed_secs"] * 1000),
                each["changeset_id"] or "-", each["intent"] or "-",
            )
            for each in found
        ),
    )  # fmt: skip
