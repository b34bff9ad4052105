"""``python -m benchmarks.collect``: giving a store's bytes back, beside ``rm -r`` of the same files, in one run.

A store of many blobs of which half is unreachable is collected with no window, so that the unreachable half is found, moved to
the trash and deleted; ``rm -r`` deletes a folder with the same files. Each round makes both anew, in turn. Before, the memory of a
collection of a much larger store. Results go to a table and to ``bench-out/collect.json``.
"""

from __future__ import annotations

import argparse
import hashlib
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
from mothball.store import Store
from mothball.store.manifest import MEDIA_CONFIG, MEDIA_LAYER, PREFIX, Descriptor, build_manifest

ROOT = Path(__file__).resolve().parents[1]
SLOWER = 2.0
"""A collection may take so many times what ``rm -r`` takes for the half that goes."""
PEAK_MB = 200.0
LAYERS = 16
SIZE = 600
"""Bytes of a blob: what counts here is how many there are."""
OLD = 1_000_000_000
_CHILD = """
import json, sys, time
from pathlib import Path
from mothball.store import Store
from mothball.store.collect import collect
store = Store(Path(sys.argv[1]))
started = time.perf_counter()
report = collect(store, grace_s=86400, trash_s=0, tombstone_s=60)
print(json.dumps({"seconds": time.perf_counter() - started, "deleted": report.deleted_blobs, "reachable": report.reachable_blobs}))
"""


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write JSON; exit code 2 when it cannot be measured, with --check 1 when a bar is missed, else 0."""
    options = _options(argv)
    console = Console(width=max(100, Console().width), highlight=False)
    place = options.work or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mothball-bench"
    place.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix="mothball-collect-", dir=place) as folder:
            found = _measure(options, Path(folder), console)
    except CommandFailed as error:
        console.print(str(error), markup=False)
        return 2
    _show(found, console)
    return finish(found, options, console)


def _measure(options: argparse.Namespace, work: Path, console: Console) -> dict[str, Any]:
    # First, and nothing is removed before the end: a file system that has just removed very many files may be very slow at
    # making others (ext4 without journal passes over inodes freed a moment ago).
    large: dict[str, Any] = {}
    if not options.quick:
        _, loose = _fill(work / "large", options.large)
        large = {"blobs": options.large, **_collect(work / "large", len(loose))}
        console.print(f"{options.large:,} blobs: {large['seconds']:.2f} s, peak {large['peak'] / 1e6:.0f} MB")
    collected: list[float] = []
    removed: list[float] = []
    for number in range(options.rounds):
        for what in ("collect", "rm") if number % 2 else ("rm", "collect"):
            root = work / f"{what}-{number}"
            store, loose = _fill(root, options.blobs)
            os.sync()
            if what == "rm":
                removed.append(_remove(store, loose))
            else:
                collected.append(_collect(root, len(loose))["seconds"])
            console.print(f"round {number + 1}: {what:8} {(removed if what == 'rm' else collected)[-1]:6.2f} s")
    medians = {"collect_seconds": median(collected), "rm_seconds": median(removed)}
    ratio = medians["collect_seconds"] / medians["rm_seconds"]
    bars = [{"bar": "collection / rm -r of what went", "value": ratio, "limit": SLOWER, "unit": "x", "met": ratio <= SLOWER}]
    found: dict[str, Any] = {
        **header(),
        "blobs": options.blobs, "rounds": options.rounds, "medians": medians, "bars": bars,
        "samples": {"collect": collected, "rm": removed},
    }  # fmt: skip
    if large:
        peak = large["peak"] / 1e6
        found["large"] = large
        bars.append(
            {"bar": f"peak memory, {options.large:,} blobs", "value": peak, "limit": PEAK_MB, "unit": "MB", "met": peak <= PEAK_MB}
        )
    return found


def _collect(root: Path, expected: int) -> dict[str, float]:
    """A collection in a process of its own: its seconds without the start of Python, and its peak memory in bytes."""
    cost = run([sys.executable, "-c", _CHILD, str(root)], env=clean_environment(PYTHONPATH=str(ROOT)))
    done = json.loads(cost.output)
    if done["deleted"] != expected:
        raise CommandFailed(f"{done['deleted']} blobs were deleted, {expected} should have been")
    return {"seconds": done["seconds"], "peak": cost.peak}


def _remove(store: Store, loose: list[str]) -> float:
    """Seconds of ``rm -r`` for the same files: moved to a folder of their own first, which is not measured."""
    folder = store.root / "loose"
    folder.mkdir()
    for name in loose:
        (store.blobs.folder / name).rename(folder / name)
    os.sync()
    return run(["rm", "-r", str(folder)], env=clean_environment()).seconds


def _fill(root: Path, blobs: int) -> tuple[Store, list[str]]:
    """A store of about `blobs` old blobs, half of them named by nothing; the names of those."""
    store = Store(root, fsync=False)
    store.prepare()
    refs: list[dict[str, Any]] = []
    per_capture = LAYERS + 2
    for number in range(blobs // 2 // per_capture):
        config = _blob(store, b"config %d" % number)
        layers = [Descriptor(MEDIA_LAYER, _blob(store, b"layer %d %d" % (number, each)), SIZE) for each in range(LAYERS)]
        manifest = build_manifest(config=Descriptor(MEDIA_CONFIG, config, SIZE), layers=layers, annotations={})
        digest = _blob(store, manifest, whole=True)
        name = {"org.opencontainers.image.ref.name": f"snap-{number + 1}", f"{PREFIX}bytes": "1"}
        refs.append({"mediaType": "application/json", "digest": digest, "size": len(manifest), "annotations": name})
    for number in range(0, len(refs), 100):
        layout = root / "workspaces" / f"w{number}"
        layout.mkdir()
        (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": refs[number : number + 100]}))
    return store, [_blob(store, b"loose %d" % number)[7:] for number in range(blobs - len(refs) * per_capture)]


def _blob(store: Store, data: bytes, *, whole: bool = False) -> str:
    content = data if whole else data.ljust(SIZE, b".")
    name = hashlib.sha256(content).hexdigest()
    path = str(store.blobs.folder / name)
    with open(path, "xb") as file:  # noqa: PTH123 - a million of them
        file.write(content)
    os.utime(path, (OLD, OLD))
    return f"sha256:{name}"


def _show(found: dict[str, Any], console: Console) -> None:
    table = Table("", "seconds", title=f"{found['blobs']:,} blobs, half of them unreachable; medians of {found['rounds']} rounds")
    table.add_row("collect: find, move to the trash, delete", f"{found['medians']['collect_seconds']:.2f}")
    table.add_row("rm -r of the unreachable half", f"{found['medians']['rm_seconds']:.2f}")
    console.print(table)
    if large := found.get("large"):
        console.print(f"{large['blobs']:,} blobs: {large['seconds']:.1f} s, peak {large['peak'] / 1e6:.0f} MB")
    for bar in found["bars"]:
        verdict = "[green]met[/]" if bar["met"] else "[red]missed[/]"
        console.print(f"{bar['bar']}: {bar['value']:.2f} {bar['unit']}, limit {bar['limit']:g} {bar['unit']}: {verdict}")


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.collect", description="Collection beside rm -r.")
    parser.add_argument("--blobs", type=int, default=100_000)
    parser.add_argument("--large", type=int, default=1_000_000, help="blobs of the store whose collection's memory is measured")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder for the stores (default: the cache folder)")
    parser.add_argument("--out", type=Path, default=ROOT / "bench-out" / "collect.json")
    parser.add_argument("--quick", action="store_true", help="the rounds only: no large store")
    parser.add_argument("--check", action="store_true", help="exit code 1 when a bar is missed")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
