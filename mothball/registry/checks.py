"""What a field of a workspace's record may say, checked before anything is written."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any

from mothball.errors import InvalidParams
from mothball.policy_fields import check as check_policy
from mothball.registry import encode
from mothball.retention import Policy

LONE_SURROGATE = re.compile("[\ud800-\udc7f\udd00-\udfff]")
"""Stands for no byte of a file's name; JSON escapes bring it in, and no bytes could be written for it."""
MAX_TEXT = 4096
_MAX_WHOLE = 10**13  # ms: three centuries; Lua counts exactly far beyond


def checked_policy(policy: dict[str, Any] | None) -> dict[str, Any]:
    """The policy overrides of a workspace; what nobody could follow is refused now, not by a sweep at night."""
    if policy is not None:
        check_policy(policy, "workspace")
        if "retention" in policy:
            Policy.parse(policy["retention"])
    return policy or {}


def checked_runtime(runtime: dict[str, Any] | None) -> dict[str, Any]:
    """The handle of what runs there, as its driver will read it."""
    if not runtime:
        return {}
    from mothball.runtime.handles import check  # a producer that names no runtime does not load its drivers

    return check(runtime)


def document(value: dict[str, Any] | None, what: str) -> str:
    """`value` as it stands in a record: nothing when it is empty."""
    return encode.dumps(value, what, encode.MAX_DOCUMENT_BYTES) if value else ""


def check_whole(name: str, value: object, least: int) -> None:
    """Raise `InvalidParams` unless `value` is None or a whole number from `least` to three centuries of ms."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MAX_WHOLE):
        raise InvalidParams(f"{name} {value!r} must be a whole number, {least} or more")


def check_path(path: object) -> None:
    """Raise `InvalidParams` unless `path` can be a workspace's: absolute, without NUL and ``..``, at most 4096 characters."""
    if not isinstance(path, str) or not PurePosixPath(path).is_absolute() or "\0" in path or len(path) > MAX_TEXT:
        raise InvalidParams(f"path must be absolute, without NUL and at most {MAX_TEXT} characters")
    if LONE_SURROGATE.search(path):
        raise InvalidParams(f"path {path[:100]!a} holds a surrogate, which is no character")
    if ".." in PurePosixPath(path).parts:
        raise InvalidParams(f"path {path!r} must not have '..' as a component")
