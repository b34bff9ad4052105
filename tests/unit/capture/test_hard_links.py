"""Hard links over generations: names come, go and part, and every name keeps its content."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from mothball.store.tree import Tree
from mothball.store.verify import verify
from tests.unit.capture.harness import OLD_NS, Yard, on_disk, settle
from tests.unit.capture.test_races import after_walk


def linked(yard: Yard, *names: str) -> Path:
    root = yard.folder()
    (root / names[0]).write_bytes(b"content of all names")
    for name in names[1:]:
        os.link(root / names[0], root / name)
    settle(root)
    os.utime(root, ns=(OLD_NS, OLD_NS))
    return root


def test_a_name_that_goes_and_comes_back_is_captured_again(yard: Yard) -> None:
    root = linked(yard, "a", "b")
    yard.capture()
    (root / "b").unlink()
    assert yard.facts(yard.capture()) == on_disk(root)
    os.link(root / "a", root / "b")
    back = yard.capture()
    assert yard.facts(back) == on_disk(root)
    assert (back.added, back.modified) == (1, 0)


def test_a_name_that_was_ignored_for_a_while_is_captured_again(yard: Yard) -> None:
    root = linked(yard, "a", "b")
    yard.capture()
    assert set(yard.facts(yard.capture(options={"ignore": ["b"]}))) == {"", "a"}
    assert yard.facts(yard.capture()) == on_disk(root)


@pytest.mark.parametrize("lost", [False, True])
def test_the_first_name_ignored_leaves_the_others_as_they_are(yard: Yard, lost: bool) -> None:
    root = linked(yard, "a", "b")
    yard.capture()
    second = yard.capture(options={"ignore": ["a"]})
    if lost:
        shutil.rmtree(yard.store.cache / "ws")
    third = yard.capture(options={"ignore": ["a"]})
    assert (third.digest, third.changed) == (second.digest, False)
    assert {path: facts for path, facts in on_disk(root).items() if path != "a"} == yard.facts(third)


def test_a_name_replaced_after_the_walk_takes_no_other_name_with_it(yard: Yard) -> None:
    """An editor renames a new file over `a`; `b` must keep the content it has on disk."""
    root = linked(yard, "a", "b", "c")

    def edit() -> None:
        (root / "new").write_bytes(b"NEW")
        (root / "new").rename(root / "a")

    result = yard.capture(checkpoint=after_walk(edit))
    facts, disk = yard.facts(result), on_disk(root)
    assert [facts[name][3] for name in "abc"] == [disk[name][3] for name in "abc"]
    assert verify(yard.store, "ws", level="content").problems == []


def test_a_first_name_that_vanishes_after_the_walk_takes_no_other_name_with_it(yard: Yard) -> None:
    root = linked(yard, "a", "b")
    yard.capture()
    os.utime(root / "a", ns=(OLD_NS, OLD_NS + 5))
    result = yard.capture(checkpoint=after_walk((root / "a").unlink))
    assert yard.omissions(result) == {"a": "vanished"}
    assert yard.facts(result)["b"] == on_disk(root)["b"]


def test_one_more_name_of_a_large_file_does_not_squash(yard: Yard) -> None:
    root = linked(yard, "a", "b")
    (root / "large").write_bytes(os.urandom(200_000))
    for number in range(10):
        os.link(root / "large", root / f"large{number}")
    yard.capture()
    os.link(root / "large", root / "one-more")
    result = yard.capture()
    assert (result.squashed, result.layers, result.added, result.modified) == (False, 2, 1, 0)
    assert yard.facts(result) == on_disk(root)


def test_a_new_file_under_the_name_of_a_gone_first_one_is_not_linked_to(yard: Yard) -> None:
    root = linked(yard, "a", "b")
    yard.capture()
    (root / "a").unlink()
    yard.capture()
    (root / "a").write_bytes(b"another file")
    result = yard.capture()
    with Tree.open(yard.store, result.digest) as tree:
        assert [tree.find(name).type for name in "ab"] == ["file", "file"]
    assert yard.facts(result) == on_disk(root)


def test_names_that_parted_with_equal_content_are_files_of_their_own(yard: Yard) -> None:
    root = linked(yard, "a", "b")
    yard.capture()
    data = (root / "b").read_bytes()
    (root / "b").unlink()
    (root / "b").write_bytes(data)
    with Tree.open(yard.store, yard.capture().digest) as tree:
        assert [tree.find(name).type for name in "ab"] == ["file", "file"]
