"""Commands about what is reclaimed, when and why: explain, forecast, sweep."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mothball import errors
from mothball.cli.output import JsonFlag, emit_json, line, note, pairs, table
from mothball.cli.session import open_fleet, who
from mothball.cli.text import escape, printable, time_text
from mothball.cli.workspaces import WorkspaceId

if TYPE_CHECKING:
    from mothball.explain import Explanation
    from mothball.reclaim import Plan

PANEL = "Lifecycle"
Limit = Annotated[int, typer.Option(min=1, help="At most this many.")]
WORDS = {"keep": "kept", "keeps": "keeps it", "fires": "applies"}
"""Where people are told something else than programs."""


def add_to(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    for name, command in (("explain", explain), ("forecast", forecast), ("sweep", sweep)):
        app.command(name, rich_help_panel=PANEL)(command)


def explain(
    workspace: WorkspaceId,
    at: Annotated[str | None, typer.Option(metavar="T", help="As of then: 24h from now, or 2026-01-31T08:00Z.")] = None,
    json: JsonFlag = False,
) -> None:
    """What happens to a workspace, when and why: signals with their ages, each rule with its result, what comes next."""
    with open_fleet() as fleet:
        try:
            found = fleet.explain(workspace, at=None if at is None else moment(at, fleet.registry.time_ms()))
        except errors.Gone:
            tomb = fleet.registry.lifecycle.tombstone(workspace)
            if tomb is None:
                raise
            _print_tombstone(tomb, fleet.registry.time_ms(), json=json)
            return
    if json:
        emit_json(found.to_dict())
    else:
        _print_explanation(found)


def _print_tombstone(tomb: dict[str, Any], now: int, *, json: bool) -> None:
    """Where a workspace went, and why, is what people ask about one that is not there."""
    from mothball.durations import ago

    told = {"workspace": tomb["id"], "state": "evicted", "now": now}
    told |= {name: tomb[name] for name in ("reason", "detail", "by", "at", "until", "digest", "generation", "receipt")}
    if json:
        emit_json(told)
        return
    back = tomb["record"] is not None
    pairs(
        (
            ("workspace", tomb["id"]),
            ("state", f"gone for {ago(now - tomb['at'])}: {tomb['reason']}"),
            ("why", tomb["detail"]),
            ("by", tomb["by"]),
            ("captures", f"generation {tomb['generation']}, {tomb['digest']}" if tomb["digest"] else "none"),
            ("directory", "deleted with a receipt" if tomb["receipt"] else None),
            ("way back", f"`mothball undelete {tomb['id']}` until {time_text(tomb['until'])}" if back else None),
        )
    )


def _print_explanation(found: Explanation) -> None:
    from mothball.durations import ago

    told = found.to_dict()
    reason = f": {told['state_reason']}" if told["state_reason"] else ""
    upcoming = told["next"]
    pairs(
        (
            ("workspace", told["workspace"]),
            ("state", f"{told['state']} for {ago(told['state_ms'])}{reason}"),
            ("host", told["host"]),
            ("mode", told["mode"]),
            ("age", ago(told["age_ms"])),
            ("idle", f"{ago(told['idle_ms'])}, last sign of life: {told['last_signal'] or 'none'}"),
            ("problem", told["problem"]),
            ("now", _now(told)),
            ("next", _next(upcoming) if upcoming["action"] else "nothing, as long as nothing changes"),
        )
    )
    if told["signals"]:
        line()
        table(
            ("SIGNAL", "AGE", "COUNTS"),
            ((each["signal"], ago(each["age_ms"]), "yes" if each["counts"] else "no") for each in told["signals"]),
            right=("AGE",),
        )
    line()
    table(
        ("RULE", "RESULT", "WHEN", "WHY"),
        (
            (each["rule"], WORDS.get(each["result"], each["result"]), time_text(each["at"]), each["detail"] or "-")
            for each in told["rules"]
        ),
    )
    line()
    table(
        ("POLICY", "VALUE", "FROM"),
        ((name, value_text(each["value"]), each["from"]) for name, each in told["policy"].items()),
    )


def _now(told: dict[str, Any]) -> str:
    by = "" if told["rule"] == "none" else f" by {told['rule']}"
    return f"{WORDS.get(told['action'], told['action'])}{by}: {told['detail']}"


def _next(upcoming: dict[str, Any]) -> str:
    from mothball.durations import ago

    if upcoming["at"] is None:
        return str(upcoming["action"])
    return f"{upcoming['action']} in {ago(upcoming['in_ms'])} ({time_text(upcoming['at'])})"


def value_text(value: object) -> str:
    """A value of a policy as people write it."""
    if value is None:
        return "never"
    if isinstance(value, bool):
        return str(value).lower()
    return "+".join(str(each) for each in value) if isinstance(value, (list, tuple)) else str(value)


def forecast(
    at: Annotated[str, typer.Option(metavar="T", help="24h from now, or 2026-01-31T08:00Z.", show_default=False)],
    limit: Limit = 1000,
    json: JsonFlag = False,
) -> None:
    """What the sweeps would do at a time to come if nobody did anything until then. Only reads."""
    with open_fleet() as fleet:
        plan = fleet.forecast(moment(at, fleet.registry.time_ms()), limit=limit)
    _print_plan(plan, json=json)


def moment(text: str, now: int) -> int:
    """ms since 1970 of `text`: a duration from `now`, or an ISO 8601 time (UTC unless it says otherwise), not in the past."""
    from mothball.durations import parse

    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        span = parse(text, "at")
        if span is None:
            raise errors.InvalidParams("at=never is no time; write for example 24h or 2026-01-31T08:00Z") from None
        return now + span
    at = int((found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp() * 1000)
    if at < now:
        raise errors.InvalidParams(f"{text} is in the past; what happened then is in `mothball events`")
    return at


def sweep(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would happen; change nothing.", show_default=False)] = False,
    limit: Limit = 1000,
    json: JsonFlag = False,
) -> None:
    """Reclaim now what is due, as the sweeps do by themselves; with --dry-run only say what and why."""
    with open_fleet() as fleet:
        if dry_run:
            _print_plan(fleet.forecast(limit=limit), json=json)
            return
        report = fleet.sweep(limit=limit, by=who(""))
    if json:
        emit_json(report)
    else:
        _print_report(report)


DONE = ("evicted", "stopping", "stranded", "abandoned", "purging")


def _print_report(report: dict[str, Any]) -> None:
    lines = [(name, f"{count:,} by {rule}") for name in DONE for rule, count in report[name].items()]
    for name, text in lines:
        line(printable(f"{name:<10} {text}"))
    if not lines:
        line("nothing was due that could be reclaimed")
    for reason, count in report["skipped"].items():
        line(printable(f"{'kept':<10} {count:,}: {reason}"))
    if report["jobs"]:
        note(f"note: {len(report['jobs']):,} jobs do the rest; `mothball jobs` shows them")
    if report["remaining"]:
        note(f"note: {report['remaining']:,} more are due; the next sweep takes them, or run it again")


def _print_plan(plan: Plan, *, json: bool) -> None:
    if json:
        emit_json(plan.to_dict())
        return
    told = plan.to_dict()
    if not told["items"]:
        line(f"nothing is due at {time_text(told['now'])}")
    else:
        table(
            ("WORKSPACE", "STATE", "WHAT", "RULE", "WHY"),
            (
                (each["workspace"], each["state"], "purge" if each["purge"] else each["action"], each["rule"], each["detail"])
                for each in told["items"]
            ),
        )
        line(f"\nat {time_text(told['now'])}: {len(told['items']):,} of them; nothing was changed")
    for each in told["notices"]:
        line(escape(f"notice: {each['workspace']}: {each['action']} at {time_text(each['due'])}"))
    for reason, count in sorted(told["skipped"].items()):
        line(f"kept: {count:,} ({printable(reason)})")
    for each in told["problems"]:
        note(printable(f"note: {each['workspace']} was kept: {each['reason']}"))
    if told["remaining"]:
        note(f"note: {told['remaining']:,} more are due and not shown; --limit shows more")
