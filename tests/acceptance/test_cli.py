"""The command line against a real fleet started with `mothball up`."""

from __future__ import annotations

import base64
import json
import os
import random
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mothball.store import Store
from mothball.store.manifest import load_manifest
from tests.acceptance.command import Command
from tests.support import eventually
from workers.redis_server import RedisServer

HOST = "box"
ODD = os.fsdecode(b"caf\xe9\n.bin")
BINARY = bytes(range(256)) + random.Random(1).randbytes(128 * 1024)


class Up:
    """A running `mothball up`."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.data = folder / "data"
        self.roots = folder / "roots"
        self.roots.mkdir(parents=True)
        self.command = Command(
            folder, data_dir=self.data, workspace_roots=self.roots, host=HOST, flower_port="0", lease_seconds="3", ring_seconds="1",
            heartbeat_seconds="1", host_offline_seconds="5", soft_shutdown_seconds="1", redis_timeout="1.5",
            **settings,
        )  # fmt: skip
        self.log = folder / "up.log"
        self.process = self.command.start("up", "--json", log=self.log)
        self.ready: dict[str, Any] = json.loads(eventually(self._ready_line, seconds=60, what="mothball up is ready"))

    def _ready_line(self) -> str | None:
        assert self.process.poll() is None, self.log.read_text()
        return next((line for line in self.log.read_text().splitlines() if line.startswith("{")), None)

    def close(self) -> None:
        self.command.kill_all()
        self.process.wait(10)


def make_tree(root: Path) -> Path:
    """A small tree with an odd name and a binary file."""
    (root / "src").mkdir(parents=True)
    (root / "src" / "main.py").write_text("print('hello')\n")
    (root / "data.bin").write_bytes(BINARY)
    (root / ODD).write_bytes(b"odd")
    (root / "link").symlink_to("src/main.py")
    os.mkfifo(root / "pipe")
    return root


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    running = Up(tmp_path_factory.mktemp("up"))
    yield running
    running.close()


@pytest.fixture
def mothball(up: Up) -> Command:
    return up.command


@pytest.fixture(scope="module")
def captured(up: Up) -> dict[str, Any]:
    """A registered and captured workspace; the result of its capture."""
    tree = make_tree(up.roots / "tree")
    assert up.command("register", "owner/repo#1", "--path", str(tree), "--title", "a\x1b[2Jb").code == 0
    done = up.command("capture", "owner/repo#1", "--wait", "--json")
    assert done.code == 0, done.err
    found: dict[str, Any] = done.json()
    return found


def test_up_answers_where_it_says_and_keeps_its_password_to_itself(up: Up) -> None:
    with urllib.request.urlopen(f"{up.ready['flower']}/healthcheck", timeout=5) as answer:
        assert answer.status == 200
    endpoint = Path(up.ready["endpoint"])
    assert endpoint.stat().st_mode & 0o777 == 0o600
    found = json.loads(endpoint.read_bytes())
    assert found["pid"] == up.process.pid
    password = found["redis_url"].split(":")[2].split("@")[0]
    assert len(password) > 8
    assert password not in up.log.read_text()
    status = up.command("status")
    assert status.code == 0
    assert password not in status.out.decode()
    for process in up.command.processes():
        assert password not in " ".join(process.cmdline())
    for log in up.ready["logs"].values():
        assert Path(log).is_file()


def test_a_second_up_on_the_same_data_dir_is_refused(mothball: Command, up: Up) -> None:
    done = mothball("up")
    assert done.code == 75
    assert "already runs" in done.err
    assert Path(up.ready["endpoint"]).exists()
    assert mothball("ls", "--json").code == 0


def test_a_capture_reports_what_it_stored_and_what_it_left_out(captured: dict[str, Any]) -> None:
    result = captured["result"]
    assert (result["generation"], result["changed"], result["omitted"]) == (1, True, {"special": 1})
    assert result["digest"].startswith("sha256:")


def test_an_unchanged_tree_keeps_its_digest_and_people_are_told(mothball: Command, captured: dict[str, Any]) -> None:
    done = mothball("capture", "owner/repo#1", "--wait")
    assert done.code == 0
    lines = done.out.decode().splitlines()
    assert lines[0] == captured["result"]["digest"]
    assert lines[1] == "unchanged since generation 1"
    assert any(line.startswith("left out: 1 special") for line in lines)


def test_files_lists_every_name_escaped_and_in_json_with_its_bytes(mothball: Command, captured: dict[str, Any]) -> None:
    lines = mothball("files", "owner/repo#1").out.decode().splitlines()
    assert lines == ["caf\\xe9\\n.bin", "data.bin", "link", "src", "src/main.py"]
    entries = {entry["path"]: entry for entry in mothball("files", "owner/repo#1", "--json").json()}
    assert base64.b64decode(entries["caf\\xe9\\n.bin"]["path_b64"]) == os.fsencode(ODD)
    assert entries["data.bin"]["size"] == len(BINARY)
    assert "path_b64" not in entries["data.bin"]
    assert (entries["link"]["type"], entries["link"]["link"]) == ("symlink", "src/main.py")
    assert mothball("files", "owner/repo#1", "src").out.decode() == "src/main.py\n"
    assert "-> src/main.py" in mothball("files", "owner/repo#1", "--long").out.decode()
    assert mothball("files", "owner/repo#1", "nowhere").code == 1


def test_cat_is_byte_exact_and_reads_odd_names(mothball: Command, captured: dict[str, Any]) -> None:
    assert mothball("cat", "owner/repo#1", "data.bin").out == BINARY
    assert mothball("cat", "owner/repo#1", os.fsencode(ODD)).out == b"odd"
    assert mothball("cat", "owner/repo#1", "src/main.py", "--at", captured["result"]["digest"]).out == b"print('hello')\n"


@pytest.mark.parametrize(
    ("argv", "code", "error"),
    [
        (("cat", "owner/repo#1", "nowhere"), 1, "not_found"),
        (("cat", "owner/repo#1", "src"), 2, "invalid_params"),
        (("cat", "owner/repo#1", "../../etc/passwd"), 2, "invalid_params"),
        (("cat", "owner/repo#1", "/etc/passwd"), 2, "invalid_params"),
        (("files", "owner/repo#1", "--at", "snap-9"), 1, "not_found"),
        (("files", "owner/none#1"), 1, "not_found"),
        (("show", "a/../b"), 2, "invalid_params"),
        (("show", "x" * 129), 2, "invalid_params"),
        (("capture", "owner/none#1"), 1, "not_found"),
        (("capture", "owner/repo#1", "--profile", "odd", "--wait"), 2, "invalid_params"),
        (("job", "nobody"), 1, "not_found"),
    ],
)
def test_a_wrong_request_is_one_clear_error(
    mothball: Command, captured: dict[str, Any], argv: tuple[str, ...], code: int, error: str
) -> None:
    done = mothball(*argv)
    assert (done.code, done.out) == (code, b""), done.err
    assert done.err.startswith(f"error: {error}: ")
    assert len(done.err.splitlines()) == 1


def test_a_path_outside_the_roots_fails_with_the_workers_own_error(mothball: Command, up: Up, tmp_path: Path) -> None:
    assert mothball("register", "outside", "--path", str(tmp_path)).code == 0
    done = mothball("capture", "outside", "--wait", "--json")
    assert done.code == 1
    assert json.loads(done.err)["error"]["code"] == "path_not_allowed"
    assert "path_not_allowed" in mothball("jobs", "--state", "failed").out.decode()


def test_wait_with_a_timeout_gives_up_and_says_how_to_go_on(mothball: Command, up: Up, captured: dict[str, Any]) -> None:
    os.kill(_worker_pid(up), signal.SIGSTOP)
    try:
        done = mothball("capture", "owner/repo#1", "--timeout", "300ms")
    finally:
        os.kill(_worker_pid(up), signal.SIGCONT)
    assert done.code == 75
    assert "goes on" in done.err
    assert "error: timeout: " in done.err


def _worker_pid(up: Up) -> int:
    [main] = [
        process for process in up.command.processes()
        if "worker" in process.cmdline() and process.ppid() == up.process.pid
    ]  # fmt: skip
    return int(main.pid)


def test_verify_finds_a_sound_store_and_names_a_damaged_blob(mothball: Command, up: Up, captured: dict[str, Any]) -> None:
    done = mothball("verify", "--deep", "--json")
    assert done.code == 0, done.err
    assert done.json()["problems"] == []
    assert done.json()["checked"] >= 3
    # A blob of the latest capture, not just any large one: other tests of this fleet leave blobs that nothing refers to.
    store = Store(up.data / "store")
    layers = load_manifest(store.blobs, store.refs("owner/repo#1").get().digest).layers
    blob = store.blobs.path(max(layers, key=lambda layer: layer.size).digest)
    before = blob.read_bytes()
    try:
        blob.chmod(0o600)
        blob.write_bytes(before[:5000] + bytes([before[5000] ^ 1]) + before[5001:])
        done = mothball("verify", "owner/repo#1", "--deep")
        assert done.code == 1
        assert blob.name in done.out.decode()
        assert "error: corrupt: " in done.err
    finally:
        blob.write_bytes(before)
    assert mothball("verify", "owner/repo#1", "--deep").code == 0


def test_jobs_hosts_events_and_status_tell_the_same_story(mothball: Command, captured: dict[str, Any]) -> None:
    job = mothball("job", captured["job"], "--json").json()
    assert (job["state"], job["workspace"], job["deliveries"]) == ("succeeded", "owner/repo#1", 1)
    assert captured["job"] in [each["id"] for each in mothball("jobs", "--workspace", "owner/repo#1", "--json").json()]
    [host] = mothball("hosts", "--json").json()
    assert (host["host"], host["online"]) == (HOST, True)
    kinds = [event["kind"] for event in mothball("events", "--workspace", "owner/repo#1", "--json").json()]
    assert "workspace.captured" in kinds
    status = mothball("status", "--json").json()
    assert status["jobs"]["succeeded"] >= 1
    assert set(status["queues"]) == {f"host.{HOST}", "control", "dispatch"}
    assert status["redis"]["version"]
    [warning] = status["warnings"]
    assert "auto-stop is off" in warning
    assert "***" in status["settings"]["redis_url"]
    text = mothball("show", "owner/repo#1").out.decode()
    assert "\x1b" not in text
    assert captured["result"]["digest"] in text


def test_cancel_of_a_finished_job_cancels_nothing(mothball: Command, captured: dict[str, Any]) -> None:
    assert mothball("cancel", captured["job"], "--json").json() == {
        "job": captured["job"],
        "cancelled": False,
        "state": "succeeded",
    }


def test_events_follow_prints_new_ones_as_lines(mothball: Command, up: Up, captured: dict[str, Any], tmp_path: Path) -> None:
    log = tmp_path / "follow.log"
    process = mothball.start("events", "--follow", "--json", "--kind", "workspace.pinned", log=log)
    try:

        def seen() -> bool:
            mothball("pin", "owner/repo#1", "--reason", "again")
            mothball("unpin", "owner/repo#1")
            return bool(log.read_text())

        eventually(seen, seconds=20, what="a followed event")
        assert json.loads(log.read_text().splitlines()[0])["kind"] == "workspace.pinned"
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130


def test_release_forgets_the_record_and_the_captures_stay_readable(mothball: Command, up: Up) -> None:
    tree = make_tree(up.roots / "second")
    assert mothball("register", "second", "--path", str(tree)).code == 0
    assert mothball("capture", "second", "--wait").code == 0
    assert mothball("release", "second", "--json").json() == {"id": "second", "released": True}
    assert mothball("release", "second", "--json").json() == {"id": "second", "released": False}
    done = mothball("cat", "second", "src/main.py")
    assert (done.code, done.out) == (0, b"print('hello')\n")
    assert "gone" in done.err


def test_a_worker_that_dies_is_started_again_and_works(mothball: Command, up: Up, captured: dict[str, Any]) -> None:
    before = _worker_pid(up)
    os.kill(before, signal.SIGKILL)
    eventually(lambda: "worker runs again" in up.log.read_text(), seconds=20, what="the worker is restarted")
    assert mothball("capture", "owner/repo#1", "--wait", "--timeout", "60s").code == 0
    assert _worker_pid(up) != before


def test_reading_needs_no_redis(mothball: Command, up: Up, captured: dict[str, Any]) -> None:
    done = mothball("cat", "owner/repo#1", "data.bin", env={"MOTHBALL_REDIS_URL": "redis://127.0.0.1:1"})
    assert (done.code, done.out) == (0, BINARY)
    assert "cannot be reached" in done.err


def test_redis_down_is_one_clear_error_within_10_s(mothball: Command) -> None:
    done = mothball("capture", "owner/repo#1", env={"MOTHBALL_REDIS_URL": "redis://:hidden@127.0.0.1:1"}, timeout=10)
    assert done.code == 69
    assert done.err.startswith("error: unavailable: ")
    assert "hidden" not in done.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_whatever_ends_up_no_process_stays_behind(tmp_path: Path, number: signal.Signals) -> None:
    running = Up(tmp_path)
    try:
        # up, guard, redis, worker with two pool processes, beat, flower
        eventually(lambda: len(running.command.processes()) == 8, seconds=15, what="the whole fleet is there")
        running.process.send_signal(number)
        code = running.process.wait(30)
        eventually(lambda: not running.command.processes(), seconds=15, what="every process has ended")
        if number != signal.SIGKILL:
            assert code == 0
            assert not Path(running.ready["endpoint"]).exists()
            assert "stopped" in running.log.read_text()
    finally:
        running.close()


def test_up_after_a_killed_up_finds_its_data_again(tmp_path: Path) -> None:
    first = Up(tmp_path)
    tree = make_tree(first.roots / "tree")
    try:
        assert first.command("register", "w", "--path", str(tree)).code == 0
        assert first.command("capture", "w", "--wait").code == 0
        first.process.kill()
        first.process.wait(10)
        log = tmp_path / "again.log"
        process = first.command.start("up", "--json", log=log)
        eventually(lambda: '"ready"' in log.read_text(), seconds=60, what="the second up is ready")
        assert first.command("ls", "--json").json()[0]["generation"] == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        first.close()


def test_up_with_a_redis_of_ones_own_starts_none_and_leaves_it_alone(tmp_path: Path, private_redis: RedisServer) -> None:
    running = Up(tmp_path / "fleet", redis_url=private_redis.url)
    try:
        assert set(running.ready["logs"]) == {"worker", "beat", "flower"}
        assert running.command("hosts", "--json").json()[0]["online"] is True
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(30) == 0
        assert private_redis.running
    finally:
        running.close()


def test_a_fleet_that_cannot_start_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    command = Command(tmp_path, data_dir=tmp_path / "data", redis_server="/nowhere/redis-server", host=HOST)
    done = command("up")
    assert done.code == 78
    assert "MOTHBALL_REDIS_SERVER" in done.err
    assert command.processes() == []
