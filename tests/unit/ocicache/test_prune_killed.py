"""A real SIGKILL before every single change that a prune makes on the disk, then the next run: nothing is left, nothing is lost."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from mothball.cache_fields import CachePolicy
from mothball.ocicache import system, work
from mothball.ocicache.undelete import undelete
from tests.unit.ocicache.conftest import OLD, OLD_NOW, CacheYard, asides, disk, names

CHANGES = ("mkdir", "rename", "unlink", "rmdir", "fchmod", "fsync")


def killed_before(number: int, work_of_child: Callable[[], object]) -> bool:
    """Run it in a process that is killed before its change `number`; False when it made fewer and ended by itself."""
    pid = os.fork()
    if not pid:
        left = [number]

        def counted(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **more: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **more)

            return call

        for name in CHANGES:
            setattr(os, name, counted(getattr(os, name)))
        system._renameat2 = counted(system._renameat2)
        try:
            work_of_child()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def prepared(yard: CacheYard, kind: str) -> set[str]:
    """A cache of three old blobs and two new ones, and what has to be there after a policy."""
    for folder in (yard.home, yard.data_dir):
        shutil.rmtree(folder, ignore_errors=True)
    yard.home.mkdir()
    if kind == "layout":
        pool = yard.path / "blobs" / "sha256"
        yard.index(yard.path, [yard.image(pool, "image")])
        needed = names(pool)
        yard.image(pool, "forgotten")
        return needed
    folder = yard.path / ("" if kind == "flat" else "blobs/sha256")
    name = "sha256:{}" if kind == "flat" else "{}"
    for number in range(3):
        yard.blob(folder, b"old %d" % number, 40, name=name)
    return {yard.blob(folder, b"new %d" % number, 1, name=name).name for number in range(2)}


def content(yard: CacheYard) -> int:
    """Disk bytes of all blobs, wherever they lie: without what asides say of themselves."""
    notes = [path.lstat().st_blocks * 512 for path in yard.home.rglob("state*") if "aside" in path.parent.name]
    return disk(yard.home) - sum(notes)


SCENES: dict[str, tuple[str, CachePolicy, bool, bool]] = {
    "full": ("flat", OLD_NOW, True, True),
    "full, blobs": ("blobs", OLD_NOW, True, True),
    "full, no exchange": ("flat", OLD_NOW, True, False),
    "policy": ("flat", OLD_NOW, False, True),
    "policy, blobs": ("blobs", OLD_NOW, False, True),
    "policy, layout": ("layout", OLD_NOW, False, True),
    "quarantine": ("flat", OLD, False, True),
}


@pytest.mark.parametrize("scene", SCENES)
def test_n06_killed_at_each_step_the_next_run_leaves_no_aside_and_no_missing_cache(
    yard: CacheYard, scene: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, policy, everything, can_exchange = SCENES[scene]
    monkeypatch.setattr(work, "SETTLE_S", 0.0)
    if not can_exchange:
        monkeypatch.setattr(system, "_renameat2", lambda *_: False)
    number = 0
    leaked = 0
    gaps = 0
    while True:
        stays = prepared(yard, kind)
        pool = yard.path / ("" if kind == "flat" else "blobs/sha256")
        whole = len(names(pool))
        if not killed_before(number, lambda: yard.prune(policy, everything=everything)):
            break
        gaps += not yard.path.exists()
        size, quarantine = content(yard), bool(policy.quarantine)
        promised = yard.prune(policy, everything=everything, dry_run=True)
        found = yard.prune(policy, everything=everything)
        leaked += found.leaked_asides
        assert found.errors == [], number
        assert yard.path.is_dir(), number
        assert names(pool) == (set() if everything else stays), number
        if yard.path.exists() and not gaps:
            assert (promised.bytes_freed, promised.blobs_freed) == (found.bytes_freed, found.blobs_freed), number
            assert (promised.leaked_bytes, promised.leaked_asides) == (found.leaked_bytes, found.leaked_asides), number
        if quarantine:
            back = undelete(yard.cache(), data_dir=yard.data_dir)
            assert (back.left, len(names(pool))) == ([], whole), number
        else:
            assert size - content(yard) == found.bytes_freed + found.leaked_bytes, number
        assert asides(yard.home) + asides(yard.path) == [], number
        number += 1
    assert number > 8
    assert leaked > 3
    assert can_exchange or gaps > 0
    assert asides(yard.home) == [] or policy.quarantine


def test_n06_killed_during_an_undelete_the_next_one_brings_back_the_rest(yard: CacheYard) -> None:
    number = 0
    while True:
        prepared(yard, "flat")
        before = names(yard.path)
        yard.prune(OLD)
        if not killed_before(number, lambda: undelete(yard.cache(), data_dir=yard.data_dir)):
            break
        undelete(yard.cache(), data_dir=yard.data_dir)
        assert (names(yard.path), asides(yard.home)) == (before, []), number
        number += 1
    assert number > 3


def test_n06_killed_at_random_times_with_many_blobs_the_next_run_finishes(yard: CacheYard) -> None:
    """Where the kill falls between two system calls, and half of a large aside is deleted."""
    for number in range(20):
        shutil.rmtree(yard.home)
        yard.path.mkdir(parents=True)
        for each in range(600):
            (yard.path / f"sha256:{each:064x}").touch()
        pid = os.fork()
        if not pid:
            try:
                yard.prune(everything=True)
            finally:
                os._exit(0)
        time.sleep(0.003 * number)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        found = yard.prune(everything=True)
        assert (names(yard.path), asides(yard.home), found.errors) == (set(), [], [])


def test_n06_a_cache_lost_between_two_renames_is_back_with_the_next_run_of_any_kind(
    yard: CacheYard, monkeypatch: pytest.MonkeyPatch
) -> None:
    yard.flat(1)
    yard.path.chmod(0o750)
    monkeypatch.setattr(system, "_renameat2", lambda *_: False)
    number = 0
    while yard.path.exists():
        number += 1
        assert killed_before(number, lambda: yard.prune(everything=True))
    assert yard.prune(OLD).blobs_freed == 0
    assert (yard.path.stat().st_mode & 0o777, names(yard.path), asides(yard.home)) == (0o750, set(), [])


def test_n06_what_is_kept_is_not_deleted_with_a_whole_cache_whose_place_is_gone(yard: CacheYard) -> None:
    """Killed after the exchange, and then somebody removed the empty cache: what was to stay has nowhere to go back to."""
    number = 0
    kept = ""
    while not kept or not asides(yard.home) or names(yard.path):
        prepared(yard, "flat")
        kept = max(names(yard.path))
        policy = CachePolicy(keep=(kept[7:],))
        assert killed_before(number, partial(yard.prune, policy, everything=True))
        number += 1
    yard.path.rmdir()
    found = yard.prune(policy)
    assert [each.path for each in found.errors] == asides(yard.home)
    yard.path.mkdir()
    found = yard.prune(policy)
    assert (found.leaked_asides, found.errors, names(yard.path), asides(yard.home)) == (1, [], {kept}, [])
