"""Verify finds every kind of damage, names the blob and the captures it harms, and finds nothing where nothing is."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mothball.errors import Cancelled, Corrupt, NotFound
from mothball.store import Store
from mothball.store.manifest import MEDIA_INDEX, MEDIA_MANIFEST, Manifest, canonical, load_manifest
from mothball.store.tarstream import TarStream
from mothball.store.tree import Tree
from mothball.store.verify import Level, Problem, VerifyReport, verify
from tests.unit.store.build import NS, Blob, Dir, File, Hard, Link, Mtime, capture, damage, layer, new_store, pack

LEVELS: list[Level] = ["structure", "sample", "deep", "content"]
SPEC = {
    b"a": File(b"hello" * 900, 0o755),
    b"b": Hard(b"a"),
    b"deep": Dir(0o700),
    b"deep/empty": File(),
    b"deep/" + b"n" * 200: File(b"long name"),
    b"latin-\xe9": File(b"x"),
    b"link": Link(b"../../etc/passwd"),
    b"old": File(b"", mtime=-5 * 10**9 + 1),
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return new_store(tmp_path / "store")


def pair(store: Store) -> tuple[Blob, Blob, str, str]:
    """Two captures of two workspaces that share their lower layer."""
    below, above = layer(SPEC), layer({b"new": File(b"new"), b"deep": Mtime(NS + 1)}, [b"a", b"b"])
    return below, above, capture(store, below, workspace="one"), capture(store, below, above, workspace="two")


def reasons(report: VerifyReport, digest: str) -> list[str]:
    return [problem.reason for problem in report.problems if problem.digest == digest]


@pytest.mark.parametrize("level", LEVELS)
def test_a_whole_store_has_no_problems(store: Store, level: Level) -> None:
    pair(store)
    report = verify(store, None, level)
    assert report.problems == []
    assert (report.refs, report.checked) == (2, 6)
    assert report.bytes == sum(path.stat().st_size for path in store.blobs.folder.iterdir())


def test_an_empty_store_has_no_problems(store: Store, tmp_path: Path) -> None:
    assert verify(store, level="content") == VerifyReport(0, 0, 0, [], "content")
    assert verify(Store(tmp_path / "nothing"), level="content") == VerifyReport(0, 0, 0, [], "content")


def test_a_workspace_without_captures_is_not_found(store: Store) -> None:
    with pytest.raises(NotFound):
        verify(store, "three")


@pytest.mark.parametrize("level", ["deep", "content"])
@pytest.mark.parametrize("part", ["layer", "config", "manifest"])
@pytest.mark.parametrize("kind", ["flip", "cut", "grow", "missing", "folder", "fifo"])
def test_every_damaged_blob_is_named_with_the_captures_it_harms(store: Store, kind: str, part: str, level: Level) -> None:
    below, _, first, _ = pair(store)
    digest = {"layer": below.digest, "config": load_manifest(store.blobs, first).config.digest, "manifest": first}[part]
    path = store.blobs.path(digest)
    if kind == "flip":
        damage(store, digest, 30)
    elif kind == "cut":
        damage(store, digest, size=40)
    elif kind == "grow":
        path.write_bytes(path.read_bytes() + b"\0")
    else:
        path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    report = verify(store, None, level)
    assert [problem.digest for problem in report.problems] == [digest]
    assert report.problems[0].refs == (["one:latest", "two:latest"] if part == "layer" else ["one:latest"])
    assert report.problems[0].reason
    assert [problem.digest for problem in verify(store, "one", level).problems] == [digest]
    assert [problem.digest for problem in verify(store, "two", level).problems] == ([digest] if part == "layer" else [])


def test_one_damaged_blob_does_not_hide_the_next(store: Store) -> None:
    below, above, _, second = pair(store)
    damage(store, below.digest, 5)
    damage(store, above.digest, 5)
    store.blobs.path(load_manifest(store.blobs, second).config.digest).unlink()
    assert len({problem.digest for problem in verify(store, level="deep").problems}) == 3


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{}", b"\xff", b'{"manifests":[{}]}', b'{"manifests":[{"mediaType":"x","digest":"../../x","size":1}]}']
)
def test_a_damaged_index_is_a_problem_of_its_workspace_only(store: Store, text: bytes) -> None:
    pair(store)
    (store.refs("one").folder / "index.json").write_bytes(text)
    report = verify(store, None)
    assert len(report.problems) == 1
    assert "one" in report.problems[0].refs[0]
    assert verify(store, "two", level="content").problems == []


@pytest.mark.parametrize("kind", ["oci-layout missing", "oci-layout damaged", "blobs missing", "blobs elsewhere"])
def test_a_damaged_layout_is_a_problem(store: Store, kind: str) -> None:
    pair(store)
    folder = store.refs("one").folder
    part, _, how = kind.partition(" ")
    (folder / part).unlink()
    if how == "damaged":
        (folder / part).write_bytes(b"[1]")
    elif how == "elsewhere":
        (folder / part).symlink_to("/tmp")
    assert [(problem.digest, problem.refs) for problem in verify(store, None).problems] == [("", ["one"])]


def test_a_ref_to_a_manifest_that_is_gone_is_a_problem(store: Store) -> None:
    _, _, first, _ = pair(store)
    store.blobs.path(first).unlink()
    assert verify(store, None).problems == [Problem(first, ["one:latest"], "it is missing from the store")]


def publish_changed(store: Store, change: Callable[[Manifest, dict[str, Any]], None]) -> str:
    """The capture of `SPEC` with a manifest that somebody changed, published with its true digest."""
    digest = capture(store, layer(SPEC))
    document = json.loads(store.blobs.read(digest))
    change(load_manifest(store.blobs, digest), document)
    changed, _ = store.blobs.put(canonical(document))
    # Written by hand: `publish` looks at what it publishes.
    store.refs("one").prepare()
    annotations = {"org.opencontainers.image.ref.name": "latest"}
    manifest = {"mediaType": MEDIA_MANIFEST, "digest": changed, "size": len(canonical(document)), "annotations": annotations}
    index = {"schemaVersion": 2, "mediaType": MEDIA_INDEX, "manifests": [manifest]}
    (store.refs("one").folder / "index.json").write_bytes(canonical(index))
    return changed


LIES: dict[str, Callable[[Any, Any], None]] = {
    "layer digest": lambda _, d: d["layers"][0].update(digest="../../etc/passwd"),
    "config digest": lambda _, d: d["config"].update(digest="sha256:x"),
    "layer size": lambda _, d: d["layers"][0].update(size=7),
    "media type": lambda _, d: d["layers"][0].update(mediaType="application/vnd.oci.image.layer.v1.tar"),
    "no annotations": lambda _, d: d["layers"][0].pop("annotations"),
    "config for a layer": lambda m, d: d["layers"].append({**d["layers"][0], "digest": m.config.digest, "size": m.config.size}),
    "one layer twice": lambda _, d: d["layers"].append(d["layers"][0]),
    "no layers": lambda _, d: d.update(layers=[]),
    "schema": lambda _, d: d.update(schemaVersion=1),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_that_lies_is_a_problem_without_going_deep(store: Store, lie: str) -> None:
    publish_changed(store, LIES[lie])
    problems = verify(store, None).problems
    assert problems
    assert all(problem.refs == ["one:latest"] for problem in problems)


def test_a_diff_id_that_lies_is_found_deep(store: Store) -> None:
    blob = layer(SPEC)
    capture(store, dataclasses.replace(blob, diff_id="sha256:" + "0" * 64), workspace="one")
    assert verify(store, None).problems == []
    assert "diff id" in reasons(verify(store, level="content"), blob.digest)[0]


def rows_changed(blob: Blob, path: bytes, changes: dict[str, Any]) -> list[Any]:
    names = ("path", "type", "mode", "uid", "gid", "mtime_ns", "size", "sha256", "link", "frame", "offset")
    return [tuple({**dict(zip(names, row, strict=True)), **changes}.values()) if row[0] == path else row for row in blob.rows]


TOC_LIES: dict[str, tuple[bytes, dict[str, Any]]] = {
    "mode": (b"a", {"mode": 0o644}),
    "uid": (b"a", {"uid": 0}),
    "gid": (b"deep", {"gid": 0}),
    "mtime": (b"a", {"mtime_ns": NS + 10**9}),
    "sha256": (b"a", {"sha256": bytes(32)}),
    "size": (b"latin-\xe9", {"size": 2}),
    "offset": (b"latin-\xe9", {"offset": 1}),
    "link": (b"link", {"link": b"elsewhere"}),
    "hard link": (b"b", {"link": b"deep/empty"}),
    "hard link to nothing": (b"b", {"link": b"nothing"}),
    "hard link content": (b"b", {"sha256": bytes(32)}),
    "type": (b"deep/empty", {"type": "d", "sha256": b""}),
    "only an mtime": (b"deep/empty", {"type": "m", "sha256": b""}),
    "path": (b"link", {"path": b"linj"}),
    "sha256 of nothing": (b"deep/empty", {"sha256": bytes(32)}),
}


def tar_of(blob: Blob) -> bytes:
    return zstandard.ZstdDecompressor().stream_reader(io.BytesIO(blob.data), read_across_frames=True).read()


@pytest.mark.parametrize("lie", TOC_LIES)
def test_a_table_of_contents_that_is_not_that_of_its_tar_is_found_deep(store: Store, lie: str) -> None:
    blob = layer(SPEC)
    path, changes = TOC_LIES[lie]
    false = pack(tar_of(blob), sorted(rows_changed(blob, path, changes), key=lambda row: row[0].replace(b"/", b"\0")))
    capture(store, false, workspace="one")
    found = reasons(verify(store, level="content"), false.digest)
    assert len(found) == 1
    assert "its tar at" in found[0]


@pytest.mark.parametrize("kind", ["row missing", "row too many", "last row missing"])
def test_entries_of_the_tar_and_of_the_table_are_the_same(store: Store, kind: str) -> None:
    blob = layer(SPEC)
    rows = [row for row in blob.rows if row[0] != {"row missing": b"deep/empty", "last row missing": b"old"}.get(kind)]
    if kind == "row too many":
        rows.append((b"z", "l", 0o777, 0, 0, NS, 0, b"", b"x", 0, 0))
    false = pack(tar_of(blob), rows)
    capture(store, false, workspace="one")
    assert len(reasons(verify(store, level="content"), false.digest)) == 1


@pytest.mark.parametrize(("removed", "whiteouts"), [([b"x"], []), ([], [b"x"]), ([b"x"], [b"y"]), ([b"deep"], [])])
def test_whiteouts_are_the_removals_of_the_table(store: Store, removed: list[bytes], whiteouts: list[bytes]) -> None:
    blob = layer({b"new": File(b"n"), b"deep": Dir()}, removed, whiteouts=whiteouts)
    capture(store, layer({b"x": File(), b"deep": Dir()}), blob, workspace="one")
    assert "whiteouts" in reasons(verify(store, level="content"), blob.digest)[0]


def test_a_folder_that_a_file_replaces_needs_no_whiteout(store: Store) -> None:
    capture(store, layer(SPEC), layer({b"deep": File(b"now")}, [b"deep"], whiteouts=[]), workspace="one")
    assert verify(store, level="content").problems == []


def test_an_entry_below_a_link_of_a_lower_layer_is_found_deep(store: Store) -> None:
    digest = capture(store, layer(SPEC), layer({b"link/passwd": File(b"x")}), workspace="one")
    problems = verify(store, level="content").problems
    assert len(problems) == 1
    assert "lies in no folder" in problems[0].reason
    assert digest


def test_blobs_without_a_capture_are_checked_deep_and_harm_nobody(store: Store) -> None:
    pair(store)
    digest, _ = store.blobs.put(b"nobody needs this")
    assert verify(store, level="content").problems == []
    damage(store, digest)
    assert verify(store, None).problems == []
    assert [(problem.digest, problem.refs) for problem in verify(store, level="content").problems] == [(digest, [])]
    (store.blobs.folder / "stranger").write_bytes(b"")
    assert any("stranger" in problem.reason for problem in verify(store, level="content").problems)


def test_progress_is_reported_and_may_stop_the_check(store: Store) -> None:
    pair(store)
    seen: list[tuple[int, int]] = []
    verify(store, level="content", progress=lambda blobs, bytes: seen.append((blobs, bytes)))  # noqa: A006 -- the name of the argument
    assert len(seen) > 6
    assert seen == sorted(seen)

    def stop(**_: int) -> None:
        raise Cancelled(job="j")

    with pytest.raises(Cancelled):
        verify(store, progress=stop)


def test_checking_changes_nothing(store: Store, tmp_path: Path) -> None:
    below, *_ = pair(store)
    damage(store, below.digest, 9)

    def listing() -> list[Any]:
        return sorted((path, path.lstat().st_mtime_ns, path.lstat().st_size) for path in tmp_path.rglob("*"))

    before = listing()
    verify(store, level="content")
    assert listing() == before


BIG = layer({b"%03d" % number: File(random.Random(number).randbytes(number * 20)) for number in range(40)}, frame_bytes=4096)


@given(at=st.integers(0, len(BIG.data) - 1), bit=st.integers(0, 7), cut=st.booleans())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_damage_of_a_layer_stays_unseen(store: Store, at: int, bit: int, cut: bool) -> None:
    capture(store, BIG, workspace="one")
    damage(store, BIG.digest, at, flip=1 << bit, size=at if cut else None)
    try:
        assert reasons(verify(store, level="content"), BIG.digest)
    finally:
        store.blobs.path(BIG.digest).write_bytes(BIG.data)


# -- the tar reader -----------------------------------------------------------------------------------------------------


def members(store: Store, tar: bytes) -> list[Any]:
    with Tree.open(store, capture(store, pack(tar, []))) as tree:
        stream = TarStream(tree.layers[0])
        return list(stream.members())


def tar(*infos: tuple[tarfile.TarInfo, bytes], end: bytes = bytes(1024)) -> bytes:
    out = b""
    for info, content in infos:
        info.size = len(content)
        out += info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape") + content + bytes(-len(content) % 512)
    return out + end


def info(name: str, kind: bytes = tarfile.REGTYPE, **changes: Any) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type = kind
    for key, value in changes.items():
        setattr(made, key, value)
    return made


def test_members_written_by_pythons_tarfile_are_read(store: Store) -> None:
    found = members(
        store, tar((info("workspace/" + "d/" * 200 + "x", mtime=-7, uid=2**31), b"abc"), (info("workspace/\udce9"), b""))
    )
    assert found[0].path == b"workspace/" + b"d/" * 200 + b"x"
    assert (found[0].mtime, found[0].uid, found[0].size) == (-7, 2**31, 3)
    assert found[1].path == b"workspace/\xe9"


@pytest.mark.parametrize(
    "kind", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.CONTTYPE, b"g", b"S", b"L", b"K", b"\0"]
)
def test_other_types_of_members_are_refused(store: Store, kind: bytes) -> None:
    with pytest.raises(Corrupt):
        members(store, tar((info("workspace/x", kind), b"")))


@pytest.mark.parametrize("end", [b"", bytes(512), bytes(1536), bytes(1024) + b"x" * 512, bytes(512) + b"x" * 512])
def test_the_end_must_be_two_blocks_of_zeros_and_nothing_else(store: Store, end: bytes) -> None:
    with pytest.raises(Corrupt):
        members(store, tar((info("workspace/x"), b"x"), end=end))


@given(st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_tar_of_noise_raises_only_corrupt(store: Store, data: st.DataObject) -> None:
    good = bytearray(
        tar((info("workspace/" + "n" * 150, mtime=-1), b"hello"), (info("workspace/l", tarfile.SYMTYPE, linkname="x"), b""))
    )
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(good) - 1))
        good[at] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        for start in range(0, len(good) - 512, 512):  # make the checksums right again, as an enemy would
            block = good[start : start + 512]
            if block[257:262] == b"ustar":
                good[start + 148 : start + 156] = b"%06o\0 " % (sum(block) - sum(block[148:156]) + 256)
    try:
        members(store, bytes(good))
    except Corrupt:
        return
