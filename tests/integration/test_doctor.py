"""`mothball doctor` on a real host: healthy, and each way of not being so."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import redis

from mothball import __version__
from mothball.capture import CaptureRequest, capture_workspace
from mothball.cli.app import run
from mothball.doctor import checks
from mothball.doctor.checks import Check, diagnose
from mothball.registry import Registry
from mothball.settings import Settings
from mothball.store import Store
from mothball.store.manifest import load_manifest
from mothball.store.reserve import Reserve
from workers.main import build
from workers.redis_server import RedisServer

NAME = "o/r#1"


class Printed(NamedTuple):
    """What one command printed."""

    code: int
    out: str
    err: str


class Clinic:
    """A host whose worker says that it lives, with one captured workspace."""

    def __init__(self, settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.settings = settings
        self.store = Store(settings.store_dir, fsync=False)
        self.registry = Registry.connect(settings)
        self.raw: Any = redis.Redis.from_url(settings.registry_url, decode_responses=True)
        self._monkeypatch, self._capsys = monkeypatch, capsys
        monkeypatch.setenv("MOTHBALL_REDIS_URL", settings.redis_url.get_secret_value())
        for name in ("namespace", "host", "data_dir"):
            monkeypatch.setenv(f"MOTHBALL_{name.upper()}", str(getattr(settings, name)))
        monkeypatch.setenv("MOTHBALL_WORKSPACE_ROOTS", ":".join(map(str, settings.workspace_roots)))
        self.registry.hosts.heartbeat(settings.host, {"version": __version__, "data_dir": str(settings.data_dir)})
        self.folder = settings.workspace_roots[0] / "trees" / "one"
        self.folder.mkdir(parents=True)
        (self.folder / "a").write_text("a")
        self.registry.workspaces.register(NAME, host=settings.host, path=str(self.folder))
        request = CaptureRequest(workspace=NAME, path=str(self.folder), host=settings.host, job="j", fence=1)
        capture_workspace(request, settings)
        Reserve(self.store, settings.reserve_bytes).make()

    def look(self, **settings: Any) -> dict[str, Check]:
        changed = Settings(**{**self.settings.model_dump(), **settings})
        return {check.name: check for check in diagnose(changed)}

    def command(self, *argv: str) -> Printed:
        code = run(build(), argv)
        printed = self._capsys.readouterr()
        return Printed(code, printed.out, printed.err)


@pytest.fixture
def clinic(
    private_redis: RedisServer, make_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Clinic]:  # fmt: skip
    found = Clinic(make_settings(fsync=False, reserve_bytes=1024**2), monkeypatch, capsys)
    yield found
    found.registry.close()
    found.raw.close()


def test_a_healthy_host_is_healthy_and_nothing_is_left_behind(clinic: Clinic) -> None:
    before = sorted(path for path in clinic.settings.data_dir.rglob("*"))
    found = clinic.look()
    assert [check.name for check in found.values()] == [
        "settings", "redis", "clock", "worker", "roots", "store", "space", "reserve", "captures", "records"
    ]  # fmt: skip
    assert {check.name: check.state for check in found.values() if check.state != "ok"} == {}
    assert sorted(path for path in clinic.settings.data_dir.rglob("*")) == before


def test_the_command_says_so_in_both_forms(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTHBALL_RESERVE_BYTES", str(1024**2))
    shown = clinic.command("doctor")
    assert (shown.code, shown.err) == (0, "")
    assert shown.out.splitlines()[-1] == "healthy"
    report = json.loads(clinic.command("doctor", "--json").out)
    assert report["healthy"] is True
    assert {check["state"] for check in report["checks"]} == {"ok"}
    clinic.raw.flushall()
    shown = clinic.command("doctor")
    assert shown.code == 1
    assert "problem  records   1 captured workspaces have no record" in shown.out
    assert NAME in shown.out
    assert "--rebuild-registry" in shown.out
    assert "needs attention: records" in shown.err
    shown = clinic.command("doctor", "--json")
    assert (shown.code, json.loads(shown.out)["healthy"], json.loads(shown.err)["error"]["code"]) == (1, False, "operation_failed")


def test_the_command_rebuilds_and_says_what(clinic: Clinic) -> None:
    clinic.raw.flushall()
    shown = clinic.command("doctor", "--rebuild-registry", "--dry-run")
    assert (shown.code, clinic.registry.workspaces.count()) == (0, 0)
    assert f"{NAME} would be made again: generation 1, 0 snapshots, {clinic.folder}" in shown.out
    assert "not known: " in shown.out
    report = json.loads(clinic.command("doctor", "--rebuild-registry", "--json").out)
    assert (report["dry_run"], [each["status"] for each in report["workspaces"]]) == (False, ["rebuilt"])
    assert clinic.registry.workspaces.get(NAME).generation == 1
    shown = clinic.command("doctor", "--rebuild-registry")
    assert (shown.code, shown.out) == (0, "1 has a record\n")
    for command in (("show", NAME), ("ls",)):
        assert "rebuilt" in clinic.command(*command).out
    (clinic.store.refs(NAME).folder / "index.json").write_text("{")
    clinic.raw.flushall()
    shown = clinic.command("doctor", "--rebuild-registry")
    assert shown.code == 1
    assert "cannot be rebuilt" in shown.out
    assert "1 workspaces cannot be rebuilt" in shown.err


def test_a_dry_run_of_the_checks_is_a_mistake_and_wrong_settings_are_the_finding(
    clinic: Clinic, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert clinic.command("doctor", "--dry-run").code == 2
    monkeypatch.setenv("MOTHBALL_LEASE_SECONDS", "soon")
    shown = clinic.command("doctor", "--json")
    assert shown.code == 1
    checked = json.loads(shown.out)["checks"]
    assert [(check["name"], check["state"]) for check in checked] == [("settings", "problem")]
    assert "MOTHBALL_LEASE_SECONDS" in checked[0]["message"]


def test_without_redis_the_disk_is_looked_at_all_the_same(clinic: Clinic) -> None:
    found = clinic.look(redis_url="redis://127.0.0.1:1", redis_timeout=0.5)
    states = {name: check.state for name, check in found.items()}
    assert (states["redis"], states["clock"], states["worker"], states["records"]) == ("problem", "skipped", "skipped", "skipped")
    assert (states["store"], states["captures"], states["space"]) == ("ok", "ok", "ok")


def test_a_redis_that_forgets_is_a_warning(clinic: Clinic) -> None:
    clinic.raw.config_set("maxmemory-policy", "allkeys-lru")
    clinic.raw.config_set("appendonly", "no")
    check = clinic.look()["redis"]
    assert (check.state, len(check.details)) == ("warning", 2)


@pytest.mark.parametrize(("ahead", "state"), [(-3600.0, "problem"), (3600.0, "problem"), (-10.0, "warning"), (1.0, "ok")])
def test_a_clock_that_differs_from_redis(clinic: Clinic, monkeypatch: pytest.MonkeyPatch, ahead: float, state: str) -> None:
    monkeypatch.setattr(checks, "time", SimpleNamespace(time=lambda: time.time() + ahead))
    check = clinic.look()["clock"]
    assert check.state == state
    if state != "ok":
        assert ("ahead of" if ahead > 0 else "behind") in check.message


def test_a_worker_that_is_silent_or_keeps_its_data_elsewhere(clinic: Clinic) -> None:
    beat = clinic.registry.hosts.heartbeat
    beat(clinic.settings.host, {"version": "0.0.0", "data_dir": str(clinic.settings.data_dir)})
    assert clinic.look()["worker"].state == "warning"
    beat(clinic.settings.host, {"version": __version__, "data_dir": "/elsewhere"})
    check = clinic.look()["worker"]
    assert (check.state, "/elsewhere" in check.message) == ("problem", True)
    clinic.raw.hset(f"{clinic.settings.namespace}:host:{clinic.settings.host}", "last_seen", 1)
    assert clinic.look()["worker"].state == "problem"
    clinic.raw.flushall()
    assert clinic.look()["worker"].state == "warning"


def test_roots_that_cannot_be_used(clinic: Clinic, tmp_path: Path) -> None:
    assert clinic.look(workspace_roots=())["roots"].state == "warning"
    check = clinic.look(workspace_roots=(tmp_path / "nowhere", tmp_path))["roots"]
    assert (check.state, check.details) == ("problem", [f"{tmp_path / 'nowhere'} is no folder"])


def test_a_store_that_is_not_whole_open_to_all_or_not_there(clinic: Clinic, tmp_path: Path) -> None:
    clinic.store.root.chmod(0o755)
    assert clinic.look()["store"].state == "warning"
    clinic.store.blobs.temp.rename(tmp_path / "moved")
    assert clinic.look()["store"].state == "problem"
    assert clinic.look(data_dir=tmp_path / "new")["store"].state == "ok"
    assert not (tmp_path / "new").exists(), "looking makes nothing"


def test_a_disk_that_fills_up(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the figures are made up; a full file system itself is the store's own test."""
    for free, total, state in ((10 * 1024**2, 10**12, "problem"), (10**10, 10**12, "warning"), (10**11, 10**12, "ok")):
        monkeypatch.setattr(checks.shutil, "disk_usage", lambda _, free=free, total=total: SimpleNamespace(free=free, total=total))
        assert clinic.look()["space"].state == state


