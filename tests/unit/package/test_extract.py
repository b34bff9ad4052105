"""The one safe extractor: whatever an archive says, nothing is written outside, and what is cut or lies is refused."""

from __future__ import annotations

import gzip
import io
import os
import stat
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mothball.errors import Corrupt, InvalidParams, MothballError, NoSpace, Oversize, PathNotAllowed
from mothball.package import extract as extract_module
from mothball.package import inflate
from mothball.package.extract import Extracted, extract
from mothball.package.tarread import Limits
from tests.support import require_tool


def info(name: str, **fields: object) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.mtime = 1_700_000_000
    for key, value in fields.items():
        setattr(made, key, value)
    return made


def archive(
    *members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT, everywhere: dict[str, str] | None = None
) -> bytes:
    """`everywhere`: a PAX header for all members."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form, pax_headers=everywhere) as tar:
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tuple[tarfile.TarInfo, bytes]:
    return info(name, type=kind, linkname=target), b""


def file(name: str, content: bytes = b"x", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    return info(name, **fields), content


def folder(name: str, **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    return info(name, type=tarfile.DIRTYPE, **{"mode": 0o755, **fields}), b""


GOOD = archive(
    folder("./"), file("config.json", b"{}", mode=0o600), folder("rootfs"), file("rootfs/tool", b"#!", mode=0o755),
    file("rootfs/a/b/deep", b"implied"), link("rootfs/l", "/etc/shadow"), link("rootfs/h", "rootfs/tool", tarfile.LNKTYPE),
    file("rootfs/" + "n" * 150 + "/" + "m" * 200, b"long"), folder("rootfs/closed", mode=0o500), file("rootfs/empty", b""),
)  # fmt: skip


def unpack(data: bytes, target: Path, **options: object) -> Extracted:
    target.mkdir(exist_ok=True)
    return (
        extract(io.BytesIO(data), target, "package x.tar", **options) if options.get("raw") else _from_disk(data, target, options)
    )


def _from_disk(data: bytes, target: Path, options: dict[str, object]) -> Extracted:
    path = target.parent / "archive.tar"
    path.write_bytes(data)
    with path.open("rb") as source:
        return extract(source, target, "package x.tar", **options)  # type: ignore[arg-type]


def listing(root: Path) -> dict[str, tuple[str, int, bytes | str]]:
    found: dict[str, tuple[str, int, bytes | str]] = {}
    for path in sorted(root.rglob("*")):
        mode = path.lstat().st_mode
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = ("l", 0, os.readlink(path))
        elif path.is_dir():
            found[name] = ("d", stat.S_IMODE(mode), "")
        else:
            found[name] = ("f", stat.S_IMODE(mode), path.read_bytes())
    return found


def test_a_package_comes_out_with_modes_links_and_times(tmp_path: Path) -> None:
    target = tmp_path / "to"
    assert unpack(GOOD, target) == Extracted(files=6, folders=5, links=1, bytes=15)
    found = listing(target)
    assert found["config.json"] == ("f", 0o600, b"{}")
    assert found["rootfs/tool"] == ("f", 0o755, b"#!")
    assert found["rootfs/a"] == ("d", 0o755, "")
    assert found["rootfs/l"] == ("l", 0, "/etc/shadow")
    assert found["rootfs/closed"] == ("d", 0o500, "")
    assert (target / "rootfs/h").stat().st_ino == (target / "rootfs/tool").stat().st_ino
    assert (target / "rootfs/tool").stat().st_mtime == (target / "rootfs/closed").stat().st_mtime == 1_700_000_000
    assert (target / "rootfs" / ("n" * 150) / ("m" * 200)).read_bytes() == b"long"


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "ustar", "pax"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress], ids=["plain", "gzip", "zstd"])
def test_every_form_of_tar_is_read(tmp_path: Path, form: int, pack: Callable[[bytes], bytes]) -> None:
    data = archive(folder("d"), file("d/f", b"content"), link("d/l", "f"), form=form)
    unpack(pack(data), tmp_path / "to")
    assert listing(tmp_path / "to") == {"d": ("d", 0o755, ""), "d/f": ("f", 0o644, b"content"), "d/l": ("l", 0, "f")}


def test_what_gnu_tar_writes_is_read(tmp_path: Path) -> None:
    tar = require_tool("tar")
    source = tmp_path / "source"
    (source / "a" / ("d" * 120)).mkdir(parents=True)
    (source / "a" / ("d" * 120) / "file").write_bytes(b"z" * 70_000)
    (source / "link").symlink_to("t" * 140)
    for form in ("gnu", "posix", "oldgnu"):
        made = subprocess.run([tar, "-c", f"--format={form}", "-C", source, "a", "link"], check=True, stdout=subprocess.PIPE)
        unpack(made.stdout, tmp_path / form)
        assert listing(tmp_path / form) == listing(source), form
    made = subprocess.run(
        [tar, "-c", "--format=v7", "-C", tmp_path, "--no-recursion", "source/a"], check=True, stdout=subprocess.PIPE
    )
    unpack(made.stdout, tmp_path / "v7")
    assert (tmp_path / "v7/source/a").is_dir()


EVIL: dict[str, bytes] = {
    "absolute name": archive(file("/tmp/evil")),
    "b116 a name that climbs": archive(file("rootfs/../../evil")),
    "b115 dots in the middle": archive(folder("a"), file("a/../../evil")),
    "a file below a link": archive(link("out", ".."), file("out/evil")),
    "a file below an absolute link": archive(link("out", "/tmp"), file("out/evil")),
    "a folder over a link": archive(link("out", ".."), folder("out"), file("out/evil")),
    "a file in place of a link": archive(link("out", "../evil"), file("out")),
    "a hard link that climbs": archive(link("h", "../../etc/passwd", tarfile.LNKTYPE)),
    "an absolute hard link": archive(link("h", "/etc/passwd", tarfile.LNKTYPE)),
    "a hard link to a link": archive(link("s", "/etc/passwd"), link("h", "s", tarfile.LNKTYPE)),
    "a hard link through a link": archive(link("s", "/etc"), link("h", "s/passwd", tarfile.LNKTYPE)),
    "a hard link to nothing": archive(link("h", "later", tarfile.LNKTYPE), file("later")),
    "a hard link to a folder": archive(folder("d"), link("h", "d", tarfile.LNKTYPE)),
    "a device": archive((info("d", type=tarfile.CHRTYPE, devmajor=1, devminor=3), b"")),
    "a block device": archive((info("d", type=tarfile.BLKTYPE, devmajor=8), b"")),
    "a fifo": archive((info("d", type=tarfile.FIFOTYPE), b"")),
    "a name twice": archive(file("a"), file("a")),
    "a folder twice": archive(folder("a"), folder("a")),
    "a file in place of a folder": archive(folder("a"), file("a")),
    "a file below a file": archive(file("a"), file("a/b")),
    "a name with a NUL": archive(file("a")).replace(b"a" + bytes(99), b"\0" * 100, 1),
    "a component that is too long": archive(file("n" * 256)),
    "a path that is too deep": archive(file("d/" * 201 + "f")),
    "a sparse member": archive(file("s", pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0"})),
    "a size for all members": archive(file("f"), everywhere={"size": "1"}),
    "a name for all members": archive(file("f"), everywhere={"path": "g"}),
    "a root that is a file": archive(file(".")),
    "nothing": b"",
    "zeros cut": bytes(512),
    "no tar": b"PK\x03\x04" + bytes(2000),
    "content behind the end": archive(file("a")) + b"hidden",
    "a wrong checksum": archive(file("a")).replace(b"ustar", b"usTar", 1),
}


@pytest.mark.parametrize("name", EVIL)
def test_b114_what_may_not_be_in_an_archive_is_refused_and_nothing_is_written_outside(tmp_path: Path, name: str) -> None:
    room = tmp_path / "room"
    room.mkdir()
    with pytest.raises((Corrupt, InvalidParams, PathNotAllowed)):
        unpack(EVIL[name], room / "to")
    assert sorted(path.name for path in room.iterdir()) == ["archive.tar", "to"]
    assert not any(path.name == "evil" for path in tmp_path.rglob("*"))
    assert not Path("/tmp/evil").exists()


def test_b114_an_archive_that_is_cut_anywhere_is_refused(tmp_path: Path) -> None:
    data = archive(folder("d"), file("d/f", b"y" * 700), file("n" * 150, b"long"))
    end = len(data.rstrip(b"\0"))
    end += -end % 512  # from here on it is whole but for its end marks
    for number, cut in enumerate([*range(0, end + 1024, 37), end, end + 512, end + 1023]):
        with pytest.raises(Corrupt) as caught:
            unpack(data[:cut], tmp_path / f"to{number}")
        assert "package x.tar" in caught.value.message
    unpack(data[: end + 1024], tmp_path / "whole")  # the end marks without tar's padding


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress], ids=["gzip", "zstd"])
def test_b114_a_packed_archive_that_is_cut_is_refused(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    packed = pack(archive(file("f", os.urandom(5000))))
    for number, cut in enumerate((len(packed) - 1, len(packed) - 20, len(packed) // 2, 12)):
        with pytest.raises(Corrupt):
            unpack(packed[: cut - 8], tmp_path / f"to{number}")


def test_a_bomb_is_refused_before_it_fills_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inflate, "FREE_BYTES", 1024**2)
    bomb = gzip.compress(archive(file("zeros", bytes(8 * 1024**2))))
    with pytest.raises(Oversize, match="bombs"):
        unpack(bomb, tmp_path / "to")
    written = sum(path.stat().st_blocks * 512 for path in (tmp_path / "to").rglob("*"))
    assert written < 4 * 1024**2


@pytest.mark.parametrize(
    "limits",
    [Limits(members=2), Limits(bytes=5), Limits(names=10)],
    ids=["members", "bytes", "names"],
)
def test_limits_are_kept(tmp_path: Path, limits: Limits) -> None:
    with pytest.raises(Oversize):
        unpack(archive(file("a", b"12"), file("b", b"34"), file("cccccccccc", b"56")), tmp_path / "to", limits=limits)


def test_an_archive_that_does_not_fit_the_disk_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extract_module, "_SPARE", 1 << 60)
    with pytest.raises(NoSpace, match="nothing was unpacked"):
        unpack(GOOD, tmp_path / "to")
    assert not list((tmp_path / "to").iterdir())


def test_setuid_and_setgid_never_reach_the_disk(tmp_path: Path) -> None:
    unpack(archive(file("su", b"x", mode=0o6755), folder("d", mode=0o3777)), tmp_path / "to")
    assert stat.S_IMODE((tmp_path / "to/su").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "to/d").stat().st_mode) == 0o1777


def test_files_belong_to_whoever_unpacks(tmp_path: Path) -> None:
    unpack(archive(file("f", b"x", uid=4711, gid=4712)), tmp_path / "to")
    found = (tmp_path / "to/f").stat()
    assert (found.st_uid, found.st_gid) == (os.geteuid(), os.getegid())


@pytest.mark.parametrize("head", [b"age-encryption.org/v1\n", b"-----BEGIN AGE ENCRYPTED FILE-----", b"STIM\0"])
def test_a_sealed_file_is_not_taken_for_a_broken_tar(tmp_path: Path, head: bytes) -> None:
    with pytest.raises(InvalidParams, match="mothball unseal"):
        unpack(head + bytes(4000), tmp_path / "to")


def test_control_characters_of_names_do_not_reach_a_message(tmp_path: Path) -> None:
    with pytest.raises(InvalidParams) as caught:
        unpack(archive(file("\x1b[31m/../evil")), tmp_path / "to")
    assert "\x1b" not in caught.value.message


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_changed_archive_ends_well_or_with_an_error_of_ours(tmp_path: Path, data: st.DataObject) -> None:
    room = tmp_path / "fuzz"
    subprocess.run(["rm", "-rf", room], check=True)
    room.mkdir()
    bytes_ = bytearray(GOOD[: data.draw(st.integers(0, len(GOOD)))])
    for _ in range(data.draw(st.integers(0, 6))):
        if bytes_:
            bytes_[data.draw(st.integers(0, len(bytes_) - 1))] = data.draw(st.integers(0, 255))
    with_trouble = False
    try:
        unpack(bytes(bytes_), room / "to", limits=Limits(bytes=1 << 20, members=100, names=1 << 16))
    except MothballError:
        with_trouble = True
    assert with_trouble or (room / "to").is_dir()
    assert sorted(path.name for path in room.iterdir()) == ["archive.tar", "to"]
