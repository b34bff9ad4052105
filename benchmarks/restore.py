"""``python -m benchmarks.restore [--tree DIR]``: restores beside tar, borg and restic, each from its repository of the same tree.

Every contender restores to a new folder, in changing order; whole processes are measured. Then how long Mothball takes to list, to
compare two generations and to verify. Results go to a table and to ``bench-out/restore.json``.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import trees
from benchmarks.contenders import ROOT, Borg, Contender, Mothball, Restic, Tar
from benchmarks.measure import CommandFailed, Cost, clean_environment, count_files, median, run, size_of
from benchmarks.report import show_bars
from benchmarks.rounds import Samples, Say
from benchmarks.rounds import medians as medians_of
from benchmarks.session import finish, session

WORKSPACE = "bench/tree#1"
KINDS: tuple[type[Contender], ...] = (Mothball, Tar, Borg, Restic)
BARS = (
    ("restore / zstd -dc | tar x", "tar", 1.5, "x"),
    ("restore / borg extract", "borg", 0.5, "x"),
    ("files as a command", "files_ms", 400, "ms"),
    ("diff of two generations, 1 % changed", "diff_ms", 100, "ms"),
    ("verify --deep / sha256sum, time", "verify", 2.0, "x"),
)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write JSON; exit code 2 when it cannot be measured, with --check 1 when a bar is missed, else 0."""
    options = _options(argv)
    console = Console(width=max(120, Console().width), highlight=False)
    try:
        return _measure(options, console)
    except CommandFailed as error:
        console.print(str(error), markup=False)
        return 2


def _measure(options: argparse.Namespace, console: Console) -> int:
    # Work copy, repositories, every restored tree of every round, and some air.
    room = 3 + len(KINDS) * (1 + options.rounds)
    with session(options, KINDS, "restore", room, console.print) as (work, tree, kinds, found):
        tools = [kind(work / kind.__name__.lower()) for kind in kinds]
        for tool in tools:
            tool.prepare()
            tool.capture(tree, "first")
        found["samples"] = _rounds(tools, tree, work, options.rounds, console.print)
        found["medians"] = medians_of(found["samples"])
        if not options.quick:
            own = next(tool for tool in tools if isinstance(tool, Mothball))
            found["more"] = _more(own, tree, work, options.rounds, console.print)
    found["bars"] = _bars(found)
    _show(found, console)
    return finish(found, options, console)


# -- restores ----------------------------------------------------------------------------------------------------------------


def _rounds(
    tools: list[Contender], tree: Path, work: Path, rounds: int, say: Say
) -> Samples:
    samples: Samples = {tool.name: {"seconds": [], "peak": [], "cpu": []} for tool in tools}
    expected = count_files(tree)
    for number in range(rounds):
        turn = number % len(tools)
        for tool in tools[turn:] + tools[:turn]:
            # Kept until the end: a file system that has just removed a tree may be several times slower at making one
            # (ext4 without journal passes over inodes freed a moment ago), and that would hit whoever comes next.
            out = work / f"out-{number}-{type(tool).__name__.lower()}"
            out.mkdir()
            trees.warm(tool.repository)
            os.sync()
            cost = _restore(tool, tree, out)
            if (got := count_files(out)) != expected:
                raise CommandFailed(f"{tool.name} restored {got} files of {expected}")
            for figure in ("seconds", "peak", "cpu"):
                samples[tool.name][figure].append(getattr(cost, figure))
            if isinstance(tool, Mothball):
                samples[tool.name].setdefault("call_seconds", []).append(tool.last["seconds"])
            say(f"round {number + 1}: {tool.name:14} {cost.seconds:7.2f} s  peak {cost.peak / 1e6:6.0f} MB")
    return samples


def _restore(tool: Contender, tree: Path, out: Path) -> Cost:
    if isinstance(tool, Mothball):
        tool.last, cost = tool.action("restore", path=str(tree), to=str(out / "tree"))
        return cost
    if isinstance(tool, Restic):
        return run(["restic", "restore", "-q", "latest", "--target", str(out)], env=tool.environment())
    if isinstance(tool, Borg):
        return run(["borg", "extract", "::first"], env=tool.environment(), cwd=out)
    archive = shlex.quote(str(tool.repository / "first.tar.zst"))
    return run(["bash", "-o", "pipefail", "-c", f"zstd -q -dc {archive} | tar -x -C {shlex.quote(str(out))}"])


# -- looking, comparing, verifying -------------------------------------------------------------------------------------------


