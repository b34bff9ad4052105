"""Trees that change while they are captured, and disks that end."""

from __future__ import annotations

import hashlib
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mothball.capture.reading import extents, fill_sparse
from mothball.errors import Cancelled, NoSpace
from mothball.store.tree import Tree
from mothball.store.verify import verify
from tests.support import not_permitted
from tests.unit.capture.harness import Yard, on_disk

Edit = Callable[[Path], None]


def after_walk(edit: Callable[[], None]) -> Callable[[str, dict[str, Any]], None]:
    """A checkpoint that changes the tree once, when the walk is over and nothing has been read."""
    walks = [0]

    def checkpoint(name: str, _data: dict[str, Any]) -> None:
        if name == "walk":
            walks[0] += 1
            if walks[0] == 1:
                edit()

    return checkpoint


@contextmanager
def busy(work: Callable[[], None]) -> Iterator[None]:
    """Do `work` again and again in another thread."""
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            work()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("size", [10, 50_000, 300_000])
@pytest.mark.parametrize("becomes", [0, 5, 60_000, 400_000])
def test_a_file_that_grew_or_shrank_after_the_walk_is_captured_as_it_is_then(yard: Yard, size: int, becomes: int) -> None:
    root = yard.folder()
    for name in ("a", "m", "z"):
        (root / name).write_bytes(os.urandom(size))
    new = os.urandom(becomes)
    result = yard.capture(checkpoint=after_walk(lambda: (root / "m").write_bytes(new) and None))
    assert yard.facts(result) == on_disk(root)
    assert (result.torn, result.bytes) == ([], 2 * size + becomes)
    assert verify(yard.store, "ws", level="content").problems == []
    assert yard.capture().changed is False


@pytest.mark.parametrize("size", [10, 300_000])
@pytest.mark.parametrize("kind", ["gone", "symlink", "fifo", "folder", "parent"])
def test_a_file_that_became_something_else_after_the_walk_is_an_omission(yard: Yard, kind: str, size: int) -> None:
    root = yard.folder()
    (root / "sub").mkdir()
    for path in ("a", "sub/m", "z"):
        (root / path).write_bytes(os.urandom(size))

    def swap() -> None:
        victim = root / "sub" / "m"
        victim.unlink()
        if kind == "symlink":
            victim.symlink_to("/etc/passwd")
        elif kind == "fifo":
            os.mkfifo(victim)
        elif kind == "folder":
            victim.mkdir()
        elif kind == "parent":
            (root / "sub").rmdir()
            (root / "sub").symlink_to("/etc")

    result = yard.capture(checkpoint=after_walk(swap))
    assert result.omitted == {"vanished": 1}
    assert yard.omissions(result) == {"sub/m": "vanished"}
    assert {"a", "z"} <= set(yard.facts(result))
    assert "sub/m" not in yard.facts(result)
    assert verify(yard.store, "ws", level="content").problems == []


def test_a_file_that_vanishes_from_a_later_generation_does_not_show_its_old_content(yard: Yard) -> None:
    root = yard.folder()
    (root / "f").write_text("old")
    (root / "g").write_text("old")
    yard.capture()
    (root / "f").write_text("new and longer")
    result = yard.capture(checkpoint=after_walk((root / "f").unlink))
    assert set(yard.facts(result)) == {"", "g"}
    assert yard.omissions(result) == {"f": "vanished"}
    assert verify(yard.store, "ws", level="content").problems == []


def test_a_file_that_never_holds_still_is_marked_torn(yard: Yard) -> None:
    root = yard.folder()
    (root / "a").write_text("still")
    (root / "hot").write_bytes(bytes(3_000_000))
    fd = os.open(root / "hot", os.O_WRONLY)
    try:
        with busy(lambda: os.pwrite(fd, os.urandom(64), 0) and None):
            result = yard.capture()
    finally:
        os.close(fd)
    assert result.torn == ["hot"]
    assert verify(yard.store, "ws", level="content").problems == []
    assert yard.facts(result)["a"] == on_disk(root)["a"]
    settled = yard.capture()
    assert settled.torn == []
    assert yard.facts(settled) == on_disk(root)


def test_a_large_file_that_shrinks_while_it_is_streamed_keeps_the_layer_whole(yard: Yard) -> None:
    root = yard.folder()
    (root / "hot").write_bytes(bytes(2_000_000))
    fd = os.open(root / "hot", os.O_RDWR)

    def breathe() -> None:
        os.ftruncate(fd, 1_000)
        os.ftruncate(fd, 2_000_000)

    try:
        with busy(breathe):
            result = yard.capture()
    finally:
        os.close(fd)
    assert verify(yard.store, "ws", level="content").problems == []
    with Tree.open(yard.store, result.digest) as tree:
        assert len(tree.read("hot")) == tree.find("hot").size


def test_a_tree_that_is_renamed_meanwhile_is_captured_through_its_descriptor(yard: Yard) -> None:
    root = yard.folder()
    (root / "sub").mkdir()
    for number in range(50):
        (root / "sub" / f"f{number}").write_text(str(number))
    before = on_disk(root)
    result = yard.capture(checkpoint=after_walk(lambda: root.rename(yard.root / "elsewhere") and None))
    assert yard.facts(result) == before


def test_a_folder_that_is_renamed_meanwhile_is_said_file_by_file(yard: Yard) -> None:
    root = yard.folder()
    (root / "sub").mkdir()
    for number in range(5):
        (root / "sub" / f"f{number}").write_text(str(number))
    result = yard.capture(checkpoint=after_walk(lambda: (root / "sub").rename(root / "bus") and None))
    assert result.omitted == {"vanished": 5}
    assert yard.facts(yard.capture()) == on_disk(root)


