"""Driver `command`: programs of the operator, real ones, good and bad."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mothball.errors import ConfigError, InvalidParams, NotRunning, OperationFailed, PathNotAllowed, TimedOut
from mothball.runtime import Driver, driver_for, proc, programs
from mothball.settings import Settings
from tests.integration.runtime.support import nothing
from tests.support import eventually

Make = Callable[..., Driver]

ECHO = """
import json, os, sys
question = json.load(sys.stdin)
with open(os.path.join(os.path.dirname(os.path.realpath(__file__)), "asked.json"), "w") as file:
    json.dump({"argv": sys.argv[1:], "question": question, "environment": dict(os.environ), "cwd": os.getcwd()}, file)
print(json.dumps({
    "alive": {"alive": True, "reason": "vm is up", "facts": {"vm": 7, "list": [1]}},
    "stop": {"how": "term", "facts": {"exit_code": 0}, "left": []},
    "stats": {"cpu_seconds": 1.5, "rss_bytes": 10, "processes": 2},
    "ports": {"ports": [{"address": "10.0.0.2", "port": 80, "process": "web"}, {"address": "10.0.0.2", "port": 22},
                        {"address": "10.0.0.2", "port": 80, "process": "web"}]},
}[sys.argv[1]]))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "drivers"
    made.mkdir(mode=0o755)
    return made


@pytest.fixture
def make(folder: Path, make_settings: Callable[..., Settings], tmp_path: Path) -> Make:
    def made(text: str, interpreter: str = "/bin/sh", **handle: Any) -> Driver:
        program = folder / "vm"
        program.write_text(f"#!{interpreter}\n{text}")
        program.chmod(0o755)
        settings = make_settings(runtime_commands=str(folder))
        return driver_for({"driver": "command", "name": "vm", **handle}, settings, path=str(tmp_path))

    return made


@pytest.fixture
def echo(make: Make) -> Driver:
    return make(ECHO, interpreter=f"{sys.executable} -S", vm_id="i-1", note="; rm -rf /", number=3)


def asked(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "asked.json").read_text())  # type: ignore[no-any-return]


def test_the_program_gets_the_handle_as_json_and_never_as_an_argument(echo: Driver, folder: Path, tmp_path: Path) -> None:
    found = echo.alive()
    assert (found.alive, found.reason, found.facts) == (True, "vm is up", {"vm": 7})
    seen = asked(folder)
    assert seen["argv"] == ["alive"]
    assert seen["question"] == {
        "verb": "alive",
        "handle": {"vm_id": "i-1", "note": "; rm -rf /", "number": 3},
        "path": str(tmp_path),
    }
    assert seen["cwd"] == "/"


