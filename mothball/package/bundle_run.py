"""Starting a bundle with runc, under limits, and taking away everything that was started (B-115: one fixed name, no limit).

Each run has a folder of its own with a private copy of config.json, runc's state and its log, so that two runs of one bundle
never meet and the bundle is not touched. A container ends with whoever runs it, however that ends (`guardian`); what a killed run
left on the disk is removed by the next.

The command is not the first process of its container: the kernel ignores signals with which that one would end itself, and what
aborts or kills itself would go on or end otherwise than it did. The container is made and not started, so that runc's own waiting
process is the first, and the command is started beside it. Only under a memory limit without a cgroup it is the first all the same.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import shutil
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO, Any, Final, Literal

import msgspec

from mothball.errors import ConfigError, InvalidParams, OperationFailed, TimedOut
from mothball.package.bundle_spec import DEFAULT_PIDS, LEAST_MEMORY, check_bundle, env_of, runtime_spec
from mothball.package.guardian import guarded
from mothball.package.run_folder import RunFolder, run_folder
from mothball.runtime.programs import Finished
from mothball.store.read import show

DEFAULT_SECONDS: Final = 600.0
DEFAULT_MEMORY: Final = 2 * 1024**3
KEEP_OUTPUT: Final = 256 * 1024
"""Bytes kept of the end of each stream when it is captured."""
END_SECONDS: Final = 10.0
"""How long runc may take to notice that its container is dead."""
_POLL_SECONDS: Final = 0.05
_SIGNALED: Final = 128
_ASKING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_STEP: Final = 65_536

Output = Literal["inherit", "capture"]


class RunResult(msgspec.Struct, frozen=True):
    """How a command ended. `signal` by the convention of shells: an exit code of 128 + n. `seconds` includes runc's own work.

    `oom`: the kernel killed something in it for want of memory; None where no cgroup counts that (rootless). `stdout` and
    `stderr`: the end of what was captured, with the true number of bytes beside it.
    """

    exit_code: int
    signal: int | None
    timed_out: bool
    oom: bool | None
    seconds: float
    stdout: bytes = b""
    stderr: bytes = b""
    stdout_bytes: int = 0
    stderr_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON types; output as text, bytes that are no UTF-8 replaced."""
        found: dict[str, Any] = msgspec.structs.asdict(self)
        return found | {name: found[name].decode("utf-8", "replace") for name in ("stdout", "stderr")}


class Interrupted(BaseException):
    """A signal asked this process to end while a bundle ran; everything of it is gone when this arrives. Ctrl-C too."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(signal.Signals(number).name)


def run_bundle(
    folder: Path,
    *,
    timeout: float | None = DEFAULT_SECONDS,
    memory: int | None = None,
    pids: int | None = DEFAULT_PIDS,
    command: Sequence[str] = (),
    writable: bool | None = None,
    output: Output = "inherit",
    stdin: IO[bytes] | None = None,
    scratch: Path,
    tick: Callable[[], None] = lambda: None,
) -> RunResult:
    """Start the bundle `folder` and wait for its end, at most `timeout` seconds; then nothing of it is left.

    Its config.json is checked (see `check_bundle`) and only its command, environment, working directory and whether its root is
    read-only are taken from it: limits, namespaces and mounts are ours. Who is not root starts it rootless, whatever it says.
    `command` replaces the bundle's own, `writable` what it says of its root. `memory` bytes and `pids` processes bound it (None:
    the bundle's own or `DEFAULT_MEMORY`, whichever is less; 0: no limit; for who is not root there is no default, and a limit
    bounds the address space of each process). The run ends with its command, whatever that left in the background.
    `stdin`: what it reads, nothing by default. `scratch`: a folder for the run's own files, made when it is missing. `tick` is
    called often and may raise; then the container is killed first, as it is for Ctrl-C, SIGTERM and SIGHUP (`Interrupted`).

    A command that ran, however it ended, is a result. `ConfigError` without runc, `InvalidParams` for a bundle that is not
    started, `OperationFailed` with runc's own words when it could not start the command, `TimedOut` when runc itself hangs.
    """
    runc = require_runc()
    if timeout is not None and timeout <= 0:
        raise InvalidParams("a time limit must be more than nothing")
    spec = check_bundle(folder)
    with _signals() as asked, run_folder(scratch, runc) as run:
        config = _config(spec, folder, memory, pids, command, writable)
        (run.path / "config.json").write_bytes(config)
        process = json.loads(config)["process"]
        (run.path / "process.json").write_text(json.dumps(process))
        # A limited address space is too small for runc itself on its way into a container that is there already.
        first = any(each["type"] == "RLIMIT_AS" for each in process["rlimits"])
        return _Run(run, runc, timeout, output, stdin, tick, asked, first=first).wait()


def require_runc() -> str:
    """Where runc is; `ConfigError` without it."""
    runc = shutil.which("runc")
    if runc is None:
        raise ConfigError("runc is not installed (or not on PATH); a bundle is started with it. Debian: apt install runc")
    return runc


def _config(
    spec: dict[str, Any], folder: Path, memory: int | None, pids: int | None, command: Sequence[str], writable: bool | None
) -> bytes:
    process = spec["process"]
    uid, gid = os.geteuid(), os.getegid()
    limited = uid == 0  # whatever user the bundle asks for: without a cgroup nothing bounds its processes and their memory
    rootless = uid != 0 or any(each["type"] == "user" for each in spec["linux"]["namespaces"])
    if rootless and uid == 0:  # somebody else's: its files are readable to their owner only
        found = (folder / "rootfs").stat()
        uid, gid = found.st_uid, found.st_gid
    if memory is None:
        memory = _own_memory(spec) or (DEFAULT_MEMORY if limited else 0)
    return runtime_spec(
        args=list(command) or process["args"], env=env_of(process), cwd=process["cwd"], rootless=rootless, uid=uid, gid=gid,
        memory=memory or None, pids=pids, readonly=bool(spec["root"].get("readonly")) if writable is None else not writable,
        root=str((folder / "rootfs").absolute()), cgroup=limited,
    )  # fmt: skip


def _own_memory(spec: dict[str, Any]) -> int:
    """The bundle's own limit, under which it may have failed; more than ours it does not get. 0: it has none."""
    told = ((spec["linux"].get("resources") or {}).get("memory") or {}).get("limit")
    rlimits = spec["process"].get("rlimits") or []
    told = told or next((each["soft"] for each in rlimits if each["type"] == "RLIMIT_AS"), None)
    return max(min(int(told), DEFAULT_MEMORY), LEAST_MEMORY) if told and told > 0 else 0


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Signals that ask to end, noted instead of obeyed: whoever sends a second one must not interrupt the cleaning up."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def note(number: int, _: FrameType | None) -> None:
        asked.append(number)

    # What is ignored here (nohup) does not ask.
    handled = [number for number in _ASKING if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in handled}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked:
        raise Interrupted(asked[0])


