"""Commands about a workspace's life against a real fleet: real processes are stopped, real directories purged."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.acceptance.command import Command
from tests.acceptance.test_cli import Up
from tests.support import eventually

SERVER = (
    "import http.server, subprocess, sys\n"
    "child = subprocess.Popen(['sleep', '600'])\n"
    "server = http.server.HTTPServer(('127.0.0.1', 0), http.server.SimpleHTTPRequestHandler)\n"
    "print(server.server_address[1], flush=True)\n"
    "server.serve_forever()\n"
)


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """A fleet whose sweeps run each second."""
    running = Up(tmp_path_factory.mktemp("life"), sweep_seconds="1", stop_stale_seconds="1")
    yield running
    running.close()


@pytest.fixture
def mothball(up: Up) -> Command:
    return up.command


class Workspace:
    """A directory with a process tree in it: a web server and its child."""

    def __init__(self, up: Up, name: str) -> None:
        self.id = name
        self.path = up.roots / name
        self.path.mkdir()
        (self.path / "file.txt").write_text(f"of {name}\n")
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            cwd=self.path,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        assert self.server.stdout is not None
        self.port = int(self.server.stdout.readline())
        self.tree = [psutil.Process(self.server.pid), *psutil.Process(self.server.pid).children()]
        assert len(self.tree) == 2

    @property
    def living(self) -> list[psutil.Process]:
        self.server.poll()
        return [each for each in self.tree if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]

    def close(self) -> None:
        for each in self.living:
            each.kill()
        self.server.wait(10)
        if self.server.stdout is not None:
            self.server.stdout.close()


@pytest.fixture
def workspace(up: Up, request: pytest.FixtureRequest) -> Iterator[Workspace]:
    """Registered, with its processes as runtime, and nothing that reclaims it."""
    made = Workspace(up, request.node.name.removeprefix("test_")[:40])
    done = up.command("register", made.id, "--path", str(made.path), "--pid", str(made.server.pid), "--policy", "ttl=never")
    assert done.code == 0, done.err
    yield made
    made.close()


def events(mothball: Command, kind: str, workspace: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = mothball("events", "--kind", kind, "--workspace", workspace, "--json").json()
    return found


def test_a_stop_captures_and_ends_the_whole_tree_and_resume_goes_on(mothball: Command, workspace: Workspace) -> None:
    done = mothball("stop", workspace.id, "--by", "ann", "--timeout", "60s", "--json")
    assert done.code == 0, done.err
    assert workspace.living == []
    record = mothball("show", workspace.id, "--json").json()
    assert (record["state"], record["generation"]) == ("stopped", 1)
    [event] = events(mothball, "workspace.stopped", workspace.id)
    assert (event["fields"]["reason"], event["fields"]["by"]) == ("asked", "ann")
    assert mothball("cat", workspace.id, "file.txt").out == (workspace.path / "file.txt").read_bytes()
    assert mothball("resume", workspace.id).code == 0
    assert mothball("show", workspace.id, "--json").json()["state"] == "active"


def test_a_hold_refuses_a_stop_and_nothing_ends(mothball: Command, workspace: Workspace) -> None:
    assert mothball("hold", workspace.id, "--reason", "looking").code == 0
    done = mothball("stop", workspace.id, "--force", "--timeout", "60s")
    assert done.code != 0
    assert "hold" in done.err or "held" in done.err
    assert len(workspace.living) == 2


def test_n30_auto_stop_ends_what_nobody_uses_and_explain_says_why_before_and_after(mothball: Command, workspace: Workspace) -> None:
    assert mothball("policy", "set", "stop_after=2s", "--workspace", workspace.id).code == 0
    told = mothball("explain", workspace.id, "--json").json()
    assert told["policy"]["stop_after"] == {"value": "2s", "from": "workspace"}
    eventually(lambda: not workspace.living, seconds=40, every=0.2, what="the processes are ended")
    eventually(
        lambda: mothball("show", workspace.id, "--json").json()["state"] == "stopped", seconds=20, every=0.2, what="it is stopped"
    )
    [event] = events(mothball, "workspace.stopped", workspace.id)
    assert event["fields"]["reason"] == "stop_after"
    told = mothball("explain", workspace.id, "--json").json()
    assert (told["state"], told["state_reason"]) == ("stopped", "stop_after")


def test_n24_stats_ping_health_and_ports_of_what_runs_and_of_what_does_not(mothball: Command, workspace: Workspace) -> None:
    active = mothball("show", workspace.id, "--json").json()["last_active"]
    stats = mothball("stats", workspace.id, "--json").json()
    assert stats["processes"] == 2
    assert stats["rss_bytes"] > 1024**2
    assert stats["disk_bytes"] >= 512
    assert not stats["stale"]
    assert "memory" in mothball("stats", workspace.id).out.decode()
    assert mothball("ping", workspace.id, "--json").json()["alive"] is True
    assert mothball("health", workspace.id).code == 0
    found = mothball("ports", workspace.id, "--json").json()["ports"]
    assert [(each["address"], each["port"]) for each in found] == [("127.0.0.1", workspace.port)]
    assert f"http://127.0.0.1:{workspace.port}" in mothball("ports", workspace.id).out.decode()
    assert mothball("show", workspace.id, "--json").json()["last_active"] == active
    workspace.close()
    done = mothball("ping", workspace.id)
    assert done.code == 1
    assert "error: not_running: " in done.err
    assert mothball("health", workspace.id).code == 1
    assert mothball("stats", workspace.id, "--json").json()["stale"] is True


def test_b71_what_expires_leaves_by_the_sweep_and_comes_back(mothball: Command, up: Up) -> None:
    folder = up.roots / "expires"
    folder.mkdir()
    assert mothball("register", "expires", "--path", str(folder), "--policy", "ttl=1s").code == 0
    eventually(lambda: mothball("show", "expires").code == 1, seconds=30, every=0.2, what="it is evicted")
    told = mothball("explain", "expires", "--json").json()
    assert (told["state"], told["reason"]) == ("evicted", "ttl")
    assert len(events(mothball, "workspace.evicted", "expires")) == 1
    assert folder.is_dir()
    assert mothball("undelete", "expires", "--json").json()["record"]["state"] == "stopped"


def test_a_purge_refuses_while_something_is_missing_and_what_it_deleted_comes_back(mothball: Command, up: Up) -> None:
    folder = up.roots / "purged"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.txt").write_text("precious\n")
    os.mkfifo(folder / "pipe")
    assert mothball("register", "purged", "--path", str(folder)).code == 0
    done = mothball("purge", "purged", "--timeout", "60s")
    assert done.code == 1
    assert done.err.startswith("error: unheld: ")
    assert "pipe" in done.err
    assert (folder / "sub" / "a.txt").is_file()
    dry = mothball("purge", "purged", "--dry-run", "--timeout", "60s", "--json").json()["result"]
    assert any("pipe" in text for text in dry["missing"])
    assert "missing: pipe" in mothball("purge", "purged", "--dry-run", "--timeout", "60s").out.decode()
    (folder / "pipe").unlink()
    assert "can be purged" in mothball("purge", "purged", "--dry-run", "--timeout", "60s").out.decode()
    done = mothball("purge", "purged", "--by", "ann", "--timeout", "60s")
    assert done.code == 0, done.err
    assert "receipt: sha256:" in done.out.decode()
    assert not folder.exists()
    assert mothball("explain", "purged", "--json").json()["receipt"]["digest"]
    assert "deleted with a receipt" in mothball("explain", "purged").out.decode()
    assert mothball("undelete", "purged").code == 0
    assert mothball("restore", "purged", "--to", str(folder)).code == 0
    assert (folder / "sub" / "a.txt").read_text() == "precious\n"


def test_a_forced_purge_deletes_what_no_capture_holds_and_names_who_and_what(mothball: Command, up: Up) -> None:
    folder = up.roots / "forced"
    folder.mkdir()
    os.mkfifo(folder / "pipe")
    assert mothball("register", "forced", "--path", str(folder)).code == 0
    assert mothball("purge", "forced", "--force").code == 2
    assert folder.is_dir()
    done = mothball("purge", "forced", "--force", "--i-know", "--by", "ann", "--timeout", "60s")
    assert done.code == 0, done.err
    assert not folder.exists()
    told = mothball("explain", "forced", "--json").json()
    assert told["by"] == "ann"
    assert [each["path"] for each in told["receipt"]["forced"]] == ["pipe"]


def test_sessions_and_explain_are_for_people_too(mothball: Command, up: Up) -> None:
    folder = up.roots / "people"
    folder.mkdir()
    assert mothball("register", "own/er#1", "--path", str(folder), "--intent", "a\x1b[2Jb").code == 0
    text = mothball("sessions", "own/er").out.decode()
    assert "agent-1" in text
    assert "\x1b" not in text
    assert mothball("touch", "own/er#1", "--signal", "exec").code == 0
    text = mothball("explain", "own/er#1").out.decode()
    for word in ("SIGNAL", "RULE", "POLICY", "register", "exec", "ttl", "next"):
        assert word in text


def test_python_producers_keep_it_in_use(up: Up, mothball: Command, tmp_path: Path) -> None:
    """The block outlasts the rule twice over, and then the rule has its way."""
    folder = up.roots / "present"
    folder.mkdir()
    assert mothball("register", "present", "--path", str(folder)).code == 0
    script = (
        "from mothball import Fleet\nimport time\n"
        "with Fleet() as fleet, fleet.active('present', timeout=2):\n"
        "    fleet.set_policy('ttl=1s', workspace='present')\n"
        "    time.sleep(4)\n"
        "    print(fleet.get('present').state)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], env=mothball.env, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "active\n", "")
    eventually(lambda: mothball("show", "present").code == 1, seconds=30, every=0.2, what="it is evicted once nobody is there")
