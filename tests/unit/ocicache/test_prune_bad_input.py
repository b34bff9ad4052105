"""What a prune meets on real machines: links, mounts, missing rights, full disks, pulls and other prunes at the same time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from mothball.cache_fields import CachePolicy
from mothball.errors import InvalidParams, OperationFailed, PathNotAllowed
from mothball.ocicache import records, removal, work
from mothball.ocicache.measure import usage
from mothball.ocicache.prune import prune
from mothball.ocicache.recognise import recognise
from mothball.ocicache.types import Kind, Pressure
from mothball.ocicache.undelete import undelete
from tests.support import not_permitted
from tests.unit.ocicache.conftest import MS_DAY, OLD, OLD_NOW, CacheYard, asides, disk, names


@contextmanager
def mounted(folder: Path, options: str, *more: str) -> Iterator[None]:
    """A small file system in memory, or whatever `more` says."""
    if os.geteuid() != 0:
        not_permitted("mount a file system")
    folder.mkdir(parents=True, exist_ok=True)
    kind = more or ("-t", "tmpfs", "tmpfs")
    subprocess.run(["mount", *kind, *(("-o", options) if options else ()), str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def as_user(yard: CacheYard, code: str) -> str:
    """Run `code` as an ordinary user, for whom permissions count."""
    if os.geteuid() != 0:
        not_permitted("act as another user")
    script = """
import os, sys
sys.path[:0] = sys.argv[2].split(":")
from pathlib import Path
import tests.unit.ocicache.conftest as c
os.setgid(1234)
os.setuid(1234)
yard = c.CacheYard.__new__(c.CacheYard)
base = Path(sys.argv[1])
yard.data_dir, yard.home, yard.path = base / "user-data", base / "caches", base / "caches" / "oci"
"""
    command = [sys.executable, "-c", script + code, str(yard.home.parent), ":".join(each for each in sys.path if each)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def for_everybody(yard: CacheYard) -> None:
    """pytest's folders are closed to others."""
    (yard.home.parent / "user-data").mkdir(mode=0o777)
    (yard.home.parent / "user-data").chmod(0o777)
    for each in (yard.home, *yard.home.parents):
        if each.stat().st_mode & 0o001 == 0:
            each.chmod(each.stat().st_mode | 0o011)


def test_something_that_is_no_directory_is_refused(yard: CacheYard) -> None:
    yard.path.write_text("x")
    for how in ({}, {"dry_run": True}, {"everything": True}):
        with pytest.raises(InvalidParams, match="not a directory"):
            yard.prune(**how)
    with pytest.raises(InvalidParams, match="not a directory"):
        recognise(yard.path)
    assert yard.path.read_text() == "x"


def test_a_link_as_cache_or_on_the_way_to_it_is_refused(yard: CacheYard) -> None:
    paths = yard.flat(40)
    (yard.home / "link").symlink_to(yard.path)
    (yard.home.parent / "way").symlink_to(yard.home)
    for path in (yard.home / "link", yard.home.parent / "way" / "oci"):
        with pytest.raises(PathNotAllowed, match=r"symbolic link.*real path.*/caches/oci"):
            yard.prune(path=path)
    assert paths[0].exists()


SYSTEM = ["/", "/usr", "/usr/lib/x", "/etc", "/ro" + "ot", "/home", "/ho" + "me/anna", "/var/lib", "/var/cache", "/tmp", "/proc/1"]


@pytest.mark.parametrize("path", SYSTEM)
@pytest.mark.parametrize("kind", [None, "flat"])
def test_system_and_home_folders_are_never_pruned(yard: CacheYard, path: str, kind: str | None) -> None:
    with pytest.raises(PathNotAllowed):
        yard.prune(path=path, kind=kind, everything=True, dry_run=True)


