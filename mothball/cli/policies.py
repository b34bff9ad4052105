"""The command about the rules by which workspaces are reclaimed: policy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mothball import errors
from mothball.cli.lifecycle import By
from mothball.cli.output import JsonFlag, emit_json, line, pairs, table
from mothball.cli.reclaim import value_text
from mothball.cli.session import open_fleet, who

if TYPE_CHECKING:
    from mothball.client import Fleet

PANEL = "Lifecycle"
ACTIONS = ("show", "set", "unset")


def add_to(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    app.command("policy", rich_help_panel=PANEL)(policy)


def policy(
    action: Annotated[str, typer.Argument(metavar="[show|set|unset]", help="What to do.")] = ACTIONS[0],
    rules: Annotated[
        list[str] | None, typer.Argument(metavar="[RULE]...", help="set: ttl=24h stop_after=2h; unset: ttl (none: all).")
    ] = None,
    *,
    repo: Annotated[str | None, typer.Option(help="The rules of this repository.")] = None,
    workspace: Annotated[str | None, typer.Option(metavar="ID", help="The rules of this workspace.")] = None,
    by: By = "",
    json: JsonFlag = False,
) -> None:
    """The rules by which workspaces are reclaimed: of the fleet, a repository or a workspace. The closest one counts."""
    if action not in ACTIONS:
        raise errors.InvalidParams(f"{action!r}: use one of {', '.join(ACTIONS)}, for example `mothball policy set stop_after=2h`")
    if action == "show" and rules:
        raise errors.InvalidParams("`mothball policy` shows all rules; `set` and `unset` take some")
    if action == "set" and not rules:
        raise errors.InvalidParams("set needs rules, for example ttl=24h stop_after=2h")
    with open_fleet() as fleet:
        if action == "set":
            fleet.change_policy(",".join(rules or []), repo=repo, workspace=workspace, by=who(by))
        elif action == "unset" and rules:
            fleet.change_policy(unset=rules, repo=repo, workspace=workspace, by=who(by))
        elif action == "unset":
            fleet.set_policy(None, repo=repo, workspace=workspace, by=who(by))
        told = _told(fleet, repo, workspace)
    if json:
        emit_json(told)
    else:
        _print(told)


def _told(fleet: Fleet, repo: str | None, workspace: str | None) -> dict[str, Any]:
    if workspace is None:
        return fleet.policy(repo=repo)
    return {"workspace": workspace, "own": fleet.own_policy(workspace), "effective": fleet.explain(workspace).to_dict()["policy"]}


def _print(told: dict[str, Any]) -> None:
    levels: list[tuple[str, dict[str, Any]]] = [(level, told[level]) for level in ("setting", "fleet") if level in told]
    levels += [(f"repo {name}", own) for name, own in told.get("repos", {}).items()]
    levels += [(f"workspace {told['workspace']}", told["own"])] if "own" in told else []
    pairs(
        (name, ",".join(f"{field}={value_text(value)}" for field, value in own.items()) or "nothing of its own")
        for name, own in levels
    )
    line()
    table(
        ("FIELD", "VALUE", "FROM"),
        ((name, value_text(each["value"]), each["from"]) for name, each in told["effective"].items()),
    )
