"""From the command to the report: what `mothball exec` saw is what the report of a worker on that host says."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from mothball.crash.own_cgroup import OwnCgroup
from mothball.errors import MothballError
from mothball.settings import Settings
from mothball.store.artifact import find_report, load_report
from tests.integration.crashing import ID, Crashing
from tests.support import eventually, not_permitted
from workers.config import child_env
from workers.redis_server import RedisServer

SCHEMA = json.loads((Path(__file__).resolve().parents[2] / "docs" / "crash-report.schema.json").read_text())
TOKEN = "ghp_" + "A1b2C3d4E5" * 3 + "f6G7h8"


@pytest.fixture
def crashing(private_redis: RedisServer, make_settings: Callable[..., Settings], tmp_path: Path) -> Iterator[Crashing]:
    made = Crashing(make_settings(), tmp_path / "w")
    yield made
    made.close()


def execute(crashing: Crashing, *command: str, options: tuple[str, ...] = ()) -> tuple[int, dict[str, Any]]:
    """Run `command` in the workspace, let its report be made; the exit code, and what the report's job answered."""
    argv = [sys.executable, "-m", "workers.main", "exec", ID, *options, "--", *command]
    done = subprocess.run(
        argv, env=child_env(crashing.settings), stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False
    )
    jobs = [job for job in crashing.fleet.jobs(workspace=ID, state="queued") if job.task == "workspace.crash_report"]
    assert len(jobs) == 1, done.stderr.decode()
    return done.returncode, crashing.deliver(jobs[0].id)


def told(crashing: Crashing, *command: str, options: tuple[str, ...] = ()) -> tuple[int, str]:
    """Run `command` while a worker is there, which makes the report at once; exit code, and what the user reads."""
    argv = [sys.executable, "-m", "workers.main", "exec", ID, *options, "--", *command]
    env = child_env(crashing.settings)
    process = subprocess.Popen(
        argv, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )

    def queued() -> list[str]:
        return [job.id for job in crashing.fleet.jobs(workspace=ID, state="queued") if job.task == "workspace.crash_report"]

    (job,) = eventually(queued, seconds=30)
    with suppress(MothballError):
        crashing.deliver(job)
    _, err = process.communicate(timeout=30)
    return process.returncode, err


def test_the_report_s_id_is_said_when_it_is_made_at_once(crashing: Crashing) -> None:
    code, err = told(crashing, "sh", "-c", "exit 3")
    (report,) = crashing.registry.crashes.list()
    assert code == 3
    assert f"crash report: {report.id} (`mothball crash-reports show {report.id}` shows it)\n" in err
    code, err = told(crashing, "sh", "-c", "exit 3")
    assert code == 3
    assert f"crash report: {report.id}, where the same failure is counted as number 2\n" in err


def test_a_report_that_cannot_be_made_is_said_and_the_exit_code_stays(crashing: Crashing) -> None:
    code, err = told(crashing, "sh", "-c", f"rm -rf {crashing.folder}; exit 5")
    assert code == 5
    assert "error: the crash report was not made: source_missing: " in err


def test_without_a_worker_nobody_waits_for_the_report(crashing: Crashing) -> None:
    argv = [sys.executable, "-m", "workers.main", "exec", ID, "--", "false"]
    began = time.monotonic()
    done = subprocess.run(argv, env=child_env(crashing.settings), capture_output=True, text=True, timeout=60, check=False)
    assert time.monotonic() - began < 15
    assert done.returncode == 1
    assert "crash report: job " in done.stderr


def report_of(crashing: Crashing, result: dict[str, Any]) -> dict[str, Any]:
    found = find_report(crashing.store, ID, result["id"])
    report: dict[str, Any] = json.loads(load_report(crashing.store, found.digest))
    Draft202012Validator(SCHEMA).validate(report)
    return report


def test_a_kill_for_want_of_memory_is_in_the_report_as_such(crashing: Crashing) -> None:
    with OwnCgroup(64 << 20) as own:
        if own.folder is None:
            not_permitted(f"make a cgroup ({own.why_not})")
    eats = "x = []\nwhile True: x.append(bytearray(1 << 20))"
    code, result = execute(crashing, sys.executable, "-c", eats, options=("--memory", "64MiB"))
    assert code == 128 + signal.SIGKILL
    report = report_of(crashing, result)
    ended = report["evidence"]["exit"]
    assert (ended["signal_name"], ended["oom_killed"]) == ("SIGKILL", True)
    assert report["error"]["title"] == "killed for want of memory"
    assert report["evidence"]["cgroup"]["memory_limit"] == 64 << 20
    assert report["evidence"]["command"][1:] == ["-c", eats]


def test_what_the_command_changed_and_said_is_in_the_report_without_its_secrets(crashing: Crashing, tmp_path: Path) -> None:
    crashing.deliver(crashing.fleet.snapshot(ID, fresh=True).id)
    log = tmp_path / "run.log"
    script = f"echo second >> a.txt; echo TOKEN={TOKEN} > .env; echo pushing with {TOKEN}; echo 'ValueError: refused' >&2; exit 3"
    code, result = execute(crashing, "sh", "-c", script, options=("--log", str(log)))
    assert code == 3
    report = report_of(crashing, result)
    assert report["error"]["title"] == "ValueError: refused"
    assert report["since"]["ref"] == "snap-1"
    assert {each["path"]: each["kind"] for each in report["since"]["changes"]} == {".env": "added", "a.txt": "changed"}
    assert "+second\n" in report["since"]["patch"]
    assert "refused" in report["evidence"]["log"]["text"]
    assert report["capture"]["source"] == "fresh"
    assert TOKEN.encode() not in json.dumps(report).encode()
    package = Path(result["path"])
    assert TOKEN.encode() not in package.read_bytes()
    with tarfile.open(package) as archive:
        inside = archive.extractfile("report.json")
        assert inside is not None
        assert json.loads(inside.read()) == report
    assert report["package"]["files"] == result["files"] == 3


def test_the_same_failure_again_is_counted_and_not_stored_again(crashing: Crashing) -> None:
    script = "echo $$; echo 'ValueError: no '$$; exit 1"
    _, first = execute(crashing, "sh", "-c", script)
    _, second = execute(crashing, "sh", "-c", script)
    assert (second["id"], second["repeated"], second["count"]) == (first["id"], True, 2)
    _, other = execute(crashing, "sh", "-c", script.replace("exit 1", "exit 2"))
    assert not other["repeated"]
