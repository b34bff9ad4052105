"""What a policy may say: its fields with their units, how they are read and checked, and how the levels of a fleet add up.

A policy is a JSON mapping. It is said for the fleet (setting `policy`, then the registry), for a repo and for one workspace; the
closer level wins field by field. Nothing here decides anything: that is `mothball.policy`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import msgspec

from mothball import durations, sizes
from mothball.durations import quote, show
from mothball.errors import InvalidParams

Level = Literal["fleet", "repo", "workspace"]
SIGNALS = ("touch", "exec", "lease", "heartbeat", "cpu", "file")
"""Signs of life that a policy may count or leave out; being registered and being resumed always count."""
ALWAYS_COUNT = ("register", "resume")
FOREIGN = ("retention", "capture")
"""Keys of a workspace's policy that belong to others: `mothball.retention`, and the captures."""
MAX_GRACE_MS = 600_000
MAX_EXTENSIONS = 1000
MAX_CAP = 100_000_000
MAX_CPU = 102_400
_HOUR = 3_600_000
_EXAMPLE = "ttl=24h,idle_ttl=2h,cap=100"
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_DEFAULT_LEVEL = -1
_WHOLE = re.compile(r"-?[0-9]{1,18}\Z")
_DECIMAL = re.compile(r"-?[0-9]{1,9}\.[0-9]{1,9}\Z")


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """What reclaims a workspace. Times are ms and None means never; `merge` makes one from the levels that apply."""

    ttl: int | None = 24 * _HOUR
    """An ephemeral workspace is evicted when it is older than this (B-71)."""
    idle_ttl: int | None = None
    """An ephemeral workspace is evicted when its last sign of life is longer ago than this (D-17)."""
    max_age: int | None = None
    """Any workspace, persistent ones too, is evicted when it is older than this (D-17)."""
    stop_after: int | None = None
    """An active workspace is stopped when its last sign of life is longer ago than this (N-32)."""
    stop_grace: int = 10_000
    """Between asking the processes of a stopped workspace to end and killing them."""
    presence_limit: int | None = None
    """Age after which heartbeats no longer protect a workspace from its other rules."""
    stranded_for: int | None = 4 * _HOUR
    """A stranded workspace that nobody resumes is abandoned after this (D-72, D-74)."""
    notice_before: int | None = None
    """Warning that precedes a stop or an eviction by time; none of them comes without."""
    max_extensions: int = 3
    """How often the answer to a notice may put off what was announced."""
    git_guard: bool = True
    """Refuse to delete a directory whose git holds what no capture holds (unpushed commits, stashes)."""
    purge: bool = False
    """Delete an expired workspace's directory, with a receipt, instead of only evicting its record (B-74)."""
    signals: tuple[str, ...] = SIGNALS
    """The signs of life that count."""
    cpu_busy: float = 10
    """Per cent of one core from which its processes are at work, so that the workspace is not stopped."""
    cap: int | None = 100
    """Most workspaces, of the fleet or of a repo: the oldest ephemeral ones beyond it are evicted (B-72)."""
    budget: int | None = None
    """Most bytes of stored captures in the fleet: beyond it the least recently used is evicted (Q-10)."""


FIELDS = Policy.__struct_fields__
_DURATIONS = ("ttl", "idle_ttl", "max_age", "stop_after", "presence_limit", "stranded_for", "notice_before")
_LEVELS: dict[str, tuple[Level, ...]] = {"cap": ("fleet", "repo"), "budget": ("fleet",)}
_SHADOWED = (
    ("stop_after", ("idle_ttl", "ttl", "max_age"), "it would be evicted before it is ever stopped"),
    ("idle_ttl", ("ttl", "max_age"), "it would be evicted for its age before it is ever idle that long"),
    ("ttl", ("max_age",), "max_age would evict it first"),
    ("notice_before", ("stop_after", "idle_ttl", "ttl", "max_age"), "the notice would be due before its clock begins"),
)
"""A limit, those that must be above it, and what happens otherwise."""
_EPHEMERAL_ONLY = ("ttl", "idle_ttl")


def check(raw: object, level: Level) -> dict[str, Any]:
    """The policy `raw` of one level as a JSON mapping: only known fields with values that `merge` can read, `FOREIGN` left out.

    Durations and sizes stay the texts they are. An unknown field, a wrong value, or a field that has no meaning at this level
    (`cap` of a workspace, `budget` of anything but the fleet) is `InvalidParams`.
    """
    if not isinstance(raw, Mapping):
        raise InvalidParams(f"a policy is a mapping such as {{'ttl': '24h'}}, not {type(raw).__name__}")
    out: dict[str, Any] = {}
    for name, value in raw.items():
        if level == "workspace" and name in FOREIGN:
            continue
        if name not in FIELDS:
            raise InvalidParams(f"policy: unknown field {quote(name)}; known are {', '.join(FIELDS)}")
        if level not in (allowed := _LEVELS.get(name, (level,))):
            raise InvalidParams(f"policy: {name} is set for the {' or a '.join(allowed)}, not for a {level}")
        read = _value(name, value)
        out[name] = list(read) if name == "signals" else value
    return out


