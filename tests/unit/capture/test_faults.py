"""Faults of the disk, odd file systems, damaged stores: an error or an omission, never a wrong capture."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from mothball.errors import LeaseLost
from mothball.store import layer
from mothball.store.blobs import BlobWriter
from mothball.store.manifest import load_manifest
from mothball.store.verify import verify
from tests.unit.capture.harness import Yard, on_disk
from tests.unit.capture.test_races import after_walk


def test_a_vanished_folder_does_not_lead_the_reader_into_the_wrong_one(yard: Yard) -> None:
    """`a/b` is gone when it is read; the next file, `z`, must be the root's and not `a/z`."""
    root = yard.folder()
    (root / "a" / "b").mkdir(parents=True)
    for name in ("a/b/x", "a/z", "z", "zz"):
        (root / name).write_text(f"content of {name}")

    def remove() -> None:
        (root / "a" / "b" / "x").unlink()
        (root / "a" / "b").rmdir()

    result = yard.capture(checkpoint=after_walk(remove))
    assert yard.omissions(result) == {"a/b/x": "vanished"}
    facts, disk = yard.facts(result), on_disk(root)
    assert {name: facts[name][3] for name in ("a/z", "z", "zz")} == {name: disk[name][3] for name in ("a/z", "z", "zz")}


