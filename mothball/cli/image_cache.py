"""Commands about image caches: prune, ls, verify, undelete, use. One line per cache."""

from __future__ import annotations

import os
import sys
import uuid
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mothball import durations, errors
from mothball.cli.local import load_settings
from mothball.cli.output import JsonFlag, emit_json_array, line, note, table
from mothball.cli.session import open_fleet, who
from mothball.cli.text import escape, human_bytes, printable
from mothball.cli.waiting import NoWait, Timeout, finished

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mothball.client import Fleet
    from mothball.handles import JobHandle
    from mothball.pruning import CacheRun
    from mothball.settings import Settings

    One = Callable[[CacheRun, Callable[[int], None]], dict[str, Any]]
    Submit = Callable[[Fleet, str, str], JobHandle[dict[str, Any]]]

PANEL = "Fleet"
SHOWN = 5
WHY = {
    "young": "written within the grace", "used": "used lately enough", "reserve": "within the reserve", "open": "open",
    "leased": "used since a lease began", "kept": "to be kept", "reachable": "reachable from an index", "other": "no blob",
    "permission": "not to be removed by this user", "algorithm": "named by another digest than sha256",
    "pulling": "maybe needed by a pull in progress",
}  # fmt: skip
"""Reasons to stay, as the answer words them."""
HostOption = Annotated[str | None, typer.Option(help="Host whose caches they are; default: this one, at once.", show_default=False)]
DirOption = Annotated[
    str | None, typer.Option("--dir", metavar="DIR", help="Only this cache; default: all of the host.", show_default=False)
]


def add_to(app: typer.Typer) -> None:
    """Add ``image cache ...`` to `app`."""
    image = typer.Typer(help="Image caches of the hosts.", no_args_is_help=True)
    cache = typer.Typer(help="Pull caches that hosts declare: keep them small, look at them, mend them.", no_args_is_help=True)
    for name, command in (("prune", prune), ("ls", ls), ("verify", verify), ("undelete", undelete), ("use", use)):
        cache.command(name)(command)
    image.add_typer(cache, name="cache")
    app.add_typer(image, name="image", rich_help_panel=PANEL)


def prune(
    *,
    host: HostOption = None,
    directory: DirOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go; change nothing.", show_default=False)] = False,
    everything: Annotated[bool, typer.Option("--all", help="Empty the cache, at once and for good.", show_default=False)] = False,
    older_than: Annotated[str | None, typer.Option(metavar="SPAN", help="What nobody used for longer, such as 7d.")] = None,
    max_bytes: Annotated[str | None, typer.Option(metavar="SIZE", help="Most that may stay, such as 10GiB.")] = None,
    min_free: Annotated[str | None, typer.Option(metavar="SIZE", help="Free space on the disk, 15% or 50GiB.")] = None,
    reserve: Annotated[str | None, typer.Option(metavar="SIZE", help="What always stays, such as 1GiB.")] = None,
    keep: Annotated[list[str] | None, typer.Option(metavar="DIGEST", help="Digest or pattern that stays; repeatable.")] = None,
    quarantine: Annotated[str | None, typer.Option(metavar="SPAN", help="How long it can be brought back; 0: not at all.")] = None,
    no_wait: NoWait = False,
    timeout: Timeout = None,
    json: JsonFlag = False,
) -> None:
    """Take out of image caches what their policy says, least recently used first. What is in use stays.

    Options change words of each cache's own policy for this run. With --host it is a job of that host.
    """
    from mothball import cache_fields

    given: dict[str, Any] = {
        "older_than": older_than, "max_bytes": max_bytes, "min_free": min_free, "reserve": reserve, "keep": keep,
        "quarantine": quarantine,
    }  # fmt: skip
    words = cache_fields.check({name: value for name, value in given.items() if value not in (None, [])})
    if everything and words:
        raise errors.InvalidParams("--all empties the cache: there is nothing left for a policy to decide; leave one of them out")

    def here(run: CacheRun, tick: Callable[[int], None]) -> dict[str, Any]:
        result = run.prune(words, dry_run=dry_run, everything=everything, tick=tick)
        try:
            run.note(result, f"cli:{uuid.uuid4()}", reason="asked")
        except errors.Unavailable as error:
            note(f"note: the prune is done, and not counted: {error.message}")
        return result

    def there(fleet: Fleet, name: str, folder: str) -> JobHandle[dict[str, Any]]:
        return fleet.cache_prune(name, folder, words, dry_run=dry_run, everything=everything)

    results = _each("prune", here, there, host, directory, no_wait=no_wait, timeout=timeout, json=json)
    _report(results, _pruned, json=json, no_wait=no_wait)


