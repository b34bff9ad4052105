"""``python -m benchmarks.registry``: what the registry costs as it grows, and that a sweep costs what is due, not what exists.

One server grows to a million records and is measured at each power of ten: registering, reading, listing a repo, touching, and
memory per record. Touches stand beside the same number of bare pipelines of HSET and ZADD. A second server stays at ten thousand;
both sweep a thousand expired workspaces in turn. Results go to tables and to ``bench-out/registry.json``.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import redis
from rich.console import Console
from rich.table import Table

from benchmarks.measure import CommandFailed, median
from benchmarks.session import finish, header
from mothball.doorbell import DoorbellRinger
from mothball.registry import Registry
from mothball.settings import Settings
from tasks.lifecycle import sweep_expired
from tasks.services import Services
from workers.redis_server import RedisServer

ROOT = Path(__file__).resolve().parents[1]
SIZES = (1_000, 10_000, 100_000, 1_000_000)
PER_REPO = 20
DUE = 1_000
SAMPLES = 2_000
SLOWER = 1.2
"""A sweep among a million may take so many times what it takes among ten thousand."""
TOUCHES = 0.6
"""Touches per second, as a share of bare pipelines."""
RECORD_BYTES = 1536
POLICY = "ttl=24h,cap=never"


class Fleet:
    """A registry on a server of its own, with `size` plain workspaces and what is measured with them."""

    def __init__(self, server: RedisServer, folder: Path) -> None:
        # Without debounce each touch moves its time: that is what the bare pipelines do.
        self.settings = Settings.load(data_dir=folder, host="bench", redis_url=server.url, policy=POLICY, touch_debounce_seconds=0)
        self.registry = Registry.connect(self.settings)
        self.here = Services(pid=os.getpid(), settings=self.settings, registry=self.registry, ringer=DoorbellRinger(self.settings))
        self.bare = redis.Redis.from_url(self.settings.registry_url)
        self.size = 0
        self._empty = self.used()

    def used(self) -> int:
        """Bytes that the server's data take."""
        return int(self.registry.info()["used_memory"])

    def per_record(self) -> float:
        """Bytes of one workspace with its place in every index."""
        return (self.used() - self._empty) / self.size

    def add(self) -> None:
        """Register one more, as an agent's workspace would be."""
        number = self.size
        repo = f"acme/project-{number // PER_REPO}"
        self.registry.workspaces.register(
            f"{repo}#{number}", host=f"host-{number % 50}", path=f"/srv/workspaces/project-{number // PER_REPO}/issue-{number}",
            title="Fix the flaky test of the scheduler", agent_id=f"0d5f6c9a-{number:012d}", intent="fix", base_commit="f" * 40,
            runtime={"driver": "none"},
        )  # fmt: skip
        self.size += 1

    def some(self, count: int) -> list[str]:
        """`count` ids of plain workspaces, at random."""
        numbers = random.Random(count).sample(range(self.size), min(count, self.size))
        return [f"acme/project-{number // PER_REPO}#{number}" for number in numbers]

    def sweep(self) -> float:
        """Seconds of a sweep that finds `DUE` expired workspaces."""
        stamp = time.time_ns()
        for number in range(DUE):
            self.registry.workspaces.register(f"due-{stamp}-{number}", host="host-1", path=f"/srv/due/{number}", expires_in_ms=1)
        time.sleep(0.01)
        started = time.perf_counter()
        done = sweep_expired(self.here)
        seconds = time.perf_counter() - started
        if done["evicted"] != {"deadline": DUE} or done["remaining"]:
            raise CommandFailed(f"the sweep was to evict {DUE} and did {done}")
        return seconds

    def settle(self) -> None:
        """What the sweeps do in the first minutes after a registration: say when they look at each one again."""
        while self.registry.policies.heal(100_000)["walking"]:
            pass  # the daily walk through all records, which the first sweeps of a new registry do a piece at a time
        lifecycle, later = self.registry.lifecycle, self.registry.time_ms() + 20 * 3_600_000
        for kind in ("evict", "stop"):
            while due := lifecycle.due(kind, 5000):
                lifecycle.rescore(kind, [(each, score, later) for each, score in due])

    def close(self) -> None:
        """Close the connections."""
        self.bare.close()
        self.here.ringer.close()
        self.registry.close()


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write JSON; exit code 2 when it cannot be measured, with --check 1 when a bar is missed, else 0."""
    options = _options(argv)
    console = Console(width=max(100, Console().width), highlight=False)
    place = options.work or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mothball-bench"
    place.mkdir(parents=True, exist_ok=True)
    # The server's own rewriting of its log forks a gigabyte and would be measured with whatever runs at that moment.
    quiet = {"auto-aof-rewrite-percentage": "0"}
    try:
        with (
            tempfile.TemporaryDirectory(prefix="mothball-registry-", dir=place) as folder,
            RedisServer(Path(folder) / "small", options=quiet) as small,
            RedisServer(Path(folder) / "large", options=quiet) as large,
        ):
            found = _measure(options, Fleet(small, Path(folder)), Fleet(large, Path(folder)), console)
    except CommandFailed as error:
        console.print(str(error), markup=False)
        return 2
    _show(found, console)
    return finish(found, options, console)


def _measure(options: argparse.Namespace, small: Fleet, large: Fleet, console: Console) -> dict[str, Any]:
    sizes = [size for size in SIZES if size < options.records] + [options.records]
    curve = []
    for size in sizes:
        started = time.perf_counter()
        registered: list[float] = []
        while large.size < size:
            before = time.perf_counter()
            large.add()
            registered.append(time.perf_counter() - before)
        curve.append(_at(large, registered))
        console.print(f"{size:>9,} records after {time.perf_counter() - started:.0f} s: {curve[-1]['bytes']:.0f} bytes each")
    while small.size < min(options.small, options.records):
        small.add()
    for fleet in (small, large):
        started = time.perf_counter()
        fleet.settle()
        console.print(f"{fleet.size:>9,} records looked at once in {time.perf_counter() - started:.0f} s")
    sweeps: dict[str, list[float]] = {"small": [], "large": []}
    for number in range(options.rounds):
        for name, fleet in (("small", small), ("large", large)) if number % 2 else (("large", large), ("small", small)):
            sweeps[name].append(fleet.sweep())
        console.print(f"round {number + 1}: sweeps of {DUE}: {sweeps['small'][-1]:.2f} s, {sweeps['large'][-1]:.2f} s")
    ratio = median(sweeps["large"]) / median(sweeps["small"])
    last = curve[-1]
    bars = [
        _bar(f"sweep of {DUE:,} among {large.size:,} / among {small.size:,}", ratio, SLOWER, "x"),
        _bar("bare pipelines / touch, time (1 / 0.6)", last["touch_us"] / last["bare_us"], 1 / TOUCHES, "x"),
        _bar("memory of a record", last["bytes"], RECORD_BYTES, "bytes"),
    ]
    for fleet in (small, large):
        fleet.close()
    return {
        **header(), "rounds": options.rounds, "curve": curve, "sweeps": sweeps, "sizes": [small.size, large.size], "bars": bars
    }  # fmt: skip


def _at(fleet: Fleet, registered: list[float]) -> dict[str, float]:
    """The costs at the size that `fleet` has: medians in microseconds, and bytes per record."""
    registry, bare = fleet.registry.workspaces, fleet.bare
    prefix = fleet.settings.namespace
    ids = fleet.some(SAMPLES)
    repos = sorted({each.partition("#")[0] for each in ids})[: SAMPLES // 10]
    memory = fleet.per_record()

    def pipelined(each: str) -> None:
        pipe = bare.pipeline(transaction=False)
        pipe.hset(f"{prefix}:bare:{each}", mapping={"last_active": "1700000000000", "last_signal": "touch"})
        pipe.zadd(f"{prefix}:bare", {each: 1700000000000})
        pipe.execute()

    touched, piped = [], []
    for start in range(0, len(ids), 100):  # in turn, so that both meet the same machine
        touched += _timed(registry.touch, ids[start : start + 100])
        piped += _timed(pipelined, ids[start : start + 100])
    for each in ids:
        bare.unlink(f"{prefix}:bare:{each}")
    bare.unlink(f"{prefix}:bare")
    return {
        "records": fleet.size,
        "register_us": median(registered[-SAMPLES:]) * 1e6,
        "get_us": median(_timed(registry.get, ids)) * 1e6,
        "list_us": median(_timed(lambda repo: registry.list(repo=repo), repos)) * 1e6,
        "touch_us": median(touched) * 1e6,
        "bare_us": median(piped) * 1e6,
        "bytes": memory,
    }


def _timed(call: Callable[[str], object], items: list[str]) -> list[float]:
    out = []
    for item in items:
        started = time.perf_counter()
        call(item)
        out.append(time.perf_counter() - started)
    return out


def _bar(name: str, value: float, limit: float, unit: str) -> dict[str, Any]:
    return {"bar": name, "value": value, "limit": limit, "unit": unit, "met": value <= limit}


def _show(found: dict[str, Any], console: Console) -> None:
    columns = ("register", "get", f"list of {PER_REPO}", "touch", "HSET+ZADD", "bytes a record")
    table = Table("records", *columns, title="microseconds of one call, medians")
    for row in found["curve"]:
        figures = [f"{row[name]:.0f}" for name in ("register_us", "get_us", "list_us", "touch_us", "bare_us", "bytes")]
        table.add_row(f"{row['records']:,}", *figures)
    console.print(table)
    for size, name in zip(found["sizes"], ("small", "large"), strict=True):
        console.print(f"a sweep of {DUE:,} expired among {size:,}: {median(found['sweeps'][name]):.2f} s")
    for bar in found["bars"]:
        verdict = "[green]met[/]" if bar["met"] else "[red]missed[/]"
        console.print(f"{bar['bar']}: {bar['value']:.2f} {bar['unit']}, limit {bar['limit']:.2f} {bar['unit']}: {verdict}")


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.registry", description="The registry as it grows.")
    parser.add_argument("--records", type=int, default=SIZES[-1], help="records of the large registry")
    parser.add_argument("--small", type=int, default=10_000, help="records of the small one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, help="folder for the servers' files (default: the cache folder)")
    parser.add_argument("--out", type=Path, default=ROOT / "bench-out" / "registry.json")
    parser.add_argument("--check", action="store_true", help="exit code 1 when a bar is missed")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
