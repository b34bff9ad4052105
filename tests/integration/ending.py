"""One worker's services and a registered workspace, to run the jobs that end workspaces without worker processes."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from mothball.client import Fleet
from mothball.policy import Facts
from mothball.registry import Event, Job, Workspace
from mothball.runtime import handle_of_pid
from mothball.settings import Settings
from mothball.store import Store
from tasks import purge, runtime, services, stop
from tests.integration.delivery import deliver
from tests.support import eventually

ID = "o/r#1"
assert {stop.__name__, purge.__name__, runtime.__name__}  # they declare the tasks


class Host:
    """One host with workspace ``o/r#1``, whose directory has two files."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        services.configure(settings)
        self.settings = settings
        self.fleet = Fleet(settings=settings)
        self.registry = services.current().registry
        self.registry.hosts.heartbeat(settings.host, {})
        self.store = Store(settings.store_dir)
        self.folder = folder
        folder.mkdir()
        (folder / "a.txt").write_text("first\n")
        (folder / "b.txt").write_text("other\n")
        self.processes: list[subprocess.Popen[bytes]] = []

    def close(self) -> None:
        for process in self.processes:
            with suppress(ProcessLookupError):
                process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        self.fleet.close()
        services.renew()
        services._settings = None

    def register(self, **fields: Any) -> Workspace:
        return self.fleet.register(ID, self.folder, **fields)

    def start(self, code: str, *, runtime: bool = True, cwd: Path | None = None, **fields: Any) -> subprocess.Popen[bytes]:
        """A process that runs `code` once it has said that it is ready, registered as the workspace's runtime."""
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=cwd or self.folder,
            start_new_session=True,
        )
        self.processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        if runtime:
            self.register(runtime=handle_of_pid(process.pid), **fields)
        return process

    @property
    def record(self) -> Workspace:
        return self.registry.workspaces.get(ID)

    @property
    def facts(self) -> Facts:
        found = self.registry.lifecycle.facts([ID])[0]
        assert found is not None
        return found

    def submit(self, task: str, **args: Any) -> Job:
        return self.registry.jobs.submit(task, {"workspace": ID, **args}, workspace=ID).job

    def deliver(self, job: Job) -> dict[str, Any]:
        """The job's message reaches this worker."""
        return deliver(job)

    def run(self, task: str, **args: Any) -> dict[str, Any]:
        return self.deliver(self.submit(task, **args))

    def again(self, job: Job) -> dict[str, Any]:
        """The worker of `job` was killed: another one gets it."""
        self.registry.jobs.release_lost(job.id, self.registry.jobs.get(job.id).fence)
        return self.deliver(job)

    def idle(self, seconds: float = 3600) -> None:
        """Move the workspace's last sign of life, and all files' changes, so far into the past as far as that can be done."""
        at = self.registry.time_ms() - int(seconds * 1000)
        self.raw.hset(self.key(f"ws:{ID}"), mapping={"last_active": at, "created_at": at, "sig:register": at})
        self.raw.zadd(self.key("ws:by:active"), {ID: at})

    @property
    def raw(self) -> Any:
        return _client(self.registry)

    def key(self, name: str) -> str:
        return f"{self.settings.namespace}:{name}"

    def events(self, kind: str) -> list[Event]:
        return self.registry.events.list(kind=kind)

    def counters(self) -> dict[str, int]:
        return self.registry.counters.all()


def _client(registry: Any) -> Any:
    with registry.workspaces._connection.guard() as client:
        return client


def ended(process: subprocess.Popen[bytes]) -> int:
    """The exit code of a process that was ended."""
    eventually(lambda: process.poll() is not None, what="the end of the process")
    return int(process.returncode)