def test_an_unreadable_file_is_an_omission_and_the_rest_is_captured(yard: Yard) -> None:
    """As an ordinary user: root reads everything."""
    root = yard.folder()
    (root / "open").write_text("x")
    (root / "shut").write_text("secret")
    (root / "closed").mkdir()
    (root / "shut").chmod(0)
    (root / "closed").chmod(0)
    if os.geteuid() == 0:
        for path in (yard.base, *yard.base.parents):
            if path.stat().st_uid == 0 and len(path.parts) > 2:
                path.chmod(path.stat().st_mode | 0o055)
        for path in (yard.root, *yard.root.rglob("*")):
            os.chown(path, 65534, 65534)
        yard.settings.data_dir.mkdir(exist_ok=True)
        os.chown(yard.settings.data_dir, 65534, 65534)
        child = os.fork()
        if not child:
            try:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
                yard.capture()
                os._exit(0)
            except BaseException:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
    else:
        yard.capture()
    ref = yard.store.refs("ws").get()
    with Tree.open(yard.store, ref.digest) as tree:
        assert [entry.path for entry in tree.walk()] == ["closed", "open"]
        annotations = tree.manifest.annotations
    assert annotations["dev.mothball.omitted.unreadable"] == "2"


def test_a_sparse_file_of_5_gb_is_stored_in_its_data_and_its_map(yard: Yard) -> None:
    root = yard.folder()
    size = 5 * 1024**3
    with (root / "disk.img").open("wb") as file:
        file.write(b"begin")
        file.seek(3 * 1024**3)
        file.write(b"middle")
        file.truncate(size)
    settings = yard.with_settings(frame_bytes=16 * 1024**2)
    result = yard.capture(settings=settings)
    assert result.stored_bytes < 2_000_000
    with Tree.open(yard.store, result.digest) as tree:
        entry = tree.find("disk.img")
        assert entry.size == size
        with tree.open_file("disk.img") as file:
            assert file.read(6) == b"begin\0"
            file.seek(3 * 1024**3 - 1)
            assert file.read(8) == b"\0middle\0"
            file.seek(size - 3)
            assert file.read() == bytes(3)
    assert yard.capture(settings=settings).changed is False


def test_holes_are_found_and_filled_like_reading_them(tmp_path: Path) -> None:
    path = tmp_path / "f"
    with path.open("wb") as file:
        for at in (0, 1_000_000, 1_100_000, 5_000_000):
            file.seek(at)
            file.write(os.urandom(5_000))
        file.truncate(6_000_001)
    whole = path.read_bytes()
    fd = os.open(path, os.O_RDONLY)
    try:
        data = extents(fd, len(whole))
        for step in (999_983, 70_001, len(whole)):
            out = bytearray()
            while len(out) < len(whole):
                buffer = bytearray(b"\xee" * min(step, len(whole) - len(out)))
                assert fill_sparse(fd, len(out), memoryview(buffer), data) == len(buffer)
                out += buffer
            assert hashlib.sha256(out).digest() == hashlib.sha256(whole).digest()
    finally:
        os.close(fd)


def test_a_cancel_in_the_middle_leaves_the_store_as_it_was(yard: Yard) -> None:
    root = yard.folder()
    (root / "f").write_text("x")
    first = yard.capture()
    for number in range(20):
        (root / f"n{number}").write_bytes(os.urandom(30_000))
    before = sorted(path.name for path in yard.store.blobs.folder.iterdir())

    def cancel(name: str, _data: dict[str, Any]) -> None:
        if name == "write":
            raise Cancelled(job="j")

    with pytest.raises(Cancelled):
        yard.capture(checkpoint=cancel)
    assert sorted(path.name for path in yard.store.blobs.folder.iterdir()) == before
    assert list(yard.store.blobs.temp.iterdir()) == []
    assert yard.store.refs("ws").get().digest == first.digest


def test_a_full_disk_is_no_space_and_the_store_is_as_before(yard: Yard) -> None:
    data = yard.base / "small"
    data.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "none", str(data)], check=False, capture_output=True).returncode:
        not_permitted("mount a small file system")
    try:
        settings = yard.with_settings(data_dir=data)
        root = yard.folder()
        (root / "small").write_bytes(os.urandom(10_000))
        first = yard.capture(settings=settings)
        (root / "large").write_bytes(os.urandom(900_000))
        store = Yard(yard.base, settings).store
        before = sorted(path.name for path in store.blobs.folder.iterdir())
        with pytest.raises(NoSpace, match="nothing was published"):
            yard.capture(settings=settings)
        assert sorted(path.name for path in store.blobs.folder.iterdir()) == before
        assert list(store.blobs.temp.iterdir()) == []
        assert store.refs("ws").get().digest == first.digest
        assert verify(store, "ws", level="content").problems == []
        (root / "large").unlink()
        (root / "small").write_bytes(os.urandom(10_001))
        assert yard.capture(settings=settings).generation == 2
    finally:
        subprocess.run(["umount", str(data)], check=True)


def test_temp_files_of_a_killed_writer_are_swept_and_those_of_a_live_one_are_not(yard: Yard) -> None:
    yard.folder()
    yard.capture()
    old = yard.store.blobs.temp / "blob-1-dead"
    old.write_bytes(b"half")
    os.utime(old, (0, 0))
    with yard.store.blobs.writer() as live:
        live.write(b"x")
        path = next(p for p in yard.store.blobs.temp.iterdir() if p != old)
        os.utime(path, (0, 0))
        yard.capture()
        assert path.exists()
        assert not old.exists()