def _more(own: Mothball, tree: Path, work: Path, rounds: int, say: Say) -> dict[str, float]:
    first = own.last_digest
    count = trees.change(tree, trees.SEED)
    trees.settle()
    own.capture(tree, "changed")
    say(f"{count} files changed")
    os.sync()  # the restored trees would still be on their way to disk
    out: dict[str, float] = {}
    answer, _ = own.action("diff", path=str(tree), before=first, rounds=max(rounds, 5))
    out["diff_ms"], out["diff_changes"] = median(answer["ms"]), answer["changes"]
    out["files_ms"], out["entries"] = _files(own, tree, work, max(rounds, 5))
    blobs = own.folder / "store" / "blobs" / "sha256"
    hashed, verified = [], []
    for _ in range(rounds):
        trees.warm(blobs)
        hashed.append(run(["bash", "-c", f"sha256sum {shlex.quote(str(blobs))}/* > /dev/null"]).seconds)
        trees.warm(blobs)
        answer, _ = own.action("verify", path=str(tree))
        verified.append(answer["seconds"])
    out["sha256sum_seconds"], out["verify_seconds"] = median(hashed), median(verified)
    out["blob_bytes"] = size_of(blobs)
    return out


def _files(own: Mothball, tree: Path, work: Path, rounds: int) -> tuple[float, int]:
    """Milliseconds of ``mothball files`` as a whole command with a Redis to ask, and how many lines it prints."""
    from benchmarks.child import settings_of
    from mothball.registry import Registry
    from workers.redis_server import RedisServer, find_server

    with RedisServer(work / "redis", binary=str(find_server(""))) as server:
        settings = settings_of({"data_dir": str(own.folder), "root": str(tree.parent), "redis_url": server.url})
        registry = Registry.connect(settings)
        registry.workspaces.register(WORKSPACE, host=settings.host, path=str(tree))
        registry.close()
        environment = clean_environment(
            MOTHBALL_DATA_DIR=str(own.folder), MOTHBALL_HOST=settings.host, MOTHBALL_REDIS_URL=server.url
        )
        command = [sys.executable, "-m", "workers.main", "files", WORKSPACE]
        costs = [run(command, env=environment, cwd=ROOT) for _ in range(rounds)]
    return median(cost.seconds * 1000 for cost in costs), costs[0].output.count(b"\n")


# -- what came of it ---------------------------------------------------------------------------------------------------------


def _bars(found: dict[str, Any]) -> list[dict[str, Any]]:
    medians, more = found["medians"], found.get("more", {})
    own = medians["mothball"]["seconds"]
    values = {
        "tar": own / medians[Tar.name]["seconds"] if Tar.name in medians else math.nan,
        "borg": own / medians["borg"]["seconds"] if "borg" in medians else math.nan,
        "files_ms": more.get("files_ms", math.nan),
        "diff_ms": more.get("diff_ms", math.nan),
        "verify": more["verify_seconds"] / more["sha256sum_seconds"] if more else math.nan,
    }
    return [
        {"bar": name, "limit": limit, "unit": unit, "value": None if math.isnan(values[key]) else values[key],
         "met": None if math.isnan(values[key]) else values[key] <= limit}
        for name, key, limit, unit in BARS
    ]  # fmt: skip


def _show(found: dict[str, Any], console: Console) -> None:
    tree, medians = found["tree"], found["medians"]
    title = f"{tree['files']} files, {tree['bytes'] / 1e6:.0f} MB; medians of {found['rounds']} rounds"
    table = Table("", *medians, title=title, caption="in brackets: Mothball's figure as a multiple of that tool's")
    for label, figure, unit, scale in (
        ("restore", "seconds", "s", 1.0),
        ("CPU", "cpu", "s", 1.0),
        ("peak memory", "peak", "MB", 1e6),
    ):
        own = medians["mothball"][figure]
        table.add_row(
            label,
            *(
                f"{values[figure] / scale:.2f} {unit}" + (f" ({own / values[figure]:.2f})" if name != "mothball" else "")
                for name, values in medians.items()
            ),
        )
    console.print(table)
    console.print(
        f"Whole processes; of Mothball's, the call took {medians['mothball']['call_seconds']:.2f} s. It verifies each file's "
        "sha256 and decompresses beside the writing; tar and zstd are two processes."
    )
    if more := found.get("more"):
        console.print(
            f"files: {more['entries']:,.0f} lines in {more['files_ms']:.0f} ms; diff: {more['diff_changes']:,.0f} changes in "
            f"{more['diff_ms']:.1f} ms; verify --deep: {more['blob_bytes'] / 1e6:.0f} MB in {more['verify_seconds']:.2f} s, "
            f"sha256sum {more['sha256sum_seconds']:.2f} s"
        )
    show_bars(found, console)


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.restore", description="Restore beside tar, borg and restic.")
    parser.add_argument("--tree", type=Path, help="the tree to capture (only read); default: built once from well-known packages")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder for copy, repositories and restored trees (default: the cache folder)")
    parser.add_argument("--out", type=Path, default=ROOT / "bench-out" / "restore.json")
    parser.add_argument("--quick", action="store_true", help="the restores only: no listing, comparison or verification")
    parser.add_argument("--check", action="store_true", help="exit code 1 when a bar is missed")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