def test_a_failed_write_back_in_the_middle_fails_the_capture(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel reports it once, to the flush that runs beside the work; the last fsync would say that all is well."""
    root = yard.folder()
    (root / "noise").write_bytes(os.urandom(2_000_000))
    monkeypatch.setattr(layer, "FLUSH_EVERY", 100_000)
    calls: list[int] = []
    sync = os.fdatasync

    def fails_once(fd: int) -> None:
        calls.append(fd)
        if len(calls) == 1:
            raise OSError(errno.EIO, "lost write")
        sync(fd)

    monkeypatch.setattr(os, "fdatasync", fails_once)
    with pytest.raises(OSError, match="lost write"):
        yard.capture(settings=yard.with_settings(fsync=True))
    assert yard.store.refs("ws").list() == []


def test_an_error_of_the_store_is_never_taken_for_an_unreadable_file(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    root = yard.folder()
    (root / "big").write_bytes(os.urandom(500_000))
    good = yard.capture()
    (root / "big").write_bytes(os.urandom(500_000))

    def broken(self: BlobWriter, data: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(BlobWriter, "write", broken)
    with pytest.raises(OSError, match="Input/output error"):
        yard.capture()
    assert yard.store.refs("ws").get().digest == good.digest


def test_a_rotten_blob_is_repaired_by_the_next_full_capture(yard: Yard) -> None:
    root = yard.folder()
    (root / "f").write_bytes(os.urandom(50_000))
    first = yard.capture()
    blob = yard.store.blobs.path(load_manifest(yard.store.blobs, first.digest).layers[0].digest)
    data = bytearray(blob.read_bytes())
    data[1_000] ^= 1
    blob.write_bytes(data)
    assert verify(yard.store, "ws", level="content").problems
    yard.capture(full=True, verify=True)
    assert verify(yard.store, "ws", level="content").problems == []


def test_reused_blobs_of_the_parent_are_touched(yard: Yard) -> None:
    """A collector must see that they are in use again."""
    root = yard.folder()
    (root / "f").write_bytes(os.urandom(50_000))
    first = yard.capture()
    blob = yard.store.blobs.path(load_manifest(yard.store.blobs, first.digest).layers[0].digest)
    os.utime(blob, (0, 0))
    (root / "g").write_text("g")
    yard.capture()
    assert blob.stat().st_mtime > 1_000_000_000


def test_a_damaged_sibling_is_no_parent_and_no_obstacle(yard: Yard) -> None:
    (yard.folder("one") / "f").write_text("x")
    yard.capture("one")
    (yard.store.refs("one").folder / "index.json").write_text("{")
    (yard.folder("two") / "f").write_text("x")
    assert yard.capture("two", parent_candidate="one").generation == 1


def test_times_beyond_64_bits_are_clamped(yard: Yard) -> None:
    root = yard.folder()
    path = root / "future"
    path.write_text("x")
    subprocess.run(["touch", "-d", "@10000000000", str(path)], check=True)
    (root / "past").write_text("x")
    os.utime(root / "past", ns=(-1, -(10**18)))
    result = yard.capture()
    assert result.torn == []
    assert yard.facts(result)["past"] == on_disk(root)["past"]
    assert yard.facts(result)["future"][2] == min(path.stat().st_mtime_ns, 2**63 - 1)
    assert yard.capture().changed is False
    assert verify(yard.store, "ws", level="content").problems == []


def test_a_time_that_needs_a_larger_header_than_the_walk_saw(yard: Yard) -> None:
    root = yard.folder()
    (root / "f").write_text("x")
    (root / "g").write_text("y")
    result = yard.capture(checkpoint=after_walk(lambda: os.utime(root / "f", ns=(0, -(10**18)))))
    assert yard.facts(result) == on_disk(root)
    assert verify(yard.store, "ws", level="content").problems == []


def test_folders_deeper_than_the_limit_are_said_not_crashed_into(yard: Yard) -> None:
    root = yard.folder()
    fd = os.open(root, os.O_RDONLY)
    for _ in range(600):
        os.mkdir("d", dir_fd=fd)
        deeper = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = deeper
    os.close(fd)
    result = yard.capture()
    assert result.omitted == {"unreadable": 1}
    assert "deeper than 256" in result.omissions[0]["detail"]


def test_naming_a_folder_to_be_read_again_makes_no_generation_by_itself(yard: Yard) -> None:
    root = yard.folder()
    (root / "src").mkdir()
    (root / "src" / "f").write_text("x")
    first = yard.capture()
    for paths in (
        [
            ".",
        ],
        ["src"],
        ["src/f"],
    ):
        assert yard.capture(paths=tuple(paths)).digest == first.digest


def test_clamped_owners_hold_with_and_without_a_stat_index(yard: Yard) -> None:
    root = yard.folder()
    (root / "f").write_text("x")
    if os.geteuid() == 0:
        for path in (root, root / "f"):
            os.chown(path, 1000, 1000)
    yard.capture()
    clamped = yard.capture(options={"owner": "clamp"})
    for path in (yard.store.cache / "ws").iterdir():
        path.unlink()
    again = yard.capture(options={"owner": "clamp"})
    assert (again.digest, again.changed) == (clamped.digest, False)
    from mothball.store.tree import Tree

    with Tree.open(yard.store, again.digest) as tree:
        assert {(entry.uid, entry.gid) for entry in [tree.find(""), *tree.walk()]} == {(0, 0)}


def test_a_full_capture_counts_what_changed_and_knows_its_own_work(yard: Yard) -> None:
    root = yard.folder()
    for name in "abc":
        (root / name).write_text(name)
    yard.capture()
    (root / "a").write_text("changed")
    full = yard.capture(full=True, job="same")
    assert (full.added, full.modified, full.deleted) == (0, 1, 0)
    again = yard.capture(full=True, job="same")
    assert (again.changed, again.generation, again.parent) == (True, full.generation, full.parent)


def test_first_captures_of_one_workspace_at_once_end_in_one_winner(yard: Yard) -> None:
    (yard.folder() / "f").write_text("x")

    def run(number: int, both: threading.Barrier, errors: list[BaseException]) -> None:
        both.wait()
        try:
            yard.capture(fence=number, job=f"j{number}")
        except BaseException as error:
            errors.append(error)

    for _ in range(10):
        subprocess.run(["rm", "-rf", str(yard.store.root)], check=True)
        failed: list[BaseException] = []
        barrier = threading.Barrier(2)
        threads = [threading.Thread(target=run, args=(number, barrier, failed)) for number in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(isinstance(error, LeaseLost) for error in failed), failed
        assert yard.store.refs("ws").get().get("job") == "j2" or not failed


def test_a_layer_that_would_have_to_take_away_too_many_names_is_squashed(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    from mothball.capture import capture

    monkeypatch.setattr(capture, "MAX_REMOVED", 5)
    root = yard.folder()
    (root / "keep").write_bytes(os.urandom(10_000))
    for number in range(10):
        (root / f"f{number}").write_text("x")
    yard.capture()
    for path in Path(root).glob("f*"):
        path.unlink()
    result = yard.capture()
    assert (result.squashed, result.layers, result.deleted) == (True, 1, 10)
