"""A capture as an image layout: what is in it, what is refused, and that a failure leaves nothing behind."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import zlib
from pathlib import Path
from typing import Any

import pytest

from mothball.errors import AlreadyExists, Corrupt, InvalidParams, NoSpace
from mothball.package import layout
from mothball.package.layout import export_archive, export_layout
from mothball.package.target import new_file, new_folder
from mothball.store import Store
from tests.unit.store.build import Blob, Dir, File, capture, damage, layer, new_store

LOWER = {b"": Dir(), b"a": File(b"a" * 5000), b"b": File(os.urandom(9000)), b"d": Dir()}
UPPER = {b"": Dir(), b"a": File(b"changed")}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return new_store(tmp_path / "store")


@pytest.fixture
def blobs() -> list[Blob]:
    return [layer(LOWER), layer(UPPER, removed=[b"d"])]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def unpacked(archive: Path) -> dict[str, bytes]:
    found = {}
    with tarfile.open(archive) as tar:
        for item in tar.getmembers():
            content = tar.extractfile(item)
            if content is not None:
                found[item.name] = content.read()
    return found


def image(files: dict[str, bytes]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(index, manifest); every blob is checked against its name."""
    for name, data in files.items():
        if name.startswith("blobs/"):
            assert hashlib.sha256(data).hexdigest() == name.rpartition("/")[2]
    index = json.loads(files["index.json"])
    (entry,) = index["manifests"]
    return index, json.loads(files["blobs/sha256/" + entry["digest"][7:]])


def test_a_layout_holds_exactly_what_the_store_holds(store: Store, blobs: list[Blob], tmp_path: Path) -> None:
    digest = capture(store, *blobs)
    result = export_layout(store, digest, tmp_path / "image", name="snap-1")
    files = contents(tmp_path / "image")
    index, manifest = image(files)
    assert (result.digest, result.blobs, result.name) == (digest, 4, "snap-1")
    assert index["manifests"][0]["annotations"] == {"org.opencontainers.image.ref.name": "snap-1"}
    assert json.loads(files["oci-layout"]) == {"imageLayoutVersion": "1.0.0"}
    assert len(files) == 4 + 2
    named = [manifest["config"], *manifest["layers"]]
    for item in named:
        assert files["blobs/sha256/" + item["digest"][7:]] == store.blobs.path(item["digest"]).read_bytes()
    assert sum(len(files["blobs/sha256/" + item["digest"][7:]]) for item in named) + len(store.blobs.read(digest)) == result.bytes
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("gzip", [False, True])
def test_an_archive_is_the_layout_and_the_same_bytes_each_time(store: Store, blobs: list[Blob], tmp_path: Path, gzip: bool) -> None:
    digest = capture(store, *blobs)
    export_layout(store, digest, tmp_path / "image", gzip=gzip)
    first = export_archive(store, digest, tmp_path / "one.tar", gzip=gzip)
    export_archive(store, digest, tmp_path / "two.tar", gzip=gzip)
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()
    assert unpacked(tmp_path / "one.tar") == contents(tmp_path / "image")
    assert (first.digest == digest) is not gzip
    with tarfile.open(tmp_path / "one.tar") as tar:
        assert {(item.mtime, item.uid, item.gid, item.uname) for item in tar} == {(0, 0, 0, "")}


def test_b106_gzip_keeps_the_tars_and_the_config_and_drops_what_is_of_zstd(store: Store, blobs: list[Blob], tmp_path: Path) -> None:
    digest = capture(store, *blobs)
    export_layout(store, digest, tmp_path / "plain")
    export_layout(store, digest, tmp_path / "gzip", gzip=True)
    plain, packed = contents(tmp_path / "plain"), contents(tmp_path / "gzip")
    _, before = image(plain)
    _, after = image(packed)
    assert after["config"] == before["config"]
    assert after["annotations"] == before["annotations"]
    diff_ids = json.loads(packed["blobs/sha256/" + after["config"]["digest"][7:]])["rootfs"]["diff_ids"]
    for old, new, diff_id in zip(blobs, after["layers"], diff_ids, strict=True):
        data = packed["blobs/sha256/" + new["digest"][7:]]
        assert new["mediaType"] == "application/vnd.oci.image.layer.v1.tar+gzip"
        assert set(new) == {"mediaType", "digest", "size"}
        assert data[:8] == b"\x1f\x8b\x08\0\0\0\0\0"
        tar = bytearray()
        while data:
            engine = zlib.decompressobj(31)
            tar += engine.decompress(data)
            data = engine.unused_data
        assert f"sha256:{hashlib.sha256(tar).hexdigest()}" == diff_id == old.diff_id


