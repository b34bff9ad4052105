"""Evidence: taken in seconds whatever hangs, of real processes, files and cgroup trees, and nothing outside of what is allowed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mothball.crash import cgroup, logtail
from mothball.crash import evidence as evidence_module
from mothball.crash.evidence import Given, collect, exit_facts
from mothball.crash.given import ended, signal_number
from mothball.errors import InvalidParams, NotRunning, PathNotAllowed, TimedOut
from mothball.runtime import Alive, driver_for, handle_of_pid, proc
from mothball.settings import Settings
from tests.support import eventually

ALLOWED = ("PATH", "LC_*", "PYTHON*")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    folder = tmp_path / "roots" / "w"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def conf(tmp_path: Path, place: Path) -> Settings:
    return Settings(
        host="box", data_dir=tmp_path / "data", workspace_roots=(place.parent,), crash_log_bytes=4096, crash_env=ALLOWED
    )


def subject(place: Path, **runtime: Any) -> Any:
    return SimpleNamespace(id="owner/repo#7", path=str(place), runtime=runtime)


def gather(given: Given, place: Path, conf: Settings, driver: Any = None) -> dict[str, Any]:
    return collect(given, workspace=subject(place), settings=conf, driver=driver, root=place)


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts processes that end with the test."""
    started: list[subprocess.Popen[bytes]] = []

    def run(*argv: str, **options: Any) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(argv, **options))
        return started[-1]

    yield run
    for each in started:
        each.kill()
        each.wait()


# -- how it ended ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "number", "facts"),
    [
        (1, None, {"code": 1, "signal": None, "code_means": None}),
        (137, None, {"code": 137, "signal": None, "code_means": "SIGKILL"}),
        (-11, None, {"code": None, "signal": 11, "signal_name": "SIGSEGV"}),
        (None, "SIGTERM", {"signal": 15, "signal_name": "SIGTERM"}),
        (None, "kill", {"signal": 9}),
        (None, "34", {"signal": 34}),
        (None, None, {"code": None, "signal": None, "oom_killed": None}),
        (128, None, {"code_means": None}),
    ],
)
def test_exit_code_and_signal_are_told_apart(code: int | None, number: str | None, facts: dict[str, Any]) -> None:
    assert facts.items() <= exit_facts(Given(exit_code=code, signal=number), None).items()


@pytest.mark.parametrize("value", ["SIGNOTHING", "0", 65, -1, True, "", "9; rm", "²"])
def test_what_is_no_signal_is_refused(value: Any) -> None:
    with pytest.raises(InvalidParams):
        signal_number(value)


@pytest.mark.parametrize(
    ("given", "counted", "killed"),
    [
        (Given(signal=9), {"oom_kills": 1}, True),
        (Given(exit_code=137), {"oom_kills": 2}, True),
        (Given(signal=9), {"oom_kills": 0}, False),
        (Given(exit_code=2), {"oom_kills": 1}, False),  # somebody else's, or an older one
        (Given(exit_code=2), {"oom_kills": 1, "own": True}, True),  # make, whose compiler was killed
        (Given(signal=9), {"version": 2}, None),
        (Given(signal=9), {"error": "gone"}, None),
        (Given(signal=9), None, None),
    ],
)
def test_an_oom_kill_is_claimed_on_evidence_only(given: Given, counted: dict[str, Any] | None, killed: bool | None) -> None:
    found = exit_facts(given, counted)
    assert found["oom_killed"] is killed
    assert bool(found["oom_evidence"]) is (killed is not None)


def test_what_the_runtime_says_counts_when_nobody_else_does() -> None:
    found = exit_facts(Given(), None, {"facts": {"exit_code": 3, "oom": True}})
    assert (found["code"], found["oom_killed"], found["oom_evidence"]) == (3, True, "the runtime says so")
    assert exit_facts(Given(exit_code=4), None, {"facts": {"exit_code": 3}})["code"] == 4
    assert exit_facts(Given(), None, {"facts": {"signal": "nonsense"}})["signal"] is None
    assert ended(-15, None).signal == 15


# -- cgroups ---------------------------------------------------------------------------------------------------------------


