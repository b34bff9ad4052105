"""Drivers `docker` and `podman`: a container behind the Docker Engine API, over the unix socket that the host's settings name.

Only the calls that a stop, a look and a figure need are made, and each one ends within a limit: a daemon that hangs is `TimedOut`.
"""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mothball.errors import ConfigError, InvalidParams, OperationFailed, TimedOut
from mothball.runtime import proc
from mothball.runtime.answers import dig, text
from mothball.runtime.driver import KILL_SECONDS, Alive, Listener, Stats, Stopped, Tick
from mothball.runtime.ending import outlived
from mothball.runtime.listeners import listeners_of
from mothball.runtime.proc import Proc
from mothball.runtime.usage import stats_of

CALL_SECONDS = 10.0
POLL_SECONDS = 0.2
MAX_ANSWER = 4 * 1024 * 1024
API = "/v1.41"
"""Docker 20.10 and Podman 4 speak it, and everything newer."""
_NANO = 10**9
_SHORT_ID = 12
_MOUNT_ROOT, _MOUNT_POINT = 3, 4
_ENGINES_FILES = {"/etc/hostname", "/etc/hosts", "/etc/resolv.conf"}
_KILLED = 128 + 9
_OK, _NO_CONTENT, _NOT_MODIFIED, _NOT_FOUND = 200, 204, 304, 404


class DockerDriver:
    """The container of one handle."""

    def __init__(self, handle: dict[str, Any], endpoint: str) -> None:
        """`endpoint`: the setting `docker_socket`. Raises `ConfigError` when it is empty or no path of a socket."""
        self.name = str(handle["driver"])
        self._given = str(handle["container"])
        path = endpoint.removeprefix("unix://")
        if not path:
            raise ConfigError(f"driver {self.name} is off on this host: MOTHBALL_DOCKER_SOCKET names no socket")
        if not path.startswith("/"):
            raise ConfigError(f"MOTHBALL_DOCKER_SOCKET {endpoint!r} must be the absolute path of a unix socket")
        self._socket = path

    def alive(self) -> Alive:
        """True while the container runs, also paused or restarting."""
        found = self._inspect()
        if found is None:
            return Alive(alive=False, reason=f"{self.name} knows no container {self._given} (any more)")
        state, facts = _state(found), _facts(found)
        running = bool(state.get("Running") or state.get("Paused") or state.get("Restarting"))
        reason = f"container {self._given} is {text(state.get('Status')) or ('running' if running else 'not running')}"
        if running and facts.get("health") == "unhealthy":
            reason += ", and its own health check fails"
        return Alive(alive=running, reason=reason, facts=facts)

    def stop(self, grace_s: float, tick: Tick) -> Stopped:
        """The engine's own stop: the container's stop signal, the grace, SIGKILL, and no restart by its policy."""
        found = self._inspect()
        if found is None or not self.alive().alive:
            return Stopped(how="was_dead", facts=_facts(found) if found else {"container": self._given})
        ident = text(found.get("Id")) or self._given  # from here on this container, also if its name is given to another
        self._refuse_own(found, ident)
        if _state(found).get("Paused"):
            self._must("POST", f"/containers/{quote(ident, safe='')}/unpause", tick=tick)
        seconds = max(0, round(grace_s))
        began = time.monotonic()
        limit = seconds + KILL_SECONDS + CALL_SECONDS
        self._must("POST", f"/containers/{quote(ident, safe='')}/stop?t={seconds}", tick=tick, seconds=limit)
        took = time.monotonic() - began
        after = self._inspect(ident)
        if after is None:  # --rm: it is gone with its facts
            return Stopped(how="term" if took < seconds else "kill", facts={"container": ident})
        facts = _facts(after)
        if _state(after).get("Running"):
            return Stopped(how="kill", facts=facts, left=outlived(self._members(), self.name, self._given))
        killed = facts.get("exit_code") == _KILLED and took >= seconds
        return Stopped(how="kill" if killed else "term", facts=facts)

    def stats(self, path: str | None) -> Stats:
        """CPU and memory as the engine counts them. Raises `NotRunning`."""
        ident = self._running()
        status, answer = self._call("GET", f"/containers/{quote(ident, safe='')}/stats?stream=false&one-shot=true")
        figures = answer if status == _OK and isinstance(answer, dict) else {}
        cpu = dig(figures, "cpu_stats", "cpu_usage", "total_usage")
        members = self._members()
        measured = stats_of(
            members, path, cpu_seconds=cpu / _NANO if cpu else None, rss_bytes=dig(figures, "memory_stats", "usage") or None
        )
        counted = dig(figures, "pids_stats", "current")
        return measured if members or not counted else Stats(
            cpu_seconds=measured.cpu_seconds, rss_bytes=measured.rss_bytes, disk_bytes=measured.disk_bytes, processes=counted,
            disk_complete=measured.disk_complete,
        )  # fmt: skip

    def ports(self) -> list[Listener]:
        """Where the container's processes listen, inside it. Raises `NotRunning`."""
        self._running()
        return listeners_of(self._members())

    def _running(self) -> str:
        found = self.alive()
        found.require(f"container {self._given}")
        return str(found.facts.get("container") or self._given)

    def _members(self) -> list[Proc]:
        """The container's processes as this host sees them: those of its pid namespace, or the tree of its first process.

        Empty when this worker is itself in a container and sees other pids than the engine.
        """
        found = self._inspect()
        first = proc.read(dig(_state(found or {}), "Pid"))
        if first is None:
            return []
        space = proc.namespace("pid", first.pid)
        processes = proc.everything()
        members = proc.grown([first.key], processes)
        if space and space != proc.namespace("pid"):
            members |= {pid: each for pid, each in processes.items() if proc.namespace("pid", pid) == space}
        return [each for each in members.values() if not each.dead]

    def _refuse_own(self, found: dict[str, Any], ident: str) -> None:
        """Raise `InvalidParams` for the container that this worker runs in."""
        if _is_own_container(ident) or dig(_state(found), "Pid") in proc.own_line():
            raise InvalidParams(f"container {self._given} is the one that this worker runs in: no workspace can be that")

    def _inspect(self, ident: str | None = None) -> dict[str, Any] | None:
        status, answer = self._call("GET", f"/containers/{quote(ident or self._given, safe='')}/json")
        if status == _NOT_FOUND:
            return None
        if status != _OK or not isinstance(answer, dict):
            raise self._failed("inspect", status, answer)
        return answer if _is_meant(answer, ident or self._given) else None

    def _must(self, method: str, target: str, *, tick: Tick, seconds: float = 0) -> None:
        status, answer = self._call(method, target, tick=tick, seconds=seconds)
        if status not in {_OK, _NO_CONTENT, _NOT_MODIFIED}:
            raise self._failed(target.rpartition("/")[2].partition("?")[0], status, answer)

    def _failed(self, verb: str, status: int, answer: Any) -> OperationFailed:
        said = answer.get("message") if isinstance(answer, dict) else None
        reason = text(said)[:300] or f"status {status}"
        return OperationFailed(f"{self.name} {verb} {self._given} failed: {reason}", reason=reason)

    def _call(self, method: str, target: str, *, tick: Tick | None = None, seconds: float = 0) -> tuple[int, Any]:
        """Status and JSON of one request. A thread of its own waits for it: a daemon may drip one byte a second for ever."""
        seconds = seconds or CALL_SECONDS
        call = _Call(self._socket, method, API + target, seconds)
        thread = threading.Thread(target=call.make, name=f"{self.name}-api", daemon=True)
        thread.start()
        deadline = time.monotonic() + seconds
        try:
            while thread.is_alive():
                thread.join(POLL_SECONDS if tick is not None else seconds)
                if tick is not None:
                    tick()
                if thread.is_alive() and time.monotonic() >= deadline:
                    raise TimedOut(what=f"{self.name} ({method} {target.partition('?')[0]})", seconds=seconds)
        finally:
            call.close()
        if isinstance(call.error, TimeoutError):
            raise TimedOut(what=f"{self.name} ({method} {target.partition('?')[0]})", seconds=seconds)
        if call.error is not None:
            raise OperationFailed(
                f"{self.name} at {self._socket} does not answer: {call.error or type(call.error).__name__}", reason=str(call.error)
            )
        return call.status, call.answer