@pytest.mark.parametrize("archive", [False, True])
@pytest.mark.parametrize("there", ["file", "folder", "empty folder", "dangling link"])
def test_what_exists_is_never_replaced(store: Store, blobs: list[Blob], tmp_path: Path, there: str, archive: bool) -> None:
    digest = capture(store, *blobs)
    target = tmp_path / "target"
    if there == "file":
        target.write_text("mine")
    elif there == "dangling link":
        target.symlink_to("nowhere")
    else:
        target.mkdir()
        if there == "folder":
            (target / "mine").write_text("mine")
    with pytest.raises(AlreadyExists, match="exists already") as caught:
        (export_archive if archive else export_layout)(store, digest, target)
    assert caught.value.exit_code == 73
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store", "target"]
    assert not target.is_file() or target.read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("make", [new_file, new_folder])
def test_what_appears_while_an_export_runs_is_not_replaced_either(make: Any, tmp_path: Path) -> None:
    target = tmp_path / "target"
    with pytest.raises(AlreadyExists), make(target, tmp_path / "store"):
        target.write_text("quicker")
    assert target.read_text() == "quicker"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("gzip", [False, True])
@pytest.mark.parametrize("archive", [False, True])
@pytest.mark.parametrize("how", ["flipped", "cut", "missing"])
def test_a_damaged_blob_is_named_and_nothing_is_left(
    store: Store, blobs: list[Blob], tmp_path: Path, how: str, archive: bool, gzip: bool
) -> None:
    digest = capture(store, *blobs)
    if how == "missing":
        store.blobs.path(blobs[0].digest).unlink()
    else:
        damage(store, blobs[0].digest, at=60, size=len(blobs[0].data) - 5 if how == "cut" else None)
    with pytest.raises(Corrupt, match=blobs[0].digest):
        (export_archive if archive else export_layout)(store, digest, tmp_path / "target", gzip=gzip)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_gzip_refuses_a_config_with_another_diff_id(store: Store, tmp_path: Path) -> None:
    blob = layer(LOWER)
    blob.diff_id = "sha256:" + "0" * 64
    with pytest.raises(Corrupt, match="diff id"):
        export_layout(store, capture(store, blob), tmp_path / "target", gzip=True)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize("name", ["", ".", "a/b", "-x", "a b", "x" * 129, "ä"])
def test_a_name_that_is_no_tag_is_refused(store: Store, blobs: list[Blob], tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidParams, match="not a name for an image"):
        export_layout(store, capture(store, *blobs), tmp_path / "target", name=name)


def test_a_folder_that_is_not_there_is_not_made(store: Store, blobs: list[Blob], tmp_path: Path) -> None:
    with pytest.raises(InvalidParams, match="is not a folder"):
        export_archive(store, capture(store, *blobs), tmp_path / "no" / "target")


def test_a_full_disk_is_no_space(tmp_path: Path) -> None:
    with pytest.raises(NoSpace), new_file(tmp_path / "target", tmp_path / "store"), open("/dev/full", "wb", buffering=0) as full:
        full.write(b"x")
    assert list(tmp_path.iterdir()) == []


def test_exports_renew_the_age_of_every_blob_before_they_copy(store: Store, blobs: list[Blob], tmp_path: Path) -> None:
    digest = capture(store, *blobs)
    for path in store.blobs.folder.iterdir():
        os.utime(path, (1, 1))
    young: list[float] = []

    def look(**_: Any) -> None:
        young.append(min(path.stat().st_mtime for path in store.blobs.folder.iterdir()))

    export_layout(store, digest, tmp_path / "target", progress=look)
    assert young
    assert min(young) > 1_000_000


def test_frames_of_any_size_make_the_same_gzip(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of threads is that of the machine; the bytes are not."""
    digest = capture(store, layer(LOWER, frame_bytes=512))
    export_archive(store, digest, tmp_path / "many", gzip=True)
    monkeypatch.setattr(layout, "_THREADS", 1)
    export_archive(store, digest, tmp_path / "one", gzip=True)
    assert (tmp_path / "many").read_bytes() == (tmp_path / "one").read_bytes()
