"""A wrong task declaration fails at import, with a message that says what would go wrong."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict

import tasks.maintenance  # noqa: F401  # declares the sweep whose name is taken below
from mothball.errors import ConfigError, InvalidParams
from mothball.settings import Settings
from tasks.capture import CaptureArgs, CaptureOptions, merged_options, soft_limit
from tasks.hosts import HostArgs
from tasks.job import SPECS, job_task
from tasks.spec import JobSpec, build_spec
from tasks.sweep import SWEEPS, sweep_task


class Args(BaseModel):
    """Arguments of a workspace's task."""

    model_config = ConfigDict(extra="forbid", strict=True)

    workspace: str
    count: int = 0


class Lax(BaseModel):
    """A model that swallows misspelt arguments."""

    workspace: str


class Nowhere(BaseModel):
    """Arguments without a workspace."""

    model_config = ConfigDict(extra="forbid")


class OfHost(HostArgs):
    """Arguments of a job of a host, which names a workspace too."""

    workspace: str | None = None


class MaybeHost(BaseModel):
    """A host that need not be said places nothing."""

    model_config = ConfigDict(extra="forbid")

    host: str | None = None


class Loose(BaseModel):
    """A host that the model does not check."""

    model_config = ConfigDict(extra="forbid")

    host: str


class Hinted(Args):
    """A job of a workspace with a hint."""

    host: str | None = None


GOOD: dict[str, Any] = {"name": "unit.probe", "args": Args, "queue": "host", "time_limit": 20, "soft_time_limit": 10}


def function(ctx: Any, args: Any) -> None:
    """A task function."""


def spec(**changes: Any) -> JobSpec:
    """The spec of a good declaration with `changes`; None removes an option."""
    options = {**GOOD, **changes}
    return build_spec(function, {name: value for name, value in options.items() if value is not None}, {"unit.taken": object()})


def test_a_good_declaration_is_accepted() -> None:
    """The base of all rejections below: without the change it is fine."""
    assert spec(lane="probe").lane == "probe"
    assert spec().ignore_result is False


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ignore_results": True}, "unknown option ignore_results"),
        ({"countdown": 5}, "unknown option countdown"),
        ({"name": None}, "missing option name"),
        ({"args": None}, "missing option args"),
        ({"queue": None}, "missing option queue"),
        ({"time_limit": None}, "missing option time_limit"),
        ({"soft_time_limit": None}, "missing option soft_time_limit"),
        ({"name": "capture"}, "write family.verb"),
        ({"name": "Unit.Probe"}, "write family.verb"),
        ({"name": "unit.taken"}, "declared twice"),
        ({"soft_time_limit": 20}, "soft time limit"),
        ({"soft_time_limit": 30}, "soft time limit"),
        ({"soft_time_limit": 0}, "soft time limit"),
        ({"time_limit": "20"}, "must be seconds"),
        ({"time_limit": True}, "must be seconds"),
        ({"time_limit": lambda settings: settings.capture_time_limit, "soft_time_limit": 9999}, "soft time limit"),
        ({"args": dict}, "pydantic model"),
        ({"args": Lax}, "forbid extra fields"),
        ({"queue": "hosts"}, "queue must be"),
        ({"args": Nowhere}, "says which host"),
        ({"args": Nowhere, "queue": "control", "lane": "x"}, "requests join per one"),
        ({"args": MaybeHost}, "says which host"),
        ({"args": HostArgs, "queue": "control", "lane": "x"}, "requests join per one"),
        ({"lane": 3}, "lane must be a name"),
        ({"ignore_result": 1}, "must be True or False"),
        ({"secret": ["workspace"]}, "must be a tuple"),
        ({"secret": ("eror",)}, "secret names eror, which"),
        ({"secret": ("workspace",)}, "says where the job runs"),
    ],
)
def test_unknown_missing_or_contradictory_options_fail_at_import(changes: dict[str, Any], said: str) -> None:
    """Each would be silent in Celery and show only in production."""
    with pytest.raises(TypeError, match=said):
        spec(**changes)


def test_a_required_host_makes_a_job_of_the_host_and_an_optional_one_does_not() -> None:
    """Only one of them may decide where a job runs and whose lease it holds."""
    of_host, of_workspace = spec(args=OfHost, lane="probe"), spec(args=Hinted)
    parsed = of_host.parse((), {"host": "h1", "workspace": "o/r#1"})
    assert (of_host.host_of(parsed), of_host.workspace_of(parsed)) == ("h1", None)
    parsed = of_workspace.parse((), {"host": "h1", "workspace": "o/r#1"})
    assert (of_workspace.host_of(parsed), of_workspace.workspace_of(parsed)) == (None, "o/r#1")
    control = spec(args=OfHost, queue="control")
    assert control.host_of(control.parse((), {"host": "h1"})) is None, "any worker may run it"