def ls(
    *,
    host: HostOption = None,
    directory: DirOption = None,
    unused_for: Annotated[str | None, typer.Option(metavar="SPAN", help="What counts as unused; default: the policy's.")] = None,
    timeout: Timeout = None,
    json: JsonFlag = False,
) -> None:
    """Measure image caches: size, blobs, oldest and newest use, what nobody used for long. Nothing is changed."""
    span = None if unused_for is None else durations.parse(unused_for, "--unused-for")

    def here(run: CacheRun, tick: Callable[[int], None]) -> dict[str, Any]:
        return run.usage(unused_for_ms=span, tick=tick)

    def there(fleet: Fleet, name: str, folder: str) -> JobHandle[dict[str, Any]]:
        return fleet.cache_ls(name, folder, unused_for=unused_for)

    results = _each("measure", here, there, host, directory, no_wait=False, timeout=timeout, json=json)
    if not json:
        table(
            ("CACHE", "KIND", "SIZE", "BLOBS", "OLDEST", "NEWEST", "UNUSED", "QUARANTINE"),
            (_listed(each) for each in results if "error" not in each),
            right=("SIZE", "BLOBS", "UNUSED", "QUARANTINE"),
        )
    _report(results, None, json=json)


def verify(
    *,
    host: HostOption = None,
    directory: DirOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what is wrong; delete nothing.", show_default=False)] = False,
    no_wait: NoWait = False,
    timeout: Timeout = None,
    json: JsonFlag = False,
) -> None:
    """Read every blob and delete those whose content is not what their name says, as interrupted pulls leave them.

    They are pulled again when somebody needs them.
    """

    def here(run: CacheRun, tick: Callable[[int], None]) -> dict[str, Any]:
        return run.verify(delete=not dry_run, tick=tick)

    def there(fleet: Fleet, name: str, folder: str) -> JobHandle[dict[str, Any]]:
        return fleet.cache_verify(name, folder, delete=not dry_run)

    results = _each("verify", here, there, host, directory, no_wait=no_wait, timeout=timeout, json=json)
    _report(results, _verified, json=json, no_wait=no_wait)


def undelete(
    digests: Annotated[
        list[str] | None, typer.Argument(metavar="[DIGEST]...", help="What to bring back; default: all.", show_default=False)
    ] = None,
    *,
    host: HostOption = None,
    directory: DirOption = None,
    no_wait: NoWait = False,
    timeout: Timeout = None,
    json: JsonFlag = False,
) -> None:
    """Bring back what a policy removed and is still in quarantine. What was pulled again meanwhile stays as it is."""
    wanted = digests or []

    def here(run: CacheRun, tick: Callable[[int], None]) -> dict[str, Any]:
        return run.undelete(wanted, tick=tick)

    def there(fleet: Fleet, name: str, folder: str) -> JobHandle[dict[str, Any]]:
        return fleet.cache_undelete(name, folder, wanted)

    results = _each("undelete", here, there, host, directory, no_wait=no_wait, timeout=timeout, json=json)
    _report(results, _undeleted, json=json, problems="left", no_wait=no_wait)


