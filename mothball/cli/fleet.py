"""Commands about the fleet: hosts, events, status."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mothball.cli.output import JsonFlag, emit_json, emit_json_array, emit_json_line, line, pairs, table
from mothball.cli.session import open_fleet
from mothball.cli.text import age, escape, human_bytes, time_text

if TYPE_CHECKING:
    from mothball.client import Fleet
    from mothball.registry import Event, Host
    from mothball.settings import Settings

PANEL = "Fleet"
JOB_STATES = ("queued", "running", "succeeded", "failed", "cancelled", "dead")
STATUS_JOBS = 10_000
QUEUE_PILE = 1000


def add_to(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    for name, command in (("hosts", hosts), ("events", events), ("status", status)):
        app.command(name, rich_help_panel=PANEL)(command)


def hosts(json: JsonFlag = False) -> None:
    """List the hosts that have announced a worker."""
    with open_fleet() as fleet:
        found = fleet.registry.hosts.list()
        now = fleet.registry.time_ms()
    if json:
        emit_json_array(_host_fields(host) for host in found)
        return
    table(
        ("HOST", "STATE", "LAST SEEN", "VERSION", "WORKERS", "DATA DIR", "IMAGE CACHES"),
        (
            (
                host.host,
                "online" if host.online else "offline",
                age(host.last_seen, now),
                host.info.get("version", "-"),
                host.info.get("concurrency", "-"),
                host.info.get("data_dir", "-"),
                _caches(host),
            )
            for host in found
        ),
        right=("WORKERS",),
    )


def _caches(host: Host) -> str:
    """``2, disk 91.5 % full``: how many there are, and the fullest disk that holds one; what is wrong comes first."""
    found = host.info.get("image_caches")
    told = [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []
    if not told:
        return "-"
    wrong = sum(1 for each in told if each.get("problem"))
    if wrong:
        return f"{len(told)}, {wrong} of them with a problem (--json)"
    fullest = max((float(each.get("used_percent") or 0) for each in told), default=0.0)
    return f"{len(told)}, disk {fullest:g} % full"


def _host_fields(host: Host) -> dict[str, Any]:
    return {"host": host.host, "online": host.online, "last_seen": host.last_seen, "info": host.info}


def events(
    limit: Annotated[int, typer.Option(min=1, help="At most this many of the latest.")] = 50,
    workspace: Annotated[str | None, typer.Option(help="Only this workspace.")] = None,
    kind: Annotated[str | None, typer.Option(help="Only this kind, for example workspace.captured.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as they happen.", show_default=False)] = False,
    json: JsonFlag = False,
) -> None:
    """What happened, oldest first. With --follow --json: one object per line."""
    with open_fleet() as fleet:
        log = fleet.registry.events
        # Taken before the list is read, so that nothing falls between the list and what follows it.
        newest = log.list(limit=1) if follow else []
        found = sorted(log.list(limit=limit, workspace=workspace, kind=kind), key=_stream_order)
        if json and not follow:
            emit_json_array(_event_fields(event) for event in found)
            return
        for event in found:
            _print_event(event, json)
        if not follow:
            return
        printed = {event.id for event in found}
        for event in log.follow(newest[0].id if newest else "0-0"):
            wanted = workspace is None or event.fields.get("workspace") == workspace
            if wanted and kind in (None, event.kind) and event.id not in printed:
                _print_event(event, json)


def _stream_order(event: Event) -> tuple[int, int]:
    at, _, number = event.id.partition("-")
    return int(at), int(number or 0)


def _event_fields(event: Event) -> dict[str, Any]:
    return {"id": event.id, "at": event.at, "kind": event.kind, "fields": event.fields}


def _print_event(event: Event, json: bool) -> None:
    if json:
        emit_json_line(_event_fields(event))
        return
    fields = " ".join(f"{name}={escape(str(value))}" for name, value in event.fields.items() if value not in (None, ""))
    line(f"{time_text(event.at)}  {escape(event.kind):<22} {fields}")


def status(json: JsonFlag = False) -> None:
    """The fleet at a glance: server, hosts, queues, jobs, counters, warnings, and the settings (secrets hidden)."""
    with open_fleet() as fleet:
        report = _collect(fleet)
    if json:
        emit_json(report)
        return
    pairs((("redis", f"{report['redis']['server']} {report['redis']['version']} at {report['settings']['redis_url']}"),))
    pairs(
        (
            ("memory", report["redis"]["used_memory_human"]),
            ("namespace", report["settings"]["namespace"]),
            ("this host", report["settings"]["host"]),
            ("data dir", report["settings"]["data_dir"]),
            ("workspaces", _states(report)),
            ("budget", _budget_line(report["budget"])),
        )
    )
    for title, columns, rows in (
        ("hosts", ("HOST", "STATE"), [(host["host"], "online" if host["online"] else "offline") for host in report["hosts"]]),
        ("queues", ("QUEUE", "WAITING"), list(report["queues"].items())),
        ("jobs", ("STATE", "JOBS"), list(report["jobs"].items())),
        ("counters", ("COUNTER", "VALUE"), sorted(report["counters"].items())),
        ("settings", ("SETTING", "VALUE"), [(name, _shown(value)) for name, value in report["settings"].items()]),
    ):
        line()
        if rows:
            table(columns, rows, title=title, right=("WAITING", "JOBS"))
        else:
            line(f"{title}: none")
    for warning in report["warnings"]:
        line(f"\nwarning: {escape(warning)}")


def _shown(value: object) -> object:
    return ":".join(str(part) for part in value) if isinstance(value, list) else value


def _collect(fleet: Fleet) -> dict[str, Any]:
    from collections import Counter

    from mothball.names import QUEUE_CONTROL, QUEUE_DISPATCH, host_queue

    settings, registry = fleet.settings, fleet.registry
    found = registry.hosts.list()
    names = [host_queue(host.host) for host in found] + [QUEUE_CONTROL, QUEUE_DISPATCH]
    server, queues = _server(settings, names)
    states = Counter(job.state for job in registry.jobs.list(limit=STATUS_JOBS))
    report: dict[str, Any] = {
        "redis": server,
        "hosts": [_host_fields(host) for host in found],
        "queues": queues,
        "jobs": {state: states.get(state, 0) for state in JOB_STATES},
        "workspaces": registry.workspaces.count(),
        "states": registry.sessions.states(),
        "budget": registry.budget.state(_limit(fleet)).to_dict(),
        "counters": registry.counters.all(),
        "settings": settings.redacted(),
    }
    report["warnings"] = [*_warnings(settings, report), *_policy_warnings(fleet)]
    return report


def _states(report: dict[str, Any]) -> str:
    """``12: 10 active, 2 stopped``"""
    counts = ", ".join(f"{count:,} {state}" for state, count in report["states"].items() if count)
    return f"{report['workspaces']:,}" + (f": {counts}" if counts else "")


def _budget_line(budget: dict[str, Any]) -> str:
    """What is taken of the byte budget, in words (Q-73)."""
    taken = f"{human_bytes(budget['loaded'])} captured, {human_bytes(budget['reserved'])} promised to jobs"
    limit = "no limit" if budget["limit"] is None else f"limit {human_bytes(budget['limit'])}"
    return (
        f"{taken}, {limit}; highest {human_bytes(budget['high_water'])}; {human_bytes(budget['retained'])} more kept for undelete"
    )


def _limit(fleet: Fleet) -> int | None:
    """The fleet's byte budget; None without one, and when its policy cannot be read (a warning says that)."""
    from mothball.errors import InvalidParams

    try:
        return fleet.registry.policies.book().fleet_policy().budget
    except InvalidParams:
        return None


