"""Celery's settings follow from ours and from the tasks' limits; names, queues and schedules resolve (N-43)."""

from __future__ import annotations

import ast
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import structlog
from kombu import Queue

import tasks
from mothball.settings import Settings
from tasks.sweep import SWEEPS
from workers import logs
from workers.app import make_app
from workers.config import (
    beat_command,
    celery_config,
    flower_command,
    heartbeat_file,
    settings_env,
    task_limits,
    visibility_timeout,
    worker_command,
)
from workers.health import main as health
from workers.queues import queue_names

ROOT = Path(__file__).resolve().parents[2]


def documented() -> set[str]:
    """The tasks of docs/tasks.md."""
    table = (ROOT / "docs" / "tasks.md").read_text().split("## Tasks")[1].split("###")[0]
    return set(re.findall(r"^\| `([a-z_.]+)` \|", table, re.MULTILINE))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings of a host called h1."""
    return Settings.load(host="h1", data_dir=tmp_path / "data", redis_url="redis://:hush@127.0.0.1:1")


def test_n43_the_documented_tasks_are_exactly_the_registered_ones(settings: Settings) -> None:
    """A task that is not documented, or documented and missing, is a mistake."""
    app = make_app(settings)
    app.loader.import_default_modules()
    app.finalize()
    probes = {name for name in app.tasks if name.startswith(("probe.", "unit."))}  # of other tests in this process
    assert {name for name in app.tasks if not name.startswith("celery.")} - probes == documented()
    assert {"workspace.capture", "workspace.snapshot", "maintenance.ring", "maintenance.check_hosts"} <= documented()


def test_n43_every_beat_entry_resolves_and_expires_before_its_next_run(settings: Settings) -> None:
    """A backlog of sweeps drops itself; a name nobody registered would be sent for ever."""
    app = make_app(settings)
    app.finalize()
    schedule = app.conf.beat_schedule
    assert {entry["task"] for entry in schedule.values()} == set(SWEEPS) >= {"maintenance.ring", "maintenance.check_hosts"}
    for name, entry in schedule.items():
        assert entry["task"] in app.tasks, name
        assert 0 < entry["options"]["expires"] < entry["schedule"], name
        assert entry["options"]["queue"] in queue_names("h1"), name


@pytest.mark.parametrize("ring", [1, 10, 300])
def test_the_ring_entry_follows_its_setting(ring: int) -> None:
    """Also at one second, the message expires before the next."""
    entry = celery_config(Settings.load(ring_seconds=ring))["beat_schedule"]["maintenance.ring"]
    assert entry["schedule"] == ring
    assert entry["options"]["expires"] < ring


@pytest.mark.parametrize("limit", [10, 3600, 40_000])
def test_the_visibility_timeout_follows_from_the_tasks_limits(limit: int) -> None:
    """Longer than any task may run: else a second copy of a running task starts. The same value in all three places."""
    settings = Settings.load(capture_time_limit=limit)
    limits = task_limits(settings)
    longest = max(each.hard for each in limits.values())
    assert limits["workspace.capture"].hard == limit <= longest
    assert visibility_timeout(settings) == longest + 300
    config = celery_config(settings)
    assert config["visibility_timeout"] == longest + 300
    assert config["broker_transport_options"]["visibility_timeout"] == longest + 300
    assert config["result_backend_transport_options"]["visibility_timeout"] == longest + 300


def test_every_task_has_both_limits_in_the_app(settings: Settings) -> None:
    """The annotations really reach the task objects, so the pool enforces them."""
    app = make_app(Settings.load(capture_time_limit=500))
    app.finalize()
    for name in documented():
        task = app.tasks[name]
        assert 0 < task.soft_time_limit < task.time_limit, name
    assert (app.tasks["workspace.capture"].soft_time_limit, app.tasks["workspace.capture"].time_limit) == (440, 500)
    make_app(settings)


def test_delivery_settings(settings: Settings) -> None:
    """Each of these was measured; changing one needs a reason."""
    config = celery_config(settings)
    expected = {
        "task_acks_late": True,
        "task_reject_on_worker_lost": True,
        "task_retry_on_worker_lost": True,
        "worker_prefetch_multiplier": 1,
        "accept_content": ["json"],
        "task_serializer": "json",
        "result_serializer": "json",
        "task_create_missing_queues": False,
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "broker_connection_retry_on_startup": True,
        "broker_pool_acquire_timeout": 10,
        "worker_send_task_events": True,
        "task_send_sent_event": True,
        "worker_soft_shutdown_timeout": 30.0,
        "task_store_errors_even_if_ignored": True,
        "beat_enable_remote_control": True,
    }
    assert {name: config[name] for name in expected} == expected
    assert "task_acks_on_failure_or_timeout" not in config
    transport = config["broker_transport_options"]
    assert (transport["unacked_restore_interval"], transport["unacked_restore_throttle"]) == (10, 1)
    assert transport["socket_timeout"] > 1, "above BRPOP's second"
    assert transport["socket_connect_timeout"] == 5
    assert transport["client_name"] == "mothball-worker"
    assert config["result_expires"] <= 3600


def test_jobs_are_retried_by_celery_without_a_countdown_and_with_a_cap(settings: Settings) -> None:
    """A countdown is held in one worker's memory; no cap re-runs a lethal task 24 times in 4 s."""
    app = make_app(settings)
    app.finalize()
    task: Any = app.tasks["workspace.capture"]
    assert task.default_retry_delay == 0
    assert 0 < task.max_retries <= 10
    assert task.acks_late and task.reject_on_worker_lost and task.retry_on_worker_lost
    assert task.ignore_result is False, "AsyncResult of a plain producer delivers the outcome"
    sweep: Any = app.tasks["maintenance.ring"]
    assert sweep.ignore_result and not sweep.acks_late


