"""What a program can rely on when it reads a capture: rows B-80 to B-92 and B-105, by their IDs."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mothball.errors import InvalidParams, NotFound
from mothball.store import Store
from mothball.store import read as read_module
from mothball.store.tree import Entry, Tree
from tests.unit.store.build import Dir, File, Hard, Link, capture, layer, new_store

SPEC: dict[bytes, Any] = {
    b"": Dir(0o750),
    b"a": Dir(0o700),
    b"a/b": Dir(),
    b"a/b/c": File(b"deep", 0o4755),
    b"a/b-": File(b"beside"),
    b"empty": Dir(0o711),
    b"f": File(b"content", 0o640),
    b"g": Hard(b"f"),
    b"l": Link(b"nowhere"),
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return new_store(tmp_path / "store")


@pytest.fixture
def tree(store: Store) -> Iterator[Tree]:
    capture(store, layer(SPEC), workspace="w")
    with store.tree("w") as found:
        yield found


CALLS: dict[str, Callable[[Tree, Any], Any]] = {
    "read": lambda tree, path: tree.read(path),
    "open_file": lambda tree, path: tree.open_file(path),
    "copy": lambda tree, path: tree.copy(path, io.BytesIO()),
    "stat": lambda tree, path: tree.stat(path),
    "listdir": lambda tree, path: tree.listdir(path),
    "walk": lambda tree, path: list(tree.walk(path)),
}
_LEADS_NOWHERE = ["../f", "a/../../f", "/f", "a//b", "a/", "f\0", "\ud800", None, 3]


@pytest.mark.parametrize("call", [*CALLS, "exists"])
@pytest.mark.parametrize("path", _LEADS_NOWHERE)
def test_b80_what_is_no_path_is_refused_by_every_call_alike(tree: Tree, call: str, path: Any) -> None:
    with pytest.raises(InvalidParams):
        (CALLS.get(call) or (lambda tree, path: tree.exists(path)))(tree, path)


def test_b80_a_dot_is_nothing(tree: Tree) -> None:
    assert tree.read("./a/./b/c") == tree.read(b"a/b/c") == b"deep"
    assert tree.stat(".") == tree.stat("")


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("path", ["x", "a/x", "f/x", "l/x", "a/b/c/d", "empty/x", "A"])
def test_b81_what_is_not_there_is_not_found_by_every_call_alike(tree: Tree, call: str, path: str) -> None:
    with pytest.raises(NotFound) as caught:
        CALLS[call](tree, path)
    assert caught.value.message == f"not found: {path}"
    assert not tree.exists(path)


@pytest.mark.parametrize("path", ["", ".", "a", "a/b", "empty"])
def test_b81_a_folder_is_no_file_also_when_it_is_empty_or_the_root(tree: Tree, path: str) -> None:
    for call in ("read", "open_file", "copy"):
        with pytest.raises(InvalidParams, match=r"^is a directory: "):
            CALLS[call](tree, path)


def test_b82_to_b86_and_b90_a_capture_has_nothing_to_write_with(tree: Tree) -> None:
    writing = ("write", "append", "delete", "delete_all", "rename", "create", "mkdir", "ensure_dir", "unlink", "put", "truncate")
    assert [name for name in dir(tree) if name.startswith(writing)] == []
    with tree.open_file("f") as file:
        assert not file.writable()
        with pytest.raises((OSError, io.UnsupportedOperation)):
            file.write(b"x")
        with pytest.raises((OSError, io.UnsupportedOperation)):
            file.truncate()
    assert tree.read("f") == b"content"


def test_b87_a_folder_lists_what_lies_in_it_and_nothing_else(tree: Tree) -> None:
    assert [entry.name for entry in tree.listdir()] == ["a", "empty", "f", "g", "l"]
    assert [entry.path for entry in tree.listdir("a")] == ["a/b", "a/b-"]
    assert tree.listdir("empty") == []
    for path in ("f", "g", "l", "a/b/c"):
        for call in ("listdir", "walk"):
            with pytest.raises(InvalidParams, match=r"^is not a directory: "):
                CALLS[call](tree, path)


def test_b88_stat_says_what_was_captured(tree: Tree) -> None:
    assert (tree.stat("").type, tree.stat("").mode, tree.stat("").name) == ("dir", 0o750, "")
    assert [tree.stat(path).mode for path in ("a", "empty", "f", "a/b/c")] == [0o700, 0o711, 0o640, 0o4755]
    assert (tree.stat("g").type, tree.stat("g").size, tree.stat("g").link) == ("hardlink", 7, "f")
    assert (tree.stat("l").type, tree.stat("l").size, tree.stat("l").link) == ("symlink", 0, "nowhere")


def test_b89_and_b105_exists_may_ask_for_a_kind(tree: Tree) -> None:
    kinds = {"": "dir", "a": "dir", "empty": "dir", "f": "file", "g": "file", "l": "symlink", "a/b/c": "file"}
    for path, kind in kinds.items():
        assert tree.exists(path)
        assert {asked for asked in ("file", "dir", "symlink") if tree.exists(path, asked)} == {kind}  # type: ignore[arg-type]
    assert not tree.exists("nothing", "file")


def test_b91_an_open_tree_stays_readable_whatever_becomes_of_ref_and_blobs(store: Store, tree: Tree) -> None:
    store.refs("w").replace(lambda _: [])
    for blob in store.blobs.folder.iterdir():
        blob.unlink()
    assert tree.read("a/b/c") == b"deep"
    with pytest.raises(NotFound):
        store.tree("w")


def test_b105_a_walk_may_be_flat_and_may_choose(tree: Tree) -> None:
    def walk(*args: Any, **given: Any) -> list[str]:
        return [entry.path for entry in tree.walk(*args, **given)]

    everything = ["a", "a/b", "a/b/c", "a/b-", "empty", "f", "g", "l"]
    assert walk() == walk(max_depth=0) == walk(max_depth=3) == everything
    assert walk(max_depth=1) == ["a", "empty", "f", "g", "l"]
    assert walk(max_depth=2) == [path for path in everything if path != "a/b/c"]
    assert walk("a", max_depth=1) == ["a/b", "a/b-"]
    assert walk("a") == walk("a", max_depth=2) == ["a/b", "a/b/c", "a/b-"]
    assert walk(filter=lambda entry: entry.type == "file") == ["a/b/c", "a/b-", "f"]
    seen: list[Entry] = []
    assert walk("a", max_depth=1, filter=lambda entry: bool(seen.append(entry))) == []
    assert [entry.path for entry in seen] == ["a/b", "a/b-"]
    with pytest.raises(InvalidParams):
        walk(max_depth=-1)


def test_latency_is_one_frame_however_large_the_capture(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    spec: dict[bytes, Any] = {b"d%02d" % folder: Dir() for folder in range(20)}
    spec |= {b"d%02d/f%02d" % (folder, number): File(bytes([number]) * 3000) for folder in range(20) for number in range(50)}
    capture(store, layer(spec, frame_bytes=64 * 1024), layer({b"d05/f07": File(b"new")}), workspace="large")
    frames: list[tuple[str, int]] = []
    original = read_module.read_frame

    def counting(blob: Any, toc: Any, number: int) -> bytes:
        frames.append((toc.name, number))
        return original(blob, toc, number)

    monkeypatch.setattr(read_module, "read_frame", counting)
    with store.tree("large") as found:
        assert len(found.layers[0].toc.frames) > 40
        for look in (lambda: list(found.walk()), lambda: found.listdir("d05"), lambda: found.stat("d05/f07")):
            look()
        assert frames == []
        assert found.read("d05/f07") == b"new"
        assert len(frames) == 1
        with found.open_file("d12/f33") as file:
            file.seek(2999)
            assert file.read() == bytes([33])
        assert len(frames) <= 3  # a file may lie across the border of two frames
