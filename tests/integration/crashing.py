"""What the tests of crash reports share: one worker's services, a workspace with files, and short ways to file and to look."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from mothball.client import Fleet
from mothball.errors import MothballError
from mothball.registry import Claim, Crash, Job, Workspace
from mothball.settings import Settings
from mothball.store import Store
from mothball.store.artifact import find_report, load_report
from tasks import MODULES, services
from tasks.job import SPECS
from tests.integration.delivery import deliver

for _module in MODULES:
    import_module(_module)
assert "workspace.crash_report" in SPECS
ID = "o/r#1"


class Crashing:
    """A worker on this host, workspace `ID` with two files, and hands to reach into its store."""

    took_over: Claim
    """For a test in which another run takes over."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        services.configure(settings)
        self.settings = settings
        self.fleet = Fleet(settings=settings)
        self.registry = services.current().registry
        self.registry.hosts.heartbeat(settings.host, {})
        self.store = Store(settings.store_dir, fsync=settings.fsync)
        self.folder = folder
        self.add(ID, folder)

    def close(self) -> None:
        self.fleet.close()
        services.renew()
        services._settings = None

    def add(self, workspace: str, folder: Path, **fields: Any) -> None:
        folder.mkdir(parents=True)
        (folder / "a.txt").write_text("first\n")
        (folder / "src").mkdir()
        (folder / "src" / "b.py").write_text("print(1)\n")
        self.fleet.register(workspace, folder, **fields)

    @property
    def record(self) -> Workspace:
        return self.registry.workspaces.get(ID)

    def submit(self, task: str, **args: Any) -> Job:
        args = args if "host" in args else {"workspace": ID, **args}
        owner = {"workspace": None, "host": args["host"]} if "host" in args else {"workspace": args["workspace"]}
        return self.registry.jobs.submit(task, args, **owner).job

    def deliver(self, job: str) -> dict[str, Any]:
        """The job's message reaches this worker."""
        return deliver(self.registry.jobs.get(job))

    def run(self, task: str, **args: Any) -> dict[str, Any]:
        return self.deliver(self.submit(task, **args).id)

    def file(self, error: str = "boom", *, workspace: str = ID, **fields: Any) -> dict[str, Any]:
        """A crash report as a producer files it, done at once."""
        return self.deliver(self.fleet.crash_report(workspace, error, **fields).id)

    def fails(self, job: str) -> MothballError:
        """The error with which a delivered job ends; a job that is to be retried counts as one that has failed."""
        try:
            self.deliver(job)
        except MothballError as error:
            return error
        except Exception:
            record = self.registry.jobs.get(job)
            return MothballError(f"{record.error_code}: {record.error}")
        raise AssertionError("it did not fail")

    def due(self, job: str) -> None:
        """The time of a job's retry has come."""
        key = f"{self.settings.namespace}:jobs:due"
        client = self.registry._connection.client
        if client.zscore(key, job) is not None:
            client.zadd(key, {job: 1})
            client.hset(f"{self.settings.namespace}:job:{job}", "due_at", "1")
        self.registry.jobs.ring()

    def lose_lease(self, job: str, workspace: str = ID) -> None:
        """What the passing of time does to a lease that nobody renews."""
        client = self.registry._connection.client
        client.delete(f"{self.settings.namespace}:lease:{workspace}")
        client.zadd(f"{self.settings.namespace}:jobs:running", {job: 1})

    def crash(self, name: str) -> Crash:
        return self.registry.crashes.get(name)

    def document(self, name: str) -> dict[str, Any]:
        """report.json as the store has it."""
        record = self.crash(name)
        return json.loads(load_report(self.store, find_report(self.store, record.workspace, record.id).digest))

    def refs(self, workspace: str = ID) -> list[str]:
        return [ref.name for ref in self.store.refs(workspace).list()]

    def packages(self) -> list[str]:
        return sorted(path.name for path in self.settings.crash_dir.iterdir()) if self.settings.crash_dir.exists() else []

    def counter(self, name: str) -> int:
        return self.registry.counters.all().get(name, 0)

    def kinds(self) -> list[str]:
        return [event.kind for event in reversed(self.registry.events.list(limit=1000))]
