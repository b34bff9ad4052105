"""The checks of `mothball doctor`: what an operator would look at one by one when something is wrong, or before it is."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from mothball import __version__
from mothball.doctor.layouts import Layout, is_folder, layouts
from mothball.errors import Gone, MothballError, NotFound, Unavailable
from mothball.registry import Registry, Workspace
from mothball.settings import Settings
from mothball.store import Store
from mothball.store.blobs import file_lock, replace_file
from mothball.store.reserve import Reserve

CLOCK_WARNING_SECONDS, CLOCK_PROBLEM_SECONDS = 2.0, 60.0
"""How far this host's clock may be from Redis's: times of captures are compared across hosts by people and by retention."""
LEAST_FREE_SHARE = 0.05
MIB = 1024**2
LEAST_FREE_BYTES = 64 * MIB
OLDEST_REDIS = (6, 2)

Progress = Callable[[int, int], None]
"""Called with the number of layouts looked at and of all."""


class Check(msgspec.Struct, frozen=True):
    """One finding: `ok`, `warning` (it will hurt later), `problem` (it hurts now) or `skipped`; `hint` says what to do."""

    name: str
    state: Literal["ok", "warning", "problem", "skipped"]
    message: str
    hint: str = ""
    details: list[str] = []

    def to_dict(self) -> dict[str, Any]:
        """The finding in JSON types."""
        return msgspec.structs.asdict(self)


def diagnose(settings: Settings, *, progress: Progress = lambda _done, _all: None) -> Iterator[Check]:
    """Every check of this host, in the order in which one would look. Changes nothing but for a file that it removes again."""
    yield Check("settings", "ok", f"host {settings.host}, data in {settings.data_dir}")
    with Registry.connect(settings) as registry:
        redis = _guarded("redis", lambda: _redis(registry, settings))
        yield redis
        known = redis.state in {"ok", "warning"}
        for name, check in (("clock", _clock), ("worker", _worker)):
            yield _guarded(name, lambda check=check: check(registry, settings)) if known else _skipped(name)  # type: ignore[misc]
        yield _guarded("roots", lambda: _roots(settings))
        yield _guarded("store", lambda: _store(settings))
        yield _guarded("space", lambda: _space(settings))
        yield _guarded("reserve", lambda: _reserve(settings))
        found = _Layouts(settings, progress)
        yield _guarded("captures", found.check)
        yield _guarded("records", lambda: found.compare(registry)) if known else _skipped("records")


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    """A check that cannot be made is itself a finding; the others go on."""
    try:
        return check()
    except Unavailable as error:
        return Check(name, "problem", error.message, "start Redis, or set MOTHBALL_REDIS_URL")
    except MothballError as error:
        return Check(name, "problem", error.message)
    except OSError as error:
        return Check(name, "problem", str(error), "run it as the user that the worker runs as")


def _skipped(name: str) -> Check:
    return Check(name, "skipped", "needs Redis")


def _redis(registry: Registry, settings: Settings) -> Check:
    info = registry.info()
    version = str(info.get("valkey_version") or info.get("redis_version") or "")
    server = f"{'Valkey' if 'valkey_version' in info else 'Redis'} {version} at {settings.redacted()['redis_url']}"
    wrong = []
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < OLDEST_REDIS:
        return Check("redis", "problem", f"{server} is too old", f"{'.'.join(map(str, OLDEST_REDIS))} is needed")
    if info.get("role") != "master":
        return Check("redis", "problem", f"{server} is a {info.get('role')}", "name the primary in MOTHBALL_REDIS_URL")
    if info.get("maxmemory_policy") not in {None, "noeviction"}:
        wrong.append(f"maxmemory-policy is {info['maxmemory_policy']}: it may drop jobs and records; set noeviction")
    if not info.get("aof_enabled"):
        wrong.append("it has no append-only file: a restart may lose the last records; set appendonly yes")
    return Check("redis", "warning" if wrong else "ok", server, details=wrong)


def _clock(registry: Registry, _: Settings) -> Check:
    before = time.time()
    there = registry.time_ms() / 1000
    after = time.time()
    # The answer was made somewhere between the two; only what lies outside is an offset that can be proved.
    offset = there - after if there > after else there - before if there < before else 0.0
    text = f"this host's clock is {abs(offset):.1f} s {'behind' if offset > 0 else 'ahead of'} Redis's"
    if abs(offset) <= CLOCK_WARNING_SECONDS:
        return Check("clock", "ok", "this host's clock agrees with Redis's")
    state: Literal["warning", "problem"] = "problem" if abs(offset) > CLOCK_PROBLEM_SECONDS else "warning"
    return Check("clock", state, text, "run an NTP client on both; the age of blobs and of captures is told by this clock")


def _worker(registry: Registry, settings: Settings) -> Check:
    try:
        host = registry.hosts.get(settings.host)
    except NotFound:
        return Check("worker", "warning", f"no worker has announced host {settings.host}", "start one, or check MOTHBALL_HOST")
    if not host.online:
        return Check("worker", "problem", f"the worker of {settings.host} is silent", "its jobs wait until it is back")
    there = host.info.get("data_dir")
    if there and Path(str(there)) != settings.data_dir:
        hint = "set MOTHBALL_DATA_DIR as the worker has it; what follows is about another store"
        return Check("worker", "problem", f"the worker keeps its data in {there}, these settings say {settings.data_dir}", hint)
    if host.info.get("version") != __version__:
        return Check("worker", "warning", f"the worker runs version {host.info.get('version')}, this is {__version__}")
    return Check("worker", "ok", f"online, version {__version__}")


def _roots(settings: Settings) -> Check:
    if not settings.workspace_roots:
        hint = "set MOTHBALL_WORKSPACE_ROOTS to the folders below which workspaces lie"
        return Check("roots", "warning", "none: a worker with these settings refuses every path", hint)
    wrong = []
    for root in settings.workspace_roots:
        if not root.is_dir():
            wrong.append(f"{root} is no folder")
        elif not os.access(root, os.R_OK | os.X_OK):
            wrong.append(f"{root} cannot be read by this user")
    if wrong:
        return Check("roots", "problem", f"{len(wrong)} of {len(settings.workspace_roots)} cannot be used", details=wrong)
    return Check("roots", "ok", ", ".join(map(str, settings.workspace_roots)))


def _standing(path: Path) -> Path:
    """`path` or the nearest folder above it that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _store(settings: Settings) -> Check:
    root = settings.store_dir
    if not root.exists():
        above = _standing(root)
        if not os.access(above, os.W_OK | os.X_OK):
            return Check("store", "problem", f"{root} does not exist and {above} cannot be written by this user")
        return Check("store", "ok", f"{root} does not exist yet; the first capture makes it")
    temp = root / "tmp"
    if not temp.is_dir():
        return Check("store", "problem", f"{root} has no tmp folder: it is no store, or not all of it")
    trial = temp / f"doctor-{os.getpid()}-{secrets.token_hex(6)}"
    try:
        replace_file(trial, b"mothball doctor\n", temp)
        with file_lock(trial, f"a trial lock in {temp}", wait=1):
            pass
    finally:
        trial.unlink(missing_ok=True)
    if root.stat().st_mode & 0o077:
        return Check("store", "warning", f"{root} is open to other users", f"chmod 700 {root}")
    return Check("store", "ok", f"{root} can be written and locked")