def test_what_a_hanging_program_started_in_a_session_of_its_own_is_killed_with_it(
    make: Make, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As sudo and ssh do. Both would end by themselves."""
    monkeypatch.setattr("mothball.runtime.command.CALL_SECONDS", 1.0)
    child = "import os,sys,time; os.setsid(); open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(30)"
    found = make(f'{sys.executable} -S -c "{child}" {folder / "pid"} & sleep 30')
    with pytest.raises(TimedOut):
        found.alive()
    pid = int((folder / "pid").read_text())
    eventually(lambda: (now := proc.read(pid)) is None or now.dead, what="the end of its child")


def test_the_program_sees_none_of_the_workers_secrets(echo: Driver, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTHBALL_REDIS_URL", "redis://:secret@127.0.0.1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    echo.alive()
    assert "secret" not in json.dumps(asked(folder)["environment"])


def test_each_verb_has_its_answer(echo: Driver, folder: Path, tmp_path: Path) -> None:
    stopped = echo.stop(2.5, nothing)
    assert (stopped.how, stopped.facts, stopped.left) == ("term", {"exit_code": 0}, [])
    assert asked(folder)["question"]["grace_s"] == 2.5
    stats = echo.stats(str(tmp_path))
    assert (stats.cpu_seconds, stats.rss_bytes, stats.processes) == (1.5, 10, 2)
    assert stats.disk_bytes is not None
    assert [(each.port, each.process, each.pid) for each in echo.ports()] == [(22, "", None), (80, "web", None)]


@pytest.mark.parametrize(
    ("verb", "answer"),
    [
        ("alive", ""), ("alive", "nonsense"), ("alive", "[]"), ("alive", '{"alive": "yes"}'), ("alive", '{"alive": 1}'),
        ("alive", "[" * 100_000), ("stop", '{"how": "gently"}'), ("stop", '{"how": "term", "left": 3}'),
        ("stats", '{"cpu_seconds": -1, "rss_bytes": 1, "processes": 1}'),
        ("stats", '{"cpu_seconds": NaN, "rss_bytes": 1, "processes": 1}'),
        ("stats", '{"cpu_seconds": 1e400, "rss_bytes": 1, "processes": 1}'), ("stats", "{}"), ("ports", '{"ports": [{"port": 0}]}'),
        ("ports", '{"ports": [{"port": 70000}]}'), ("ports", '{"ports": {}}'), ("ports", '{"ports": [1]}'),
    ],
)  # fmt: skip
def test_garbage_is_one_clear_error_that_names_the_program(make: Make, folder: Path, verb: str, answer: str) -> None:
    (folder / "answer").write_text(answer)
    driver = make(f"cat {folder / 'answer'}")
    arguments = {"stop": (1, nothing), "stats": (None,)}.get(verb, ())
    with pytest.raises(OperationFailed, match=f"driver vm {verb}"):
        getattr(driver, verb)(*arguments)


def test_a_program_that_fails_says_what_it_said(make: Make) -> None:
    with pytest.raises(OperationFailed, match="ended with 3: no such vm"):
        make("echo 'no such vm' >&2; exit 3").alive()


def test_stats_of_what_does_not_run(make: Make) -> None:
    with pytest.raises(NotRunning):
        make("""echo '{"running": false}'""").stats(None)


def test_a_program_that_hangs_is_ended_with_its_children(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mothball.runtime.command.CALL_SECONDS", 0.5)
    driver = make(f"sleep 1000 & echo $! > {tmp_path}/child; trap '' TERM; while true; do sleep 1; done")
    began = time.monotonic()
    with pytest.raises(TimedOut, match="driver vm alive"):
        driver.alive()
    assert time.monotonic() - began < 3
    child = int((tmp_path / "child").read_text())
    eventually(lambda: not Path(f"/proc/{child}").exists() or "State:\tZ" in Path(f"/proc/{child}/status").read_text())


def test_a_program_that_talks_for_ever_is_ended(make: Make) -> None:
    with pytest.raises(OperationFailed, match="more than"):
        make("yes").alive()


def test_a_daemon_that_the_program_leaves_behind_does_not_hold_the_answer_up(make: Make, tmp_path: Path) -> None:
    driver = make(f"""sleep 30 & echo $! > {tmp_path}/child; echo '{{"alive": true}}'""")
    began = time.monotonic()
    assert driver.alive().alive
    assert time.monotonic() - began < 5
    os.kill(int((tmp_path / "child").read_text()), 9)


def test_a_stop_asks_meanwhile_whether_it_is_still_wanted(make: Make) -> None:
    def cancelled() -> None:
        raise KeyError

    began = time.monotonic()
    with pytest.raises(KeyError):
        make("sleep 60").stop(30, cancelled)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("name", ["../sh", "/bin/sh", "a/b", "..", ".", "", "-x", "A", "a b", "a\0", "x" * 65])
def test_no_name_leads_out_of_the_folder(name: str, make_settings: Callable[..., Settings], folder: Path) -> None:
    with pytest.raises(InvalidParams):
        driver_for({"driver": "command", "name": name}, make_settings(runtime_commands=str(folder)))


def test_a_program_that_others_can_change_is_not_run(make: Make, folder: Path) -> None:
    driver = make("""echo '{"alive": true}'""")
    (folder / "vm").chmod(0o777)
    with pytest.raises(PathNotAllowed, match="can be changed by others"):
        driver.alive()
    (folder / "vm").chmod(0o755)
    folder.chmod(0o777)
    with pytest.raises(PathNotAllowed, match="can be changed by others"):
        driver.alive()
    folder.chmod(0o755)
    (folder / "vm").rename(folder / "real")
    (folder / "vm").symlink_to(folder / "real")
    with pytest.raises(PathNotAllowed, match="symbolic link"):
        driver.alive()


def test_what_is_not_there_not_executable_or_switched_off_is_said(
    make: Make, folder: Path, make_settings: Callable[..., Settings]
) -> None:
    driver = make("true")
    (folder / "vm").chmod(0o644)
    with pytest.raises(ConfigError, match="not an executable file"):
        driver.alive()
    (folder / "vm").unlink()
    with pytest.raises(ConfigError, match="no runtime driver vm"):
        driver.alive()
    with pytest.raises(ConfigError, match="MOTHBALL_RUNTIME_COMMANDS"):
        driver_for({"driver": "command", "name": "vm"}, make_settings())


def test_a_program_that_does_not_listen_is_no_error(make: Make) -> None:
    assert make("""exec 0<&-; echo '{"alive": false, "reason": "gone"}'""", note="x" * 1000).alive().reason == "gone"


def test_what_cannot_be_run_is_said() -> None:
    with pytest.raises(OperationFailed, match="cannot be run"):
        programs.run(["/nonexistent"], seconds=1, what="a test")
