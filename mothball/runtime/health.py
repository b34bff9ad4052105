"""Whether a workspace is well, and why: its runtime lives and, if it says where to ask, its own health URL answers (N-23).

The URL comes out of the registry. It is asked only if its address is the workspace's and one of the workspace's own processes
listens on its port, in that process's network, for a second at most; a redirect is an answer and is not followed.
"""

from __future__ import annotations

import ipaddress
import socket
import time
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import msgspec

from mothball.errors import MothballError
from mothball.runtime.driver import Alive, Driver, Listener
from mothball.runtime.handles import health_url
from mothball.runtime.netns import Cannot, Visit
from mothball.runtime.ports import PROBE_SECONDS, SLACK, bracketed, connected, first_line, local_addresses, secured

_LINE = 200
_DEFAULT_PORTS = {"http": 80, "https": 443}
_WELL = range(200, 300)


class Health(msgspec.Struct, frozen=True):
    """The answer: healthy or not, in words, with what the driver said and the status of the URL where one was asked."""

    healthy: bool
    reason: str
    alive: bool
    sure: bool
    status: int | None = None
    """HTTP status of the health URL."""
    checked_at: int = 0
    """ms of Redis TIME; set by the job that asked."""


def check_health(driver: Driver, runtime: dict[str, Any]) -> Health:
    """Look now. Raises `TimedOut` and `OperationFailed` of the driver; a URL that does not answer is no error but a reason."""
    found = driver.alive()
    if not found.alive:
        return Health(healthy=False, reason=found.reason, alive=False, sure=found.sure)
    if found.facts.get("health") == "unhealthy":
        return Health(healthy=False, reason=found.reason, alive=True, sure=True)
    if "health_url" not in runtime:
        return Health(healthy=True, reason=found.reason, alive=True, sure=True)
    return _by_url(driver, health_url(runtime["health_url"]), found)


def _by_url(driver: Driver, url: str, found: Alive) -> Health:
    def answer(healthy: bool, reason: str, status: int | None = None) -> Health:
        return Health(healthy=healthy, reason=reason, alive=True, sure=found.sure, status=status)

    parts = urlsplit(url)
    port = parts.port or _DEFAULT_PORTS[parts.scheme]
    try:
        listeners = [each for each in driver.ports() if each.port == port and each.pid]
    except MothballError as error:
        return answer(False, f"{found.reason}, but its ports cannot be seen: {error.message}")
    host = "127.0.0.1" if parts.hostname == "localhost" else str(parts.hostname)
    fitting = [each for each in listeners if _serves(each, host)]
    if not fitting:
        return answer(False, f"{found.reason}, but nothing of the workspace listens on {host} port {port}")
    target = parts.path + (f"?{parts.query}" if parts.query else "") or "/"
    try:
        status = Visit(fitting[0], lambda: _ask(parts.scheme, host, port, target)).wait(PROBE_SECONDS + SLACK)
    except Cannot as why:
        return answer(False, f"{found.reason}, but {url} was not asked: {why}")
    except (OSError, ValueError) as error:
        if isinstance(error, TimeoutError):
            return answer(False, f"{url} does not answer within {PROBE_SECONDS:g} s")
        return answer(False, f"{url} does not answer: {str(error)[:200]}")
    if status is None:
        return answer(False, f"{url} does not answer within {PROBE_SECONDS:g} s")
    return answer(status in _WELL, f"{url} answers {status}", status)


def _serves(listener: Listener, host: str) -> bool:
    """True when a connection to `host` on the listener's port would reach it: the same address, or a wildcard."""
    with suppress(ValueError):
        mine, asked = ipaddress.ip_address(listener.address), ipaddress.ip_address(host)
        return mine == asked or (mine.is_unspecified and (mine.version == asked.version or mine.version > asked.version))
    return False


def _ask(scheme: str, host: str, port: int, target: str) -> int:
    """The status of one GET; called in the workspace's network. Raises `Cannot`, `OSError`, `ValueError`."""
    address = ipaddress.ip_address(host)
    if not address.is_loopback and str(address) not in local_addresses():
        raise Cannot(f"{host} is no address of the workspace's network")
    deadline = time.monotonic() + PROBE_SECONDS
    with connected(host, port, deadline) as plain:
        if scheme == "http":
            return _status(plain, host, port, target, deadline)
        with secured(plain, deadline) as secure:
            return _status(secure, host, port, target, deadline)


def _status(connection: socket.socket, host: str, port: int, target: str, deadline: float) -> int:
    where = f"{bracketed(host)}:{port}"
    request = f"GET {target} HTTP/1.1\r\nHost: {where}\r\nUser-Agent: mothball\r\nAccept: */*\r\nConnection: close\r\n\r\n"
    line = first_line(connection, request, _LINE, deadline)
    fields = line.split(b"\n")[0].split()
    if len(fields) < 2 or not fields[0].startswith(b"HTTP/") or not fields[1].isdigit() or len(fields[1]) != 3:  # noqa: PLR2004
        raise ValueError("it does not speak HTTP")
    return int(fields[1])
