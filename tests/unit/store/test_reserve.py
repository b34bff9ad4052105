"""The reserve, and a disk that is really full."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mothball.errors import NoSpace
from mothball.retention import Policy
from mothball.store import Store
from mothball.store.collect import collect
from mothball.store.reserve import Reserve
from mothball.store.retain import retain
from mothball.store.snapshots import add_snapshot, forget, snapshots
from mothball.store.trash import Trash, undelete
from mothball.store.verify import verify
from tests.support import not_permitted
from tests.unit.store.build import File, capture, layer, new_store

KIB = 1024
SIZE = 256 * KIB
Mount = Callable[..., Path]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Mount]:
    """`small_disk(options)`: a file system of its own."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True, check=False)
        if done.returncode:
            not_permitted("mount a small file system")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: Path) -> None:
    """Take every byte and every inode that is left."""
    with (place / "filler").open("ab", buffering=0) as file:
        for step in (64 * KIB, 1):
            try:
                while True:
                    file.write(b"x" * step)
            except OSError as error:
                assert error.errno == errno.ENOSPC
    if os.statvfs(place).f_files > 1000:  # as good as no limit
        return
    with pytest.raises(OSError, match="No space"):
        for number in range(1000):
            (place / f"{time.time_ns()}-{number}").touch()


def run(store: Store, **options: object) -> object:
    values: dict[str, object] = {"grace_s": 60, "trash_s": 3600, "tombstone_s": 60, "reserve_bytes": SIZE, **options}
    return collect(store, **values)  # type: ignore[arg-type]


def free(place: Path) -> int:
    found = os.statvfs(place)
    return found.f_bavail * found.f_frsize


@pytest.mark.parametrize("options", ["size=4m", "size=64m,nr_inodes=150"])
def test_a_disk_that_is_full_to_the_last_byte_can_be_collected(small_disk: Mount, options: str) -> None:
    place = small_disk(options)
    store = new_store(place / "store")
    store.fsync = True
    kept = capture(store, layer({b"a": File(b"1")}), workspace="w")
    run(store)
    assert Reserve(store, SIZE).held == SIZE
    for number in range(20):
        name = store.blobs.put(os.urandom(40 * KIB) + b"%d" % number)[0]
        os.utime(store.blobs.path(name), (1, 1))
    fill(place)
    with pytest.raises(OSError, match="No space"):
        (place / "one more").write_bytes(b"x" * 64)
    report = run(store)
    assert (report.moved_blobs, report.trash_blobs) == (20, 20)  # type: ignore[attr-defined]
    # Renames need no bytes on this file system, but they need an inode: there the reserve had to go.
    assert report.reserve_bytes == (0 if "inodes" in options else SIZE)  # type: ignore[attr-defined]
    fill(place)
    before = free(place)
    report = run(store, empty_trash=True)
    assert report.deleted_blobs == 20  # type: ignore[attr-defined]
    assert free(place) + SIZE >= 20 * 40 * KIB > before
    assert report.reserve_bytes == SIZE  # type: ignore[attr-defined]
    assert store.refs("w").get().digest == kept
    assert verify(store, level="content").problems == []


def test_snapshots_can_be_forgotten_and_brought_back_on_a_full_disk(small_disk: Mount) -> None:
    place = small_disk("size=4m")
    store = new_store(place / "store")
    capture(store, layer({b"a": File(b"1")}), workspace="w")
    refs = store.refs("w")
    for number in range(3):
        add_snapshot(refs, fence=1, job=f"j{number}", at_ms=number + 1)
    run(store)
    reserve = Reserve(store, SIZE)
    assert reserve.held == SIZE
    fill(place)
    with pytest.raises(NoSpace):
        forget(store, "w", ["snap-1"], reason="", at_ms=1)
    assert len(snapshots(refs)) == 3
    assert reserve.spend_when_full(lambda: forget(store, "w", ["snap-1"], reason="", at_ms=1)).gone[0].name == "snap-1"
    fill(place)
    with pytest.raises(NoSpace):  # nothing is left to spend
        reserve.spend_when_full(lambda: undelete(store, "w"))
    (place / "filler").unlink()
    assert reserve.make() == SIZE
    fill(place)
    assert [each.name for each in reserve.spend_when_full(lambda: undelete(store, "w"))] == ["snap-1"]
    assert [each.name for each in snapshots(refs)] == ["snap-1", "snap-2", "snap-3"]


def test_retention_works_on_a_full_disk(small_disk: Mount) -> None:
    place = small_disk("size=4m")
    store = new_store(place / "store")
    capture(store, layer({b"a": File(b"1")}), workspace="w")
    for number in range(3):
        add_snapshot(store.refs("w"), fence=1, job=f"j{number}", at_ms=number + 1)
    run(store)
    fill(place)
    now = int(time.time() * 1000)
    wanted = [("w", Policy.parse("last=1"))]
    assert len(retain(store, wanted, now_ms=now).failed) == 1
    report = retain(store, wanted, now_ms=now, reserve=Reserve(store, SIZE))
    assert (report.removed, report.failed) == (2, [])
    assert len(Trash(store).buried("w")) == 2


def test_the_reserve_is_made_only_when_there_is_room_and_kept_otherwise(small_disk: Mount) -> None:
    place = small_disk("size=1m")
    store = new_store(place / "store")
    (place / "filler").write_bytes(bytes(700 * KIB))
    assert Reserve(store, SIZE).make() == 0
    assert list(store.blobs.temp.iterdir()) == []
    (place / "filler").unlink()
    assert Reserve(store, SIZE).make() == SIZE
    fill(place)
    assert Reserve(store, 2 * SIZE).make() == SIZE
    assert Reserve(store, SIZE).release()
    assert not Reserve(store, SIZE).release()


def test_no_reserve_is_kept_when_none_is_wanted(tmp_path: Path) -> None:
    store = new_store(tmp_path / "store")
    assert Reserve(store, 4096).make() == 4096
    assert Reserve(store, 0).make() == 0
    assert not Reserve(store, 0).path.exists()


def test_other_errors_do_not_spend_the_reserve(tmp_path: Path) -> None:
    store = new_store(tmp_path / "store")
    reserve = Reserve(store, 4096)
    reserve.make()
    with pytest.raises(ZeroDivisionError):
        reserve.spend_when_full(lambda: 1 // 0)
    with pytest.raises(PermissionError):
        reserve.spend_when_full(lambda: (_ for _ in ()).throw(PermissionError(errno.EACCES, "no")))
    assert reserve.held == 4096
