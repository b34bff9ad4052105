"""Hosts: machines with a worker, known by their heartbeats."""

from __future__ import annotations

from typing import Any

import msgspec

from mothball.errors import NotFound
from mothball.names import check_host
from mothball.registry import encode, keys
from mothball.registry.connection import Connection
from mothball.registry.scripts import Scripts
from mothball.settings import Settings

_BATCH = 500


class Host(msgspec.Struct, frozen=True):
    """A host: what it says about itself, when it was last heard (ms of Redis TIME), and whether it counts as online."""

    host: str
    info: dict[str, Any]
    last_seen: int
    online: bool

    def to_dict(self) -> dict[str, Any]:
        """The host in JSON types."""
        return msgspec.structs.asdict(self)


class HostCheck(msgspec.Struct, frozen=True):
    """Changes that this check, and no other, has reported."""

    went_offline: list[str]
    came_back: list[str]


class Hosts:
    """The hosts of the fleet."""

    def __init__(self, connection: Connection, scripts: Scripts, settings: Settings) -> None:
        self._connection = connection
        self._scripts = scripts
        self._silence_ms = settings.host_offline_seconds * 1000
        self._forget_ms = max(settings.tombstone_seconds * 1000, self._silence_ms)
        self._key = keys.Keys(settings.namespace)

    def heartbeat(self, host: str, info: dict[str, Any]) -> None:
        """Say that a worker of `host` lives; `info` replaces what was known (JSON, at most 64 KiB)."""
        self._scripts.run("heartbeat", check_host(host), encode.dumps(info, "host info", encode.MAX_DOCUMENT_BYTES))

    def note_collected(self, host: str, *, moved: int, moved_bytes: int, deleted: int, freed_bytes: int, layouts: int) -> bool:
        """Count what a collection of `host`'s store did, and tell of it; False when it changed nothing. Sizes are bytes."""
        numbers = (moved, moved_bytes, deleted, freed_bytes, layouts)
        return bool(self._scripts.run("note_collected", check_host(host), *numbers))

    def get(self, host: str) -> Host:
        """The host; raises `NotFound` for one that was never announced."""
        record, now = self._read([check_host(host)])
        if not record[0]:
            raise NotFound(what="host", id=host)
        return self._decode(record[0], now)

    def _read(self, names: list[str]) -> tuple[list[dict[str, str]], int]:
        with self._connection.guard() as client:
            pipe = client.pipeline(transaction=False)
            for name in names:
                pipe.hgetall(self._key("host", name))
            pipe.time()
            *records, (seconds, micros) = pipe.execute()
        return records, int(seconds) * 1000 + int(micros) // 1000

    def list(self) -> list[Host]:
        """All known hosts by name."""
        with self._connection.guard() as client:
            names = sorted(client.zrange(self._key("hosts"), 0, -1))
        found: list[Host] = []
        for start in range(0, len(names), _BATCH):
            records, now = self._read(names[start : start + _BATCH])
            found += [self._decode(record, now) for record in records if record]
        return found

    def known(self, host: str) -> bool:
        """True when a worker has ever announced `host` and it was not forgotten since."""
        with self._connection.guard() as client:
            return bool(client.exists(self._key("host", check_host(host))))

    def check(self) -> HostCheck:
        """Find hosts that fell silent or came back; each change is reported, with an event, by exactly one check.

        Silent means strictly longer than `host_offline_seconds`. A host without workspaces that was silent as long as a tombstone
        stands is forgotten. The queued jobs of a host that came back are due for ringing at once.
        """
        gone, back = self._scripts.run("check_hosts", self._silence_ms, self._forget_ms, _BATCH)
        return HostCheck(went_offline=sorted(gone), came_back=sorted(back))

    def _decode(self, record: dict[str, str], now: int) -> Host:
        seen = int(record["last_seen"])
        info = encode.loads(record["info"]) or {}
        return Host(host=record["host"], info=info, last_seen=seen, online=now - seen <= self._silence_ms)
