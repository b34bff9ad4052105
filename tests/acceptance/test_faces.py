"""One digest, the same content in every face: restored, as tar, as image of each kind, and from a registry."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mothball.package.layout import export_archive, export_layout
from mothball.package.remote import pull, push
from mothball.package.tar import write_tar
from mothball.settings import Settings
from mothball.store import Store
from mothball.store.restore import restore
from mothball.store.tree import Tree
from tests.acceptance.registry import ImageRegistry, image_registry
from tests.acceptance.test_interop import Buildah, Facts, Host, buildah, facts, host, plant, policy, put, run, skopeo
from tests.support import missing, require_tool

__all__ = ["buildah", "host", "image_registry", "policy"]  # fixtures


@pytest.fixture
def captured(host: Host) -> Iterator[tuple[Host, str]]:
    """Three generations of a tree with everything that is easy to lose, and the digest of the last."""
    root = host.tree
    plant(root)
    host.capture()
    shutil.rmtree(root / "removed")
    shutil.rmtree(root / "replaced")
    put(root, b"replaced", b"a file now", 0o640)
    (root / "-dash").unlink()
    put(root, b"-dash/inside", b"a folder now")
    (root / "hard" / "first").unlink()
    (root / "link").unlink()
    (root / "link").symlink_to("bin/run")
    host.capture()
    put(root, b"removed/b/new", b"new")
    (root / "bin" / "run").chmod(0o700)
    os.utime(root / "README.md", ns=(1, 1_500_000_000_123_456_789))
    result = host.capture()
    assert (result.omitted, result.torn, result.layers) == ({}, [], 3)
    yield host, result.digest


def exact(root: Path) -> Facts:
    """`facts`, with times to the nanosecond, of links too."""
    base = os.fsencode(root)
    return {path: (*found, os.lstat(base + b"/" + path).st_mtime_ns) for path, found in facts(root).items()}


def without_times(found: Facts) -> Facts:
    """Each entry without its mtime, which stands behind type and mode: a layer names neither the times of the folders
    above a change nor a time that moved alone."""
    out: Facts = {}
    for path, entry in found.items():
        timed = len(entry) > 3 and isinstance(entry[2], int)
        out[path] = (*entry[:2], *entry[3:]) if timed else entry
    return out


def tar_of(store: Store, digest: str, path: Path) -> str:
    with Tree.open(store, digest) as tree, path.open("wb") as out:
        return write_tar(tree, out).sha256


def untar(archive: Path, into: Path) -> Path:
    into.mkdir()
    done = subprocess.run(
        [require_tool("tar"), "-C", str(into), "-xpf", str(archive)], capture_output=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return into


def test_the_restored_tree_and_the_tar_are_the_tree_to_the_nanosecond(captured: tuple[Host, str], tmp_path: Path) -> None:
    source, digest = captured
    expected = exact(source.tree)
    assert len(expected) > 50
    tar_of(source.store, digest, tmp_path / "tree.tar")
    assert exact(untar(tmp_path / "tree.tar", tmp_path / "untarred")) == expected
    with Tree.open(source.store, digest) as tree:
        restore(tree, tmp_path / "restored")
    assert exact(tmp_path / "restored") == expected


def test_what_a_registry_gives_back_has_the_same_faces(
    captured: tuple[Host, str], tmp_path: Path, make_settings: Callable[..., Settings], image_registry: ImageRegistry
) -> None:
    source, digest = captured
    settings = make_settings(docker_config=tmp_path / "none.json")
    push(source.store, digest, f"{image_registry.address}/faces:1", settings)
    other = Store(tmp_path / "other")
    assert pull(other, f"{image_registry.address}/faces:1", settings).digest == digest
    assert tar_of(other, digest, tmp_path / "other.tar") == tar_of(source.store, digest, tmp_path / "own.tar")
    with Tree.open(other, digest) as tree:
        restore(tree, tmp_path / "restored")
    assert exact(tmp_path / "restored") == exact(source.tree)


@pytest.mark.parametrize("form", ["layout", "layout gzip", "archive", "archive gzip", "registry"])
def test_buildah_unpacks_every_export_to_the_same_tree(
    captured: tuple[Host, str],
    tmp_path: Path,
    buildah: Buildah,
    image_registry: ImageRegistry,
    make_settings: Callable[..., Settings],
    form: str,
) -> None:
    source, digest = captured
    kind, _, gzip = form.partition(" ")
    if kind == "registry":
        push(source.store, digest, f"{image_registry.address}/faces:1", make_settings(docker_config=tmp_path / "none.json"))
        image = f"docker://{image_registry.address}/faces:1"
    else:
        export: Callable[..., Any] = export_layout if kind == "layout" else export_archive
        result = export(source.store, digest, tmp_path / "out", name="snap-1", gzip=bool(gzip))
        assert (result.digest == digest) is not bool(gzip)
        image = f"{'oci' if kind == 'layout' else 'oci-archive'}:{tmp_path / 'out'}:snap-1"
    unpacked = facts(buildah.unpack(image) / "workspace")
    assert without_times(unpacked) == without_times(facts(source.tree))


def test_umoci_unpacks_the_gzip_layout_to_the_same_tree(captured: tuple[Host, str], tmp_path: Path) -> None:
    source, digest = captured
    require_tool("umoci")
    if os.geteuid() != 0:
        missing("root, which umoci needs to unpack owners and modes,")
    export_layout(source.store, digest, tmp_path / "out", name="snap-1", gzip=True)
    run("umoci", "unpack", "--image", f"{tmp_path / 'out'}:snap-1", str(tmp_path / "bundle"))
    unpacked = facts(tmp_path / "bundle" / "rootfs" / "workspace")
    assert without_times(unpacked) == without_times(facts(source.tree))


@pytest.mark.parametrize("gzip", [False, True])
def test_skopeo_copies_exports_with_their_digests(
    captured: tuple[Host, str], tmp_path: Path, policy: Path, image_registry: ImageRegistry, gzip: bool
) -> None:
    source, digest = captured
    export_layout(source.store, digest, tmp_path / "layout", gzip=gzip)
    result = export_archive(source.store, digest, tmp_path / "archive", gzip=gzip)
    for number, image in enumerate((f"oci:{tmp_path / 'layout'}:latest", f"oci-archive:{tmp_path / 'archive'}:latest")):
        assert json.loads(skopeo(policy, "inspect", image))["Digest"] == result.digest
        remote = f"docker://{image_registry.address}/copies:{number}"
        skopeo(policy, "copy", "--preserve-digests", "--dest-tls-verify=false", image, remote)
        assert json.loads(skopeo(policy, "inspect", "--tls-verify=false", remote))["Digest"] == result.digest


def test_what_skopeo_took_to_a_registry_can_be_pulled(
    captured: tuple[Host, str],
    tmp_path: Path,
    policy: Path,
    image_registry: ImageRegistry,
    make_settings: Callable[..., Settings],
) -> None:
    source, digest = captured
    export_archive(source.store, digest, tmp_path / "archive")
    remote = f"{image_registry.address}/by-skopeo:1"
    archive = f"oci-archive:{tmp_path / 'archive'}:latest"
    skopeo(policy, "copy", "--preserve-digests", "--dest-tls-verify=false", archive, f"docker://{remote}")
    other = Store(tmp_path / "other")
    assert pull(other, remote, make_settings(docker_config=tmp_path / "none.json")).digest == digest
