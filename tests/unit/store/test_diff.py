"""What differs between two captures, beside a comparison that is too simple to be wrong."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mothball.errors import Corrupt, InvalidParams, NotFound
from mothball.store import Store
from mothball.store import diff as diff_module
from mothball.store import toc as toc_module
from mothball.store.diff import Change, DiffTotals, diff
from mothball.store.textdiff import TEXT_LIMIT, patch, quoted
from mothball.store.toc import sort_key
from mothball.store.tree import Entry, Tree
from tests.unit.store.build import NS, Dir, File, Hard, Link, Mtime, capture, layer, new_store
from tests.unit.store.test_tree import _layer as layers_of
from tests.unit.store.test_tree import simulate


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return new_store(tmp_path / "store")


BASE = {
    b"bin": Dir(),
    b"bin/run": File(b"#!/bin/sh\n", 0o755),
    b"docs": Dir(),
    b"docs/a": File(b"a"),
    b"docs/b": File(b"b"),
    b"docs/sub": Dir(),
    b"docs/sub/deep": File(b"deep"),
    b"docs-2": File(b"x"),
    b"link": Link(b"docs"),
    b"one": File(b"linked"),
    b"two": Hard(b"one"),
}
UPPER = {
    b"docs": Mtime(NS + 1),
    b"docs/a": File(b"A"),
    b"docs/c": File(b"c"),
    b"bin/run": File(b"#!/bin/sh\n", 0o700),
    b"link": File(b"no link"),
    b"one": File(b"linked", uid=7),
}


def facts(entry: Entry) -> tuple[Any, ...]:
    kind = "file" if entry.type == "hardlink" else entry.type
    content = entry.link if kind == "symlink" else (entry.size, entry.sha256 if entry.size else "")
    return kind, content, entry.mode, (entry.uid, entry.gid), entry.mtime_ns


def naive(a: Tree, b: Tree, prefix: str = "") -> dict[str, str]:
    """Path -> kind, by two dicts of everything."""

    def everything(tree: Tree) -> dict[str, tuple[Any, ...]]:
        found = {entry.path: facts(entry) for entry in [tree.find(""), *tree.walk()]}
        return {path: value for path, value in found.items() if path == prefix or not prefix or path.startswith(prefix + "/")}

    one, other, out = everything(a), everything(b), {}
    for path in {**one, **other}:
        if path not in one or path not in other:
            out[path] = "added" if path in other else "deleted"
        elif one[path] != other[path]:
            place = next(number for number in range(5) if one[path][number] != other[path][number])
            out[path] = ("type", "changed", "mode", "owner", "time")[place]
    return out


def kinds(changes: Any) -> dict[str, str]:
    found = list(changes)
    paths = [change.path for change in found]
    assert [os.fsencode(path) for path in paths] == sorted(map(os.fsencode, paths), key=sort_key)
    assert len(set(paths)) == len(paths)
    return {change.path: change.kind for change in found}


def test_two_generations_differ_in_what_the_upper_layer_says(store: Store) -> None:
    below = layer(BASE)
    first, second = capture(store, below), capture(store, below, layer(UPPER, [b"docs/b", b"docs/sub", b"link"]))
    with Tree.open(store, first) as a, Tree.open(store, second) as b:
        assert kinds(diff(a, b)) == {
            "bin/run": "mode", "docs": "time", "docs/a": "changed", "docs/b": "deleted", "docs/c": "added", "docs/sub": "deleted",
            "docs/sub/deep": "deleted", "link": "type", "one": "owner",
        }  # fmt: skip
        assert kinds(diff(a, b)) == naive(a, b)
        assert kinds(diff(b, a))["docs/sub/deep"] == "added"
        run = next(change for change in diff(a, b) if change.path == "bin/run")
        assert run == Change("bin/run", "mode", a.find("bin/run"), b.find("bin/run"), ("mode",))
        assert list(diff(a, a)) == []


@pytest.mark.parametrize("prefix", ["docs", "docs/sub", "docs/a", "docs/c", "bin", "one", "docs-2", "."])
def test_a_prefix_is_that_path_and_what_lies_below(store: Store, prefix: str) -> None:
    below = layer(BASE)
    first, second = capture(store, below), capture(store, below, layer(UPPER, [b"docs/b", b"docs/sub", b"link"]))
    with Tree.open(store, first) as a, Tree.open(store, second) as b:
        expected = naive(a, b, "" if prefix == "." else prefix)
        assert kinds(diff(a, b, prefix)) == expected


def test_a_path_that_neither_has_or_that_leads_out_is_an_error(store: Store) -> None:
    digest = capture(store, layer(BASE))
    with Tree.open(store, digest) as a, Tree.open(store, digest) as b:
        with pytest.raises(NotFound, match="not found in either capture: nowhere"):
            list(diff(a, b, "nowhere"))
        for path in ("../x", "/etc", "a//b", "a\0b"):
            with pytest.raises(InvalidParams):
                list(diff(a, b, path))


def test_totals_count_every_kind_and_the_bytes_of_files(store: Store) -> None:
    below = layer(BASE)
    first, second = capture(store, below), capture(store, below, layer(UPPER, [b"docs/b", b"docs/sub", b"link"]))
    totals = DiffTotals()
    with Tree.open(store, first) as a, Tree.open(store, second) as b:
        for change in diff(a, b):
            totals.count(change)
    # docs/a and docs/b and docs/sub/deep went (1 + 1 + 4), docs/a, docs/c and link came (1 + 1 + 7).
    assert totals == DiffTotals(added=1, deleted=3, changed=2, mode=1, owner=1, time=1, bytes_added=9, bytes_deleted=6)


def test_an_untouched_block_is_not_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    spec: dict[bytes, Any] = {b"f%05d" % number: File() for number in range(6000)}
    below = layer(spec, frame_bytes=1024**2)
    first, second = capture(store, below), capture(store, below, layer({b"f03000": File(b"new")}))
    read: list[tuple[str, int]] = []
    original = toc_module.Toc._raw

    def counting(self: Any, number: int) -> Any:
        read.append((self.name, number))
        return original(self, number)

    monkeypatch.setattr(toc_module.Toc, "_raw", counting)
    with Tree.open(store, first) as a, Tree.open(store, second) as b:
        assert kinds(diff(a, b)) == {"f03000": "changed"}
    assert {number for name, number in read if name == below.digest} == {0, 2}  # the root's and the file's


def test_a_lying_upper_layer_is_corrupt_as_in_a_walk(store: Store) -> None:
    below = layer(BASE)
    first = capture(store, below)
    for upper in (layer({b"one/x": File(b"x")}), layer({b"nowhere": Mtime(1)})):
        with Tree.open(store, first) as a, Tree.open(store, capture(store, below, upper)) as b, pytest.raises(Corrupt):
            list(diff(a, b))


@given(st.lists(layers_of, min_size=1, max_size=3), st.lists(layers_of, max_size=2), st.lists(layers_of, max_size=2), st.booleans())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_two_piles_of_layers_differ_as_two_dicts_do(
    store: Store, common: list[Any], mine: list[Any], yours: list[Any], squashed: bool
) -> None:
    captures, states = [], []
    for own in (mine, yours):
        state, honest = simulate([*common, *own])
        states.append(state)
        captures.append(capture(store, *[layer(spec, removed) for spec, removed in honest]))
    with Tree.open(store, captures[0]) as a, Tree.open(store, captures[1]) as b:
        if squashed:
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(diff_module, "_shared", lambda *_: 0)
                assert kinds(diff(a, b)) == naive(a, b)
        assert kinds(diff(a, b)) == naive(a, b)
        for path in {**states[0], **states[1]}:
            prefix = os.fsdecode(path)
            assert kinds(diff(a, b, path)) == naive(a, b, prefix)


# -- as text -----------------------------------------------------------------------------------------------------------


def text(store: Store, before: Any, after: Any) -> bytes:
    first, second = capture(store, layer(before)), capture(store, layer(after))
    with Tree.open(store, first) as a, Tree.open(store, second) as b:
        return b"".join(line for change in diff(a, b) for line in patch(change, a.read, b.read))


def test_a_patch_is_what_git_writes(store: Store) -> None:
    before = {b"a": File(b"one\ntwo\n"), b"gone": File(b"x"), b"mode": File(b"m"), b"same": File(b"s")}
    after = {b"a": File(b"one\n2\n"), b"mode": File(b"m", 0o755), b"same": File(b"s", mtime=1), b"empty": File()}
    assert text(store, before, after) == (
        b"diff --git a/a b/a\n--- a/a\n+++ b/a\n@@ -1,2 +1,2 @@\n one\n-two\n+2\n"
        b"diff --git a/empty b/empty\nnew file mode 100644\n"
        b"diff --git a/gone b/gone\ndeleted file mode 100644\n--- a/gone\n+++ /dev/null\n@@ -1 +0,0 @@\n-x\n"
        b"\\ No newline at end of file\n"
        b"diff --git a/mode b/mode\nold mode 100644\nnew mode 100755\n"
    )


def test_binary_and_large_files_are_only_said_to_differ(store: Store) -> None:
    large = b"line\n" * (TEXT_LIMIT // 5 + 1)
    before = {b"bin": File(b"a\0b"), b"large": File(large), b"dir": Dir(0o700)}
    found = text(store, before, {b"bin": File(b"a\0c"), b"large": File(large + b"x"), b"new": Dir()})
    assert b"Binary files a/bin and b/bin differ\n" in found
    assert b"Files a/large and b/large differ (262146 bytes" in found
    assert b"deleted folder dir\n" in found
    assert b"new folder new (mode 0755)\n" in found
    assert b"line\n" not in found.replace(b"line by line", b"")


def test_names_in_a_patch_are_quoted_as_git_quotes_them() -> None:
    assert quoted("a/plain name.txt") == b"a/plain name.txt"
    assert quoted('a/"\\\n\t\x01é\udcff') == b'"a/\\"\\\\\\n\\t\\001\\303\\251\\377"'


def test_a_link_that_became_a_file_is_two_patches(store: Store) -> None:
    found = text(store, {b"x": Link(b"to")}, {b"x": File(b"f\n")})
    assert found == (
        b"diff --git a/x b/x\ndeleted file mode 120000\n--- a/x\n+++ /dev/null\n@@ -1 +0,0 @@\n-to\n\\ No newline at end of file\n"
        b"diff --git a/x b/x\nnew file mode 100644\n--- /dev/null\n+++ b/x\n@@ -0,0 +1 @@\n+f\n"
    )
