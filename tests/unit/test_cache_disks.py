"""What heartbeats say of the disks of image caches; a file system that hangs delays none of them."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mothball.registry.encode import MAX_DOCUMENT_BYTES
from mothball.settings import Settings
from workers import cache_disks
from workers.cache_disks import CacheDisks


def settings(tmp_path: Path, caches: str, **more: str) -> Settings:
    return Settings.load(data_dir=tmp_path / "data", image_caches=caches, **more)


def test_the_first_heartbeat_has_the_figures_that_df_has(tmp_path: Path) -> None:
    mine = settings(tmp_path, f"{tmp_path}/cache,kind=flat,max_bytes=1GiB", image_cache_policy="older_than=7d")
    [found] = CacheDisks(mine).look()
    real = os.statvfs(tmp_path)
    assert (found["dir"], found["kind"], found["exists"]) == (f"{tmp_path}/cache", "flat", False)
    assert found["policy"] == "older_than=7d,max_bytes=1GiB,grace=10m,quarantine=1h"
    assert found["total_bytes"] == real.f_blocks * real.f_frsize
    assert abs(found["free_bytes"] - real.f_bavail * real.f_frsize) < found["total_bytes"] / 10
    assert 0 <= found["used_percent"] <= 100
    (tmp_path / "cache").mkdir()
    disks = CacheDisks(settings(tmp_path, f"{tmp_path}/cache"))
    assert disks.look()[0]["exists"] is True


def test_a_host_without_caches_asks_nothing(tmp_path: Path) -> None:
    before = threading.active_count()
    assert CacheDisks(settings(tmp_path, "")).look() == []
    assert threading.active_count() == before


def test_a_cache_that_cannot_be_looked_at_is_said_and_does_not_hide_the_others(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    bad, good = CacheDisks(settings(tmp_path, f"{tmp_path}/file/cache;{tmp_path}/good")).look()
    assert bad["problem"] == "Not a directory"
    assert "used_percent" not in bad
    assert "used_percent" in good


@pytest.fixture
def hang(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The file systems of caches called `hangs` answer when the event is set."""
    event, real = threading.Event(), cache_disks._figures

    def figures(path: str) -> dict[str, object]:
        if path.endswith("hangs"):
            event.wait(60)
        return real(path)

    monkeypatch.setattr(cache_disks, "_figures", figures)
    yield event
    event.set()


def test_a_file_system_that_hangs_delays_no_heartbeat_and_no_other_cache(
    tmp_path: Path, hang: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_disks, "HANGING_SECONDS", 0.1)
    disks = CacheDisks(settings(tmp_path, f"{tmp_path}/hangs;{tmp_path}/works"))
    started = time.monotonic()
    first = disks.look()
    assert time.monotonic() - started < 5
    assert "used_percent" not in first[0]
    threads = threading.active_count()
    time.sleep(0.2)
    for _ in range(20):
        hanging, works = disks.look()
        assert "has not answered for" in hanging["problem"]
        assert "used_percent" not in hanging
        assert "used_percent" in works
    assert threading.active_count() <= threads + 1
    hang.set()
    until = time.monotonic() + 10
    while "used_percent" not in disks.look()[0]:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_the_most_caches_with_long_policies_fit_into_a_heartbeat(tmp_path: Path) -> None:
    keep = "|".join(f"{n:064x}" for n in range(256))
    text = ";".join(f"{tmp_path}/{'x' * 200}/{'y' * 200}-{n},keep={keep},max_bytes=1GiB" for n in range(64))
    assert len(json.dumps(CacheDisks(settings(tmp_path, text)).look())) < MAX_DOCUMENT_BYTES - 16_384
