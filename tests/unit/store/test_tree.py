"""The merged tree and reading out of it (B-80 to B-92)."""

from __future__ import annotations

import hashlib
import io
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mothball.errors import Corrupt, InvalidParams, MothballError, NotFound, Oversize
from mothball.store import Store
from mothball.store import toc as toc_module
from mothball.store.read import clean_path, show
from mothball.store.toc import read_frame, sort_key
from mothball.store.tree import Entry, Tree
from tests.unit.store.build import NS, Blob, Dir, File, Hard, Link, Mtime, capture, damage, layer, new_store, pack


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return new_store(tmp_path / "store")


FIRST = {
    b"": Dir(0o750),
    b"bin": Dir(),
    b"bin/run": File(b"#!/bin/sh\n" * 500, 0o755),
    b"bin/run2": Hard(b"bin/run"),
    b"docs": Dir(),
    b"docs/empty": Dir(0o700),
    b"docs/a.md": File(b"first a"),
    b"docs/b.md": File(b"first b"),
    b"docs.txt": File(),
    b"latin-\xe9": File(b"latin"),
    b"new\nline": File(b"newline"),
    b"out": Link(b"/etc/passwd"),
    b"there": Dir(),
    b"there/deep": Dir(),
    b"there/deep/x": File(b"x"),
}
SECOND = {
    b"bin": Dir(0o711),
    b"docs": Mtime(NS + 1),
    b"docs/b.md": File(b"second b"),
    b"docs/c.md": File(b"c"),
    b"there": File(b"a file now"),
}
THIRD = {b"docs/b.md": Mtime(NS + 5), b"there": Dir(), b"there/y": File(b"y")}


@pytest.fixture
def tree(store: Store) -> Iterator[Tree]:
    layers = (layer(FIRST), layer(SECOND, [b"docs/a.md", b"there"]), layer(THIRD))
    with Tree.open(store, capture(store, *layers)) as found:
        yield found


def by_path(entries: Any) -> dict[str, Entry]:
    return {entry.path: entry for entry in entries}


def test_the_merged_tree_lists_what_the_layers_make_in_order(tree: Tree) -> None:
    paths = [entry.path for entry in tree.walk()]
    assert paths == [
        "bin", "bin/run", "bin/run2", "docs", "docs/b.md", "docs/c.md", "docs/empty", "docs.txt", "latin-\udce9", "new\nline",
        "out", "there", "there/y",
    ]  # fmt: skip
    assert [os.fsencode(path) for path in paths] == sorted(map(os.fsencode, paths), key=sort_key)


def test_b28_modes_owners_times_links_and_empty_folders_survive(tree: Tree) -> None:
    found = by_path(tree.walk())
    assert found["bin"].mode == 0o711
    assert found["bin/run"].mode == 0o755
    assert (found["bin/run"].uid, found["bin/run"].gid, found["bin/run"].mtime_ns) == (1000, 1000, NS)
    assert found["docs"].mtime_ns == NS + 1
    assert found["docs"].mode == 0o755
    assert found["docs/b.md"].mtime_ns == NS + 5
    assert found["docs/b.md"].layer == 1
    assert found["docs/b.md"].sha256 == hashlib.sha256(b"second b").hexdigest()
    assert (found["docs/empty"].type, found["docs/empty"].mode) == ("dir", 0o700)
    assert (found["out"].type, found["out"].link) == ("symlink", "/etc/passwd")
    assert (found["bin/run2"].type, found["bin/run2"].link, found["bin/run2"].size) == ("hardlink", "bin/run", 5000)


def test_find_list_and_walk_agree(tree: Tree) -> None:
    everything = list(tree.walk())
    for entry in everything:
        assert tree.find(entry.path) == entry
        assert tree.exists(entry.path)
    for folder in ["", *(entry.path for entry in everything if entry.type == "dir")]:
        start = folder + "/" if folder else ""
        inside = [entry for entry in everything if entry.path.startswith(start)]
        assert list(tree.walk(folder)) == inside
        assert tree.listdir(folder) == [entry for entry in inside if "/" not in entry.path[len(start) :]]


