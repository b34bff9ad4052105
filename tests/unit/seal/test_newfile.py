"""A file that appears whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from mothball.errors import AlreadyExists, InvalidParams, NoSpace, OperationFailed
from mothball.seal import newfile
from mothball.seal.newfile import HIDDEN, check_new, new_file


@pytest.fixture(params=["unnamed", "hidden"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """On a file system with files without a name, and on one without."""
    if request.param == "hidden":
        monkeypatch.setattr(newfile, "_unnamed", lambda _: None)
    return str(request.param)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_this_machine_has_files_without_a_name(tmp_path: Path) -> None:
    """Or else the tests of the better way test nothing."""
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        unnamed = newfile._unnamed(fd)
        assert unnamed is not None
        os.close(unnamed)
    finally:
        os.close(fd)


def test_it_appears_when_the_block_ends_with_mode_0600(tmp_path: Path, way: str) -> None:
    before = os.umask(0)
    try:
        with new_file(tmp_path / "out") as out:
            out.write(b"half")
            out.flush()
            assert "out" not in names(tmp_path)
            assert (names(tmp_path) == []) == (way == "unnamed")
            out.write(b" and half")
    finally:
        os.umask(before)
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out").read_bytes() == b"half and half"
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o600


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(143)])
def test_nothing_is_left_when_the_block_fails(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), new_file(tmp_path / "out") as out:
        out.write(b"secret")
        raise error
    assert names(tmp_path) == []


@pytest.mark.usefixtures("way")
def test_what_is_there_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"mine")
    with pytest.raises(AlreadyExists, match="is not replaced"), new_file(tmp_path / "out"):
        pytest.fail("it began to write")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(AlreadyExists), new_file(tmp_path / "link"):
        pytest.fail("it began to write")
    assert names(tmp_path) == ["link", "out"]
    assert (tmp_path / "out").read_bytes() == b"mine"


@pytest.mark.usefixtures("way")
def test_what_somebody_puts_there_meanwhile_is_never_replaced(tmp_path: Path) -> None:
    with pytest.raises(AlreadyExists), new_file(tmp_path / "out") as out:
        out.write(b"ours")
        (tmp_path / "out").write_bytes(b"theirs")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out").read_bytes() == b"theirs"


@pytest.mark.usefixtures("way")
def test_a_full_disk_is_no_space_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(NoSpace), new_file(tmp_path / "out"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert names(tmp_path) == []


def test_another_error_of_the_disk_says_where(tmp_path: Path) -> None:
    with pytest.raises(OperationFailed, match="out was not written: Input/output error"), new_file(tmp_path / "out"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_place_that_cannot_be_is_refused_first(tmp_path: Path) -> None:
    for place in (tmp_path / "none" / "out", Path("/"), tmp_path / ".."):
        with pytest.raises((InvalidParams, AlreadyExists)):
            check_new(place)


def test_the_folder_may_be_reached_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "way").symlink_to("real")
    with new_file(tmp_path / "way" / "out") as out:
        out.write(b"x")
    assert (tmp_path / "real" / "out").read_bytes() == b"x"


def test_hidden_files_of_killed_writers_go_with_the_next_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(newfile, "_unnamed", lambda _: None)
    stale, other = tmp_path / f".out{HIDDEN}{'0' * 16}", tmp_path / f".another{HIDDEN}{'0' * 16}"
    lookalike = tmp_path / f".out{HIDDEN}notes"
    for path in (stale, other, lookalike):
        path.write_bytes(b"half a secret")
    with new_file(tmp_path / "out") as first, new_file(tmp_path / "out2") as second:
        first.write(b"1")
        second.write(b"2")
        assert not stale.exists()
    assert names(tmp_path) == sorted([other.name, lookalike.name, "out", "out2"])


def test_a_writer_that_lives_keeps_its_hidden_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(newfile, "_unnamed", lambda _: None)
    with new_file(tmp_path / "out") as first:
        first.write(b"first")
        with new_file(tmp_path / "out") as second:
            second.write(b"second")
        (tmp_path / "out").unlink()
    assert (tmp_path / "out").read_bytes() == b"first"


@pytest.mark.parametrize("refusal", [errno.EPERM, errno.EOPNOTSUPP])
def test_a_file_system_without_hard_links_gets_it_by_renaming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: int
) -> None:
    monkeypatch.setattr(newfile, "_unnamed", lambda _: None)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(os, "link", refuse)
    with new_file(tmp_path / "out") as out:
        out.write(b"x")
    assert names(tmp_path) == ["out"]
    with pytest.raises(AlreadyExists), new_file(tmp_path / "two") as out:
        (tmp_path / "two").write_bytes(b"theirs")
    assert (tmp_path / "two").read_bytes() == b"theirs"


def test_a_name_of_255_bytes_is_possible(tmp_path: Path, way: str) -> None:
    name = "n" * 255
    with new_file(tmp_path / name) as out:
        out.write(way.encode())
    assert names(tmp_path) == [name]


def test_a_kernel_that_knows_no_unnamed_files_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def without(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", without)
    with new_file(tmp_path / "out") as out:
        assert names(tmp_path)[0].startswith(f".out{HIDDEN}")
        out.write(b"x")
    assert names(tmp_path) == ["out"]