def test_data_and_workspaces_are_never_pruned_also_by_another_name(yard: CacheYard) -> None:
    yard.flat(40)
    for how in ({"roots": [yard.path / "ws"]}, {"roots": [yard.path]}):
        with pytest.raises(PathNotAllowed):
            yard.prune(**how)
    with pytest.raises(PathNotAllowed):
        prune(yard.cache(), OLD, data_dir=yard.path / "data")
    with mounted(yard.home / "second", "", "--bind", str(yard.path)), pytest.raises(PathNotAllowed, match="holds"):
        yard.prune(path=yard.home / "second", roots=[yard.path])
    assert len(names(yard.path)) == 1


def test_a_read_only_file_system_is_one_error_and_a_dry_run_says_so(yard: CacheYard) -> None:
    paths = yard.flat(40, 41)
    with mounted(yard.home, "", "--bind", str(yard.home)):
        subprocess.run(["mount", "-o", "remount,ro,bind", str(yard.home)], check=True)
        promised = yard.prune(dry_run=True)
        assert (promised.blobs_freed, promised.kept) == (0, {"permission": 2})
        assert "Read-only" in promised.errors[0].reason
        for everything in (False, True):
            with pytest.raises(OperationFailed, match=r"Read-only.*nothing was changed"):
                yard.prune(everything=everything)
    assert all(path.exists() for path in paths)


def test_what_may_not_be_removed_is_reported_and_the_rest_goes(yard: CacheYard) -> None:
    old = [yard.blob(yard.path / "blobs" / "sha256", b"%d" % number, 40) for number in range(4)]
    if os.geteuid() != 0 or subprocess.run(["chattr", "+i", *old[:2]], capture_output=True, check=False).returncode:
        not_permitted("make a file immutable (on this file system)")
    try:
        found = yard.prune()
        assert (found.blobs_freed, found.kept, len(found.errors)) == (2, {"error": 2}, 2)
        assert names(old[0].parent) == {old[0].name, old[1].name}
        assert found.after_bytes == disk(yard.path)
        whole = yard.prune(everything=True)
        assert (whole.blobs_freed, len(whole.errors)) == (0, 2)
    finally:
        for path in yard.home.rglob("*"):
            subprocess.run(["chattr", "-i", path], capture_output=True, check=False)
    again = yard.prune()
    assert (again.leaked_asides, asides(yard.home)) == (1, [])


def test_half_of_the_cache_is_another_users_and_the_folder_may_not_be_written(yard: CacheYard) -> None:
    yard.flat(40, 41)
    for_everybody(yard)
    yard.path.chmod(0o755)
    out = as_user(yard, "try:\n    yard.prune()\nexcept Exception as e: print(type(e).__name__, e)")
    assert out.startswith("OperationFailed")
    assert "nothing was changed" in out
    assert len(names(yard.path)) == 2
    yard.path.chmod(0o700)
    out = as_user(yard, "try:\n    yard.prune()\nexcept Exception as e: print(type(e).__name__, e)")
    assert "may not be read" in out


def test_where_the_parent_may_not_be_written_the_aside_lies_in_the_cache(yard: CacheYard) -> None:
    yard.flat(40, 1)
    for_everybody(yard)
    os.chown(yard.path, 1234, 1234)
    for path in yard.path.iterdir():
        os.chown(path, 1234, 1234)
    print(as_user(yard, "print(yard.prune(c.OLD).blobs_freed)"))
    assert len(asides(yard.path)) == 1
    assert as_user(yard, "print(yard.prune(c.OLD).kept)") == "{'used': 1}"
    full = "f = yard.prune(everything=True); print(f.blobs_freed, f.expired_bytes > 0)"
    assert as_user(yard, full).split()[0] == "1"
    assert {each for each in names(yard.path) if each.startswith("sha256")} == set()


def test_a_cache_that_is_a_mount_point_is_pruned_and_stays_one(yard: CacheYard) -> None:
    with mounted(yard.path, "size=4m"):
        paths = yard.flat(40, 41, 1)
        found = yard.prune(OLD)
        assert (found.blobs_freed, asides(yard.home), len(asides(yard.path))) == (2, [], 1)
        assert usage(yard.cache(), data_dir=yard.data_dir).quarantined == 2
        assert undelete(yard.cache(), data_dir=yard.data_dir).blobs == 2
        (yard.path / "odd").mkdir()
        promised = yard.prune(everything=True, kind="flat", dry_run=True)
        done = yard.prune(everything=True, kind="flat")
        assert (done.blobs_freed, done.bytes_freed) == (promised.blobs_freed, promised.bytes_freed)
        assert (done.blobs_freed, names(yard.path)) == (len(paths), set())
        assert os.path.ismount(yard.path)


