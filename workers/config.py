"""Celery's settings, derived from ours and from the tasks' limits, and the command lines of the fleet's processes.

The values follow what was measured on celery 5.7 with Redis; each comment names what goes wrong without it.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from pydantic import SecretStr

from mothball.errors import ConfigError
from mothball.names import QUEUE_CONTROL, slug
from mothball.settings import Settings
from tasks import MODULES
from tasks.job import SPECS
from tasks.spec import Limits
from tasks.sweep import SWEEPS
from workers.queues import declared_queues, queue_names
from workers.schedule import beat_schedule

VISIBILITY_MARGIN_SECONDS: Final = 300
SOFT_SHUTDOWN_MARGIN_SECONDS: Final = 15
RESULT_EXPIRES_SECONDS: Final = 3600
TASKS_PER_CHILD: Final = 200
PURGE_OFFLINE_SECONDS: Final = 600
_LEFT_BEHIND_SECONDS = 86_400
_SOCKET_SECONDS = 30
_CONNECT_SECONDS = 5
_POOL_ACQUIRE_SECONDS = 10


@dataclass(frozen=True)
class Command:
    """A process to start: its arguments and its whole environment (which holds secrets, so never log it)."""

    argv: list[str]
    env: dict[str, str]


def task_limits(settings: Settings) -> dict[str, Limits]:
    """Soft and hard limit of every declared task; raises `ConfigError` for limits that contradict each other."""
    for module in MODULES:
        import_module(module)
    found = {name: spec.limits(settings) for name, spec in SPECS.items()}
    found |= {name: spec.limits(settings) for name, spec in SWEEPS.items()}
    return dict(sorted(found.items()))


def visibility_timeout(settings: Settings) -> int:
    """Seconds after which the broker delivers an unacknowledged message again.

    Longer than any task may run: with a shorter one a second copy of a running task starts. No task is sent with a
    countdown, so only the hard limits count.
    """
    return max(limits.hard for limits in task_limits(settings).values()) + VISIBILITY_MARGIN_SECONDS


def celery_config(settings: Settings, *, role: str = "worker") -> dict[str, Any]:
    """Celery's configuration for a process of `role` (shown by Redis as the client's name)."""
    limits = task_limits(settings)
    visibility = visibility_timeout(settings)
    if settings.job_ttl_seconds <= visibility:
        raise ConfigError(
            f"job_ttl_seconds must be above {visibility} (the longest time limit and {VISIBILITY_MARGIN_SECONDS} s), else a "
            "message delivered again would find no record of its finished job"
        )
    client = f"mothball-{role}"
    return {
        "broker_url": settings.broker_url,
        "result_backend": settings.result_url,
        # -- transport: no endless waits, quick recovery of a dead worker's messages (the default sweep takes 100 s)
        "broker_transport_options": {
            "visibility_timeout": visibility,
            "unacked_restore_interval": 10,
            "unacked_restore_throttle": 1,
            "socket_timeout": _SOCKET_SECONDS,
            "socket_connect_timeout": _CONNECT_SECONDS,
            "socket_keepalive": True,
            "client_name": client,
        },
        # Celery wants the same visibility timeout in three places; the shortest one in a database wins.
        "visibility_timeout": visibility,
        "result_backend_transport_options": {
            "visibility_timeout": visibility,
            "client_name": client,
            # Bounded: by default a result is retried 20 times, then the task counts as failed although its record says succeeded.
            "retry_policy": {"max_retries": 30, "interval_start": 0.2, "interval_step": 0.4, "interval_max": 2.0},
        },
        "redis_socket_timeout": _SOCKET_SECONDS,
        "redis_socket_connect_timeout": _CONNECT_SECONDS,
        "redis_socket_keepalive": True,
        "broker_connection_retry": True,
        "broker_connection_retry_on_startup": True,
        # 100 attempts end after about 50 minutes; an outage may be longer, and the supervisor would only restart us into it.
        "broker_connection_max_retries": None,
        "broker_connection_timeout": _CONNECT_SECONDS,
        "broker_pool_acquire_timeout": _POOL_ACQUIRE_SECONDS,
        # -- messages: JSON only; pickle would let anyone who reaches the broker run code
        "accept_content": ["json"],
        "result_accept_content": ["json"],
        "task_serializer": "json",
        "result_serializer": "json",
        "event_serializer": "json",
        # -- queues: a misspelt name is an error
        "task_queues": declared_queues(settings.host),
        "task_default_queue": QUEUE_CONTROL,
        "task_default_exchange": "",
        "task_default_routing_key": QUEUE_CONTROL,
        "task_create_missing_queues": False,
        # -- delivery: late acks; after a lost process Celery re-sends (a cap), and only if that fails rejects (no cap)
        "task_acks_late": True,
        "task_reject_on_worker_lost": True,
        "task_retry_on_worker_lost": True,
        "worker_prefetch_multiplier": 1,
        # kombu's Redis tags survive a reconnect, so the late ack works: cancelling would only repeat the work.
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "worker_soft_shutdown_timeout": float(settings.soft_shutdown_seconds),
        # Time to collect the result of a process that ended; longer only delays the recovery of its job.
        "worker_lost_wait": 3.0,
        "task_annotations": {name: {"time_limit": limit.hard, "soft_time_limit": limit.soft} for name, limit in limits.items()},
        # -- outcomes: the registry keeps them, the result backend only mirrors them for plain producers
        "task_track_started": True,
        "task_store_errors_even_if_ignored": True,
        "result_expires": RESULT_EXPIRES_SECONDS,
        # -- processes
        "worker_concurrency": settings.worker_concurrency,
        "worker_max_tasks_per_child": TASKS_PER_CHILD,
        "worker_hijack_root_logger": False,
        "worker_redirect_stdouts": False,
        "worker_consumer": "workers.steps:RecordingConsumer",
        # -- monitoring
        "worker_send_task_events": True,
        "task_send_sent_event": True,
        # -- beat: nothing to remember (sweeps run at start and claim slots), so no schedule file that could be torn
        "beat_scheduler": "celery.beat:Scheduler",
        "beat_schedule": beat_schedule(settings),
        "beat_enable_remote_control": True,
        "timezone": "UTC",
        "enable_utc": True,
        "include": list(MODULES),
    }


def settings_env(settings: Settings) -> dict[str, str]:
    """`settings` as ``MOTHBALL_*`` variables for a child process; holds secrets."""
    env: dict[str, str] = {}
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, SecretStr):
            text = value.get_secret_value()
        elif isinstance(value, bool):
            text = "true" if value else "false"
        elif isinstance(value, tuple):
            # Registries have ports: folders alone are separated by ':'.
            text = (":" if name == "workspace_roots" else ",").join(str(part) for part in value)
        else:
            text = str(value)
        env[f"MOTHBALL_{name.upper()}"] = text
    return env


def child_env(settings: Settings, **more: str) -> dict[str, str]:
    """This process's environment with exactly `settings` in it, and `more`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("MOTHBALL_", "FLOWER_"))}
    return {**kept, **settings_env(settings), **temp_env(settings), **more}


