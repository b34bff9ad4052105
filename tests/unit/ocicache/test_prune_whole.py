"""A whole cache that is exchanged for an empty one: with pulls on their way into it, and with mounts inside."""

from __future__ import annotations

import os
import subprocess
import threading
import time

import pytest

from mothball.cache_fields import CachePolicy
from mothball.errors import OperationFailed
from mothball.ocicache import system, whole
from tests.support import not_permitted
from tests.unit.ocicache.conftest import CacheYard, asides, names


@pytest.mark.parametrize("path", ["blobs/sub dir", "blobs/sha256/sub"])
def test_what_is_bind_mounted_inside_a_cache_is_never_deleted(yard: CacheYard, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the same file system, and somebody else's folder."""
    yard.blob(yard.path / "blobs/sha256", b"old", 40)
    if os.geteuid() != 0:
        not_permitted("mount a folder")
    precious = yard.home / "precious"
    yard.blob(precious, b"precious", 40, name="file")
    try:
        (yard.path / path).mkdir(parents=True)
        subprocess.run(["mount", "--bind", str(precious), str(yard.path / path)], check=True)
        for dry_run in (True, False):
            with pytest.raises(OperationFailed, match="is mounted inside the cache"):
                yard.prune(everything=True, dry_run=dry_run, kind="blobs")
        # And when it is mounted after that look.
        monkeypatch.setattr(whole, "mounts_below", lambda _: [])
        found = yard.prune(everything=True, kind="blobs")
        assert "another file system is mounted there" in " ".join(each.reason for each in found.errors)
    finally:
        for each in system.mounts_below(str(yard.home)):
            subprocess.run(["umount", "-l", each], check=True)
    assert (precious / "file").read_bytes() == b"precious"


@pytest.mark.usefixtures("rest")
@pytest.mark.parametrize("folder", ["", "blobs/sha256"])
@pytest.mark.parametrize("exchange", [True, False])
def test_a_pull_that_is_on_its_way_into_the_old_folder_makes_its_file_there(
    yard: CacheYard, folder: str, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the kernel does when a pull opens a file: it finds the folder first, then makes the file in what it found."""
    if not exchange:
        monkeypatch.setattr(system, "_renameat2", lambda *_: False)
    pool = yard.path / folder
    name = "{}" if folder else "sha256:{}"
    for number in range(3):
        yard.blob(pool, b"%d" % number, name=name)
    kept = yard.blob(pool, b"kept", name=name).name
    (pool / kept).unlink()
    on_its_way = os.open(pool, os.O_PATH | os.O_DIRECTORY)
    came: list[str] = []

    def exchanged() -> bool:
        try:
            return os.stat(pool).st_ino != os.fstat(on_its_way).st_ino
        except FileNotFoundError:  # between two renames
            return False

    def pull() -> None:
        deadline = time.monotonic() + 10
        while not exchanged() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.1)
        for each in (name.format("7" * 64), kept):
            os.close(os.open(each, os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=on_its_way))
            came.append(each)

    puller = threading.Thread(target=pull)
    puller.start()
    try:
        found = yard.prune(CachePolicy(keep=(kept[-64:],)), everything=True)
    finally:
        puller.join()
        os.close(on_its_way)
    assert len(came) == 2
    assert (found.blobs_freed, found.kept, found.errors, names(pool)) == (4, {"kept": 1}, [], {kept})
    assert asides(yard.home) == []


@pytest.mark.usefixtures("rest")
def test_pulls_in_a_loop_never_find_the_cache_missing(yard: CacheYard) -> None:
    yard.flat(0)
    stop = threading.Event()
    trouble: list[BaseException] = []
    pulled = [0]

    def pull() -> None:
        try:
            while not stop.is_set():
                path = yard.path / f"sha256:{pulled[0]:064x}"
                fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
                os.write(fd, b"x" * 100)
                os.close(fd)
                pulled[0] += 1
        except BaseException as error:
            trouble.append(error)

    thread = threading.Thread(target=pull)
    thread.start()
    freed = sum(yard.prune(everything=True).blobs_freed for _ in range(8))
    stop.set()
    thread.join()
    assert trouble == []
    assert freed + len(names(yard.path)) == pulled[0] + 1
    assert asides(yard.home) == []
