"""A capture as a bundle: from what is stored and never changes, whole or not at all, a folder that a runtime takes as it is."""

from __future__ import annotations

import json
import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from mothball.errors import AlreadyExists, Corrupt, InvalidParams, NoSpace, PathNotAllowed
from mothball.package import writetree
from mothball.package.base import open_base
from mothball.package.bundle import BundleResult, check_place, workspace_entries, write_bundle
from mothball.package.bundle_spec import check_bundle
from mothball.settings import Settings
from mothball.store import Store
from mothball.store.toc import sort_key
from mothball.store.tree import Tree
from tests.unit.package.images import Layout, tar_of
from tests.unit.store.build import NS, Dir, File, Hard, Link, capture, damage, layer, new_store

ODD = b"not-utf8-\xff"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return new_store(tmp_path / "store")


@pytest.fixture
def digest(store: Store) -> str:
    below = layer({
        b"": Dir(mode=0o750), b"bin": Dir(), b"bin/tool": File(b"#!/bin/sh\n", mode=0o4755, uid=4711),
        b"secret": File(b"s", mode=0o600),
        b"config.json": File(b"not the bundle's"), b"link": Link(b"/etc/shadow"), b"out": Link(b"../../.."), ODD: File(b"odd"),
        b"h1": File(b"shared"), b"h2": Hard(b"h1"), b"empty": Dir(mode=0o1777), b"old": File(b"old"),
        b"big": File(os.urandom(5000)),
    })  # fmt: skip
    above = layer({b"": Dir(mode=0o750), b"new": File(b"new"), b"h1": File(b"changed")}, [b"old"])
    return capture(store, below, above, workspace="w")


def write(store: Store, digest: str, to: Path, **options: Any) -> BundleResult:
    return write_bundle(store, digest, to, **options)


def test_b110_b113_a_bundle_is_a_config_and_a_rootfs_that_holds_the_tree_with_modes_links_and_times(
    store: Store, digest: str, tmp_path: Path
) -> None:
    result = write(store, digest, tmp_path / "b", command=["/workspace/bin/tool"])
    assert sorted(os.listdir(tmp_path / "b")) == ["config.json", "rootfs"]
    root = tmp_path / "b/rootfs/workspace"
    assert result.files == 8
    assert sum(1 for path in (tmp_path / "b/rootfs").rglob("*") if path.is_file() and not path.is_symlink()) == 8
    assert (root / "bin/tool").read_bytes() == b"#!/bin/sh\n"
    assert stat.S_IMODE((root / "bin/tool").stat().st_mode) == 0o755  # without setuid
    assert stat.S_IMODE((root / "secret").stat().st_mode) == 0o600
    assert stat.S_IMODE(root.stat().st_mode) == 0o750
    assert stat.S_IMODE((root / "empty").stat().st_mode) == 0o1777
    assert (root / "bin/tool").stat().st_mtime_ns == root.stat().st_mtime_ns == NS
    assert (os.readlink(root / "link"), os.readlink(root / "out")) == ("/etc/shadow", "../../..")
    assert (os.fsencode(root) + b"/" + ODD) in [os.fsencode(path) for path in root.iterdir()]
    assert not (root / "old").exists()
    assert (root / "h2").read_bytes() == b"shared"  # its first name has another content now
    assert (root / "h1").read_bytes() == b"changed"
    assert (root / "config.json").read_bytes() == b"not the bundle's"
    assert all((path.lstat().st_uid, path.lstat().st_gid) == (os.geteuid(), os.getegid()) for path in root.rglob("*"))


def test_b112_its_config_is_a_real_spec_and_its_mount_points_are_there(store: Store, digest: str, tmp_path: Path) -> None:
    write(store, digest, tmp_path / "b", command=["/workspace/bin/tool", "x"])
    spec = check_bundle(tmp_path / "b")
    assert spec["process"]["args"] == ["/workspace/bin/tool", "x"]
    assert spec["process"]["cwd"] == "/workspace"
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["config.json", "rootfs"]
    assert sorted(path.name for path in (tmp_path / "b/rootfs").iterdir()) == ["dev", "proc", "sys", "tmp", "workspace"]
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o700