class _Run:
    def __init__(
        self, run: RunFolder, runc: str, timeout: float | None, output: Output, stdin: IO[bytes] | None,
        tick: Callable[[], None], asked: list[int], *, first: bool,
    ) -> None:  # fmt: skip
        self._run = run
        self._runc = runc
        self._timeout = timeout
        self._output = output
        self._stdin = stdin
        self._tick = tick
        self._asked = asked
        self._first = first
        self._id = f"mothball-{os.getpid()}-{secrets.token_hex(6)}"
        self._log = run.path / "runc.log"

    def wait(self) -> RunResult:
        with guarded(self._runc, self._run.state, self._id, _environment()):
            return self._waited()

    def _waited(self) -> RunResult:
        began = time.monotonic()
        self._run.container = self._id
        command = self._run.path / "command.pid"
        words = ["run", "--keep", "--bundle", str(self._run.path)]
        if not self._first:
            self._make(began)
            words = ["exec", "--process", str(self._run.path / "process.json")]
        pipe = subprocess.PIPE if self._output == "capture" else None
        process = self._start(
            *words, "--pid-file", str(command), self._id, stdin=self._stdin or subprocess.DEVNULL, stdout=pipe, stderr=pipe
        )
        tails = [_Tail(stream) for stream in (process.stdout, process.stderr) if stream is not None]
        try:
            timed_out = self._watch(process, began, command)
            oom = self._oom()
        finally:
            self._end(process)
            for tail in tails:
                tail.close()
        code = process.returncode if process.returncode >= 0 else _SIGNALED - process.returncode
        if code and not timed_out and (reason := _last_error(self._log)):
            raise OperationFailed(f"runc could not start the command: {reason}", reason=reason)
        out, err = (tails[0], tails[1]) if tails else (None, None)
        return RunResult(
            exit_code=code, signal=code - _SIGNALED if _SIGNALED < code <= _SIGNALED + 64 else None, timed_out=timed_out, oom=oom,
            seconds=round(time.monotonic() - began, 3),
            stdout=out.kept if out else b"", stderr=err.kept if err else b"",
            stdout_bytes=out.bytes if out else 0, stderr_bytes=err.bytes if err else 0,
        )  # fmt: skip

    def _make(self, began: float) -> None:
        """Make the container and leave it unstarted: its first process is runc's own, which waits and does nothing."""
        first = self._run.path / "first.pid"
        nothing = subprocess.DEVNULL  # its first process keeps these, and the command could open them again
        process = self._start(
            "create", "--bundle", str(self._run.path), "--pid-file", str(first), self._id,
            stdin=nothing, stdout=nothing, stderr=nothing,
        )  # fmt: skip
        try:
            if self._watch(process, began):
                raise TimedOut("runc itself does not answer; it made no container", what="runc", seconds=self._timeout or 0.0)
            if process.returncode:
                reason = _last_error(self._log) or f"it ended with {process.returncode}"
                raise OperationFailed(f"runc could not start the command: {reason}", reason=reason)
            _refuse_open_folders(first)
        except BaseException:
            self._end(process)
            raise

    def _start(self, *words: str, stdin: Any, stdout: int | None, stderr: int | None) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(
                [self._runc, "--root", str(self._run.state), "--log", str(self._log), "--log-format", "json", *words],
                stdin=stdin, stdout=stdout, stderr=stderr, cwd="/", env=_environment(), start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise OperationFailed(f"runc cannot be run: {error.strerror}", reason=str(error)) from None

    def _watch(self, process: subprocess.Popen[bytes], began: float, command: Path | None = None) -> bool:
        """Wait for the end; True when the time was over and the container was killed.

        With `command`, the file of its process id, everything ends with it: runc would wait for whoever holds its output.
        """
        while process.poll() is None:
            if self._asked:
                raise Interrupted(self._asked[0])
            self._tick()
            if self._timeout is not None and time.monotonic() - began >= self._timeout:
                return self._time_is_over(process)
            if command is not None and _is_over(command):
                command = None
                self._call("kill", self._id, "KILL")
            time.sleep(_POLL_SECONDS)
        return False

    def _time_is_over(self, process: subprocess.Popen[bytes]) -> bool:
        self._call("kill", self._id, "KILL")  # its first process: with it ends the pid namespace
        until = time.monotonic() + END_SECONDS
        while process.poll() is None and time.monotonic() < until:
            time.sleep(_POLL_SECONDS)
        if process.poll() is None:
            assert self._timeout is not None  # noqa: S101 - else its time would not be over
            raise TimedOut("runc itself does not answer; its container was killed", what="runc", seconds=self._timeout)
        return True

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """Kill what still runs, whatever the reason, and let runc give back what it made."""
        self._run.end()
        if process.poll() is None:
            with suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)

    def _oom(self) -> bool | None:
        """Whether the kernel counts a kill for want of memory in the container's cgroup, which still stands."""
        for path in self._run.cgroups(self._id, "memory"):
            for name in ("memory.events", "memory.oom_control"):
                with suppress(OSError, ValueError):
                    facts = dict(line.split() for line in (path / name).read_text().splitlines())
                    if "oom_kill" in facts:
                        return int(facts["oom_kill"]) > 0
        return None

    def _call(self, *argv: str) -> Finished:
        return self._run.call(*argv)


