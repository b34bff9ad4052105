"""Images of other tools around a workspace: what umoci unpacks is what we merge; from a real registry, into a bundle that runs."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mothball.errors import NotFound, RegistryUnavailable
from mothball.package.base import open_base
from mothball.package.bundle import write_bundle
from mothball.package.bundle_run import run_bundle
from mothball.package.rootfs import POINTS
from mothball.settings import Settings
from tests.acceptance.registry import ImageRegistry
from tests.integration.runtime.containers import static_busybox
from tests.support import not_permitted, require_tool
from tests.unit.store.build import File, capture, layer, new_store


def run(*command: object) -> None:
    done = subprocess.run(
        [require_tool(str(command[0])), *map(str, command[1:])], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def image(tmp_path: Path) -> str:
    """An image as umoci makes one: three layers, links, hard links, whiteouts, a command."""
    if os.geteuid() != 0:
        not_permitted("let umoci write images with owners")
    source = tmp_path / "source"
    (source / "usr/bin").mkdir(parents=True)
    (source / "etc").mkdir()
    shutil.copy(static_busybox(), source / "usr/bin/busybox")
    (source / "usr/bin/sh").hardlink_to(source / "usr/bin/busybox")
    (source / "usr/bin/cat").symlink_to("/usr/bin/busybox")
    (source / "bin").symlink_to("usr/bin")
    (source / "etc/gone").write_text("x")
    (source / "etc/stays").write_text("y")
    (source / "etc/stays").chmod(0o640)
    name = f"{tmp_path / 'image'}:t"
    run("umoci", "init", "--layout", tmp_path / "image")
    run("umoci", "new", "--image", name)
    run("umoci", "insert", "--image", name, source, "/")
    run("umoci", "insert", "--image", name, "--whiteout", "/etc/gone")
    (source / "etc/new").write_text("new")
    run("umoci", "insert", "--image", name, source / "etc/new", "/etc/new")
    run("umoci", "config", "--image", name, "--config.cmd", "/bin/sh", "--config.env", "PATH=/bin")
    return name


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[ImageRegistry]:
    with ImageRegistry(tmp_path / "registry") as running:
        yield running


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


def facts(root: Path) -> dict[str, tuple[object, ...]]:
    found: dict[str, tuple[object, ...]] = {}
    for path in root.rglob("*"):
        name, mode = str(path.relative_to(root)), path.lstat().st_mode
        if stat.S_ISLNK(mode):
            found[name] = ("l", os.readlink(path))
        elif stat.S_ISDIR(mode):
            found[name] = ("d", stat.S_IMODE(mode))
        else:
            found[name] = ("f", stat.S_IMODE(mode), path.lstat().st_nlink, path.read_bytes())
    return found


def test_what_umoci_unpacks_is_what_lies_around_the_workspace(
    image: str, tmp_path: Path, scratch: Path, make_settings: Callable[..., Settings]
) -> None:
    run("umoci", "unpack", "--image", image, tmp_path / "theirs")
    store = new_store(tmp_path / "store")
    digest = capture(store, layer({b"data": File(b"of the workspace\n")}))
    with open_base(f"oci:{image}", make_settings(), scratch) as base:
        write_bundle(store, digest, tmp_path / "ours", base=base)
    theirs, ours = facts(tmp_path / "theirs/rootfs"), facts(tmp_path / "ours/rootfs")
    inside = tuple(name.decode() for name in POINTS)
    assert {name: what for name, what in ours.items() if not name.startswith(inside)} == theirs
    assert "etc/new" in theirs
    assert "etc/gone" not in theirs


def test_an_image_of_a_registry_becomes_a_bundle_that_runs(
    image: str, registry: ImageRegistry, tmp_path: Path, scratch: Path, make_settings: Callable[..., Settings]
) -> None:
    require_tool("runc")
    name = f"{registry.address}/tools/busybox:1"
    run("skopeo", "copy", "--dest-tls-verify=false", f"oci:{image}", f"docker://{name}")
    store = new_store(tmp_path / "store")
    digest = capture(store, layer({b"data": File(b"of the workspace\n")}))
    steps: list[str] = []
    with open_base(name, make_settings(), scratch, lambda *, step, **_: steps.append(step)) as base:
        result = write_bundle(store, digest, tmp_path / "b", base=base, command=["cat", "/workspace/data"])
        pinned = f"{registry.address}/tools/busybox@{base.digest}"
    assert (result.base, set(steps)) == (name, {"base"})
    answer = run_bundle(tmp_path / "b", output="capture", scratch=tmp_path / "runs", timeout=60)
    assert (answer.exit_code, answer.stdout) == (0, b"of the workspace\n")
    with open_base(pinned, make_settings(), scratch) as base:
        assert base.args == ["/bin/sh"]


def test_docker_form_and_other_packings_of_skopeo_are_the_same_tree(
    image: str, tmp_path: Path, scratch: Path, make_settings: Callable[..., Settings]
) -> None:
    run("skopeo", "copy", "--dest-compress", "--dest-compress-format", "zstd", f"oci:{image}", f"oci:{tmp_path / 'zstd'}:t")
    run("skopeo", "copy", f"oci:{image}", f"oci-archive:{tmp_path / 'archive.tar'}:t")
    found = []
    for reference in (f"oci:{image}", f"oci:{tmp_path / 'zstd'}:t", f"oci-archive:{tmp_path / 'archive.tar'}:t"):
        with open_base(reference, make_settings(), scratch) as base:
            found.append([(each[:6], b"".join(each.pieces())) for each in base.entries()])
    assert found[0] == found[1] == found[2]
    assert len(found[0]) > 5


def test_a_registry_without_the_image_or_without_a_listener_is_told_apart(
    registry: ImageRegistry, scratch: Path, make_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mothball.package.distribution.PAUSE_SECONDS", 0.01)
    with pytest.raises(NotFound):
        open_base(f"{registry.address}/tools/none:1", make_settings(), scratch)
    registry.stop()
    with pytest.raises(RegistryUnavailable):
        open_base(f"{registry.address}/tools/none:1", make_settings(), scratch)
