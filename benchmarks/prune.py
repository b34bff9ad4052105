"""``python -m benchmarks.prune``: pruning a pull cache, beside ``rm -rf`` and ``find -printf`` of the same files, in one run.

Each round makes the same flat cache anew for a full prune and for ``rm -rf``, in turn; a policy's scan (a dry run, which looks at
every entry as a prune does) and ``find`` look at one cache in turn. Then the memory of a policy on a much larger cache of empty
files, sorted by last use. Results go to a table and to ``bench-out/prune.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.measure import CommandFailed, clean_environment, median, run
from benchmarks.session import finish, header

ROOT = Path(__file__).resolve().parents[1]
BACK_MS = 50.0
"""A full prune gives the cache back, empty, within so many ms."""
REMOVAL = 1.3
"""It may take so many times what ``rm -rf`` takes."""
SCAN = 3.0
"""A scan may take so many times what ``find -printf`` takes."""
GROWTH_MB = 32.0
"""With ten times as many blobs, the peak may be so much higher: what is sorted in memory at a time, and nothing per blob."""
SIZE = 600
_CHILD = """
import json, sys, time
from pathlib import Path
from mothball.cache_fields import Cache, CachePolicy
from mothball.ocicache import whole
from mothball.ocicache.prune import prune
how, path, data = sys.argv[1:4]
swapped = []
real = whole._swap
def swap(*given):
    began = time.perf_counter()
    done = real(*given)
    swapped.append((time.perf_counter() - began) * 1000)
    return done
whole._swap = swap
policy = {
    "full": CachePolicy(), "scan": CachePolicy(older_than=30 * 86_400_000),
    "sort": CachePolicy(older_than=1, grace=0, reserve=1),
}[how]
started = time.perf_counter()
found = prune(Cache(path=path), policy, data_dir=Path(data), dry_run=how != "full", everything=how == "full")
seconds = time.perf_counter() - started
print(json.dumps({"seconds": seconds, "freed": found.blobs_freed, "back_ms": max(swapped, default=0)}))
"""


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write JSON; exit code 2 when it cannot be measured, with --check 1 when a bar is missed, else 0."""
    options = _options(argv)
    console = Console(width=max(100, Console().width), highlight=False)
    place = options.work or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mothball-bench"
    place.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix="mothball-prune-", dir=place.resolve()) as folder:
            found = _measure(options, Path(folder), console)
    except CommandFailed as error:
        console.print(str(error), markup=False)
        return 2
    _show(found, console)
    return finish(found, options, console)


def _measure(options: argparse.Namespace, work: Path, console: Console) -> dict[str, Any]:
    samples: dict[str, list[float]] = {"scan": [], "find": [], "prune": [], "rm": [], "back_ms": []}
    peaks = {}
    for count in (options.blobs, *(() if options.quick else (options.large,))):
        cache = work / f"sorted-{count}"
        _fill(cache, count, 0)
        sorted_ = _prune("sort", cache, work)
        peaks[count] = sorted_["peak"] / 1e6
        console.print(f"{count:,} blobs sorted by last use: {sorted_['seconds']:.2f} s, peak {peaks[count]:.0f} MB")
    for number in range(options.rounds):
        for what in ("prune", "rm") if number % 2 else ("rm", "prune"):
            cache = work / f"{what}-{number}"
            _fill(cache, options.blobs, SIZE)
            os.sync()
            for look in ("scan", "find") if number % 2 else ("find", "scan"):
                _look(look, cache, work, samples)
            if what == "rm":
                samples["rm"].append(run(["rm", "-rf", str(cache)], env=clean_environment()).seconds)
            else:
                done = _prune("full", cache, work)
                if done["freed"] != options.blobs:
                    raise CommandFailed(f"{done['freed']} blobs were freed, {options.blobs} should have been")
                samples["prune"].append(done["seconds"])
                samples["back_ms"].append(done["back_ms"])
            console.print(f"round {number + 1}: {what:5} {samples[what][-1]:6.2f} s")
    medians = {what: median(values) for what, values in samples.items()}
    bars = [
        _bar("full prune, ms without a cache (exchange)", max(samples["back_ms"]), BACK_MS, "ms"),
        _bar("full prune / rm -rf", medians["prune"] / medians["rm"], REMOVAL, "x"),
        _bar("scan by a policy / find -printf", medians["scan"] / medians["find"], SCAN, "x"),
    ]
    if not options.quick:
        growth = peaks[options.large] - peaks[options.blobs]
        bars.append(_bar(f"more memory with {options.large:,} blobs", growth, GROWTH_MB, "MB"))
    return {
        **header(), "blobs": options.blobs, "rounds": options.rounds, "medians": medians, "samples": samples,
        "peaks_mb": {str(count): peak for count, peak in peaks.items()}, "bars": bars,
    }  # fmt: skip


def _bar(name: str, value: float, limit: float, unit: str) -> dict[str, Any]:
    return {"bar": name, "value": value, "limit": limit, "unit": unit, "met": value <= limit}


def _look(what: str, cache: Path, work: Path, samples: dict[str, list[float]]) -> None:
    if what == "find":
        command = ["find", str(cache), "-type", "f", "-printf", "%f %s %b %n %i %A@ %T@ %C@\\n"]
        samples["find"].append(run(command, env=clean_environment()).seconds)
    else:
        samples["scan"].append(_prune("scan", cache, work)["seconds"])


def _prune(how: str, cache: Path, work: Path) -> dict[str, float]:
    """A prune in a process of its own: its seconds without the start of Python, and its peak memory in bytes."""
    cost = run([sys.executable, "-c", _CHILD, how, str(cache), str(work / "data")], env=clean_environment(PYTHONPATH=str(ROOT)))
    return {**json.loads(cost.output), "peak": cost.peak}


def _fill(cache: Path, blobs: int, size: int) -> None:
    """A flat cache, its names in no order."""
    cache.mkdir()
    data = b"." * size
    folder = os.open(cache, os.O_RDONLY)
    for number in range(blobs):
        name = f"sha256:{number * 0x9E3779B97F4A7C15 % 2**64:016x}{number:048x}"
        fd = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600, dir_fd=folder)
        if data:
            os.write(fd, data)
        os.close(fd)
        then = 1_500_000_000 + number * 7919 % 100_000_000
        os.utime(name, (then, then), dir_fd=folder)
    os.close(folder)


def _show(found: dict[str, Any], console: Console) -> None:
    table = Table("", "seconds", title=f"A flat cache of {found['blobs']:,} blobs; medians of {found['rounds']} rounds")
    for what, text in (
        ("prune", "full prune, all in all"),
        ("rm", "rm -rf"),
        ("scan", "scan by a policy (older_than)"),
        ("find", "find -printf"),
    ):
        table.add_row(text, f"{found['medians'][what]:.2f}")
    console.print(table)
    for bar in found["bars"]:
        verdict = "[green]met[/]" if bar["met"] else "[red]missed[/]"
        console.print(f"{bar['bar']}: {bar['value']:.2f} {bar['unit']}, limit {bar['limit']:g} {bar['unit']}: {verdict}")


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prune", description="Pruning a pull cache beside rm and find.")
    parser.add_argument("--blobs", type=int, default=100_000)
    parser.add_argument("--large", type=int, default=1_000_000, help="blobs of the cache whose memory is measured")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder for the caches (default: the cache folder)")
    parser.add_argument("--out", type=Path, default=ROOT / "bench-out" / "prune.json")
    parser.add_argument("--quick", action="store_true", help="without the large cache")
    parser.add_argument("--check", action="store_true", help="exit code 1 when a bar is missed")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
