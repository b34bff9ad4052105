"""Bundles with the real runc: as root and rootless, under limits, ended in every way, and nothing left behind."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mothball.client import Fleet
from mothball.errors import ConfigError, InvalidParams, OperationFailed, PathNotAllowed, TimedOut
from mothball.package import bundle_run, run_folder
from mothball.package.bundle import write_bundle
from mothball.package.bundle_run import Interrupted, RunResult, run_bundle
from mothball.package.bundle_spec import LEAST_MEMORY, check_bundle
from mothball.package.target import scratch_folder
from mothball.settings import Settings
from mothball.store import Store
from mothball.store.tree import Tree
from tasks import MODULES, services
from tests.commands import beside_jobs
from tests.integration.delivery import deliver
from tests.integration.runtime.containers import static_busybox
from tests.support import eventually, not_permitted, require_tool
from tests.unit.store.build import Dir, File, Link, capture, layer, new_store
from workers.redis_server import RedisServer

UID = 12_345
APPLETS = ("sh", "sleep", "cat", "id", "touch", "tail", "ls", "seq", "echo", "head", "hostname", "wget", "kill")
MIB = 1024**2


def digest_with_busybox(store: Store) -> str:
    busybox = static_busybox().read_bytes()
    tree: dict[bytes, Any] = {b"bin/busybox": File(busybox, mode=0o755), b"data": File(b"of the workspace\n")}
    tree |= {b"bin/" + name.encode(): Link(b"busybox") for name in APPLETS}
    return capture(store, layer({b"bin": Dir(), **tree}, frame_bytes=MIB), workspace="o/r#1")


class Bundles:
    """Makes bundles whose workspace holds a busybox, and runs them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.scratch = folder / "scratch"
        self.store = new_store(folder / "store")
        self.digest = digest_with_busybox(self.store)
        self.number = 0

    def write(self, script: str, **options: Any) -> Path:
        self.number += 1
        place = self.folder / f"bundle{self.number}"
        if os.geteuid() != 0:
            options.setdefault("rootless", True)
        write_bundle(
            self.store, self.digest, place, command=["/workspace/bin/sh", "-c", script], env={"PATH": "/workspace/bin"}, **options
        )
        return place

    def run(self, script: str, **options: Any) -> RunResult:
        return self.start(self.write(script), **options)

    def start(self, place: Path, **options: Any) -> RunResult:
        return run_bundle(place, **{"output": "capture", "scratch": self.scratch, "timeout": 60.0, **options})


def leftovers(scratch: Path) -> list[str]:
    """What runs of bundles have left: folders, cgroups, processes."""
    found = [path.name for path in scratch.iterdir()] if scratch.exists() else []
    found += [str(path) for path in Path("/sys/fs/cgroup").rglob(f"mothball-{os.getpid()}-*")]
    mounts = Path("/proc/self/mountinfo").read_text()
    return found + [line for line in mounts.splitlines() if str(scratch.parent) in line]


@pytest.fixture
def bundles(tmp_path: Path) -> Iterator[Bundles]:
    require_tool("runc")
    made = Bundles(tmp_path)
    yield made
    assert leftovers(made.scratch) == []


