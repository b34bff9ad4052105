"""Presence: who works in a workspace right now, because he said so a moment ago and has not said goodbye."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from mothball.errors import Busy, InvalidParams
from mothball.registry import keys
from mothball.registry.connection import Connection
from mothball.registry.scripts import Scripts
from mothball.registry.workspaces import missing
from mothball.settings import Settings

Signal = Literal["heartbeat", "lease"]
"""The sign of life that a heartbeat is: a plain one, or one of an activity lease (`Fleet.active`)."""
MAX_HOLDERS = 256
"""Most that may be present in one workspace at a time."""
MAX_HOLDER_LENGTH = 200
LEAST_MS, MOST_MS = 1, 7 * 86_400_000
"""Bounds of the time until a holder is missed."""


class Beat(msgspec.Struct, frozen=True):
    """What a heartbeat did: it counts until `until` (ms of Redis TIME). `state` says whether its workspace is still at work."""

    until: int
    state: str
    state_reason: str


class Presence:
    """Heartbeats and goodbyes. A holder whose heartbeats end without goodbye is missing, not idle: its workspace is stranded."""

    def __init__(self, connection: Connection, scripts: Scripts, settings: Settings) -> None:
        self._connection = connection
        self._scripts = scripts
        self._debounce = settings.touch_debounce_seconds * 1000
        self._key = keys.Keys(settings.namespace)

    def heartbeat(self, id: str, holder: str, timeout_ms: int) -> int:  # noqa: A002
        """`holder` works in the workspace and will be missed after `timeout_ms`; returns when that is, ms of Redis TIME.

        A sign of life too (signal ``heartbeat``). In a stopped or stranded workspace it counts and changes no state; `beat` says
        which it is in. Raises `InvalidParams`, `NotFound`, `Gone`, `Busy` (more than 256 are there), `Unavailable`.
        """
        return self.beat(id, holder, timeout_ms).until

    def beat(self, id: str, holder: str, timeout_ms: int, signal: Signal = "heartbeat") -> Beat:  # noqa: A002
        """`heartbeat`, and the state of the workspace. `signal` ``lease`` names the sign of life of an activity lease."""
        if isinstance(timeout_ms, bool) or not isinstance(timeout_ms, int) or not LEAST_MS <= timeout_ms <= MOST_MS:
            raise InvalidParams(f"a heartbeat lasts from {LEAST_MS} ms to 7 days, not {timeout_ms!r} ms")
        status, answer, *state = self._say(id, "heartbeat", holder, timeout_ms, signal)
        if status == "full":
            raise Busy(what=f"workspace {id}", reason=f"{MAX_HOLDERS} holders are present already")
        return Beat(int(answer), *state)

    def goodbye(self, id: str, holder: str, signal: Signal = "heartbeat") -> bool:  # noqa: A002
        """`holder` leaves in order: nobody will miss it. False when it was not there, or the workspace is not (any more)."""
        status, answer, *_ = self._say(id, "goodbye", holder, 0, signal)
        return bool(status == "ok" and answer == 1)

    def _say(self, id: str, verb: str, holder: str, timeout_ms: int, signal: Signal) -> list[Any]:  # noqa: A002
        if not isinstance(holder, str) or not 0 < len(holder) <= MAX_HOLDER_LENGTH or not holder.isprintable():
            raise InvalidParams(f"a holder is a name of 1-{MAX_HOLDER_LENGTH} printable characters")
        answer: list[Any] = self._scripts.run(
            "presence", keys.workspace_id(id), verb, holder, timeout_ms, self._debounce, MAX_HOLDERS, signal
        )
        if answer[0] in {"gone", "not_found"} and verb == "heartbeat":
            raise missing(answer[0], id, answer[1])
        return answer

    def holders(self, id: str) -> dict[str, int]:  # noqa: A002
        """Who is or was last present, with the end of each in ms of Redis TIME; one that lies in the past is missed."""
        with self._connection.guard() as client:
            found = client.zrange(self._key("presence", keys.workspace_id(id)), 0, -1, withscores=True)
        return {name: int(end) for name, end in found}