def test_a_reserve_that_is_spent_or_not_wanted(clinic: Clinic) -> None:
    Reserve(clinic.store, clinic.settings.reserve_bytes).release()
    assert clinic.look()["reserve"].state == "warning"
    assert clinic.look(reserve_bytes=0)["reserve"].state == "warning"


def test_damaged_captures_are_named_with_their_refs(clinic: Clinic) -> None:
    layer = load_manifest(clinic.store.blobs, clinic.store.refs(NAME).get().digest).layers[0].digest
    with clinic.store.blobs.path(layer).open("r+b") as file:
        file.truncate(10)
    check = clinic.look()["captures"]
    assert check.state == "problem"
    assert f"{NAME}:latest: blob {layer} has 10 bytes" in check.details[0]
    (clinic.store.refs(NAME).folder / "oci-layout").unlink()
    (clinic.store.refs(NAME).folder / "blobs").unlink()
    assert len(clinic.look()["captures"].details) == 3


def test_records_that_do_not_fit_the_disk(clinic: Clinic) -> None:
    clinic.registry.workspaces.register("o/r#2", host=clinic.settings.host, path="/nowhere/at/all")
    check = clinic.look()["records"]
    assert (check.state, check.details) == ("warning", ["o/r#2: its directory /nowhere/at/all is not there"])
    record = f"{clinic.settings.namespace}:ws:{NAME}"
    clinic.raw.hset(record, mapping={"generation": 7, "digest": "sha256:" + "0" * 64})
    assert f"{NAME}: the store has generation 1, the record says 7" in clinic.look()["records"].details
    clinic.store.refs(NAME).folder.rename(clinic.settings.data_dir / "away")
    assert f"{NAME}: its captures are not in this store" in clinic.look()["records"].details


def test_a_workspace_that_is_somewhere_else_or_was_released_is_no_orphan(clinic: Clinic) -> None:
    clinic.registry.workspaces.release(NAME)
    assert clinic.look()["records"].state == "ok"
    clinic.raw.flushall()
    clinic.registry.workspaces.register(NAME, host="elsewhere", path="/srv/x")
    assert clinic.look()["records"].state == "ok"