def _is_over(file: Path) -> bool:
    """True when the process whose id stands in `file` has ended with all its threads; False while nothing stands there."""
    try:
        fd = os.pidfd_open(int(file.read_bytes()))
    except ProcessLookupError:
        return True
    except (OSError, ValueError):
        return False
    try:
        return bool(select.select([fd], [], [], 0)[0])
    finally:
        os.close(fd)


def _refuse_open_folders(file: Path) -> None:
    """Refuse a runc whose waiting process holds a folder of the host open (CVE-2024-21626): the command could go in through it."""
    with suppress(OSError, ValueError):
        place = Path(f"/proc/{int(file.read_bytes())}/fd")
        for each in place.iterdir():
            with suppress(FileNotFoundError):
                if stat.S_ISDIR(each.stat().st_mode):
                    raise OperationFailed(
                        "this runc leaves folders of the host open to what it starts (CVE-2024-21626); nothing was started. "
                        "Upgrade runc",
                        reason="CVE-2024-21626",
                    )


def _last_error(log: Path) -> str:
    """What runc logged last as an error, for people; of a command that was started it logs none, however that ends."""
    with suppress(OSError):
        for line in reversed(log.read_bytes()[-_STEP:].splitlines()):
            with suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                if entry["level"] in {"error", "fatal"}:
                    return show(str(entry["msg"]).encode("utf-8", "replace"))[:500]
    return ""


def _environment() -> dict[str, str]:
    """For runc itself: nothing of ours that is secret, and nothing that changes where it keeps its state."""
    return {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "XDG_RUNTIME_DIR") if name in os.environ}


class _Tail:
    """The end of a stream, read beside the waiting so that the command never blocks on a full pipe."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._kept = bytearray()
        self.bytes = 0
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    @property
    def kept(self) -> bytes:
        return bytes(self._kept)

    def _read(self) -> None:
        with suppress(OSError, ValueError):
            while piece := os.read(self._stream.fileno(), _STEP):
                self.bytes += len(piece)
                self._kept += piece
                del self._kept[: max(0, len(self._kept) - KEEP_OUTPUT)]

    def close(self) -> None:
        self._thread.join(END_SECONDS)
        self._stream.close()
