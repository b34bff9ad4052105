"""What a task declares: its name, its arguments, its limits. A wrong declaration fails at import, not at three in the morning.

Celery accepts any keyword silently (a misspelt ``ignore_results`` has cost real projects memory for years), so tasks
are declared through `JobSpec`, which knows every option and what contradicts what.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ValidationError

from mothball.errors import ConfigError, InvalidParams, MothballError
from mothball.names import check_host, check_workspace_id
from mothball.registry import encode
from mothball.settings import Settings

Seconds = int | Callable[[Settings], int]
"""A limit: a number of seconds, or a function of the settings for limits that operators may change."""


def _workspace_id(value: str) -> str:
    try:
        return check_workspace_id(value)
    except InvalidParams as error:
        raise ValueError(error.message) from None


WorkspaceId = Annotated[str, AfterValidator(_workspace_id)]
"""The id of a workspace, as an argument of a task."""
_NAME = re.compile(r"[a-z][a-z0-9_]*(?:\.[a-z][a-z0-9_]*){1,2}\Z")
_REQUIRED = ("name", "args", "queue", "time_limit", "soft_time_limit")
_OPTIONAL = {"lane": None, "ignore_result": False, "blames": True, "secret": ()}
_SHOWN_PROBLEMS = 5


@dataclass(frozen=True)
class Limits:
    """Time limits of one task in seconds: `soft` raises in the task, `hard` kills the process."""

    soft: int
    hard: int


@dataclass(frozen=True)
class JobSpec:
    """One declared task."""

    name: str
    args: type[BaseModel]
    queue: Literal["host", "control"]
    time_limit: Seconds
    soft_time_limit: Seconds
    lane: str | None
    ignore_result: bool
    blames: bool
    """Whether the workspace remembers this job's failures (Q-07). A restore that finds its target taken says nothing of it."""
    secret: tuple[str, ...]
    """Arguments that may hold secrets: redacted before a message of a plain producer becomes a record."""
    function: Callable[..., Any]

    def limits(self, settings: Settings) -> Limits:
        """The limits under `settings`; raises `ConfigError` when they leave the soft limit no effect."""
        return resolve_limits(self.name, self.soft_time_limit, self.time_limit, settings)

    def parse(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> BaseModel:
        """The validated arguments of a message; raises `InvalidParams` with what is wrong, field by field.

        Larger than 256 KiB is refused too: bulk data belongs on disk, never in the broker (design, section 8).
        """
        if args:
            raise InvalidParams(f"{self.name}: arguments must be given by name, not by position")
        encode.arguments(dict(kwargs))
        try:
            return self.args.model_validate(dict(kwargs))
        except ValidationError as error:
            raise InvalidParams(f"{self.name}: {condense(error)}") from None

    @property
    def of_host(self) -> bool:
        """True for a job of a host: it holds no workspace's lease, even when its arguments name one."""
        return self.queue == "host" and _names_host(self.args)

    def workspace_of(self, parsed: BaseModel) -> str | None:
        """The workspace whose lease the job holds, None for a task without one and for a job of a host."""
        value = None if self.of_host else getattr(parsed, "workspace", None)
        return value if isinstance(value, str) else None

    def host_of(self, parsed: BaseModel) -> str | None:
        """The host that a job of a host runs on, else None; raises `InvalidParams` for what is no host's name."""
        return check_host(getattr(parsed, "host", None)) if self.of_host else None


def _names_host(model: type[BaseModel]) -> bool:
    """True when the arguments must say which host. An optional `host` beside a `workspace` is a hint, not the job's place."""
    field = model.model_fields.get("host")
    return field is not None and field.is_required()


def condense(error: ValidationError) -> str:
    """Pydantic's findings in one line, the values left out: they may be long, and they may be secret."""
    found = [
        f"{'.'.join(str(part) for part in item['loc']) or 'arguments'}: {item['msg']}"
        for item in error.errors(include_url=False, include_input=False, include_context=False)
    ]
    more = f"; and {len(found) - _SHOWN_PROBLEMS} more" if len(found) > _SHOWN_PROBLEMS else ""
    return "; ".join(found[:_SHOWN_PROBLEMS]) + more


def resolve_limits(name: str, soft: Seconds, hard: Seconds, settings: Settings) -> Limits:
    """Both limits as numbers; raises `ConfigError` unless 0 < soft < hard."""
    limits = Limits(soft=soft(settings) if callable(soft) else soft, hard=hard(settings) if callable(hard) else hard)
    if not 0 < limits.soft < limits.hard:
        raise ConfigError(
            f"task {name}: the soft time limit ({limits.soft} s) must be above 0 and below the hard one ({limits.hard} s), "
            "else a run is killed before it can record why"
        )
    return limits


def check_limits(name: str, soft: Any, hard: Any) -> None:
    """Raise `TypeError` for limits that are no seconds, or contradict each other under the default settings."""
    for option, value in (("soft_time_limit", soft), ("time_limit", hard)):
        if isinstance(value, bool) or not (isinstance(value, int) or callable(value)):
            raise TypeError(f"task {name}: {option} must be seconds or a function of the settings, not {value!r}")
    try:
        resolve_limits(name, soft, hard, Settings.model_construct())
    except MothballError as error:
        raise TypeError(str(error)) from None


def check_name(name: object, taken: Mapping[str, object]) -> str:
    """Return `name` when it is a stable, free task name (``family.verb``, ``image.cache.prune``), else raise `TypeError`.

    Names are in flight during a rolling deploy, so none is ever derived from a module.
    """
    if not isinstance(name, str) or not _NAME.match(name):
        raise TypeError(f"task name {name!r}: write family.verb in lower case, for example workspace.capture")
    if name in taken:
        raise TypeError(f"task {name} is declared twice; the second would silently replace the first")
    return name


def build_spec(function: Callable[..., Any], options: Mapping[str, Any], taken: Mapping[str, object]) -> JobSpec:
    """The spec of `function`; raises `TypeError` for an unknown, missing or contradictory option."""
    label = options.get("name") or getattr(function, "__qualname__", repr(function))
    if unknown := sorted(set(options) - set(_REQUIRED) - set(_OPTIONAL)):
        raise TypeError(f"task {label}: unknown option {', '.join(unknown)}; known are {', '.join((*_REQUIRED, *_OPTIONAL))}")
    if missing := [option for option in _REQUIRED if option not in options]:
        raise TypeError(f"task {label}: missing option {', '.join(missing)}")
    given = {**_OPTIONAL, **options}
    name = check_name(given["name"], taken)
    check_limits(name, given["soft_time_limit"], given["time_limit"])
    model = given["args"]
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        raise TypeError(f"task {name}: args must be a pydantic model, not {model!r}")
    if model.model_config.get("extra") != "forbid":
        raise TypeError(f"task {name}: {model.__name__} must forbid extra fields, else a misspelt argument is silently ignored")
    if given["queue"] not in {"host", "control"}:
        raise TypeError(f"task {name}: queue must be 'host' or 'control', not {given['queue']!r}")
    placed = "workspace" in model.model_fields or (given["queue"] == "host" and _names_host(model))
    if given["queue"] == "host" and not placed:
        raise TypeError(f"task {name}: queue 'host' needs an argument `workspace`, or a required `host`: it says which host")
    if given["lane"] is not None and not placed:
        raise TypeError(f"task {name}: lane {given['lane']!r} needs `workspace` or, on queue 'host', `host`: requests join per one")
    if given["lane"] is not None and not isinstance(given["lane"], str):
        raise TypeError(f"task {name}: lane must be a name, not {given['lane']!r}")
    for option in ("ignore_result", "blames"):
        if not isinstance(given[option], bool):
            raise TypeError(f"task {name}: {option} must be True or False, not {given[option]!r}")
    if not isinstance(given["secret"], tuple) or not all(isinstance(each, str) for each in given["secret"]):
        raise TypeError(f"task {name}: secret must be a tuple of argument names, not {given['secret']!r}")
    if missing := [each for each in given["secret"] if each not in model.model_fields]:
        raise TypeError(f"task {name}: secret names {', '.join(missing)}, which {model.__name__} does not have")
    if kept := {"workspace", "host"}.intersection(given["secret"]):
        raise TypeError(f"task {name}: {', '.join(sorted(kept))} says where the job runs and cannot be secret")
    if len(inspect.signature(function).parameters) != 2:  # noqa: PLR2004 - (ctx, args)
        raise TypeError(f"task {name}: its function takes (ctx, args) and nothing else")
    return JobSpec(function=function, **{**given, "name": name})
