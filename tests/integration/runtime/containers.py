"""Real containers for the tests: a root file system of one static busybox, run by runc or behind Podman's Docker API."""

from __future__ import annotations

import http.client
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import tarfile
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support import eventually, missing, not_permitted, require_tool

APPLETS = ("sh", "sleep", "httpd", "trap", "cat", "mkdir", "echo", "nc")


def static_busybox() -> Path:
    """The host's busybox, which must need no libraries."""
    path = Path(require_tool("busybox")).resolve()
    if subprocess.run(["ldd", str(path)], capture_output=True, check=False).returncode == 0:
        missing("a static busybox (package busybox-static)")
    return path


def rootfs(folder: Path) -> Path:
    """A root file system in `folder`."""
    root = folder / "rootfs"
    for name in ("bin", "proc", "dev", "sys", "tmp", "www"):
        (root / name).mkdir(parents=True)
    shutil.copy(static_busybox(), root / "bin/busybox")
    for name in APPLETS:
        (root / "bin" / name).symlink_to("busybox")
    (root / "www/index.html").write_text("hello\n")
    return root


class Runc:
    """Containers of the real runc, with a state folder of their own."""

    def __init__(self, folder: Path) -> None:
        if os.geteuid() != 0:
            not_permitted("run containers")
        require_tool("runc")
        self.folder = folder
        self.root = folder / "state"
        self.root.mkdir(parents=True)
        self.root.chmod(0o700)
        self.made: list[str] = []

    def __call__(self, *argv: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(["runc", "--root", str(self.root), *argv], capture_output=True, check=False, timeout=30)

    def start(self, script: str, **changes: Any) -> str:
        """A container that runs `script` in its shell; `changes` replace parts of its config."""
        name = f"mothball-{uuid.uuid4().hex[:8]}"
        bundle = self.folder / name
        bundle.mkdir()
        rootfs(bundle)
        subprocess.run(["runc", "spec"], cwd=bundle, check=True)
        config = json.loads((bundle / "config.json").read_text())
        config["process"] |= {"terminal": False, "args": ["/bin/sh", "-c", script]}
        config["process"].pop("rlimits", None)
        config["linux"]["cgroupsPath"] = f"/{name}"
        for key, value in changes.items():
            if key == "host_network":
                config["linux"]["namespaces"] = [each for each in config["linux"]["namespaces"] if each["type"] != "network"]
            elif key == "host_pids":
                config["linux"]["namespaces"] = [each for each in config["linux"]["namespaces"] if each["type"] != "pid"]
            else:
                raise AssertionError((key, value))
        (bundle / "config.json").write_text(json.dumps(config))
        with (bundle / "log").open("wb") as log:
            done = subprocess.run(
                ["runc", "--root", str(self.root), "run", "--detach", "--bundle", str(bundle), name],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False, timeout=30,
            )  # fmt: skip
        if done.returncode:
            pytest.fail(f"runc run: {(bundle / 'log').read_text()}")
        self.made.append(name)
        return name

    def handle(self, name: str) -> dict[str, Any]:
        return {"driver": "runc", "container": name, "root": str(self.root)}

    def status(self, name: str) -> str:
        return str(json.loads(self("state", name).stdout)["status"])

    def pid(self, name: str) -> int:
        return int(json.loads(self("state", name).stdout)["pid"])

    def end(self) -> None:
        for name in self.made:
            self("delete", "--force", name)


@contextmanager
def docker_api() -> Iterator[DockerApi]:
    """Podman's Docker Engine API on a socket of its own, with a storage of its own."""
    # A short name: Podman takes at most 50 characters, and the folders of pytest's processes are longer.
    with tempfile.TemporaryDirectory(prefix="mothball-") as folder:
        yield from _docker_api(Path(folder))


def _docker_api(folder: Path) -> Iterator[DockerApi]:
    if os.geteuid() != 0:
        not_permitted("run containers")
    podman, runc = require_tool("podman"), require_tool("runc")
    path = folder / "docker.sock"
    # Of its own too: what several servers on one machine would share, their locks before all.
    config = folder / "containers.conf"
    config.write_text('[engine]\nlock_type = "file"\nevents_logger = "none"\n')
    command = [
        podman, "--tmpdir", str(folder / "tmp"), "--root", str(folder / "root"), "--runroot", str(folder / "run"),
        "--storage-driver", "vfs", "--runtime", runc, "--cgroup-manager", "cgroupfs",
        "system", "service", "--time", "0", f"unix://{path}",
    ]  # fmt: skip
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True, env={**os.environ, "CONTAINERS_CONF": str(config)}
        )
        api = DockerApi(path)
        try:
            eventually(lambda: api.up() or server.poll() is not None, seconds=20, what="podman's API")
            if server.poll() is not None:
                pytest.fail(f"podman system service: {(folder / 'log').read_text()}")
            yield api
        finally:
            api.end()
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait(10)
            # Bind mounts of the storage would keep the folder from being removed.
            for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
                if (where := line.split()[4]).startswith(str(folder)):
                    subprocess.run(["umount", "-l", where], check=False, capture_output=True)


