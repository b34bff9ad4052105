"""Workspaces: records of directories on hosts, and what keeps them alive."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import msgspec

from mothball.errors import Abandoned, AlreadyExists, Busy, Gone, InvalidParams, NotFound, ResumeContended, Stranded
from mothball.names import check_host
from mothball.registry import encode, keys
from mothball.registry.checks import MAX_TEXT, check_path, check_whole, checked_policy, checked_runtime, document
from mothball.registry.connection import Connection
from mothball.registry.scripts import Scripts, pairs
from mothball.settings import Settings

DERIVED = re.compile(r"([^#]+/[^#]+)#([0-9]{1,18})\Z")
SIGNAL = "sig:"
"""Prefix of the fields that hold the last time of a sign of life."""
_HEX64 = re.compile(r"[0-9a-f]{64}\Z")
_BATCH = 200
MODES = ("ephemeral", "persistent")


class Workspace(msgspec.Struct, frozen=True, kw_only=True):
    """A workspace's record (design, section 3). Times are ms of Redis TIME, sizes bytes."""

    id: str
    host: str
    path: str
    repo: str | None
    number: int | None
    title: str | None
    mode: str
    agent_id: str | None
    agent_name: str | None
    intent: str | None
    changeset_id: str | None
    base_commit: str | None
    state: str
    created_at: int
    last_active: int
    last_signal: str
    expires_at: int | None
    pinned: bool
    pin_reason: str
    holds: list[Any]
    fence: int
    generation: int
    digest: str | None
    bytes: int
    files: int
    high_water_bytes: int
    stored_bytes: int
    snapshots: int
    crash_reports: int
    last_good_at: int | None
    last_error: str
    retry_count: int
    runtime: dict[str, Any]
    policy: dict[str, Any]
    rebuilt_at: int | None = None
    """When the record was made again from its host's store, because Redis was lost."""
    unknown: list[str] = []
    """Fields that a rebuilt record could not get back; they have their empty values."""
    state_since: int = 0
    """When it came into its state."""
    state_reason: str = ""
    signals: dict[str, int] = {}
    """The last time of each sign of life, by name."""
    extended_until: int | None = None
    """Nothing that depends on time reclaims it before this."""
    extensions: int = 0
    noticed: dict[str, int] = {}
    """What was announced: for each action the time for which it was."""
    registration: str = ""
    """One text per life of the id: a record that was evicted and came back has another."""

    def to_dict(self) -> dict[str, Any]:
        """The record in JSON types."""
        return msgspec.structs.asdict(self)


class TouchResult(msgspec.Struct, frozen=True):
    """Whether a touch moved `last_active` (ms), and which signal set the value it has now."""

    moved: bool
    last_active: int
    signal: str


def _optional(text: str | None) -> str | None:
    return text or None


def _digest(text: str | None) -> str | None:
    """A digest from its form in the record (lua/common.lua says why it has one of its own)."""
    return f"sha256:{text}" if text and _HEX64.match(text) else text or None


def _whole(text: str | None) -> int | None:
    return int(text) if text else None


def decode(record: dict[str, str]) -> Workspace:
    """The HASH of a workspace as a record; a field an older version did not write has its empty value."""
    get = record.get
    return Workspace(
        id=record["id"],
        host=record["host"],
        path=record["path"],
        repo=_optional(get("repo")),
        number=_whole(get("number")),
        title=_optional(get("title")),
        mode=get("mode", "ephemeral"),
        agent_id=_optional(get("agent_id")),
        agent_name=_optional(get("agent_name")),
        intent=_optional(get("intent")),
        changeset_id=_optional(get("changeset_id")),
        base_commit=_optional(get("base_commit")),
        state=get("state", "active"),
        created_at=int(get("created_at", "0")),
        last_active=int(get("last_active", "0")),
        last_signal=get("last_signal", ""),
        expires_at=_whole(get("expires_at")),
        pinned=get("pinned") == "1",
        pin_reason=get("pin_reason", ""),
        holds=encode.loads(get("holds")) or [],
        fence=int(get("fence", "0")),
        generation=int(get("generation", "0")),
        digest=_digest(get("digest")),
        bytes=int(get("bytes", "0")),
        files=int(get("files", "0")),
        high_water_bytes=int(get("high_water_bytes", "0")),
        stored_bytes=int(get("stored_bytes", "0")),
        snapshots=int(get("snapshots", "0")),
        crash_reports=int(get("crash_reports", "0")),
        last_good_at=_whole(get("last_good_at")),
        last_error=get("last_error", ""),
        retry_count=int(get("retry_count", "0")),
        runtime=encode.loads(get("runtime")) or {},
        policy=encode.loads(get("policy")) or {},
        rebuilt_at=_whole(get("rebuilt_at")),
        unknown=encode.loads(get("unknown")) or [],
        state_since=int(get("state_since") or get("created_at", "0")),
        state_reason=get("state_reason", ""),
        signals={name.removeprefix(SIGNAL): int(at) for name, at in record.items() if name.startswith(SIGNAL)},
        extended_until=_whole(get("extended_until")),
        extensions=int(get("extensions", "0")),
        noticed=encode.loads(get("noticed")) or {},
        registration=get("registration", ""),
    )


