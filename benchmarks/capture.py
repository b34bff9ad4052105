"""``python -m benchmarks.capture [--tree DIR]``: capture beside tar, restic and borg, on the same tree, in one run.

The tree is copied; the original is only read. Results go to a table and to ``bench-out/capture.json``.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import fleet, report, rounds, startup, trees
from benchmarks.contenders import ALL, Contender
from benchmarks.measure import CommandFailed, size_of
from benchmarks.session import finish, session

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
    with session(options, ALL, "bench", ROOM_FACTOR, console.print) as (work, tree, kinds, found):
        samples = rounds.run_rounds(kinds, tree, work, options.rounds, console.print)
        found["samples"], found["medians"] = samples, rounds.medians(samples)
        if not options.quick:
            _extras(found, kinds, tree, work, console)
    found["bars"] = report.bars(found)
    report.show(found, console)
    return finish(found, options, console)


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
