"""Driver `systemd` with a real systemd: the manager of a pid namespace of its own, in a cgroup of its own.

The tests' calls run inside those namespaces, as a worker on such a host would. Where no such namespace can be made (an ordinary
user, a container without the right to mount) there is no systemd to talk to, and they are skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from mothball.errors import InvalidParams
from mothball.runtime import driver_for
from mothball.settings import Settings
from tests.support import eventually

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = next((Path(each) for each in ("/lib/systemd/systemd", "/usr/lib/systemd/systemd") if Path(each).exists()), None)

# Nothing of the machine: one empty target, a private /run, and the unified cgroup hierarchy seen from the cgroup that it is in.
START = """
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs /run
mkdir -p /run/systemd/system
printf '[Unit]\\nDefaultDependencies=no\\n' > /run/systemd/system/mothball-test.target
umount -R /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
exec "$0" --system --unit=mothball-test.target --log-target=console
"""

ASK = """
import json, sys
from mothball.runtime import driver_for
from mothball.runtime.ports import probe
from mothball.errors import MothballError
from mothball.settings import Settings
import msgspec
unit, verb, *rest = sys.argv[1:]
try:
    driver = driver_for({"driver": "systemd", "unit": unit}, Settings.model_construct())
    if verb == "stop":
        found = driver.stop(float(rest[0]), lambda: None)
    elif verb == "stats":
        found = driver.stats(None)
    else:
        found = getattr(driver, verb)()
    print(msgspec.json.encode(found).decode())
except MothballError as error:
    print(json.dumps({"error": error.code, "message": error.message}))