def use(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A declared cache of this host.", show_default=False)],
    command: Annotated[list[str], typer.Argument(metavar="-- CMD...", help="The command, after --.", show_default=False)],
) -> int:
    """Run a command that pulls into a cache or reads from it. What it touches stays meanwhile, and counts as used.

    Its exit code is its own (128 and the number for a signal). MOTHBALL_* variables do not reach it.
    """
    from mothball.cli.cache_use import EXIT_NOT_EXECUTABLE, EXIT_NOT_FOUND, NotExecutable, Touched, run
    from mothball.client_caches import LEASE_SECONDS, HeldCache
    from mothball.pruning import declared
    from mothball.registry import Registry

    settings = load_settings()
    cache = declared(settings, directory)
    by = f"{who('')} ({Path(command[0]).name})"
    env = {name: value for name, value in os.environ.items() if not name.startswith("MOTHBALL_")}
    held = HeldCache(lambda: Registry.connect(settings), settings.host, cache.path, by[:100], LEASE_SECONDS)
    with held, Touched(Path(cache.path)) as touched:
        try:
            code = run(command, env)
        except errors.NotFound as error:
            note(f"error: {error.code}: {error.message}")
            return EXIT_NOT_FOUND
        except NotExecutable as error:
            note(f"error: {error.code}: {error.message}")
            return EXIT_NOT_EXECUTABLE
    # Its exit code is what counts; what goes wrong with the note only makes blobs look less used than they are.
    try:
        if touched.digests:
            with open_fleet() as fleet:
                fleet.registry.caches.used(settings.host, cache.path, touched.digests)
    except errors.MothballError as error:
        touched.problem = error.message
    if touched.problem:
        note(f"note: not every blob that was used is noted, file times count for the others: {touched.problem}")
    return code


# -- what the commands share -------------------------------------------------------------------------------------------


def _each(
    label: str,
    here: One,
    there: Submit,
    host: str | None,
    directory: str | None,
    *,
    no_wait: bool,
    timeout: str | None,
    json: bool,
) -> list[dict[str, Any]]:
    """The result of each cache, or its error; a single one raises it. Empty when there is none, or nobody waits."""
    if host is None:
        if no_wait or timeout is not None:
            raise errors.InvalidParams("--no-wait and --timeout are for a job; give --host as well")
        return _here(label, here, directory, json=json)
    results: list[dict[str, Any]] = []
    with open_fleet() as fleet:
        folders = [directory] if directory is not None else _declared_there(fleet, host)
        # All are asked before one is waited for: the host works at as many as it has processes.
        handles = [(folder, there(fleet, host, folder)) for folder in folders]
        for folder, handle in handles:
            what = f"{label} {printable(folder)} on {printable(host)}"
            try:
                answer = finished(handle, what, no_wait=no_wait, timeout=timeout, json=json)
            except (errors.TimedOut, errors.Unavailable):
                raise
            except errors.MothballError as error:
                if len(handles) == 1:
                    raise
                results.append({"cache_dir": folder, "host": host, "job": handle.id, "error": error.to_dict()})
                continue
            if answer is not None:
                results.append({**answer, "job": handle.id})
    return results


def _declared_there(fleet: Fleet, host: str) -> list[str]:
    try:
        found = [each["dir"] for each in fleet.caches(host=host)]
    except errors.NotFound:
        raise errors.HostOffline(host=host) from None
    if not found:
        note(f"note: host {host} declares no image cache; MOTHBALL_IMAGE_CACHES there does")
    return found


def _here(label: str, work: One, directory: str | None, *, json: bool) -> list[dict[str, Any]]:
    from mothball.pruning import CacheRun

    settings = load_settings()
    folders = [directory] if directory is not None else [cache.path for cache in settings.caches]
    if not folders:
        note("note: this host declares no image cache; MOTHBALL_IMAGE_CACHES=PATH does")
        return []
    results: list[dict[str, Any]] = []
    with _fleet_if_there(settings) as fleet:
        for folder in folders:
            with _progress(f"{label} {folder}", hidden=json) as tick:
                try:
                    results.append(work(CacheRun(settings, folder, fleet.registry if fleet else None), tick))
                except errors.MothballError as error:
                    if len(folders) == 1:
                        raise
                    results.append({"cache_dir": folder, "host": settings.host, "error": error.to_dict()})
    return results


