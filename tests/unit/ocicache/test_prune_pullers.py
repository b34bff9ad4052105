"""Pulls that found a blob by its name alone: real processes that name the cache, and index what they found long after it went."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mothball.cache_fields import CachePolicy
from mothball.ocicache import grace, pullers, work
from mothball.ocicache.pullers import Pullers
from mothball.ocicache.types import Pressure
from mothball.ocicache.undelete import undelete
from tests.unit.ocicache.conftest import OLD, OLD_NOW, CacheYard, asides, names

PULL = """
import json, os, pathlib, sys, time
index, pool, text = sys.argv[2:5]
blobs = set(os.listdir(pool))
print("found", flush=True)
while os.listdir(pool):
    time.sleep(0.01)
time.sleep(1.5)
pathlib.Path(index).write_text(text)
named = time.monotonic()
while set(os.listdir(pool)) != blobs and time.monotonic() < named + 10:
    time.sleep(0.005)
print(round(time.monotonic() - named, 3), flush=True)
"""


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "SETTLE_S", 0.3)


@contextmanager
def process(
    *arguments: str, code: str = "import sys; print('runs', flush=True); sys.stdin.read()", cwd: Path | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A program that has said its first line; it ends when its input does."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code, *arguments], stdin=pipe, stdout=pipe, text=True, cwd=cwd) as child:
        assert child.stdout is not None
        assert child.stdout.readline()
        try:
            yield child
        finally:
            assert child.stdin is not None
            child.stdin.close()


def forgotten(yard: CacheYard) -> tuple[Path, str]:
    """A layout whose image no index names, and the index of a pull that finds it there."""
    pool = yard.path / "blobs/sha256"
    image = yard.image(pool, "found by its name alone")
    yard.index(yard.path, [])
    return pool, json.dumps({"schemaVersion": 2, "manifests": [image]})


@pytest.mark.parametrize("policy", [OLD_NOW, OLD])
def test_row30_what_a_pull_found_before_it_went_is_back_at_once_when_the_pull_names_it(
    yard: CacheYard, policy: CachePolicy
) -> None:
    pool, text = forgotten(yard)
    before = names(pool)
    with process(f"oci:{yard.path}:tag", str(yard.path / "index.json"), str(pool), text, code=PULL) as pull:
        found = yard.prune(policy)
        assert pull.stdout is not None
        assert float(pull.stdout.readline()) < 1
    assert (names(pool), found.blobs_freed, found.bytes_freed, found.kept) == (before, 0, 0, {"reachable": 3})
    assert (found.errors, asides(yard.home)) == ([], [])


def test_row30_a_daemon_that_names_the_cache_only_puts_off_when_what_went_is_deleted(
    yard: CacheYard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "MOST_S", 1.0)
    monkeypatch.setattr(work, "HELD_MS", 2000)
    pool, _ = forgotten(yard)
    with process("serve", f"--dir={yard.path}") as daemon:
        found = yard.prune(OLD_NOW)
        assert (found.blobs_freed, names(pool), len(asides(yard.home))) == (3, set(), 1)
        assert found.quarantined_bytes == found.bytes_freed > 0
        assert 0 < found.quarantine_ms <= 2000
        assert f"process {daemon.pid}" in found.notes[0]
        assert found.errors == []
        # Also a full disk is no reason to delete it before.
        assert yard.prune(CachePolicy(min_free_percent=99.9)).expired_bytes == 0
        assert len(asides(yard.home)) == 1
        time.sleep(2.1)
        assert yard.prune(OLD_NOW).expired_bytes == found.bytes_freed
    assert asides(yard.home) == []


def test_row30_under_pressure_a_pull_is_waited_for_and_what_it_may_count_on_is_held(
    yard: CacheYard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "PRESSED_S", 1.0)
    forgotten(yard)
    with process(str(yard.path)):
        found = yard.prune(CachePolicy(older_than=1, grace=0), pressure=Pressure(high=0.001, low=0.0005))
    assert (found.blobs_freed, found.quarantined_bytes == found.bytes_freed, len(found.notes)) == (3, True, 1)
    assert undelete(yard.cache(), data_dir=yard.data_dir).blobs == 3


def test_row30_a_pull_that_began_after_the_blobs_went_is_not_waited_for(yard: CacheYard) -> None:
    pool, _ = forgotten(yard)
    over = threading.Event()

    def later() -> None:
        while names(pool):
            time.sleep(0.002)
        time.sleep(0.1)
        with process(str(yard.path)):
            over.wait(30)

    thread = threading.Thread(target=later)
    thread.start()
    started = time.monotonic()
    found = yard.prune(OLD_NOW)
    took = time.monotonic() - started
    over.set()
    thread.join()
    assert (found.blobs_freed, found.notes, asides(yard.home)) == (3, [], [])
    assert took < 20


def test_row30_a_prune_that_is_ended_while_it_waits_for_pulls_deletes_nothing_of_what_went(yard: CacheYard) -> None:
    pool, _ = forgotten(yard)
    before = names(pool)

    def tick(_: int) -> None:
        if not names(pool):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        yard.prune(OLD_NOW, tick=tick)
    assert undelete(yard.cache(), data_dir=yard.data_dir).blobs == 3
    assert names(pool) == before


@pytest.mark.parametrize("how", ["{}", "oci:{}:tag", "--to={}/blobs", "a,{},b", "copy 'x' '{}'"])
def test_a_process_that_names_the_cache_in_its_arguments_is_seen_until_it_ends(yard: CacheYard, how: str) -> None:
    look = Pullers([str(yard.path)]).look
    with process(how.format(yard.path)) as child:
        [found] = look()
        assert found.pid == child.pid
        assert found.began <= pullers.ticks()
        assert found.runs()
    assert not found.runs()
    assert look() == set()


def test_a_process_that_names_the_cache_as_it_is_called_from_its_own_folder_is_seen(yard: CacheYard) -> None:
    yard.path.mkdir()
    look = Pullers([str(yard.path)]).look
    with process(f"oci:{yard.path.name}:tag", cwd=yard.home) as child:
        assert [each.pid for each in look()] == [child.pid]
    with process("oci:./:tag", cwd=yard.path) as child:
        assert [each.pid for each in look()] == [child.pid]


def test_processes_with_other_folders_of_like_names_are_not_taken_for_pulls(yard: CacheYard) -> None:
    look = Pullers([str(yard.path)]).look
    with process(f"{yard.path}2"), process(f"/x{yard.path}"), process(f"{yard.home}"):
        assert look() == set()


def test_a_process_that_has_something_in_the_cache_open_is_seen_without_naming_it(yard: CacheYard) -> None:
    pool, _ = forgotten(yard)
    with open(pool / min(names(pool)), "rb") as blob:
        code = "import sys; print('runs', flush=True); sys.stdin.read()"
        pipe = subprocess.PIPE
        argv = [sys.executable, "-c", code]
        with subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True, pass_fds=[blob.fileno()]) as child:
            assert [each.pid for each in Pullers([str(yard.path)]).look(files=True)] == [child.pid]
            child.communicate()


@pytest.mark.parametrize(
    ("argv", "ours"),
    [
        ("mothball image cache prune --dir /c", True),
        ("/opt/v/bin/python3 /opt/v/bin/mothball image cache verify --dir /c", True),
        ("python -u -m workers.main worker", True),
        ("mothball image cache use /c -- skopeo copy", False),
        ("skopeo copy docker://r/mothball oci:/c:mothball", False),
        ("python pull.py mothball /c", False),
    ],
)
def test_this_programs_own_processes_are_no_pulls_but_for_the_one_that_stands_for_a_command(argv: str, ours: bool) -> None:
    assert pullers._is_ours("\0".join(argv.split()).encode()) is ours


def test_the_wait_ends_though_something_keeps_changing(yard: CacheYard, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a pull of another host into a folder that both mount."""
    monkeypatch.setattr(work, "MOST_S", 1.5)
    monkeypatch.setattr(grace, "_EXPLAINED_S", 0.0)
    pool, _ = forgotten(yard)
    over = threading.Event()

    def change() -> None:
        while not over.wait(0.02):
            if not names(pool) - {"other"}:
                (pool / "other").touch()
                (pool / "other").unlink()

    thread = threading.Thread(target=change)
    thread.start()
    try:
        found = yard.prune(OLD_NOW)
    finally:
        over.set()
        thread.join()
    assert "keeps changing" in found.notes[0]
    assert found.quarantined_bytes == found.bytes_freed > 0
    assert os.listdir(pool) == []
