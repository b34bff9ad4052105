"""The life of a workspace in the registry: what a decision needs to know, and the effects of decisions.

Every effect is one script. It compares what the decision saw, does the one thing with one counter and one event, or says that
something changed meanwhile and does nothing. Times are ms of Redis TIME.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from mothball.errors import Busy, InvalidParams, InvalidTransition, MothballError, NotFound
from mothball.policy import Facts
from mothball.registry import encode, keys
from mothball.registry.checks import MAX_TEXT
from mothball.registry.connection import Connection
from mothball.registry.facts import flat
from mothball.registry.scripts import Scripts, pairs
from mothball.registry.walks import Walks
from mothball.registry.workspaces import Workspace, decode, held_by, missing
from mothball.settings import Settings

Outcome = Literal["done", "changed", "busy", "gone"]
"""What came of an effect. `changed`: the record is not as it was seen, or its lease was lost; `busy`: a job works on it."""
Resumed = Literal["ok", "contended", "other_agent", "already_resumed", "abandoned", "not_stranded"]
MAX_HOLDS = 50
MAX_EVIDENCE = 4096
UNDELETED_FOR_MS = 86_400_000
"""For how long nothing that depends on time reclaims a workspace that was brought back."""
_MAX_MS = 10**13
_ASKED = ("active", "submitted", "merged")


class ResumeResult(msgspec.Struct, frozen=True):
    """What came of a resume (D-73), and the record as it is now.

    ``ok``; ``contended`` (a job is stopping or purging it, or it is not at the expected generation); ``other_agent`` (stranded,
    and not the asker's); ``already_resumed``; ``abandoned``; ``not_stranded`` (there is nothing to come back from).
    """

    outcome: Resumed
    workspace: Workspace
    job: str = ""
    """The job that must end first."""


class Lifecycle(Walks):
    """Reads what decisions rest on, and carries them out."""

    def __init__(self, connection: Connection, scripts: Scripts, settings: Settings) -> None:
        super().__init__(connection, settings)
        self._scripts = scripts
        self._tombstone_ms = settings.tombstone_seconds * 1000

    def rescore(self, kind: str, items: Sequence[tuple[str, int, int | None]], *, version: int | None = None) -> int:
        """When the sweeps look again: (id, score as read, ms of the next look; None: not by time alone).

        One that was marked meanwhile keeps its mark, and all keep their scores when the policies are not those of `version`
        (`PolicyBook.version`) any more. Returns how many were as read.
        """
        done = 0
        for start in range(0, len(items), 500):
            args = [part for each, seen, at in items[start : start + 500] for part in (each, seen, "" if at is None else at)]
            done += int(self._scripts.run("rescore", _kind(kind), "" if version is None else version, *args)) if args else 0
        return done

    # -- effects of decisions ---------------------------------------------------------------------------------------

    def evict(
        self,
        facts: Facts,
        *,
        rule: str,
        detail: str = "",
        by: str = "policy",
        receipt: Mapping[str, Any] | None = None,
        force: bool = False,
        fence: tuple[str, int] | None = None,
        above: tuple[Literal["cap", "budget"], int, str | None] | None = None,
    ) -> Outcome:
        """Turn the record into a tombstone; captures stay for `undelete`, the directory is not touched.

        `force` is a person's: pin, presence and queued jobs do not prevent it. A hold, another job's lease and a state that is
        never evicted do, always: `Busy` and `InvalidTransition` then say so; without `force` that is ``changed``. `fence` is the
        job that asks, with its fence; its run goes on and ends as usual. `receipt` of a purge stays with the tombstone. `above`:
        only while more than so many workspaces (of a repo; None: of the fleet) or bytes are there, else ``changed``.
        """
        job, number = fence or ("", 0)
        limit = ("", "", "") if above is None else (above[0], above[1], above[2] or "")
        text = encode.dumps(dict(receipt), "receipt", encode.MAX_DOCUMENT_BYTES) if receipt else ""
        status, *answer = self._scripts.run(
            "evict", keys.workspace_id(facts.id), keys.word(rule, "rule"), detail[:MAX_TEXT], by[:MAX_TEXT], text,
            "1" if force else "", job, number, self._tombstone_ms, facts.registration, *limit, *flat(facts.seen),
        )  # fmt: skip
        if status == "held":
            raise Busy(what=f"workspace {facts.id}", reason=held_by(answer[0]))
        if status == "state":
            raise InvalidTransition(id=facts.id, state=answer[0], wanted="evicted")
        return _outcome(status)

    def begin_stop(self, id: str, seen: Sequence[tuple[str, str]]) -> Outcome:  # noqa: A002
        """Is the record still as it was seen? Changes nothing."""
        return _outcome(self._scripts.run("compare", keys.workspace_id(id), *flat(seen)))

    def stopped(
        self,
        id: str,  # noqa: A002
        *,
        job: str,
        fence: int,
        rule: str,
        detail: str = "",
        evidence: Mapping[str, Any] | None = None,
        seen: Sequence[tuple[str, str]] = (),
        by: str = "policy",
    ) -> Outcome:
        """An active workspace is `stopped` from now on: `job` ended its processes under `fence`. `evidence` goes into the event.

        ``done`` too when it is stopped already; ``changed`` when its record is not as `seen`, or the lease was lost.
        """
        text = json.dumps(dict(evidence or {}), default=str)[:MAX_EVIDENCE] if evidence else ""
        return self._move(id, "stopped", rule, by, detail, seen, evidence=text, job=job, fence=fence)

    def lost(self, facts: Facts, *, runtime: str, detail: str = "", evidence: Mapping[str, Any] | None = None) -> Outcome:
        """An active workspace is `stopped` from now on, reason ``lost``: its `runtime` (JSON text) is surely dead (N-34).

        ``changed`` while somebody is present, or when another runtime was registered meanwhile; ``busy`` while a job works on it.
        """
        text = json.dumps(dict(evidence or {}), default=str)[:MAX_EVIDENCE] if evidence else ""
        seen = (*facts.seen, ("runtime", runtime))
        return self._move(facts.id, "stopped", "lost", "policy", detail, seen, evidence=text, quiet="2")

    def strand(self, facts: Facts, *, reason: str, by: str = "policy", detail: str = "") -> Outcome:
        """An active workspace whose people are missing waits for their return (D-71). Who was missed is named in the event.

        ``changed`` while somebody is present or a job is queued; the first reason stays.
        """
        return self._move(facts.id, "stranded", reason, by, detail, facts.seen, quiet="1")

    def abandon(self, facts: Facts, *, reason: str, by: str = "policy", detail: str = "") -> Outcome:
        """Nobody came back to a stranded workspace (D-72): the next sweep evicts it. ``changed`` while somebody is present."""
        return self._move(facts.id, "abandoned", reason, by, detail, facts.seen, quiet="1")

    def _move(
        self,
        id: str,  # noqa: A002
        to: str,
        reason: str,
        by: str,
        detail: str,
        seen: Sequence[tuple[str, str]],
        *,
        evidence: str = "",
        job: str = "",
        fence: int = 0,
        quiet: str = "",
    ) -> Outcome:
        status, *_ = self._scripts.run(
            "transition", keys.workspace_id(id), to, keys.word(reason, "reason"), by[:MAX_TEXT], detail[:MAX_TEXT], evidence, job,
            fence, quiet, *flat(seen),
        )  # fmt: skip
        if status == "same":
            return "done" if job else "changed"
        return _outcome("changed" if status == "state" else "gone" if status == "not_found" else status)

    # -- what people and producers ask for --------------------------------------------------------------------------

    def transition(self, id: str, to: str, *, by: str = "", reason: str = "") -> Workspace:  # noqa: A002
        """Submit a workspace's work (active to ``submitted``), withdraw it (back to ``active``) or note it as ``merged`` (D-03).

        The state it is in already changes nothing. Raises `InvalidTransition` for every other way, `NotFound`, `Gone`.
        """
        ident = keys.workspace_id(id)
        if to in _ASKED:
            seen = ["state", "submitted"] if to == "active" else []  # any other way to active is a resume
            status, answer = self._scripts.run("transition", ident, to, reason[:MAX_TEXT], by[:MAX_TEXT], "", "", "", 0, "", *seen)
            if status in {"done", "same"}:
                return decode(pairs(answer))
            if status in {"gone", "not_found"}:
                raise missing(status, id, answer)
        facts = self.facts([ident])[0]
        if facts is None:
            raise NotFound(what="workspace", id=id)
        raise InvalidTransition(id=id, state=facts.state, wanted=to)

    def resume(
        self,
        id: str,  # noqa: A002
        *,
        agent_id: str | None = None,
        by: str = "",
        expect_generation: int | None = None,
    ) -> ResumeResult:
        """Bring a stopped or stranded workspace back to work (D-73); a stranded one only for its own agent.

        The outcome says what came of it, and is counted. Raises `NotFound`, `Gone`, `InvalidParams`.
        """
        generation = "" if expect_generation is None else str(expect_generation)
        status, *answer = self._scripts.run("resume", keys.workspace_id(id), agent_id or "", by[:MAX_TEXT], generation)
        if status in {"gone", "not_found"}:
            raise missing(status, id, answer[0])
        return ResumeResult(status, decode(pairs(answer[0])), answer[1])

    def hold(self, id: str, reason: str, by: str = "") -> Workspace:  # noqa: A002
        """A person's veto against any reclaim. The same reason of the same person again is the same hold.

        Raises `InvalidParams` without a reason, `Busy` beyond 50 holds, `NotFound`, `Gone`.
        """
        if not reason.strip():
            raise InvalidParams("a hold needs a reason: somebody will ask why this workspace stays")
        return self._hold(id, "hold", reason, by)

    def unhold(self, id: str, hold: str | None = None, by: str = "") -> Workspace:  # noqa: A002
        """End the hold with the id `hold`, or all of them. Raises `NotFound` for an unknown hold or workspace, `Gone`."""
        return self._hold(id, "unhold", hold or "", by)

    def _hold(self, id: str, verb: str, text: str, by: str) -> Workspace:  # noqa: A002
        for name, value in (("reason", text), ("by", by)):
            if len(value) > MAX_TEXT or not value.isprintable():
                raise InvalidParams(f"{name} must be printable, at most {MAX_TEXT} characters")
        status, answer = self._scripts.run("hold", keys.workspace_id(id), verb, text, by, MAX_HOLDS)
        if status == "unknown":
            raise NotFound(f"workspace {id} has no hold {text!r}; `mothball show` lists them", what="hold", id=text)
        if status == "full":
            raise Busy(what=f"workspace {id}", reason=f"it has {MAX_HOLDS} holds already")
        if status != "ok":
            raise missing(status, id, answer)
        return decode(pairs(answer))

    def undelete(self, id: str, by: str = "") -> Workspace:  # noqa: A002
        """Bring a released or evicted workspace back while its tombstone stands, as `stopped`, under a fence of its own.

        For a day nothing that depends on time reclaims it. Raises `InvalidTransition` when the id was registered again since,
        `NotFound` when there is no tombstone.
        """
        status, answer = self._scripts.run("undelete", keys.workspace_id(id), by[:MAX_TEXT], UNDELETED_FOR_MS)
        if status == "exists":
            record = decode(pairs(answer))
            raise InvalidTransition(
                f"workspace {id} is registered ({record.state}, at {record.path}): there is nothing to bring back",
                id=id, state=record.state, wanted="stopped",
            )  # fmt: skip
        if status == "bare":
            raise InvalidTransition(
                f"workspace {id} was released by an older version, which kept too little to bring it back; register it again",
                id=id, state="gone", wanted="stopped",
            )  # fmt: skip
        if status != "ok":
            raise NotFound(what="tombstone of workspace", id=id)
        return decode(pairs(answer))

    def tombstone(self, id: str) -> dict[str, Any] | None:  # noqa: A002
        """What is known of a workspace that is gone, None when it is registered or nobody remembers it.

        ``reason, detail, by, at, until`` (ms), ``digest, generation, fence, receipt`` (None without a purge), and its ``record``.
        """
        left, found = self._scripts.run("tombstone", keys.workspace_id(id))
        if not found:
            return None
        raw = pairs(found)
        record = {name.removeprefix("r:"): value for name, value in raw.items() if name.startswith("r:")}
        at = int(raw.get("at", "0"))
        return {
            "id": id, "reason": raw.get("reason", ""), "detail": raw.get("detail", ""), "by": raw.get("by", ""), "at": at,
            "until": self._connection.time_ms() + max(int(left), 0), "digest": raw.get("digest") or None,
            "generation": int(raw.get("generation", "0")), "fence": int(raw.get("fence", "0")),
            "receipt": encode.loads(raw.get("receipt")), "record": decode(record).to_dict() if "host" in record else None,
        }  # fmt: skip

    # -- notices ----------------------------------------------------------------------------------------------------

    def noticed(self, facts: Facts, action: str, at: int, *, rule: str = "", detail: str = "") -> bool:
        """Announce that `action` (``evict`` or ``stop``) is due `at` ms: an event, once. True for exactly one caller."""
        args = (keys.workspace_id(facts.id), _kind(action), at, rule, detail[:MAX_TEXT])
        return bool(self._scripts.run("notice", *args, *flat(facts.seen)) == 1)

    def extend(self, facts: Facts, until: int, by: str = "", most: int = 3) -> bool:
        """Nothing that depends on time reclaims the workspace before `until`; at most `most` times in its life.

        False when that says nothing new, when there were that many already, or when the record was extended or moved meanwhile.
        """
        if not 0 < until < _MAX_MS:
            raise InvalidParams(f"until {until!r} is no time in ms")
        names = {"registration", "state", "extended_until"}
        seen = [pair for pair in facts.seen if pair[0] in names]
        return bool(self._scripts.run("extend", keys.workspace_id(facts.id), until, by[:MAX_TEXT], most, *flat(seen)) == "done")

    def cleanup_disconnected(
        self,
        active_ids: Sequence[str],
        *,
        as_of: int,
        host: str | None = None,
        repo: str | None = None,
        by: str = "",
        force: bool = False,
    ) -> dict[str, Any]:
        """Strand the active ephemeral workspaces (of `host`, of `repo`) that a complete list of live ones does not name (D-16).

        `as_of` is when the list was complete, ms of Redis TIME: who was registered or gave a sign of life since is left alone.
        Pinned, held, leased and queued ones stay, and so do persistent ones. Refused as `InvalidParams`, before any change: an
        empty list (unless `force`), one with an id that is not registered there, one that leaves out a workspace in which somebody
        is present, one of a time that lies ahead or is over. Returns ``{stranded: [ids], kept: {reason: n}}``.
        """
        from mothball.registry.disconnected import check_list, verdict

        now = self._connection.time_ms()
        live = check_list(active_ids, as_of, now, force=force)
        found = dict(self.scope(host=host, repo=repo))
        unknown = sorted(live - found.keys())
        if unknown:
            raise InvalidParams(f"the list names what is not registered there: {', '.join(unknown[:5])} ({len(unknown)} in all)")
        known = [each for each in found.values() if isinstance(each, Facts)]
        verdicts = [(each, verdict(each, live, as_of, now)) for each in known]
        partial = [each.id for each, reason in verdicts if reason == "present"]
        if partial:
            names = f"{', '.join(partial[:5])} ({len(partial)} in all)"
            raise InvalidParams(f"the list is not complete: somebody is present in {names}; nothing was changed")
        out: dict[str, Any] = {"stranded": [], "kept": {"unreadable": len(found) - len(known)} if len(found) > len(known) else {}}
        for each, reason in verdicts:
            kept = reason
            if not reason:
                try:
                    kept = self.strand(each, reason="cleanup_disconnected", by=by)
                except MothballError as error:
                    kept = error.code
            if kept == "done":
                out["stranded"].append(each.id)
            else:
                out["kept"][kept] = out["kept"].get(kept, 0) + 1
        return out


def _outcome(status: str) -> Outcome:
    if status not in {"done", "changed", "busy", "gone"}:
        raise AssertionError(f"a script answered {status}")
    return status  # type: ignore[return-value]


def _kind(kind: str) -> str:
    if kind not in {"evict", "stop"}:
        raise InvalidParams(f"kind {kind!r}: use evict or stop")
    return kind