class Workspaces:
    """The workspaces of the fleet."""

    def __init__(self, connection: Connection, scripts: Scripts, settings: Settings) -> None:
        self._connection = connection
        self._scripts = scripts
        self._settings = settings
        self._key = keys.Keys(settings.namespace)

    def register(
        self,
        id: str,  # noqa: A002 - the record's own name for it
        *,
        host: str,
        path: str,
        repo: str | None = None,
        number: int | None = None,
        title: str | None = None,
        mode: Literal["ephemeral", "persistent"] = "ephemeral",
        agent_id: str | None = None,
        agent_name: str | None = None,
        intent: str | None = None,
        changeset_id: str | None = None,
        base_commit: str | None = None,
        expires_in_ms: int | None = None,
        pinned: bool = False,
        runtime: dict[str, Any] | None = None,
        policy: dict[str, Any] | None = None,
    ) -> tuple[Workspace, bool]:
        """Make the record, or find the same one: (record, created).

        Same id, host and path is the same record, unchanged but for the `runtime` that is given now; registering is a sign of
        life. One that was stopped or stranded comes back to work: a stranded one only for its own `agent_id`, else `Stranded`;
        an abandoned one never, `Abandoned`; one that a job is stopping or purging right now is `ResumeContended`. Another host
        or path raises `AlreadyExists`. Without `repo` it and `number` follow from an id like ``owner/name#12`` (B-06); without
        `agent_name` a workspace of a repo gets the
        next free ``agent-N`` (D-05). After a release or an eviction, fence and generation go on from the tombstone.
        `expires_in_ms` sets the deadline, ms from now. Raises `InvalidParams`, `AlreadyExists`, `Unavailable`.
        """
        id = keys.workspace_id(id)  # noqa: A001
        check_host(host)
        check_path(path)
        if repo is None and (derived := DERIVED.match(id)):
            repo = derived[1]
            number = int(derived[2]) if number is None else number
        if repo is not None:
            keys.repo_name(repo)
        if mode not in MODES:
            raise InvalidParams(f"mode {mode!r}: use one of {', '.join(MODES)}")
        check_whole("number", number, 0)
        check_whole("expires_in_ms", expires_in_ms, 1)
        texts = {
            "title": title, "agent_id": agent_id, "agent_name": agent_name, "intent": intent, "changeset_id": changeset_id,
            "base_commit": base_commit,
        }  # fmt: skip
        for name, value in texts.items():
            if value is not None and (not isinstance(value, str) or len(value) > MAX_TEXT):
                raise InvalidParams(f"{name} must be a text of at most {MAX_TEXT} characters")
        del texts["agent_name"], texts["agent_id"]
        fields: dict[str, str | None] = dict(texts)
        fields |= {
            "number": "" if number is None else str(number),
            "mode": mode,
            "pinned": "1" if pinned else "",
            "policy": document(checked_policy(policy), "policy"),
            "stored_bytes": "0",
        }
        answer = self._scripts.run(
            "register", id, host, path, repo or "", agent_name or "", "" if expires_in_ms is None else expires_in_ms,
            agent_id or "", document(checked_runtime(runtime), "runtime"), agent_id or "",
            self._settings.touch_debounce_seconds * 1000,
            *(text for name, value in fields.items() if value for text in (name, value)),
        )  # fmt: skip
        status, record = answer[0], decode(pairs(answer[1]))
        if status == "other":
            raise AlreadyExists(id=id, path=record.path, host=record.host)
        if status == "stranded":
            raise Stranded(id=id, reason=record.state_reason, agent=record.agent_id or "nobody")
        if status == "abandoned":
            raise Abandoned(id=id, reason=record.state_reason)
        if status == "contended":
            raise ResumeContended(id=id, reason=f"job {answer[2]} is ending it", job=answer[2])
        return record, status == "created"

    def get(self, id: str) -> Workspace:  # noqa: A002
        """The record; raises `NotFound`, or `Gone` with the reason while the tombstone stands."""
        status, answer = self._scripts.run("get_workspace", keys.workspace_id(id))
        if status != "ok":
            raise missing(status, id, answer)
        return decode(pairs(answer))

    def _pages(self, client: Any, repo: str | None, host: str | None, size: int) -> Iterator[list[str]]:
        """Ids, oldest first, `size` at a time: no more are read than the caller asks for."""
        sets = [self._key("ws", "repo", keys.repo_name(repo))] if repo is not None else []
        sets += [self._key("ws", "host", check_host(host))] if host is not None else []
        created = self._key("ws", "by", "created")
        if sets:
            members = list(client.sinter(sets))
            ages = client.zmscore(created, members) if members else []
            ids = [each for _, each in sorted((age, each) for age, each in zip(ages, members, strict=True) if age is not None)]
            yield from (ids[start : start + size] for start in range(0, len(ids), size))
            return
        start = 0
        while page := client.zrange(created, start, start + size - 1):
            yield page
            start += size

    def list(
        self, *, repo: str | None = None, host: str | None = None, state: str | None = None, limit: int = 1000
    ) -> list[Workspace]:
        """At most `limit` records, oldest first (created_at, then id; D-14). Reads indexes, never the keyspace."""
        if limit <= 0:
            return []
        found: list[Workspace] = []
        size = _BATCH if state is not None else min(_BATCH, limit)
        with self._connection.guard() as client:
            for page in self._pages(client, repo, host, size):
                pipe = client.pipeline(transaction=False)
                for each in page:
                    pipe.hgetall(self._key("ws", each))
                records = [decode(record) for record in pipe.execute() if record]
                found += [record for record in records if state is None or record.state == state]
                if len(found) >= limit:
                    break
        return found[:limit]

    def count(self, repo: str | None = None) -> int:
        """How many workspaces are registered, of the fleet or of `repo`."""
        with self._connection.guard() as client:
            if repo is not None:
                return int(client.scard(self._key("ws", "repo", keys.repo_name(repo))))
            return int(client.zcard(self._key("ws", "by", "created")))

    def touch(self, id: str, signal: str = "touch") -> TouchResult:  # noqa: A002
        """A sign of life, named by `signal`; moves `last_active` when strictly more than the debounce passed (D-06).

        Raises `NotFound`, `Gone`.
        """
        answer = self._scripts.run(
            "touch", keys.workspace_id(id), keys.word(signal, "signal"), self._settings.touch_debounce_seconds * 1000
        )
        if answer[0] != "ok":
            raise missing(answer[0], id, answer[1])
        return TouchResult(moved=answer[1] == 1, last_active=int(answer[2]), signal=answer[3])

    def pin(self, id: str, reason: str = "", by: str = "") -> Workspace:  # noqa: A002
        """Exempt the workspace from eviction; it still counts in the budget (Q-08). Raises `NotFound`, `Gone`."""
        return self._pin(id, "1", reason, by)

    def unpin(self, id: str, reason: str = "", by: str = "") -> Workspace:  # noqa: A002
        """Undo `pin`. Raises `NotFound`, `Gone`."""
        return self._pin(id, "0", reason, by)

    def _pin(self, id: str, pinned: str, reason: str, by: str) -> Workspace:  # noqa: A002
        if len(reason) > MAX_TEXT or len(by) > MAX_TEXT:
            raise InvalidParams(f"reason and by have at most {MAX_TEXT} characters")
        status, answer = self._scripts.run("pin", keys.workspace_id(id), pinned, reason, by)
        if status != "ok":
            raise missing(status, id, answer)
        return decode(pairs(answer))

    def release(self, id: str, by: str = "") -> bool:  # noqa: A002
        """Forget the workspace and leave a tombstone; nothing on disk is touched.

        Idempotent: False for an unknown or released id (B-42). A live lease raises `Busy`, and so does a hold.
        """
        answer = self._scripts.run("release", keys.workspace_id(id), by[:MAX_TEXT], self._settings.tombstone_seconds * 1000)
        if answer[0] == "busy":
            raise Busy(what=f"workspace {id}", reason=f"job {answer[1]} is working on it", job=answer[1])
        if answer[0] == "held":
            raise Busy(what=f"workspace {id}", reason=held_by(answer[1]))
        return bool(answer[0] == "released")

    def note_snapshots(
        self,
        id: str,  # noqa: A002
        host: str,
        count: int,
        *,
        made: str = "",
        digest: str = "",
        job: str = "",
        forgotten: Sequence[str] = (),
        reason: str = "",
    ) -> bool:
        """Note that `id` has `count` snapshots on `host`, that `made` is new, and that those of `forgotten` went for `reason`.

        Counters and events come with it; a new snapshot counts once however often it is noted. False, and no effect, when the
        workspace is not registered on that host any more.
        """
        names = [name for name in forgotten if name]
        answer = self._scripts.run(
            "note_snapshots", keys.workspace_id(id), check_host(host), count, made, digest, job, reason[:MAX_TEXT], *names
        )
        return bool(answer[0] == "ok")

    def latest_of_repo(self, repo: str, host: str, exclude: str = "") -> str | None:
        """Id of the workspace of `repo` on `host` that was captured last, other than `exclude`; None when there is none."""
        with self._connection.guard() as client:
            newest = client.zrange(self._key("ws", "good", check_host(host), keys.repo_name(repo)), 0, 1, desc=True)
        return next((each for each in newest if each != exclude), None)


def held_by(holds: str) -> str:
    """Who holds a workspace and why, for people; `holds` as they stand in the record."""
    said = [f"{hold.get('by') or 'somebody'} ({hold.get('reason') or 'no reason given'})" for hold in encode.loads(holds) or []]
    return f"held by {', '.join(said)}; `mothball unhold` lifts it"


def missing(code: str, id: str, reason: str) -> NotFound | Gone:  # noqa: A002
    """The error for a workspace that a script did not find."""
    return Gone(id=id, reason=reason) if code == "gone" else NotFound(what="workspace", id=id)
