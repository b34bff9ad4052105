"""Verify where things are in the place of others: links, pipes, folders, nothing. It ends, and says what is wrong."""

from __future__ import annotations

import json
import os
import shutil
import stat
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from mothball.errors import Cancelled, Corrupt
from mothball.package.contents import check_contents
from mothball.package.held import held
from mothball.store import Store
from mothball.store.manifest import PREFIX, load_manifest
from mothball.store.verify import Level, VerifyReport, verify
from tests.unit.store.build import Dir, File, capture, layer, new_store

KINDS = ["fifo", "folder", "link", "loop", "dangling", "socket", "missing", "empty"]
PARTS = ["layer", "manifest", "config", "index.json", "oci-layout", "blobs"]
NO_CAPTURE_YET = ("index.json", "missing")
"""A layout without index is one before the first capture; `mothball doctor` knows from the record that there were some."""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return new_store(tmp_path / "store")


def put(path: Path, kind: str) -> None:
    """Something of `kind` in the place of what is at `path`."""
    if os.path.lexists(path):
        path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind in {"link", "loop", "dangling"}:
        path.symlink_to({"link": "/etc/passwd", "loop": path.name, "dangling": "/nowhere"}[kind])
    elif kind == "socket":
        os.mknod(path, stat.S_IFSOCK | 0o600)
    elif kind == "empty":
        path.touch()


def named(report: VerifyReport) -> set[tuple[str, str]]:
    return {(problem.digest, ref) for problem in report.problems for ref in problem.refs or [""]}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("level", ["structure", "content"])
@pytest.mark.parametrize(("what", "kind"), [each for each in product(PARTS, KINDS) if each != NO_CAPTURE_YET])
def test_whatever_stands_in_the_place_of_a_part_is_named(store: Store, what: str, kind: str, level: Level) -> None:
    blob = layer({b"": Dir(), b"a": File(b"a" * 9000)})
    digest = capture(store, blob, workspace="w")
    manifest = load_manifest(store.blobs, digest)
    parts = {"layer": blob.digest, "manifest": digest, "config": manifest.config.digest}
    put(store.blobs.path(parts[what]) if what in parts else store.refs("w").folder / what, kind)
    assert named(verify(store, None, level)) == {(parts[what], "w:latest") if what in parts else ("", "w")}
    if what in parts:
        with pytest.raises(Corrupt, match=parts[what]), held(store, digest):
            pass


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "missing"])
def test_whatever_has_the_name_of_a_blob_that_nobody_uses_is_looked_at(store: Store, kind: str) -> None:
    put(store.blobs.folder / ("0" * 64), kind)
    assert named(verify(store, None, "deep")) == {("sha256:" + "0" * 64, "")}


@pytest.mark.parametrize("how", ["missing", "file"])
def test_a_store_that_lost_its_layouts_is_not_whole(store: Store, how: str) -> None:
    capture(store, layer({b"a": File(b"a")}), workspace="w")
    shutil.rmtree(store.root / "workspaces")
    if how == "file":
        (store.root / "workspaces").touch()
    (problem,) = verify(store, None).problems
    assert "nothing says which captures there are" in problem.reason


def test_an_index_with_one_name_twice_is_damaged_and_nothing_in_it_is_passed_over(store: Store) -> None:
    digest = capture(store, layer({b"a": File(b"a")}), workspace="w")
    path = store.refs("w").folder / "index.json"
    index = json.loads(path.read_text())
    first: dict[str, Any] = index["manifests"][0]
    lost = "sha256:" + "1" * 64
    index["manifests"] += [{**first, "digest": "no digest"}, {**first, "digest": lost}]
    path.write_text(json.dumps(index))
    reasons = {(problem.digest, problem.reason) for problem in verify(store, None).problems}
    assert reasons == {
        ("", "its index has more than one capture with the name 'latest'"),
        ("", "it names 'no digest', which is no sha256 digest"),
        (lost, "it is missing from the store"),
    }
    assert store.blobs.exists(digest)


def test_a_generation_that_is_no_number_is_damage_and_no_surprise(store: Store) -> None:
    capture(store, layer({b"a": File(b"a")}), workspace="w")
    path = store.refs("w").folder / "index.json"
    index = json.loads(path.read_text())
    for text in ("x", "", "-1", "9" * 5000, "\xb2"):
        index["manifests"][0]["annotations"][PREFIX + "generation"] = text
        path.write_text(json.dumps(index))
        with pytest.raises(Corrupt, match="no number"):
            _ = store.refs("w").get().generation


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
def test_what_may_not_be_read_is_said_for_each_part(tmp_path: Path) -> None:
    """As another user, since root may read everything."""
    store = new_store(tmp_path / "store")
    blob = layer({b"": Dir(), b"a": File(b"a" * 9000)})
    digest = capture(store, blob, workspace="w")
    for path in [tmp_path, *tmp_path.parents, *tmp_path.rglob("*")][:-1]:
        if path.is_relative_to(tmp_path):
            os.chown(path, 65534, 65534, follow_symlinks=False)
    cases: list[tuple[Path, int]] = [
        (store.blobs.path(blob.digest), 0), (store.blobs.path(digest), 0), (store.refs("w").folder / "index.json", 0),
        (store.blobs.folder, 0o600), (store.blobs.folder, 0), (store.root / "workspaces", 0), (store.refs("w").folder, 0),
    ]  # fmt: skip
    for path, mode in cases:
        before = path.stat().st_mode & 0o777
        path.chmod(mode)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            try:
                # The folders above belong to the user of the tests.
                os.chdir(tmp_path)
                os.setresgid(65534, 65534, 65534)
                os.setresuid(65534, 65534, 65534)
                report = verify(Store(Path("store")), None, "deep")
                os.write(write, json.dumps([problem.reason for problem in report.problems]).encode())
            except BaseException as error:
                os.write(write, json.dumps([f"raised {error!r}"]).encode())
            os._exit(0)
        os.close(write)
        with os.fdopen(read, "rb") as answer:
            reasons = json.loads(answer.read())
        os.waitpid(child, 0)
        path.chmod(before)
        assert reasons, path
        assert any("cannot be read: Permission denied" in reason or "missing or damaged" in reason for reason in reasons), (
            path,
            reasons,
        )
        assert not any("raised" in reason for reason in reasons), (path, reasons)


def test_one_large_file_or_very_many_rows_are_reported_while_they_are_read(store: Store) -> None:
    """A few kilobytes may hold gigabytes of zeros: whoever waits must hear of it, and be heard."""
    blob = layer(
        {b"": Dir(), b"zeros": File(bytes(3_000_000)), **{b"e%05d" % n: File() for n in range(5000)}}, frame_bytes=64 * 1024
    )
    digest = capture(store, blob, workspace="w")
    seen: list[int] = []
    verify(store, None, "content", progress=lambda **counts: seen.append(counts["bytes"]))
    within = {count for count in seen if 500_000 < count < 2_500_000}
    assert len(within) > 20
    reported: list[int] = []
    check_contents(store, digest, reported.append, lambda _: False)
    assert len({count for count in reported if 500_000 < count < 2_500_000}) > 20
    calls = [0]

    def stop(**_: object) -> None:
        calls[0] += 1
        if calls[0] > 3:
            raise Cancelled(job="1")

    with pytest.raises(Cancelled):
        verify(store, None, "structure", progress=stop)
