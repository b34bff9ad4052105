"""What a decision may know of a workspace, read in one go: its record, its lease, its queued jobs and who works in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mothball.policy import SIGNALS, Facts
from mothball.registry import keys
from mothball.registry.connection import Connection
from mothball.registry.workspaces import SIGNAL, decode

COMPARED = (
    "registration", "state", "mode", "created_at", "last_active", "last_signal", "state_since", "expires_at", "extended_until",
    "pinned", "holds", "policy", "generation", "noticed", "unknown", "runtime",
    *(f"{SIGNAL}{name}" for name in (*SIGNALS, "resume")),
)  # fmt: skip
"""Fields that a decision rests on: an effect compares them with what was seen, and does nothing when one has changed."""
PRESENT = "@present"
"""Stands among what was seen for the latest end of a presence; lua/state.lua compares it with the list of presence."""
HOST_GONE_MS = 3_600_000
"""Silence after which a job that waits for a host no longer keeps its workspace; lua/state.lua says the same."""
_BATCH = 500
_PARTS = 6


def read_facts(connection: Connection, key: keys.Keys, ids: Sequence[str], job: str = "") -> list[Facts | None]:
    """The facts of each of `ids`, None for one without a record. The lease of `job` counts as none: it is the asker's own.

    Redis answers a batch in one round trip but not at one moment; whatever comes of these facts is compared again by the script
    that has the effect.
    """
    out: list[Facts | None] = []
    for start in range(0, len(ids), _BATCH):
        batch = ids[start : start + _BATCH]
        with connection.guard() as client:
            pipe = client.pipeline(transaction=False)
            pipe.time()
            for each in batch:
                pipe.hgetall(key("ws", each))
                pipe.hget(key("lease", each), "job")
                pipe.pttl(key("lease", each))
                pipe.zrange(key("presence", each), -1, -1, withscores=True)
                pipe.zinter([key("jobs", "ws", each), key("jobs", "queued")])
                pipe.zinter([key("jobs", "ws", each), key("jobs", "due")])
            (seconds, micros), *answers = pipe.execute()
        now = int(seconds) * 1000 + int(micros) // 1000
        parts = [answers[n * _PARTS : (n + 1) * _PARTS] for n in range(len(batch))]
        gone = _gone(connection, key, {raw.get("host", "") for raw, *_, queued, due in parts if queued or due}, now)
        for raw, *rest in parts:
            out.append(_facts(raw, rest, now, job, gone) if raw else None)
    return out


def _gone(connection: Connection, key: keys.Keys, hosts: set[str], now: int) -> set[str]:
    """Those of `hosts` that were not heard for so long that jobs which wait for them keep nothing."""
    if not hosts:
        return set()
    names = sorted(hosts)
    with connection.guard() as client:
        heard = client.zmscore(key("hosts", "offline"), names)
    return {name for name, at in zip(names, heard, strict=True) if at is not None and now - at > HOST_GONE_MS}


def _facts(raw: dict[str, str], rest: list[Any], now: int, own: str, gone: set[str]) -> Facts:
    lease_job, lease_ms, present, queued, retries = rest
    record = decode(raw)
    until = int(present[0][1]) if present else None
    leased = lease_ms > 0 and lease_job != own
    return Facts(
        id=record.id,
        host=record.host,
        repo=record.repo,
        registration=record.registration,
        state=record.state,
        mode=record.mode,
        created_at=record.created_at,
        last_active=record.last_active,
        last_signal=record.last_signal,
        state_since=record.state_since,
        state_reason=record.state_reason,
        expires_at=record.expires_at,
        extended_until=record.extended_until,
        extensions=record.extensions,
        noticed=record.noticed,
        pinned=record.pinned,
        pin_reason=record.pin_reason,
        holds=record.holds,
        lease_until=now + lease_ms if leased else None,
        lease_job=(lease_job or "") if leased else "",
        queued=0 if record.host in gone else len(queued) + len(retries),
        present_until=until,
        present_by=present[0][0] if present else "",
        driver=str(record.runtime.get("driver", "none")),
        generation=record.generation,
        digest=record.digest,
        stored_bytes=record.stored_bytes,
        signals=record.signals,
        policy=record.policy,
        unknown=tuple(record.unknown),
        seen=(*((name, raw.get(name, "")) for name in COMPARED), (PRESENT, "" if until is None else str(until))),
    )


def flat(seen: Sequence[tuple[str, str]]) -> list[str]:
    """What was seen as the arguments of a script: fields and values in turn."""
    return [text for pair in seen for text in pair]
