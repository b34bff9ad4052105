"""Rows N-01 to N-14: what a prune of a cache does, and what its figures mean."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from mothball.cache_fields import CachePolicy
from mothball.errors import Busy, InvalidParams
from mothball.ocicache.measure import usage
from mothball.ocicache.types import Lease, PruneResult
from mothball.ocicache.undelete import undelete
from mothball.ocicache.verify import verify
from tests.unit.ocicache.conftest import MS_DAY, OLD, OLD_NOW, CacheYard, asides, disk, names


def same(one: PruneResult, other: PruneResult) -> None:
    assert (one.bytes_freed, one.blobs_freed, one.before_bytes, one.after_bytes, one.kept, one.kept_bytes) == (
        other.bytes_freed, other.blobs_freed, other.before_bytes, other.after_bytes, other.kept, other.kept_bytes,
    )  # fmt: skip


def test_n01_the_result_names_host_kind_and_figures(yard: CacheYard) -> None:
    yard.flat(40, 1)
    found = yard.prune(host="builder-1").to_dict()
    wanted = {
        "bytes_freed", "blobs_freed", "dry_run", "cache_dir", "host", "kind", "seconds", "kept", "kept_bytes", "leaked_asides",
        "quarantined_bytes", "errors", "before_bytes", "after_bytes", "policy",
    }  # fmt: skip
    assert wanted <= set(found)
    assert (found["host"], found["kind"], found["cache_dir"]) == ("builder-1", "flat", str(yard.path))
    assert found["kept"] == {"used": 1}
    assert found["policy"].startswith("older_than=30d")
    assert found["before_bytes"] == found["after_bytes"] + found["bytes_freed"] > found["bytes_freed"] > 0


@pytest.mark.parametrize("name", ["sha256:{}", "sha256-{}"])
def test_n03_both_names_of_the_flat_layout_are_blobs(yard: CacheYard, name: str) -> None:
    yard.blob(yard.path, b"x" * 5000, 40, name=name)
    assert (yard.prune().blobs_freed, names(yard.path)) == (1, set())


def test_n03_blobs_sha256_without_an_index_is_a_cache(yard: CacheYard) -> None:
    yard.blob(yard.path / "blobs" / "sha256", b"old", 40)
    young = yard.blob(yard.path / "blobs" / "sha256", b"new", 1)
    found = yard.prune()
    assert (found.kind, found.blobs_freed) == ("blobs", 1)
    assert names(young.parent) == {young.name}


def test_n04_an_entry_that_lies_about_its_content_is_found_and_deleted_only_when_asked(yard: CacheYard) -> None:
    good = yard.blob(yard.path, b"whole" * 1000, 40, name="sha256:{}")
    bad = yard.blob(yard.path, b"part" * 1000, 40, name="sha256:{}", lying=True)
    told = verify(yard.cache(), data_dir=yard.data_dir, grace_ms=0)
    assert (told.blobs, told.bad, told.deleted, told.bad_digests) == (2, 1, 0, [bad.name])
    size = bad.lstat().st_blocks * 512
    done = verify(yard.cache(), data_dir=yard.data_dir, grace_ms=0, delete=True)
    assert (done.bad, done.deleted, done.bytes_freed) == (1, 1, size)
    assert names(yard.path) == {good.name}


def test_n04_what_is_being_written_is_not_judged(yard: CacheYard) -> None:
    partial = yard.blob(yard.path, b"first half", 0, name="sha256:{}", lying=True)
    done = verify(yard.cache(), data_dir=yard.data_dir, delete=True)
    assert (done.bad, done.kept) == (0, {"young": 1})
    with partial.open("ab"):
        held = verify(yard.cache(), data_dir=yard.data_dir, delete=True, grace_ms=0)
    assert (held.bad, held.kept) == (0, {"open": 1})
    assert partial.exists()


def test_n05_the_tally_is_what_went_not_what_was_there_before(yard: CacheYard) -> None:
    yard.flat(40, 41, 42)

    def a_pull_uses_one(digests: Sequence[str]) -> Sequence[int | None]:
        calls.append(len(digests))
        return [0 if len(calls) > 1 and number == 0 else None for number, _ in enumerate(digests)]

    calls: list[int] = []
    found = yard.prune(last_use=a_pull_uses_one)
    assert (found.blobs_freed, found.kept) == (2, {"used": 1})
    assert found.after_bytes == disk(yard.path)


@pytest.mark.parametrize("kind", ["flat", "blobs"])
def test_n06_a_full_prune_leaves_an_empty_folder_of_the_same_mode_owner_and_attributes(yard: CacheYard, kind: str) -> None:
    folder = yard.path / ("" if kind == "flat" else "blobs/sha256")
    for number in range(5):
        yard.blob(folder, b"%d" % number, 0, name="sha256:{}" if kind == "flat" else "{}")
    yard.path.chmod(0o2750)
    if os.geteuid() == 0:
        os.chown(yard.path, 1234, 1235)
    os.setxattr(yard.path, "user.note", b"mine")
    before, size, inode = yard.path.stat(), disk(yard.path), yard.path.stat().st_ino
    found = yard.prune(everything=True)
    after = yard.path.stat()
    assert (found.blobs_freed, found.bytes_freed, found.kind, found.gap_ms) == (5, size, kind, 0.0)
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert os.getxattr(yard.path, "user.note") == b"mine"
    assert after.st_ino != inode
    assert (names(folder), asides(yard.home)) == (set(), [])


def test_n06_a_full_prune_without_an_exchange_closes_the_gap(yard: CacheYard, monkeypatch: pytest.MonkeyPatch) -> None:
    yard.flat(0, 0)
    monkeypatch.setattr("mothball.ocicache.system._renameat2", lambda *_: False)
    found = yard.prune(everything=True)
    assert (found.blobs_freed, names(yard.path), asides(yard.home)) == (2, set(), [])
    assert found.gap_ms > 0


def test_n07_a_full_prune_does_not_touch_a_cache_that_is_leased(yard: CacheYard) -> None:
    yard.flat(40)
    with pytest.raises(Busy, match="pull-7"):
        yard.prune(everything=True, leases=lambda: [Lease("pull-7", 1000)])
    assert len(names(yard.path)) == 1


def test_n07_a_policy_spares_what_was_used_since_the_lease_began(yard: CacheYard) -> None:
    paths = yard.flat(40, 41)
    used = f"sha256:{paths[0].name[7:]}"
    ages = {used: 35 * MS_DAY}
    found = yard.prune(
        CachePolicy(older_than=30 * MS_DAY, grace=0, quarantine=0),
        leases=lambda: [Lease("pull-7", 36 * MS_DAY)],
        last_use=lambda digests: [ages.get(each, 400 * MS_DAY) for each in digests],
    )
    # Both files were made just now, which is after the lease began.
    assert (found.blobs_freed, found.kept) == (0, {"leased": 2})


def test_n07_a_pull_that_holds_its_file_open_reads_it_to_the_end(yard: CacheYard) -> None:
    path = yard.flat(0)[0]
    with path.open("rb") as pull:
        yard.prune(everything=True)
        assert len(pull.read()) == 5000


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize("everything", [True, False])
def test_n08_a_missing_directory_is_all_zeros(yard: CacheYard, dry_run: bool, everything: bool) -> None:
    found = yard.prune(path=yard.home / "none" / "oci", dry_run=dry_run, everything=everything)
    assert (found.bytes_freed, found.blobs_freed, found.errors, found.before_bytes) == (0, 0, [], 0)
    assert not (yard.home / "none").exists()


POLICIES = {
    "age": OLD_NOW,
    "cap": CachePolicy(max_bytes=20_000, grace=0, quarantine=0),
    "floor": CachePolicy(older_than=MS_DAY, reserve=30_000, grace=0, quarantine=0),
    "quarantine": OLD,
    "keep": CachePolicy(older_than=1, keep=("[0-7]*",), grace=0, quarantine=0),
    "grace": CachePolicy(older_than=1),
}


@pytest.mark.parametrize("name", [*POLICIES, "all"])
def test_n09_a_dry_run_promises_exactly_what_a_prune_frees_and_changes_no_time(
    yard: CacheYard, name: str, states: Callable[[Path], dict[str, tuple[int, ...]]]
) -> None:
    paths = yard.flat(*range(60, 10, -2))
    os.link(paths[0], yard.home / "elsewhere")
    os.link(paths[1], yard.path / f"sha256:{'ab' * 32}")
    policy, everything = POLICIES.get(name, OLD_NOW), name == "all"
    before = states(yard.home)
    promised = yard.prune(policy, dry_run=True, everything=everything)
    assert states(yard.home) == before
    size = disk(yard.home)
    done = yard.prune(policy, everything=everything)
    same(promised, done)
    if not done.quarantined_bytes:
        assert size - disk(yard.home) == done.bytes_freed
    if name != "grace":
        assert done.blobs_freed > 0


def test_n09_the_bytes_of_a_file_with_several_names_count_once_and_only_with_the_last(yard: CacheYard) -> None:
    paths = yard.flat(40, 41)
    os.link(paths[0], yard.path / f"sha256:{'ab' * 32}")
    os.link(paths[1], yard.home / "elsewhere")
    room = paths[0].lstat().st_blocks * 512
    found = yard.prune()
    assert (found.blobs_freed, found.bytes_freed, found.before_bytes) == (3, room, 2 * room)


def test_n10_the_least_recently_used_goes_first_until_the_cap_holds(yard: CacheYard) -> None:
    paths = yard.flat(10, 40, 20, 30)
    room = paths[0].lstat().st_blocks * 512
    found = yard.prune(CachePolicy(max_bytes=2 * room + 1, grace=0, quarantine=0))
    assert names(yard.path) == {paths[0].name, paths[2].name}
    assert (found.after_bytes, found.kept) == (2 * room, {"used": 2})


def test_n10_our_own_record_of_use_comes_before_the_time_of_reading(yard: CacheYard) -> None:
    paths = yard.flat(40, 40)
    for path in paths:  # a backup read both
        os.utime(path, (time.time(), time.time() - 40 * 86_400))
    ages = {f"sha256:{paths[0].name[7:]}": 39 * MS_DAY, f"sha256:{paths[1].name[7:]}": MS_DAY}
    assert yard.prune(dry_run=True).blobs_freed == 0
    yard.prune(last_use=lambda digests: [ages[each] for each in digests])
    assert names(yard.path) == {paths[1].name}


def test_n10_older_than_means_strictly_longer(yard: CacheYard) -> None:
    yard.flat(29.99, 30.01)
    assert yard.prune().blobs_freed == 1


def test_n10_below_the_floor_nothing_goes_and_no_removal_crosses_it(yard: CacheYard) -> None:
    paths = yard.flat(50, 49, 48, 47)
    room = paths[0].lstat().st_blocks * 512
    found = yard.prune(CachePolicy(older_than=MS_DAY, reserve=2 * room + 1, grace=0, quarantine=0))
    assert (found.blobs_freed, found.kept, found.after_bytes) == (1, {"reserve": 3}, 3 * room)
    assert yard.prune(CachePolicy(older_than=MS_DAY, reserve=3 * room, grace=0, quarantine=0)).blobs_freed == 0


def test_n10_what_is_young_by_any_of_its_times_stays_whatever_the_rest_says(yard: CacheYard) -> None:
    yard.flat(400)  # written 400 days ago, it says; its inode was changed just now
    assert yard.prune(CachePolicy(older_than=1)).kept == {"young": 1}


def test_n10_what_a_process_has_open_stays(yard: CacheYard) -> None:
    paths = yard.flat(40, 41)
    fd = os.open(paths[0], os.O_RDONLY | os.O_NOATIME)
    try:
        found = yard.prune()
    finally:
        os.close(fd)
    assert (found.blobs_freed, found.kept, names(yard.path)) == (1, {"open": 1}, {paths[0].name})


def test_n10_a_digest_that_is_kept_survives_policy_and_full_prune(yard: CacheYard) -> None:
    paths = yard.flat(40, 41, 42)
    keep = (paths[1].name[7:],)
    assert yard.prune(CachePolicy(older_than=1, keep=keep, grace=0)).kept == {"kept": 1}
    yard.flat(40, 41, 42)
    found = yard.prune(CachePolicy(keep=keep), everything=True)
    assert (found.kept, names(yard.path)) == ({"kept": 1}, {paths[1].name})


def test_n12_a_single_foreign_file_at_the_top_is_refused_and_nothing_is_changed(yard: CacheYard) -> None:
    yard.flat(40, 41)
    (yard.path / "thesis.tex").write_text("years of work")
    before = names(yard.path)
    for how in ({}, {"dry_run": True}, {"everything": True}):
        with pytest.raises(InvalidParams, match=r"unrecognised.*thesis\.tex"):
            yard.prune(**how)
    assert (names(yard.path), asides(yard.home)) == (before, [])


def test_n12_a_declared_kind_lets_a_policy_take_blobs_only_and_a_full_prune_all(yard: CacheYard) -> None:
    yard.flat(40, 41)
    (yard.path / "notes").mkdir()
    (yard.path / "notes" / "a.txt").write_text("x" * 5000)
    found = yard.prune(kind="flat")
    assert (found.blobs_freed, found.kept, names(yard.path)) == (2, {"other": 1}, {"notes"})
    yard.flat(1)
    promised = yard.prune(kind="flat", everything=True, dry_run=True)
    done = yard.prune(kind="flat", everything=True)
    same(promised, done)
    assert (done.blobs_freed, names(yard.path)) == (2, set())


def test_n12_a_declared_kind_of_which_there_is_nothing_is_not_believed(yard: CacheYard) -> None:
    yard.path.mkdir()
    (yard.path / "photo.jpg").write_text("x")
    with pytest.raises(InvalidParams, match=r"no entry of that kind"):
        yard.prune(kind="flat", everything=True)


def test_n13_a_second_process_is_told_that_the_cache_is_busy(yard: CacheYard) -> None:
    yard.flat(40)
    inner: list[Exception] = []

    def meanwhile(_: Sequence[str]) -> Sequence[int | None]:
        try:
            yard.prune()
        except Busy as error:
            inner.append(error)
        return [None]

    assert yard.prune(last_use=meanwhile).blobs_freed == 1
    assert inner
    assert "another process" in str(inner[0])


def test_n14_a_link_in_the_cache_is_never_followed(yard: CacheYard) -> None:
    outside = yard.home / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    yard.flat(40)
    (yard.path / f"sha256:{'cd' * 32}").symlink_to(outside / "precious")
    (yard.path / f"sha256:{'ef' * 32}").symlink_to(outside)
    assert yard.prune().kept == {"other": 2}
    assert yard.prune(everything=True).kept == {"other": 2}
    assert (outside / "precious").read_text() == "x"


def test_quarantine_keeps_what_a_policy_removed_until_its_time_is_over_and_undelete_brings_it_back(yard: CacheYard) -> None:
    paths = yard.flat(40, 41)
    content = {path.name: path.read_bytes() for path in paths}
    for path in paths:
        yard.age(path, 40)
    times = {path.name: path.stat().st_mtime_ns for path in paths}
    found = yard.prune(OLD)
    assert (found.blobs_freed, found.quarantined_bytes, names(yard.path)) == (2, found.bytes_freed, set())
    assert len(asides(yard.home)) == 1
    assert usage(yard.cache(), data_dir=yard.data_dir).quarantined == 2
    yard.blob(yard.path, content[paths[0].name], 0, name="sha256:{}")
    again = paths[0].stat().st_ino
    back = undelete(yard.cache(), data_dir=yard.data_dir)
    assert (back.blobs, back.left, len(back.notes)) == (1, [], 1)
    assert f"{paths[0].name}: it was pulled again" in back.notes[0]
    assert {path.name: path.read_bytes() for path in yard.path.iterdir()} == content
    assert (paths[0].stat().st_ino, paths[1].stat().st_mtime_ns) == (again, times[paths[1].name])


def test_quarantine_ends_with_a_later_run_which_does_not_count_it_again(yard: CacheYard) -> None:
    yard.flat(40, 41)
    first = yard.prune(CachePolicy(older_than=MS_DAY, grace=0, quarantine=50))
    time.sleep(0.06)
    assert yard.prune(dry_run=True).expired_bytes == first.bytes_freed
    second = yard.prune()
    assert (second.bytes_freed, second.expired_bytes, asides(yard.home)) == (0, first.bytes_freed, [])


def test_usage_shows_size_count_oldest_newest_and_unused(yard: CacheYard) -> None:
    paths = yard.flat(40, 2)
    found = usage(yard.cache(), data_dir=yard.data_dir)
    room = paths[0].lstat().st_blocks * 512
    assert (found.size, found.count, found.unused, found.unused_bytes) == (2 * room, 2, 1, room)
    assert found.oldest_ms == pytest.approx(40 * MS_DAY, abs=60_000)
    assert found.newest_ms == pytest.approx(2 * MS_DAY, abs=60_000)
    assert not usage(yard.cache().__class__(path=str(yard.home / "none")), data_dir=yard.data_dir).exists
