"""A secret in a compressed file keeps that file out of every package, as a secret in a plain binary does."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from mothball.redact import Redactor, Rules, inside
from tests.support import require_tool
from tests.unit.redact.canaries import PASSWORD, TOKENS

TOKEN = TOKENS["github"][0].encode()


def redactor() -> Redactor:
    return Redactor(b"k" * 32, Rules.default())


def in_zip(content: bytes, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        archive.writestr("first.txt", "nothing\n" * 1000)
        archive.writestr("a/b.txt", content)
    return out.getvalue()


def in_tgz(content: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        info = tarfile.TarInfo("x/y")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "zlib": zlib.compress, "gzip": gzip.compress, "two gzip members": lambda data: gzip.compress(b"x" * 99) + gzip.compress(data),
    "bzip2": bz2.compress, "xz": lzma.compress, "zstd": zstandard.ZstdCompressor().compress, "tgz": in_tgz, "zip": in_zip,
    "zip, stored": lambda data: in_zip(data, zipfile.ZIP_STORED),
    "git object": lambda data: zlib.compress(b"blob %d\0" % len(data) + data),
    "two zstd frames": lambda data: zstandard.ZstdCompressor().compress(b"y" * 5000) + zstandard.ZstdCompressor().compress(data),
}  # fmt: skip


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("piece", [7, 100_000])
def test_a_secret_in_a_compressed_file_fires_and_the_same_without_it_does_not(packer: str, piece: int) -> None:
    noise = bytes(random.Random(1).randrange(32, 126) for _ in range(30_000)).replace(b":", b" ").replace(b"=", b" ")
    for content, expected in (
        (b"\n" + TOKEN + b"\n", {"github"}),
        (f'password = "{PASSWORD}"'.encode(), {"password"}),
        (b"", set()),
    ):
        data = PACKERS[packer](noise + b"\n" + content)
        assert redactor().binary(data[at : at + piece] for at in range(0, len(data), piece)) == expected


def test_the_history_of_a_git_repository_is_looked_at(tmp_path: Path) -> None:
    """A token that was committed and removed again stands in no file, but in an object: loose, packed, and as a delta."""
    git = [require_tool("git"), "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@y", "-c", "init.defaultBranch=main"]

    def run(*words: str) -> None:
        subprocess.run([*git, *words], check=True, capture_output=True, timeout=60)

    def found() -> set[str]:
        files = [path for path in (tmp_path / ".git" / "objects").rglob("*") if path.is_file()]
        return set().union(*(redactor().binary([path.read_bytes()]) for path in files))

    lines = "".join(f"line {n} of the file\n" for n in range(2000))
    run("init", "-q")
    (tmp_path / "a.txt").write_text(lines)
    run("add", ".")
    run("commit", "-qm", "one")
    run("gc", "-q")
    assert found() == set()
    (tmp_path / "a.txt").write_text(lines + f"token {TOKEN.decode()}\n")
    run("commit", "-qam", "two")
    (tmp_path / "a.txt").write_text(lines + "gone\n")
    run("commit", "-qam", "three")
    assert found() == {"github"}
    run("gc", "-q", "--aggressive", "--prune=now")
    assert [path.suffix for path in (tmp_path / ".git" / "objects" / "pack").iterdir() if path.suffix == ".pack"] == [".pack"]
    assert found() == {"github"}


def test_a_token_that_only_a_delta_adds_is_found() -> None:
    """Inserts are cut into runs of at most 127 bytes: the token across two of them is one again."""
    added = b"z" * 120 + TOKEN + b"tail"
    delta = b"\x90\x4e\xa0\x4e\x91\x00\x10" + b"\x7f" + added[:127] + bytes([len(added) - 127]) + added[127:] + b"\x90\x10"
    entry = bytes([0x80 | 7 << 4 | len(delta) & 15, len(delta) >> 4]) + b"r" * 20 + zlib.compress(delta)
    assert redactor().binary([b"PACK\0\0\0\2\0\0\0\1" + entry + b"s" * 20]) == {"github"}


def test_a_bomb_counts_as_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inside, "MOST", 8 * 1024**2)
    for pack in (gzip.compress, zstandard.ZstdCompressor().compress, in_zip):
        bomb = pack(b"\0" * 64 * 1024**2)
        assert len(bomb) < 200_000
        assert redactor().binary([bomb]) == {"unread"}


def test_a_method_that_is_not_known_counts_as_unread() -> None:
    data = in_zip(b"x" * 5000, zipfile.ZIP_LZMA)
    assert redactor().binary([data]) == {"unread"}
    assert "unread" in redactor().rules.names


@given(st.sampled_from(sorted(PACKERS)), st.integers(0, 400), st.binary(max_size=20))
def test_damage_ends_the_look_and_nothing_else(packer: str, at: int, junk: bytes) -> None:
    """Cut or overwritten anywhere: an answer, no error; what is readable before the damage is still found."""
    data = PACKERS[packer](b"\n" + TOKEN + b"\n")
    assert redactor().binary([data + junk]) >= {"github"}
    redactor().binary([data[:at], junk])
    redactor().binary([data[:at], junk, data[at + len(junk) :]])


@given(
    st.sampled_from(
        [b"PK\x03\x04", b"PACK\0\0\0\2\0\0\0\x09", b"\x78\x9c", b"\x1f\x8b\x08", b"BZh9", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"]
    ),
    st.binary(max_size=300),
)
def test_anything_behind_a_known_beginning_is_survived(begin: bytes, rest: bytes) -> None:
    assert redactor().binary([begin, rest]) <= {"unread", *redactor().rules.names}