def _space(settings: Settings) -> Check:
    place = _standing(settings.store_dir)
    usage, inodes = shutil.disk_usage(place), os.statvfs(place)
    text = f"{usage.free // MIB:,} MiB of {usage.total // MIB:,} MiB free"
    hint = "`mothball collect` gives back what nothing refers to; `mothball forget` and retention make more of it"
    if usage.free < LEAST_FREE_BYTES:
        return Check("space", "problem", text, hint)
    if inodes.f_files and inodes.f_favail < inodes.f_files * LEAST_FREE_SHARE:
        return Check("space", "warning", f"{text}; {inodes.f_favail:,} of {inodes.f_files:,} inodes free", hint)
    if usage.free < usage.total * LEAST_FREE_SHARE:
        return Check("space", "warning", text, hint)
    return Check("space", "ok", text)


def _reserve(settings: Settings) -> Check:
    if not settings.reserve_bytes:
        hint = "set MOTHBALL_RESERVE_BYTES, or a disk that is full to the last byte may be too full to collect"
        return Check("reserve", "warning", "none is kept", hint)
    held = Reserve(Store(settings.store_dir), settings.reserve_bytes).held
    if held < settings.reserve_bytes:
        kept = f"{held:,} of {settings.reserve_bytes:,} bytes are held back"
        return Check(
            "reserve", "ok" if not settings.store_dir.exists() else "warning", kept, "a collection makes it when there is room"
        )
    return Check("reserve", "ok", f"{held // MIB:,} MiB held back")