def parse_text(text: str) -> dict[str, Any]:
    """The mapping of ``ttl=24h,cap=100,git_guard=off,signals=touch+exec``, for settings and command lines.

    `check` has the last word on it; here a pair that is none, an unknown field, one given twice, an unreadable value and an empty
    text are `InvalidParams`.
    """
    out: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not name or not equals or not value:
            raise InvalidParams(f"policy: {part.strip()[:50]!r} is not field=value; write for example {_EXAMPLE}")
        if name not in FIELDS:
            raise InvalidParams(f"policy: unknown field {quote(name)}; known are {', '.join(FIELDS)}")
        if name in out:
            raise InvalidParams(f"policy: {name} is given twice")
        out[name] = _from_text(name, value)
        _value(name, out[name])
    return out


def merge(*levels: Mapping[str, Any], strict: bool = True, mode: str = "ephemeral") -> Policy:
    """The policy that `levels`, the weakest first, add up to; the defaults of `Policy` are below them all.

    `strict` is for whoever sets a policy: a field that never has an effect, because one of the same or a weaker level comes before
    it, is `InvalidParams`, for its author expects something that would not happen. A stronger level may always shorten what a
    weaker one says. `mode` tells which rules apply. An unknown field or an unreadable value is `InvalidParams` in any case: what
    cannot be read must not reclaim anything.
    """
    values: dict[str, Any] = {}
    level_of: dict[str, int] = dict.fromkeys(FIELDS, _DEFAULT_LEVEL)
    for number, level in enumerate(levels):
        for name, value in level.items():
            if name in FOREIGN:
                continue
            if name not in FIELDS:
                raise InvalidParams(f"policy: unknown field {quote(name)}; known are {', '.join(FIELDS)}")
            values[name] = _value(name, value)
            level_of[name] = number
    policy = Policy(**values)
    if strict:
        _refuse_shadowed(policy, level_of, mode)
    return policy


def to_dict(policy: Policy) -> dict[str, Any]:
    """`policy` as the mapping that `check` and `merge` read back, every field with its value as a text or number."""
    out: dict[str, Any] = {}
    for name in FIELDS:
        value = getattr(policy, name)
        if name in _DURATIONS or name == "stop_grace":
            out[name] = show(value)
        elif name == "budget":
            out[name] = sizes.show(value)
        elif name == "signals":
            out[name] = list(value)
        else:
            out[name] = durations.NEVER if value is None else value
    return out


def _refuse_shadowed(policy: Policy, level_of: Mapping[str, int], mode: str) -> None:
    for name, above, consequence in _SHADOWED:
        for other in above:
            mine, limit = getattr(policy, name), getattr(policy, other)
            if mine is None or limit is None or mine < limit or level_of[name] < level_of[other]:
                continue
            if mode != "ephemeral" and (name in _EPHEMERAL_ONLY or other in _EPHEMERAL_ONLY):
                continue
            default = " (the default)" if level_of[other] == _DEFAULT_LEVEL else ""
            raise InvalidParams(
                f"policy: {name}={show(mine)} must be less than {other}={show(limit)}{default}: {consequence}; "
                f"change one of them, or say {other}=never"
            )


def _from_text(name: str, value: str) -> Any:
    if name in ("git_guard", "purge"):
        if value.lower() in (*_TRUE, *_FALSE):
            return value.lower() in _TRUE
    elif name == "signals":
        return value.split("+")
    elif name in ("cap", "max_extensions", "cpu_busy"):
        if _WHOLE.match(value):
            return int(value)
        if name == "cpu_busy" and _DECIMAL.match(value):
            return float(value)
    return value


def _value(name: str, value: object) -> Any:
    """The value of field `name` as `Policy` holds it; raises `InvalidParams`."""
    return _READERS[name](f"policy: {name}", value)


def _grace(what: str, value: object) -> int:
    found = durations.parse(value, what)
    if found is None or found > MAX_GRACE_MS:
        raise InvalidParams(f"{what} must be at most {show(MAX_GRACE_MS)}: what does not end by itself is killed then")
    return found


def _switch(what: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise InvalidParams(f"{what} must be true or false, not {quote(value)}")
    return value


def _names(what: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not value:
        raise InvalidParams(f"{what} must name at least one of {', '.join(SIGNALS)}")
    for each in value:
        if each in ALWAYS_COUNT:
            raise InvalidParams(f"{what}: {each} always counts; leave it out")
        if each not in SIGNALS:
            raise InvalidParams(f"{what}: unknown signal {quote(each)}; known are {', '.join(SIGNALS)}")
    return tuple(name for name in SIGNALS if name in value)


def _count(least: int, most: int, *, never: bool = False) -> Callable[[str, object], int | None]:
    def read(what: str, value: object) -> int | None:
        if never and value == durations.NEVER:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            hint = "; write never for no limit" if never else ""
            raise InvalidParams(f"{what}={quote(value)} must be a whole number from {least} to {most}{hint}")
        return value

    return read


def _cpu(what: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_CPU:
        raise InvalidParams(f"{what}={quote(value)} must be per cent of one core, more than 0 and at most {MAX_CPU}")
    return value


_READERS: dict[str, Callable[[str, object], Any]] = {
    **dict.fromkeys(_DURATIONS, lambda what, value: durations.parse(value, what)),
    "stop_grace": _grace,
    "max_extensions": _count(0, MAX_EXTENSIONS),
    "git_guard": _switch,
    "purge": _switch,
    "signals": _names,
    "cpu_busy": _cpu,
    "cap": _count(1, MAX_CAP, never=True),
    "budget": lambda what, value: sizes.parse(value, what),
}
