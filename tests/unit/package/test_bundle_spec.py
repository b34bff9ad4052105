"""config.json: valid by the published schema, the same for the same command, and nothing of the host in it (B-112, B-118)."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mothball.errors import InvalidParams
from mothball.package.bundle_spec import LEAST_MEMORY, MOUNT_POINTS, check_bundle, check_schema, runtime_spec


def spec(**options: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(runtime_spec(**{"args": ["/bin/true"], **options}))
    return found


@pytest.mark.parametrize(
    "options", [{}, {"rootless": True, "uid": 1234, "gid": 1234, "memory": 1 << 30}, {"memory": 1 << 30, "pids": 5}]
)
def test_b112_a_spec_is_valid_by_the_published_schema(options: dict[str, Any]) -> None:
    check_schema(spec(**options))


def test_b118_nothing_of_the_host_is_in_a_spec() -> None:
    made = spec()
    assert made["ociVersion"] == "1.0.2"
    assert {each["type"] for each in made["linux"]["namespaces"]} == {"mount", "pid", "ipc", "uts", "network"}
    assert made["process"]["terminal"] is False
    assert made["process"]["noNewPrivileges"] is True
    assert len(made["process"]["capabilities"]) == 5
    assert all(not kept for kept in made["process"]["capabilities"].values())
    assert made["root"] == {"path": "rootfs", "readonly": True}
    assert not any("bind" in (mount.get("options") or []) for mount in made["mounts"])
    assert "hooks" not in made


def test_b118_what_root_starts_for_another_user_has_cgroup_limits_all_the_same() -> None:
    document = json.loads(runtime_spec(args=["x"], rootless=True, uid=7, gid=7, memory=10**8, pids=50, cgroup=True))
    assert document["linux"]["uidMappings"] == [{"containerID": 0, "hostID": 7, "size": 1}]
    assert document["linux"]["resources"]["pids"] == {"limit": 50}
    assert document["linux"]["resources"]["memory"]["limit"] == 10**8
    assert "RLIMIT_AS" not in {each["type"] for each in document["process"]["rlimits"]}


def test_b118_a_rootless_spec_has_one_mapping_and_no_cgroup_limits() -> None:
    made = spec(rootless=True, uid=1234, gid=99, memory=1 << 30)
    assert {"type": "user"} in made["linux"]["namespaces"]
    assert made["linux"]["uidMappings"] == [{"containerID": 0, "hostID": 1234, "size": 1}]
    assert made["linux"]["gidMappings"] == [{"containerID": 0, "hostID": 99, "size": 1}]
    assert "resources" not in made["linux"]
    assert {"type": "RLIMIT_AS", "hard": 1 << 30, "soft": 1 << 30} in made["process"]["rlimits"]


def test_the_same_command_gives_the_same_bytes() -> None:
    one = runtime_spec(args=["a", "b"], env={"X": "1", "A": "2"})
    assert one == runtime_spec(args=["a", "b"], env={"A": "2", "X": "1"})
    assert one.endswith(b"\n")
    assert one != runtime_spec(args=["a", "c"], env={"A": "2", "X": "1"})


def test_a_path_is_there_even_when_nobody_names_one() -> None:
    assert spec(env={"A": "b"})["process"]["env"][1].startswith("PATH=/")
    assert "PATH=/x" in spec(env={"PATH": "/x"})["process"]["env"]


@pytest.mark.parametrize(
    "options",
    [
        {"args": []}, {"args": [""]}, {"args": ["a\0b"]}, {"args": "text"}, {"args": ["\ud800"]}, {"args": ["x"] * 1001},
        {"args": ["x" * 140_000]}, {"env": {"": "x"}}, {"env": {"a=b": "x"}}, {"env": {"a": "x\0"}}, {"cwd": "relative"},
        {"cwd": "/a/../b"}, {"cwd": "//a"}, {"cwd": "/a/"}, {"memory": LEAST_MEMORY - 1}, {"pids": 0},
    ],
    ids=str,
)  # fmt: skip
def test_what_runc_would_refuse_or_swallow_is_refused_here(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidParams):
        runtime_spec(**{"args": ["/bin/true"], **options})


def test_a_value_that_may_be_a_secret_is_not_in_the_message() -> None:
    with pytest.raises(InvalidParams) as caught:
        runtime_spec(args=["x"], env={"TOKEN": "hunter2\0"})
    assert "hunter2" not in caught.value.message


@given(
    args=st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=5),
    env=st.dictionaries(st.text(st.characters(exclude_characters="\0=", exclude_categories=["Cs"]), min_size=1), st.text(
        st.characters(exclude_characters="\0", exclude_categories=["Cs"])), max_size=5),
    rootless=st.booleans(), memory=st.none() | st.integers(LEAST_MEMORY, 1 << 40), readonly=st.booleans(),
)  # fmt: skip
def test_whatever_is_accepted_is_valid_and_comes_back(
    args: list[str], env: dict[str, str], rootless: bool, memory: int | None, readonly: bool
) -> None:
    made = spec(args=args, env=env, rootless=rootless, memory=memory, readonly=readonly)
    check_schema(made)
    assert made["process"]["args"] == args
    found = dict(each.split("=", 1) for each in made["process"]["env"])
    assert found == {"PATH": found["PATH"], **env}


# -- what somebody else's bundle may ask for ------------------------------------------------------------------------------


@pytest.fixture
def bundle(tmp_path: Path) -> Callable[[Callable[[dict[str, Any]], object]], Path]:
    """Makes a bundle whose spec was changed."""

    def make(change: Callable[[dict[str, Any]], object] = lambda _: None) -> Path:
        folder = tmp_path / "bundle"
        for name in (*MOUNT_POINTS, "workspace"):
            (folder / "rootfs" / name).mkdir(parents=True)
        document = copy.deepcopy(spec())
        change(document)
        (folder / "config.json").write_text(json.dumps(document))
        return folder

    return make


def put(*path: Any) -> Callable[[dict[str, Any]], object]:
    """A change: the last of `path` goes where the others lead; a list gets one element more."""

    def change(document: dict[str, Any]) -> None:
        *way, last, value = path
        place: Any = document
        for step in way:
            place = place.setdefault(step, {})
        if isinstance(place.get(last), list) and not isinstance(value, list):
            place[last].append(value)
        else:
            place[last] = value

    return change


def drop(*path: Any) -> Callable[[dict[str, Any]], object]:
    def change(document: dict[str, Any]) -> None:
        place: Any = document
        for step in path[:-1]:
            place = place[step]
        del place[path[-1]]

    return change


def without_namespace(kind: str) -> Callable[[dict[str, Any]], object]:
    return lambda d: d["linux"].update(namespaces=[each for each in d["linux"]["namespaces"] if each["type"] != kind])


BAD: dict[str, Callable[[dict[str, Any]], object]] = {
    "a hook": put("hooks", "prestart", [{"path": "/bin/sh"}]),
    "a hook that creates": put("hooks", "createRuntime", [{"path": "/bin/sh"}]),
    "a bind mount": put("mounts", {"destination": "/host", "type": "bind", "source": "/", "options": ["rbind"]}),
    "a bind mount that says none": put("mounts", {"destination": "/host", "type": "none", "source": "/", "options": ["bind"]}),
    "a bind mount that says tmpfs": put("mounts", {"destination": "/host", "type": "tmpfs", "source": "/", "options": ["bind"]}),
    "a disk": put("mounts", {"destination": "/host", "type": "ext4", "source": "/dev/sda1"}),
    "an overlay": put("mounts", {"destination": "/host", "type": "overlay", "source": "overlay", "options": ["lowerdir=/"]}),
    "a mount that spreads": put("mounts", {"destination": "/x", "type": "tmpfs", "source": "x", "options": ["rshared"]}),
    "no mounts": put("mounts", []),
    "root elsewhere": put("root", "path", "/"),
    "root above": put("root", "path", "../../.."),
    "a terminal": put("process", "terminal", True),
    "a capability": put("process", "capabilities", "bounding", ["CAP_SYS_ADMIN"]),
    "all capabilities": drop("process", "capabilities"),
    "new privileges": put("process", "noNewPrivileges", False),
    "privileges not said": drop("process", "noNewPrivileges"),
    "another user": put("process", "user", {"uid": 1000, "gid": 0}),
    "more groups": put("process", "user", {"uid": 0, "gid": 0, "additionalGids": [6]}),
    "apparmor": put("process", "apparmorProfile", "unconfined"),
    "oom score": put("process", "oomScoreAdj", -1000),
    "a namespace of the host": put("linux", "namespaces", {"type": "network", "path": "/proc/1/ns/net"}),
    "no pid namespace": without_namespace("pid"),
    "no mount namespace": without_namespace("mount"),
    "no network namespace": without_namespace("network"),
    "a device": put("linux", "devices", [{"path": "/dev/sda", "type": "b", "major": 8, "minor": 0}]),
    "devices allowed": put("linux", "resources", "devices", [{"allow": True, "access": "rwm"}]),
    "sysctl": put("linux", "sysctl", {"kernel.core_pattern": "|/bin/sh"}),
    "propagation": put("linux", "rootfsPropagation", "shared"),
    "relative cwd": put("process", "cwd", "workspace"),
    "cwd that is not there": put("process", "cwd", "/workspace/gone"),
    "cwd through which host folders were reached": put("process", "cwd", "/proc/self/fd/7"),
    "cwd below what only it mounts": lambda d: (
        put("mounts", {"destination": "/workspace", "type": "tmpfs", "source": "x"})(d),
        put("process", "cwd", "/workspace/gone")(d),
    ),
    "mount point that is not there": put("mounts", {"destination": "/gone", "type": "tmpfs", "source": "x"}),
    "mount point that no file can have": put("mounts", {"destination": "/a\0b", "type": "tmpfs", "source": "x"}),
    "more than anybody can check in time": put(
        "linux", "uidMappings", [{"containerID": n, "hostID": 0, "size": 1} for n in range(20_000)]
    ),
    "no command": put("process", "args", []),
    "env without =": put("process", "env", ["PATH"]),
    "no process": drop("process"),
    "no linux": drop("linux"),
    "another version": put("ociVersion", "2.0.0"),
    "a version that is none": put("ociVersion", 7),
}


def test_our_own_bundle_is_fine(bundle: Callable[..., Path]) -> None:
    assert check_bundle(bundle())["process"]["args"] == ["/bin/true"]


@pytest.mark.parametrize("name", BAD)
def test_b116_a_bundle_that_reaches_for_the_host_is_not_started(bundle: Callable[..., Path], name: str) -> None:
    with pytest.raises(InvalidParams):
        check_bundle(bundle(BAD[name]))


def test_every_reason_is_said_at_once(bundle: Callable[..., Path]) -> None:
    def change(document: dict[str, Any]) -> None:
        BAD["a hook"](document)
        BAD["a terminal"](document)
        BAD["a bind mount"](document)

    with pytest.raises(InvalidParams, match=r"hooks.*terminal.*/host"):
        check_bundle(bundle(change))


def test_a_rootfs_that_is_a_link_is_not_started(bundle: Callable[..., Path], tmp_path: Path) -> None:
    folder = bundle()
    (folder / "rootfs").rename(tmp_path / "elsewhere")
    (folder / "rootfs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidParams, match="rootfs"):
        check_bundle(folder)


@pytest.mark.parametrize("name", [*MOUNT_POINTS, "workspace"])
def test_a_mount_point_that_is_a_link_or_missing_is_said(bundle: Callable[..., Path], name: str) -> None:
    folder = bundle()
    (folder / "rootfs" / name).rmdir()
    with pytest.raises(InvalidParams, match=name):
        check_bundle(folder)
    (folder / "rootfs" / name).symlink_to("/")
    with pytest.raises(InvalidParams, match=name):
        check_bundle(folder)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"[" * 100_000, b'{"a":"\xff"}', b'{"ociVersion":"1.0.2"}', b"x" * 5_000_000]
)
def test_a_config_that_is_none_is_one_clear_error(bundle: Callable[..., Path], content: bytes) -> None:
    folder = bundle()
    (folder / "config.json").write_bytes(content)
    with pytest.raises(InvalidParams):
        check_bundle(folder)


def test_a_config_that_is_a_link_or_a_pipe_is_not_read(bundle: Callable[..., Path], tmp_path: Path) -> None:
    folder = bundle()
    (folder / "config.json").rename(tmp_path / "config.json")
    (folder / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(InvalidParams, match="cannot be read"):
        check_bundle(folder)
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(InvalidParams):
        check_bundle(folder)
