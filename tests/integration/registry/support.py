"""What the registry's tests share: short ways to a workspace, a job and a running job, and to moments in time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from typing import Any

from redis import Redis

from mothball.registry import Claim, Job, Registry, Workspace, scripts
from mothball.settings import Settings

HOST = "h1"
TASK = "workspace.capture"
LEASE = 30_000
LUA = resources.files("mothball.registry") / "lua"
INCLUDED = ["budget", "burial", "captured", "census", "common", "crash", "job", "signs", "state"]
SCRIPTS = sorted(name for each in LUA.iterdir() if (name := each.name.removesuffix(".lua")) not in INCLUDED)
TIME_CALL = "redis.call('TIME')"


class Bench:
    """A registry with host `h1` announced, and hands to reach into its Redis."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.registry = Registry.connect(settings)
        self.raw: Any = Redis.from_url(settings.registry_url, decode_responses=True, encoding_errors="surrogateescape")
        self._others: list[Registry] = []
        self.registry.hosts.heartbeat(HOST, {})

    def key(self, name: str) -> str:
        return f"{self.settings.namespace}:{name}"

    def close(self) -> None:
        for each in (self.registry, *self._others):
            each.close()
        self.raw.close()

    def another(self) -> Registry:
        """A second process's handle."""
        made = Registry.connect(self.settings)
        self._others.append(made)
        return made

    @contextmanager
    def at(self, now_ms: int) -> Iterator[Registry]:
        """A registry whose scripts run at exactly `now_ms`: the product's own Lua with TIME replaced by a constant."""
        fixed = f"{{'{now_ms // 1000}', '{now_ms % 1000 * 1000}'}}"
        registry = self.another()
        inner = registry.slots._scripts
        for name in SCRIPTS:
            text = scripts.source(name)
            assert text.count(TIME_CALL) == 1
            inner._loaded[name] = self.raw.register_script(text.replace(TIME_CALL, fixed))
        yield registry

    def workspace(self, ident: str = "o/r#1", **fields: Any) -> Workspace:
        record, _ = self.registry.workspaces.register(ident, **{"host": HOST, "path": f"/ws/{ident}", **fields})
        return record

    def submit(self, workspace: str | None = "o/r#1", args: dict[str, Any] | None = None, **fields: Any) -> Job:
        return self.registry.jobs.submit(TASK, args or {}, workspace=workspace, **fields).job

    def claim(self, job: str, *, host: str = HOST, lease_ms: int = LEASE, registry: Registry | None = None, pid: int = 1) -> Claim:
        return (registry or self.registry).jobs.claim(job, host=host, worker=f"{host}/{pid}", lease_ms=lease_ms)

    def run(self, workspace: str | None = "o/r#1", **fields: Any) -> Claim:
        """A job of `workspace`, running."""
        claim = self.claim(self.submit(workspace, **fields).id)
        assert claim.status == "run"
        return claim

    def lose_lease(self, job: str, workspace: str | None = "o/r#1") -> None:
        """What the passing of time does to a lease that nobody renews."""
        self.raw.delete(self.key(f"lease:{workspace or '~' + job}"))
        if self.raw.zscore(self.key("jobs:running"), job) is not None:
            self.raw.zadd(self.key("jobs:running"), {job: 1})

    def state(self, job: str) -> str:
        return self.registry.jobs.get(job).state

    def kinds(self) -> list[str]:
        """Kinds of all events, oldest first."""
        return [event.kind for event in reversed(self.registry.events.list(limit=1000))]

    def counter(self, name: str) -> int:
        return self.registry.counters.all().get(name, 0)
