"""The registry's keys: their names, what may stand in them, and which of them may stand without a TTL."""

from __future__ import annotations

import re

from mothball.errors import InvalidParams
from mothball.names import QUEUE_CONTROL, QUEUE_DISPATCH, check_host, check_workspace_id, queue_host

# `ws:<id>` shares its prefix with the indexes: an id that looks like one of them would overwrite it.
_RESERVED = ("by:", "due:", "gone:", "good:", "host:", "repo:", "state:")
_JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}\Z")
_REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@-]{0,199}\Z")
_WORD = re.compile(r"[a-z][a-z0-9._-]{0,63}\Z")

STANDING = (
    "ws:by:created",
    "ws:by:active",
    "ws:by:deadline",
    "ws:due:evict",
    "ws:due:stop",
    "ws:repo:*",
    "ws:host:*",
    "ws:good:*",
    "ws:state:*",
    "presence:*",
    "policies",
    "agents:*",
    "host:*",
    "hosts",
    "hosts:online",
    "hosts:offline",
    "counters",
    "crash:by:at",
    "crash:crash-*",
    "crash:host:*",
    "crash:repo:*",
    "crash:ws:*",
    "events",
    "budget",
    "budget:retained",
    "jobs:created",
    "jobs:succeeded",
    "jobs:failed",
    "jobs:cancelled",
    "jobs:dead",
)
"""Patterns of keys that may stand without a TTL for ever: bounded by the fleet's size or by their own trimming.

A list of presence goes with its record.

Records of registered workspaces (``ws:<id>``) and of unfinished jobs (``job:<id>``) stand as long as the thing itself.
"""

WHILE_BUSY = (
    "budget:reserved", "jobs:queued", "jobs:due", "jobs:running", "jobs:ring", "jobs:away:*", "lane:*", "wait:*", "waiting",
)  # fmt: skip
"""Patterns of keys that exist without a TTL only while a job is queued or running: an idle fleet has none of them."""


class Keys:
    """Key names for what is read without a script; the scripts build the same names in Lua."""

    def __init__(self, namespace: str) -> None:
        self._prefix = f"{namespace}:"

    def __call__(self, *parts: str) -> str:
        """``<namespace>:<part>:<part>...``"""
        return self._prefix + ":".join(parts)

    def bare(self, key: str) -> str:
        """`key` without the namespace."""
        return key.removeprefix(self._prefix)


def workspace_id(value: object) -> str:
    """`value` as a workspace id (B-06), or `InvalidParams`; ids that would collide with an index are refused."""
    checked = check_workspace_id(value)
    if checked.startswith(_RESERVED):
        raise InvalidParams(f"workspace id {checked!r} must not begin with {checked.partition(':')[0]}:")
    return checked


def job_id(value: object) -> str:
    """`value` as a job id, or `InvalidParams`."""
    if not isinstance(value, str) or not _JOB_ID.match(value):
        raise InvalidParams("a job id has 1-128 letters, digits and . _ : -, beginning with a letter or digit")
    return value


def repo_name(value: object) -> str:
    """`value` as a repository's name, or `InvalidParams`."""
    if not isinstance(value, str) or not _REPO.match(value):
        raise InvalidParams("a repo has 1-200 letters, digits and . _ / : @ -, beginning with a letter or digit")
    return value


def word(value: object, what: str) -> str:
    """`value` as a short lower-case name (lane, signal, sweep, event kind), or `InvalidParams`."""
    if not isinstance(value, str) or not _WORD.match(value):
        raise InvalidParams(f"{what}: 1-64 lower-case letters, digits and . _ -, beginning with a letter")
    return value


def queue_name(value: str) -> str:
    """`value` when some worker declares such a queue, else `InvalidParams`: no silent queues (design, section 4)."""
    host = queue_host(value)
    if host is not None:
        check_host(host)
    elif value not in {QUEUE_CONTROL, QUEUE_DISPATCH}:
        raise InvalidParams(f"no worker declares queue {value!r}; use {QUEUE_CONTROL}, {QUEUE_DISPATCH} or host.<host>")
    return value