def test_content_comes_from_the_layer_that_has_it(tree: Tree) -> None:
    assert tree.read("bin/run") == tree.read("bin/run2") == b"#!/bin/sh\n" * 500
    assert tree.read("docs/b.md") == b"second b"
    assert tree.read("docs.txt") == b""
    assert tree.read("latin-\udce9") == tree.read(b"latin-\xe9") == b"latin"
    assert tree.read("./new\nline") == b"newline"


@pytest.mark.parametrize("path", ["/bin/run", "../x", "docs/../../x", "docs//b.md", "docs/", "a\0b", "\ud800", 7, None])
def test_b80_absolute_parent_nul_and_empty_components_are_refused(tree: Tree, path: Any) -> None:
    for call in (tree.read, tree.find, tree.exists, tree.listdir, tree.open_file):
        with pytest.raises(InvalidParams):
            call(path)
    with pytest.raises(InvalidParams):
        list(tree.walk(path))


@pytest.mark.parametrize("path", ["docs/a.md", "there/deep/x", "there/deep", "nothing", "docs.txt/x", "docs/b", "bin/run/x"])
def test_b81_unknown_is_not_found_also_when_a_layer_below_has_it(tree: Tree, path: str) -> None:
    assert not tree.exists(path)
    for call in (tree.read, tree.find, tree.listdir, tree.open_file):
        with pytest.raises(NotFound) as caught:
            call(path)
        assert caught.value.message == f"not found: {path}"
        assert caught.value.fields == {"what": "file", "id": path}


@pytest.mark.parametrize("path", ["docs", "docs/empty", "", "."])
def test_b81_reading_a_folder_says_so_empty_ones_too(tree: Tree, path: str) -> None:
    for call in (tree.read, tree.open_file):
        with pytest.raises(InvalidParams, match="is a directory: "):
            call(path)


def test_b26_a_symbolic_link_is_never_followed(tree: Tree) -> None:
    with pytest.raises(InvalidParams, match="is a symbolic link: out"):
        tree.read("out")
    with pytest.raises(NotFound):
        tree.read("out/passwd")


def test_b87_listing_is_sorted_and_refuses_files_and_unknown_folders(tree: Tree) -> None:
    assert [entry.name for entry in tree.listdir("docs")] == ["b.md", "c.md", "empty"]
    assert tree.listdir("docs/empty") == []
    with pytest.raises(InvalidParams, match=r"is not a directory: docs/b\.md"):
        tree.listdir("docs/b.md")
    with pytest.raises(NotFound):
        tree.listdir("nowhere")


def test_b88_stat_gives_real_modes_and_the_root(tree: Tree) -> None:
    assert (tree.stat("").path, tree.stat("").type, tree.stat("").mode) == ("", "dir", 0o755)
    assert tree.stat("bin/run").mode == 0o755


def test_b89_the_root_exists(tree: Tree) -> None:
    assert tree.exists("")
    assert tree.exists("out")


