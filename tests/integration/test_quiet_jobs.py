"""No secret of a plain producer's message, and none of an error, enters a record, a result or a traceback."""

from __future__ import annotations

import json
import threading
import traceback
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from celery.exceptions import Ignore
from pydantic import BaseModel, ConfigDict

from mothball.errors import MothballError, OperationFailed, TransientFailure
from mothball.redact import Redactor, Rules
from mothball.registry import Registry
from mothball.settings import Settings
from tasks import services
from tasks.job import Outcome, execute
from tasks.spec import JobSpec, build_spec
from workers.redis_server import RedisServer

WORKSPACE = "o/r#1"
TOKEN = "gl" + "pat-" + "Q3xZ81mN0pLk7VbT2wRs"
WORD = "hunter2" + "x9"


class Args(BaseModel):
    """What a producer may send in the clear."""

    model_config = ConfigDict(extra="forbid", strict=True)

    workspace: str
    error: str = ""
    command: list[str] | None = None
    env: dict[str, str] | None = None
    facts: dict[str, Any] | None = None
    note: str = ""


@pytest.fixture
def registry(private_redis: RedisServer, make_settings: Callable[..., Settings]) -> Iterator[Registry]:
    """The registry of a host with one workspace; this process is its worker."""
    settings = make_settings()
    services.configure(settings)
    with Registry.connect(settings) as found:
        found.hosts.heartbeat(settings.host, {})
        found.workspaces.register(WORKSPACE, host=settings.host, path="/srv/x")
        yield found
    services.renew()
    services._settings = None


def probe(function: Callable[..., Any]) -> JobSpec:
    options = {
        "name": "unit.quiet", "args": Args, "queue": "host", "time_limit": 20, "soft_time_limit": 10,
        "secret": ("error", "command", "env", "facts"),
    }  # fmt: skip
    return build_spec(function, options, {})


def deliver(spec: JobSpec, job_id: str, states: list[Any], **kwargs: Any) -> Any:
    """One plain message for `job_id`; `states` gets what the result backend would be told."""
    task = SimpleNamespace(
        request=SimpleNamespace(id=job_id, hostname="w@h"),
        update_state=lambda **told: states.append(told),
        backend=SimpleNamespace(),
    )
    return execute(task, spec, (), {"workspace": WORKSPACE, **kwargs})


def stored(registry: Registry) -> str:
    """Everything in the registry's database, as text."""
    client = redis.Redis.from_url(registry.settings.registry_url, decode_responses=True)
    reads: dict[str, Callable[[str], Any]] = {
        "hash": client.hgetall,
        "string": client.get,
        "stream": client.xrange,
        "set": client.smembers,
    }
    with client:
        out = [f"{key} {reads.get(client.type(key), str)(key)}" for key in client.scan_iter()]
    return "\n".join(out)


def test_the_secret_arguments_of_a_plain_message_are_redacted_before_they_become_a_record(registry: Registry) -> None:
    seen: list[Args] = []

    def keeps(ctx: Any, args: Args) -> Outcome:
        seen.append(args)
        return Outcome(result={})

    deliver(
        probe(keeps), "quiet-1", [], error=f"login with {TOKEN} failed: password='{WORD}'", command=["tool", "--password", "x y z"],
        env={"DB_PASSWORD": "short1", "PATH": "/bin"}, facts={"token": "abc", "n": 1}, note="plain",
    )  # fmt: skip
    everything = stored(registry)
    assert [secret for secret in (TOKEN, WORD, "x y z", "short1", "'abc'") if secret in everything] == []
    token = Redactor(registry.redaction_key(), Rules.default()).text(TOKEN)
    assert seen[0].error.startswith(f"login with {token} failed")
    assert seen[0].env is not None and seen[0].env["PATH"] == "/bin"
    assert seen[0].note == "plain"
    assert json.loads(json.dumps(registry.jobs.get("quiet-1").args))["command"][2].startswith("[redacted:password:")


@pytest.mark.parametrize(
    "make",
    [
        lambda: OperationFailed(reason=f"clone of https://u:{WORD}@h/x failed, {TOKEN}"),
        lambda: ValueError(f"password='{WORD}' and {TOKEN}"),
        lambda: TransientFailure(f"later: {TOKEN} {WORD[:0]}"),
    ],
)
def test_an_error_text_is_masked_in_record_result_and_traceback(registry: Registry, make: Callable[[], Exception]) -> None:
    def fails(ctx: Any, args: Args) -> Outcome:
        try:
            raise RuntimeError(f"inner {TOKEN}")
        except RuntimeError as inner:
            raise make() from inner

    told: list[Any] = []
    shown = ""
    try:
        deliver(probe(fails), "quiet-2", told)
    except (MothballError, Ignore) as error:
        shown = "".join(traceback.format_exception(error)) + repr(error) + repr(getattr(error, "fields", ""))
        assert isinstance(error, Ignore) or "[redacted:gitlab]" in shown
    job = registry.jobs.get("quiet-2")
    assert "[redacted:gitlab]" in (job.error or "")
    for text in (
        stored(registry),
        shown if "Ignore" not in shown else "",
        repr(told),
        *(repr(each["meta"].fields) for each in told),
    ):
        assert TOKEN not in text and WORD not in text


def test_the_fleet_has_one_key_however_many_ask_first(registry: Registry) -> None:
    keys: list[bytes] = []

    def ask() -> None:
        with Registry.connect(registry.settings) as own:
            keys.append(own.redaction_key())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(keys) == 8 and len(set(keys)) == 1 and len(keys[0]) == 32
    assert registry.redaction_key() == keys[0]


def test_a_damaged_key_is_an_error_and_not_an_empty_key(registry: Registry) -> None:
    client = redis.Redis.from_url(registry.settings.registry_url)
    with client:
        client.set(f"{registry.settings.namespace}:redaction:key", "00")
    with pytest.raises(OperationFailed, match="holds no key of 32 bytes"):
        registry.redaction_key()