def as_user(uid: int, call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """`call()` in a child process that is user `uid` and no other; its JSON answer."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            os.environ["HOME"] = "/"
            os.environ.pop("XDG_RUNTIME_DIR", None)
            answer = call()
        except BaseException as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        os.write(writer, json.dumps(answer).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        data = pipe.read()
    os.waitpid(pid, 0)
    found: dict[str, Any] = json.loads(data)
    return found


@pytest.fixture
def shared() -> Iterator[Bundles]:
    """Bundles in a folder that every user can come to, unlike pytest's own."""
    require_tool("runc")
    require_root()
    folder = Path(tempfile.mkdtemp(prefix="mothball-test-"))
    folder.chmod(0o755)
    try:
        made = Bundles(folder)
        yield made
        assert leftovers(made.scratch) == []
    finally:
        shutil.rmtree(folder)


def require_root() -> None:
    if os.geteuid() != 0:
        not_permitted("run as another user")


# -- how it runs -------------------------------------------------------------------------------------------------------


def test_b115_a_command_runs_alone_and_its_end_is_told(bundles: Bundles) -> None:
    result = bundles.run("id; hostname; cat /workspace/data; ls /proc | head -3; echo oops >&2; exit 7")
    assert (result.exit_code, result.signal, result.timed_out) == (7, None, False)
    assert result.stdout.startswith(b"uid=0 gid=0\nmothball\nof the workspace\n1\n")
    assert result.stderr == b"oops\n"


def test_b118_it_has_no_capability_no_network_and_a_root_that_is_read_only(bundles: Bundles) -> None:
    script = "cat /proc/self/status; cat /proc/net/dev; touch /workspace/x; touch /tmp/x && echo tmp is writable; ls -la /dev"
    place = bundles.write(script)
    before = sorted((str(path), path.lstat().st_mtime_ns) for path in place.rglob("*"))
    out = bundles.start(place)
    assert out.stdout.count(b"0000000000000000") >= 5
    assert b"CapBnd:\t0000000000000000" in out.stdout
    assert b"NoNewPrivs:\t1" in out.stdout
    assert [line.split(b":")[0].strip() for line in out.stdout.splitlines() if b": " in line and b"eth" in line] == []
    assert b"Read-only file system" in out.stderr
    assert b"tmp is writable" in out.stdout
    assert sorted((str(path), path.lstat().st_mtime_ns) for path in place.rglob("*")) == before  # also nothing in /dev


def test_writable_lets_it_change_the_bundle(bundles: Bundles) -> None:
    place = bundles.write("echo changed > /workspace/data")
    assert bundles.start(place).exit_code != 0
    assert bundles.start(place, writable=True).exit_code == 0
    assert (place / "rootfs/workspace/data").read_text() == "changed\n"


def test_another_command_and_standard_input(bundles: Bundles, tmp_path: Path) -> None:
    place = bundles.write("exit 1")
    (tmp_path / "input").write_bytes(b"typed\n")
    with (tmp_path / "input").open("rb") as stdin:
        result = bundles.start(place, command=["cat"], stdin=stdin)
    assert (result.exit_code, result.stdout) == (0, b"typed\n")
    assert bundles.start(place, command=["cat"]).stdout == b""  # nothing by default


def test_output_without_end_is_kept_bounded(bundles: Bundles) -> None:
    result = bundles.run("seq 1 200000")
    assert result.stdout_bytes > 1_000_000
    assert len(result.stdout) == bundle_run.KEEP_OUTPUT
    assert result.stdout.endswith(b"\n200000\n")


def test_b115_two_runs_of_one_bundle_do_not_meet(bundles: Bundles) -> None:
    place = bundles.write("set -- /proc/[0-9]*; echo $#; sleep 0.5; echo done")
    results: list[RunResult] = []
    threads = [threading.Thread(target=lambda: results.append(bundles.start(place))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Nobody but the command and runc's own process, which is the first, is there.
    assert [result.stdout for result in results] == [b"2\ndone\n"] * 2


@pytest.mark.parametrize("how", ["runc run", "bundle run", "bundle run, writable"])
def test_starting_a_bundle_leaves_no_trace_in_it(bundles: Bundles, how: str) -> None:
    """Without mounts of its own runc makes device nodes and folders in rootfs, also in one that is read-only."""
    place = bundles.write("exit 3", writable=how.endswith("writable"))

    def tree() -> list[tuple[str, int, int, int]]:
        return sorted(
            (str(path), found.st_mode, found.st_mtime_ns, found.st_size) for path in place.rglob("*") for found in [path.lstat()]
        )

    before = tree()
    if how == "runc run":
        state = bundles.folder / "runc"
        name = f"mothball-{os.getpid()}-trace"
        done = subprocess.run(
            ["runc", "--root", state, "run", "-b", place, name], stdin=subprocess.DEVNULL, capture_output=True, check=False
        )
        code = done.returncode
    else:
        code = bundles.start(place).exit_code
    assert code == 3
    assert tree() == before


@pytest.mark.parametrize("memory", [LEAST_MEMORY, 16 * MIB])
def test_under_the_least_memory_a_small_command_still_runs(bundles: Bundles, memory: int) -> None:
    if os.geteuid() != 0:
        not_permitted("limit memory by a cgroup")
    assert bundles.run("echo small", memory=memory).stdout == b"small\n"


# -- limits ------------------------------------------------------------------------------------------------------------


def test_b115_a_run_ends_when_its_time_is_over(bundles: Bundles) -> None:
    result = bundles.run("sleep 100 & sleep 100", timeout=0.5)
    assert (result.timed_out, result.exit_code, result.signal) == (True, 137, 9)
    assert result.seconds < 20


def test_a_command_that_takes_too_much_memory_is_killed_and_that_is_told(bundles: Bundles) -> None:
    result = bundles.run("tail /dev/zero", memory=32 * MIB)
    if os.geteuid() == 0:
        assert (result.exit_code, result.signal, result.oom, result.timed_out) == (137, 9, True, False)
        assert bundles.run("exit 0", memory=32 * MIB).oom is False
    else:
        assert (result.exit_code, result.oom) == (1, None)


def test_a_bundle_with_a_limit_of_its_own_fails_under_it_again(bundles: Bundles) -> None:
    """A package of what was killed for want of memory has that limit in its config.json."""
    place = bundles.write("tail /dev/zero", memory=48 * MIB)
    result = bundles.start(place)
    assert (result.exit_code, result.oom) == ((137, True) if os.geteuid() == 0 else (1, None))
    spec = json.loads((place / "config.json").read_bytes())
    assert f'"limit":{48 * MIB}' in (place / "config.json").read_text() or spec["process"]["rlimits"][-1]["soft"] == 48 * MIB


def test_when_memory_runs_out_on_the_host_it_goes_first(bundles: Bundles) -> None:
    assert bundles.run("cat /proc/self/oom_score_adj").stdout == b"1000\n"


def test_a_bomb_of_processes_stays_small(bundles: Bundles) -> None:
    if os.geteuid() != 0:
        not_permitted("limit processes")
    result = bundles.run("for i in $(seq 1 60); do sleep 5 & done; wait", pids=20, timeout=10)
    assert b"fork" in result.stderr or b"Resource" in result.stderr


# -- rootless ----------------------------------------------------------------------------------------------------------


def test_an_ordinary_user_runs_a_rootless_bundle(shared: Bundles) -> None:
    """A real user without any rights: the kernel decides, not a mock."""
    place = shared.write("id; cat /workspace/data; touch /workspace/x; exit 5", rootless=True, owner=(UID, UID))
    check_bundle(place)  # loads what is imported late, which another user might not be able to read
    home = shared.folder / "home"
    home.mkdir()
    os.chown(home, UID, UID)
    if Path("/proc/sys/user/max_user_namespaces").read_text().strip() == "0":
        pytest.skip("this kernel allows no user namespaces")

    def run() -> dict[str, Any]:
        first = run_bundle(place, output="capture", scratch=home / "s", timeout=60)
        over = run_bundle(place, output="capture", scratch=home / "s", timeout=0.5, command=["sleep", "100"])
        small = run_bundle(place, output="capture", scratch=home / "s", timeout=60, command=["tail", "/dev/zero"], memory=64 * MIB)
        score = run_bundle(place, output="capture", scratch=home / "s", timeout=60, command=["cat", "/proc/self/oom_score_adj"])
        return {
            "score": score.to_dict(),
            "first": first.to_dict(),
            "over": over.to_dict(),
            "small": small.to_dict(),
            "left": os.listdir(home / "s"),
        }

    answer = as_user(UID, run)
    assert "error" not in answer, answer
    assert (answer["first"]["exit_code"], answer["first"]["oom"]) == (5, None)
    assert answer["first"]["stdout"].startswith("uid=0 gid=0\nof the workspace\n")
    assert "Read-only file system" in answer["first"]["stderr"]
    assert (answer["over"]["timed_out"], answer["over"]["exit_code"]) == (True, 137)
    assert answer["small"]["exit_code"] == 1
    assert answer["score"]["stdout"] == "1000\n"
    assert answer["left"] == []


def test_what_a_killed_user_unpacked_goes_whatever_its_modes_are(shared: Bundles) -> None:
    """Root may remove anything, so somebody else has to try."""
    home = shared.folder / "home"
    home.mkdir()
    os.chown(home, UID, UID)

    def run() -> dict[str, Any]:
        left = home / (".package.mothball-export-" + "0" * 16) / "package" / "rootfs" / "locked"
        left.mkdir(parents=True)
        (left / "file").write_text("x")
        left.chmod(0o555)
        left.parent.chmod(0)
        with scratch_folder(home / "package") as folder:
            return {"left": [name for name in os.listdir(home) if name != folder.name]}

    assert as_user(UID, run) == {"left": []}


def test_root_runs_what_was_written_for_another(shared: Bundles) -> None:
    place = shared.write("cat /workspace/data", rootless=True, owner=(UID, UID))
    (place / "rootfs/workspace/data").chmod(0o600)
    assert shared.start(place).stdout == b"of the workspace\n"


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_a_program_that_is_not_there_is_said_in_runcs_words(bundles: Bundles) -> None:
    place = bundles.write("true")
    with pytest.raises(OperationFailed, match=r"nosuch.*not found"):
        bundles.start(place, command=["nosuch"])
    with pytest.raises(OperationFailed, match="could not start"):
        bundles.start(place, command=["/workspace/data"])


def test_without_runc_there_is_one_clear_error(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    place = bundles.write("true")
    monkeypatch.setenv("PATH", str(bundles.folder))
    with pytest.raises(ConfigError, match="runc is not installed"):
        bundles.start(place)


@pytest.mark.parametrize("when", ["at once", "after the container ran"])
def test_a_runc_that_hangs_is_given_up(bundles: Bundles, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    real = shutil.which("runc")
    place = bundles.write("sleep 100")
    fake = bundles.folder / "bin/runc"
    fake.parent.mkdir()
    start = f'case "$*" in *" create "*|*" exec "*) {real} "$@" ;; esac\n' if when != "at once" else ""
    fake.write_text(f"#!/bin/sh\n{start}exec sleep 1000\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(run_folder, "CALL_SECONDS", 1.0)
    monkeypatch.setattr(bundle_run, "END_SECONDS", 1.0)
    began = time.monotonic()
    with pytest.raises(TimedOut, match="runc itself does not answer"):
        bundles.start(place, timeout=2.0)
    assert time.monotonic() - began < 30
    assert not any(b"sleep" in _cmdline(pid) and str(fake).encode() in _cmdline(pid) for pid in _pids())


def _pids() -> list[str]:
    return [name for name in os.listdir("/proc") if name.isdigit()]


def _cmdline(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_whoever_waits_may_end_it(bundles: Bundles) -> None:
    calls: list[int] = []

    def tick() -> None:
        calls.append(1)
        if len(calls) > 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bundles.run("sleep 100", tick=tick)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_us_ends_the_container_first(bundles: Bundles, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    timer = threading.Timer(1.0, lambda: os.kill(os.getpid(), number))
    timer.start()
    with pytest.raises(Interrupted):
        bundles.run("sleep 100")
    timer.join()
    assert signal.getsignal(number) is before


def test_who_asks_twice_does_not_interrupt_the_cleaning_up(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    end = run_folder.RunFolder.end

    def asked_again(run: run_folder.RunFolder) -> None:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        end(run)

    monkeypatch.setattr(run_folder.RunFolder, "end", asked_again)
    timer = threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(Interrupted):
        bundles.run("sleep 100")
    timer.join()
    assert leftovers(bundles.scratch) == []


@pytest.mark.parametrize(("script", "code"), [("kill -ABRT $$; echo went on", 134), ("kill -KILL $$; echo went on", 137)])
def test_a_command_that_ends_itself_by_a_signal_ends_so_here_too(bundles: Bundles, script: str, code: int) -> None:
    """The first process of a pid namespace would not: the kernel ignores what it sends to itself."""
    ended = bundles.run(script)
    assert (ended.exit_code, ended.signal, ended.stdout) == (code, code - 128, b"")


def test_what_a_command_leaves_in_the_background_ends_with_it(bundles: Bundles) -> None:
    began = time.monotonic()
    ended = bundles.run("sleep 45678 & echo said; exit 6")
    assert (ended.exit_code, ended.stdout, ended.timed_out) == (6, b"said\n", False)
    assert time.monotonic() - began < 20
    assert not [pid for pid in _pids() if b"sleep\x0045678" in _cmdline(pid)]


def test_a_bundle_that_asks_for_a_user_namespace_does_not_escape_the_limits(bundles: Bundles) -> None:
    if os.geteuid() != 0:
        not_permitted("make cgroups")
    place = bundles.write("true", rootless=True)
    bomb = "for i in $(seq 60); do sleep 20 & done; echo all of them"
    ended = bundles.start(place, command=["/workspace/bin/sh", "-c", bomb], pids=20)
    assert b"all of them" not in ended.stdout
    over = bundles.start(place, command=["/workspace/bin/tail", "/dev/zero"], memory=48 * MIB)
    assert (over.exit_code, over.oom) == (137, True)


def test_a_runc_that_leaves_folders_of_the_host_open_starts_nothing(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    """CVE-2024-21626: its waiting process is in the container, and what it holds open is a way out."""
    place = bundles.write("echo started")
    held = subprocess.Popen([sys.executable, "-c", "import os,time; os.open('/', os.O_RDONLY); print(flush=True); time.sleep(99)"],
                            stdout=subprocess.PIPE)  # fmt: skip
    assert held.stdout is not None
    held.stdout.readline()
    fake = bundles.folder / "bin/runc"
    fake.parent.mkdir()
    fake.write_text(
        f'#!/bin/sh\n{shutil.which("runc")} "$@" || exit\ncase "$*" in *" create "*) shift 9; printf {held.pid} > "$2" ;; esac\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    try:
        with pytest.raises(OperationFailed, match="CVE-2024-21626"):
            bundles.start(place)
    finally:
        held.kill()
        held.communicate()


def test_a_container_ends_with_whoever_ran_it_even_by_kill_9(bundles: Bundles) -> None:
    place = bundles.write("echo running; sleep 98765")
    code = (
        "import sys; from pathlib import Path; from mothball.package.bundle_run import run_bundle; "
        "run_bundle(Path(sys.argv[1]), scratch=Path(sys.argv[2]), timeout=None)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, place, bundles.scratch], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"running\n"
    marker = f"mothball-{child.pid}-"

    def alive() -> list[str]:
        return [pid for pid in _pids() if marker.encode() in _cmdline(pid) or b"sleep\x0098765" in _cmdline(pid)]

    assert alive()
    child.kill()
    child.wait()
    child.stdout.close()
    eventually(lambda: not alive(), seconds=30)
    assert not list(Path("/sys/fs/cgroup").rglob(marker + "*"))
    assert bundles.start(place, command=["id"]).exit_code == 0  # and takes away the folder of the killed run


def test_a_guardian_does_not_bring_back_the_folder_of_a_killed_run(bundles: Bundles) -> None:
    """runc makes the folder of its state when it is missing, also to delete what is not there."""
    require_tool("runc")
    state = bundles.folder / "gone" / "state"
    code = (
        "import os, sys, signal; from pathlib import Path; from mothball.package.guardian import guarded\n"
        "with guarded(sys.argv[1], Path(sys.argv[2]), 'mothball-none', dict(os.environ)): os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, shutil.which("runc") or "", state], check=False)
    eventually(lambda: not [pid for pid in _pids() if str(state).encode() in _cmdline(pid)], seconds=20)
    assert not state.parent.exists()


def test_what_a_killed_run_left_is_ended_by_the_next(bundles: Bundles) -> None:
    place = bundles.write("echo running; sleep 98765")
    code = (
        "import sys, contextlib; from pathlib import Path; from mothball.package import bundle_run; "
        "bundle_run.guarded = lambda *_: contextlib.nullcontext(); "
        "bundle_run.run_bundle(Path(sys.argv[1]), scratch=Path(sys.argv[2]), timeout=None)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, place, bundles.scratch], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"running\n"
    marker = f"mothball-{child.pid}-"
    child.kill()
    child.wait()
    child.stdout.close()
    alive = [pid for pid in _pids() if marker.encode() in _cmdline(pid) or b"sleep\x0098765" in _cmdline(pid)]
    assert alive  # runc goes on without us, and its guardian was killed as well
    assert bundles.start(place, command=["id"]).exit_code == 0
    eventually(lambda: not [pid for pid in alive if b"sleep\x0098765" in _cmdline(pid)])
    assert not list(Path("/sys/fs/cgroup").rglob(marker + "*"))


def test_a_scratch_folder_that_others_can_write_is_refused(bundles: Bundles) -> None:
    place = bundles.write("true")
    bundles.scratch.mkdir()
    bundles.scratch.chmod(0o777)
    with pytest.raises(PathNotAllowed):
        bundles.start(place)


# -- the job and the commands ------------------------------------------------------------------------------------------


class Here:
    """A worker's services, a registered workspace with a capture, and the command line."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        for module in MODULES:
            importlib.import_module(module)
        services.configure(settings)
        self.settings = settings
        self.fleet = Fleet(settings=settings)
        self.registry = services.current().registry
        self.registry.hosts.heartbeat(settings.host, {})
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        shutil.copy(static_busybox(), folder / "bin/busybox")
        for name in APPLETS:
            (folder / "bin" / name).symlink_to("busybox")
        (folder / "data").write_text("of the workspace\n")
        self.fleet.register("o/r#1", folder)
        self.run("workspace.capture")

    def run(self, task: str, **args: Any) -> dict[str, Any]:
        return deliver(self.registry.jobs.submit(task, {"workspace": "o/r#1", **args}, workspace="o/r#1").job)

    def close(self) -> None:
        self.fleet.close()
        services.renew()
        services._settings = None


@pytest.fixture
def here(private_redis: RedisServer, make_settings: Callable[..., Settings], tmp_path: Path) -> Iterator[Here]:
    require_tool("runc")
    settings = make_settings(fsync=False, redis_timeout=1.0, workspace_roots=(tmp_path / "roots",))
    found = Here(settings, settings.workspace_roots[0] / "ws")
    yield found
    found.close()


def test_a_job_writes_a_bundle_that_runs(here: Here, tmp_path: Path) -> None:
    to = here.folder.parent / "bundle"
    result = here.run("workspace.bundle", to=str(to), command=["/workspace/bin/cat", "/workspace/data"], rootless=os.geteuid() != 0)
    assert (result["ref"], result["path"], result["notes"][0]) == ("latest", str(to), result["notes"][-1])
    answer = run_bundle(to, output="capture", scratch=tmp_path / "s", timeout=60)
    assert answer.stdout == b"of the workspace\n"
    assert sorted(path.name for path in to.parent.iterdir()) == ["bundle", "ws"]


@pytest.mark.parametrize("base", [None, "oci:/etc"])
def test_a_job_goes_nowhere_but_below_the_roots(here: Here, tmp_path: Path, base: str | None) -> None:
    to = tmp_path / "outside" if base is None else here.folder.parent / "b"
    with pytest.raises(PathNotAllowed):
        here.run("workspace.bundle", to=str(to), base=base)
    assert not to.exists()


def test_the_client_asks_for_a_bundle(here: Here) -> None:
    handle = here.fleet.bundle("o/r#1", str(here.folder.parent / "b"), command=["/workspace/bin/id"])
    deliver(here.registry.jobs.get(handle.id))
    assert handle.wait(5)["args"] == ["/workspace/bin/id"]
    with pytest.raises(InvalidParams, match="absolute"):
        here.fleet.bundle("o/r#1", "relative")


def test_the_command_writes_runs_and_ends_as_the_command_in_it(
    here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    call = beside_jobs(here.settings, monkeypatch, capfd)
    to = tmp_path / "b"
    rootless = ["--rootless"] if os.geteuid() != 0 else []
    made = call("bundle", "o/r#1", "--to", str(to), "--cmd", "/workspace/bin/sh -c 'exit 9'", "--json", *rootless)
    assert (made.code, made.json()["args"]) == (0, ["/workspace/bin/sh", "-c", "exit 9"])
    assert call("bundle", "run", str(to), "--json").code == 9
    told = call("bundle", "run", str(to), "--json", "--", "/workspace/bin/cat", "/workspace/data")
    assert (told.code, told.json()["stdout"]) == (0, "of the workspace\n")
    over = call("bundle", "run", str(to), "--json", "--timeout", "1s", "--", "/workspace/bin/sleep", "50")
    assert (over.code, over.json()["timed_out"]) == (124, True)
    assert call("bundle", "o/r#1", "--to", str(to)).code == 73
    assert leftovers(here.settings.data_dir / "bundles") == []


def test_a_package_is_unpacked_run_and_thrown_away(
    here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    call = beside_jobs(here.settings, monkeypatch, capfd)
    store = Store(here.settings.store_dir)
    to = tmp_path / "b"
    with Tree.open(store, store.refs("o/r#1").get().digest) as tree:
        write_bundle(store, tree.digest, to, command=["/workspace/bin/cat", "/workspace/data"], rootless=os.geteuid() != 0)
    package = tmp_path / "crash-x.tar"
    with tarfile.open(package, "w") as tar:
        tar.add(to / "config.json", "config.json")
        tar.add(to / "rootfs", "rootfs")
    told = call("bundle", "run", str(package), "--json")
    assert (told.code, told.json()["stdout"]) == (0, "of the workspace\n")
    package.write_bytes(package.read_bytes()[:5000])
    cut = call("bundle", "run", str(package), "--json")
    assert (cut.code, "cut" in cut.err) == (1, True)
    assert leftovers(here.settings.data_dir / "bundles") == []


@pytest.mark.parametrize(
    "words",
    [
        ["o/r#1"], ["run"], ["run", "/nowhere"], ["run", "x", "--base", "oci:y"], ["a", "b", "c", "--to", "/tmp/x"],
        ["o/r#1", "--to", "/tmp/x", "--cmd", "'"], ["o/r#1", "--to", "/tmp/x", "--timeout", "3s"],
        ["o/r#1", "--to", "/tmp/x", "--cmd", ""],
    ],
)  # fmt: skip
def test_a_command_line_that_makes_no_sense_is_one_clear_error(
    here: Here, words: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    answer = beside_jobs(here.settings, monkeypatch, capfd)("bundle", *words)
    assert answer.code in {1, 2}
    assert answer.err.startswith("error: ")
    assert answer.err.count("\n") == 1