def test_one_file_is_one_frame(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    spec: dict[bytes, Any] = {b"f%03d" % number: File(os.urandom(700)) for number in range(200)}
    digest = capture(store, layer(spec, frame_bytes=64 * 1024))
    read: list[int] = []

    def counting(file: Any, toc: Any, number: int) -> bytes:
        read.append(number)
        return read_frame(file, toc, number)

    monkeypatch.setattr("mothball.store.read.read_frame", counting)
    with Tree.open(store, digest) as tree:
        assert tree.read("f100") == spec[b"f100"].content
    assert len(read) == 1


def test_one_path_reads_one_block_per_layer_and_decodes_its_row_alone(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    spec: dict[bytes, Any] = {b"f%05d" % number: File() for number in range(6000)}
    digest = capture(store, layer(spec, frame_bytes=1024**2), layer({b"f05000": File(b"new")}))
    read: list[tuple[str, int]] = []
    original = toc_module.Toc._raw

    def counting(self: Any, number: int) -> Any:
        read.append((self.name, number))
        return original(self, number)

    monkeypatch.setattr(toc_module.Toc, "_raw", counting)
    monkeypatch.setattr(toc_module.Toc, "block", lambda _self, number: pytest.fail(f"all of block {number}"))
    with Tree.open(store, digest) as tree:
        tree.find("f03000")
        assert len(read) == 2
        tree.find("f05000")
        assert len(read) == 2


def test_files_across_frames_seek_and_read_like_any_file(store: Store) -> None:
    content = random.Random(1).randbytes(20_000)
    digest = capture(store, layer({b"big": File(content)}, frame_bytes=1024))
    rng = random.Random(2)
    with Tree.open(store, digest) as tree, tree.open_file("big") as file:
        model = io.BytesIO(content)
        for _ in range(300):
            place, count = rng.randrange(21_000), rng.choice([0, 1, 7, 600, 3000, 25_000])
            assert file.seek(place) == model.seek(place)
            assert file.read(count) == model.read(count)
        assert file.seek(-5, io.SEEK_END) == 19_995
        assert file.read() == content[-5:]
        with pytest.raises((ValueError, OSError)):
            file.seek(-1)


SPARSE = [[0, 100], [5000, 3000], [20_000, 0], [100_000, 24]]


def sparse_blob(size: int = 200_000) -> tuple[Blob, bytes]:
    data = random.Random(3).randbytes(3124)
    content, used = bytearray(size), 0
    for offset, length in SPARSE:
        content[offset : offset + length] = data[used : used + length]
        used += length
    sha = hashlib.sha256(content).digest()
    rows: list[Any] = [
        (b"", "d", 0o755, 0, 0, 1, 0, b"", b"", 0, 0),
        (b"hole", "f", 0o644, 0, 0, 1, size, sha, b"", 0, 512, SPARSE),
    ]
    return pack(bytes(512) + content + bytes(1024), rows), bytes(content)


def test_a_sparse_file_reads_with_its_holes(store: Store) -> None:
    blob, content = sparse_blob()
    with Tree.open(store, capture(store, blob)) as tree:
        assert tree.read("hole") == content
        with tree.open_file("hole") as file:
            for place in (0, 50, 99, 100, 4999, 5000, 7999, 8000, 99_999, 100_020, 199_990):
                file.seek(place)
                assert file.read(5000) == content[place : place + 5000]


def test_a_sparse_file_of_eight_exabytes_is_a_lie_that_costs_nothing(store: Store) -> None:
    rows: list[Any] = [
        (b"", "d", 0o755, 0, 0, 1, 0, b"", b"", 0, 0),
        (b"hole", "f", 0o644, 0, 0, 1, 2**63 - 1, bytes(32), b"", 0, 0, []),
    ]
    with Tree.open(store, capture(store, pack(bytes(1024), rows))) as tree, pytest.raises(Corrupt, match="outside its frames"):
        tree.read("hole")


def test_a_file_over_the_limit_is_refused(tree: Tree) -> None:
    assert tree.read("bin/run", limit=5000)
    with pytest.raises(Oversize):
        tree.read("bin/run", limit=4999)


def test_content_that_is_not_what_its_sha256_says_is_corrupt_and_names_the_blob(store: Store) -> None:
    rows: list[Any] = [
        (b"", "d", 0o755, 0, 0, 1, 0, b"", b"", 0, 0),
        (b"empty", "f", 0o644, 0, 0, 1, 0, bytes(32), b"", 0, 0),
        (b"false", "f", 0o644, 0, 0, 1, 3000, bytes(32), b"", 0, 0),
    ]
    blob = pack(bytes(4096), rows)
    with Tree.open(store, capture(store, blob)) as tree:
        for path in ("false", "empty"):
            with pytest.raises(Corrupt, match="does not match its sha256") as caught:
                tree.read(path)
            assert caught.value.fields["digest"] == blob.digest
        with tree.open_file("false") as file, pytest.raises(Corrupt):
            while file.read(100):
                pass


def test_every_damaged_byte_of_a_layer_is_corrupt_or_harmless(store: Store) -> None:
    blob = layer({b"a": File(os.urandom(1500)), b"b": File(b"b" * 900), b"d": Dir(), b"d/c": File(b"c")})
    digest = capture(store, blob)

    def content() -> list[Any]:
        with Tree.open(store, digest) as tree:
            return [(entry, tree.read(entry.path) if entry.type == "file" else b"") for entry in tree.walk()]

    expected = content()
    for at in range(0, len(blob.data), 7):
        damage(store, blob.digest, at, flip=1 << at % 8)
        try:
            assert content() == expected
        except Corrupt as error:
            assert blob.digest in error.message
        damage(store, blob.digest, at, flip=1 << at % 8)
    assert content() == expected


def test_missing_altered_and_foreign_parts_are_corrupt_and_named(store: Store) -> None:
    blob = layer({b"a": File(b"1")})
    digest = capture(store, blob)
    damage(store, blob.digest, size=100)
    with pytest.raises(Corrupt, match=blob.digest):
        Tree.open(store, digest)
    store.blobs.path(blob.digest).unlink()
    with pytest.raises(Corrupt, match=blob.digest):
        Tree.open(store, digest)
    damage(store, digest, 10)
    with pytest.raises(Corrupt, match=digest):
        Tree.open(store, digest)
    with pytest.raises(Corrupt, match="missing"):
        Tree.open(store, "sha256:" + "0" * 64)
    with pytest.raises(InvalidParams):
        Tree.open(store, "../../etc/passwd")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"tar+zstd", b"tar+gzip"),
        (b'"digest":"sha256:', b'"digest":"sha512:'),
        (b'"digest":"sha256:', b'"digest":"../../x:'),
        (b'"size":', b'"size":1'),
        (b'"size":', b'"size":-'),
    ],
)
def test_a_manifest_that_lies_about_its_layer_is_corrupt(store: Store, old: bytes, new: bytes) -> None:
    digest = capture(store, layer({b"a": File(b"1")}))
    head, layers = store.blobs.read(digest).split(b'"layers"')
    changed, _ = store.blobs.put(head + b'"layers"' + layers.replace(old, new))
    assert changed != digest
    with pytest.raises(Corrupt):
        Tree.open(store, changed)


