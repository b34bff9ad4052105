"""Settings that contradict each other are refused, and no text about a Redis URL repeats its password."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mothball.errors import ConfigError
from mothball.settings import Settings, redact_url
from workers.config import celery_config, visibility_timeout
from workers.local import _up_settings


@pytest.mark.parametrize(
    "url",
    [
        "redis://:hunter2\u2100@127.0.0.1:1",
        "redis://app:hunt#er2@127.0.0.1:1",
        "redis://app:hunt?er2@127.0.0.1:1",
        "redis://app:hunt/er2@127.0.0.1:1",
        "redis://127.0.0.1:1?password=hunter2",
        "redis://127.0.0.1:1?Username=hunter2",
        "redis://127.0.0.1:1#hunter2",
        "redis://:hunter2@127.0.0.1:abc",
        "redis://:hunter2@127.0.0.1:99999",
        "redis://:hun[ter2@127.0.0.1:1",
        "redis://:hunter2",
        "hunter2",
    ],
)
def test_a_url_whose_password_cannot_be_told_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Settings.load(redis_url=url)
    assert "hun" not in str(caught.value) + repr(caught.value.fields)
    assert "hun" not in redact_url(url)


def test_the_parameters_of_tls_stay_in_the_url_and_out_of_what_is_shown() -> None:
    settings = Settings.load(redis_url="rediss://:p%40ss@h:1?ssl_cert_reqs=none")
    assert settings.broker_url == "rediss://:p%40ss@h:1/0?ssl_cert_reqs=none"
    assert settings.redacted()["redis_url"] == "rediss://***@h:1"
    assert redact_url("redis://h:1/2") == "redis://h:1/2"


def test_a_root_with_a_colon_is_refused_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be two roots for the worker, and the second one could be any folder."""
    with pytest.raises(ConfigError, match="separates folders"):
        Settings.load(workspace_roots=(Path("/srv/x:/etc"),))
    with pytest.raises(ConfigError, match="separates folders"):
        _up_settings([tmp_path / "x:y"])
    (tmp_path / "a:b").mkdir()
    monkeypatch.chdir(tmp_path / "a:b")
    with pytest.raises(ConfigError, match="separates folders"):
        _up_settings([])
    assert _up_settings([tmp_path])[0].workspace_roots == (tmp_path,)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"lease_seconds": 3}, "lease_seconds must be more than 1.5 times redis_timeout"),
        ({"redis_timeout": 20}, "lease_seconds must be more than 1.5 times redis_timeout"),
        ({"queued_ring_after_seconds": 60, "queued_ring_max_seconds": 59}, "queued_ring_max_seconds"),
        ({"max_file_bytes": 10, "max_total_bytes": 9}, "max_file_bytes must not be above max_total_bytes"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Settings.load(**wrong)


def test_settings_at_the_edge_are_accepted() -> None:
    Settings.load(lease_seconds=3, redis_timeout=1.9)
    Settings.load(queued_ring_after_seconds=60, queued_ring_max_seconds=60)
    Settings.load(max_file_bytes=10, max_total_bytes=10)
    Settings.load(max_file_bytes=10, max_total_bytes=0)


def test_a_record_outlives_every_delivery_of_its_message() -> None:
    settings = Settings.load()
    with pytest.raises(ConfigError, match="job_ttl_seconds must be above"):
        celery_config(Settings.load(job_ttl_seconds=visibility_timeout(settings)))
    celery_config(Settings.load(job_ttl_seconds=visibility_timeout(settings) + 1))
