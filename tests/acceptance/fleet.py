"""Real worker and beat processes for tests: started with settings of their own, logging to files, dead at teardown."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import psutil
import pytest
from celery import Celery

from mothball.doorbell import DoorbellRinger
from mothball.registry import Doorbell, Job, Registry
from mothball.settings import Settings
from workers.config import Command, beat_command, clean_temp, worker_command

T = TypeVar("T")
FINAL = {"succeeded", "failed", "cancelled", "dead"}
ROOT = Path(__file__).resolve().parents[2]
_TAIL_LINES = 60


class Process:
    """One process of the fleet and its log."""

    def __init__(self, name: str, command: Command, log: Path, *, slow: bool) -> None:
        argv = ["tests.acceptance.slow_app" if slow and word == "workers.app" else word for word in command.argv]
        self.name = name
        self.log = log
        with log.open("ab") as out:
            self.popen = subprocess.Popen(
                argv, env=command.env, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )

    @property
    def alive(self) -> bool:
        """True while the main process runs."""
        return self.popen.poll() is None

    def children(self) -> list[psutil.Process]:
        """The pool processes."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.popen.pid).children()
        return []

    def text(self) -> str:
        """The whole log."""
        return self.log.read_text(errors="replace")

    def tail(self) -> str:
        """The end of the log, for a failure message."""
        return f"--- {self.name} (pid {self.popen.pid}, alive: {self.alive}) ---\n" + "\n".join(
            self.text().splitlines()[-_TAIL_LINES:]
        )

    def signal(self, number: int) -> None:
        """Signal the main process only."""
        self.popen.send_signal(number)

    def signal_all(self, number: int) -> None:
        """Signal the main process and its pool: what a container's end, or a machine's pause, does."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, number)

    def kill(self) -> None:
        """SIGKILL everything at once and wait."""
        self.signal_all(signal.SIGKILL)
        self.popen.wait(10)

    def wait(self, seconds: float) -> int:
        """The exit code; fails with the log when the process does not end in time."""
        try:
            return self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{self.name} did not end within {seconds} s\n{self.tail()}")


class FleetRun:
    """The processes of one test. A context manager: everything is killed at the end, also after a failure."""

    def __init__(self, settings: Settings, folder: Path, *, slow: bool = True) -> None:
        """`settings` are those of every process unless overridden; `slow` adds the task ``probe.slow``."""
        self.settings = settings
        self.folder = folder
        self.slow = slow
        self.processes: list[Process] = []
        self.registry = Registry.connect(settings)
        self.ringer = DoorbellRinger(settings)
        folder.mkdir(parents=True, exist_ok=True)
        clean_temp(settings)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process in self.processes:
            process.signal_all(signal.SIGCONT)
            process.signal_all(signal.SIGKILL)
        for process in self.processes:
            process.popen.wait(10)
        self.ringer.close()
        self.registry.close()

    def with_settings(self, **overrides: Any) -> Settings:
        """The fleet's settings with `overrides`."""
        return Settings.load(**{**{name: getattr(self.settings, name) for name in type(self.settings).model_fields}, **overrides})

    def worker(self, name: str = "w1", *, ready: bool = True, **overrides: Any) -> Process:
        """Start a worker called `name` and wait until it consumes."""
        process = self._start(name, worker_command(self.with_settings(**overrides), name=name))
        if ready:
            self.until(lambda: " ready." in process.text(), f"worker {name} is ready", seconds=30)
        return process

    def beat(self, name: str = "beat", **overrides: Any) -> Process:
        """Start a scheduler."""
        return self._start(name, beat_command(self.with_settings(**overrides)))

    def _start(self, name: str, command: Command) -> Process:
        process = Process(name, command, self.folder / f"{name}.log", slow=self.slow)
        self.processes.append(process)
        return process

    def until(self, probe: Callable[[], T], what: str, *, seconds: float = 20.0, every: float = 0.05) -> T:
        """The first truthy answer of `probe`; fails with the end of every log. Errors of `probe` count as "not yet"."""
        deadline = time.monotonic() + seconds
        answer: Any = None
        while time.monotonic() < deadline:
            try:
                answer = probe()
            except Exception as error:
                answer = error
            else:
                if answer:
                    return answer  # type: ignore[no-any-return] - it is the truthy T that probe returned
            time.sleep(every)
        logs = "\n".join(process.tail() for process in self.processes)
        pytest.fail(f"{what}: not within {seconds:g} s; last answer {answer!r}\n{logs}", pytrace=True)

    def workspace(self, name: str, *, host: str | None = None, path: Path | None = None) -> str:
        """Register a workspace with a folder of its own below this run's folder; returns its id."""
        place = path or self.folder / "trees" / name
        place.mkdir(parents=True, exist_ok=True)
        self.registry.workspaces.register(name, host=host or self.settings.host, path=str(place))
        return name

    def submit(self, task: str, *, ring: bool = True, **args: Any) -> str:
        """Submit a job as a producer does, of the host when `args` name one; with ``ring=False`` its message is lost on the way."""
        host = args.get("host")
        submitted = self.registry.jobs.submit(task, args, workspace=None if host else args.get("workspace"), host=host)
        job = submitted.job
        if ring:
            self.ringer.ring(Doorbell(job=job.id, task=job.task, queue=job.queue))
        return job.id

    def job(self, job_id: str) -> Job:
        """The record."""
        return self.registry.jobs.get(job_id)

    def finished(self, job_id: str, *, seconds: float = 30.0) -> Job:
        """The record once the job has ended."""
        self.until(lambda: self.job(job_id).state in FINAL, f"job {job_id} ends", seconds=seconds)
        return self.job(job_id)

    def running(self, job_id: str, *, seconds: float = 20.0) -> Job:
        """The record once a worker runs the job and has reported a first step."""
        self.until(lambda: self.job(job_id).state == "running" and self.job(job_id).progress, f"job {job_id} runs", seconds=seconds)
        return self.job(job_id)

    def producer(self) -> Celery:
        """A plain Celery application of another code base: it knows two URLs and a task name."""
        app = Celery("elsewhere", broker=self.settings.broker_url, backend=self.settings.result_url, set_as_current=False)
        app.conf.broker_transport_options = {"socket_timeout": 5, "socket_connect_timeout": 5}
        return app

    def leases(self) -> list[str]:
        """Leases that exist now."""
        import redis

        client = redis.Redis.from_url(self.settings.registry_url)
        try:
            return sorted(key.decode() for key in client.scan_iter(f"{self.settings.namespace}:lease:*"))
        finally:
            client.close()