def test_an_entry_below_a_link_or_a_file_is_corrupt_when_walked(store: Store) -> None:
    for spec in ({b"a": Link(b"/etc"), b"a/passwd": File(b"x")}, {b"a": File(b"x"), b"a/b": File(b"x")}, {b"a/b": File(b"x")}):
        blob = layer(spec)
        with Tree.open(store, capture(store, blob)) as tree, pytest.raises(Corrupt, match="lies in no folder"):
            list(tree.walk())


def test_an_upper_layer_cannot_reach_through_a_link_of_a_lower_one(store: Store) -> None:
    layers = layer({b"a": Link(b"/etc")}), layer({b"a/passwd": File(b"x")})
    with Tree.open(store, capture(store, *layers)) as tree, pytest.raises(Corrupt, match="lies in no folder"):
        list(tree.walk())


def test_an_mtime_without_an_entry_is_corrupt(store: Store) -> None:
    for layers in ([layer({b"a": Mtime(5)})], [layer({b"a": File()}), layer({b"a": Mtime(5)}, [b"a"], whiteouts=[])]):
        with Tree.open(store, capture(store, *layers)) as tree:
            with pytest.raises(Corrupt):
                list(tree.walk())
            with pytest.raises(Corrupt):
                tree.find("a")


def test_a_capture_without_a_root_is_corrupt(store: Store) -> None:
    with Tree.open(store, capture(store, pack(bytes(1024), []))) as tree, pytest.raises(Corrupt, match="no root"):
        list(tree.walk())


def test_too_many_layers_are_refused(store: Store) -> None:
    with pytest.raises(Corrupt, match="129 layers"):
        Tree.open(store, capture(store, *[layer({})] * 129))


def test_names_for_messages_never_reach_a_terminal_raw() -> None:
    assert show(b"a\x1b[31m\n\xff\xc2\x9b") == "a\\x1b[31m\\n\\xff\\x9b"
    assert clean_path("./a/./b") == b"a/b"