def test_a_worker_consumes_its_host_control_and_dispatch(settings: Settings) -> None:
    """Nothing else is declared, and nothing is created on the fly."""
    assert queue_names("h1") == ("host.h1", "control", "dispatch")
    queues: tuple[Queue, ...] = celery_config(settings)["task_queues"]
    assert [(queue.name, queue.exchange.name, queue.routing_key) for queue in queues] == [
        ("host.h1", "", "host.h1"), ("control", "", "control"), ("dispatch", "", "dispatch"),
    ]  # fmt: skip


def test_the_worker_command(settings: Settings) -> None:
    """Without gossip and mingle, on its queues, SIGTERM as soft shutdown."""
    command = worker_command(settings)
    line = " ".join(command.argv[1:])
    assert line.startswith("-m celery -A workers.app worker --without-gossip --without-mingle -n h1@%h ")
    assert "-Q host.h1,control,dispatch" in line
    assert command.env["REMAP_SIGTERM"] == "SIGQUIT"
    assert " -n second@%h " in " ".join(worker_command(settings, name="second").argv)


def test_the_beat_and_flower_commands(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beat keeps no file; Flower is read-only, and its password is not an argument."""
    monkeypatch.setenv("FLOWER_READ_ONLY", "false")
    assert " ".join(beat_command(settings).argv[1:]).startswith("-m celery -A workers.app beat --pidfile ")
    assert celery_config(settings)["beat_scheduler"] == "celery.beat:Scheduler"
    guarded = Settings.load(flower_address="0.0.0.0", flower_basic_auth="ops:hush-hush", host="h1")
    flower = flower_command(guarded, port=0)
    line = " ".join(flower.argv)
    assert "--address=0.0.0.0 --port=0 --read_only --purge_offline_workers=600" in line
    assert "hush" not in line
    assert flower.env["FLOWER_BASIC_AUTH"] == "ops:hush-hush"
    assert "FLOWER_READ_ONLY" not in flower.env
    assert "FLOWER_BASIC_AUTH" not in flower_command(settings).env


def test_no_command_line_shows_a_secret(settings: Settings) -> None:
    """Arguments are visible to every user of the machine."""
    for command in (worker_command(settings), beat_command(settings), flower_command(settings)):
        assert "hush" not in " ".join(command.argv)
        assert command.env["MOTHBALL_REDIS_URL"] == "redis://:hush@127.0.0.1:1"


def test_settings_survive_the_way_through_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a child loads is what the parent has, field for field."""
    original = Settings.load(
        host="h2", data_dir=tmp_path / "d d", workspace_roots=(tmp_path / "a", tmp_path / "b"), redis_url="redis://:p%40ss@127.0.0.1:2",
        fsync=False, use_gitignore=True, lease_seconds=7, flower_basic_auth="a:b", redis_timeout=2.5,
        insecure_registries=("r:5000", "s:5000"),
    )  # fmt: skip
    environment = settings_env(original)
    assert set(environment) == {f"MOTHBALL_{name.upper()}" for name in Settings.model_fields}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Settings.load() == original


def test_child_environments_do_not_inherit_other_settings(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stray variable of the parent's shell must not reach a child that was given its settings."""
    monkeypatch.setenv("MOTHBALL_TEST_STRAY", "1")
    monkeypatch.setenv("UNRELATED", "kept")
    env = worker_command(settings).env
    assert "MOTHBALL_TEST_STRAY" not in env
    assert env["UNRELATED"] == "kept"


def test_health_reads_the_age_of_the_heartbeat_file(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """None: not alive. Young: ready. A minute old: alive and not ready. Eleven minutes: not alive."""
    monkeypatch.setenv("MOTHBALL_HOST", "h1")
    monkeypatch.setenv("MOTHBALL_DATA_DIR", str(settings.data_dir))
    assert health([]) == 1
    assert "no heartbeat" in capsys.readouterr().err
    file = heartbeat_file(settings)
    file.parent.mkdir(parents=True)
    file.touch()
    now = file.stat().st_mtime
    assert (health([]), health(["--ready"])) == (0, 0)
    os.utime(file, (now - 60, now - 60))
    assert (health([]), health(["--ready"]), health(["--max-age", "30"])) == (0, 1, 1)
    os.utime(file, (now - 660, now - 660))
    assert health([]) == 1
    assert health(["--name", "other"]) == 1
    monkeypatch.setenv("MOTHBALL_LEASE_SECONDS", "never")
    assert health([]) == 78


@pytest.mark.parametrize("form", ["json", "console"])
def test_log_lines_hide_credentials_wherever_they_stand(form: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """In the text, in a field, in a nested field, in an exception, in somebody else's line."""
    import logging

    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        logs.setup(Settings.load(log_format=form))
        url = "redis://user:hunter2@10.0.0.1:6379/0"
        log = structlog.stdlib.get_logger("x")
        log.info(f"to {url}", url=url, deep={"list": [url]})
        logging.getLogger("kombu").warning("lost %s", url)
        try:
            raise ValueError(url)
        except ValueError:
            log.exception("boom")
        printed = capsys.readouterr().err
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        structlog.reset_defaults()
    assert "hunter2" not in printed
    assert printed.count("redis://user:[redacted:url]@10.0.0.1:6379/0") >= 5
    if form == "json":
        assert all(json.loads(line)["level"] for line in printed.splitlines())


def _imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_only_workers_app_imports_celery_celery() -> None:
    """One module makes the application; mothball knows no Celery at all, and no arrow points up."""
    for package, forbidden in (("mothball", ("celery", "tasks", "workers")), ("tasks", ("workers",))):
        for path in (ROOT / package).rglob("*.py"):
            bad = {name for name in _imports(path) if name.split(".")[0] in forbidden}
            assert not bad, f"{path} imports {bad}"
    makers = [
        str(path.relative_to(ROOT))
        for package in ("mothball", "tasks", "workers")
        for path in (ROOT / package).rglob("*.py")
        if "celery.Celery" in _imports(path)
    ]
    assert makers == ["workers/app.py"]


def test_every_task_module_is_listed() -> None:
    """A module that declares tasks and is not in tasks.MODULES would be loaded by no worker."""
    declaring = {
        f"tasks.{path.stem}"
        for path in (ROOT / "tasks").glob("*.py")
        if any(name in {"tasks.job.job_task", "tasks.sweep.sweep_task"} for name in _imports(path))
    }
    assert declaring == {name for name in tasks.MODULES if name.startswith("tasks.")}
