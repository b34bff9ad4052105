"""Loads the Lua scripts of the package and runs them by name."""

from __future__ import annotations

import re
from functools import cache
from importlib import resources
from typing import Any

from mothball.errors import InvalidParams
from mothball.registry.connection import Connection
from mothball.settings import Settings

_INCLUDE = re.compile(r"^-- include: ([a-z_]+)\n", re.MULTILINE)


@cache
def source(name: str) -> str:
    """The text of script `name` with what its header includes, and what that includes: each once, at its first place."""
    return _expand(name, set())


def _expand(name: str, there: set[str]) -> str:
    def put(found: re.Match[str]) -> str:
        if found[1] in there:
            return ""
        there.add(found[1])
        return _expand(found[1], there)

    text = (resources.files("mothball.registry") / "lua" / f"{name}.lua").read_text("utf-8")
    return _INCLUDE.sub(put, text)


class Scripts:
    """Runs scripts by name; every script gets the standing arguments that lua/common.lua documents."""

    def __init__(self, connection: Connection, settings: Settings) -> None:
        self._connection = connection
        self._standing = (
            settings.namespace,
            settings.events_max,
            settings.job_ttl_seconds * 1000,
            settings.queued_ring_after_seconds * 1000,
            settings.queued_ring_max_seconds * 1000,
        )
        self._loaded: dict[str, Any] = {}

    def run(self, name: str, *args: str | int) -> Any:
        """Run one script, atomically; raises `Unavailable`. EVALSHA first, the text only when the server lacks it."""
        with self._connection.guard() as client:
            script = self._loaded.get(name)
            if script is None:
                script = self._loaded[name] = client.register_script(source(name))
            return script(args=(*self._standing, *(_wire(each) for each in args)))


def _wire(value: str | int) -> bytes | int:
    """Text as bytes: file names that are not UTF-8 keep theirs, which the client's own encoder would refuse.

    `InvalidParams` for other surrogates: no bytes could stand for them, and JSON brings them in as harmless ASCII escapes.
    """
    if not isinstance(value, str):
        return value
    try:
        return value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise InvalidParams(f"{value[:100]!a} holds a surrogate, which is no character") from None


def pairs(flat: list[str]) -> dict[str, str]:
    """A record as a script returns it (name, value, name, value ...)."""
    return dict(zip(flat[::2], flat[1::2], strict=True))