def test_a_walk_of_sixty_thousand_entries_names_each_once(store: Store) -> None:
    spec: dict[bytes, Any] = {}
    for number in range(600):
        spec[b"d%03d" % number] = Dir()
        spec |= {b"d%03d/f%02d" % (number, j): File() for j in range(99)}
    upper: dict[bytes, Any] = {b"d%03d/f50" % number: File(b"new") for number in range(0, 600, 7)}
    digest = capture(store, layer(spec, frame_bytes=4 * 1024**2), layer(upper, [b"d001"]))
    with Tree.open(store, digest) as tree:
        paths = [entry.path for entry in tree.walk()]
        assert len(paths) == len(set(paths)) == 600 * 100 - 100
        assert len(tree.listdir("d002")) == 99


# -- against a model that is too simple to be wrong ---------------------------------------------------------------------

_names = st.sampled_from([b"a", b"b", b"a.x", b"a\x01", b"\xff"])
_paths = st.lists(_names, min_size=1, max_size=3).map(b"/".join)
_kinds = st.sampled_from(["file", "dir", "link", "mtime"])
_layer = st.tuples(st.dictionaries(_paths, _kinds, max_size=8), st.lists(_paths, max_size=3, unique=True))


def _below(path: bytes, folder: bytes) -> bool:
    return path.startswith(folder + b"/")


def simulate(
    layers: list[tuple[dict[bytes, str], list[bytes]]],
) -> tuple[dict[bytes, Any], list[tuple[dict[bytes, Any], list[bytes]]]]:
    """Apply `layers` to a dict; what cannot be applied is left out of the layer, so that an honest writer could have written it."""
    state: dict[bytes, Any] = {}
    honest: list[tuple[dict[bytes, Any], list[bytes]]] = []
    for number, (wanted, removals) in enumerate(layers):
        removed = [path for path in removals if path in state]
        for path in removed:
            state = {item: value for item, value in state.items() if item != path and not _below(item, path)}
        spec: dict[bytes, Any] = {}
        for path in sorted(wanted, key=sort_key):
            parent = path.rpartition(b"/")[0]
            if parent and not isinstance(state.get(parent), Dir):
                continue
            kind = wanted[path]
            if kind == "mtime":
                if path not in state or path in spec:
                    continue
                spec[path] = Mtime(NS + number)
                old = state[path]
                state[path] = type(old)(**{**vars(old), "mtime": NS + number})
                continue
            new = {"file": File(b"%d %b" % (number, path)), "dir": Dir(0o700 + number), "link": Link(b"to %d" % number)}[kind]
            spec[path] = state[path] = new
            if kind != "dir":
                state = {item: value for item, value in state.items() if not _below(item, path)}
        honest.append((spec, sorted(removed, key=sort_key)))
    return state, honest


@given(st.lists(_layer, min_size=1, max_size=5))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_pile_of_layers_merges_as_the_model_does(store: Store, layers: list[Any]) -> None:
    state, honest = simulate(layers)
    digest = capture(store, *[layer(spec, removed) for spec, removed in honest])
    with Tree.open(store, digest) as tree:
        walked = {os.fsencode(entry.path): entry for entry in tree.walk()}
        assert list(walked) == sorted(state, key=sort_key)
        for path, value in state.items():
            entry = walked[path]
            assert entry.mtime_ns == value.mtime
            if isinstance(value, File):
                assert tree.read(path) == value.content
            elif isinstance(value, Link):
                assert entry.link == os.fsdecode(value.target)
            else:
                assert entry.mode == value.mode
        everything = {path for spec, _ in honest for path in spec} | set(state)
        for path in everything:
            assert tree.exists(path) == (path in state)
            if path in state:
                assert tree.find(path) == walked[path]
        for folder in [b"", *(path for path, value in state.items() if isinstance(value, Dir))]:
            inside = [path for path in walked if not folder or _below(path, folder)]
            assert [os.fsencode(entry.path) for entry in tree.walk(folder)] == inside
            depth = len(folder) + 1 if folder else 0
            assert [os.fsencode(e.path) for e in tree.listdir(folder)] == [path for path in inside if b"/" not in path[depth:]]