def tree(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_a_cgroup_of_version_2_says_limit_peak_and_kills(tmp_path: Path) -> None:
    tree(tmp_path, cgroup__controllers="cpu memory pids\n")
    tree(
        tmp_path / "job.slice" / "a", memory__max="max\n", memory__current="4096\n", memory__peak="8192\n",
        memory__events="low 0\nhigh 0\nmax 7\noom 2\noom_kill 1\n", pids__current="3\n", pids__max="100\n", pids__events="max 5\n",
        cpu__stat="usage_usec 9\nthrottled_usec 17\n",
    )  # fmt: skip
    assert cgroup.read("/job.slice/a", tmp_path) == {
        "version": 2, "path": "/job.slice/a", "memory_limit": None, "memory_current": 4096, "memory_peak": 8192, "oom_kills": 1,
        "limit_hits": 7, "pids_current": 3, "pids_limit": 100, "pids_limit_hits": 5, "throttled_us": 17,
    }  # fmt: skip
    assert cgroup.read(str(tmp_path / "job.slice/a"), tmp_path)["memory_peak"] == 8192


def test_a_cgroup_of_version_1_says_the_same(tmp_path: Path) -> None:
    limits = {"memory__limit_in_bytes": "67108864\n", "memory__usage_in_bytes": "1\n", "memory__max_usage_in_bytes": "2\n"}
    kills = "oom_kill_disable 0\nunder_oom 0\noom_kill 4\n"
    tree(tmp_path / "memory" / "a", **limits, memory__failcnt="3\n", memory__oom_control=kills)
    tree(tmp_path / "pids" / "a", pids__current="1\n", pids__max="max\n")
    tree(tmp_path / "cpu" / "a", cpu__stat="nr_periods 1\nthrottled_time 5000\n")
    assert cgroup.read("a", tmp_path) == {
        "version": 1, "path": "/a", "memory_limit": 67108864, "memory_current": 1, "memory_peak": 2, "oom_kills": 4,
        "limit_hits": 3, "pids_current": 1, "throttled_us": 5,
    }  # fmt: skip
    tree(tmp_path / "memory" / "a", memory__limit_in_bytes="9223372036854771712\n")
    assert cgroup.read("/a", tmp_path)["memory_limit"] is None


def test_this_machine_s_own_cgroup_can_be_read() -> None:
    try:
        found = cgroup.read_of(os.getpid())
    except InvalidParams:
        return  # a container whose processes are in the root of its namespace
    assert found["version"] in {1, 2}


def test_no_cgroup_path_leaves_the_mount(tmp_path: Path) -> None:
    mount = tmp_path / "mount"
    tree(mount / "memory")
    tree(tmp_path / "secret", memory__oom_control="oom_kill 1\n")
    (mount / "memory" / "link").symlink_to(tmp_path / "secret")
    for path in ("../secret", "/a/../../secret", str(tmp_path / "secret") + "/../secret", "a\0b", "x" * 5000):
        with pytest.raises(InvalidParams):
            cgroup.read(path, mount)
    with pytest.raises(NotRunning):
        cgroup.read("link", mount)
    with pytest.raises(NotRunning):
        cgroup.read("gone", mount)
    for root in ("/", "", str(mount), str(mount / "memory")):
        with pytest.raises(InvalidParams, match="whole machine"):
            cgroup.read(root, mount)


def test_a_file_that_is_a_link_within_a_cgroup_is_not_read(tmp_path: Path) -> None:
    tree(tmp_path / "memory" / "a")
    (tmp_path / "number").write_text("42\n")
    (tmp_path / "memory" / "a" / "memory.usage_in_bytes").symlink_to(tmp_path / "number")
    with pytest.raises(NotRunning):
        cgroup.read("a", tmp_path)


# -- the log ---------------------------------------------------------------------------------------------------------------


def test_of_a_log_of_two_gigabytes_the_end_is_kept_and_said(place: Path, conf: Settings) -> None:
    log = place / "run.log"
    with log.open("wb") as file:
        file.seek(2 * 1024**3)
        file.write(b"\n" + b"".join(b"line %04d\n" % n for n in range(1000)))
    started = time.monotonic()
    found = logtail.tail("run.log", root=place, settings=conf)
    assert time.monotonic() - started < 1
    assert found["bytes"] == log.stat().st_size
    assert found["truncated"]
    assert found["text"].endswith("line 0999\n")
    assert found["text"].startswith("line ")
    assert 3000 < found["tail_bytes"] <= 4096


def test_a_log_of_exactly_the_limit_is_whole(place: Path, conf: Settings) -> None:
    (place / "a.log").write_bytes(b"x" * 4096)
    found = logtail.tail(str(place / "a.log"), root=place, settings=conf)
    assert (found["truncated"], found["tail_bytes"]) == (False, 4096)
    (place / "a.log").write_bytes(b"first\n" + b"x" * 4091)
    assert logtail.tail("a.log", root=place, settings=conf)["truncated"]


def test_a_cut_log_does_not_begin_within_a_key(place: Path, conf: Settings) -> None:
    key = b"-----BEGIN PRIVATE KEY-----\n" + b"MIIEvgIBADANBgkqhkiG9w0BAQEFAASC\n" * 60 + b"-----END PRIVATE KEY-----\n"
    (place / "a.log").write_bytes(key + b"after\n" * 500)
    found = logtail.tail("a.log", root=place, settings=conf)
    assert "MIIE" not in found["text"]
    assert found["text"].endswith("after\n")


@pytest.mark.parametrize("kind", ["fifo", "link", "folder link", "outside", "dots", "device", "folder", "missing"])
def test_nothing_but_a_file_below_the_roots_is_read_and_nothing_hangs(
    kind: str, place: Path, conf: Settings, tmp_path: Path
) -> None:
    secret = tmp_path / "shadow"
    secret.write_text("root:$6$secret")
    log = "it"
    match kind:
        case "fifo":
            os.mkfifo(place / "it")
        case "link":
            (place / "it").symlink_to(secret)
        case "folder link":
            (place / "sub").symlink_to(tmp_path)
            log = "sub/shadow"
        case "outside":
            log = str(secret)
        case "dots":
            log = "../../shadow"
        case "device":
            log = "/dev/zero"
        case "folder":
            (place / "it").mkdir()
    with pytest.raises((InvalidParams, PathNotAllowed, FileNotFoundError)) as raised:
        logtail.tail(log, root=place, settings=conf)
    assert "$6$" not in str(raised.value)
    found = gather(Given(log=log), place, conf)["log"]
    assert set(found) == {"error"}


def test_a_log_shows_no_control_characters(place: Path, conf: Settings) -> None:
    (place / "a.log").write_bytes(b"\x1b]0;gotcha\x07\xff\x00ok\n")
    assert logtail.tail("a.log", root=place, settings=conf)["text"] == "<ESC>]0;gotcha<0x07><0xff><0x00>ok\n"


# -- processes and environment -----------------------------------------------------------------------------------------


def test_processes_of_the_workspace_are_a_tree(place: Path, conf: Settings, start: Callable[..., subprocess.Popen[bytes]]) -> None:
    outside = start("sleep", "60", cwd="/")
    child = start("sh", "-c", "sleep 61 & sleep 62; :", cwd=place)
    found = eventually(lambda: ok if (ok := gather(Given(), place, conf)["processes"])["count"] == 3 else None)
    listed = found["listed"]
    assert listed[0]["pid"] == child.pid
    assert [each["depth"] for each in listed] == [0, 1, 1]
    assert {tuple(each["argv"]) for each in listed[1:]} == {("sleep", "61"), ("sleep", "62")}
    assert outside.pid not in {each["pid"] for each in listed}
    for each in listed[1:]:
        os.kill(each["pid"], signal.SIGKILL)


def test_a_named_process_shows_its_environment_as_far_as_that_is_allowed(
    place: Path, conf: Settings, start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    process = start("sleep", "60", cwd=place, env={"PATH": os.environ["PATH"], "LC_ALL": "C", "DB_PASSWORD": "correct-horse"})
    eventually(lambda: Path(f"/proc/{process.pid}/cmdline").read_bytes().startswith(b"sleep"))
    found = gather(Given(pid=process.pid), place, conf)
    assert [each["pid"] for each in found["processes"]["listed"]] == [process.pid]
    environment = found["environment"]
    assert (environment["source"], environment["left_out"]) == ("process", 1)
    assert set(environment["variables"]) == {"PATH", "LC_ALL"}
    assert "correct-horse" not in repr(found)


def test_of_an_environment_only_what_is_allowed_is_kept(place: Path, conf: Settings) -> None:
    env = {"PATH": "/bin", "LC_TIME": "C", "PYTHONPATH": "x" * 10_000, "AWS_SECRET_ACCESS_KEY": "zzz", "path": "no"}
    found = gather(Given(env=env), place, conf)["environment"]
    assert found["source"] == "given"
    assert set(found["variables"]) == {"PATH", "LC_TIME", "PYTHONPATH"}
    assert found["left_out"] == 2
    assert found["variables"]["PYTHONPATH"] == "[10000 characters]"


def test_a_process_outside_of_the_workspace_is_none_of_its_business(
    place: Path, conf: Settings, start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    outside = start("sleep", "60", cwd="/", env={"PATH": os.environ["PATH"], "LC_ALL": "mine"})
    child = start("sh", "-c", "cd /; sleep 61; :", cwd=place, start_new_session=True)
    handle = handle_of_pid(child.pid)
    for pid in (outside.pid, 1):
        found = collect(Given(pid=pid), workspace=subject(place, **handle), settings=conf, driver=None, root=place)
        assert "does not work in the workspace" in found["environment"]["error"]
        assert pid not in {each["pid"] for each in found["processes"]["listed"]}
        assert found["cgroup"] is None
    # What the runtime has started is its own, wherever it works.
    inner = eventually(lambda: [each for each in proc.everything().values() if each.ppid == child.pid])[0].pid
    found = collect(Given(pid=inner), workspace=subject(place, **handle), settings=conf, driver=None, root=place)
    assert found["environment"]["source"] == "process"
    # A pid that another process has now is not the runtime.
    handle["start_time"] = 1
    found = collect(Given(), workspace=subject(place, **handle), settings=conf, driver=None, root=place)
    assert found["environment"]["source"] == "none"
    os.killpg(child.pid, signal.SIGKILL)


def test_of_a_thousand_processes_two_hundred_are_listed_and_all_counted(
    place: Path, conf: Settings, start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    code = "import os, time\nfor _ in range(230):\n    if os.fork() == 0:\n        time.sleep(60); os._exit(0)\ntime.sleep(60)"
    start(sys.executable, "-c", code, cwd=place, start_new_session=True)
    found = eventually(lambda: ok if (ok := gather(Given(), place, conf)["processes"])["count"] == 231 else None, seconds=20)
    try:
        assert len(found["listed"]) == 200
    finally:
        os.killpg(found["listed"][0]["pid"], signal.SIGKILL)


# -- runtime, host, limits -------------------------------------------------------------------------------------------------


def test_the_runtime_of_a_living_process_is_asked(
    place: Path, conf: Settings, start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    handle = handle_of_pid(start("sleep", "60", cwd=place).pid)
    driver = driver_for(handle, conf, path=str(place))
    found = collect(Given(), workspace=subject(place, **handle), settings=conf, driver=driver, root=place)
    assert found["runtime"]["alive"] is True
    assert found["runtime"]["stats"]["processes"] == 1
    assert found["host"]["name"] == "box"
    assert found["host"]["disk"]["workspace"]["free"] > 0


class Hanging:
    """A runtime that does not answer."""

    name = "docker"

    def __init__(self) -> None:
        self.release = threading.Event()

    def alive(self) -> Alive:
        self.release.wait(30)
        return Alive(alive=True, reason="late")


class Refusing(Hanging):
    """One that answers with an error of its own, with an escape sequence in it."""

    def alive(self) -> Alive:
        raise TimedOut("no answer\x1b[2J")


def test_a_part_that_hangs_costs_its_own_time_only(place: Path, conf: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence_module, "PART_SECONDS", 0.3)
    driver = Hanging()
    started = time.monotonic()
    found = gather(Given(exit_code=1), place, conf, driver)
    took = time.monotonic() - started
    driver.release.set()
    assert took < 2
    assert found["runtime"] == {"error": "not known after 0.3 s"}
    assert found["exit"]["code"] == 1
    assert found["host"]["name"] == "box"


def test_all_limits_together_stay_below_ten_seconds() -> None:
    assert evidence_module.PART_SECONDS <= evidence_module.TOTAL_SECONDS < 10


def test_what_cannot_be_had_says_why_and_raises_nothing(conf: Settings, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    found = gather(Given(log="x.log", cgroup="../..", pid=2**22 + 1, signal="SIGWHAT"), gone, conf, Refusing())
    assert found["runtime"] == {"error": "no answer<ESC[2J>"}
    for part in ("log", "cgroup", "exit", "environment"):
        assert set(found[part]) == {"error"}, part
    assert found["host"]["disk"]["workspace"] == {"error": "not there"}


def test_a_directory_that_is_a_loop_of_links_raises_nothing(conf: Settings, tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    found = gather(Given(pid=os.getppid(), exit_code=1, log="x"), tmp_path / "a", conf)
    assert set(found["log"]) == {"error"}
    assert found["exit"]["code"] == 1


def test_figures_that_were_taken_before_the_cgroup_went_are_kept(place: Path, conf: Settings) -> None:
    found = gather(Given(signal=9, cgroup={"oom_kills": 1, "own": True, "memory_peak": 5, "deep": {"no": 1}}), place, conf)
    assert found["cgroup"] == {"oom_kills": 1, "own": True, "memory_peak": 5}
    assert found["exit"]["oom_killed"] is True
