"""What a purge demands before it deletes: a capture of all there is, read back (design, section 7)."""

from __future__ import annotations

import mmap
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from mothball.errors import Busy, OperationFailed
from mothball.purge import Receipt
from mothball.purge.receipt import Gap, explain_gaps, gap_dicts
from mothball.store.tree import Tree
from tests.unit.purge.conftest import NOW, PurgeYard


def test_a_directory_that_a_verified_capture_holds_is_deleted_and_the_receipt_names_the_capture(yard: PurgeYard) -> None:
    before = {str(path.relative_to(yard.ws)): path.read_bytes() for path in yard.ws.rglob("*") if path.is_file()}
    receipt = yard.purge()
    assert not yard.ws.exists()
    assert os.listdir(yard.root) == []
    ref = yard.store.refs("ws").get()
    assert (receipt.digest, receipt.generation, receipt.directory, receipt.verified_at) == (ref.digest, 1, "deleted", NOW)
    assert (receipt.files, receipt.omitted, receipt.forced) == (3, {}, [])
    with Tree.open(yard.store, receipt.digest or "") as tree:
        assert {path: tree.read(path) for path in before if path != "link"} == {k: v for k, v in before.items() if k != "link"}


def test_a_directory_that_was_never_captured_stays(yard: PurgeYard) -> None:
    with yard.opened(workspace="another") as purge:
        known = purge.examine(content=True, now_ms=lambda: NOW)
    assert known is not None
    assert [gap.reason for gap in known.gaps] == ["no_capture"]
    assert known.verified_at is None
    assert yard.ws.is_dir()


@pytest.mark.parametrize(
    "change",
    ["grown", "new", "same_size_same_times", "mode", "link", "new_folder", "removed", "became_folder"],
)
def test_a_change_after_the_capture_puts_the_directory_back_untouched(yard: PurgeYard, change: str) -> None:
    a = yard.ws / "a.txt"

    def happen() -> None:
        if change == "grown":
            a.write_text("another content")
        elif change == "new":
            (yard.ws / "sub" / "late").write_text("x")
        elif change == "same_size_same_times":
            st = a.stat()
            a.write_bytes(a.read_bytes().replace(b"a", b"b"))
            os.utime(a, ns=(st.st_atime_ns, st.st_mtime_ns))
        elif change == "mode":
            a.chmod(0o600)
        elif change == "link":
            (yard.ws / "link").unlink()
            (yard.ws / "link").symlink_to("b.txt")
        elif change == "new_folder":
            (yard.ws / "empty").mkdir()
        elif change == "removed":
            a.unlink()
        else:
            a.unlink()
            a.mkdir()

    with pytest.raises(Busy, match="changed after it was captured"):
        yard.purge(between=happen)
    assert os.listdir(yard.root) == ["ws"]
    assert (yard.ws / "sub" / "b.txt").exists()
    yard.taken()
    assert yard.purge().generation == 2
    assert not yard.ws.exists()


def test_a_write_through_a_mapping_that_moves_no_time_is_found(yard: PurgeYard) -> None:
    """The stat index of captures would take the file for unchanged; the last look reads it."""
    a = yard.ws / "a.txt"
    st = a.stat()
    with a.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        view[:5] = b"XXXXX"
    os.utime(a, ns=(st.st_atime_ns, st.st_mtime_ns))
    with yard.opened() as purge:
        quick = purge.examine(content=False, now_ms=lambda: NOW)
        exact = purge.examine(content=True, now_ms=lambda: NOW)
    assert quick is not None
    assert exact is not None
    assert (quick.changed, [gap.path for gap in exact.changed]) == ([], ["a.txt"])
    with pytest.raises(Busy, match=r"a\.txt"):
        yard.purge()
    assert a.read_bytes().startswith(b"XXXXX")


def test_what_no_capture_takes_refuses_by_name(yard: PurgeYard) -> None:
    os.mkfifo(yard.ws / "pipe")
    (yard.ws / "big").write_bytes(b"b" * 5000)
    (yard.ws / ".wh.odd").write_text("x")
    sock = socket.socket(socket.AF_UNIX)
    path = yard.ws / "s"
    os.mknod(path, 0o140600)
    sock.close()
    yard.options = {"max_file_bytes": 4096}
    yard.taken()
    found = yard.missing()
    assert [text.partition(":")[0] for text in found] == [".wh.odd", "big", "pipe", "s"]
    assert "too large" in found[1]
    assert "fifo" in found[2]
    with pytest.raises(Busy):  # whoever would go on all the same finds the same at the last look
        yard.purge()
    assert path.exists()


def test_what_the_workspaces_own_rules_leave_out_goes_and_is_counted(yard: PurgeYard) -> None:
    (yard.ws / ".mothballignore").write_text("node_modules/\n*.log\n")
    (yard.ws / "node_modules" / "x").mkdir(parents=True)
    (yard.ws / "node_modules" / "x" / "index.js").write_text("x")
    (yard.ws / "build.log").write_text("x")
    yard.taken()
    assert yard.missing() == []
    assert yard.purge().omitted == {"ignored": 2}
    assert not yard.ws.exists()


