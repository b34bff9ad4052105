"""What the tests of the sweeps share: one worker's services on a private Redis, and a way to make workspaces older."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import redis

from mothball.policy import Facts
from mothball.reclaim import Plan, Reclaimer
from mothball.registry import Event, Job, Registry
from mothball.settings import Settings
from tasks import services
from tasks.lifecycle import stop_stale, sweep_expired

SECOND, MINUTE, HOUR, DAY = 1000, 60_000, 3_600_000, 86_400_000
_TIMES = re.compile(r"created_at|last_active|state_since|expires_at|extended_until|sig:.*")


class Sweeping:
    """A worker on host h1 that can run sweeps, and hands to reach into its Redis."""

    def __init__(self, settings: Settings) -> None:
        services.configure(settings)
        self.settings = settings
        self.here = services.current()
        self.registry = self.here.registry
        self.raw: Any = redis.Redis.from_url(settings.registry_url, decode_responses=True)
        self.registry.hosts.heartbeat(settings.host, {})

    def close(self) -> None:
        self.raw.close()
        services.renew()
        services._settings = None

    def key(self, name: str) -> str:
        return f"{self.settings.namespace}:{name}"

    def add(self, ident: str, age: int = 0, *, idle: int | None = None, **fields: Any) -> str:
        """Register a workspace that is `age` ms old and idle for `idle` (default: as old as it is)."""
        given = {"host": self.settings.host, "path": f"/srv/{ident.replace('#', '-')}", **fields}
        self.registry.workspaces.register(ident, **given)
        if age:
            self.age(ident, age)
            if idle is not None:
                self.set(ident, last_active=self.now - idle, last_signal="touch", **{"sig:touch": self.now - idle})
        return ident

    @property
    def now(self) -> int:
        return self.registry.time_ms()

    def age(self, ident: str, ms: int) -> None:
        """What the passing of `ms` does to a workspace: every time in its record lies that much further back."""
        record = self.key(f"ws:{ident}")
        pipe = self.raw.pipeline()
        for name, value in self.raw.hgetall(record).items():
            if _TIMES.fullmatch(name) and value:
                pipe.hincrby(record, name, -ms)
        for index in ("created", "active", "deadline"):
            if self.raw.zscore(self.key(f"ws:by:{index}"), ident) is not None:
                pipe.zincrby(self.key(f"ws:by:{index}"), -ms, ident)
        for kind in ("evict", "stop"):
            if self.raw.zscore(self.key(f"ws:due:{kind}"), ident) is not None:
                pipe.zincrby(self.key(f"ws:due:{kind}"), -ms, ident)
        for holder, _ in self.raw.zrange(self.key(f"presence:{ident}"), 0, -1, withscores=True):
            pipe.zincrby(self.key(f"presence:{ident}"), -ms, holder)
        pipe.execute()

    def set(self, ident: str, **fields: object) -> None:
        """Write fields of the record, and its index when it is one of them."""
        self.raw.hset(self.key(f"ws:{ident}"), mapping={name: str(value) for name, value in fields.items()})
        for field, index in (("created_at", "created"), ("last_active", "active")):
            if field in fields:
                self.raw.zadd(self.key(f"ws:by:{index}"), {ident: int(str(fields[field]))})

    def policy(self, **rules: Any) -> None:
        """Set the fleet's policy, and let the sweeps look at everything again."""
        self.registry.policies.set_fleet(rules)
        while self.registry.policies.heal()["walking"]:
            pass

    def sweep(self) -> dict[str, Any]:
        """maintenance.sweep, as a worker runs it once it has the slot."""
        return sweep_expired(self.here)

    def stale(self) -> dict[str, Any]:
        """maintenance.stop_stale."""
        return stop_stale(self.here)

    def plan(self, *kinds: Any, now: int | None = None, limit: int = 1000) -> Plan:
        return Reclaimer(self.registry, self.settings).plan(kinds or ("evict", "stop"), now=now, limit=limit)

    def facts(self, ident: str) -> Facts:
        found = self.registry.lifecycle.facts([ident])[0]
        assert found is not None
        return found

    def ids(self) -> list[str]:
        """What is registered, oldest first."""
        return [record.id for record in self.registry.workspaces.list(limit=100_000)]

    def state(self, ident: str) -> str:
        return self.registry.workspaces.get(ident).state

    def events(self, kind: str) -> list[Event]:
        """Events of `kind`, oldest first."""
        return self.registry.events.list(limit=100_000, kind=kind)[::-1]

    def evicted(self) -> list[tuple[str, str]]:
        """(id, rule) of every eviction that the events tell of, oldest first."""
        return [(event.fields["workspace"], event.fields["reason"]) for event in self.events("workspace.evicted")]

    def jobs(self, task: str) -> list[Job]:
        return [job for job in self.registry.jobs.list(limit=10_000) if job.task == task][::-1]

    def counters(self, prefix: str) -> dict[str, int]:
        return {name: value for name, value in self.registry.counters.all().items() if name.startswith(prefix)}

    def dump(self) -> dict[str, Any]:
        """Everything the registry holds, to compare with: what writes nothing leaves it as it is."""
        readers: dict[str, Callable[[str], Any]] = {
            "hash": self.raw.hgetall, "zset": lambda key: self.raw.zrange(key, 0, -1, withscores=True), "string": self.raw.get,
            "set": lambda key: sorted(self.raw.smembers(key)), "list": lambda key: self.raw.lrange(key, 0, -1),
            "stream": self.raw.xrange,
        }  # fmt: skip
        return {key: readers[self.raw.type(key)](key) for key in sorted(self.raw.scan_iter(self.key("*")))}

    def at_once(self, act: Callable[[services.Services], Any], times: int) -> list[Any]:
        """`act` in `times` threads at the same moment, each with connections of its own as another worker would have."""
        barrier, results = threading.Barrier(times), list[Any]()

        def run() -> None:
            registry = Registry.connect(self.settings)
            other = services.Services(pid=0, settings=self.settings, registry=registry, ringer=self.here.ringer)
            barrier.wait()
            try:
                results.append(act(other))
            except Exception as error:
                results.append(error)
            finally:
                registry.close()

        threads = [threading.Thread(target=run) for _ in range(times)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return results


def tree(folder: Path) -> Path:
    """A folder with a file."""
    folder.mkdir(parents=True)
    (folder / "file").write_text("text")
    return folder
