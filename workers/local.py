"""The local fleet: embedded Redis, worker, beat and Flower on this machine, supervised by one process.

Whatever happens to the supervisor, nothing stays behind: in order when it is asked to stop, by the guard process when it
is killed. Everything lives below ``data_dir``: ``redis/``, ``logs/``, ``run/endpoint.json`` (how other commands find the fleet).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from pydantic import SecretStr

from mothball.errors import Busy, MothballError, OperationFailed, TimedOut
from mothball.registry import Registry
from mothball.settings import ENDPOINT_FILE, Settings, redact_url
from workers.processes import Child, Guard
from workers.redis_server import RedisServer

READY_SECONDS = 60.0
POLL_SECONDS = 0.1
STOP_SECONDS = 10.0
REDIS_GRACE_SECONDS = 5.0
START_TRIES = 3

Say = Callable[[str], None]


class LocalFleet:
    """A context manager: ready on entry, stopped on exit. Call `poll` often: it restarts what has died. One thread only.

    `embedded` False uses the Redis of the settings instead of starting one. `hurry()` true cuts every grace short.
    """

    def __init__(self, settings: Settings, *, say: Say, embedded: bool = True, hurry: Callable[[], bool] = lambda: False) -> None:
        self.settings = settings
        self._say = say
        self._hurry = hurry
        self._embedded = embedded
        self._guard = Guard()
        self._redis: RedisServer | None = None
        self._redis_group: int | None = None
        self._children: list[Child] = []
        self._lock: int | None = None
        self._temporary = settings.data_dir / "tmp"

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    @property
    def worker(self) -> Child:
        """The worker's process."""
        return self._child("worker")

    @property
    def flower_url(self) -> str:
        """Where Flower answers."""
        address = self.settings.flower_address
        return f"http://{f'[{address}]' if ':' in address else address}:{self.settings.flower_port}"

    @property
    def log_files(self) -> dict[str, Path]:
        """Log file per process."""
        logs = {"redis": self._redis.log_file} if self._redis is not None else {}
        return logs | {child.name: child.log_file for child in self._children}

    def start(self) -> None:
        """Start everything and return when the worker has announced its host and Flower answers.

        Raises `Busy` when a fleet runs on this data dir already, `ConfigError`, `OperationFailed` with a log's end, `TimedOut`.
        """
        data_dir = self.settings.data_dir
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.settings.run_dir.mkdir(exist_ok=True, mode=0o700)
        self._take_lock()
        # Left by a supervisor that was killed; its pid may be a stranger's by now.
        (data_dir / ENDPOINT_FILE).unlink(missing_ok=True)
        self._guard.start()
        if self._embedded:
            self._redis = RedisServer(data_dir / "redis", binary=self.settings.redis_server)
            self._redis.start()
            self._guard_redis(self._redis)
            self.settings = self.settings.model_copy(update={"redis_url": SecretStr(self._redis.url)})
        self.settings = self.settings.model_copy(update={"flower_port": self._flower_port()})
        self._write_endpoint()
        self._make_children()
        with contextlib.closing(Registry.connect(self.settings)) as registry:
            started = registry.time_ms()
            for child in self._children:
                child.start()
            self._await_ready(registry, started)

    def poll(self) -> None:
        """Restart what has died, with a line about it. Call it every fraction of a second."""
        self._guard.check()
        if self._redis is not None and not self._redis.running:
            self._say(f"redis ended; starting it again; log: {self._redis.log_file}")
            self._redis.start()
            self._guard_redis(self._redis)
        for child in self._children:
            child.check(self._say)

    def stop(self) -> None:
        """Stop in order: beat (no new work), worker, Flower, Redis last. Idempotent; never raises for a process that is gone."""
        for name in ("beat", "worker", "flower"):
            for child in self._children:
                if child.name == name:
                    child.terminate()
        for child in self._children:
            if not child.wait(self._hurry):
                self._say(f"{child.name} did not end in time and was killed; its job goes on with the next worker")
        self._children = []
        if self._redis is not None:
            self._redis.stop()
            self._redis = None
            self._guard_redis(None)
        self._guard.stop()
        if self._lock is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
            (self.settings.data_dir / ENDPOINT_FILE).unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None

    def _guard_redis(self, server: RedisServer | None) -> None:
        if self._redis_group is not None:
            self._guard.remove(self._redis_group)
        self._redis_group = server.pid if server is not None else None
        if self._redis_group is not None:
            self._guard.add(self._redis_group, REDIS_GRACE_SECONDS)

    def _child(self, name: str) -> Child:
        return next(child for child in self._children if child.name == name)

    def _take_lock(self) -> None:
        """Held for this process's life: a lock survives neither SIGKILL nor a reboot, as a pid file would."""
        handle = os.open(self.settings.run_dir / "up.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            raise Busy(what=f"the data dir {self.settings.data_dir}", reason="a local fleet already runs on it") from None
        self._lock = handle

    def _write_endpoint(self) -> None:
        """How other commands with the same data dir find Redis; holds the password, so 0600 before the first byte."""
        path = self.settings.data_dir / ENDPOINT_FILE
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.unlink(missing_ok=True)
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump({"pid": os.getpid(), "redis_url": self.settings.redis_url.get_secret_value()}, file)
        temporary.replace(path)

    def _flower_port(self) -> int:
        wanted = self.settings.flower_port
        if wanted and _bindable(self.settings.flower_address, wanted):
            return wanted
        port = _free_port(self.settings.flower_address)
        if wanted:
            self._say(f"port {wanted} is taken; Flower uses {port}")
        return port

    def _make_children(self) -> None:
        # Loads Celery and every task: only the supervisor needs that, not whoever asks for the version.
        from workers.config import beat_command, flower_command, worker_command

        logs = self.settings.data_dir / "logs"
        # What a killed process leaves in its temporary folder must not pile up in the machine's.
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir(mode=0o700)
        for name, command, grace in (
            ("worker", worker_command(self.settings), self.settings.soft_shutdown_seconds + STOP_SECONDS),
            ("beat", beat_command(self.settings), STOP_SECONDS),
            ("flower", flower_command(self.settings), STOP_SECONDS),
        ):
            self._children.append(
                Child(
                    name,
                    command.argv,
                    env=command.env,
                    cwd=self.settings.data_dir,
                    log_file=logs / f"{name}.log",
                    grace=grace,
                    guard=self._guard,
                )
            )

    def _await_ready(self, registry: Registry, started: int) -> None:
        deadline = time.monotonic() + READY_SECONDS
        host = flower = False
        while not (host and flower):
            if self._hurry():
                raise KeyboardInterrupt
            self.poll()
            for child in self._children:
                if child.restarts >= START_TRIES:
                    raise OperationFailed(f"{child.name} does not start; the end of {child.log_file}:\n{child.tail()}")
            host = host or self._host_is_there(registry, started)
            flower = flower or _answers(f"{self.flower_url}/healthcheck")
            if time.monotonic() > deadline:
                late = [name for name, there in (("worker", host), ("flower", flower)) if not there]
                raise TimedOut(
                    f"{' and '.join(late)} did not get ready within {READY_SECONDS:g} s; logs: {self.settings.data_dir / 'logs'}"
                )
            time.sleep(POLL_SECONDS)

    def _host_is_there(self, registry: Registry, started: int) -> bool:
        return any(host.host == self.settings.host and host.last_seen >= started for host in registry.hosts.list())


def _bindable(address: str, port: int) -> bool:
    try:
        with socket.create_server((address, port), family=socket.AF_INET6 if ":" in address else socket.AF_INET):
            return True
    except OSError:
        return False


def _free_port(address: str) -> int:
    with socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        return int(probe.getsockname()[1])


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:  # noqa: S310 - our own http address
            return bool(answer.status == 200)  # noqa: PLR2004
    except (OSError, urllib.error.URLError, ValueError):
        return False


class Signals:
    """Counts SIGINT, SIGTERM and SIGHUP instead of dying of them: the first means stop in order, the second stop at once."""

    def __init__(self) -> None:
        self.count = 0
        self.first: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.count += 1
        self.first = self.first or number

    def hurry(self) -> bool:
        """True from the second signal on."""
        return self.count > 1


def run_up(roots: Sequence[Path], *, as_json: bool = False) -> int:
    """`mothball up`: run until Ctrl-C or SIGTERM; returns the exit code."""
    settings, embedded = _up_settings(roots)

    def say(text: str) -> None:
        stream = sys.stderr if as_json else sys.stdout
        stream.write(f"{text}\n")
        stream.flush()

    with Signals() as signals:
        fleet = LocalFleet(settings, say=say, embedded=embedded, hurry=signals.hurry)
        say(f"starting a fleet on {settings.data_dir}")
        try:
            with contextlib.suppress(KeyboardInterrupt):
                fleet.start()
                if not signals.count:
                    _show_ready(fleet, as_json=as_json)
                while not signals.count:
                    _poll(fleet, say)
                    time.sleep(POLL_SECONDS)
            say("stopping; once more to stop at once")
        finally:
            fleet.stop()
        say("stopped")
    return 0


def _poll(fleet: LocalFleet, say: Say) -> None:
    try:
        fleet.poll()
    except MothballError as error:
        # Redis would not start again (its port was taken, the disk is full): keep the rest up and keep trying.
        say(f"{error.code}: {error.message}")
        time.sleep(1.0)


def _up_settings(roots: Sequence[Path]) -> tuple[Settings, bool]:
    settings = Settings.load()
    endpoint = settings.data_dir / ENDPOINT_FILE
    # The URL of a running fleet's endpoint file is not a wish of the user: that fleet's lock will refuse this one.
    embedded = "redis_url" not in settings.model_fields_set or _is_endpoint_url(endpoint, settings)
    allowed = tuple(root.expanduser().absolute() for root in roots) or settings.workspace_roots or (Path.cwd(),)
    # Loaded again and not copied: a copy is not checked.
    return Settings.load(workspace_roots=allowed), embedded


def _is_endpoint_url(endpoint: Path, settings: Settings) -> bool:
    try:
        return bool(json.loads(endpoint.read_bytes())["redis_url"] == settings.redis_url.get_secret_value())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _show_ready(fleet: LocalFleet, *, as_json: bool) -> None:
    settings = fleet.settings
    facts: dict[str, Any] = {
        "redis": redact_url(settings.redis_url.get_secret_value()),
        "endpoint": str(settings.data_dir / ENDPOINT_FILE),
        "host": settings.host,
        "workspace_roots": [str(root) for root in settings.workspace_roots],
        "data_dir": str(settings.data_dir),
        "flower": fleet.flower_url,
        "logs": {name: str(path) for name, path in fleet.log_files.items()},
    }
    if as_json:
        sys.stdout.write(json.dumps({"ready": True, **facts}) + "\n")
    else:
        sys.stdout.write(
            f"ready\n"
            f"  redis     {facts['redis']} (with its password in {facts['endpoint']}, mode 0600)\n"
            f"  host      {facts['host']}\n"
            f"  roots     {':'.join(facts['workspace_roots'])}\n"
            f"  data dir  {facts['data_dir']}\n"
            f"  flower    {facts['flower']}\n"
            + "".join(f"  log       {path}\n" for path in facts["logs"].values())
            + f"other terminals: MOTHBALL_DATA_DIR={settings.data_dir} mothball ls\nCtrl-C stops everything\n"
        )
    sys.stdout.flush()
