"""Starting a bundle with runc, under limits, and taking away everything that was started (B-115: one fixed name, no limit).

Each run has a folder of its own with a private copy of config.json, runc's state and its log, so that two runs of one bundle
never meet and the bundle is not touched. What a killed run left is ended and removed by the next.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
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
    """A signal asked this process to end while a bundle ran; everything of it is gone when this arrives."""

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
    the bundle's own or `DEFAULT_MEMORY`, whichever is less; 0: no limit; rootless there is no default, and a limit bounds the
    address space of each process).
    `stdin`: what it reads, nothing by default. `scratch`: a folder for the run's own files, made when it is missing. `tick` is
    called often and may raise; then the container is killed first, as it is for Ctrl-C, SIGTERM and SIGHUP.

    A command that ran, however it ended, is a result. `ConfigError` without runc, `InvalidParams` for a bundle that is not
    started, `OperationFailed` with runc's own words when it could not start the command, `TimedOut` when runc itself hangs.
    """
    runc = shutil.which("runc")
    if runc is None:
        raise ConfigError("runc is not installed (or not on PATH); a bundle is started with it. Debian: apt install runc")
    if timeout is not None and timeout <= 0:
        raise InvalidParams("a time limit must be more than nothing")
    spec = check_bundle(folder)
    with _signals() as asked, run_folder(scratch, runc) as run:
        (run.path / "config.json").write_bytes(_config(spec, folder, memory, pids, command, writable))
        return _Run(run, runc, timeout, output, stdin, tick, asked).wait()


def _config(
    spec: dict[str, Any], folder: Path, memory: int | None, pids: int | None, command: Sequence[str], writable: bool | None
) -> bytes:
    process = spec["process"]
    uid, gid = os.geteuid(), os.getegid()
    rootless = uid != 0 or any(each["type"] == "user" for each in spec["linux"]["namespaces"])
    if rootless and uid == 0:  # somebody else's: its files are readable to their owner only
        found = (folder / "rootfs").stat()
        uid, gid = found.st_uid, found.st_gid
    if memory is None:
        memory = _own_memory(spec) or (0 if rootless else DEFAULT_MEMORY)
    return runtime_spec(
        args=list(command) or process["args"], env=env_of(process), cwd=process["cwd"], rootless=rootless, uid=uid, gid=gid,
        memory=memory or None, pids=pids, readonly=bool(spec["root"].get("readonly")) if writable is None else not writable,
        root=str((folder / "rootfs").absolute()),
    )  # fmt: skip


def _own_memory(spec: dict[str, Any]) -> int:
    """The bundle's own limit, under which it may have failed; more than ours it does not get. 0: it has none."""
    told = ((spec["linux"].get("resources") or {}).get("memory") or {}).get("limit")
    rlimits = spec["process"].get("rlimits") or []
    told = told or next((each["soft"] for each in rlimits if each["type"] == "RLIMIT_AS"), None)
    return max(min(int(told), DEFAULT_MEMORY), LEAST_MEMORY) if told and told > 0 else 0


@contextmanager
def _signals() -> Iterator[list[int]]:
    """SIGTERM and SIGHUP noted instead of obeyed, for the default is to die without cleaning up; Ctrl-C raises as ever."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def note(number: int, _: FrameType | None) -> None:
        asked.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGHUP)}
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
        tick: Callable[[], None], asked: list[int],
    ) -> None:  # fmt: skip
        self._run = run
        self._runc = runc
        self._timeout = timeout
        self._output = output
        self._stdin = stdin
        self._tick = tick
        self._asked = asked
        self._id = f"mothball-{os.getpid()}-{secrets.token_hex(6)}"
        self._log = run.path / "runc.log"

    def wait(self) -> RunResult:
        began = time.monotonic()
        pipe = subprocess.PIPE if self._output == "capture" else None
        argv = [
            self._runc, "--root", str(self._run.state), "--log", str(self._log), "--log-format", "json",
            "run", "--keep", "--bundle", str(self._run.path), self._id,
        ]  # fmt: skip
        self._run.container = self._id
        try:
            process = subprocess.Popen(
                argv, stdin=self._stdin or subprocess.DEVNULL, stdout=pipe, stderr=pipe, cwd="/", env=_environment(),
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise OperationFailed(f"runc cannot be run: {error.strerror}", reason=str(error)) from None
        tails = [_Tail(stream) for stream in (process.stdout, process.stderr) if stream is not None]
        try:
            timed_out = self._watch(process, began)
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

    def _watch(self, process: subprocess.Popen[bytes], began: float) -> bool:
        """Wait for the end; True when the time was over and the container was killed."""
        while process.poll() is None:
            if self._asked:
                raise Interrupted(self._asked[0])
            self._tick()
            if self._timeout is not None and time.monotonic() - began >= self._timeout:
                return self._time_is_over(process)
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