class _Layouts:
    """The store's layouts, read once for both checks that need them."""

    def __init__(self, settings: Settings, progress: Progress) -> None:
        self._host = settings.host
        self._store = Store(settings.store_dir)
        self._progress = progress
        self._found: list[Layout] | None = None

    def _all(self) -> list[Layout]:
        if self._found is None:
            total, self._found = len(self._store.workspaces()), []
            for number, layout in enumerate(layouts(self._store), 1):
                self._found.append(layout)
                self._progress(number, total)
        return self._found

    def check(self) -> Check:
        """Are the indexes readable, and is everything there that they name?"""
        found = self._all()
        wrong = [f"{_name(layout)}: {problem}" for layout in found for problem in layout.problems]
        wrong += [f"{_name(layout)}:{ref}: {reason}" for layout in found for ref, reason in layout.damaged.items()]
        refs = sum(len(layout.refs) for layout in found)
        if wrong:
            hint = "`mothball verify` says more and repairs from a registry; `mothball capture --full` writes a whole layer"
            return Check("captures", "problem", f"{len(wrong)} things are damaged", hint, wrong)
        return Check("captures", "ok", f"{refs:,} of {len(found):,} workspaces, with all their blobs")

    def compare(self, registry: Registry) -> Check:
        """Do the store and the registry know of the same workspaces?"""
        orphans, wrong = [], []
        mine = {record.id: record for record in registry.workspaces.list(host=self._host, limit=10**9)}
        captured = {layout.workspace: layout for layout in self._all() if layout.workspace is not None}
        for name, layout in captured.items():
            if name not in mine and not layout.released and _nowhere(registry, name):
                orphans.append(f"{name}: generation {layout.generation}, neither a record nor a tombstone")
        for record in mine.values():
            wrong += _differences(record, captured.get(record.id))
        if orphans:
            hint = "`mothball doctor --rebuild-registry` makes their records again"
            return Check("records", "problem", f"{len(orphans)} captured workspaces have no record", hint, orphans + wrong)
        if wrong:
            return Check("records", "warning", f"{len(wrong)} records do not fit this host", details=wrong)
        return Check("records", "ok", f"{len(mine):,} workspaces of this host are registered")


def _name(layout: Layout) -> str:
    return layout.workspace or layout.folder


def _nowhere(registry: Registry, workspace: str) -> bool:
    """True when the fleet knows nothing of `workspace`: no record on any host, no tombstone."""
    try:
        registry.workspaces.get(workspace)
    except Gone:
        return False
    except NotFound:
        return True
    return False


def _differences(record: Workspace, layout: Layout | None) -> list[str]:
    found = []
    if not is_folder(record.path):
        found.append(f"{record.id}: its directory {record.path} is not there")
    if record.digest and layout is None:
        found.append(f"{record.id}: its captures are not in this store")
    elif layout is not None and layout.generation < record.generation:
        found.append(f"{record.id}: the store has generation {layout.generation}, the record says {record.generation}")
    return found