class DockerApi:
    """What a test needs of the API, by the standard library alone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.made: list[str] = []
        self._image = ""

    def up(self) -> bool:
        with suppress(OSError):
            return self("GET", "/version")[0] == 200
        return False

    def __call__(self, method: str, target: str, body: Any = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("localhost", timeout=30)
        connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        data = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else None
        kind = "application/x-tar" if isinstance(body, bytes) else "application/json"
        try:
            connection.sock.settimeout(30)
            connection.sock.connect(str(self.path))
            connection.request(method, f"/v1.41{target}", body=data, headers={"Content-Type": kind})
            with connection.getresponse() as response:
                text = response.read()
            return response.status, json.loads(text) if text.strip() else None
        finally:
            connection.close()

    def image(self, folder: Path) -> str:
        if not self._image:
            packed = io.BytesIO()
            with tarfile.open(fileobj=packed, mode="w") as tar:
                tar.add(rootfs(folder), arcname=".")
            status, answer = self("POST", "/images/create?fromSrc=-&repo=mothball&tag=test", packed.getvalue())
            assert status == 200, answer
            self._image = answer["id"].removeprefix("sha256:")
        return self._image

    def start(self, folder: Path, script: str, **host: Any) -> str:
        """The id of a running container."""
        limits = [{"Name": name, "Soft": 1024, "Hard": 1024} for name in ("nofile", "nproc")]
        config = {
            "Image": self.image(folder), "Cmd": ["/bin/sh", "-c", script],
            "HostConfig": {"NetworkMode": "none", "Ulimits": limits, **host},
        }  # fmt: skip
        status, answer = self("POST", f"/containers/create?name=mothball-{uuid.uuid4().hex[:8]}", config)
        assert status == 201, answer
        ident = str(answer["Id"])
        self.made.append(ident)
        status, answer = self("POST", f"/containers/{ident}/start")
        assert status == 204, answer
        return ident

    def running(self, ident: str) -> bool:
        return bool(self("GET", f"/containers/{ident}/json")[1]["State"]["Running"])

    def end(self) -> None:
        """No container outlives its test, not even one that is just being stopped with patience: its root folder goes next."""
        for ident in self.made:
            with suppress(OSError):
                self("POST", f"/containers/{ident}/kill")
            with suppress(OSError):
                self("DELETE", f"/containers/{ident}?force=true")
            # Podman with its own cgroups leaves empty ones behind.
            for group in Path("/sys/fs/cgroup").glob(f"**/libpod-{ident}*"):
                with suppress(OSError):
                    group.rmdir()
        for command in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError, ValueError):
                words = command.read_bytes().split(b"\0")
                if words[0].endswith(b"conmon") and any(ident.encode() in words for ident in self.made):
                    children = Path(f"/proc/{command.parent.name}/task/{command.parent.name}/children").read_text().split()
                    for pid in (*children, command.parent.name):
                        os.kill(int(pid), signal.SIGKILL)
