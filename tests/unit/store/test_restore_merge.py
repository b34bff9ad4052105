"""Restoring into a directory with content: compared first, changed file by file, never through a link, nothing lost unasked."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from mothball.errors import AlreadyExists, Busy, Corrupt, InvalidParams, MothballError, NoSpace, OperationFailed, PathNotAllowed
from mothball.settings import Settings
from mothball.store import Store
from mothball.store.manifest import MEDIA_CONFIG, Descriptor, build_config, build_manifest, load_manifest
from tests.support import not_permitted
from tests.unit.capture.harness import Yard, settle
from tests.unit.store.build import NS, Dir, File, Hard, Link, capture, layer, new_store
from tests.unit.store.restoring import AS_ROOT, bring_back, contents, facts, leftovers, rich_tree

OUTSIDE = "outside, never to be touched"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return new_store(tmp_path / "store")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "target").mkdir()
    return tmp_path / "target"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder that links in the target lead to."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "f").write_text(OUTSIDE)
    (folder / "f").chmod(0o640)
    return folder


def write(root: Path, **files: str) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def omitting(store: Store, digest: str, *paths: str, further: int = 0) -> str:
    """The capture `digest` again, with a list of what it left out."""
    manifest = load_manifest(store.blobs, digest)
    label = json.dumps({"listed": [{"path": path, "reason": "ignored", "size": 1} for path in paths], "further": further})
    config = build_config(diff_ids=["sha256:" + "0" * 64 for _ in manifest.layers], labels={"dev.mothball.omissions": label})
    named, _ = store.blobs.put(config)
    document = build_manifest(config=Descriptor(MEDIA_CONFIG, named, len(config)), layers=manifest.layers, annotations={})
    return store.blobs.put(document)[0]


# -- what overwrite says -----------------------------------------------------------------------------------------------------


def test_never_writes_only_what_is_missing(store: Store, target: Path) -> None:
    write(target, a="mine", mine="mine")
    digest = capture(store, layer({b"a": File(b"theirs"), b"b": File(b"new"), b"d": Dir(), b"d/c": File(b"new")}))
    before = (target / "a").stat()
    result = bring_back(store, digest, target, overwrite="never")
    assert contents(target) == {"a": "mine", "b": "new", "d": "/", "d/c": "new", "mine": "mine"}
    assert (target / "a").stat() == before
    assert (result.written, result.kept) == (3, 1)


def test_changed_replaces_what_differs_and_leaves_what_is_right(store: Store, target: Path) -> None:
    tree = {b"same": File(b"same"), b"other": File(b"theirs"), b"mode": File(b"mode", mode=0o755), b"l": Link(b"same")}
    digest = capture(store, layer(tree))
    bring_back(store, digest, target)
    write(target, other="mine!!", extra="extra")
    os.utime(target / "other", ns=(NS, NS))  # size and time alone would not tell
    (target / "mode").chmod(0o600)
    (target / "l").unlink()
    (target / "l").symlink_to("elsewhere")
    inodes = {name: (target / name).stat().st_ino for name in ("same", "mode")}
    planned = bring_back(store, digest, target, overwrite="changed", dry_run=True)
    result = bring_back(store, digest, target, overwrite="changed")
    assert contents(target) == {"same": "same", "other": "theirs", "mode": "mode", "l": "-> same", "extra": "extra"}
    assert {name: (target / name).stat().st_ino for name in inodes} == inodes
    assert (target / "mode").stat().st_mode & 0o777 == 0o755
    assert (result.written, result.metadata, result.deleted) == (2, 1, 0)
    assert (planned.written, planned.metadata) == (2, 1)
    again = bring_back(store, digest, target, overwrite="changed")
    assert (again.written, again.metadata) == (0, 0)


def test_always_writes_every_file(store: Store, target: Path) -> None:
    digest = capture(store, layer({b"same": File(b"same"), b"b": File(b"b")}))
    bring_back(store, digest, target)
    before = (target / "same").stat().st_ino
    assert bring_back(store, digest, target, overwrite="always").written == 2
    assert (target / "same").stat().st_ino != before


def test_a_rich_tree_is_repaired_to_what_it_was(tmp_path: Path, make_settings: Callable[..., Settings]) -> None:
    (tmp_path / "yard").mkdir()
    yard = Yard(tmp_path, make_settings(workspace_roots=(tmp_path / "yard",), frame_bytes=64 * 1024, fsync=False))
    rich_tree(yard.folder())
    settle(yard.folder())
    digest = yard.capture().digest
    back = tmp_path / "back"
    bring_back(yard.store, digest, back)
    (back / "again").unlink()
    (back / "again").write_text("no longer a name of the same file")
    (back / "shut" / "secret").chmod(0o600)
    (back / "large").write_bytes(b"short")
    (back / "empty").rmdir()
    (back / "out").unlink()
    (back / "none").unlink()
    (back / "none").mkdir()
    bring_back(yard.store, digest, back, overwrite="changed")
    assert facts(back) == facts(yard.folder())


def test_a_file_that_others_share_is_replaced_and_not_changed_under_them(store: Store, target: Path, outside: Path) -> None:
    digest = capture(store, layer({b"f": File(OUTSIDE.encode(), mode=0o600)}))
    (target / "f").hardlink_to(outside / "f")
    bring_back(store, digest, target, overwrite="changed")
    assert (outside / "f").stat().st_mode & 0o777 == 0o640
    assert (outside / "f").read_text() == OUTSIDE
    assert (target / "f").stat().st_ino != (outside / "f").stat().st_ino


@pytest.mark.parametrize("include", [[], ["b"], ["a", "c"]])
def test_names_of_one_file_are_parted_from_a_name_outside_before_they_change(
    store: Store, target: Path, outside: Path, include: list[str]
) -> None:
    digest = capture(store, layer({b"a": File(OUTSIDE.encode(), mode=0o600), b"b": Hard(b"a"), b"c": Hard(b"a")}))
    for name in "abc":
        (target / name).hardlink_to(outside / "f")
    before = facts(outside)[b"f"][:-1]
    planned = bring_back(store, digest, target, overwrite="changed", include=include, dry_run=True)
    result = bring_back(store, digest, target, overwrite="changed", include=include)
    chosen = include or ["a", "b", "c"]
    assert (result.written, result.metadata) == (planned.written, planned.metadata) == (len(chosen), 0)
    assert facts(outside)[b"f"][:-1] == before
    assert len({(target / name).stat().st_ino for name in chosen}) == 1
    assert (target / chosen[0]).stat().st_mode & 0o777 == 0o600
    assert (target / chosen[0]).stat().st_nlink == len(chosen)


def test_a_link_with_a_name_outside_is_made_anew(store: Store, target: Path, outside: Path) -> None:
    digest = capture(store, layer({b"l": Link(b"where")}))
    (outside / "l").symlink_to("where")
    os.utime(outside / "l", ns=(1, 1), follow_symlinks=False)
    os.link(outside / "l", target / "l", follow_symlinks=False)
    bring_back(store, digest, target, overwrite="changed")
    assert (outside / "l").lstat().st_mtime_ns == 1
    assert (target / "l").lstat().st_mtime_ns != 1


def test_a_file_swapped_for_a_name_of_another_is_not_changed(store: Store, target: Path, outside: Path) -> None:
    digest = capture(store, layer({b"f": File(OUTSIDE.encode(), mode=0o600)}))
    write(target, f=OUTSIDE)
    before = facts(outside)[b"f"][:-1]

    def swap(step: str, _counts: dict[str, Any]) -> None:
        if step == "finish" and (target / "f").stat().st_nlink == 1:
            (target / "f").unlink()
            (target / "f").hardlink_to(outside / "f")

    with pytest.raises(OperationFailed, match="run it again"):
        bring_back(store, digest, target, overwrite="changed", progress=swap)
    assert facts(outside)[b"f"][:-1] == before


def test_names_of_one_file_become_one_file_again(store: Store, target: Path) -> None:
    digest = capture(store, layer({b"a": File(b"one"), b"b": Hard(b"a"), b"c": Hard(b"a")}))
    write(target, a="one", b="one")
    bring_back(store, digest, target, overwrite="never")
    assert (target / "c").stat().st_nlink == 1  # what is there was not to be touched
    bring_back(store, digest, target, overwrite="changed")
    assert len({(target / name).stat().st_ino for name in "abc"}) == 1
    assert leftovers(target) == []
    assert bring_back(store, digest, target, overwrite="changed").written == 0


@pytest.mark.parametrize("overwrite", ["sometimes", "", 1])
def test_an_overwrite_that_is_none_is_refused(store: Store, target: Path, overwrite: Any) -> None:
    with pytest.raises(InvalidParams, match="overwrite"):
        bring_back(store, capture(store, layer({b"a": File()})), target, overwrite=overwrite)


# -- what stands in the way --------------------------------------------------------------------------------------------------


def test_a_folder_with_content_is_not_lost_for_a_file(store: Store, target: Path) -> None:
    digest = capture(store, layer({b"a": File(b"file"), b"b": File(b"file")}))
    write(target, **{"b/work": "of a week"})
    before = facts(target)
    for dry_run in (True, False):
        with pytest.raises(AlreadyExists, match="'b'"):
            bring_back(store, digest, target, overwrite="always", dry_run=dry_run)
        assert facts(target) == before  # nothing at all was done, not even `a`
    bring_back(store, digest, target, overwrite="changed", delete_extra=True)
    assert contents(target) == {"a": "file", "b": "file"}
    (target / "b").unlink()
    (target / "b").mkdir()
    bring_back(store, digest, target, overwrite="changed")
    assert (target / "b").read_text() == "file"


def test_a_git_in_the_way_is_never_lost(store: Store, target: Path) -> None:
    digest = capture(store, layer({b"b": File(b"file")}))
    write(target, **{"b/deep/.git/config": "mine"})
    with pytest.raises(AlreadyExists):
        bring_back(store, digest, target, overwrite="always", delete_extra=True)
    assert (target / "b/deep/.git/config").read_text() == "mine"


def test_files_fifos_and_links_make_way_for_folders(store: Store, target: Path, outside: Path) -> None:
    digest = capture(
        store, layer({name: Dir() for name in (b"a", b"b", b"c")} | {b"a/f": File(b"x"), b"b/f": File(b"x"), b"c/f": File(b"x")})
    )
    write(target, a="file")
    os.mkfifo(target / "b")
    (target / "c").symlink_to(outside)
    result = bring_back(store, digest, target, overwrite="never")
    assert (result.written, result.kept) == (0, 6)
    bring_back(store, digest, target, overwrite="changed")
    assert contents(target) == {"a": "/", "a/f": "x", "b": "/", "b/f": "x", "c": "/", "c/f": "x"}
    assert contents(outside) == {"f": OUTSIDE}


def test_a_fifo_or_a_link_in_place_of_a_file_is_replaced_and_never_opened(store: Store, target: Path, outside: Path) -> None:
    digest = capture(store, layer({b"p": File(b"x"), b"f": File(b"x")}))
    os.mkfifo(target / "p")
    (target / "f").symlink_to(outside / "f")
    bring_back(store, digest, target, overwrite="changed")
    assert contents(target) == {"p": "x", "f": "x"}
    assert contents(outside) == {"f": OUTSIDE}


# -- links planted while it works --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["compare", "write", "finish"])
def test_a_link_planted_while_it_works_is_never_followed(store: Store, target: Path, outside: Path, step: str) -> None:
    many = {b"d": Dir(), b"d/e": Dir()} | {b"d/e/f%03d" % number: File(b"x" * 3000) for number in range(100)}
    digest = capture(store, layer(many | {b"d/e/f": File(b"evil")}, frame_bytes=4096))
    (target / "d" / "e").mkdir(parents=True)
    before = facts(outside)
    calls = []

    def plant(now: str, _counts: dict[str, Any]) -> None:
        calls.append(now)
        if now == step and calls.count(step) == (1 if step == "finish" else 2) and not (target / "d").is_symlink():
            (target / "d").rename(target / "moved")
            (outside / "e").symlink_to(".")
            (target / "d").symlink_to(outside)

    with suppress(MothballError):  # refused, or written into the folder that was opened: both are fine
        bring_back(store, digest, target, overwrite="always", progress=plant)
    assert (target / "moved").is_dir(), "the link was never planted"
    (outside / "e").unlink(missing_ok=True)
    after = facts(outside)
    assert {path: item for path, item in after.items() if path != b"."} == {
        path: item for path, item in before.items() if path != b"."
    }


@pytest.mark.parametrize("there", [False, True])
def test_a_name_of_a_file_outside_put_in_place_of_a_link_is_not_changed(
    store: Store, target: Path, outside: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    """Between the making of the link, or the look at it, and the setting of its owner and time."""
    digest = capture(store, layer({b"l": Link(b"where"), b"z": File(b"z")}))
    write(target, mine="mine")
    before = facts(outside)[b"f"][:-1]
    if there:
        (target / "l").symlink_to("where")

        def swap(step: str, _counts: dict[str, Any]) -> None:
            if step == "finish" and (target / "l").is_symlink():
                (target / "l").unlink()
                (target / "l").hardlink_to(outside / "f")
    else:
        real = os.symlink

        def planted(source: bytes, name: bytes, *, dir_fd: int) -> None:
            real(source, name, dir_fd=dir_fd)
            os.unlink(name, dir_fd=dir_fd)
            os.link(os.fsencode(outside / "f"), name, dst_dir_fd=dir_fd)

        monkeypatch.setattr(os, "symlink", planted)

        def swap(step: str, _counts: dict[str, Any]) -> None:
            pass

    with pytest.raises(OperationFailed, match="run it again"):
        bring_back(store, digest, target, overwrite="changed", progress=swap)
    assert facts(outside)[b"f"][:-1] == before
    assert leftovers(target) == []


def test_a_target_that_becomes_a_link_is_not_followed(store: Store, tmp_path: Path, outside: Path) -> None:
    (tmp_path / "t").symlink_to(outside)
    with pytest.raises(PathNotAllowed):
        bring_back(store, capture(store, layer({b"f": File(b"evil")})), tmp_path / "t", overwrite="always")
    assert contents(outside) == {"f": OUTSIDE}


# -- deleting what is foreign ------------------------------------------------------------------------------------------------


def test_delete_extra_deletes_what_is_foreign_and_nothing_else(store: Store, target: Path, outside: Path) -> None:
    digest = capture(store, layer({b"a": File(b"a"), b"d": Dir(), b"d/b": File(b"b")}))
    digest = omitting(store, digest, "node_modules", "d/big.bin", "x/y/kept", "odd\\xff")
    write(target, a="a", extra="x")
    write(target, **{"d/more": "x", "d/big.bin": "left out", "node_modules/m/index.js": "left out", ".git/HEAD": "ref"})
    write(target, **{"d/sub/.git/HEAD": "ref", "d/sub/old": "x", "x/y/kept": "left out", "x/y/gone": "x", "gone/far/away": "x"})
    Path(os.fsdecode(os.fsencode(target) + b"/odd\xff")).write_text("left out")
    (target / "escape").symlink_to(outside)
    before = facts(target)
    planned = bring_back(store, digest, target, overwrite="changed", delete_extra=True, dry_run=True)
    assert facts(target) == before
    result = bring_back(store, digest, target, overwrite="changed", delete_extra=True)
    assert {name for name, text in contents(target).items() if text != "/"} == {
        "a", "d/b", "d/big.bin", "node_modules/m/index.js", ".git/HEAD", "d/sub/.git/HEAD", "x/y/kept", os.fsdecode(b"odd\xff"),
    }  # fmt: skip
    assert not (target / "gone").exists()
    assert contents(outside) == {"f": OUTSIDE}
    deleted = {each.path for each in planned.actions if each.action == "delete"}
    assert deleted == {"extra", "d/more", "d/sub/old", "x/y/gone", "gone/far/away", "gone/far", "gone", "escape"}
    assert result.deleted == len(deleted)


def test_delete_extra_keeps_to_the_patterns(store: Store, target: Path) -> None:
    digest = capture(store, layer({b"src": Dir(), b"src/a": File(b"a"), b"doc": Dir(), b"doc/b": File(b"b")}))
    write(target, **{"src/a": "a", "src/old": "x", "doc/b": "mine", "doc/old": "x", "top": "x"})
    bring_back(store, digest, target, include=["src"], overwrite="changed", delete_extra=True)
    assert contents(target) == {"src": "/", "src/a": "a", "doc": "/", "doc/b": "mine", "doc/old": "x", "top": "x"}


def test_delete_extra_refuses_what_it_cannot_know(store: Store, target: Path) -> None:
    digest = capture(store, layer({b"a": File(b"a")}))
    write(target, extra="x")
    with pytest.raises(InvalidParams, match="overwrite"):
        bring_back(store, digest, target, delete_extra=True)
    with pytest.raises(InvalidParams, match="overwrite"):
        bring_back(store, digest, target, delete_extra=True, overwrite="never")
    with pytest.raises(InvalidParams, match="left out more"):
        bring_back(store, omitting(store, digest, "b", further=1), target, delete_extra=True, overwrite="changed")
    manifest = load_manifest(store.blobs, digest)
    config = build_config(diff_ids=["sha256:" + "0" * 64], labels={"dev.mothball.omissions": "not json"})
    named, _ = store.blobs.put(config)
    bad, _ = store.blobs.put(
        build_manifest(config=Descriptor(MEDIA_CONFIG, named, len(config)), layers=manifest.layers, annotations={})
    )
    with pytest.raises(Corrupt, match="left out"):
        bring_back(store, bad, target, delete_extra=True, overwrite="changed")
    assert contents(target) == {"extra": "x"}


@pytest.mark.skipif(not AS_ROOT, reason="only root may write in everybody's folders")
def test_modes_of_folders_that_were_not_asked_to_change_stay(store: Store, target: Path) -> None:
    digest = capture(store, layer({b"d": Dir(mode=0o755), b"d/new": File(b"x"), b"e": Dir(), b"e/new": File(b"x")}))
    (target / "d").mkdir(mode=0o700)
    bring_back(store, digest, target, overwrite="never")
    assert (target / "d").stat().st_mode & 0o777 == 0o700
    bring_back(store, digest, target, overwrite="changed", include=["d/new"])
    assert (target / "d").stat().st_mode & 0o777 == 0o700
    bring_back(store, digest, target, overwrite="changed")
    assert (target / "d").stat().st_mode & 0o777 == 0o755


# -- being ended, and not being alone ----------------------------------------------------------------------------------------


def test_what_a_killed_run_left_is_cleaned_up_by_the_next(store: Store, target: Path) -> None:
    digest = capture(store, layer({b"d": Dir(), b"d/f": File(b"x")}))
    write(target, **{"d/.mothball-restore-": "half a file", "mine": "mine"})
    bring_back(store, digest, target, overwrite="never")
    assert contents(target) == {"d": "/", "d/f": "x", "mine": "mine"}


def test_two_restores_into_one_folder_meet(store: Store, target: Path) -> None:
    digest = capture(store, layer({b"f": File(b"x")}))
    write(target, mine="mine")
    fd = os.open(target, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(Busy, match="another restore"):
        bring_back(store, digest, target, overwrite="always")
    os.close(fd)
    bring_back(store, digest, target, overwrite="always")


def test_the_current_folder_is_filled_in_place(store: Store, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell that stands in it would otherwise stand in a folder that no longer exists."""
    monkeypatch.chdir(target)
    before = target.stat().st_ino
    bring_back(store, capture(store, layer({b"": Dir(mode=0o711), b"f": File(b"x")})), target)
    assert target.stat().st_ino == before
    assert (contents(target), target.stat().st_mode & 0o777) == ({"f": "x"}, 0o711)