def _policy_warnings(fleet: Fleet) -> list[str]:
    """Auto-stop is off unless somebody asks for it (N-30), and who does not know that pays for idle processes."""
    from mothball.errors import InvalidParams

    try:
        book = fleet.registry.policies.book()
        if book.damaged:
            return list(book.damaged.values())
        if book.fleet_policy().stop_after is not None or any("stop_after" in own for own in book.repos.values()):
            return []
    except InvalidParams as error:
        return [f"the fleet's policy cannot be read, so nothing is reclaimed: {error.message}"]
    return ["auto-stop is off: processes that nobody uses run on; `mothball policy set stop_after=2h` ends them"]


def _server(settings: Settings, queues: list[str]) -> tuple[dict[str, Any], dict[str, int]]:
    """Server facts and the number of waiting messages per queue."""
    from redis import Redis
    from redis.backoff import NoBackoff
    from redis.exceptions import RedisError
    from redis.retry import Retry

    from mothball.errors import Unavailable

    client = Redis.from_url(
        settings.broker_url,
        socket_timeout=settings.redis_timeout,
        socket_connect_timeout=settings.redis_timeout,
        decode_responses=True,
        retry=Retry(NoBackoff(), 0),
    )
    try:
        info: dict[str, Any] = client.info()
        lengths = {queue: int(client.llen(queue)) for queue in queues}
    except (RedisError, OSError) as error:
        raise Unavailable(url=settings.redacted()["redis_url"], reason=type(error).__name__) from None
    finally:
        client.close()
    server = {
        "server": info.get("server_name") or ("valkey" if "valkey_version" in info else "redis"),
        "version": info.get("valkey_version") or info.get("redis_version"),
        "used_memory": info.get("used_memory"),
        "used_memory_human": info.get("used_memory_human"),
        "maxmemory_policy": info.get("maxmemory_policy"),
        "aof_enabled": bool(info.get("aof_enabled")),
        "uptime_seconds": info.get("uptime_in_seconds"),
    }
    return server, lengths


def _warnings(settings: Settings, report: dict[str, Any]) -> list[str]:
    """What an operator should know before it hurts."""
    out = []
    this = next((host for host in report["hosts"] if host["host"] == settings.host), None)
    if not settings.workspace_roots and this is None:
        out.append("MOTHBALL_WORKSPACE_ROOTS is empty: a worker with these settings would refuse every path")
    if not report["hosts"]:
        out.append("no worker has announced itself; `mothball up` starts a fleet on this machine")
    out.extend(f"host {host['host']} is offline; its jobs wait" for host in report["hosts"] if not host["online"])
    if report["redis"]["maxmemory_policy"] not in (None, "noeviction"):
        out.append(f"maxmemory-policy is {report['redis']['maxmemory_policy']}: Redis may drop jobs; set noeviction")
    if not report["redis"]["aof_enabled"]:
        out.append("Redis has no append-only file: a restart may lose the last jobs; set appendonly yes")
    if report["jobs"]["dead"]:
        out.append(f"{report['jobs']['dead']} jobs are dead: `mothball jobs --state dead`")
    out.extend(f"queue {queue} holds {length} messages" for queue, length in report["queues"].items() if length > QUEUE_PILE)
    return out
