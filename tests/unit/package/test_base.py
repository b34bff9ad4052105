"""The image around a workspace: layers merged as the image specification says, and nothing believed that was not checked."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mothball.errors import Corrupt, InvalidParams, MothballError, NotFound, Oversize, PathNotAllowed
from mothball.package import base as base_module
from mothball.package import inflate
from mothball.package.base import open_base
from mothball.package.rootfs import RootEntry, skeleton
from mothball.package.tarread import Limits
from mothball.settings import Settings
from mothball.store.toc import sort_key
from tests.unit.package.images import INDEX, LAYER, MANIFEST, PACKS, Layout, Part, tar_of

DOCKER = "application/vnd.docker.distribution.manifest.v2+json"


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "layout")


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


def entries(reference: str, scratch: Path, **options: Any) -> dict[str, tuple[str, bytes]]:
    """path -> (kind, content or target)"""
    with open_base(reference, Settings(), scratch, **options) as base:
        found = list(base.entries())
        assert [sort_key(each.path) for each in found] == sorted(sort_key(each.path) for each in found)
        return {each.path.decode(): (each.kind, each.link or b"".join(each.pieces())) for each in found}


def merged(layout: Layout, scratch: Path, *layers: list[Part]) -> dict[str, tuple[str, bytes]]:
    layout.image(*(tar_of(each) for each in layers))
    return entries(f"oci:{layout.folder}:t", scratch)


@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("manifest", [MANIFEST, DOCKER])
def test_every_packing_and_both_manifests_are_read(layout: Layout, scratch: Path, pack: str, manifest: str) -> None:
    kind = LAYER + pack if manifest == MANIFEST else "application/vnd.docker.image.rootfs.diff.tar" + pack.replace("+", ".")
    layout.image(tar_of([("dir", "a", ""), ("file", "a/f", "x" * 3000)]), pack=pack, manifest_type=manifest, layer_type=kind)
    assert entries(f"oci:{layout.folder}", scratch) == {"a": ("d", b""), "a/f": ("f", b"x" * 3000)}


def test_an_archive_is_read_where_its_blobs_lie(layout: Layout, scratch: Path, tmp_path: Path) -> None:
    layout.image(tar_of([("file", "f", "content")]))
    path = layout.archive(tmp_path / "with:colon.tar")
    for reference in (f"oci-archive:{path}", f"oci-archive:{path}:t"):
        assert entries(reference, scratch) == {"f": ("f", b"content")}
    assert not list(scratch.iterdir())


def test_whiteouts_hide_what_lies_below_and_nothing_of_their_own_layer(layout: Layout, scratch: Path) -> None:
    found = merged(
        layout, scratch,
        [("dir", "a", ""), ("file", "a/old", "1"), ("file", "a/gone", "1"),
         ("dir", "b", ""), ("file", "b/x", "1"), ("file", "c", "1")],
        [("dir", "a", ""), ("file", "a/new", "2"), ("file", "a/.wh.gone", ""),
         ("file", "b/fresh", "2"), ("file", "b/.wh..wh..opq", ""),
         ("file", "c", "2"), ("file", ".wh.c", "")],
    )  # fmt: skip
    assert found == {
        "a": ("d", b""), "a/new": ("f", b"2"), "a/old": ("f", b"1"), "b": ("d", b""), "b/fresh": ("f", b"2"), "c": ("f", b"2"),
    }  # fmt: skip


def test_a_file_takes_the_place_of_a_folder_and_back(layout: Layout, scratch: Path) -> None:
    found = merged(
        layout, scratch, [("dir", "a", ""), ("file", "a/x", "1"), ("file", "b", "1")], [("file", "a", "2"), ("dir", "b", "")],
    )  # fmt: skip
    assert found == {"a": ("f", b"2"), "b": ("d", b"")}


def test_a_parent_that_is_a_link_is_followed_inside_the_image(layout: Layout, scratch: Path) -> None:
    found = merged(
        layout, scratch,
        [("dir", "usr/lib", ""), ("link", "lib", "usr/lib"), ("link", "abs", "/usr"), ("link", "usr/up", "../usr/./lib")],
        [("file", "lib/one", "1"), ("file", "abs/lib/two", "2"), ("file", "usr/up/three", "3")],
    )  # fmt: skip
    assert {name: found[name] for name in found if name.startswith("usr/lib/")} == {
        "usr/lib/one": ("f", b"1"), "usr/lib/two": ("f", b"2"), "usr/lib/three": ("f", b"3"),
    }  # fmt: skip
    assert found["lib"] == ("l", b"usr/lib")


def test_hard_links_may_lead_to_a_lower_layer_and_outlive_their_first_name(layout: Layout, scratch: Path) -> None:
    found = merged(
        layout, scratch, [("file", "z", "content"), ("hard", "m", "z")], [("hard", "a", "z")],
        [("file", ".wh.m", ""), ("file", ".wh.z", "")],
    )  # fmt: skip
    assert found == {"a": ("f", b"content")}
    layout.image(tar_of([("file", "z", "content"), ("hard", "m", "z")]))
    assert entries(f"oci:{layout.folder}", scratch) == {"m": ("f", b"content"), "z": ("h", b"m")}


def test_devices_are_left_out_and_said(layout: Layout, scratch: Path) -> None:
    layout.image(tar_of([("char", "d/null", ""), ("file", "f", "1")]))
    with open_base(f"oci:{layout.folder}", Settings(), scratch) as base:
        assert (base.left_out, base.left_out_count) == ([("d/null", "device")], 1)
        assert [each.path for each in base.entries()] == [b"d", b"f"]


def test_mount_points_are_real_folders_whatever_the_image_has_there(layout: Layout, scratch: Path) -> None:
    layout.image(
        tar_of([("link", "tmp", "/etc"), ("file", "proc", "x"), ("dir", "dev", ""), ("file", "dev/x", ""), ("dir", "workspace", ""),
                ("file", "workspace/old", "x"), ("file", "zz", "1"), ("file", "aa", "1"), ("file", "tmp2", "1"),
                ("hard", "b", "workspace/old")])
    )  # fmt: skip
    with open_base(f"oci:{layout.folder}", Settings(), scratch) as base:
        found = list(skeleton(base.entries()))
    assert [(each.path.decode(), each.kind) for each in found] == [
        ("aa", "f"), ("b", "f"), ("dev", "d"), ("proc", "d"), ("sys", "d"), ("tmp", "d"), ("tmp2", "f"),
        ("workspace", "d"), ("zz", "f"),
    ]  # fmt: skip


def test_the_config_says_what_to_start(layout: Layout, scratch: Path) -> None:
    config = {
        "Entrypoint": ["/bin/tool"],
        "Cmd": ["--help"],
        "Env": ["PATH=/bin", "A=b=c", "broken"],
        "WorkingDir": "/srv/",  # as some builders write it; nothing of ours works there
        "User": "app",
    }
    layout.image(tar_of([("file", "bin/tool", "x")], modes={"bin/tool": 0o4755}), config=config)
    with open_base(f"oci:{layout.folder}", Settings(), scratch) as base:
        assert (base.args, base.env) == (["/bin/tool", "--help"], {"PATH": "/bin", "A": "b=c"})
        assert base.has_program("tool", "/nowhere:/bin")
        assert base.has_program("/bin/tool", "")
        assert not base.has_program("other", "/bin")
        assert [each.mode for each in base.entries() if each.path == b"bin/tool"] == [0o755]  # without setuid


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ([("file", "../x", "1")], "leads out"),
        ([("file", "/etc/passwd", "1")], "absolute"),
        ([("link", "l", "../.."), ("file", "l/x", "1")], "leads out"),
        ([("dir", "d", ""), ("link", "d/l", "../../../etc"), ("file", "d/l/x", "1")], "leads out"),
        ([("link", "a", "b"), ("link", "b", "a"), ("file", "a/x", "1")], "too many links"),
        ([("hard", "h", "nowhere")], "no file in it"),
        ([("hard", "h", "../../etc/shadow")], "leads out"),
        ([("dir", "d", ""), ("hard", "h", "d")], "no file in it"),
        ([("file", "f", "1"), ("file", "f/x", "1")], "no folder"),
    ],
)
def test_b116_names_that_lead_out_of_the_image_are_refused(layout: Layout, scratch: Path, parts: list[Part], says: str) -> None:
    layout.image(tar_of(parts))
    with pytest.raises(InvalidParams, match=says):
        entries(f"oci:{layout.folder}", scratch)
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("what", ["layer", "config", "manifest", "missing", "short", "diff id", "no diff ids"])
def test_what_does_not_fit_its_digest_is_refused(layout: Layout, scratch: Path, what: str) -> None:
    tar = tar_of([("file", "f", "content")])
    ids = {"diff id": ["sha256:" + "0" * 64], "no diff ids": []}.get(what)
    made = layout.image(tar, diff_ids=ids)
    blobs = layout.folder / "blobs" / "sha256"
    manifest = json.loads((blobs / made["digest"][7:]).read_bytes())
    layer, config = (blobs / each["digest"][7:] for each in (manifest["layers"][0], manifest["config"]))
    if what == "layer":
        layer.write_bytes(PACKS["+gzip"](tar_of([("file", "f", "another")])))
    elif what == "config":
        config.write_bytes(config.read_bytes().replace(b"linux", b"linuX"))
    elif what == "manifest":
        (blobs / made["digest"][7:]).write_bytes(json.dumps(manifest).encode() + b" ")
    elif what == "missing":
        layer.unlink()
    elif what == "short":
        layer.write_bytes(layer.read_bytes()[:-5])
    with pytest.raises((Corrupt, NotFound)):
        entries(f"oci:{layout.folder}", scratch)
    assert not list(scratch.iterdir())


def test_the_image_for_this_machine_is_taken(layout: Layout, scratch: Path) -> None:
    other = layout.image(tar_of([("file", "other", "1")]), arch="s390x")
    ours = layout.image(tar_of([("file", "ours", "1")]))
    arch = json.loads((layout.folder / "blobs/sha256" / ours["digest"][7:]).read_bytes())
    config = json.loads((layout.folder / "blobs/sha256" / arch["config"]["digest"][7:]).read_bytes())
    inner = {
        "schemaVersion": 2, "mediaType": INDEX,
        "manifests": [
            {**other, "platform": {"os": "linux", "architecture": "s390x"}},
            {**ours, "platform": {"os": "linux", "architecture": config["architecture"]}},
        ],
    }  # fmt: skip
    layout.index([{"mediaType": INDEX, **layout.blob(json.dumps(inner).encode())}])
    assert entries(f"oci:{layout.folder}", scratch) == {"ours": ("f", b"1")}
    layout.index([{**other, "annotations": {"org.opencontainers.image.ref.name": "t"}}])
    with pytest.raises(InvalidParams, match="s390x"):
        entries(f"oci:{layout.folder}:t", scratch)


def test_an_index_that_names_itself_ends(layout: Layout, scratch: Path) -> None:
    entry: dict[str, Any] = {"mediaType": INDEX, **layout.blob(b'{"manifests":[]}')}
    for _ in range(6):
        entry = {
            "mediaType": INDEX,
            **layout.blob(json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": [entry]}).encode()),
        }
    layout.index([entry])
    with pytest.raises(InvalidParams, match="nested"):
        entries(f"oci:{layout.folder}", scratch)


@pytest.mark.parametrize(
    "reference", ["", "oci:", "/some/path", "./x", "nothing", "oci:a\0b", "http://x/y:z", "reg.example.org/no-tag", "oci-archive:"]
)
def test_what_names_no_image_is_one_clear_error(scratch: Path, reference: str) -> None:
    with pytest.raises((InvalidParams, NotFound)):
        entries(reference, scratch)


def test_a_job_reads_no_layout_outside_the_roots(layout: Layout, scratch: Path, tmp_path: Path) -> None:
    layout.image(tar_of([("file", "f", "1")]))
    inside, outside = tmp_path / "roots", tmp_path / "other"
    inside.mkdir()
    outside.mkdir()
    assert entries(f"oci:{layout.folder}", scratch, roots=(tmp_path,))
    with pytest.raises(PathNotAllowed):
        entries(f"oci:{layout.folder}", scratch, roots=(inside,))
    (inside / "link").symlink_to(tmp_path)
    with pytest.raises(PathNotAllowed):
        entries(f"oci:{inside}/link/layout", scratch, roots=(inside,))
    (inside / "direct").symlink_to(layout.folder)
    with pytest.raises(PathNotAllowed):
        entries(f"oci:{inside}/direct", scratch, roots=(inside,))


def test_a_bomb_is_refused(layout: Layout, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout.image(tar_of([("file", "zeros", bytes(8 * 1024**2))]))
    monkeypatch.setattr(inflate, "FREE_BYTES", 1024**2)
    with pytest.raises(Oversize, match="bombs"):
        entries(f"oci:{layout.folder}", scratch)
    assert not list(scratch.iterdir())


def test_limits_hold_for_all_layers_together(layout: Layout, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout.image(*(tar_of([("file", f"f{number}", "1")]) for number in range(3)))
    monkeypatch.setattr(base_module, "LIMITS", Limits(members=2))
    with pytest.raises(Oversize):
        entries(f"oci:{layout.folder}", scratch)


def test_a_blob_that_is_a_pipe_does_not_hang_a_reader(layout: Layout, scratch: Path) -> None:
    made = layout.image(tar_of([("file", "f", "1")]))
    path = layout.folder / "blobs/sha256" / made["digest"][7:]
    path.unlink()
    os.mkfifo(path)
    with pytest.raises((InvalidParams, NotFound)):
        entries(f"oci:{layout.folder}", scratch)


NAMES = st.lists(st.sampled_from(["a", "b", "..", "c", "."]), min_size=1, max_size=4).map("/".join)
PARTS = st.lists(
    st.tuples(st.just("file"), NAMES, st.just("x"))
    | st.tuples(st.just("dir"), NAMES, st.just(""))
    | st.tuples(st.sampled_from(["link", "hard"]), NAMES, NAMES | NAMES.map(lambda name: "/" + name))
    | st.tuples(st.just("file"), NAMES.map(lambda name: f"{name}/.wh.a"), st.just(""))
    | st.tuples(st.just("file"), NAMES.map(lambda name: f"{name}/.wh..wh..opq"), st.just("")),
    max_size=8,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layers=st.lists(PARTS, min_size=1, max_size=3))
def test_whatever_layers_say_paths_stay_inside_and_every_parent_is_a_folder(tmp_path: Path, layers: list[list[Part]]) -> None:
    folder = tmp_path / hashlib.sha256(repr(layers).encode()).hexdigest()
    if folder.exists():
        return
    layout = Layout(folder)
    layout.image(*(tar_of(each) for each in layers), pack="")
    try:
        with open_base(f"oci:{folder}", Settings(), tmp_path) as base:
            found: list[RootEntry] = list(base.entries())
    except MothballError:
        return
    kinds = {each.path: each.kind for each in found}
    assert len(kinds) == len(found)
    for each in found:
        assert b".." not in each.path.split(b"/")
        assert not each.path.startswith(b"/")
        above = each.path.rpartition(b"/")[0]
        assert not above or kinds[above] == "d"
        assert each.kind != "h" or kinds[each.link] == "f"