def test_an_empty_target_with_overwrite_is_filled_in_place(store: Store, target: Path) -> None:
    """So can be filled what cannot be replaced: a mount point, or a folder in one that may not be written."""
    before = target.stat().st_ino
    bring_back(store, capture(store, layer({b"f": File(b"x")})), target, overwrite="never")
    assert (contents(target), target.stat().st_ino) == ({"f": "x"}, before)
    assert leftovers(target.parent) == []


def test_a_mount_point_is_filled_and_what_is_mounted_below_is_never_deleted(store: Store, tmp_path: Path, target: Path) -> None:
    digest = capture(store, layer({b"f": File(b"x")}))
    done = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(target)], capture_output=True, check=False)
    if done.returncode:
        not_permitted("mount a file system")
    try:
        bring_back(store, digest, target)
        assert contents(target) == {"f": "x"}
        (target / "m").mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(target / "m")], check=True)
        try:
            (target / "m" / "precious").write_text("mine")
            result = bring_back(store, digest, target, overwrite="changed", delete_extra=True)
            assert (result.deleted, (target / "m" / "precious").read_text()) == (0, "mine")
        finally:
            subprocess.run(["umount", str(target / "m")], check=True)
    finally:
        subprocess.run(["umount", str(target)], check=True)


def test_a_full_disk_keeps_what_was_written_for_the_next_run_and_says_so(store: Store, target: Path) -> None:
    """The file system lies about its room (as one with compression or other writers does): found out while writing."""
    many = {b"f%03d" % number: File(os.urandom(20_000)) for number in range(100)}
    digest = capture(store, layer(many, frame_bytes=65_536))
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(target)], capture_output=True, check=False)
    if done.returncode:
        not_permitted("mount a file system")
    try:
        calls = []

        def fill(step: str, _counts: dict[str, Any]) -> None:
            calls.append(step)
            if calls.count("write") == 2:
                (target / "other").write_bytes(bytes(3 * 1024**2))

        with pytest.raises(NoSpace, match="goes on where it was"):
            bring_back(store, digest, target / "back", progress=fill)
        assert not (target / "back").exists()
        with pytest.raises(NoSpace):
            bring_back(store, digest, target / "back")
        (target / "other").unlink()
        assert bring_back(store, digest, target / "back").resumed
        assert {name: item.content for name, item in many.items()} == {
            os.fsencode(path.name): path.read_bytes() for path in (target / "back").iterdir()
        }
        assert leftovers(target) == []
    finally:
        subprocess.run(["umount", str(target)], check=True)