@pytest.mark.parametrize("wrong", ["", "a b", "-h", "h/../x", 7, None, "x" * 101])
def test_a_host_that_names_no_host_is_refused(wrong: object) -> None:
    """The name becomes a queue's name."""
    with pytest.raises(InvalidParams, match="host"):
        spec(args=OfHost).parse((), {"host": wrong})
    loose = spec(args=Loose)
    with pytest.raises(InvalidParams, match="host name"):
        loose.host_of(Loose.model_construct(host=wrong))  # type: ignore[arg-type]  # what a lax model would let through


def test_the_decorator_raises_and_registers_nothing() -> None:
    """The real decorator, not only its helper."""
    before = dict(SPECS)
    with pytest.raises(TypeError, match="unknown option ignore_results"):
        job_task(**GOOD, ignore_results=True)(function)
    with pytest.raises(TypeError, match="declared twice"):
        job_task(**{**GOOD, "name": "workspace.capture"})(function)
    assert before == SPECS


def test_a_task_function_takes_context_and_arguments() -> None:
    """Anything else would fail only when the first message arrives."""
    with pytest.raises(TypeError, match=r"takes \(ctx, args\)"):
        build_spec(lambda args: None, GOOD, {})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "ring"}, "write family.verb"),
        ({"name": "maintenance.ring"}, "declared twice"),
        ({"every": 10}, "every must be a function"),
        ({"soft_time_limit": 90}, "soft time limit"),
    ],
)
def test_a_wrong_sweep_fails_at_import(changes: dict[str, Any], said: str) -> None:
    """Sweeps have the same checks."""
    before = dict(SWEEPS)
    options: dict[str, Any] = {"name": "unit.sweep", "every": lambda settings: 10, "time_limit": 60, "soft_time_limit": 30}
    with pytest.raises(TypeError, match=said):
        sweep_task(**{**options, **changes})(lambda here: {})
    assert before == SWEEPS


def test_bad_arguments_are_one_short_line_without_their_values() -> None:
    """Field and reason, at most five, never the value: it may be long or secret."""
    with pytest.raises(InvalidParams) as caught:
        spec().parse((), {"workspace": ["hunter2"], "count": "many", "more": 1})
    message = caught.value.message
    assert message.startswith("unit.probe: workspace: Input should be a valid string; count: ")
    assert "more: Extra inputs are not permitted" in message
    assert "hunter2" not in message
    with pytest.raises(InvalidParams) as caught:
        spec().parse((), {f"extra{number}": 1 for number in range(50)})
    assert "and 46 more" in caught.value.message
    assert len(caught.value.message) < 500


def test_positional_and_oversized_arguments_are_refused() -> None:
    """At most 256 KiB of JSON, by name."""
    with pytest.raises(InvalidParams, match="by name"):
        spec().parse(("x",), {})
    with pytest.raises(InvalidParams, match="262144"):
        spec().parse((), {"workspace": "x" * 300_000})


@pytest.mark.parametrize("wrong", ["", "../x", "a" * 129, "a/../b", 7, None, "-x", "a b"])
def test_b06_capture_refuses_what_is_no_workspace_id(wrong: object) -> None:
    """The id is checked before anything is looked up."""
    with pytest.raises(InvalidParams, match="workspace"):
        SPECS["workspace.capture"].parse((), {"workspace": wrong})


def test_capture_limits_leave_a_minute_to_record_why_also_for_short_limits() -> None:
    """3600 s: 60 s before the hard limit; 10 s: half of it."""
    assert soft_limit(Settings.model_construct(capture_time_limit=3600)) == 3540
    assert soft_limit(Settings.model_construct(capture_time_limit=10)) == 5
    for limit in (10, 119, 120, 3600):
        SPECS["workspace.capture"].limits(Settings.model_construct(capture_time_limit=limit))


def test_limits_that_contradict_each_other_under_the_operators_settings_are_a_config_error() -> None:
    """A limit may be a function of the settings; the settings decide at start-up."""
    declared = spec(time_limit=lambda settings: settings.capture_time_limit, soft_time_limit=100)
    with pytest.raises(ConfigError, match="soft time limit"):
        declared.limits(Settings.model_construct(capture_time_limit=50))


def test_capture_options_of_a_request_override_those_of_the_workspace() -> None:
    """Policy first, request on top; unset fields stay out so that the host's settings count."""
    policy = {"capture": {"profile": "light", "ignore": ["*.tmp"]}}
    assert merged_options(policy, CaptureOptions(profile="full")) == {"profile": "full", "ignore": ["*.tmp"]}
    assert merged_options({}, CaptureOptions()) == {}
    with pytest.raises(InvalidParams, match="capture policy: profile"):
        merged_options({"capture": {"profile": "loud"}}, CaptureOptions())


def test_capture_args_refuse_unknown_options() -> None:
    """A misspelt option must not be ignored in silence."""
    with pytest.raises(InvalidParams, match=r"options\.max_filebytes"):
        SPECS["workspace.capture"].parse((), {"workspace": "a", "options": {"max_filebytes": 1}})
    assert CaptureArgs.model_validate({"workspace": "a", "paths": ["x"]}).paths == ["x"]
