"""The fleet's byte budget: what the captures of registered workspaces take, and what running jobs were promised (Q-10).

Three sums in one HASH, changed only inside the scripts that have the effect: a job's end adds what it stored and refunds what
it was promised, a burial moves a workspace's bytes from `loaded` to `retained`, an undelete moves them back. What a job was
promised is tied to its run: whoever ends the run, or finds it dead, refunds it in the same script (Q-14).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from mothball.errors import InvalidParams, LeaseLost
from mothball.names import check_host
from mothball.policy import Facts
from mothball.registry import keys
from mothball.registry.checks import MAX_TEXT
from mothball.registry.connection import Connection
from mothball.registry.facts import flat
from mothball.registry.scripts import Scripts
from mothball.settings import Settings

_BATCH = 200
_MAX_BYTES = 2**53 - 1
"""Lua counts exactly up to here: eight pebibytes."""


class BudgetState(msgspec.Struct, frozen=True):
    """The budget at one moment, bytes. Admission compares `committed` with `limit`; `retained` goes by itself and is only shown."""

    limit: int | None
    loaded: int
    """Captures of registered workspaces; pinned ones count too (Q-08)."""
    reserved: int
    """Promised to running jobs."""
    retained: int
    """Captures of evicted and released workspaces that a store still holds, for `undelete`."""
    high_water: int
    """The most that `committed` has ever been (Q-04); a smaller figure later never lowers it."""

    @property
    def committed(self) -> int:
        """What counts against the limit (Q-10)."""
        return self.loaded + self.reserved

    @property
    def over(self) -> int:
        """Bytes above the limit; 0 at the limit, below it and without one."""
        return 0 if self.limit is None else max(0, self.committed - self.limit)

    def to_dict(self) -> dict[str, Any]:
        """The figures in JSON types."""
        return {**msgspec.structs.asdict(self), "committed": self.committed}


class Reservation(msgspec.Struct, frozen=True):
    """Whether the job was promised its bytes, the budget as it was before (`reserved` without this job's own), who was evicted.

    `changed` is the id of somebody who was to be evicted and is not any more as the plan saw it; nobody was evicted then.
    """

    ok: bool
    before: BudgetState
    evicted: list[str] = []
    changed: str = ""


class Budget:
    """The budget of the fleet. The limit is the fleet policy's `budget`; this only counts and compares."""

    def __init__(self, connection: Connection, scripts: Scripts, settings: Settings) -> None:
        self._connection = connection
        self._scripts = scripts
        self._key = keys.Keys(settings.namespace)
        self._tombstone_ms = settings.tombstone_seconds * 1000

    def state(self, limit: int | None = None) -> BudgetState:
        """The sums now; `limit` is only passed on. Raises `Unavailable`."""
        with self._connection.guard() as client:
            raw = client.hmget(self._key("budget"), "loaded", "reserved", "retained", "high_water")
        return BudgetState(limit, *(int(each or 0) for each in raw))

    def reserve(
        self,
        job: str,
        fence: int,
        *,
        bytes: int,  # noqa: A002
        limit: int,
        victims: Sequence[Facts] = (),
        detail: str = "",
    ) -> Reservation:
        """Promise the running job room for `bytes` in all, if that fits the limit; at the limit it fits (Q-12, 6.2).

        When it does not, as many of `victims` as it takes are evicted in their order, with rule ``budget`` and `detail`: all in one
        step, and none unless they make the room and are still as their facts say (Q-13). A job has one reservation: another
        call replaces it when it fits, and leaves it when it does not. It ends with the run.
        Raises `LeaseLost` for a run that is not the newest, `InvalidParams`, `Unavailable`.
        """
        args: list[str | int] = [
            _bytes("bytes", bytes),
            _bytes("limit", limit),
            self._tombstone_ms,
            detail[:MAX_TEXT],
            f"job {job}",
        ]
        for each in victims:
            args += [each.id, each.registration, len(each.seen), *flat(each.seen)]
        answer = self._scripts.run("budget_reserve", keys.job_id(job), fence, *args)
        if answer[0] == "lost":
            raise LeaseLost(job=job)
        status, rest = answer[0], answer[5:]
        before = BudgetState(limit, *(int(each) for each in answer[1:5]))
        if status == "changed":
            return Reservation(False, before, changed=rest[0])
        return Reservation(status == "ok", before, evicted=rest)

    def refund(self, job: str, fence: int) -> None:
        """Give back what the running job was promised before its end does. Raises `LeaseLost`, `Unavailable`."""
        if self._scripts.run("budget_refund", keys.job_id(job), fence)[0] == "lost":
            raise LeaseLost(job=job)

    def measure(self, host: str, before: Mapping[str, int], found: Mapping[str, int]) -> int:
        """Let the budget count what `host`'s store was found to hold; returns how many figures that corrected.

        `found` has the bytes of each workspace that the store knows, every blob counted once; `before` is `stored(host)` from
        before the store was read: a workspace that was captured since, or is being captured, keeps its figure until next time.
        """
        check_host(host)
        kept = {workspace for _, workspace in self._retained(host)}
        corrected = 0
        for batch in _batches(sorted({*before, *found, *kept})):
            items = [
                text for each in batch for text in (each, str(before.get(each, "")), str(_bytes("bytes found", found.get(each, 0))))
            ]
            corrected += int(self._scripts.run("budget_measure", host, *items))
        return corrected

    def stored(self, host: str) -> dict[str, int]:
        """`stored_bytes` of each workspace that is registered on `host`."""
        out: dict[str, int] = {}
        with self._connection.guard() as client:
            ids = sorted(client.smembers(self._key("ws", "host", check_host(host))))
            for batch in _batches(ids):
                pipe = client.pipeline(transaction=False)
                for each in batch:
                    pipe.hget(self._key("ws", each), "stored_bytes")
                out |= {each: int(value) for each, value in zip(batch, pipe.execute(), strict=True) if value is not None}
        return out

    def heal(self) -> int:
        """Refund what is promised to jobs that do not run, and drop what is retained on hosts that the fleet has forgotten.

        Returns how many entries went. Nothing of the kind is left by any script; deleting keys by hand and lost hosts do it.
        """
        with self._connection.guard() as client:
            jobs = sorted(client.hkeys(self._key("budget", "reserved")))
        gone = sum(int(self._scripts.run("budget_heal", *batch)) for batch in _batches(jobs))
        by_host: dict[str, dict[str, int]] = defaultdict(dict)
        for host, workspace in self._retained():
            by_host[host][workspace] = 0
        with self._connection.guard() as client:
            known = {host: client.exists(self._key("host", host)) for host in by_host}
        for host, kept in by_host.items():
            if not known[host]:
                for batch in _batches(sorted(kept)):
                    items = [text for each in batch for text in (each, "", "0")]
                    gone += int(self._scripts.run("budget_measure", host, *items))
        return gone

    def _retained(self, host: str | None = None) -> Iterator[tuple[str, str]]:
        """(host, workspace) of what is retained; of `host` if given. Names of hosts have no blank and no pattern characters."""
        with self._connection.guard() as client:
            fields = {
                field for field, _ in client.hscan_iter(self._key("budget", "retained"), f"{host} *" if host else None, count=1000)
            }
        for field in sorted(fields):
            of, _, workspace = field.partition(" ")
            yield of, workspace


def _batches(items: list[str]) -> Iterable[list[str]]:
    return (items[start : start + _BATCH] for start in range(0, len(items), _BATCH))


def _bytes(what: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_BYTES:
        raise InvalidParams(f"{what} {value!r} must be a whole number of bytes, 0 or more")
    return value
