"""The demo's copy: real, complete, and never linked to the original."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mothball.errors import InvalidParams, NoSpace, SourceMissing
from workers import demo_tree
from workers.demo_tree import Source, check_room, copy_tree, edit, ensure_files, pick, remove_tree, sources


def nothing() -> None:
    return None


def make(root: Path) -> Path:
    (root / "deep" / "er").mkdir(parents=True)
    (root / "deep" / "er" / "a.txt").write_text("a")
    (root / "deep" / "pair").hardlink_to(root / "deep" / "er" / "a.txt")
    (root / "link").symlink_to("deep")
    (root / os.fsdecode(b"\xff\n")).write_bytes(b"odd")
    os.mkfifo(root / "pipe")
    (root / "deep" / "er" / "a.txt").chmod(0o640)
    os.utime(root / "deep" / "er" / "a.txt", ns=(1, 1_600_000_000_123_456_789))
    os.utime(root / "deep" / "er", ns=(1, 1_500_000_000_000_000_001))
    (root / "deep" / "er").chmod(0o555)
    return root


def test_a_copy_has_names_contents_modes_and_times_and_no_link_to_the_original(tmp_path: Path) -> None:
    source, target = make(tmp_path / "source"), tmp_path / "target"
    done = copy_tree(source, target, nothing)
    assert (done.files, done.skipped) == (3, 1)
    copied = target / "deep" / "er" / "a.txt"
    assert copied.read_text() == "a"
    assert copied.stat().st_mode & 0o777 == 0o640
    assert copied.stat().st_mtime_ns == 1_600_000_000_123_456_789
    assert (target / "deep" / "er").stat().st_mtime_ns == 1_500_000_000_000_000_001
    assert (target / "deep" / "er").stat().st_mode & 0o777 == 0o555
    assert (target / "link").readlink() == Path("deep")
    assert (target / os.fsdecode(b"\xff\n")).read_bytes() == b"odd"
    assert not (target / "pipe").exists()
    assert copied.stat().st_nlink == 1
    assert copied.stat().st_ino != (source / "deep" / "er" / "a.txt").stat().st_ino
    remove_tree(target)
    assert not target.exists()


def test_an_edit_of_the_copy_never_reaches_the_original(tmp_path: Path) -> None:
    source, target = make(tmp_path / "source"), tmp_path / "target"
    copy_tree(source, target, nothing)
    (target / "deep" / "pair").chmod(0o400)
    edit(target / "deep" / "pair", "more")
    assert (target / "deep" / "pair").read_text() == "a\nmore\n"
    assert (target / "deep" / "pair").stat().st_mode & 0o777 == 0o400
    assert (source / "deep" / "pair").read_text() == (target / "deep" / "er" / "a.txt").read_text() == "a"


def test_a_signal_stops_the_copy(tmp_path: Path) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copy_tree(make(tmp_path / "source"), tmp_path / "target", stop)


@pytest.mark.parametrize("there", [0, 1, 3, 4, 9])
def test_a_small_tree_gets_just_the_files_that_the_demo_needs(tmp_path: Path, there: int) -> None:
    for number in range(there):
        (tmp_path / f"{number}").write_text("x")
    assert ensure_files(tmp_path) == max(4 - there, 0)
    assert len(list(tmp_path.iterdir())) >= 4


def test_files_to_edit_are_plain_small_texts_and_always_the_same(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number:02}.txt").write_text("text")
    (tmp_path / "binary").write_bytes(b"\0" * 10)
    (tmp_path / "empty").touch()
    (tmp_path / "two").hardlink_to(tmp_path / "00.txt")
    (tmp_path / "link").symlink_to("01.txt")
    names = sorted(path.name for path in tmp_path.iterdir())
    chosen = pick(tmp_path, names, 4)
    assert len(set(chosen)) == 4
    assert chosen == pick(tmp_path, names, 4)
    assert set(chosen).isdisjoint({"binary", "empty", "two", "00.txt", "link"})
    with pytest.raises(InvalidParams):
        pick(tmp_path, ["empty", "link"], 4)


def test_only_a_directory_can_be_shown(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for bad in ("file", "missing"):
        with pytest.raises(SourceMissing):
            sources(tmp_path / bad)
    assert sources(tmp_path) == [Source(tmp_path)]


def test_without_a_path_it_is_the_checkout_with_its_environment() -> None:
    found = sources(None)
    assert (found[0].path / "pyproject.toml").is_file()
    assert len(found) == 1 or found[1].below == ".venv"


def test_a_tree_around_the_temporary_folder_and_a_full_disk_are_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tmp_path / "tmp"
    inner.mkdir()
    with pytest.raises(InvalidParams, match="TMPDIR"):
        check_room([Source(tmp_path)], inner)
    other = tmp_path / "other"
    other.mkdir()
    check_room([Source(other)], inner)
    monkeypatch.setattr(demo_tree, "SPACE_EXTRA_BYTES", 1 << 60)
    with pytest.raises(NoSpace, match="TMPDIR"):
        check_room([Source(other)], inner)
