"""The demo's end: something fails, a crash report says how, and its package, without the secret, fails the same way under runc.

The failure is real: the machine's own shell, copied into the workspace with what it needs, runs a script that reads a token and
gives up. So the package needs nothing from where it is unpacked.
"""

from __future__ import annotations

import re
import secrets
import shutil
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

from mothball.cli.text import human_bytes, printable
from mothball.errors import ConfigError, OperationFailed

if TYPE_CHECKING:
    from mothball.client import Fleet
    from mothball.client_crash import CrashResult
    from mothball.package.bundle_run import RunResult
    from workers.demo import Demo
    from workers.local import LocalFleet

WORKSPACE = "demo/deploy#7"
EXIT_CODE = 3
WAIT_SECONDS = 120.0
RUN_SECONDS = 30.0
_LIBRARY = re.compile(r"(?:=> )?(/\S+) \(0x[0-9a-f]+\)")
_SCRIPT = """# deploys nothing, and says why
. ./.env
echo "deploying with settings of $(pwd)"
echo "deploy: token $DEPLOY_TOKEN was refused" >&2
exit 3
"""


class Crash:
    """`demo` says, checks and counts; the fleet files the report, runc runs its package."""

    def __init__(self, demo: Demo, fleet: Fleet, local: LocalFleet) -> None:
        self._demo = demo
        self._fleet = fleet
        self._local = local
        self._folder = demo.tree.parent / "deploy"
        self._token = "gh" + "p_" + secrets.token_hex(18)

    def run(self) -> None:
        """A failure, its report, and the same failure again out of the package."""
        command = self._workspace()
        failed = self._fail(command)
        report = self._report(command, failed)
        self._again(Path(report.path), failed)

    def _workspace(self) -> list[str]:
        self._folder.mkdir()
        (self._folder / ".env").write_text(f"DEPLOY_TOKEN={self._token}\n")
        (self._folder / "deploy.sh").write_text(_SCRIPT)
        self._fleet.register(WORKSPACE, self._folder, repo="demo/deploy")
        return [*_shell(self._folder), str(self._folder / "deploy.sh")]

    def _fail(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        started = time.monotonic()
        self._demo.say(f"something fails: a script in {WORKSPACE}, which holds a token in its .env")
        failed = subprocess.run(command, cwd=self._folder, env={}, capture_output=True, text=True, timeout=RUN_SECONDS, check=False)
        self._demo.expect(failed.returncode == EXIT_CODE, f"the script ended with {failed.returncode}: {failed.stderr[:200]}")
        self._demo.say(f"  exit code {failed.returncode}: deploy: token {self._token[:6]}... was refused")
        self._demo.add(
            "failure", started, None, "", f"a real one, with exit code {failed.returncode} and a token in its error text"
        )
        return failed

    def _report(self, command: list[str], failed: subprocess.CompletedProcess[str]) -> CrashResult:
        started = time.monotonic()
        job = self._fleet.crash_report(WORKSPACE, failed.stderr, exit_code=failed.returncode, command=command, by="the demo")
        report = job.wait(WAIT_SECONDS, on_poll=self._demo.watch(self._local))
        self._demo.say(printable(f"crash report {report.id}: {report.title}"))
        package = Path(report.path).read_bytes()
        told = (self._demo.folder / "data" / "logs" / "worker.log").read_bytes() + repr((report, job.record())).encode()
        self._demo.expect(self._token.encode() not in package + told, "the token is in the package, the job or the log")
        self._demo.expect(b"[redacted:github:" in package, "nothing stands for the token in the package")
        count = sum(report.redactions.values())
        self._demo.say(
            f"  its package: {human_bytes(report.bytes)}, {report.files} files, {count} secrets replaced; "
            "the token is nowhere in it, nor in the job or the log"
        )
        shows = f"report, capture and package ({report.files} files) without the token"
        self._demo.add("crash report", started, report.bytes, report.digest, shows)
        return report

    def _again(self, package: Path, failed: subprocess.CompletedProcess[str]) -> None:
        """As somebody does who was only sent the package."""
        started = time.monotonic()
        self._demo.check()
        try:
            result = _run(package, self._demo.folder / "elsewhere")
        except (ConfigError, OperationFailed) as error:
            self._demo.say(printable(f"  it was not run again: {error.message}"))
            self._demo.add("run again", started, None, "", "not run: runc is not here, or may not start containers")
            return
        finally:
            shutil.rmtree(self._demo.folder / "elsewhere", ignore_errors=True)
        text = result.stderr.decode(errors="replace")
        self._demo.expect(result.exit_code == failed.returncode, f"under runc it ended with {result.exit_code}: {text[:300]}")
        same = re.sub(r"\[redacted:[^\]]*\]", self._token, text)
        self._demo.expect(same == failed.stderr, f"under runc it said something else: {text[:300]}")
        self._demo.say(printable(f"unpacked and started with runc: exit code {result.exit_code}: {text.strip()}"))
        self._demo.add("run again", started, None, "", "the package under runc: the same failure, with a pseudonym for the token")


def _run(package: Path, place: Path) -> RunResult:
    """Unpack `package` in `place` and start it; raises `ConfigError` without runc, `OperationFailed` when that may not start it."""
    from mothball.package.bundle_run import run_bundle
    from mothball.package.extract import extract

    place.mkdir()
    unpacked = place / "package"
    unpacked.mkdir(mode=0o700)
    with package.open("rb") as file:
        extract(file, unpacked, str(package))
    return run_bundle(unpacked, timeout=RUN_SECONDS, output="capture", scratch=place / "runs")


def _shell(folder: Path) -> list[str]:
    """The machine's shell, copied into `folder` with its libraries: the words with which it starts there and in a container."""
    shell = Path(shutil.which("sh") or "/bin/sh").resolve()
    (folder / "bin").mkdir()
    shutil.copy(shell, folder / "bin" / shell.name)
    own = str(folder / "bin" / shell.name)
    words = [own, "sh"] if shell.name == "busybox" else [own]
    try:
        told = subprocess.run(["ldd", str(shell)], capture_output=True, text=True, timeout=RUN_SECONDS, check=False).stdout
    except OSError:
        return words  # no Linux, so no container either
    libraries = [Path(found) for found in _LIBRARY.findall(told)]
    loader = next((each for each in libraries if each.name.startswith("ld-")), None)
    if loader is None:
        return words  # it needs none
    (folder / "lib").mkdir()
    for library in libraries:
        shutil.copy(library, folder / "lib" / library.name)
    return [str(folder / "lib" / loader.name), "--library-path", str(folder / "lib"), *words]
