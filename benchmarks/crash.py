"""``python -m benchmarks.crash [--tree DIR]``: a crash report beside the first capture of the same tree, in one run.

Each round captures a copy of the tree into a store of its own, and has a worker of a fleet of its own file a report of it: a first
one with package (capture, redaction, second scan and all), and then, with nothing changed, one without package. A report's time is
that of its job, from the moment a worker has it. The ratio is the median of those of the rounds, each of two neighbours in time: a
disk that allows bursts is another one a minute later. The package of the last round is then unpacked with GNU tar: that writes as
much again, as many small files, and would leave the next round a tired disk. Results go to a table and to ``bench-out/crash.json``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks import trees
from benchmarks.contenders import Mothball
from benchmarks.fleet import peaks
from benchmarks.measure import CommandFailed, median, run
from benchmarks.session import finish, session
from mothball import Fleet
from mothball.client_crash import CrashResult
from mothball.settings import Settings
from workers.local import LocalFleet

ROOT = Path(__file__).resolve().parents[1]
ROOM_FACTOR = 6
"""Work copy, store, package, unpacked package, with some air."""
PACKAGE_BAR, PLAIN_BAR = 2.5, 1.0
MB = 1e6
JOB_SECONDS = 600.0
WORKSPACE = "bench/tree#1"
ROWS = (
    ("first capture", "capture_seconds", "s", 1.0),
    ("report with package, a first one", "report_seconds", "s", 1.0),
    ("report without package, nothing changed", "plain_seconds", "s", 1.0),
    ("CPU of the first capture, with the start of Python", "capture_cpu", "s", 1.0),
    ("CPU of the report with package", "report_cpu", "s", 1.0),
    ("the package, unpacked by tar", "unpack_seconds", "s", 1.0),
    ("size of the package", "package_bytes", "MB", MB),
    ("secrets replaced in it", "replaced", "", 1.0),
    ("peak memory of the worker's largest process", "report_peak", "MB", MB),
)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write JSON; exit code 2 when it cannot be measured, with --check 1 when a bar is missed, else 0."""
    console = Console(width=max(100, Console().width), highlight=False)
    options = _options(argv)
    try:
        with session(options, [Mothball], "crash", ROOM_FACTOR, console.print) as (work, tree, _, found):
            samples: dict[str, list[float]] = {}
            for number in range(options.rounds):
                _round(tree, work / f"round-{number}", samples, left=options.rounds - number - 1)
                shown = ", ".join(f"{name} {values[-1]:.2f}" for name, values in samples.items() if name.endswith("seconds"))
                console.print(f"round {number + 1}: {shown}")
            found["samples"], found["medians"] = samples, {name: median(values) for name, values in samples.items()}
            found["bars"] = bars(found)
            _show(found, console)
            return finish(found, options, console)
    except CommandFailed as error:
        console.print(str(error), markup=False)
        return 2


def _round(tree: Path, folder: Path, samples: dict[str, list[float]], *, left: int) -> None:
    """One first capture and the reports, each in a store and a process of its own; which comes first changes with the number of
    rounds that are `left`. The last round ends with a report, and unpacks it."""

    def note(**figures: float) -> None:
        for name, value in figures.items():
            samples.setdefault(name, []).append(float(value))

    def capture() -> None:
        tool = Mothball(folder / "capture")
        cost = tool.capture(tree, "first")
        note(capture_seconds=cost.seconds, capture_cpu=cost.cpu, capture_peak=cost.peak)
        shutil.rmtree(tool.folder)

    def report() -> None:
        with _fleet(folder / "fleet", tree) as (local, fleet):
            worker = psutil.Process(local.worker.pid)
            before = _cpu(worker)
            with_package = _filed(local, fleet, "the first failure")
            note(report_seconds=with_package.seconds, report_cpu=_cpu(worker) - before, package_bytes=with_package.result.bytes)
            note(replaced=sum(with_package.result.redactions.values()), report_peak=max(peaks(local.worker.pid or 0).values()))
            plain = _filed(local, fleet, "another failure", package=False)
            note(plain_seconds=plain.seconds)
            if plain.result.path or plain.result.repeated or plain.result.digest != with_package.result.digest:
                raise RuntimeError("the second report is not one of the same capture without package")
            if not left:
                place = folder / "unpacked"
                place.mkdir()
                note(unpack_seconds=run(["tar", "xf", with_package.result.path, "-C", str(place)]).seconds)

    for step in (capture, report) if left % 2 == 0 else (report, capture):
        os.sync()
        trees.warm(tree)
        folder.mkdir(parents=True, exist_ok=True)
        step()
    shutil.rmtree(folder)


class Filed(NamedTuple):
    """A report, and the seconds that its job took."""

    result: CrashResult
    seconds: float


@contextmanager
def _fleet(folder: Path, tree: Path) -> Iterator[tuple[LocalFleet, Fleet]]:
    settings = Settings.load(
        data_dir=folder, workspace_roots=(tree.parent,), host="bench", flower_port=0, log_level="warning",
        redis_url="redis://127.0.0.1:1",
    )  # fmt: skip
    with LocalFleet(settings, say=lambda _: None) as local, Fleet(settings=local.settings) as fleet:
        fleet.register(WORKSPACE, tree)
        yield local, fleet


def _filed(local: LocalFleet, fleet: Fleet, error: str, **options: Any) -> Filed:
    job = fleet.crash_report(WORKSPACE, error, exit_code=1, command=["node", "index.js"], **options)
    result = job.wait(JOB_SECONDS, on_poll=lambda _: local.poll())
    record = job.record()
    return Filed(result, ((record.finished_at or 0) - (record.started_at or 0)) / 1000)


def _cpu(worker: psutil.Process) -> float:
    """CPU seconds of the worker and its pool until now."""
    spent = [process.cpu_times() for process in (worker, *worker.children(recursive=True))]
    return float(sum(each.user + each.system for each in spent))


def bars(found: dict[str, Any]) -> list[dict[str, Any]]:
    """What a report may cost: with package a multiple of the first capture, without it seconds."""
    samples = found["samples"]
    pairs = zip(samples["report_seconds"], samples["capture_seconds"], strict=True)
    ratio, plain = median(report / capture for report, capture in pairs), found["medians"]["plain_seconds"]
    rows = (
        ("report with package / first capture", ratio, PACKAGE_BAR, "x"),
        ("report without package, nothing changed", plain, PLAIN_BAR, "s"),
    )
    return [{"bar": name, "value": value, "limit": limit, "unit": unit, "met": value <= limit} for name, value, limit, unit in rows]


def _show(found: dict[str, Any], console: Console) -> None:
    tree = found["tree"]
    table = Table("", "", title=f"{tree['files']} files, {tree['bytes'] / MB:.0f} MB; medians of {found['rounds']} rounds")
    for label, figure, unit, scale in ROWS:
        table.add_row(label, f"{found['medians'][figure] / scale:.2f} {unit}")
    console.print(table)
    for bar in found["bars"]:
        verdict = "[green]met[/]" if bar["met"] else "[red]missed[/]"
        console.print(f"{bar['bar']}: {bar['value']:.2f} {bar['unit']}, limit {bar['limit']:.2f} {bar['unit']}: {verdict}")


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.crash", description="A crash report beside a first capture.")
    parser.add_argument("--tree", type=Path, help="the tree (only read); default: that of the other benchmarks")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder for the work copy and the stores (default: the cache folder)")
    parser.add_argument("--out", type=Path, default=ROOT / "bench-out" / "crash.json")
    parser.add_argument("--check", action="store_true", help="exit code 1 when a bar is missed")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