@contextmanager
def _fleet_if_there(settings: Settings) -> Iterator[Fleet | None]:
    """The fleet, None when Redis does not answer: a full disk may be the very reason."""
    with open_fleet() as fleet:
        found: Fleet | None = fleet
        try:
            fleet.registry.ping()
        except errors.Unavailable as error:
            note(f"note: {error.message}; leases are not known, and file times alone say what was used on {settings.host}")
            found = None
        yield found


@contextmanager
def _progress(label: str, *, hidden: bool) -> Iterator[Callable[[int], None]]:
    if hidden or not sys.stderr.isatty():
        yield lambda _entries: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as shown:
        task = shown.add_task(printable(label), total=None)
        yield lambda entries: shown.update(task, description=f"{printable(label)}: {entries:,} blobs")


def _report(
    results: list[dict[str, Any]],
    text: Callable[[dict[str, Any]], str] | None,
    *,
    json: bool,
    problems: str = "errors",
    no_wait: bool = False,
) -> None:
    """Print every result, and what is wrong on stderr; raises `OperationFailed` when anything could not be done."""
    if json and not no_wait:
        emit_json_array(results)
    failed = 0
    for each in results:
        where = printable(each["cache_dir"])
        if "error" in each:
            failed += 1
            if not json:
                note(f"error: {each['error']['code']}: {each['error']['message']}")
            continue
        if not json and text is not None:
            line(text(each))
        if not json:
            for said in each.get("notes", ()):
                note(f"note: {where}: {printable(said)}")
        if each.get("advice") and not json:
            note(f"note: {where}: {each['advice']}")
        wrong = each[problems]
        failed += bool(wrong)
        if json:
            continue
        for problem in wrong[:SHOWN]:
            note(f"left: {problem['path']}: {problem['reason']}")
        if len(wrong) + each.get("errors_left_out", 0) > SHOWN:
            note(f"left: and {len(wrong) + each.get('errors_left_out', 0) - SHOWN:,} more in {where}; --json has the first of them")
    if failed:
        raise errors.OperationFailed(reason=f"{failed} of {len(results)} caches could not be done in full; what was done is done")


def _bytes(size: int) -> str:
    """N-11: binary units, one decimal."""
    value, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if value < 1024 or unit == "PiB":  # noqa: PLR2004
            break
        value /= 1024
    return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"


def _pruned(result: dict[str, Any]) -> str:
    verb = "would free" if result["dry_run"] else "freed"
    waiting = result["quarantined_bytes"]
    if waiting and not result["dry_run"]:
        note(f"note: {_bytes(waiting)} of it leaves the disk after its quarantine; `mothball image cache undelete` brings it back")
    if not result["blobs_freed"] and result["kept"]:
        # A prune that does nothing is what people ask about: the figures of `ls` say that much is unused.
        why = ", ".join(f"{count:,} {WHY.get(reason, reason)}" for reason, count in sorted(result["kept"].items()))
        note(f"note: {printable(result['cache_dir'])}: everything stays: {why} (policy: {printable(result['policy'])})")
    return f"{verb} {_bytes(result['bytes_freed'])} across {result['blobs_freed']} blob(s) in {escape(result['cache_dir'])}"


def _verified(result: dict[str, Any]) -> str:
    text = f"{result['blobs']} blob(s) read, {result['bad']} bad, {result['deleted']} deleted in {escape(result['cache_dir'])}"
    return text + (f"; {len(result['missing'])} that an index names are missing" if result["missing"] else "")


def _undeleted(result: dict[str, Any]) -> str:
    return f"brought back {_bytes(result['bytes'])} across {result['blobs']} blob(s) in {escape(result['cache_dir'])}"


def _listed(result: dict[str, Any]) -> tuple[object, ...]:
    if not result["exists"]:
        return (result["cache_dir"], "not there", *["-"] * 6)
    oldest, newest = ("-" if result[name] is None else durations.ago(result[name]) for name in ("oldest_ms", "newest_ms"))
    return (
        result["cache_dir"],
        result["kind"],
        human_bytes(result["size"]),
        f"{result['count']:,}",
        oldest,
        newest,
        f"{human_bytes(result['unused_bytes'])} in {result['unused']:,}",
        human_bytes(result["quarantined_bytes"]),
    )
