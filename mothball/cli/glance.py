"""One quick look at the registry: on which host is this workspace?

Listing a capture takes less time than loading the client of the registry, and all that it needs to know is one field. What
is unusual here in any way (TLS, a refused login, no record) is no answer: then the caller asks the real client, which says why.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from mothball.settings import Settings

_PIECE: Final = 4096


def host_of(settings: Settings, workspace: str) -> str | None:
    """The host of a registered workspace; None when it cannot be had in one plain look. Takes at most ``redis_timeout`` seconds."""
    import hiredis

    parts = urlsplit(settings.registry_url)
    if parts.scheme != "redis" or parts.query or not parts.hostname:
        return None
    login = ("AUTH", *([unquote(parts.username)] if parts.username else []), unquote(parts.password)) if parts.password else None
    commands = [("SELECT", str(settings.registry_db)), ("HGET", f"{settings.namespace}:ws:{workspace}", "host")]
    request = b"".join(hiredis.pack_command(command) for command in ([login] if login else []) + commands)  # type: ignore[arg-type]
    reader = hiredis.Reader(encoding="utf-8")
    answers: list[object] = []
    with (
        suppress(OSError, ValueError, hiredis.HiredisError),
        socket.create_connection((parts.hostname, parts.port or 6379), settings.redis_timeout) as connection,
    ):
        connection.sendall(request)
        while len(answers) < len(commands) + bool(login) and (piece := connection.recv(_PIECE)):
            reader.feed(piece)
            while (answer := reader.gets()) is not False:
                answers.append(answer)
    *before, host = answers or [None]
    return host if isinstance(host, str) and len(before) == len(commands) + bool(login) - 1 and {*before} == {"OK"} else None