def _raw_rows(draw: Any) -> list[Any]:
    rows = []
    for path in sorted(draw(st.sets(_paths, max_size=8)), key=sort_key):
        kind = draw(st.sampled_from("fdlhm"))
        link = draw(_paths) if kind in "lh" else b""
        rows.append((path, kind, 0o644, 0, 0, 1, 5 if kind in "fh" else 0, bytes(32) if kind in "fh" else b"", link, 0, 0))
    return [(b"", "d", 0o755, 0, 0, 1, 0, b"", b"", 0, 0), *rows]


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_hostile_pile_of_layers_raises_only_our_errors(store: Store, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 4))
    blobs = []
    for _ in range(count):
        removed = data.draw(st.lists(_paths, max_size=3, unique=True))
        blobs.append(pack(bytes(1024), _raw_rows(data.draw), removed))
    with Tree.open(store, capture(store, *blobs)) as tree:
        calls: list[Any] = [lambda: list(tree.walk()), lambda: tree.listdir("")]
        for path in data.draw(st.lists(_paths, max_size=5)):
            calls += [lambda p=path: tree.read(p), lambda p=path: list(tree.walk(p)), lambda p=path: tree.listdir(p)]
        for call in calls:
            try:
                call()
            except MothballError:
                continue


@pytest.mark.parametrize("whiteouts", [[], [b"a"]])
def test_a_folder_replaced_by_a_file_and_back_does_not_bring_old_content_back(store: Store, whiteouts: list[bytes]) -> None:
    layers = (
        layer({b"a": Dir(), b"a/old": File(b"old"), b"a/sub": Dir(), b"a/sub/x": File(b"x")}),
        layer({b"a": File(b"between")}, whiteouts, whiteouts=[]),
        layer({b"a": Dir(), b"a/new": File(b"new")}),
        layer({b"a": Mtime(NS + 9)}),
    )
    with Tree.open(store, capture(store, *layers)) as tree:
        assert [entry.path for entry in tree.walk()] == ["a", "a/new"]
        assert [entry.path for entry in tree.walk("a")] == ["a/new"]
        assert [entry.path for entry in tree.listdir("a")] == ["a/new"]
        assert tree.find("a").mtime_ns == NS + 9
        assert not tree.exists("a/old")
        assert not tree.exists("a/sub/x")


def test_a_folder_removed_and_made_again_is_empty_below(store: Store) -> None:
    layers = (
        layer({b"a": Dir(), b"a/old": File(b"old")}),
        layer({b"a": Dir(0o700), b"a/new": File(b"new")}, [b"a"]),
    )
    with Tree.open(store, capture(store, *layers)) as tree:
        assert [entry.path for entry in tree.walk()] == ["a", "a/new"]
        assert not tree.exists("a/old")


def _one_file(content: bytes, extents: list[list[int]]) -> Blob:
    rows: list[Any] = [
        (b"", "d", 0o755, 0, 0, 1, 0, b"", b"", 0, 0),
        (b"hole", "f", 0o644, 0, 0, 1, len(content), hashlib.sha256(content).digest(), b"", 0, 512, extents),
    ]
    return pack(bytes(512) + content + bytes(1024), rows)


def test_the_holes_of_a_sparse_file_cost_no_frames(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    blob = _one_file(bytes(100_000) + b"end", [[100_000, 3]])
    read: list[int] = []

    def counting(file: Any, toc: Any, number: int) -> bytes:
        read.append(number)
        return read_frame(file, toc, number)

    monkeypatch.setattr("mothball.store.read.read_frame", counting)
    with Tree.open(store, capture(store, blob)) as tree:
        assert tree.read("hole") == bytes(100_000) + b"end"
    assert len(read) == 1


def test_a_sparse_file_with_data_in_what_it_calls_holes_is_corrupt(store: Store) -> None:
    digest = capture(store, _one_file(b"x" * 5000, [[0, 100]]))
    with Tree.open(store, digest) as tree, pytest.raises(Corrupt, match="does not match its sha256"):
        tree.read("hole")