"""


class Manager:
    """A running systemd."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def inside(self, *argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
        command = ["nsenter", "--target", str(self.pid), "--mount", "--pid", "--cgroup", "--ipc", "--", *argv]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)

    def run(self, unit: str, script: str, *properties: str) -> None:
        """Start `script` (Python) as the service `unit`."""
        options = [f"--property={each}" for each in ("DefaultDependencies=no", *properties)]
        command = ["systemd-run", f"--unit={unit}", *options, "--", sys.executable, "-S", "-c", textwrap.dedent(script)]
        done = self.inside(*command)
        assert done.returncode == 0, done.stderr
        eventually(lambda: self.ask(unit, "alive")["alive"])

    def ask(self, unit: str, verb: str, *rest: str) -> Any:
        done = self.inside(sys.executable, "-c", ASK, unit, verb, *rest, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


def unified() -> Path | None:
    """Where the unified hierarchy is mounted."""
    for root in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")):
        if (root / "cgroup.controllers").exists():
            return root
    return None


@pytest.fixture(scope="module")
def systemd() -> Iterator[Manager]:
    root = unified()
    needed = ("unshare", "nsenter", "systemctl", "systemd-run")
    if PROGRAM is None or root is None or os.geteuid() != 0 or not all(shutil.which(each) for each in needed):
        pytest.skip("no systemd can be started here: it needs root, the unified cgroup hierarchy and the programs of systemd")
    group = root / f"mothball-systemd-{os.getpid()}"
    try:
        group.mkdir()
        (group / "cgroup.procs").read_text()
    except OSError as error:
        pytest.skip(f"no systemd can be started here: no cgroup can be made ({error.strerror})")
    spaces = ["--pid", "--mount", "--ipc", "--cgroup", "--mount-proc"]
    inner = ["unshare", "--fork", "--kill-child", *spaces, "sh", "-c", START, str(PROGRAM)]
    # The cgroup is entered before the namespace of cgroups is made: that one begins where its maker is.
    outer = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group / "cgroup.procs"), *inner]
    process = subprocess.Popen(
        outer,
        env={**os.environ, "container": "mothball"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield _ready(process)
    finally:
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)
        eventually(lambda: _removed(group), what="the end of the cgroup")


def _removed(group: Path) -> bool:
    """Remove the cgroup and those below it; what is killed leaves them a moment later."""
    try:
        for folder in sorted((each for each in group.rglob("*") if each.is_dir()), reverse=True):
            folder.rmdir()
        group.rmdir()
    except OSError:
        return False
    return True


def _ready(process: subprocess.Popen[bytes]) -> Manager:
    """The manager once it answers; skips the tests when it does not come up."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and process.poll() is None:
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False).stdout.split()
        if children:
            manager = Manager(int(children[0]))
            if manager.inside("systemctl", "is-system-running").stdout.strip() in {"running", "degraded"}:
                return manager
        time.sleep(0.2)
    pytest.skip("no systemd can be started here: its namespaces cannot be made, or it does not come up in them")


POLITE = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
while True: time.sleep(0.1)
"""
STUBBORN = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0: os.setsid()
while True: time.sleep(0.1)
"""


def test_a_service_is_stopped_by_its_manager_and_not_started_again(systemd: Manager) -> None:
    systemd.run("polite.service", POLITE, "Restart=always", "RestartSec=0")
    stopped = systemd.ask("polite.service", "stop", "10")
    assert (stopped["how"], stopped["left"]) == ("term", [])
    time.sleep(0.5)
    found = systemd.ask("polite.service", "alive")
    assert (found["alive"], found["sure"]) == (False, True)
    assert systemd.ask("polite.service", "stop", "1")["how"] == "was_dead"


def test_a_service_that_ignores_term_is_killed_with_its_whole_cgroup_after_our_grace(systemd: Manager) -> None:
    systemd.run("stubborn.service", STUBBORN, "TimeoutStopSec=300")
    eventually(lambda: systemd.ask("stubborn.service", "stats")["processes"] == 2)
    began = time.monotonic()
    stopped = systemd.ask("stubborn.service", "stop", "1")
    assert 1 <= time.monotonic() - began < 30
    assert (stopped["how"], stopped["left"]) == ("kill", [])
    assert stopped["facts"]["signal"] == 9
    assert systemd.ask("stubborn.service", "stats")["error"] == "not_running"


def test_how_a_service_failed_is_known(systemd: Manager, tmp_path: Path) -> None:
    waits = f"""
    import os, sys, time
    while not os.path.exists({str(tmp_path / "end")!r}): time.sleep(0.05)
    sys.exit(7)
    """
    systemd.run("fails.service", waits)
    (tmp_path / "end").touch()
    eventually(lambda: not systemd.ask("fails.service", "alive")["alive"])
    facts = systemd.ask("fails.service", "stop", "1")["facts"]
    assert (facts["state"], facts["result"], facts["exit_code"], facts["oom"]) == ("failed", "exit-code", 7, False)


def test_n24_stats_and_n26_ports_are_those_of_the_units_cgroup(systemd: Manager) -> None:
    systemd.run(
        "server.service",
        """
        import os, socket, time
        server = socket.create_server(("127.0.0.1", 0))
        while time.process_time() < 0.2: pass
        if os.fork(): os.fork()
        while True: time.sleep(1)
        """,
    )
    eventually(lambda: systemd.ask("server.service", "stats")["processes"] == 3)
    stats = systemd.ask("server.service", "stats")
    assert stats["cpu_seconds"] >= 0.2
    assert stats["rss_bytes"] > 1_000_000
    ports = systemd.ask("server.service", "ports")
    assert [each["address"] for each in ports] == ["127.0.0.1"]


def test_a_unit_that_nobody_knows_is_dead_for_sure(systemd: Manager) -> None:
    found = systemd.ask("nobody.service", "alive")
    assert (found["alive"], found["sure"]) == (False, True)
    assert systemd.ask("nobody.service", "stop", "1")["how"] == "was_dead"


def test_the_unit_that_the_worker_runs_in_is_never_stopped(systemd: Manager, tmp_path: Path) -> None:
    answer = tmp_path / "answer"
    done = systemd.inside(
        "systemd-run", "--unit=worker.service", "--property=DefaultDependencies=no", f"--property=StandardOutput=file:{answer}",
        f"--working-directory={ROOT}", "--", sys.executable, "-c", ASK, "worker.service", "stop", "1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # It lived on, or it could not have answered.
    found = json.loads(eventually(lambda: answer.exists() and answer.read_text()))
    assert found["error"] == "invalid_params"
    assert "this worker runs in" in found["message"]


@pytest.mark.parametrize("unit", ["systemd-journald.service", "dbus.service", "init.scope"])
def test_units_of_the_system_itself_are_never_stopped(systemd: Manager, unit: str) -> None:
    assert systemd.ask(unit, "stop", "1")["error"] == "invalid_params"


NO_UNITS = (
    "--force", "-H.service", "a b.service", "a;b.service", "x.target", "user.slice", "sshd.socket", "*.service", "a/b.service",
    "", "a",
)  # fmt: skip


@pytest.mark.parametrize("unit", NO_UNITS)
def test_no_unit_name_is_an_option_a_pattern_or_more_than_one_workspace(unit: str) -> None:
    with pytest.raises(InvalidParams):
        driver_for({"driver": "systemd", "unit": unit}, Settings.model_construct())
