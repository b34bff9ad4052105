"""What the fleet adds to a capture, and the worker's memory, measured on a real local fleet."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from benchmarks import trees
from benchmarks.measure import median
from mothball import Fleet
from mothball.settings import Settings
from workers.local import LocalFleet

JOBS = 20
WARM_UP = 3
JOB_SECONDS = 600.0
SPACING_SECONDS = 0.15
Say = Callable[[str], None]


def measure(tree: Path, big: Path | None, work: Path, say: Say) -> dict[str, Any]:
    """Overhead of a job (median of 20 captures of an unchanged tiny tree) and peak memory of the worker's processes.

    `overhead_ms`: from the record's submission to its outcome in the registry, minus the capture itself, by Redis time.
    `wait_ms`: the same as the caller of ``wait()`` sees it, whose polling adds up to one interval.
    """
    tiny = work / "tiny"
    tiny.mkdir()
    for number in range(10):
        (tiny / f"file{number}.txt").write_text(f"{number}\n" * 50)
    trees.settle()
    roots = tuple({path.parent for path in (tiny, tree, *((big,) if big else ()))})
    settings = Settings.load(
        data_dir=work / "fleet",
        workspace_roots=roots,
        host="bench",
        flower_port=0,
        log_level="warning",
        redis_url="redis://127.0.0.1:1",
    )
    with LocalFleet(settings, say=say) as local, Fleet(settings=local.settings) as fleet:
        overhead, waited = _overhead(fleet, local, tiny)
        worker = local.worker.pid
        if worker is None:
            raise RuntimeError("the worker is not running")
        out: dict[str, Any] = {"overhead_ms": median(overhead), "overhead_all_ms": overhead, "wait_ms": median(waited)}
        out["idle_peak"] = max(peaks(worker).values())
        # The large file first: a process's peak never falls again, and the tree's is the higher one.
        for name, path in (("big_peak", big), ("tree_peak", tree)):
            if path is None:
                continue
            fleet.register(f"bench/{name}#1", path)
            begin = time.perf_counter()
            result = _wait(fleet, local, f"bench/{name}#1")
            found = peaks(worker)
            out[name] = max(found.values())
            out[f"{name}_all"] = sorted(found.values())
            out[f"{name}_seconds"] = time.perf_counter() - begin
            say(f"through the fleet: {result.files} files, {out[f'{name}_seconds']:.2f} s, worker peak {out[name] / 1e6:.0f} MB")
    return out


def _overhead(fleet: Fleet, local: LocalFleet, tiny: Path) -> tuple[list[float], list[float]]:
    fleet.register("bench/tiny#1", tiny)
    overhead, waited = [], []
    for number in range(JOBS + WARM_UP):
        local.poll()
        begin = time.perf_counter()
        job = fleet.capture("bench/tiny#1")
        result = job.wait(JOB_SECONDS)
        seen = time.perf_counter() - begin
        record = job.record()
        if number >= WARM_UP:
            overhead.append((record.finished_at or 0) - record.submitted_at - result.seconds * 1000)
            waited.append((seen - result.seconds) * 1000)
        time.sleep(SPACING_SECONDS)
    return overhead, waited


def _wait(fleet: Fleet, local: LocalFleet, workspace: str) -> Any:
    return fleet.capture(workspace).wait(JOB_SECONDS, on_poll=lambda _record: local.poll())


def peaks(worker: int) -> dict[int, int]:
    """Peak resident bytes of the worker and its pool processes, by process id."""
    main = psutil.Process(worker)
    out = {}
    for process in (main, *main.children(recursive=True)):
        with contextlib.suppress(OSError, StopIteration):
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            out[process.pid] = int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    return out