def test_blobs_on_another_file_system_than_their_cache_are_pruned(yard: CacheYard) -> None:
    pool = yard.path / "blobs" / "sha256"
    with mounted(pool, "size=4m"):
        yard.blob(pool, b"x" * 5000, 40)
        assert (yard.prune(OLD).blobs_freed, len(asides(pool))) == (1, 1)
        yard.blob(pool, b"y" * 5000, 40)
        assert yard.prune(everything=True, dry_run=True).blobs_freed == 1
        assert yard.prune(everything=True).blobs_freed == 1
        assert {each for each in names(pool) if "aside" not in each} == set()


def test_a_full_disk_is_pruned_without_an_aside(yard: CacheYard) -> None:
    with mounted(yard.home, "nr_inodes=12,size=4m"):
        paths = yard.flat(*range(40, 50))
        with pytest.raises(OSError, match="No space"):
            (yard.home / "one more").mkdir()
        found = yard.prune(OLD)
        assert (found.blobs_freed, found.errors, names(yard.path)) == (len(paths), [], set())
        assert asides(yard.home) == []


def test_a_full_disk_is_fully_pruned(yard: CacheYard) -> None:
    with mounted(yard.home, "nr_inodes=12,size=4m"):
        yard.flat(*range(10))
        assert yard.prune(everything=True).blobs_freed == 10
        assert names(yard.home) == {"oci"}


def test_under_pressure_the_least_recently_used_goes_until_the_low_mark_and_at_once(yard: CacheYard) -> None:
    with mounted(yard.home, "size=1m"):
        yard.flat(*range(40, 20, -1), size=45_000)
        low = CachePolicy(older_than=1000 * MS_DAY, grace=0)
        assert yard.prune(low, pressure=Pressure(high=99.5, low=80)).blobs_freed == 0
        promised = yard.prune(low, pressure=Pressure(high=85, low=60), dry_run=True)
        done = yard.prune(low, pressure=Pressure(high=85, low=60))
        seen = os.statvfs(yard.home)
        assert 1 - seen.f_bavail / seen.f_blocks <= 0.60
        assert (done.blobs_freed, done.bytes_freed) == (promised.blobs_freed, promised.bytes_freed)
        assert (done.quarantined_bytes, asides(yard.home)) == (0, [])
        assert 1 - (seen.f_bavail * 4096 - 49_152) / (seen.f_blocks * 4096) > 0.60  # one less would not have done


def test_min_free_is_met_and_takes_the_quarantine_first(yard: CacheYard) -> None:
    with mounted(yard.home, "size=1m"):
        yard.flat(*range(40, 20, -1), size=45_000)
        assert yard.prune(CachePolicy(max_bytes=600_000, grace=0)).quarantined_bytes > 200_000
        found = yard.prune(CachePolicy(min_free_percent=30.0, grace=0))
        assert (found.blobs_freed, found.expired_bytes > 200_000, asides(yard.home)) == (0, True, [])
        found = yard.prune(CachePolicy(min_free=700_000, grace=0))
        seen = os.statvfs(yard.home)
        assert seen.f_bavail * seen.f_frsize >= 700_000
        assert found.blobs_freed > 0


def test_a_pull_that_writes_during_the_prune_keeps_what_it_wrote(yard: CacheYard) -> None:
    paths = yard.flat(40, 41, 42)
    again = paths[1].read_bytes()
    yard.age(paths[1], 41)

    def between(digests: Sequence[str]) -> Sequence[int | None]:
        calls.append(1)
        if len(calls) == 2:  # chosen already, about to go
            paths[1].unlink()
            yard.blob(yard.path, again, 0, name="sha256:{}")
            yard.blob(yard.path, b"new", 0, name="sha256:{}")
        return [None] * len(digests)

    calls: list[int] = []
    found = yard.prune(last_use=between)
    assert (found.blobs_freed, found.kept, len(names(yard.path))) == (2, {"used": 1}, 2)
    assert paths[1].read_bytes() == again