@pytest.mark.parametrize("what", ["layer", "config", "manifest", "missing"])
def test_a_capture_that_cannot_be_read_back_holds_nothing(yard: PurgeYard, what: str) -> None:
    digest = yard.store.refs("ws").get().digest
    with Tree.open(yard.store, digest) as tree:
        named = {"layer": tree.manifest.layers[0].digest, "config": tree.manifest.config.digest, "manifest": digest}
    blob = yard.store.blobs.path(named.get(what, named["layer"]))
    data = bytearray(blob.read_bytes())
    if what == "missing":
        blob.unlink()
    else:
        data[len(data) // 2] ^= 0x40
        blob.write_bytes(data)
    with yard.opened() as purge:
        known = purge.examine(content=True, now_ms=lambda: NOW)
    assert known is not None
    assert [gap.reason for gap in known.gaps] == ["damaged"]
    assert known.verified_at is None


def test_force_deletes_what_is_missing_and_the_receipt_says_what_that_was(yard: PurgeYard) -> None:
    os.mkfifo(yard.ws / "pipe")
    (yard.ws / "late").write_text("never captured")
    said: list[Receipt] = []
    receipt = yard.purge(force=True, decided=said.append)
    assert not yard.ws.exists()
    assert {(each["path"], each["reason"]) for each in receipt.forced} >= {("pipe", "special"), ("late", "not_captured")}
    assert said == [receipt]


def test_force_needs_no_capture_at_all(yard: PurgeYard) -> None:
    receipt = yard.purge(force=True, workspace="another")
    assert not yard.ws.exists()
    assert (receipt.digest, receipt.verified_at, receipt.forced[0]["reason"]) == (None, None, "no_capture")


def test_hard_links_inside_and_outside_are_only_names(yard: PurgeYard) -> None:
    outside = yard.base / "outside"
    os.link(yard.ws / "a.txt", outside)
    os.link(yard.ws / "a.txt", yard.ws / "sub" / "again")
    content = outside.read_bytes()
    yard.taken()
    assert yard.purge().files == 4
    assert outside.read_bytes() == content
    assert outside.stat().st_nlink == 1


def test_names_that_are_no_text_deep_folders_and_odd_modes_go_too(yard: PurgeYard) -> None:
    deep = yard.ws
    for _ in range(200):
        deep = deep / "d"
    deep.mkdir(parents=True)
    (deep / "f").write_text("x")
    Path(os.fsdecode(os.fsencode(yard.ws) + b"/\xff\xfe")).write_text("x")
    (yard.ws / "sub" / "deep").chmod(0o500)
    (yard.ws / "sub").chmod(0o555)
    yard.taken()
    yard.purge()
    assert os.listdir(yard.root) == []


def test_nothing_is_written_by_an_examination(yard: PurgeYard) -> None:
    (yard.ws / "late").write_text("x")
    before = sorted((str(path), path.lstat().st_mtime_ns) for path in yard.base.rglob("*"))
    with yard.opened() as purge:
        known = purge.examine(content=True, now_ms=lambda: NOW)
    assert known is not None
    assert [gap.path for gap in known.changed] == ["", "late"] or [gap.path for gap in known.changed] == ["late"]
    assert sorted((str(path), path.lstat().st_mtime_ns) for path in yard.base.rglob("*")) == before


def test_a_directory_that_is_gone_is_no_examination(yard: PurgeYard) -> None:
    yard.ws.rename(yard.base / "moved")
    with yard.opened() as purge:
        assert purge.recover() is None
        assert purge.examine(content=True, now_ms=lambda: NOW) is None
    with yard.opened(path=str(yard.root / "no" / "such" / "parent")) as purge:
        assert purge.recover() is None
        assert purge.examine(content=True, now_ms=lambda: NOW) is None


def test_what_the_last_word_raises_puts_the_directory_back(yard: PurgeYard) -> None:
    def refuse(_: Receipt) -> None:
        assert not yard.ws.exists()
        raise OperationFailed(reason="it was touched")

    with pytest.raises(OperationFailed, match="touched"):
        yard.purge(decided=refuse)
    assert os.listdir(yard.root) == ["ws"]
    assert (yard.ws / "sub" / "deep" / "c.txt").exists()


def test_gaps_are_told_in_one_bounded_text() -> None:
    gaps = [Gap(f"f{number}", "too_large", "is not captured: too large") for number in range(150)]
    assert explain_gaps(gaps).endswith("f9: is not captured: too large; and 140 more")
    assert explain_gaps([Gap("", "no_capture")]) == "no capture"
    assert len(gap_dicts(gaps)) == 100
    long: Any = gap_dicts([Gap("x" * 4000, "special")] * 50)
    assert len(long) < 10
