"""``python -m benchmarks.capture [--tree DIR]``: capture beside tar, restic and borg, on the same tree, in one run.

The tree is copied; the original is only read. Results go to a table and to ``bench-out/capture.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import fleet, report, rounds, startup, trees
from benchmarks.contenders import ALL, Contender
from benchmarks.measure import CommandFailed, count_files, size_of

ROOT = Path(__file__).resolve().parents[1]
ROOM_FACTOR = 9
"""Work copy, four repositories and the changes, with some air."""


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write JSON; exit code 2 when it cannot be measured, with --check 1 when a bar is missed, else 0."""
    console = Console(width=max(120, Console().width), highlight=False)
    try:
        return _measure(_options(argv), console)
    except CommandFailed as error:
        console.print(str(error), markup=False)
        return 2


def _measure(options: argparse.Namespace, console: Console) -> int:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mothball-bench"
    source = options.tree.expanduser().resolve() if options.tree else trees.default_tree(cache, console.print)
    if not source.is_dir():
        console.print(f"{source} is not a directory")
        return 2
    kinds, skipped = _contenders()
    size, files = size_of(source), count_files(source)
    place = options.work or cache
    place.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(place).free
    if free < size * ROOM_FACTOR:
        needed = f"{size * ROOM_FACTOR / 1e9:.1f} GB"
        console.print(f"{place} has {free / 1e9:.1f} GB free and {needed} are needed; choose another with --work")
        return 2
    found: dict[str, Any] = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cpus": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()},
        "versions": {kind.name: kind.version() for kind in kinds},
        "tree": {"files": files, "bytes": size, "default": options.tree is None},
        "rounds": options.rounds,
        "skipped": skipped,
    }
    with tempfile.TemporaryDirectory(prefix="mothball-bench-", dir=place) as folder:
        work = Path(folder)
        tree = work / "tree" / "workspace"
        console.print(f"copying {files} files, {size / 1e6:.0f} MB")
        trees.copy(source, tree)
        trees.settle()
        samples = rounds.run_rounds(kinds, tree, work, options.rounds, console.print)
        found["samples"], found["medians"] = samples, rounds.medians(samples)
        if not options.quick:
            _extras(found, kinds, tree, work, console)
    found["bars"] = report.bars(found)
    report.show(found, console)
    out = options.out
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=2) + "\n")
    console.print(f"written: {out}")
    return 1 if options.check and any(bar["met"] is False for bar in found["bars"]) else 0


def _extras(found: dict[str, Any], kinds: list[type[Contender]], tree: Path, work: Path, console: Console) -> None:
    found["startup"] = startup.measure()
    clones = trees.clones(tree, work / "clones")
    trees.settle()
    found["clones"] = rounds.clone_ratios(kinds, clones, work, console.print)
    shutil.rmtree(work / "clones")
    big = trees.big_file(work, console.print)
    found["big_gib"] = size_of(big) // trees.GIB
    trees.settle()
    found["big"] = rounds.big_file_peaks(kinds, big, work, console.print)
    found["fleet"] = fleet.measure(tree, big, work, console.print)


def _contenders() -> tuple[list[type[Contender]], dict[str, str]]:
    skipped = {kind.name: f"{', '.join(kind.missing())} is not installed (make system-deps)" for kind in ALL if kind.missing()}
    return [kind for kind in ALL if kind.name not in skipped], skipped


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.capture", description="Capture beside tar, restic and borg.")
    parser.add_argument("--tree", type=Path, help="the tree to capture (only read); default: built once from well-known packages")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder for the work copy and the repositories (default: the cache folder)")
    parser.add_argument("--out", type=Path, default=ROOT / "bench-out" / "capture.json")
    parser.add_argument("--quick", action="store_true", help="the rounds only: no clones, large file, fleet or start-up")
    parser.add_argument("--check", action="store_true", help="exit code 1 when a bar is missed")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
