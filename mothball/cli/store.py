"""Checking this host's store: verify."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mothball import errors
from mothball.cli.local import hosted, load_settings, local_store
from mothball.cli.output import JsonFlag, emit_json, line
from mothball.cli.session import open_fleet
from mothball.cli.text import human_bytes, printable
from mothball.cli.waiting import NoWait, Timeout, finished

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mothball.store.verify import Level

PANEL = "Captures"
PROBLEMS_SHOWN = 20


def add_to(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    app.command("verify", rich_help_panel=PANEL)(verify)


def verify(
    workspace: Annotated[str | None, typer.Argument(metavar="[ID]", help="Only this workspace.", show_default=False)] = None,
    *,
    sample: Annotated[
        str | None, typer.Option(metavar="SHARE", help="Read a random share of the content again, for example 5%.")
    ] = None,
    deep: Annotated[bool, typer.Option("--deep", help="Read every blob again.", show_default=False)] = False,
    content: Annotated[
        bool, typer.Option("--content", help="Compare every file with its layer's table of contents too.", show_default=False)
    ] = False,
    seed: Annotated[int | None, typer.Option(min=0, help="Take the sample of this number again.")] = None,
    repair_from: Annotated[
        str | None, typer.Option(metavar="REGISTRY/REPO", help="Fetch damaged blobs from here and verify again.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Host whose store it is; default: this one, at once.")] = None,
    no_wait: NoWait = False,
    timeout: Timeout = None,
    json: JsonFlag = False,
) -> None:
    """Check a store: every index, manifest and table of contents, every size. Exit code 1 when something is damaged."""
    if (sample is not None) + deep + content > 1:
        raise errors.InvalidParams("--sample, --deep and --content exclude each other: each reads more than the one before")
    if seed is not None and sample is None:
        raise errors.InvalidParams("--seed is for --sample")
    level: Level = "content" if content else "deep" if deep else "structure" if sample is None else "sample"
    share = None if sample is None else _share(sample)
    job: str | None = None
    if host is None:
        if no_wait or timeout is not None:
            raise errors.InvalidParams("--no-wait and --timeout are for a job; give --host as well")
        result = _verify_here(workspace, level, share, seed, repair_from, hidden=json)
    else:
        with open_fleet() as fleet:
            handle = fleet.verify(host, workspace=workspace, level=level, sample=share, seed=seed, repair_from=repair_from)
            answer = finished(handle, f"verify {printable(host)}", no_wait=no_wait, timeout=timeout, json=json)
        if answer is None:
            return
        job, result = handle.id, answer
    if json:
        emit_json(result if job is None else {"job": job, "result": result})
    else:
        _print(result)
    if count := len(result["problems"]) + result.get("problems_more", 0):
        raise errors.Corrupt(
            what="the store",
            reason=f"{count} problems; `mothball verify --repair-from` fetches blobs that were pushed, "
            "`mothball capture --full` writes a fresh layer",
        )
    if not json:
        line("everything that was looked at is as it was written")


def _verify_here(
    workspace: str | None, level: Level, share: float | None, seed: int | None, source: str | None, *, hidden: bool
) -> dict[str, Any]:
    settings = load_settings()
    if workspace is not None:
        hosted(settings, workspace)
    from mothball.package.mend import verify_and_repair

    with _progress("verify", hidden=hidden) as progress:
        verified = verify_and_repair(
            local_store(settings), settings, workspace, level,
            sample=share or settings.verify_sample_percent, seed=seed, source=source, progress=progress,
        )  # fmt: skip
    return verified.to_dict()


def _share(text: str) -> float:
    """Per cent of ``5%``, ``5`` or ``0.5 %``; `InvalidParams` otherwise."""
    try:
        share = float(text.strip().removesuffix("%"))
    except ValueError:
        share = 0.0
    if not 0 < share <= 100:  # noqa: PLR2004 - per cent
        raise errors.InvalidParams(f"{printable(text)!r} is no share; write for example 5% (more than 0, at most 100)")
    return share


def _print(result: dict[str, Any]) -> None:
    for item in result["problems"][:PROBLEMS_SHOWN]:
        users = ", ".join(item["refs"][:PROBLEMS_SHOWN]) or "nothing"
        more = len(item["refs"]) + item.get("refs_more", 0) - PROBLEMS_SHOWN
        users += f" and {more:,} more" if more > 0 else ""
        line(printable(f"damaged: {item['digest'] or 'no blob'}: {item['reason']} (harms {users})"))
    for digest in result["repaired"]:
        line(printable(f"repaired: {digest}"))
    for digest, reason in result["unrepaired"]:
        line(printable(f"not repaired: {digest}: {reason}"))
    sampled = f", chosen by --seed {result['seed']}" if result["seed"] is not None else ""
    line(
        f"{result['checked']:,} blobs of {result['refs']:,} captures, {human_bytes(result['bytes'])}; "
        f"{human_bytes(result['hashed_bytes'])} in {result['hashed']:,} blobs read again{sampled}"
    )


@contextmanager
def _progress(label: str, *, hidden: bool) -> Iterator[Callable[..., None]]:
    if hidden or not sys.stderr.isatty():
        yield lambda *_args, **_kwargs: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn

    with Progress(
        SpinnerColumn(), TextColumn("{task.description}", markup=False), console=Console(file=sys.stderr), transient=True
    ) as shown:
        task = shown.add_task(label, total=None)

        def update(*, blobs: int = 0, bytes: int = 0, step: str = label, **_: object) -> None:  # noqa: A002 - the reader's names
            shown.update(task, description=f"{step}: {blobs:,} blobs, {human_bytes(bytes)}")

        yield update
