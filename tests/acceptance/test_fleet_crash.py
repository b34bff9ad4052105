"""Crash reports through the fleet: a real worker files one, and runc runs what is in its package elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mothball.package.bundle_run import run_bundle
from mothball.package.extract import extract
from tests.acceptance.command import Command
from tests.acceptance.fleet import FleetRun
from tests.integration.runtime.containers import static_busybox
from tests.integration.test_bundle_run import UID, as_user
from tests.support import not_permitted, require_tool
from workers.config import settings_env

ID = "r/a#1"
CANARY = "ghp_" + "Acceptance0Canary" * 2


@pytest.fixture
def mothball(fleet: FleetRun, tmp_path: Path) -> Command:
    command = Command(tmp_path)
    command.env |= settings_env(fleet.settings)
    return command


def workspace(fleet: FleetRun) -> Path:
    """A workspace with a shell of its own, a script that fails and a secret."""
    folder = fleet.folder / "trees" / "a"
    (folder / "bin").mkdir(parents=True)
    shutil.copy(static_busybox(), folder / "bin" / "busybox")
    for name in ("sh", "tail", "cat", "head"):
        (folder / "bin" / name).symlink_to("busybox")
    (folder / "data").write_text("of the workspace\n")
    (folder / ".env").write_text(f"DEPLOY_TOKEN={CANARY}\n")
    script = folder / "fail.sh"
    script.write_text(f"#!{folder}/bin/sh\ncat data; echo broken >&2; exit 3\n")
    script.chmod(0o755)
    fleet.workspace(ID, path=folder)
    return folder


def run_package(package: str, place: Path) -> subprocess.CompletedProcess[bytes]:
    """Unpack a package with tar and start it with runc, as somebody does who has neither Mothball nor the workspace."""
    if os.geteuid() != 0:
        not_permitted("start a container as root")
    place.mkdir()
    subprocess.run([require_tool("tar"), "xf", package, "-C", str(place)], check=True)
    name = f"mothball-test-{uuid.uuid4().hex[:12]}"
    try:
        return subprocess.run(
            [require_tool("runc"), "--root", str(place.parent / "runc"), "run", "-b", str(place), name],
            capture_output=True, timeout=60, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    finally:
        subprocess.run(
            [require_tool("runc"), "--root", str(place.parent / "runc"), "delete", "-f", name], capture_output=True, check=False
        )


@pytest.fixture
def everybody() -> Iterator[Path]:
    """A folder that every user can come to, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp(prefix="mothball-test-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def warm_up(package: Path, place: Path) -> None:
    """Load what is imported late: another user might not be able to read it."""
    place.mkdir(mode=0o700)
    (place / "bundle").mkdir()
    with package.open("rb") as file:
        extract(file, place / "bundle", "package.tar")
    assert run_bundle(place / "bundle", output="capture", scratch=place / "runs", timeout=60).exit_code == 3


def test_a_worker_files_a_report_and_its_package_fails_the_same_way_elsewhere(
    fleet: FleetRun, mothball: Command, tmp_path: Path
) -> None:
    worker = fleet.worker()
    folder = workspace(fleet)
    failed = subprocess.run(
        [folder / "bin/sh", "-c", "cat data; echo broken >&2; exit 3"], cwd=folder, env={"PATH": f"{folder}/bin"},
        capture_output=True, check=False,
    )  # fmt: skip
    assert failed.returncode == 3
    text = tmp_path / "error.txt"
    text.write_text(f"broken with {CANARY}\n")
    filed = mothball(
        "crash-report", ID, "--error-file", str(text), "--exit-code", "3", "--json",
        "--cmd", f"{folder}/bin/sh -c '/workspace/bin/cat data; echo broken >&2; exit 3'",
    )  # fmt: skip
    assert filed.code == 0, filed.err + worker.tail()
    result = filed.json()["result"]
    assert (result["source"], result["repeated"], result["files"]) == ("fresh", False, 4)
    shutil.rmtree(folder)
    done = run_package(result["path"], tmp_path / "elsewhere")
    assert (done.returncode, done.stdout, done.stderr) == (3, failed.stdout, failed.stderr)
    assert CANARY.encode() not in Path(result["path"]).read_bytes()
    assert (tmp_path / "elsewhere/rootfs/workspace/.env").read_text().startswith("DEPLOY_TOKEN=[redacted:")
    shown = mothball("crash-reports", "show", result["id"], "--json")
    assert shown.json()["report"]["id"] == result["id"]
    for said in (filed.out.decode(), filed.err, shown.out.decode(), worker.text()):
        assert CANARY not in said
    events = json.dumps([event.to_dict() for event in fleet.registry.events.list(limit=1000)])
    assert CANARY not in events + json.dumps([job.to_dict() for job in fleet.registry.jobs.list()])


def test_a_command_that_is_killed_for_want_of_memory_is_killed_again_elsewhere(
    fleet: FleetRun, mothball: Command, tmp_path: Path
) -> None:
    worker = fleet.worker()
    folder = workspace(fleet)
    ended = mothball("exec", ID, "--memory", "48MiB", "--", f"{folder}/bin/tail", "/dev/zero")
    if "without the memory limit" in ended.err:
        not_permitted("make a cgroup")
    assert ended.code == 128 + signal.SIGKILL, ended.err
    report = fleet.until(fleet.registry.crashes.list, "the report is filed", seconds=60)[0]
    document = mothball("crash-reports", "show", report.id, "--json").json()["report"]
    assert document["evidence"]["exit"]["oom_killed"] is True, worker.tail()
    assert document["evidence"]["exit"]["signal_name"] == "SIGKILL"
    config = json.loads(
        subprocess.run([require_tool("tar"), "xOf", report.path, "config.json"], capture_output=True, check=True).stdout
    )
    assert config["process"]["args"] == ["/workspace/bin/tail", "/dev/zero"]
    assert config["linux"]["resources"]["memory"]["limit"] == 48 * 1024**2
    shutil.rmtree(folder)
    done = run_package(report.path, tmp_path / "elsewhere")
    assert done.returncode == 128 + signal.SIGKILL, done.stderr
    again = mothball("bundle", "run", report.path, "--json")
    assert again.code == 128 + signal.SIGKILL, again.err


def test_a_command_that_dies_of_a_signal_dies_of_it_again_elsewhere(fleet: FleetRun, mothball: Command, tmp_path: Path) -> None:
    """Needs no cgroup."""
    fleet.worker()
    folder = workspace(fleet)
    ended = mothball("exec", ID, "--", f"{folder}/bin/sh", "-c", "kill -SEGV $$")
    assert ended.code == 128 + signal.SIGSEGV, ended.err
    report = fleet.until(fleet.registry.crashes.list, "the report is filed", seconds=60)[0]
    document = mothball("crash-reports", "show", report.id, "--json").json()["report"]
    assert document["evidence"]["exit"]["signal_name"] == "SIGSEGV"
    elsewhere = tmp_path / "sent" / "package.tar"
    elsewhere.parent.mkdir()
    shutil.copy(report.path, elsewhere)
    shutil.rmtree(folder)
    again = mothball("bundle", "run", str(elsewhere), "--json")
    assert again.code == 128 + signal.SIGSEGV, again.err


def test_somebody_without_any_rights_unpacks_a_package_and_sees_the_same_failure(
    fleet: FleetRun, mothball: Command, everybody: Path
) -> None:
    """A real user who is not root, with runc in a user namespace; the kernel decides."""
    if os.geteuid() != 0:
        not_permitted("become another user")
    if Path("/proc/sys/user/max_user_namespaces").read_text().strip() == "0":
        pytest.skip("this kernel allows no user namespaces, so nobody can run a container without being root")
    require_tool("runc")
    fleet.worker()
    folder = workspace(fleet)
    script = f"{folder}/bin/sh -c '/workspace/bin/cat data; echo broken >&2; exit 3'"
    filed = mothball("crash-report", ID, "--error", f"broken with {CANARY}", "--exit-code", "3", "--cmd", script, "--json")
    assert filed.code == 0, filed.err
    package = everybody / "package.tar"
    shutil.copy(filed.json()["result"]["path"], package)
    package.chmod(0o644)
    home = everybody / "home"
    home.mkdir()
    os.chown(home, UID, UID)
    warm_up(package, everybody / "warm")

    def run() -> dict[str, Any]:
        (home / "bundle").mkdir(mode=0o700)
        with package.open("rb") as file:
            extract(file, home / "bundle", "package.tar")
        done = run_bundle(home / "bundle", output="capture", scratch=home / "runs", timeout=60)
        return {"uid": os.getuid(), **done.to_dict(), "left": os.listdir(home / "runs")}

    answer = as_user(UID, run)
    assert "error" not in answer, answer
    assert (answer["uid"], answer["exit_code"], answer["left"]) == (UID, 3, [])
    assert (answer["stdout"], answer["stderr"]) == ("of the workspace\n", "broken\n")


def test_a_plain_producer_files_a_report_and_nobody_sees_its_secret(fleet: FleetRun) -> None:
    worker = fleet.worker()
    workspace(fleet)
    producer = fleet.producer()
    args = {"workspace": ID, "error": f"token {CANARY} refused", "command": ["x", "--token", CANARY], "package": False}
    result = producer.send_task("workspace.crash_report", kwargs=args, queue="dispatch").get(timeout=30)
    assert fleet.registry.crashes.get(result["id"]).title.startswith("token [redacted:")
    job = fleet.registry.jobs.list()[0]
    assert (job.origin, job.task) == ("adopted", "workspace.crash_report")
    told = json.dumps([job.to_dict(), result]) + worker.text()
    told += json.dumps([event.to_dict() for event in fleet.registry.events.list(limit=1000)])
    assert CANARY not in told


def test_a_package_with_an_image_around_the_workspace_runs_where_the_workspace_brings_no_shell(
    fleet: FleetRun, mothball: Command, tmp_path: Path
) -> None:
    if os.geteuid() != 0:
        not_permitted("let umoci write images with owners")
    source = tmp_path / "source"
    (source / "bin").mkdir(parents=True)
    shutil.copy(static_busybox(), source / "bin/busybox")
    for name in ("sh", "cat"):
        (source / "bin" / name).symlink_to("busybox")
    image = f"{tmp_path / 'image'}:t"
    for words in (
        ("init", "--layout", tmp_path / "image"), ("new", "--image", image), ("insert", "--image", image, source, "/"),
        ("config", "--image", image, "--config.env", "PATH=/bin"),
    ):  # fmt: skip
        subprocess.run([require_tool("umoci"), *map(str, words)], check=True, capture_output=True)
    folder = fleet.folder / "trees" / "plain"
    folder.mkdir(parents=True)
    (folder / "data").write_text("of the workspace\n")
    fleet.workspace(ID, path=folder)
    fleet.worker()
    options = ("--exit-code", "4", "--cmd", "sh -c 'cat data; exit 4'", "--json")
    filed = mothball("crash-report", ID, *options, "--error", "x", "--base", f"oci:{image}")
    assert filed.code == 0, filed.err
    result = filed.json()["result"]
    done = run_package(result["path"], tmp_path / "elsewhere")
    assert (done.returncode, done.stdout) == (4, b"of the workspace\n"), done.stderr
    refused = mothball("crash-report", ID, *options, "--error", "y", "--base", "oci:/etc")
    assert refused.code != 0
    assert "path_not_allowed" in refused.err
