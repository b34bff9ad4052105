"""A bundle as the two parts of a .stim and back, and archives that are not one."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mothball.errors import Corrupt, InvalidParams, MothballError, OperationFailed, Oversize, SealError
from mothball.package import stim_parts
from mothball.package.stim_parts import parts_of_folder, parts_of_tar, write_bundle_tar
from tests.support import require_tool

LIMIT = 64 * 1024**2
CONFIG = b'{"ociVersion":"1.0.2"}'
NOW = 1_700_000_000


def member(name: str, data: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.mtime = len(data), NOW
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def tar_of(*members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def listed(tar: bytes) -> list[tuple[str, bytes, int, str]]:
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        assert not archive.pax_headers
        return [(each.name, each.type, each.mode, each.linkname or _content(archive, each)) for each in archive.getmembers()]


def _content(archive: tarfile.TarFile, each: tarfile.TarInfo) -> str:
    file = archive.extractfile(each) if each.isreg() else None
    return "" if file is None else file.read().decode("latin-1")[:40]


FOLDER = {"type": tarfile.DIRTYPE, "mode": 0o755}
BUNDLE = (
    member("config.json", CONFIG),
    member("report.json", b"{}"),
    member("rootfs", **FOLDER),
    member("rootfs/proc", type=tarfile.DIRTYPE, mode=0o555),
    member("rootfs/workspace", **FOLDER),
    member("rootfs/workspace/" + "d" * 120 + "/caf\u00e9", b"long"),
    member("rootfs/workspace/link", type=tarfile.SYMTYPE, linkname="/etc/shadow", mode=0o777),
    member("rootfs/workspace/run.sh", b"#!/bin/sh\n", mode=0o755),
    member("rootfs/workspace/second", type=tarfile.LNKTYPE, linkname="rootfs/workspace/run.sh"),
)


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_b125_the_rootfs_is_a_tar_without_its_prefix(form: int) -> None:
    parts = parts_of_tar(io.BytesIO(tar_of(*BUNDLE, form=form)), "x.tar", LIMIT)
    assert parts.config == CONFIG
    assert parts.left_out == ("report.json",)
    assert listed(parts.rootfs) == [
        ("proc", tarfile.DIRTYPE, 0o555, ""),
        ("workspace", tarfile.DIRTYPE, 0o755, ""),
        ("workspace/" + "d" * 120 + "/caf\u00e9", tarfile.REGTYPE, 0o644, "long"),
        ("workspace/link", tarfile.SYMTYPE, 0o777, "/etc/shadow"),
        ("workspace/run.sh", tarfile.REGTYPE, 0o755, "#!/bin/sh\n"),
        # The reference system reads regular members only and would lose a hard link.
        ("workspace/second", tarfile.REGTYPE, 0o755, "#!/bin/sh\n"),
    ]


def test_b113_back_to_a_tar_with_config_first_and_sorted_names() -> None:
    parts = parts_of_tar(io.BytesIO(tar_of(*BUNDLE)), "x.tar", LIMIT)
    out = io.BytesIO()
    assert write_bundle_tar(out, parts.config, parts.rootfs) == 9
    names = [name for name, *_ in listed(out.getvalue())]
    assert names == [
        "config.json", "rootfs", "rootfs/proc", "rootfs/workspace", "rootfs/workspace/" + "d" * 120,
        "rootfs/workspace/" + "d" * 120 + "/caf\u00e9", "rootfs/workspace/link", "rootfs/workspace/run.sh",
        "rootfs/workspace/second",
    ]  # fmt: skip
    assert listed(out.getvalue())[0][2] == 0o600


def test_b113_a_bundle_that_went_through_a_stim_twice_has_the_same_bytes() -> None:
    first = parts_of_tar(io.BytesIO(tar_of(*BUNDLE)), "x.tar", LIMIT)
    one, two = io.BytesIO(), io.BytesIO()
    write_bundle_tar(one, first.config, first.rootfs)
    one.seek(0)
    second = parts_of_tar(one, "y.tar", LIMIT)
    write_bundle_tar(two, second.config, second.rootfs)
    assert one.getvalue() == two.getvalue()


def test_b103_an_empty_rootfs_is_two_blocks_of_zeros() -> None:
    parts = parts_of_tar(io.BytesIO(tar_of(member("config.json", CONFIG), member("rootfs", **FOLDER))), "x.tar", LIMIT)
    assert parts.rootfs == bytes(1024)
    out = io.BytesIO()
    assert write_bundle_tar(out, CONFIG, bytes(1024)) == 2
    assert [name for name, *_ in listed(out.getvalue())] == ["config.json", "rootfs"]


def test_what_the_reference_system_writes_is_read() -> None:
    """Regular members with mode 0600 in any order, no folders."""
    rootfs = tar_of(member("z/a.py", b"1", mode=0o600), member("b.txt", b"2", mode=0o600), form=tarfile.USTAR_FORMAT)
    out = io.BytesIO()
    write_bundle_tar(out, CONFIG, rootfs)
    assert [(name, mode) for name, _, mode, _ in listed(out.getvalue())] == [
        ("config.json", 0o600), ("rootfs", 0o755), ("rootfs/b.txt", 0o600), ("rootfs/z", 0o755), ("rootfs/z/a.py", 0o600),
    ]  # fmt: skip


def test_a_folder_and_the_tar_gnu_tar_makes_of_it_have_the_same_parts(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    (bundle / "rootfs" / "workspace" / "sub").mkdir(parents=True)
    (bundle / "config.json").write_bytes(CONFIG)
    (bundle / "rootfs" / "workspace" / "run").write_bytes(b"#!/bin/sh\n")
    (bundle / "rootfs" / "workspace" / "run").chmod(0o751)
    (bundle / "rootfs" / "workspace" / "sub" / "to").symlink_to("../../../../etc/shadow")
    os.link(bundle / "rootfs" / "workspace" / "run", bundle / "rootfs" / "workspace" / "same")
    os.mkfifo(bundle / "rootfs" / "fifo")
    parts = parts_of_folder(bundle, LIMIT)
    assert parts.left_out == ("rootfs/fifo",)
    (bundle / "rootfs" / "fifo").unlink()
    os.utime(bundle / "rootfs", (NOW, NOW))
    packed = subprocess.run(
        [require_tool("tar"), "--sort=name", "-C", bundle, "-cf", "-", "config.json", "rootfs"], check=True, stdout=subprocess.PIPE
    ).stdout
    assert parts_of_tar(io.BytesIO(packed), "x.tar", LIMIT).rootfs == parts_of_folder(bundle, LIMIT).rootfs == parts.rootfs


@pytest.mark.parametrize("name", ["config.json", "rootfs"])
def test_a_link_in_place_of_a_part_is_not_followed(tmp_path: Path, name: str) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (tmp_path / "rootfs").mkdir()
    (tmp_path / "config.json").write_bytes(CONFIG)
    for each in ("config.json", "rootfs"):
        if each == name:
            (bundle / each).symlink_to(tmp_path / each)
        else:
            (tmp_path / each).rename(bundle / each)
    with pytest.raises(InvalidParams, match="cannot be read"):
        parts_of_folder(bundle, LIMIT)


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidParams, match="no bundle"):
        parts_of_folder(tmp_path, LIMIT)
    with pytest.raises(InvalidParams, match="cannot be read"):
        parts_of_folder(tmp_path / "none", LIMIT)


def test_folders_without_end_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(CONFIG)
    deep = tmp_path / "rootfs"
    deep.mkdir()
    fd = os.open(deep, os.O_RDONLY)
    for _ in range(210):
        os.mkdir("d", dir_fd=fd)
        deeper = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = deeper
    os.close(fd)
    with pytest.raises(InvalidParams, match="deeper than 200"):
        parts_of_folder(tmp_path, LIMIT)


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_bytes(CONFIG)
    (tmp_path / "rootfs").mkdir()
    (tmp_path / "rootfs" / "log").write_bytes(b"one\n")
    real = stim_parts._Rootfs.add

    def grow(self: Any, path: bytes, *args: Any, **kwargs: Any) -> int:
        with (tmp_path / "rootfs" / "log").open("ab") as file:
            file.write(b"two\n")
        return real(self, path, *args, **kwargs)

    monkeypatch.setattr(stim_parts._Rootfs, "add", grow)
    with pytest.raises(OperationFailed, match="changed while it was read"):
        parts_of_folder(tmp_path, LIMIT)


@pytest.mark.parametrize("make", [lambda tar, _: tar, lambda _, folder: folder])
def test_what_does_not_fit_is_refused_before_it_is_read(tmp_path: Path, make: Callable[[Any, Any], Any]) -> None:
    (tmp_path / "config.json").write_bytes(CONFIG)
    (tmp_path / "rootfs").mkdir()
    (tmp_path / "rootfs" / "big").write_bytes(bytes(100_000))
    tar = tar_of(member("config.json", CONFIG), member("rootfs/big", bytes(100_000)))
    chosen = make(tar, tmp_path)
    with pytest.raises(Oversize, match="Seal it with age"):
        if isinstance(chosen, Path):
            parts_of_folder(chosen, 100_000)
        else:
            parts_of_tar(io.BytesIO(chosen), "x.tar", 100_000)
    needed = 512 + 100_352 + 1024
    assert len(parts_of_folder(tmp_path, needed).rootfs) == needed
    with pytest.raises(Oversize):
        parts_of_folder(tmp_path, needed - 1)


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([member("rootfs/a", b"x")], "no config.json"),
        ([member("config.json", CONFIG), member("config.json", CONFIG)], "two files config.json"),
        ([member("config.json", CONFIG), member("rootfs/../../etc/passwd", b"x")], "leads out"),
        ([member("config.json", CONFIG), member("/etc/passwd", b"x")], "absolute"),
        ([member("config.json", type=tarfile.SYMTYPE, linkname="/etc/shadow")], "no config.json"),
        ([member("config.json", CONFIG), member("rootfs/h", type=tarfile.LNKTYPE, linkname="config.json")], "hard link"),
        ([member("config.json", CONFIG), member("rootfs/h", type=tarfile.LNKTYPE, linkname="rootfs/none")], "hard link"),
    ],
)
def test_b114_an_archive_that_is_no_bundle_is_refused(members: list[tuple[tarfile.TarInfo, bytes]], said: str) -> None:
    with pytest.raises((InvalidParams, Corrupt), match=said):
        parts_of_tar(io.BytesIO(tar_of(*members)), "x.tar", LIMIT)


def test_b114_a_tar_cut_at_any_block_is_refused() -> None:
    whole = tar_of(*BUNDLE)
    end = whole.rstrip(b"\0")
    for size in [*range(0, len(end), 512), len(end) - 3]:
        with pytest.raises((Corrupt, InvalidParams)):
            parts_of_tar(io.BytesIO(whole[:size]), "x.tar", LIMIT)


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([member("../escape", b"x")], "leads out"),
        ([member("/etc/passwd", b"x")], "absolute"),
        ([member("a", b"1"), member("a", b"2")], "there twice"),
        ([member("a", b"1"), member("a/b", b"2")], "below what is no folder"),
        ([member("a", type=tarfile.SYMTYPE, linkname="/etc"), member("a/passwd", b"2")], "below what is no folder"),
        ([member("a", type=tarfile.CHRTYPE)], "device"),
        ([member("h", type=tarfile.LNKTYPE, linkname="none")], "hard link"),
        ([member("d", **FOLDER), member("h", type=tarfile.LNKTYPE, linkname="d")], "hard link"),
    ],
)
def test_b116_b126_a_hostile_rootfs_is_never_written(members: list[tuple[tarfile.TarInfo, bytes]], said: str) -> None:
    out = io.BytesIO()
    with pytest.raises(SealError, match=f"failed to parse rootfs: .*{said}"):
        write_bundle_tar(out, CONFIG, tar_of(*members))
    assert out.getvalue() == b""


def test_b114_b126_a_rootfs_cut_at_any_block_is_never_written() -> None:
    whole = tar_of(member("a", b"x" * 700), member("b", b"y"))
    for size in range(0, len(whole.rstrip(b"\0")), 256):
        with pytest.raises(SealError, match="failed to parse rootfs"):
            write_bundle_tar(io.BytesIO(), CONFIG, whole[:size])


def test_a_hard_link_that_sorts_before_its_file_carries_the_content() -> None:
    out = io.BytesIO()
    write_bundle_tar(out, CONFIG, tar_of(member("z", b"content"), member("a", type=tarfile.LNKTYPE, linkname="z")))
    assert [(name, content) for name, _, _, content in listed(out.getvalue())[2:]] == [
        ("rootfs/a", "content"),
        ("rootfs/z", "content"),
    ]


def test_hard_links_cannot_make_a_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stim_parts, "MAX_CONTENT", 10_000)
    bomb = tar_of(member("a", bytes(1000)), *(member(f"h{n}", type=tarfile.LNKTYPE, linkname="a") for n in range(10)))
    with pytest.raises(SealError, match="11,000 bytes"):
        write_bundle_tar(io.BytesIO(), CONFIG, bomb)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=1500), st.integers(0, 3000))
def test_bytes_of_any_kind_are_one_of_our_errors(data: bytes, at: int) -> None:
    good = bytearray(tar_of(*BUNDLE))
    good[at : at + len(data)] = data
    for tar in (data, bytes(good)):
        try:
            parts = parts_of_tar(io.BytesIO(tar), "x.tar", LIMIT)
            write_bundle_tar(io.BytesIO(), parts.config, parts.rootfs)
        except MothballError as error:
            assert error.message.isprintable()
