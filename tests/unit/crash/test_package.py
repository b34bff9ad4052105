"""A crash package holds what was captured, nothing secret, and the same bytes for the same content."""

from __future__ import annotations

import json
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from mothball.crash import package as package_module
from mothball.crash.package import write_package_to
from mothball.crash.packages import list_packages, remove_package
from mothball.errors import AlreadyExists, Corrupt, InvalidParams, PathNotAllowed
from mothball.package.bundle_spec import runtime_spec
from mothball.package.rootfs import RootEntry
from mothball.store import Store
from mothball.store.manifest import load_manifest
from tests.support import TAR_FILTER, require_tool
from tests.unit.crash.packing import NAME, SECRET, TOKEN, content, members, pack, redactor, report_of, take, tree_of
from tests.unit.store.build import damage

NS = 1_700_000_000_987_654_321


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A workspace with one of everything that a capture holds."""
    root = tmp_path / "roots" / "w"
    (root / "src" / "deep").mkdir(parents=True)
    (root / "empty").mkdir()
    (root / "src" / "app.py").write_bytes(b"print('hello')\n")
    (root / "src" / "run.sh").write_bytes(b"#!/bin/sh\nexit 3\n")
    (root / "src" / "run.sh").chmod(0o755)
    (root / "src" / "again.sh").hardlink_to(root / "src" / "run.sh")
    (root / "src" / "deep" / "data.bin").write_bytes(bytes(range(256)) * 40)
    (root / "report.json").write_bytes(b'{"mine": true}')
    (root / "config.json").write_bytes(b"{}")
    (root / "link").symlink_to("src/app.py")
    (root / "outside").symlink_to("/etc/shadow")
    (root / "up").symlink_to("src/../../elsewhere")
    (root / ("n" * 180)).write_bytes(b"a long name")
    with open(os.fsencode(root) + b"/caf\xe9", "wb") as file:
        file.write(b"latin")
    for path in root.rglob("*"):
        os.utime(path, ns=(NS, NS), follow_symlinks=False)
    os.utime(root, ns=(NS, NS))
    return root


@pytest.fixture
def taken(tmp_path: Path, tree: Path) -> tuple[Store, str]:
    return take(tmp_path / "data", tree)


def folder_of(tmp_path: Path) -> Path:
    return tmp_path / "crash-reports"


def test_b54_b55_the_package_and_its_folder_are_for_their_owner_alone(tmp_path: Path, taken: tuple[Store, str]) -> None:
    made = pack(*taken, folder_of(tmp_path))
    assert made.path == str(folder_of(tmp_path) / f"{NAME}.tar")
    assert Path(made.path).stat().st_mode & 0o7777 == 0o600
    assert folder_of(tmp_path).stat().st_mode & 0o7777 == 0o700
    assert (made.bytes, made.sealed) == (Path(made.path).stat().st_size, False)
    assert subprocess.run(["sha256sum", made.path], capture_output=True, check=True).stdout.split()[0].decode() == made.sha256


def test_b56_the_report_comes_first_and_counts_what_is_there(tmp_path: Path, taken: tuple[Store, str]) -> None:
    made = pack(*taken, folder_of(tmp_path))
    found = members(made.path)
    names = list(found)
    assert names[:3] == ["report.json", "config.json", "rootfs"]
    assert found["report.json"][1] == made.report
    facts = json.loads(made.report)["package"]
    assert facts == made.facts.to_dict()
    mine = [member for name, (member, _) in found.items() if name.startswith("rootfs/workspace/")]
    assert facts["files"] == sum(member.isreg() or member.islnk() for member in mine) == 8
    assert facts["folders"] == sum(member.isdir() for member in mine) == 3
    assert (facts["symlinks"], facts["links_outside"]) == (3, 2)
    assert facts["bytes"] == sum(member.size for member in mine if member.isreg())
    assert (facts["binary_files"], facts["binary_bytes"]) == (1, 10240)
    assert facts["binaries"] == [{"path": "src/deep/data.bin", "size": 10240}]
    assert facts["redactions"] == {}


def test_a_file_called_report_json_in_the_workspace_does_not_clash(tmp_path: Path, taken: tuple[Store, str]) -> None:
    made = pack(*taken, folder_of(tmp_path))
    assert content(made.path, "report.json") == b'{"mine": true}'
    assert members(made.path)["report.json"][1] == made.report


def test_all_is_roots_and_nothing_is_setuid(tmp_path: Path, tree: Path) -> None:
    (tree / "src" / "run.sh").chmod(0o6755)
    made = pack(*take(tmp_path / "data", tree), folder_of(tmp_path))
    for member, _ in members(made.path).values():
        assert (member.uid, member.gid, member.uname, member.gname) == (0, 0, "", "")
        assert not member.mode & 0o6000
    assert members(made.path)["rootfs/workspace/src/again.sh"][0].mode == 0o755


def test_mount_points_are_empty_folders_of_the_rootfs(tmp_path: Path, taken: tuple[Store, str]) -> None:
    found = members(pack(*taken, folder_of(tmp_path)).path)
    for name in ("proc", "dev", "tmp", "workspace"):
        assert found[f"rootfs/{name}"][0].isdir()
    assert not [name for name in found if name.startswith(("rootfs/proc/", "rootfs/dev/", "rootfs/tmp/"))]


def test_the_same_content_makes_the_same_bytes(tmp_path: Path, taken: tuple[Store, str]) -> None:
    first, second = pack(*taken, tmp_path / "a"), pack(*taken, tmp_path / "b")
    assert first.sha256 == second.sha256
    assert Path(first.path).read_bytes() == Path(second.path).read_bytes()


def test_a_report_that_needs_more_room_than_was_left_for_it_still_comes_first(tmp_path: Path, taken: tuple[Store, str]) -> None:
    def talkative(facts: object) -> bytes:
        report = json.loads(report_of(facts))  # type: ignore[arg-type]
        return json.dumps({**report, "more": "x" * (3 * package_module.ROOM if report["package"]["files"] else 0)}).encode()

    made = pack(*taken, tmp_path / "a", report=talkative)
    plain = pack(*taken, tmp_path / "b")
    found, other = members(made.path), members(plain.path)
    assert found["report.json"][1] == made.report
    assert len(made.report) > package_module.ROOM
    assert list(found) == list(other)
    assert {name: data for name, (_, data) in found.items() if name != "report.json"} == {
        name: data for name, (_, data) in other.items() if name != "report.json"
    }


@pytest.mark.parametrize("room", [0, 512, 1024, 4096])
def test_the_report_fits_into_any_room(
    tmp_path: Path, taken: tuple[Store, str], room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package_module, "ROOM", room)
    made = pack(*taken, tmp_path / "a")
    assert members(made.path)["report.json"][1] == made.report
    assert len(members(made.path)) == len(members(pack(*taken, tmp_path / "b").path))


# -- unpacked elsewhere ------------------------------------------------------------------------------------------------


def test_gnu_tar_unpacks_what_was_captured(tmp_path: Path, tree: Path, taken: tuple[Store, str]) -> None:
    tar = require_tool("tar")
    made = pack(*taken, folder_of(tmp_path))
    target = tmp_path / "unpacked"
    target.mkdir()
    done = subprocess.run([tar, "-xpf", made.path], cwd=target, capture_output=True, timeout=60, check=True)
    # The one thing it says is about the name that is no UTF-8.
    said = {line.partition(b": ")[2] for line in done.stderr.splitlines()}
    assert said <= {b"Ignoring unknown extended header keyword 'hdrcharset'"}
    assert tree_of(target / "rootfs" / "workspace") == tree_of(tree)
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "report.json", "rootfs"]


def test_python_unpacks_what_was_captured(tmp_path: Path, tree: Path) -> None:
    (tree / "outside").unlink()
    (tree / "up").unlink()
    made = pack(*take(tmp_path / "data", tree), folder_of(tmp_path))
    target = tmp_path / "unpacked"
    target.mkdir()
    with tarfile.open(made.path, "r:", errors="surrogateescape") as tar:
        tar.extractall(target, **TAR_FILTER)  # noqa: S202 -- the package is our own
    was = tree_of(tree)
    now = tree_of(target / "rootfs" / "workspace")
    # Python's times are floats: to the microsecond.
    assert {path: _rounded(entry) for path, entry in now.items()} == {path: _rounded(entry) for path, entry in was.items()}


def _rounded(entry: tuple[object, ...]) -> tuple[object, ...]:
    return tuple(each // 100_000 if isinstance(each, int) and each > 10**15 else each for each in entry)


def test_busybox_unpacks_it_too(tmp_path: Path, taken: tuple[Store, str]) -> None:
    busybox = require_tool("busybox")
    made = pack(*taken, folder_of(tmp_path))
    target = tmp_path / "unpacked"
    target.mkdir()
    subprocess.run([busybox, "tar", "-xf", made.path], cwd=target, capture_output=True, timeout=60, check=True)
    assert (target / "report.json").read_bytes() == made.report
    assert (target / "rootfs" / "workspace" / "src" / "app.py").read_bytes() == b"print('hello')\n"


def test_the_package_is_a_bundle_that_runc_starts(tmp_path: Path, tree: Path) -> None:
    runc, tar, busybox = require_tool("runc"), require_tool("tar"), require_tool("busybox")
    if os.geteuid() != 0:
        pytest.skip("runc with a spec for root needs root")
    (tree / "busybox").write_bytes(Path(busybox).read_bytes())
    (tree / "busybox").chmod(0o755)
    spec = runtime_spec(args=["/workspace/busybox", "sh", "-c", "cat src/run.sh; exit 3"])
    made = pack(*take(tmp_path / "data", tree), folder_of(tmp_path), config=spec)
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    subprocess.run([tar, "-xpf", made.path], cwd=bundle, check=True, timeout=60)
    name = f"mothball-test-{os.getpid()}"
    done = subprocess.run(
        [runc, "--root", str(tmp_path / "state"), "run", "-b", str(bundle), name], capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 3, done.stderr
    assert done.stdout == b"#!/bin/sh\nexit 3\n"


# -- layers, bases, options --------------------------------------------------------------------------------------------


def test_the_package_of_a_capture_with_many_layers_is_that_of_one_layer(tmp_path: Path, tree: Path) -> None:
    store, _ = take(tmp_path / "data", tree)
    (tree / "src" / "app.py").unlink()
    (tree / "src" / "new.py").write_bytes(b"x = 1\n")
    os.utime(tree / "src" / "new.py", ns=(NS, NS))
    os.utime(tree / "src", ns=(NS, NS))
    _, second = take(tmp_path / "data", tree, fence=2)
    (tree / "src" / "run.sh").unlink()  # its second name now has to carry the content
    os.utime(tree / "src", ns=(NS, NS))
    _, third = take(tmp_path / "data", tree, fence=3)
    assert len(load_manifest(store.blobs, third).layers) > 1
    made = pack(store, third, tmp_path / "a")
    other, single = take(tmp_path / "other", tree)
    assert len(load_manifest(other.blobs, single).layers) == 1
    assert pack(other, single, tmp_path / "b").sha256 == made.sha256
    assert content(made.path, "src/again.sh") == b"#!/bin/sh\nexit 3\n"
    assert second != third


def test_binaries_are_left_out_on_request_and_listed(tmp_path: Path, tree: Path) -> None:
    (tree / "src" / "deep" / "other.bin").hardlink_to(tree / "src" / "deep" / "data.bin")
    made = pack(*take(tmp_path / "data", tree), folder_of(tmp_path), binaries="exclude")
    assert not [name for name in members(made.path) if name.endswith(".bin")]
    assert made.facts.left_out_counts == {"binary": 2}
    assert [(each.path, each.reason, each.size) for each in made.facts.left_out] == [
        ("src/deep/data.bin", "binary", 10240),
        ("src/deep/other.bin", "binary", 10240),
    ]
    assert (made.facts.files, made.facts.binary_files) == (7, 0)


class Image:
    """Files of a base as `mothball.package.base` gives them."""

    reference = "oci:/images/tools"
    digest = "sha256:" + "a" * 64

    def __init__(self, *entries: RootEntry) -> None:
        self._entries = entries

    def entries(self) -> object:
        return iter(self._entries)


def test_the_files_of_a_base_lie_around_the_workspace_and_are_redacted_too(tmp_path: Path, taken: tuple[Store, str]) -> None:
    base = Image(
        RootEntry(b"bin", "d", 0o755),
        RootEntry(b"bin/sh", "f", 0o755, NS, 9, b"", lambda: iter((b"#!binary\0",))),
        RootEntry(b"bin/tool", "h", 0o755, NS, 0, b"bin/sh"),
        RootEntry(b"etc", "d", 0o755),
        RootEntry(b"etc/token", "f", 0o644, NS, len(TOKEN), b"", lambda: iter((TOKEN,))),
        RootEntry(b"proc", "d", 0o700),
        RootEntry(b"zlink", "l", 0o777, NS, 0, b"bin/sh"),
    )
    made = pack(*taken, folder_of(tmp_path), base=base)
    found = members(made.path)
    assert found["rootfs/bin/sh"][1] == b"#!binary\0"
    assert found["rootfs/bin/tool"][0].linkname == "rootfs/bin/sh"
    assert found["rootfs/zlink"][0].linkname == "bin/sh"
    assert b"[redacted:github" in found["rootfs/etc/token"][1]
    assert TOKEN not in Path(made.path).read_bytes()
    assert (made.facts.files, made.facts.base) == (8, f"{Image.reference} {Image.digest}")
    assert made.facts.redactions == {"github": 1}


def test_a_large_binary_of_a_base_with_a_secret_is_left_out_and_a_sound_one_is_not(
    tmp_path: Path, taken: tuple[Store, str]
) -> None:
    bad, good = b"\0" * 5 * 1024**2 + TOKEN, b"\0" * 5 * 1024**2
    base = Image(
        RootEntry(b"lib", "d", 0o755),
        RootEntry(b"lib/bad.so", "f", 0o644, NS, len(bad), b"", lambda: iter((bad,))),
        RootEntry(b"lib/good.so", "f", 0o644, NS, len(good), b"", lambda: iter((good,))),
        RootEntry(b"lib/second.so", "h", 0o644, NS, 0, b"lib/bad.so"),
    )
    made = pack(*taken, folder_of(tmp_path), base=base)
    found = members(made.path)
    assert [(each.path, each.rules) for each in made.facts.left_out] == [
        ("/lib/bad.so", ["github"]),
        ("/lib/second.so", ["github"]),
    ]
    assert found["rootfs/lib/good.so"][1] == good
    assert "rootfs/lib/bad.so" not in found
    assert TOKEN not in Path(made.path).read_bytes()


def test_arguments_and_environment_of_the_command_are_redacted(tmp_path: Path, taken: tuple[Store, str]) -> None:
    spec = runtime_spec(args=["tool", "--password", SECRET.decode()], env={"API_TOKEN": SECRET.decode(), "LANG": "C"})
    made = pack(*taken, folder_of(tmp_path), config=spec)
    config = json.loads(members(made.path)["config.json"][1])
    assert SECRET not in Path(made.path).read_bytes()
    assert "LANG=C" in config["process"]["env"]
    assert config["process"]["args"][:2] == ["tool", "--password"]
    assert json.loads(spec)["root"] == config["root"]


def test_a_config_without_a_process_is_refused_before_anything_is_written(tmp_path: Path, taken: tuple[Store, str]) -> None:
    with pytest.raises(InvalidParams, match="no process"):
        pack(*taken, folder_of(tmp_path), config=b'{"ociVersion":"1.0.2"}')
    assert list(folder_of(tmp_path).iterdir()) == []


# -- where to ----------------------------------------------------------------------------------------------------------


def test_b55_what_is_there_is_never_replaced(tmp_path: Path, taken: tuple[Store, str]) -> None:
    first = pack(*taken, folder_of(tmp_path))
    with pytest.raises(AlreadyExists):
        pack(*taken, folder_of(tmp_path), binaries="exclude")
    with pytest.raises(AlreadyExists, match="delete that package"):
        pack(*taken, folder_of(tmp_path), seal=lambda clear, out: out.write(clear.read()) and None)
    assert [path.name for path in folder_of(tmp_path).iterdir()] == [f"{NAME}.tar"]
    assert Path(first.path).stat().st_size == first.bytes


@pytest.mark.parametrize("name", ["", "latest", "../crash-x", "crash-a/b", "crash-\u012e\u012e\u012f", "crash-\n"])
def test_b60_a_name_that_is_no_id_makes_no_file(tmp_path: Path, taken: tuple[Store, str], name: str) -> None:
    with pytest.raises(InvalidParams):
        pack(*taken, folder_of(tmp_path), name=name)
    assert not folder_of(tmp_path).exists()


def test_a_package_goes_to_a_path_of_the_callers_choice_but_not_into_the_store(tmp_path: Path, taken: tuple[Store, str]) -> None:
    store, digest = taken
    values = {"report": report_of, "config": runtime_spec(args=["true"])}
    made = write_package_to(store, digest, path=tmp_path / "x.tar", redactor=redactor(), **values)
    assert members(tmp_path / "x.tar")["report.json"][1] == made.report
    with pytest.raises(AlreadyExists):
        write_package_to(store, digest, path=tmp_path / "x.tar", redactor=redactor(), **values)
    with pytest.raises(PathNotAllowed):
        write_package_to(store, digest, path=store.root / "tmp" / "x.tar", redactor=redactor(), **values)
    with pytest.raises(InvalidParams):
        write_package_to(store, digest, path=tmp_path / "nowhere" / "x.tar", redactor=redactor(), **values)


def test_b58_packages_are_listed_and_removed_by_the_id_of_their_report(tmp_path: Path, taken: tuple[Store, str]) -> None:
    folder = folder_of(tmp_path)
    assert list_packages(folder) == []
    assert remove_package(folder, NAME) == []
    made = pack(*taken, folder)
    (folder / "notes.txt").write_text("mine")
    (folder / "crash-link.tar").symlink_to("/etc/passwd")
    found = list_packages(folder)
    assert [(each.id, each.path, each.bytes, each.sealed) for each in found] == [(NAME, made.path, made.bytes, False)]
    assert remove_package(folder, NAME) == [f"{NAME}.tar"]
    assert remove_package(folder, NAME) == []
    assert sorted(path.name for path in folder.iterdir()) == ["crash-link.tar", "notes.txt"]
    with pytest.raises(InvalidParams):
        remove_package(folder, "../crash-x")


def test_a_damaged_capture_makes_no_package_and_is_named(tmp_path: Path, taken: tuple[Store, str]) -> None:
    store, digest = taken
    layer = load_manifest(store.blobs, digest).layers[0].digest
    damage(store, layer, at=60)
    with pytest.raises(Corrupt) as caught:
        pack(store, digest, folder_of(tmp_path))
    assert caught.value.fields["digest"] == layer
    assert list(folder_of(tmp_path).iterdir()) == []