def test_b111_what_happens_to_the_workspace_later_does_not_reach_a_bundle(store: Store, digest: str, tmp_path: Path) -> None:
    write(store, digest, tmp_path / "one")
    later = capture(store, layer({b"other": File(b"x")}), workspace="w")
    write(store, digest, tmp_path / "two")
    assert later != digest
    tree = [sorted(str(path.relative_to(tmp_path / name)) for path in (tmp_path / name).rglob("*")) for name in ("one", "two")]
    assert tree[0] == tree[1]
    assert (tmp_path / "one/config.json").read_bytes() == (tmp_path / "two/config.json").read_bytes()


def test_b113_an_empty_workspace_is_a_bundle_too(store: Store, tmp_path: Path) -> None:
    result = write(store, capture(store, layer({})), tmp_path / "b")
    assert (result.files, result.bytes) == (0, 0)
    check_bundle(tmp_path / "b")


def test_hard_links_stay_links(store: Store, tmp_path: Path) -> None:
    write(store, capture(store, layer({b"a": File(b"x"), b"b": Hard(b"a")})), tmp_path / "b")
    root = tmp_path / "b/rootfs/workspace"
    assert (root / "a").stat().st_ino == (root / "b").stat().st_ino


def test_entries_come_as_a_tar_wants_them(store: Store, digest: str) -> None:
    with Tree.open(store, digest) as tree:
        found = list(workspace_entries(tree))
    assert found[0].path == b"workspace"
    assert [each.path for each in found] == sorted((each.path for each in found), key=sort_key)


def test_without_an_image_the_result_says_that_there_is_no_shell(store: Store, digest: str, tmp_path: Path) -> None:
    result = write(store, digest, tmp_path / "b")
    assert result.args == ["/bin/sh"]
    assert any("/bin/sh" in note and "--base" in note for note in result.notes)
    assert not any("is not in the bundle" in each for each in write(store, digest, tmp_path / "c", command=["bin/tool"]).notes)


