"""Which of a workspace's ports speak https or http (N-26): asked once each, for a second at most, and never anywhere else.

A probe goes to the address that the workspace's own process listens on, in that process's network: loopback, or an address of one
of the interfaces there. It sends one HEAD request, reads one line, and follows nothing.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import psutil

from mothball.runtime.driver import Listener
from mothball.runtime.netns import Cannot, Visit

PROBE_SECONDS = 1.0
"""For one port: looking for https and then for http."""
MAX_PROBES = 64
AT_ONCE = 16
_ENOUGH = 64
SLACK = 0.2
"""For the thread that waits, beyond the time of the probe."""


def probe(listeners: Sequence[Listener]) -> list[dict[str, Any]]:
    """Each listener with its `scheme` (``https``, ``http`` or None) and `url`; sorted by port and address, each once.

    `note` says why one was not asked. At most `MAX_PROBES`, `AT_ONCE` at a time.
    """
    chosen = sorted(set(listeners), key=lambda one: (one.port, one.address, one.netns))[:MAX_PROBES]
    out: list[dict[str, Any]] = []
    for start in range(0, len(chosen), AT_ONCE):
        visits = [(each, Visit(each, partial(_scheme, each)) if each.pid else None) for each in chosen[start : start + AT_ONCE]]
        deadline = time.monotonic() + PROBE_SECONDS + SLACK
        for each, visit in visits:
            out.append(_described(each, visit, deadline))
    return out


def address_of(listener: Listener) -> str | None:
    """The address at which `listener` is asked, called in its network: loopback for a wildcard, else its own, if that is local.

    None for one that is not an address of this network: what would be asked there is somebody else.
    """
    try:
        address = ipaddress.ip_address(listener.address)
    except ValueError:
        return None
    if address.is_unspecified:
        return "127.0.0.1" if address.version == 4 else "::1"  # noqa: PLR2004 - IPv4
    return str(address) if address.is_loopback or str(address) in local_addresses() else None


def local_addresses() -> set[str]:
    """The addresses of the interfaces in this thread's network."""
    found = {each.address.partition("%")[0] for group in psutil.net_if_addrs().values() for each in group}
    out = set()
    for text in found:
        with suppress(ValueError):
            out.add(str(ipaddress.ip_address(text)))
    return out


def _described(listener: Listener, visit: Visit[str | None] | None, deadline: float) -> dict[str, Any]:
    scheme, note = None, ""
    if visit is None:
        note = "not asked: whose it is cannot be seen from this host"
    else:
        try:
            scheme = visit.wait(deadline - time.monotonic())
        except Cannot as why:
            note = f"not asked: {why}"
        except OSError as error:
            note = f"not asked: {error.strerror or error}"
    found: dict[str, Any] = {
        "address": listener.address, "port": listener.port, "pid": listener.pid, "process": listener.process, "scheme": scheme,
        "url": f"{scheme}://{bracketed(listener.address)}:{listener.port}/" if scheme else None,
    }  # fmt: skip
    if listener.netns:
        found["netns"] = listener.netns
    if note:
        found["note"] = note
    return found


def _scheme(listener: Listener) -> str | None:
    """What the port speaks. https first: a TLS server answers a plain request too, with an error in plain HTTP."""
    address = address_of(listener)
    if address is None:
        return None
    deadline = time.monotonic() + PROBE_SECONDS
    half = time.monotonic() + PROBE_SECONDS / 2
    with suppress(OSError, ValueError), connected(address, listener.port, half) as plain, secured(plain, half) as secure:
        return "https" if _speaks_http(secure, address, deadline) else None
    with suppress(OSError, ValueError), connected(address, listener.port, deadline) as plain:
        return "http" if _speaks_http(plain, address, deadline) else None
    return None


def connected(address: str, port: int, deadline: float) -> socket.socket:
    """A connection to a literal address, made before `deadline` (monotonic); no name is looked up and no proxy asked."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.settimeout(remaining(deadline))
        made.connect((address, port))
    except BaseException:
        made.close()
        raise
    return made


def secured(plain: socket.socket, deadline: float) -> ssl.SSLSocket:
    """TLS over `plain`. The certificate is not looked at: a workspace's own says nothing, and nothing secret is sent."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # no list of authorities: loading it takes a tenth of a second
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    plain.settimeout(remaining(deadline))
    return context.wrap_socket(plain)


def remaining(deadline: float) -> float:
    """Seconds until `deadline`; raises `TimeoutError` when it has passed."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def bracketed(address: str) -> str:
    """An address as URLs and Host headers write it."""
    return f"[{address}]" if ":" in address else address


def first_line(connection: socket.socket, request: str, most: int, deadline: float) -> bytes:
    """What answers `request` before `deadline`: the first line and whatever came with it, or about `most` bytes of it."""
    connection.settimeout(remaining(deadline))
    connection.sendall(request.encode("ascii"))
    line = b""
    while b"\n" not in line and len(line) < most:
        connection.settimeout(remaining(deadline))  # each byte would start the time again
        chunk = connection.recv(most)
        if not chunk:
            break
        line += chunk
    return line


def _speaks_http(connection: socket.socket, address: str, deadline: float) -> bool:
    request = f"HEAD / HTTP/1.1\r\nHost: {bracketed(address)}\r\nUser-Agent: mothball\r\nConnection: close\r\n\r\n"
    return first_line(connection, request, _ENOUGH, deadline).startswith(b"HTTP/")
