"""What a capture's ref says of its workspace is what was true at the last capture, changed content or not."""

from __future__ import annotations

import os

import pytest

from mothball.errors import LeaseLost
from tests.unit.capture.harness import Yard


def test_the_record_that_was_given_stands_on_the_ref(yard: Yard) -> None:
    (yard.folder() / "a").write_text("a")
    yard.capture(record='{"title":"one"}')
    ref = yard.store.refs("ws").get()
    assert ref.get("record") == '{"title":"one"}'
    assert (ref.get("workspace"), ref.get("generation")) == ("ws", "1")


def test_an_unchanged_capture_brings_the_record_up_to_date_and_makes_no_generation(yard: Yard) -> None:
    """Pinned since the last capture: a registry that is lost now must come back pinned."""
    (yard.folder() / "a").write_text("a")
    first = yard.capture(record='{"pinned":false}')
    before = yard.store.refs("ws").get()
    again = yard.capture(record='{"pinned":true}')
    after = yard.store.refs("ws").get()
    assert (again.digest, again.generation, again.changed) == (first.digest, 1, False)
    assert after.get("record") == '{"pinned":true}'
    others = [{name: value for name, value in ref.annotations.items() if not name.endswith(".record")} for ref in (before, after)]
    assert others[0] == others[1], "job, generation and time are still those of the capture that made it"


def test_nothing_is_written_when_nothing_is_new_or_nothing_was_given(yard: Yard) -> None:
    """An index write costs a disk flush, and most captures find no change."""
    (yard.folder() / "a").write_text("a")
    yard.capture(record='{"title":"one"}')
    index = yard.store.refs("ws").folder / "index.json"
    before = index.stat().st_ino
    yard.capture(record='{"title":"one"}')
    yard.capture()
    assert index.stat().st_ino == before, "replaced by rename, so a new inode would be a write"
    assert yard.store.refs("ws").get().get("record") == '{"title":"one"}'


def test_a_record_is_not_updated_by_a_run_that_was_overtaken(yard: Yard) -> None:
    (yard.folder() / "a").write_text("a")
    yard.capture(record="{}", fence=5)

    def overtaken(name: str, _: object) -> None:
        if name == "walk":
            yard.store.refs("ws").take_fence(9, "newer")

    with pytest.raises(LeaseLost):
        yard.capture(record='{"title":"late"}', fence=6, checkpoint=overtaken)
    assert yard.store.refs("ws").get().get("record") == "{}"


def test_a_path_that_is_no_utf8_leaves_the_index_readable(yard: Yard) -> None:
    """A lone surrogate in index.json would make every ref of the workspace unreadable."""
    name = os.fsdecode(b"caf\xe9")
    folder = yard.folder(name)
    (folder / "a").write_text("a")
    yard.capture(path=folder, record='{"path":"caf\\udce9"}')
    assert yard.store.refs("ws").get().get("path").endswith("caf\\xe9")
