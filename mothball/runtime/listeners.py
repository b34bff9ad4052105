"""Which TCP ports processes listen on, from `/proc`: the sockets they hold open, the tables of their network namespaces."""

from __future__ import annotations

import ipaddress
import os
import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from mothball.runtime import proc
from mothball.runtime.driver import Listener
from mothball.runtime.proc import Proc

MAX_LISTENERS = 64
"""A workspace with more is listed up to here, lowest ports first: nobody wants ten thousand probes (N-26)."""
MAX_DESCRIPTORS = 20_000
_LISTENING = "0A"
_SOCKET = re.compile(r"socket:\[([0-9]+)\]\Z")


def listeners_of(processes: Iterable[Proc]) -> list[Listener]:
    """The listening TCP ports of `processes`, each once, sorted by address and port, at most `MAX_LISTENERS`.

    A process of another user shows its sockets only to root; its ports are then not listed.
    """
    mine = proc.namespace("net")
    tables: dict[str, dict[str, tuple[str, int]]] = {}
    found: dict[tuple[str, str, int], Listener] = {}
    for each in sorted(processes, key=lambda one: one.pid):
        sockets = _sockets(each.pid)
        if not sockets:
            continue
        space = proc.namespace("net", each.pid)
        if space not in tables:
            tables[space] = _listening(each.pid)
        for inode in sockets & tables[space].keys():
            address, port = tables[space][inode]
            # A server and the children it forked share one socket: the eldest stands for it.
            found.setdefault(
                (space, address, port),
                Listener(
                    address=address, port=port, pid=each.pid, process=each.name, started=each.started,
                    netns=space if space != mine else "",
                ),
            )  # fmt: skip
    return sorted(found.values(), key=lambda one: (one.port, one.address, one.netns))[:MAX_LISTENERS]


def _sockets(pid: int) -> set[str]:
    """Inodes of the sockets that a process holds."""
    out: set[str] = set()
    folder = f"/proc/{pid}/fd"
    with suppress(OSError), os.scandir(folder) as scan:
        for count, entry in enumerate(scan):
            if count >= MAX_DESCRIPTORS:
                break
            with suppress(OSError):
                if match := _SOCKET.match(os.readlink(f"{folder}/{entry.name}")):  # noqa: PTH115 - thousands of them
                    out.add(match[1])
    return out


def _listening(pid: int) -> dict[str, tuple[str, int]]:
    """Inode -> (address, port) of every listening TCP socket in the network namespace of a process."""
    out: dict[str, tuple[str, int]] = {}
    for table in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if len(fields) > 9 and fields[3] == _LISTENING:  # noqa: PLR2004 - proc(5): the tenth field is the inode
                    address, _, port = fields[1].rpartition(":")
                    out[fields[9]] = (_address(address), int(port, 16))
    return out


def _address(text: str) -> str:
    """An address as `/proc` writes it: 32-bit words in the machine's own byte order."""
    words = [bytes.fromhex(text[start : start + 8]) for start in range(0, len(text), 8)]
    raw = b"".join(word[::-1] if sys.byteorder == "little" else word for word in words)
    address = ipaddress.ip_address(raw)
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)
