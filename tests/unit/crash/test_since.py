"""The blame window: what changed since the last good state, bounded in size and time, and without secrets."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from mothball.crash.since import MOST_CHANGES, PATCH_BYTES, baseline, changes
from mothball.errors import NotFound
from mothball.redact.engine import Redactor
from mothball.redact.rules import Rules
from mothball.store import Ref, Store
from tests.unit.store.build import Dir, File, Link, capture, layer, new_store

TOKEN = b"ghp_" + b"A1b2C3d4E5" * 3 + b"f6G7h8"
KEY_LINES = [b"MIIEvgIBADANBgkqhkiG9w0BAQEFAASCBKgwggSkAgEAAoIBAQC7%03d" % number for number in range(20)]
KEY = b"-----BEGIN PRIVATE KEY-----\n" + b"\n".join(KEY_LINES) + b"\n-----END PRIVATE KEY-----\n"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return new_store(tmp_path / "store")


def held(store: Store, before: dict[bytes, Any], after: dict[bytes, Any], redactor: Redactor | None = None) -> dict[str, Any]:
    old, new = capture(store, layer(before)), capture(store, layer(after))
    return changes(store, Ref("snap-3", old, 0), new, redactor=redactor)


def test_what_was_added_changed_and_deleted_is_listed_with_a_patch(store: Store) -> None:
    found = held(
        store,
        {b"a": File(b"one\ntwo\n"), b"gone": File(b"x\n"), b"same": File(b"=")},
        {b"a": File(b"one\n2\n"), b"new": File(b"n\n"), b"same": File(b"=")},
    )
    assert [(each["path"], each["kind"]) for each in found["changes"]] == [("a", "changed"), ("gone", "deleted"), ("new", "added")]
    assert (found["ref"], found["totals"]["added"], found["totals"]["changed"], found["totals"]["deleted"]) == ("snap-3", 1, 1, 1)
    assert "--- a/a\n+++ b/a\n@@ -1,2 +1,2 @@\n one\n-two\n+2\n" in found["patch"]
    assert found["cut"] == []


def test_secrets_are_out_of_the_patch_before_its_lines_begin_with_a_plus(store: Store) -> None:
    redactor = Redactor(b"k" * 32, Rules.default())
    found = held(
        store,
        {b"id_rsa": File(b"old\n"), b"conf": File(b"a\n")},
        {b"id_rsa": File(KEY), b"conf": File(b"a\nurl = https://x:%s@example.org\n" % TOKEN)},
        redactor,
    )
    assert TOKEN.decode() not in found["patch"]
    assert not any(line.decode() in found["patch"] for line in KEY_LINES)
    assert found["patch"].count("[redacted:") >= 2
    assert redactor.counts.total() >= 2


def test_a_thousand_changes_are_listed_and_all_are_counted(store: Store) -> None:
    found = held(store, {}, {b"f%05d" % number: File(b"x\n") for number in range(MOST_CHANGES + 5)})
    assert len(found["changes"]) == MOST_CHANGES
    assert found["totals"]["added"] == MOST_CHANGES + 5
    assert "5 changes are not listed" in found["cut"]
    assert len(found["patch"].encode()) <= PATCH_BYTES
    assert any("because the patch has at most" in line for line in found["cut"])


def test_large_and_binary_files_are_said_and_not_shown(store: Store) -> None:
    found = held(store, {b"big": File(b"a\n")}, {b"big": File(b"b" * 65_537), b"bin": File(b"\0\1\2")})
    assert "bbb" not in found["patch"]
    assert found["cut"] == ["1 changes are not in the patch, of files over 65536 bytes"]
    assert "Binary files /dev/null and b/bin differ" in found["patch"]


def test_files_made_to_be_slow_to_compare_are_not_compared(store: Store) -> None:
    # Each line stands once in a hundred: too rare to be noise to difflib, and common enough to make it quadratic and worse.
    one = b"".join(b"%d\n" % (number % 190) for number in range(16_000))
    other = b"".join(b"%d\n" % (number * 7 % 190) for number in range(16_000))
    started = time.monotonic()
    found = held(store, {b"slow": File(one)}, {b"slow": File(other)})
    assert time.monotonic() - started < 5
    assert found["cut"] == ["1 changes are not in the patch, of files that differ too much to be compared line by line"]


def test_an_edit_in_the_middle_of_a_long_file_is_shown(store: Store) -> None:
    lines = [b"    line %d of it {\n" % (number % 50) for number in range(2500)]
    edited = [*lines[:1200], b"here\n", *lines[1200:]]
    found = held(store, {b"long": File(b"".join(lines))}, {b"long": File(b"".join(edited))})
    assert "+here\n" in found["patch"]


def test_the_time_of_a_folder_is_counted_and_not_listed(store: Store) -> None:
    found = held(store, {b"d": Dir(mtime=1), b"f": File(b"x", mtime=1)}, {b"d": Dir(mtime=2), b"f": File(b"x", mtime=2)})
    assert [(each["path"], each["kind"]) for each in found["changes"]] == [("f", "time")]
    assert found["totals"]["time"] == 2


def test_a_source_file_that_was_edited_at_both_ends_is_shown(store: Store) -> None:
    lines = [b"" if number % 6 == 0 else b"    }" if number % 6 == 3 else b"    call(%d)" % number for number in range(2000)]
    edited = [b"begin", *lines, b"end"]
    found = held(store, {b"long": File(b"\n".join(lines))}, {b"long": File(b"\n".join(edited))})
    assert "+begin\n" in found["patch"]
    assert "+end\n" in found["patch"]


def test_links_names_and_types_survive(store: Store) -> None:
    found = held(
        store, {b"x": File(b"f\n"), b"d": Dir()}, {b"x": Link(b"/etc/shadow"), b"d": Dir(0o700), b"\xff\x1b": File(b"n\n")}
    )
    kinds = {each["path"]: each["kind"] for each in found["changes"]}
    assert kinds == {"x": "type", "d": "mode", "\udcff\x1b": "added"}
    assert "+/etc/shadow" in found["patch"]


def test_a_baseline_that_is_damaged_is_said_and_costs_nothing_else(store: Store) -> None:
    new = capture(store, layer({b"a": File(b"a")}))
    found = changes(store, Ref("snap-1", "sha256:" + "0" * 64, 0), new)
    assert found["error"]
    assert found["totals"] is None
    assert found["patch"] == ""


def test_the_baseline_is_what_was_asked_for_else_the_newest_snapshot_else_the_generation_before(store: Store) -> None:
    one, two, three = (capture(store, layer({b"a": File(b"%d" % number)})) for number in range(3))
    refs = store.refs("w")
    refs.prepare()
    refs.take_fence(1, "job")
    assert baseline(refs, digest=three) is None
    assert baseline(refs, digest=three, before=three) is None
    found = baseline(refs, digest=three, before=two)
    assert found is not None
    assert (found.name, found.digest) == ("", two)
    refs.publish("snap-9", one, 1, {}, fence=1, job="job")
    refs.publish("snap-10", two, 1, {}, fence=1, job="job")
    refs.publish("snap-11", three, 1, {}, fence=1, job="job")
    newest = baseline(refs, digest=three, before=one)
    assert newest is not None
    assert newest.name == "snap-10"  # the newest one is what crashed
    asked = baseline(refs, digest=three, since="snap-9")
    assert asked is not None
    assert asked.digest == one
    with pytest.raises(NotFound, match="snap-77"):
        baseline(refs, digest=three, since="snap-77")
