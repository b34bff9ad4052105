"""`mothball exec` beside a real registry: the command's own exit code, its presence, and the crash report that it files."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from mothball.client import Fleet
from mothball.crash.own_cgroup import OwnCgroup
from mothball.registry import Job
from mothball.settings import Settings
from tests.support import eventually, not_permitted
from workers.config import child_env
from workers.redis_server import RedisServer

ID = "owner/repo#7"
TOKEN = "ghp_" + "A1b2C3d4E5" * 3 + "f6G7h8"
PASSWORD = "Tr0ub4dor-3-zebra-lamp"


class Exec:
    """One workspace of this host and a way to run commands in it."""

    def __init__(self, settings: Settings, place: Path) -> None:
        self.settings = settings
        self.place = place
        self.fleet = Fleet(settings=settings)
        self.fleet.registry.hosts.heartbeat(settings.host, {})
        self.fleet.register(ID, place)

    def start(self, *command: str, options: tuple[str, ...] = (), workspace: str = ID, **env: str) -> subprocess.Popen[str]:
        argv = [sys.executable, "-m", "workers.main", "exec", workspace, *options, "--", *command]
        return subprocess.Popen(
            argv, env={**child_env(self.settings), **env}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    def run(self, *command: str, options: tuple[str, ...] = (), workspace: str = ID, **env: str) -> tuple[int, str, str]:
        process = self.start(*command, options=options, workspace=workspace, **env)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def reports(self) -> list[Job]:
        return [job for job in self.fleet.jobs(workspace=ID) if job.task == "workspace.crash_report"]

    def report(self) -> Mapping[str, Any]:
        (job,) = self.reports()
        return job.args


@pytest.fixture
def exec_in(redis_server: RedisServer, make_settings: Callable[..., Settings], tmp_path: Path) -> Iterator[Exec]:
    place = tmp_path / "w"
    place.mkdir()
    made = Exec(make_settings(), place)
    yield made
    made.fleet.close()


def test_a_failure_files_a_report_with_what_is_known_and_keeps_its_exit_code(exec_in: Exec) -> None:
    code, out, err = exec_in.run("sh", "-c", "pwd; echo it broke >&2; exit 3", LC_ALL="C.UTF-8")
    assert (code, out) == (3, f"{exec_in.place}\n")
    assert "it broke\n" in err
    assert "sh failed with exit code 3" in err
    args = exec_in.report()
    assert exec_in.reports()[0].id in err
    assert (args["exit_code"], args["signal"]) == (3, None)
    assert "it broke" in args["error"]
    assert str(exec_in.place) in args["error"]
    assert args["command"] == ["sh", "-c", "pwd; echo it broke >&2; exit 3"]
    assert args["env"]["LC_ALL"] == "C.UTF-8"


def test_the_fleet_s_password_does_not_reach_the_command(exec_in: Exec) -> None:
    _, out, _ = exec_in.run("env", MARK="1")
    assert "MARK=1\n" in out
    assert "MOTHBALL_" not in out


def test_success_files_nothing_and_says_goodbye(exec_in: Exec) -> None:
    assert exec_in.run("true") == (0, "", "")
    assert exec_in.reports() == []
    assert exec_in.fleet.registry.presence.holders(ID) == {}


def test_while_it_runs_the_workspace_is_in_use(exec_in: Exec) -> None:
    process = exec_in.start("sh", "-c", "echo ready; exec sleep 60")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    assert len(exec_in.fleet.registry.presence.holders(ID)) == 1
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert err == ""
    assert exec_in.fleet.registry.presence.holders(ID) == {}
    assert exec_in.reports() == []  # somebody asked for it


def test_a_signal_of_its_own_is_a_failure(exec_in: Exec) -> None:
    code, _, err = exec_in.run("sh", "-c", "kill -SEGV $$")
    assert code == 128 + signal.SIGSEGV
    assert "killed by SIGSEGV" in err
    assert exec_in.report()["signal"] == signal.SIGSEGV


def test_a_kill_for_want_of_memory_is_told_with_the_figures_of_its_cgroup(exec_in: Exec) -> None:
    with OwnCgroup(64 << 20) as own:
        if own.folder is None:
            not_permitted(f"make a cgroup ({own.why_not})")
    eats = "x = []\nwhile True: x.append(bytearray(1 << 20))"
    code, _, err = exec_in.run(sys.executable, "-c", eats, options=("--memory", "64MiB"))
    assert code == 128 + signal.SIGKILL
    assert "killed for want of memory, at 64 MiB" in err
    figures = exec_in.report()["cgroup"]
    assert (figures["own"], figures["memory_limit"]) == (True, 64 << 20)
    assert figures["oom_kills"] >= 1


def test_no_secret_of_output_command_or_environment_reaches_the_registry(exec_in: Exec) -> None:
    script = f"echo $DEPLOY_PASSWORD; echo token {TOKEN}; exit 1"
    code, out, _ = exec_in.run("sh", "-c", script, DEPLOY_PASSWORD=PASSWORD, GO_TOKEN=TOKEN)
    assert code == 1
    assert PASSWORD in out  # what passes through is untouched
    args = json.dumps(dict(exec_in.report()))
    assert TOKEN not in args
    assert PASSWORD not in args
    assert "[redacted:" in args
    assert "DEPLOY_PASSWORD" not in json.dumps(exec_in.report()["env"])


def test_the_log_has_all_of_it_and_the_report_knows_where(exec_in: Exec, tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    code, out, _ = exec_in.run("sh", "-c", "seq 100000; exit 1", options=("--log", str(log)))
    assert code == 1
    assert log.read_text() == out
    assert log.stat().st_mode & 0o777 == 0o600
    args = exec_in.report()
    assert args["log"] == str(log)
    assert len(args["error"].encode()) <= 64 * 1024
    assert args["error"].endswith("100000\n")


def test_a_log_through_a_link_is_refused_before_anything_runs(exec_in: Exec, tmp_path: Path) -> None:
    (tmp_path / "log").symlink_to(tmp_path / "elsewhere")
    code, _, err = exec_in.run("touch", "ran", options=("--log", str(tmp_path / "log")))
    assert code == 2
    assert "--log" in err
    assert not (exec_in.place / "ran").exists()


def test_without_report_only_the_exit_code_tells(exec_in: Exec) -> None:
    code, _, err = exec_in.run("false", options=("--no-report",))
    assert (code, err) == (1, "")
    assert exec_in.reports() == []


def test_an_unknown_program_is_127_and_no_crash(exec_in: Exec) -> None:
    code, _, err = exec_in.run("no-such-program")
    assert code == 127
    assert "no-such-program" in err
    assert exec_in.reports() == []


@pytest.mark.parametrize(("options", "code"), [(("--memory", "1KiB"), 2), (("--memory", "lots"), 2)])
def test_a_wrong_limit_is_refused_before_anything_runs(exec_in: Exec, options: tuple[str, ...], code: int) -> None:
    assert exec_in.run("touch", "ran", options=options)[0] == code
    assert not (exec_in.place / "ran").exists()


def test_another_host_s_workspace_an_unknown_one_and_a_missing_folder_are_refused(exec_in: Exec, tmp_path: Path) -> None:
    exec_in.fleet.register("far", "/srv/far", host="elsewhere")
    code, _, err = exec_in.run("true", workspace="far")
    assert code == 2
    assert "elsewhere" in err
    assert exec_in.run("true", workspace="nobody")[0] == 1
    exec_in.fleet.register("gone", tmp_path / "gone")
    code, _, err = exec_in.run("true", workspace="gone")
    assert code == 1
    assert "source_missing" in err


def test_without_redis_nothing_is_run(exec_in: Exec) -> None:
    code, _, err = exec_in.run("touch", "ran", MOTHBALL_REDIS_URL="redis://127.0.0.1:1")
    assert code == 69
    assert "unavailable" in err
    assert not (exec_in.place / "ran").exists()


def test_when_redis_goes_away_the_command_goes_on_and_its_code_counts(
    private_redis: RedisServer, make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    (tmp_path / "w").mkdir()
    made = Exec(make_settings(redis_timeout=0.5), tmp_path / "w")
    try:
        process = made.start("sh", "-c", "echo ready; while [ ! -e go ]; do sleep 0.05; done; echo on; exit 4")
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        private_redis.stop()
        (tmp_path / "w" / "go").touch()
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (4, "on\n")
        assert "no crash report could be filed: unavailable" in err
    finally:
        made.fleet.close()


def test_a_killed_exec_leaves_its_presence_so_that_the_workspace_is_missed(exec_in: Exec) -> None:
    process = exec_in.start("sh", "-c", "echo $$; exec sleep 60")
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    places = [line.rpartition(":")[2] for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()]
    process.kill()
    process.wait(timeout=10)
    try:
        assert len(exec_in.fleet.registry.presence.holders(ID)) == 1
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=10)
    # Its cgroup is swept by a later one, after a minute; this test cannot wait for that.
    mount = Path("/sys/fs/cgroup")
    for folder in {mount / part / place.lstrip("/") for place in places if "mothball-exec-" in place for part in ("", "memory")}:
        if folder.is_dir():
            eventually(lambda each=folder: not (each / "cgroup.procs").read_text())  # type: ignore[misc]
            folder.rmdir()


def test_with_json_the_output_is_the_commands_and_the_last_line_of_stderr_says_how_it_ended(exec_in: Exec) -> None:
    code, out, err = exec_in.run("sh", "-c", "echo mine; echo also mine >&2; exit 3", options=("--json",))
    *own, last = err.splitlines()
    told = json.loads(last)
    (job,) = exec_in.reports()
    assert (code, out, own) == (3, "mine\n", ["also mine"])
    assert (told["workspace"], told["exit_code"], told["signal"], told["oom_killed"]) == (ID, 3, None, False)
    assert (told["job"], told["error"], told["output_bytes"]) == (job.id, None, 15)
    code, _, err = exec_in.run("true", "--json", options=("--json",))
    assert (code, json.loads(err)["job"]) == (0, None)
    code, _, err = exec_in.run("no-such-program", options=("--json",))
    assert (code, json.loads(err)["error"]["code"]) == (127, "not_found")
    code, out, err = exec_in.run("sh", "-c", 'echo "$1"', "sh", "--json")
    assert (code, out, err) == (0, "--json\n", ""), "behind -- it is the command's own word"