def test_an_image_lies_around_the_workspace(store: Store, digest: str, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    layout.image(
        tar_of([("file", "bin/sh", "shell"), ("link", "workspace", "/etc"), ("file", "tmp/x", "1"), ("char", "dev/null", "")],
               modes={"bin/sh": 0o755}),
        config={"Cmd": ["sh"], "Env": ["FOO=bar"]},
    )  # fmt: skip
    (tmp_path / "scratch").mkdir()
    with open_base(f"oci:{layout.folder}:t", Settings(), tmp_path / "scratch") as base:
        result = write(store, digest, tmp_path / "b", base=base, env={"FOO": "mine"})
        assert result.base_digest == base.digest
    spec = check_bundle(tmp_path / "b")
    assert (result.args, result.left_out) == (["sh"], [("dev/null", "device")])
    assert "FOO=mine" in spec["process"]["env"]
    root = tmp_path / "b/rootfs"
    assert (root / "bin/sh").read_text() == "shell"
    assert (root / "workspace/new").read_text() == "new"
    assert not (root / "workspace").is_symlink()
    assert not list((root / "tmp").iterdir())
    assert not any("not in the bundle" in note for note in result.notes)


def test_a_rootless_bundle_belongs_to_whom_it_is_for(store: Store, digest: str, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        with pytest.raises(InvalidParams, match="only root"):
            write(store, digest, tmp_path / "b", rootless=True, owner=(1, 1))
        return
    write(store, digest, tmp_path / "b", rootless=True, owner=(1234, 1235))
    spec = check_bundle(tmp_path / "b")
    assert spec["linux"]["uidMappings"] == [{"containerID": 0, "hostID": 1234, "size": 1}]
    found = [tmp_path / "b", *(tmp_path / "b").rglob("*")]
    assert {(path.lstat().st_uid, path.lstat().st_gid) for path in found} == {(1234, 1235)}


def test_writable_is_said_in_the_spec(store: Store, digest: str, tmp_path: Path) -> None:
    result = write(store, digest, tmp_path / "b", writable=True)
    assert json.loads((tmp_path / "b/config.json").read_bytes())["root"]["readonly"] is False
    assert not any("--writable" in note for note in result.notes)


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def nothing_left(folder: Path, *kept: str) -> bool:
    return sorted(path.name for path in folder.iterdir()) == sorted(kept)


@pytest.fixture
def room(tmp_path: Path) -> Path:
    folder = tmp_path / "room"
    folder.mkdir()
    return folder


def test_what_is_there_is_never_replaced(store: Store, digest: str, room: Path) -> None:
    (room / "b").write_text("mine")
    with pytest.raises(AlreadyExists):
        write(store, digest, room / "b")
    with pytest.raises(AlreadyExists):
        write(store, digest, room / "b", roots=(room.parent,))
    assert (room / "b").read_text() == "mine"


def test_a_damaged_layer_leaves_nothing(store: Store, room: Path) -> None:
    blob = layer({b"a": File(os.urandom(3000))})
    digest = capture(store, blob)
    damage(store, blob.digest, 600)
    with pytest.raises(Corrupt):
        write(store, digest, room / "b")
    assert nothing_left(room)


def test_a_full_disk_leaves_nothing(store: Store, digest: str, room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: Any, place: int) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writetree.os, "pwrite", full)
    with pytest.raises(NoSpace):
        write(store, digest, room / "b")
    monkeypatch.undo()
    assert nothing_left(room)


def test_whoever_counts_may_end_it_and_nothing_is_left(store: Store, digest: str, room: Path) -> None:
    def tick(**_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(store, digest, room / "b", tick=tick)
    assert nothing_left(room)


@pytest.mark.parametrize("options", [{"command": [""]}, {"env": {"": "x"}}, {"memory": 5}, {"cwd": "x"}], ids=str)
def test_what_cannot_be_started_is_not_written(store: Store, digest: str, room: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidParams):
        write(store, digest, room / "b", **options)
    assert nothing_left(room)


def test_a_job_writes_below_the_roots_and_through_no_link(store: Store, digest: str, room: Path, tmp_path: Path) -> None:
    write(store, digest, room / "good", roots=(room,))
    (tmp_path / "elsewhere").mkdir()
    (room / "link").symlink_to(tmp_path / "elsewhere")
    for place in (tmp_path / "elsewhere/b", room / "link/b", room / "../elsewhere/b", store.root / "b", room):
        with pytest.raises((PathNotAllowed, InvalidParams)):
            write(store, digest, place, roots=(room,))
        with pytest.raises((PathNotAllowed, InvalidParams)):
            check_place(place, store, (room,))
    with pytest.raises(PathNotAllowed, match="inside the store"):
        write(store, digest, store.root / "b", roots=(store.root.parent,))
    with pytest.raises(InvalidParams, match="is not a folder"):
        write(store, digest, room / "gone/b", roots=(room,))
    assert nothing_left(tmp_path / "elsewhere")
    assert nothing_left(room, "good", "link")


def test_two_writers_of_one_name_do_not_mix(store: Store, digest: str, room: Path) -> None:
    ended: list[object] = []

    def one(command: str) -> None:
        try:
            ended.append(write(store, digest, room / "b", command=[command]).args[0])
        except AlreadyExists as error:
            ended.append(error)

    threads = [threading.Thread(target=one, args=(name,)) for name in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    won = [each for each in ended if isinstance(each, str)]
    assert len(won) == 1
    assert check_bundle(room / "b")["process"]["args"] == won
    assert nothing_left(room, "b")
