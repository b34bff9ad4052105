"""A capture as one tar: the same bytes for the same tree, and what GNU tar and Python make of it."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import tarfile
import zlib
from pathlib import Path

import pytest
import zstandard

from mothball.errors import Corrupt, InvalidParams
from mothball.package.tar import TarResult, write_tar
from mothball.store import Store
from mothball.store.tree import Tree
from tests.support import require_tool
from tests.unit.store.build import NS, Blob, Dir, File, Hard, Link, Mtime, capture, damage, layer, new_store, pack

LATIN = b"caf\xe9"
FULL = {
    b"": Dir(mode=0o751),
    b"README": File(b"# read me\n" * 300),
    b"a": Dir(mode=0o700),
    b"a.b": File(b"sorts behind the folder a and what it holds"),
    b"a/one": File(b"1", mode=0o4755),
    b"a/two": Hard(b"a/one"),
    b"empty": Dir(mode=0o1777),
    LATIN: File(b"latin", mtime=-1_500_000_000),
    b"link": Link(b"../../etc/passwd"),
    b"long/" + b"n" * 200: File(b"long"),
    b"long": Dir(),
    b"none": File(b""),
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return new_store(tmp_path / "store")


def tar_of(store: Store, digest: str) -> tuple[bytes, TarResult]:
    out = io.BytesIO()
    with Tree.open(store, digest) as tree:
        result = write_tar(tree, out)
    assert result.sha256 == "sha256:" + hashlib.sha256(out.getvalue()).hexdigest()
    assert result.bytes == len(out.getvalue())
    return out.getvalue(), result


def members(data: bytes) -> dict[bytes, tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(data), errors="surrogateescape") as archive:
        found = archive.getmembers()
    names = [os.fsencode(item.name) for item in found]
    assert len(set(names)) == len(names)
    return dict(zip(names, found, strict=True))


def test_b102_the_same_tree_gives_the_same_bytes_however_many_layers_it_has(store: Store) -> None:
    whole = capture(store, layer(FULL))
    first = {path: item for path, item in FULL.items() if path not in {b"README", b"empty"}}
    split = capture(
        store,
        layer({**first, b"README": File(b"old"), b"gone/x": File(b"gone"), b"gone": Dir()}, frame_bytes=512),
        layer({b"": FULL[b""], b"empty": FULL[b"empty"]}, removed=[b"gone"]),
        layer({b"": FULL[b""], b"README": FULL[b"README"]}),
    )
    assert tar_of(store, whole) == tar_of(store, split)
    assert tar_of(store, whole) == tar_of(store, whole)


def test_b101_b102_the_tar_has_everything_sorted_with_the_workspace_at_its_root(store: Store) -> None:
    data, result = tar_of(store, capture(store, layer(FULL)))
    found = members(data)
    assert result.entries == len(FULL) == len(found)
    assert list(found) == [
        b".",
        b"README",
        b"a",
        b"a/one",
        b"a/two",
        b"a.b",
        LATIN,
        b"empty",
        b"link",
        b"long",
        b"long/" + b"n" * 200,
        b"none",
    ]
    assert (found[b"."].isdir(), found[b"."].mode) == (True, 0o751)
    assert (found[b"empty"].isdir(), found[b"empty"].mode) == (True, 0o1777)
    assert (found[b"a/one"].mode, found[b"a/one"].uid, found[b"a/one"].gid) == (0o4755, 1000, 1000)
    assert (found[b"a/two"].islnk(), found[b"a/two"].linkname) == (True, "a/one")
    assert (found[b"link"].issym(), found[b"link"].linkname) == (True, "../../etc/passwd")
    assert found[b"README"].pax_headers["mtime"] == "1700000000.123456789"
    assert found[LATIN].pax_headers["mtime"] == "-1.5"
    assert not any(item.name.startswith(("/", "workspace")) or ".." in item.name.split("/") for item in found.values())


def test_b103_a_capture_of_an_empty_folder_is_a_tar_of_its_root(store: Store) -> None:
    data, result = tar_of(store, capture(store, layer({b"": Dir()})))
    assert result.entries == 1
    assert list(members(data)) == [b"."]


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_b106_a_compressed_tar_holds_the_same_tar_under_a_header_without_time_or_name(store: Store, compression: str) -> None:
    digest = capture(store, layer(FULL))
    plain, _ = tar_of(store, digest)
    outs = []
    for _ in range(2):
        out = io.BytesIO()
        with Tree.open(store, digest) as tree:
            result = write_tar(tree, out, compression=compression)  # type: ignore[arg-type]
        assert result.sha256 == "sha256:" + hashlib.sha256(out.getvalue()).hexdigest()
        outs.append(out.getvalue())
    assert outs[0] == outs[1]
    if compression == "gzip":
        assert outs[0][:8] == b"\x1f\x8b\x08\0\0\0\0\0"
        assert zlib.decompress(outs[0], 31) == plain
    else:
        assert zstandard.ZstdDecompressor().decompressobj().decompress(outs[0]) == plain


def test_an_unknown_compression_is_refused(store: Store) -> None:
    with Tree.open(store, capture(store, layer(FULL))) as tree, pytest.raises(InvalidParams, match="lzma"):
        write_tar(tree, io.BytesIO(), compression="lzma")  # type: ignore[arg-type]


def test_b100_content_is_in_the_tar_byte_for_byte_in_every_layer(store: Store) -> None:
    low = {b"": Dir(), b"d": Dir(), **{b"d/%03d" % n: File(os.urandom(n * 37)) for n in range(60)}}
    high = {b"": Dir(), b"d": Dir(), **{b"d/%03d" % n: File(os.urandom(n * 11)) for n in range(0, 60, 3)}}
    digest = capture(store, layer(low, frame_bytes=4096), layer(high, frame_bytes=2048))
    data, _ = tar_of(store, digest)
    expected = {**low, **high}
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for path, item in expected.items():
            if isinstance(item, File):
                content = archive.extractfile(path.decode())
                assert content is not None
                assert content.read() == item.content


def hard_link_captures() -> dict[str, tuple[list[Blob], dict[bytes, str]]]:
    """Layers over one file of three names, and what each name has to be."""
    base = layer({b"": Dir(), b"a": File(b"shared"), b"b": Hard(b"a"), b"c": Hard(b"a")})
    return {
        "all there": ([base], {b"b": "a", b"c": "a"}),
        "first removed": ([base, layer({b"": Dir()}, removed=[b"a"])], {b"b": "", b"c": "b"}),
        "first replaced": ([base, layer({b"": Dir(), b"a": File(b"other")})], {b"a": "", b"b": "", b"c": "b"}),
        "first only touched": ([base, layer({b"": Dir(), b"a": Mtime(NS + 5)})], {b"b": "a", b"c": "a"}),
        "second removed": ([base, layer({b"": Dir()}, removed=[b"b"])], {b"c": "a"}),
        "first now a folder": ([base, layer({b"": Dir(), b"a": Dir()}, removed=[b"a"])], {b"b": "", b"c": "b"}),
    }


@pytest.mark.parametrize("case", list(hard_link_captures()))
def test_hard_links_lead_to_a_member_before_them_that_is_the_same_file(store: Store, case: str) -> None:
    layers, expected = hard_link_captures()[case]
    data, _ = tar_of(store, capture(store, *layers))
    found = members(data)
    names = list(found)
    for path, first in expected.items():
        assert found[path].linkname == first, (case, path)
        assert found[path].isreg() is (not first)
        if first:
            assert names.index(first.encode()) < names.index(path)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        content = archive.extractfile("c")
        assert content is not None
        assert content.read() == b"shared"


def test_gnu_tar_unpacks_it_with_modes_times_links_and_odd_names(store: Store, tmp_path: Path) -> None:
    data, _ = tar_of(store, capture(store, layer(FULL)))
    out = tmp_path / "out"
    out.mkdir()
    done = subprocess.run(
        [require_tool("tar"), "-C", str(out), "-xpf", "-", "--no-same-owner"],
        input=data,
        capture_output=True,
        check=False,
        timeout=60,
    )
    # It calls a time before 1970 implausible and sets it all the same, and a name's charset is no question for it.
    known = (b"implausibly old", b"keyword 'hdrcharset'")
    assert (done.returncode, [line for line in done.stderr.splitlines() if not any(text in line for text in known)]) == (0, [])
    assert sorted(os.listdir(os.fsencode(out))) == [b"README", b"a", b"a.b", LATIN, b"empty", b"link", b"long", b"none"]
    assert (out / "README").read_bytes() == b"# read me\n" * 300
    assert (out / "README").stat().st_mtime_ns == NS
    assert os.stat(os.fsencode(out) + b"/" + LATIN).st_mtime_ns == -1_500_000_000
    assert (out / "link").readlink() == Path("../../etc/passwd")
    assert (out / "link").lstat().st_mtime_ns == NS
    assert (out / "a" / "one").stat().st_ino == (out / "a" / "two").stat().st_ino
    for path, mode in (("", 0o751), ("a", 0o700), ("a/one", 0o4755), ("empty", 0o1777)):
        assert (out / path).stat().st_mode & 0o7777 == mode
        assert (out / path).stat().st_mtime_ns == NS


@pytest.mark.parametrize("seconds", [-1, 0, 1, 2**33, 2**33 + 1, -(2**33), 2**32])
@pytest.mark.parametrize("nanoseconds", [0, 1, 999_999_999, 500_000_000])
def test_every_time_survives_to_the_nanosecond(store: Store, seconds: int, nanoseconds: int) -> None:
    wanted = seconds * 10**9 + nanoseconds
    data, _ = tar_of(store, capture(store, layer({b"": Dir(mtime=0), b"f": File(b"x", mtime=wanted)})))
    found = members(data)[b"f"]
    text = found.pax_headers.get("mtime", str(int(found.mtime)))
    whole, _, rest = text.lstrip("-").partition(".")
    total = int(whole) * 10**9 + int((rest or "0").ljust(9, "0"))
    assert (-total if text.startswith("-") else total) == wanted


def test_a_file_that_is_not_what_its_table_says_ends_the_export(store: Store) -> None:
    blob = layer({b"": Dir(), b"f": File(b"content")})
    rows = [(*row[:7], b"\1" * 32, *row[8:]) if row[0] == b"f" else row for row in blob.rows]
    content = b"".join(
        zstandard.ZstdDecompressor().decompress(blob.data[offset : offset + length]) for offset, length, _ in blob.frames
    )
    digest = capture(store, pack(content, rows))
    with Tree.open(store, digest) as tree, pytest.raises(Corrupt, match="f does not match its sha256"):
        write_tar(tree, io.BytesIO())


def test_a_damaged_frame_ends_the_export_and_names_the_blob(store: Store) -> None:
    blob = layer({b"": Dir(), b"f": File(os.urandom(3000))})
    digest = capture(store, blob)
    damage(store, blob.digest, at=blob.frames[1][0] + 40)
    with Tree.open(store, digest) as tree, pytest.raises(Corrupt, match=blob.digest):
        write_tar(tree, io.BytesIO())


def test_progress_may_end_an_export(store: Store) -> None:
    digest = capture(store, layer({b"": Dir(), **{b"%04d" % n: File(b"x") for n in range(2000)}}))
    seen: list[int] = []

    def stop(**done: int) -> None:
        seen.append(done["entries"])
        if len(seen) == 2:
            raise RuntimeError("enough")

    with Tree.open(store, digest) as tree, pytest.raises(RuntimeError, match="enough"):
        write_tar(tree, io.BytesIO(), progress=stop)
    assert 0 < seen[0] < seen[1] < 2000
