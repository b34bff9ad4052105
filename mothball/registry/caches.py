"""What the fleet knows of image caches: who uses one now, when a blob was used last, and what the last prune did.

Nothing here is needed to prune: without it file times decide, and nobody is waited for. All of it runs out by itself.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from mothball.errors import Busy, HostOffline, InvalidParams, LeaseLost
from mothball.names import check_host
from mothball.registry import encode, keys
from mothball.registry.connection import Connection
from mothball.registry.scripts import Scripts
from mothball.settings import Settings

MAX_USED = 50_000
"""Blobs of one cache whose last use is remembered."""
USED_KEPT_MS = 90 * 86_400_000
RESULT_KEPT_MS = 90 * 86_400_000
MAX_RESULT_BYTES = 32 * 1024
MAX_LEASES = 256
LEAST_LEASE_MS, MOST_LEASE_MS = 1000, 86_400_000
MAX_HOLDER_LENGTH = 200
_BATCH = 1000
_LEASE = re.compile(r"(\d+):(\d+):(.*)\Z", re.DOTALL)
_DIGEST = re.compile(r"(?:sha256:)?([0-9a-f]{64})\Z")


class CacheLease(msgspec.Struct, frozen=True):
    """A pull (or whatever else) that uses a cache: since `began`, unless renewed until `until`; ms of Redis TIME."""

    id: str
    by: str
    began: int
    until: int
    age: int = 0
    """ms since it began."""


class LastPrune(msgspec.Struct, frozen=True):
    """The last prune of a cache: when it ended (ms of Redis TIME) and its result."""

    at: int
    result: dict[str, Any]


class Caches:
    """Leases, uses and results of the image caches; a cache is a host and a folder there."""

    def __init__(self, connection: Connection, scripts: Scripts, settings: Settings) -> None:
        self._connection = connection
        self._scripts = scripts
        self._key = keys.Keys(settings.namespace)

    # -- leases -----------------------------------------------------------------------------------------------------

    def lease(self, host: str, folder: str, lease: str, *, lasts_ms: int, by: str = "") -> CacheLease:
        """Take lease `lease` (an id of the caller's): no full prune, and what it uses stays. Raises `Busy` beyond 256."""
        return self._lease("take", host, folder, lease, lasts_ms, by)

    def renew(self, host: str, folder: str, lease: str, *, lasts_ms: int, by: str = "") -> CacheLease:
        """Keep the lease for `lasts_ms` from now; raises `LeaseLost` when it has run out: a prune may have begun since."""
        return self._lease("renew", host, folder, lease, lasts_ms, by)

    def drop(self, host: str, folder: str, lease: str) -> bool:
        """Give the lease back; False when it had run out."""
        answer = self._scripts.run("cache_lease", _cache(host, folder), "drop", keys.job_id(lease), 0, "", 0)
        return bool(answer[1])

    def leases(self, host: str, folder: str) -> list[CacheLease]:
        """The leases that have not run out, the oldest first."""
        with self._connection.guard() as client:
            pipe = client.pipeline(transaction=False)
            pipe.hgetall(self._key("cache", "lease", _cache(host, folder)))
            pipe.time()
            found, (seconds, micros) = pipe.execute()
        now = int(seconds) * 1000 + int(micros) // 1000
        out = []
        for name, text in found.items():
            parts = _LEASE.match(text)
            if parts and int(parts[2]) > now:
                began = int(parts[1])
                out.append(CacheLease(id=name, by=parts[3], began=began, until=int(parts[2]), age=max(0, now - began)))
        return sorted(out, key=lambda each: (each.began, each.id))

    def _lease(self, verb: str, host: str, folder: str, lease: str, lasts_ms: int, by: str) -> CacheLease:
        if isinstance(lasts_ms, bool) or not isinstance(lasts_ms, int) or not LEAST_LEASE_MS <= lasts_ms <= MOST_LEASE_MS:
            raise InvalidParams(f"a lease of a cache lasts from {LEAST_LEASE_MS} ms to a day, not {lasts_ms!r} ms")
        if not isinstance(by, str) or len(by) > MAX_HOLDER_LENGTH or not by.isprintable():
            raise InvalidParams(f"who holds a lease is a name of at most {MAX_HOLDER_LENGTH} printable characters")
        answer = self._scripts.run("cache_lease", _cache(host, folder), verb, keys.job_id(lease), lasts_ms, by, MAX_LEASES)
        if answer[0] == "full":
            raise Busy(what=f"cache {folder} on {host}", reason=f"{MAX_LEASES} leases are held on it already")
        if answer[0] == "lost":
            raise LeaseLost(f"lease {lease} of cache {folder} on {host} has run out; a prune may have begun since", job=lease)
        return CacheLease(id=lease, by=by, began=int(answer[1]), until=int(answer[2]))

    # -- use --------------------------------------------------------------------------------------------------------

    def used(self, host: str, folder: str, digests: Iterable[str]) -> int:
        """Note that blobs were used just now; returns how many uses of the cache are remembered (50 000 at most, the latest).

        Raises `InvalidParams` for what is no sha256 digest, `HostOffline` for a host that no worker has announced.
        """
        hexes = sorted({_hex(each) for each in digests})
        cache, kept = _cache(host, folder), 0
        for start in range(0, max(len(hexes), 1), _BATCH):
            kept = int(self._scripts.run("cache_used", cache, host, MAX_USED, USED_KEPT_MS, *hexes[start : start + _BATCH]))
            if kept < 0:
                raise HostOffline(host=host)
        return kept

    def ages(self, host: str, folder: str, digests: Sequence[str]) -> list[int | None]:
        """How long ago each blob was used, ms; None for one whose use nobody reported. Ages, for files have another clock."""
        if not digests:
            return []
        with self._connection.guard() as client:
            pipe = client.pipeline(transaction=False)
            pipe.time()
            for start in range(0, len(digests), _BATCH):
                names = [each.removeprefix("sha256:") for each in digests[start : start + _BATCH]]
                pipe.zmscore(self._key("cache", "used", _cache(host, folder)), names)
            (seconds, micros), *pages = pipe.execute()
        now = int(seconds) * 1000 + int(micros) // 1000
        return [None if at is None else max(0, now - int(at)) for page in pages for at in page]

    # -- prunes -----------------------------------------------------------------------------------------------------

    def note_pruned(self, host: str, folder: str, run: str, result: dict[str, Any], *, reason: str) -> bool:
        """Count a prune and keep its result (``bytes_freed``, ``blobs_freed``, ...) for 90 days; the same `run` counts once.

        An event tells of it when something went, or when something is to be told (errors, asides of a killed run).
        """
        text = encode.dumps(result, "the result of a prune", MAX_RESULT_BYTES)
        told = "1" if result.get("errors") or result.get("leaked_asides") else "0"
        numbers = (int(result["bytes_freed"]), int(result["blobs_freed"]))
        cache = _cache(host, folder)
        return bool(self._scripts.run("cache_pruned", cache, run, RESULT_KEPT_MS, text, host, folder, *numbers, reason, told))

    def last(self, host: str, folder: str) -> LastPrune | None:
        """The last prune of the cache that was no dry run; None when none is known."""
        with self._connection.guard() as client:
            found = client.hgetall(self._key("cache", "last", _cache(host, folder)))
        try:
            at, result = int(found["at"]), json.loads(found["result"])
        except (KeyError, ValueError, RecursionError):
            return None
        return LastPrune(at=at, result=result) if isinstance(result, dict) else None

    def quarantined(self, host: str, folder: str, lasts_ms: int) -> None:
        """Note that the cache has something in quarantine, and when that is over."""
        name = self._key("cache", "quarantine")
        with self._connection.guard() as client:
            seconds, micros = client.time()
            due = int(seconds) * 1000 + int(micros) // 1000 + lasts_ms
            pipe = client.pipeline()
            pipe.zadd(name, {f"{check_host(host)}:{folder}": due})
            pipe.pexpire(name, RESULT_KEPT_MS)
            pipe.execute()

    def over(self, limit: int = _BATCH) -> list[tuple[str, str]]:
        """Hosts and folders whose quarantine is over and who were not asked since (`asked`): the space can be had."""
        name = self._key("cache", "quarantine")
        with self._connection.guard() as client:
            seconds, micros = client.time()
            now = int(seconds) * 1000 + int(micros) // 1000
            found = client.zrange(name, "-inf", now, byscore=True, offset=0, num=limit)
        return [(host, folder) for host, _, folder in (each.partition(":") for each in found)]

    def asked(self, host: str, folder: str) -> None:
        """The host was asked to end the quarantine of the cache."""
        with self._connection.guard() as client:
            client.zrem(self._key("cache", "quarantine"), f"{check_host(host)}:{folder}")

    def give_turn_back(self, host: str, interval_ms: int) -> None:
        """The turn that `due` gave was of no use: the next caller gets it again."""
        self._scripts.run("cache_due", check_host(host), interval_ms, offset_ms(host, interval_ms), "back")

    def due(self, host: str, interval_ms: int) -> bool:
        """True for one caller per interval; each host's begins at a moment of its own, so that not all prune at once."""
        if interval_ms <= 0:
            raise InvalidParams(f"interval_ms {interval_ms} must be above 0")
        return bool(self._scripts.run("cache_due", check_host(host), interval_ms, offset_ms(host, interval_ms), "take"))

    def note_running(self, host: str, folder: str, lane: str, job: str, lasts_ms: int) -> None:
        """Say that `job` is the prune of `lane` that runs now, so that a same request gets its result."""
        with self._connection.guard() as client:
            client.set(self._key("cache", "run", _cache(host, folder), keys.word(lane, "lane")), keys.job_id(job), px=lasts_ms)

    def running(self, host: str, folder: str, lane: str) -> str | None:
        """The job that `note_running` named last; it may have ended since."""
        with self._connection.guard() as client:
            found = client.get(self._key("cache", "run", _cache(host, folder), keys.word(lane, "lane")))
        return None if found is None else str(found)

    def calm(self, host: str, folder: str, lasts_ms: int) -> None:
        """Say that pressure cannot free more here for now: no use in asking every minute."""
        with self._connection.guard() as client:
            client.set(self._key("cache", "calm", _cache(host, folder)), "1", px=lasts_ms)

    def calmed(self, host: str, folder: str) -> bool:
        """True while `calm` holds."""
        with self._connection.guard() as client:
            return bool(client.exists(self._key("cache", "calm", _cache(host, folder))))


def offset_ms(host: str, interval_ms: int) -> int:
    """When in an interval it is the host's turn: the same for everybody, and spread evenly over the hosts."""
    return int.from_bytes(hashlib.sha256(host.encode()).digest()[:8]) % interval_ms


def _cache(host: str, folder: str) -> str:
    # A path may be long, and may hold what separates the parts of a key.
    return f"{check_host(host)}:{hashlib.sha256(folder.encode('utf-8', 'surrogateescape')).hexdigest()[:24]}"


def _hex(digest: object) -> str:
    found = _DIGEST.match(digest) if isinstance(digest, str) else None
    if not found:
        raise InvalidParams(f"{str(digest)[:80]!a} is no digest; write sha256: and 64 hex digits in lower case")
    return found[1]
