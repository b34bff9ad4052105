"""Captures, restores, forgetting and collections against one store from four processes that are killed at random."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from mothball.store import Store
from mothball.store.collect import collect
from mothball.store.restore import discard
from mothball.store.trash import Trash
from mothball.store.verify import verify
from tests.chaos import store_roles
from tests.chaos.store_roles import GRACE, ROLES, WINDOW, WORKSPACES, blobs_of, reads_whole

SECONDS = float(os.environ.get("MOTHBALL_TEST_CHAOS_SECONDS", "40"))
ENOUGH_PER_MINUTE = {"captured": 20, "snapshotted": 10, "restored": 20, "forgotten": 5, "undeleted": 5, "collected": 20}
"""What must have happened for the test to say anything; far below what a slow machine does."""

pytestmark = pytest.mark.timeout(SECONDS + 120)


def test_no_kill_loses_a_reachable_blob_or_leaves_anything_behind(tmp_path: Path) -> None:
    """Nothing reachable is ever missing, every byte verifies, nothing is left in temp or trash after the window."""
    seed = int(os.environ.get("MOTHBALL_TEST_CHAOS_SEED", "0")) or random.SystemRandom().randrange(10**6)
    print(f"MOTHBALL_TEST_CHAOS_SEED={seed}")
    rng = random.Random(seed)
    for name in ("log", "trees", "restored"):
        (tmp_path / name).mkdir()
    store = Store(tmp_path / "data" / "store")
    store.prepare()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([store_roles.__name__])
    running: dict[str, BaseProcess] = {}

    def start(role: str) -> None:
        running[role] = context.Process(target=store_roles.main, args=(role, tmp_path, rng.randrange(10**9)), name=role)
        running[role].start()

    kills: Counter[str] = Counter()
    until = time.monotonic() + SECONDS
    try:
        for role in ROLES:
            start(role)
        while time.monotonic() < until:
            time.sleep(rng.uniform(0.02, 0.5))
            for role, process in running.items():
                assert process.exitcode is None, _error(tmp_path, role)
            chosen = rng.choice(sorted(ROLES))
            running[chosen].kill()
            running[chosen].join()
            kills[chosen] += 1
            start(chosen)
    finally:
        for process in running.values():
            process.kill()
            process.join()
    done = _done(tmp_path)
    print(f"{SECONDS:g} s, kills {dict(kills)}, done {dict(done)}")
    assert not list((tmp_path / "log").glob("*.error")), [_error(tmp_path, role) for role in ROLES]
    for what, count in ENOUGH_PER_MINUTE.items():
        assert done[what] >= count * SECONDS / 60, (what, dict(done))
    _all_is_there(store)
    _nothing_is_left(store, tmp_path)
    _all_is_there(store)


def _error(base: Path, role: str) -> str:
    path = base / "log" / f"{role}.error"
    return f"{role}: {path.read_text() if path.exists() else 'ended without a word'}"


def _done(base: Path) -> Counter[str]:
    found: Counter[str] = Counter()
    for role in ROLES:
        path = base / "log" / role
        for line in path.read_text().splitlines() if path.exists() else ():
            what, *numbers = line.split()
            found[line if not numbers or not numbers[0].isdigit() else what] += 1
            for name, number in zip(("moved", "deleted", "put back"), numbers if what == "collected" else (), strict=False):
                found[name] += int(number)
    return found


def _all_is_there(store: Store) -> None:
    report = verify(store, level="content")
    assert report.problems == []
    refs = [ref for workspace in WORKSPACES for ref in store.refs(workspace).list()]
    assert len(refs) >= len(WORKSPACES)
    for ref in refs:
        assert reads_whole(store, ref.digest), ref


def _nothing_is_left(store: Store, base: Path) -> None:
    """As much time passes as the grace and the window take; then exactly what the refs need is there."""
    for slot in range(3):
        discard(base / "restored" / f"slot-{slot}", store=store.root)
    assert [path.name for path in (base / "restored").iterdir() if path.name.startswith(".")] == []
    for path in store.blobs.temp.iterdir():
        os.utime(path, (1, 1))
    now = time.time()
    for later in (GRACE + 1, GRACE + WINDOW + 2):
        report = collect(
            store, grace_s=GRACE, trash_s=WINDOW, tombstone_s=60, reserve_bytes=1 << 16, clock=lambda later=later: now + later
        )  # type: ignore[misc]
        assert report.missing == []
    assert list(store.blobs.temp.iterdir()) == []
    assert [path for path in Trash(store).root.rglob("*") if path.is_file()] == []
    assert (report.trash_blobs, report.waiting_blobs, report.strange) == (0, 0, 0)
    needed = {blob for workspace in WORKSPACES for ref in store.refs(workspace).list() for blob in blobs_of(store, ref.digest)}
    assert {f"sha256:{path.name}" for path in store.blobs.folder.iterdir()} == needed
    assert (store.root / "reserve").stat().st_size == 1 << 16
