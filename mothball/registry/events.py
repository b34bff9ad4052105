"""Lifecycle events: a bounded stream of what happened and why."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import msgspec

from mothball.registry import keys
from mothball.registry.connection import Connection
from mothball.registry.scripts import Scripts
from mothball.settings import Settings

_BATCH = 500
_MAX_FIELD = 4096


class Event(msgspec.Struct, frozen=True):
    """One event: `at` in ms of Redis TIME, `fields` as text."""

    id: str
    at: int
    kind: str
    fields: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The event in JSON types."""
        return msgspec.structs.asdict(self)


class Events:
    """The stream of lifecycle events; about `settings.events_max` are kept."""

    def __init__(self, connection: Connection, scripts: Scripts, settings: Settings) -> None:
        self._connection = connection
        self._scripts = scripts
        self._key = keys.Keys(settings.namespace)("events")

    def add(self, kind: str, **fields: object) -> str:
        """Add one event and return its id. Texts are kept as they are, other values as JSON, at most 4096 characters each."""
        flat: list[str] = []
        for name, value in fields.items():
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            flat += [name, text[:_MAX_FIELD]]
        return str(self._scripts.run("add_event", keys.word(kind, "event kind"), *flat))

    def list(self, limit: int = 100, workspace: str | None = None, kind: str | None = None) -> list[Event]:
        """The newest `limit` events, newest first, of one workspace or one kind if asked."""
        found: list[Event] = []
        until = "+"
        with self._connection.guard() as client:
            while len(found) < limit:
                batch = client.xrevrange(self._key, max=until, count=_BATCH)
                events = [_decode(each, fields) for each, fields in batch]
                found += [
                    event
                    for event in events
                    if (kind is None or event.kind == kind) and (workspace is None or event.fields.get("workspace") == workspace)
                ]
                if len(batch) < _BATCH:
                    break
                until = f"({batch[-1][0]}"
        return found[: max(limit, 0)]

    def follow(self, after: str | None = None, timeout: float | None = None) -> Iterator[Event]:
        """Events after the id `after` (None: from now on) as they come, for `timeout` seconds (None: for ever)."""
        end = None if timeout is None else time.monotonic() + timeout
        # A blocking read must end before the socket's timeout does, or a quiet fleet looks like a dead server.
        longest = min(1.0, self._connection.timeout / 2)
        last = after if after is not None else self._last_id()
        while True:
            left = longest if end is None else min(longest, end - time.monotonic())
            with self._connection.guard() as client:
                if left <= 0:
                    answer = client.xread({self._key: last}, count=_BATCH)
                else:
                    answer = client.xread({self._key: last}, count=_BATCH, block=max(1, int(left * 1000)))
            for each, fields in answer[0][1] if answer else ():
                last = each
                yield _decode(each, fields)
            if left <= 0:
                return

    def _last_id(self) -> str:
        with self._connection.guard() as client:
            newest = client.xrevrange(self._key, count=1)
        return str(newest[0][0]) if newest else "0-0"


def _decode(each: str, fields: dict[str, str]) -> Event:
    rest = dict(fields)
    return Event(id=each, at=int(each.partition("-")[0]), kind=rest.pop("kind", ""), fields=rest)