def test_more_entries_than_are_sorted_in_memory_go_in_order(yard: CacheYard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "RUN", 7)
    paths = yard.flat(*range(100, 50, -1))
    room = paths[0].lstat().st_blocks * 512
    yard.prune(CachePolicy(max_bytes=20 * room, grace=0, quarantine=0))
    assert names(yard.path) == {path.name for path in paths[30:]}


def test_records_stay_in_memory_when_the_disk_has_no_room_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "RUN", 100)
    with mounted(tmp_path / "small", "size=64k"), records.Records(tmp_path / "small", ordered=True) as found:
        for number in range(5000, 0, -1):
            found.add(number, number.to_bytes(32, "big"), 0, number, 1, 2, 3, 4, 1)
        assert [entry.used for entry in found] == list(range(1, 5001))
        assert {entry.digest for entry in found} == {f"{number:064x}" for number in range(1, 5001)}


def test_a_folder_deeper_than_there_are_descriptors_is_deleted(yard: CacheYard) -> None:
    yard.flat(1)
    os.mkdir(yard.path / "deep")
    fd = os.open(yard.path / "deep", os.O_RDONLY)
    for _ in range(300):
        os.mkdir("d", dir_fd=fd)
        deeper = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = deeper
    os.close(os.open("leaf", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    os.close(fd)
    promised = yard.prune(kind="flat", everything=True, dry_run=True)
    found = yard.prune(kind="flat", everything=True)
    assert (found.blobs_freed, promised.blobs_freed) == (2, 2)
    assert (found.errors, names(yard.path), asides(yard.home)) == ([], set(), [])
    assert removal._DEPTH < 300


def test_a_folder_that_only_has_the_name_of_an_aside_is_left_alone(yard: CacheYard) -> None:
    yard.flat(40)
    foreign = yard.home / f".oci.mothball-aside-{'0' * 16}"
    foreign.mkdir()
    (foreign / "mine").write_text("x")
    lying = yard.home / f".oci.mothball-aside-{'1' * 16}"
    lying.mkdir()
    (lying / "state").write_text('{"stage": "full", "cache": "/elsewhere"}')
    (lying / "new").mkdir()
    (lying / "new" / "mine").write_text("x")
    yard.prune(everything=True)
    assert (foreign / "mine").exists()
    assert (lying / "new" / "mine").exists()


def test_a_cancelled_prune_leaves_what_it_moved_in_quarantine(yard: CacheYard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "_BATCH", 3)
    yard.flat(*range(40, 50))

    def cancel(done: int) -> None:
        if done >= 6:
            raise InterruptedError("cancelled")

    with pytest.raises(InterruptedError):
        yard.prune(OLD, tick=cancel)
    assert (len(names(yard.path)), len(asides(yard.home))) == (4, 1)
    assert undelete(yard.cache(), data_dir=yard.data_dir).blobs == 6
    assert (len(names(yard.path)), asides(yard.home)) == (10, [])


def test_recognise_names_each_kind(yard: CacheYard) -> None:
    yard.path.mkdir()
    assert recognise(yard.path) is Kind.EMPTY
    yard.flat(1)
    assert recognise(yard.path) is Kind.FLAT
    with pytest.raises(PathNotAllowed):
        (yard.home / "l").symlink_to(yard.path)
        recognise(yard.home / "l")


def test_a_process_that_has_an_entry_open_is_seen(yard: CacheYard) -> None:
    path = yard.flat(40)[0]
    fd = os.open(path, os.O_RDONLY | os.O_NOATIME)
    holder = subprocess.Popen(["sleep", "60"], stdin=fd)
    os.close(fd)
    try:
        assert yard.prune(OLD_NOW).kept == {"open": 1}
    finally:
        holder.kill()
        holder.wait()
    time.sleep(1.1)  # the answer of /proc is used for a second
    assert yard.prune(OLD_NOW).blobs_freed == 1
