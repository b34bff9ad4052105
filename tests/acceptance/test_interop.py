"""What other tools make of a capture: skopeo reads it, a registry keeps it, buildah unpacks the tree it was taken of."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mothball.capture import CaptureRequest, CaptureResult, capture_workspace
from mothball.settings import Settings
from mothball.store import Store
from mothball.store.manifest import MEDIA_LAYER
from mothball.store.tree import Tree
from mothball.store.verify import verify
from tests.acceptance.registry import ImageRegistry
from tests.support import missing, require_tool

WORKSPACE = "owner/repo#12"
Facts = dict[bytes, tuple[Any, ...]]


class Host:
    """A store with one workspace, captured in process."""

    def __init__(self, settings: Settings, tree: Path) -> None:
        self.settings = settings
        self.tree = tree
        self.store = Store(settings.store_dir)
        self.generation = 0

    @property
    def image(self) -> str:
        return f"oci:{self.store.refs(WORKSPACE).folder}:latest"

    def capture(self) -> CaptureResult:
        self.generation += 1
        request = CaptureRequest(
            workspace=WORKSPACE, path=str(self.tree), host=self.settings.host, job=f"job-{self.generation}", fence=self.generation
        )
        return capture_workspace(request, self.settings, checkpoint=lambda *_: None)


@pytest.fixture
def host(tmp_path: Path, make_settings: Callable[..., Settings]) -> Host:
    tree = tmp_path / "tree"
    tree.mkdir()
    return Host(make_settings(frame_bytes=64 * 1024), tree)


def run(*command: str) -> str:
    done = subprocess.run([require_tool(command[0]), *command[1:]], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "policy.json"
    path.write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
    return path


def skopeo(policy: Path, *arguments: str) -> str:
    return run("skopeo", "--policy", str(policy), *arguments)


# -- trees --------------------------------------------------------------------------------------------------------------


def put(root: Path, path: bytes, content: bytes, mode: int = 0o644) -> None:
    target = os.fsencode(root) + b"/" + path
    os.makedirs(target.rpartition(b"/")[0], exist_ok=True)
    Path(os.fsdecode(target)).write_bytes(content)
    Path(os.fsdecode(target)).chmod(mode)


def plant(root: Path) -> None:
    """A tree with everything that is easy to lose."""
    put(root, b"README.md", b"# read me\n" * 40)
    put(root, b"bin/run", b"#!/bin/sh\nexit 0\n", 0o755)
    put(root, b"bin/setuid", b"x", 0o4755)
    put(root, b"private/key", b"secret", 0o600)
    put(root, b"private/none", b"", 0o000)
    put(root, b"big/random", os.urandom(300_000))
    put(root, b"big/zeros", bytes(500_000))
    put(root, b"latin-\xe9/caf\xe9", b"latin")
    put(root, b"new\nline/a\nb", b"newline")
    put(root, "unicode/日本語/é".encode(), b"unicode")
    put(root, b"long/" + b"/".join([b"d" * 60] * 5) + b"/" + b"n" * 200, b"long")
    put(root, b"spaces and 'quotes'/\"x\" \\ *?[]", b"odd")
    put(root, b"-dash", b"dash")
    put(root, b".hidden/.file", b"hidden")
    put(root, b"replaced/inside", b"was a folder")
    put(root, b"replaced/deep/er", b"was a folder")
    put(root, b"removed/a", b"a")
    put(root, b"removed/b/c", b"c")
    put(root, b"kept/a", b"a")
    put(root, b"kept/b", b"b")
    for path, mode in (("empty", 0o755), ("empty/inner", 0o700), ("sticky", 0o1777), ("setgid", 0o2775)):
        (root / path).mkdir()
        (root / path).chmod(mode)
    (root / "private").chmod(0o700)
    (root / "link").symlink_to("README.md")
    (root / "link-out").symlink_to("/etc/passwd")
    (root / "link-up").symlink_to("../../../etc/shadow")
    (root / "link-folder").symlink_to("bin")
    (root / "link-nowhere").symlink_to("x" * 150)
    (root / "link-latin").symlink_to(os.fsdecode(b"latin-\xe9"))
    put(root, b"hard/first", b"two names")
    (root / "hard" / "second").hardlink_to(root / "hard" / "first")
    (root / "hard" / "third").hardlink_to(root / "hard" / "first")


def facts(root: Path, *, ids: bool = True) -> Facts:
    """Everything below `root` by path: type, mode, owner, whole seconds of mtime, content or target, and who shares an inode."""
    found: Facts = {}
    inodes: dict[int, bytes] = {}
    base = os.fsencode(root)
    for folder, folders, files in os.walk(base):
        folders.sort()
        for name in [b".", *sorted(folders), *sorted(files)] if folder == base else sorted(folders) + sorted(files):
            full = folder + b"/" + name
            path = os.path.relpath(full, base)
            st = os.lstat(full)
            entry: list[Any] = [stat.S_IFMT(st.st_mode)]
            if stat.S_ISLNK(st.st_mode):
                entry += [os.readlink(full)]
            else:
                entry += [oct(st.st_mode & 0o7777), int(st.st_mtime_ns // 10**9)]
            if stat.S_ISREG(st.st_mode):
                entry += [hashlib.sha256(Path(os.fsdecode(full)).read_bytes()).hexdigest()]
                if st.st_nlink > 1:
                    entry += [inodes.setdefault(st.st_ino, path)]
            found[path] = (*entry, (st.st_uid, st.st_gid) if ids else None)
    return found


class Buildah:
    """buildah with storage of its own, and a container of each image asked for."""

    def __init__(self, base: Path, policy: Path) -> None:
        self._base = base
        self._policy = policy
        self._containers: list[str] = []

    def run(self, command: str, *arguments: str) -> str:
        storage = ["--root", str(self._base / "root"), "--runroot", str(self._base / "run"), "--storage-driver", "vfs"]
        return run("buildah", *storage, command, *arguments).strip()

    def unpack(self, image: str) -> Path:
        """Where the file system of `image` is mounted."""
        name = self.run(
            "from", "--isolation", "chroot", "--signature-policy", str(self._policy), "--pull-always", "--tls-verify=false", image
        )
        self._containers.append(name)
        return Path(self.run("mount", name))

    def close(self) -> None:
        for name in self._containers:
            self.run("umount", name)
            self.run("rm", name)


@pytest.fixture
def buildah(tmp_path: Path, policy: Path) -> Iterator[Buildah]:
    require_tool("buildah")
    if os.geteuid() != 0:
        missing("root, which buildah needs to unpack owners and modes,")
    tool = Buildah(tmp_path / "buildah", policy)
    yield tool
    tool.close()


# -- reading ------------------------------------------------------------------------------------------------------------


def test_skopeo_inspects_a_capture(host: Host, policy: Path) -> None:
    plant(host.tree)
    result = host.capture()
    found = json.loads(skopeo(policy, "inspect", host.image))
    assert found["Digest"] == result.digest
    assert len(found["Layers"]) == 1
    assert found["Os"] == "linux"
    assert json.loads(found["Labels"]["dev.mothball.omissions"]) is not None
    raw = json.loads(skopeo(policy, "inspect", "--raw", host.image))
    assert raw["layers"][0]["mediaType"] == MEDIA_LAYER
    config = json.loads(skopeo(policy, "inspect", "--config", "--raw", host.image))
    assert len(config["rootfs"]["diff_ids"]) == 1
    assert config["config"]["WorkingDir"] == "/workspace"


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[str]:
    """The address of a registry on loopback that keeps its blobs below tmp_path."""
    with ImageRegistry(tmp_path / "registry") as running:
        yield running.address


def test_skopeo_takes_a_capture_to_a_registry_and_back_with_the_same_digests(
    host: Host, policy: Path, registry: str, tmp_path: Path
) -> None:
    plant(host.tree)
    host.capture()
    put(host.tree, b"kept/a", b"changed")
    shutil.rmtree(host.tree / "removed")
    result = host.capture()
    remote = f"docker://{registry}/captures/{host.store.refs(WORKSPACE).folder.name.lower()}:latest"
    skopeo(policy, "copy", "--preserve-digests", "--dest-tls-verify=false", host.image, remote)
    assert json.loads(skopeo(policy, "inspect", "--tls-verify=false", remote))["Digest"] == result.digest
    back = tmp_path / "back"
    skopeo(policy, "copy", "--preserve-digests", "--src-tls-verify=false", remote, f"oci:{back}:latest")
    (descriptor,) = json.loads((back / "index.json").read_bytes())["manifests"]
    assert descriptor["digest"] == result.digest
    names = {path.name for path in (back / "blobs" / "sha256").iterdir()}
    assert len(names) == 4
    for name in names:
        data = (back / "blobs" / "sha256" / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == name
        assert (host.store.blobs.folder / name).read_bytes() == data


def test_skopeo_copies_every_ref_of_a_workspace_by_name(host: Host, policy: Path, tmp_path: Path) -> None:
    plant(host.tree)
    first = host.capture()
    index = host.store.refs(WORKSPACE)
    ref = index.get("latest")
    index.publish("snap-1", ref.digest, ref.size, ref.annotations, fence=host.generation, job=f"job-{host.generation}")
    put(host.tree, b"more", b"more")
    second = host.capture()
    for name, digest in (("snap-1", first.digest), ("latest", second.digest)):
        image = host.image.rpartition(":")[0] + ":" + name
        assert json.loads(skopeo(policy, "inspect", image))["Digest"] == digest
        skopeo(policy, "copy", "--preserve-digests", image, f"oci:{tmp_path / 'copy'}:{name}")


# -- unpacking ----------------------------------------------------------------------------------------------------------


def test_what_buildah_unpacks_is_the_tree(host: Host, buildah: Buildah) -> None:
    plant(host.tree)
    result = host.capture()
    assert result.torn == []
    assert result.omitted == {}
    expected = facts(host.tree)
    assert len(expected) > 50
    assert facts(buildah.unpack(host.image) / "workspace") == expected


def _but_times_of_folders(found: tuple[Any, ...]) -> tuple[Any, ...]:
    """A layer that changes a file does not name its folder, whose time is then that of the unpacking."""
    return (*found[:2], *found[3:]) if found[0] == stat.S_IFDIR else found


def test_what_buildah_unpacks_is_the_tree_after_every_generation(host: Host, buildah: Buildah) -> None:
    root = host.tree
    plant(root)
    host.capture()

    def second() -> None:
        """Whiteouts, a folder that becomes a file, a file that becomes a folder, modes and links."""
        shutil.rmtree(root / "removed")
        shutil.rmtree(root / "replaced")
        put(root, b"replaced", b"a file now", 0o640)
        (root / "-dash").unlink()
        put(root, b"-dash/inside", b"a folder now")
        (root / "bin" / "run").chmod(0o700)
        (root / "link").unlink()
        (root / "link").symlink_to("bin/run")
        (root / "link-folder").unlink()
        put(root, b"link-folder/now", b"a folder")
        os.unlink(os.fsencode(root) + b"/latin-\xe9/caf\xe9")
        os.unlink(os.fsencode(root) + b"/new\nline/a\nb")
        (root / "hard" / "first").unlink()
        (root / "empty" / "inner").rmdir()

    def third() -> None:
        """Back again: the file is a folder with other content, what was removed is there anew."""
        (root / "replaced").unlink()
        put(root, b"replaced/other", b"a folder again")
        shutil.rmtree(root / "-dash")
        put(root, b"-dash", b"a file again")
        put(root, b"removed/b/new", b"new")
        put(root, b"hard/first", b"no longer shared")
        put(root, b"latin-\xe9/caf\xe9", b"back")
        shutil.rmtree(root / "link-folder")
        (root / "link-folder").symlink_to("kept")

    def fourth() -> None:
        """Links that come and go, everything of a folder gone but the folder."""
        (root / "kept" / "b").unlink()
        (root / "kept" / "b").hardlink_to(root / "kept" / "a")
        (root / "hard" / "third").unlink()
        shutil.rmtree(root / "replaced")
        (root / "replaced").mkdir(mode=0o711)
        (root / "empty").chmod(0o750)

    def fifth() -> None:
        """Nothing but one name."""
        (root / "README.md").rename(root / "READ.me")

    for change in (second, third, fourth, fifth):
        change()
        result = host.capture()
        assert result.changed
        unpacked = facts(buildah.unpack(host.image) / "workspace")
        expected = facts(root)
        assert unpacked.keys() == expected.keys(), change.__name__
        different = {
            path: (unpacked[path], expected[path])
            for path in expected
            if _but_times_of_folders(unpacked[path]) != _but_times_of_folders(expected[path])
        }
        assert different == {}, change.__name__
    assert result.layers == 5
    assert verify(host.store, WORKSPACE, "content").problems == []


def test_what_buildah_unpacks_after_a_squash_is_the_tree(host: Host, buildah: Buildah) -> None:
    host.settings = Settings(**{**host.settings.model_dump(), "max_layers": 2})
    plant(host.tree)
    for number in range(3):
        put(host.tree, b"kept/a", b"%d" % number)
        result = host.capture()
    assert result.squashed
    assert facts(buildah.unpack(host.image) / "workspace") == facts(host.tree)


def test_a_capture_with_clamped_owners_unpacks_as_root(host: Host, buildah: Buildah) -> None:
    host.settings = Settings(**{**host.settings.model_dump(), "owner": "clamp"})
    plant(host.tree)
    for path in host.tree.rglob("*"):
        os.chown(path, 1234, 4321, follow_symlinks=False)
    host.capture()
    unpacked, expected = facts(buildah.unpack(host.image) / "workspace"), facts(host.tree)
    assert {path: value[:-1] for path, value in unpacked.items()} == {path: value[:-1] for path, value in expected.items()}
    assert {value[-1] for value in unpacked.values()} == {(0, 0)}
    assert {value[-1] for path, value in expected.items() if path != b"."} == {(1234, 4321)}


def test_a_moved_mtime_alone_is_told_by_the_table_of_contents_only(host: Host, buildah: Buildah) -> None:
    """A touched file costs a row and no content; whoever unpacks the tar alone gets the mtime of the content's layer."""
    put(host.tree, b"big", os.urandom(200_000))
    host.capture()
    os.utime(host.tree / "big", ns=(10**18, 10**18 + 1))
    result = host.capture()
    assert result.changed
    assert result.stored_bytes < 20_000
    with Tree.open(host.store, result.digest) as tree:
        assert tree.find("big").mtime_ns == 10**18 + 1
    unpacked, expected = facts(buildah.unpack(host.image) / "workspace")[b"big"], facts(host.tree)[b"big"]
    assert (unpacked[:2], unpacked[3:]) == (expected[:2], expected[3:])