def temp_env(settings: Settings) -> dict[str, str]:
    """TMPDIR in the data folder: a killed pool leaves its lock folders behind, and there `clean_temp` finds them again."""
    return {"TMPDIR": str(settings.data_dir / "tmp")}


def clean_temp(settings: Settings) -> None:
    """Make the temporary folder of this host's processes and remove what killed ones left there a day ago or earlier."""
    folder = settings.data_dir / "tmp"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in folder.iterdir():
        with suppress(OSError):
            if path.name.startswith("pymp-") and time.time() - path.lstat().st_mtime > _LEFT_BEHIND_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def worker_command(settings: Settings, *, name: str | None = None) -> Command:
    """The worker of this host; `name` (default: the host) tells several workers of one host apart.

    SIGTERM starts the soft shutdown: running jobs get ``soft_shutdown_seconds``, then they go back into their queue.
    Celery's own warm shutdown would wait for them without limit and be killed by the supervisor instead.
    """
    argv = _celery(
        "worker", "--without-gossip", "--without-mingle", "-n", f"{name or settings.host}@%h",
        "-Q", ",".join(queue_names(settings.host)), "-c", str(settings.worker_concurrency), "-l", settings.log_level,
    )  # fmt: skip
    return Command(argv, child_env(settings, REMAP_SIGTERM="SIGQUIT"))


def beat_command(settings: Settings) -> Command:
    """The scheduler. It keeps no file, so any number may run, anywhere, also on a read-only disk."""
    return Command(_celery("beat", "--pidfile", "", "-l", settings.log_level), child_env(settings))


def flower_command(settings: Settings, *, port: int | None = None) -> Command:
    """Flower, read-only. The password goes through the environment: arguments are visible to every user of the machine."""
    argv = _celery(
        "flower", f"--address={settings.flower_address}", f"--port={settings.flower_port if port is None else port}",
        "--read_only", f"--purge_offline_workers={PURGE_OFFLINE_SECONDS}",
    )  # fmt: skip
    more = {}
    if auth := settings.flower_basic_auth.get_secret_value():
        more["FLOWER_BASIC_AUTH"] = auth
    return Command(argv, child_env(settings, **more))


def heartbeat_file(settings: Settings, name: str | None = None) -> Path:
    """The file whose age is the health of the worker `name` (default: the host's)."""
    return settings.run_dir / f"worker-{slug(name or settings.host)}.heartbeat"


def _celery(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "celery", "-A", "workers.app", *arguments]