class _Call:
    """One request over the unix socket."""

    def __init__(self, path: str, method: str, target: str, seconds: float) -> None:
        self.status = 0
        self.answer: Any = None
        self.error: Exception | None = None
        self._method, self._target = method, target
        self._connection = _UnixConnection(path, seconds)

    def make(self) -> None:
        try:
            self._connection.request(self._method, self._target, headers={"Host": "localhost", "Connection": "close"})
            with self._connection.getresponse() as response:
                body = response.read(MAX_ANSWER + 1)
                self.status = response.status
            if len(body) > MAX_ANSWER:
                raise ValueError(f"it answers more than {MAX_ANSWER} bytes")
            self.answer = json.loads(body) if body.strip() else None
        except Exception as error:  # handed to the thread that waits
            self.error = error

    def close(self) -> None:
        """Also wakes a thread that still waits for the answer, wherever it is in it."""
        if (opened := self._connection.opened) is not None:
            with suppress(OSError):
                opened.shutdown(socket.SHUT_RDWR)
        self._connection.close()


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str, seconds: float) -> None:
        super().__init__("localhost", timeout=seconds)
        self._path = path
        self.opened: socket.socket | None = None
        """Its socket for as long as this object lives: the base class forgets it once the headers are read."""

    def connect(self) -> None:
        self.sock = self.opened = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _is_own_container(ident: str) -> bool:
    """True when this process runs in the container `ident`: the engine mounts files of the container's own over these three."""
    if len(ident) < _SHORT_ID:
        return False
    name = socket.gethostname()  # the container's short id, unless it was told otherwise
    if len(name) >= _SHORT_ID and ident.startswith(name):
        return True
    try:
        lines = [line.split() for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()]
    except OSError:
        return False
    # Only these: a host has every container's mounts in its list.
    return any(len(line) > _MOUNT_POINT and line[_MOUNT_POINT] in _ENGINES_FILES and ident in line[_MOUNT_ROOT] for line in lines)


def _is_meant(found: dict[str, Any], given: str) -> bool:
    """False when the engine answered with another container: it takes the beginning of any id for a name.

    A container called ``ada`` may be gone, and another one's id begins with ``ada``. Twelve digits are what Docker itself shows.
    """
    ident = str(found.get("Id") or "")
    return found.get("Name") in {given, f"/{given}"} or ident == given or (len(given) >= _SHORT_ID and ident.startswith(given))


def _state(found: dict[str, Any]) -> dict[str, Any]:
    state = found.get("State")
    return state if isinstance(state, dict) else {}


def _facts(found: dict[str, Any]) -> dict[str, Any]:
    """What is known of a container: its id, its first process while it runs, how it ended, what its health check says."""
    state = _state(found)
    facts: dict[str, Any] = {"container": text(found.get("Id")), "status": text(state.get("Status"))}
    if pid := dig(state, "Pid"):
        facts["pid"] = pid
    if not state.get("Running"):
        facts["exit_code"] = dig(state, "ExitCode")
        facts["oom"] = bool(state.get("OOMKilled"))
    health = state.get("Health")
    if isinstance(health, dict) and health.get("Status"):
        facts["health"] = text(health["Status"])
    return facts
