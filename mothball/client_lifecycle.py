"""The producers' API about a workspace's life: presence, hold, stop, resume, evict, purge, and what reclaims it when and why."""

from __future__ import annotations

import os
import uuid
from typing import TYPE_CHECKING, Any

from mothball import errors
from mothball.client_base import Connected
from mothball.handles import JobHandle
from mothball.names import check_workspace_id

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mothball.explain import Explanation
    from mothball.presence import Active
    from mothball.reclaim import Plan, Reclaimer
    from mothball.registry import Registry, Workspace
    from mothball.registry.lifecycle import ResumeResult

SHOWN_STATES = ("active", "submitted", "merged")
_TRIES = 10
"""How often a change is tried again when others were quicker between the look and the act."""


class LifecycleCalls(Connected):
    """See `mothball.client.Fleet`, which inherits all of it."""

    # -- presence ---------------------------------------------------------------------------------------------------

    def active(self, workspace: str, *, holder: str | None = None, timeout: float = 60.0) -> Active:
        """A context manager: while it is open the workspace is in use, then a goodbye is said.

        A thread sends three heartbeats per `timeout` seconds (1 to 86400). When they end without goodbye, the workspace is
        stranded. `holder` names who works there; several may, and each needs a name of its own (the default is one).
        Entering raises `NotFound`, `Gone`, `Unavailable`; an outage of Redis later is survived.
        """
        from mothball.presence import Active

        check_workspace_id(workspace)
        name = holder if holder is not None else f"{self.settings.host}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        return Active(self._connection, workspace, name, timeout)

    def _connection(self) -> Registry:
        from mothball.registry import Registry

        return Registry.connect(self.settings)

    def heartbeat(self, workspace: str, holder: str, timeout: float = 60.0) -> int:
        """Say that `holder` works there for the next `timeout` seconds; the end in ms of Redis TIME. `active` does it for you."""
        return self.registry.presence.heartbeat(check_workspace_id(workspace), holder, int(timeout * 1000))

    def goodbye(self, workspace: str, holder: str) -> bool:
        """Say that `holder` has left in order; True when he was there. Without it a workspace that falls silent is stranded."""
        return self.registry.presence.goodbye(check_workspace_id(workspace), holder)

    def sessions(self, repo: str, *, exclude: str | None = None) -> list[dict[str, Any]]:
        """The sessions of `repo` (D-01): eight keys each, sorted by creation, then id; `exclude` leaves one id out."""
        return self.registry.sessions.list(repo, exclude=exclude)

    # -- what a person or an agent asks for -------------------------------------------------------------------------

    def hold(self, workspace: str, reason: str, by: str = "") -> Workspace:
        """Veto every reclaim of the workspace until the hold is lifted: no stop, no eviction, no purge, no retention."""
        if not reason.strip():
            raise errors.InvalidParams("a hold needs a reason: somebody will ask why this workspace stays")
        return self.registry.lifecycle.hold(check_workspace_id(workspace), reason, by)

    def unhold(self, workspace: str, hold: str | None = None, by: str = "") -> Workspace:
        """Lift the hold of id `hold`, or all of them."""
        return self.registry.lifecycle.unhold(check_workspace_id(workspace), hold, by)

    def mark(self, workspace: str, state: str, *, by: str = "", reason: str = "") -> Workspace:
        """Move the workspace to ``submitted`` (never evicted), ``merged`` or back to ``active``; else `InvalidTransition`."""
        if state not in SHOWN_STATES:
            raise errors.InvalidParams(
                f"state must be one of {', '.join(SHOWN_STATES)}, not {state!r}; stop, resume and evict have calls of their own"
            )
        return self.registry.lifecycle.transition(check_workspace_id(workspace), state, by=by, reason=reason)

    def stop(self, workspace: str, *, force: bool = False, by: str = "", reason: str = "") -> JobHandle[dict[str, Any]]:
        """Ask the workspace's host to stop it: evidence, a last capture, its processes ended, state ``stopped``.

        Refused (`busy`) while somebody works there, unless `force`; a hold refuses always. A capture that fails stops nothing.
        """
        record = self.registry.workspaces.get(check_workspace_id(workspace))
        args = {
            "workspace": workspace, "rule": "asked", "detail": reason, "by": by, "force": force, "generation": record.generation,
            "last_active": record.last_active,
        }  # fmt: skip
        return JobHandle(self, self.submit("workspace.stop", args, workspace=workspace).job.id, dict)

    def resume(self, workspace: str, *, agent_id: str | None = None, by: str = "") -> ResumeResult:
        """Bring a stopped or stranded workspace back to ``active`` (D-73); the outcome says what came of it.

        A stranded one only for the agent id it was registered with.
        """
        return self.registry.lifecycle.resume(check_workspace_id(workspace), agent_id=agent_id, by=by)

    def evict(self, workspace: str, *, force: bool = False, by: str = "", reason: str = "") -> None:
        """Drop the record now and leave a tombstone; directory and captures stay, and `undelete_workspace` brings it back.

        Refused with `Busy` while it is held, pinned, submitted, in use, or active with a runtime (`stop` it first); `force` never
        overrules a hold, a job's lease or the state.
        Raises `NotFound`, `Gone`.
        """
        from mothball import policy
        from mothball.reclaim import stops_first

        lifecycle = self.registry.lifecycle
        book = self.registry.policies.book()
        for _ in range(_TRIES):
            facts = lifecycle.facts([check_workspace_id(workspace)])[0]
            if facts is None:
                self.registry.workspaces.get(workspace)  # says whether it is unknown or gone, and why
                continue
            decision = policy.decide(facts, book.of(facts), self.registry.time_ms())
            if decision.action == "keep" and (veto := _veto(decision.rule, force=force)):
                raise errors.Busy(what=f"workspace {workspace}", reason=f"{decision.detail}; {veto}")
            if not force and stops_first(facts):
                reason = "its processes may run, and nobody would know of them; `mothball stop` it first, or --force"
                raise errors.Busy(what=f"workspace {workspace}", reason=reason)
            answer = lifecycle.evict(facts, rule="asked", detail=reason or "somebody asked", by=by, force=True)
            if answer == "done":
                return
            if answer == "busy":
                break
        raise errors.Busy(
            what=f"workspace {workspace}", reason="a job works on it, or others change it all the time; `mothball jobs`"
        )

    def undelete_workspace(self, workspace: str, *, by: str = "") -> Workspace:
        """Bring a released or evicted workspace back while its tombstone stands; it comes back as ``stopped``.

        `NotFound` when there is no tombstone (any more), `InvalidTransition` when its id was registered again.
        """
        return self.registry.lifecycle.undelete(check_workspace_id(workspace), by)

    def purge(
        self, workspace: str, *, force: bool = False, i_know: bool = False, dry_run: bool = False, by: str = "", reason: str = ""
    ) -> JobHandle[dict[str, Any]]:
        """Ask the host to delete the directory too: only with a capture that holds all of it and was read back.

        Else the job fails and says what is missing. `force` with `i_know` deletes all the same; that is an event with who and
        what was missing. `dry_run` says what is missing and changes nothing.
        """
        if force and not i_know:
            raise errors.InvalidParams(
                "force deletes what no capture holds, for good; say i_know as well (--i-know), or look first with dry_run"
            )
        args = {
            "workspace": check_workspace_id(workspace), "force": force, "i_know": i_know, "dry_run": dry_run, "by": by,
            "rule": "asked", "detail": reason,
        }  # fmt: skip
        return JobHandle(self, self.submit("workspace.purge", args, workspace=workspace).job.id, dict)

    def cleanup_disconnected(self, active: list[str], *, as_of: int, **scope: Any) -> Any:
        """Strand the ephemeral workspaces that a complete list of `active` ids, taken at `as_of` (ms), does not name (D-16).

        Refused when the list is empty, or leaves out one whose producer is present, or names an unknown one.
        """
        return self.registry.lifecycle.cleanup_disconnected(active, as_of=as_of, **scope)

    # -- what reclaims it, when and why -----------------------------------------------------------------------------

    def explain(self, workspace: str, *, at: int | None = None) -> Explanation:
        """What would happen to the workspace, by which rule and when; `at` (ms of Redis TIME) asks for another time."""
        return self._reclaimer().explain(check_workspace_id(workspace), now=at)

    def forecast(self, at: int | None = None, *, limit: int = 1000) -> Plan:
        """What the sweeps would do at `at` (ms of Redis TIME, default now) if nothing else happened. Writes nothing."""
        return self._reclaimer().plan(now=at, limit=limit)

    def sweep(self, *, limit: int = 1000, by: str = "") -> dict[str, Any]:
        """Reclaim now what is due, without waiting for the sweeps: counts by rule, what was skipped and why, the ids of jobs.

        Evictions are done when this returns; stops and purges are jobs of the hosts.
        """
        from mothball.sweeping import carry_out

        return carry_out(self, self.forecast(limit=limit), by)

    def _reclaimer(self) -> Reclaimer:
        from mothball.reclaim import Reclaimer

        return Reclaimer(self.registry, self.settings)

    def policy(self, *, repo: str | None = None) -> dict[str, Any]:
        """The rules as they were set, weakest first: ``setting``, ``fleet`` and ``repos`` (or that one), and ``effective``.

        ``effective`` has for each field its value and where it comes from, for a workspace of `repo` that says nothing itself.
        """
        from mothball import policy

        book = self.registry.policies.book()
        own = {} if repo is None else book.repos.get(repo, {})
        levels: list[tuple[str, Mapping[str, Any]]] = [("setting", book.default), ("fleet", book.fleet), (f"repo {repo}", own)]
        values = policy.to_dict(policy.merge(*(level for _, level in levels), strict=False))
        origin = {name: where for where, level in levels for name in level}
        return {
            "setting": book.default,
            "fleet": book.fleet,
            "repos": book.repos if repo is None else {repo: own},
            "effective": {name: {"value": value, "from": origin.get(name, "default")} for name, value in values.items()},
        }

    def set_policy(
        self, rules: str | Mapping[str, Any] | None, *, repo: str | None = None, workspace: str | None = None, by: str = ""
    ) -> None:
        """Set the rules of the fleet, of a repo or of a workspace, such as ``stop_after=2h,idle_ttl=12h``; None: none of its own.

        They replace what was set there; fields that are not named come from the weaker level. `InvalidParams` with the first
        mistake or contradiction; nothing is changed then.
        """
        from mothball.policy import parse_text

        raw = parse_text(rules) if isinstance(rules, str) else None if rules is None else dict(rules)
        policies = self.registry.policies
        if workspace is not None:
            _one_level(repo)
            policies.set_workspace(check_workspace_id(workspace), raw, by)
        elif repo is not None:
            policies.set_repo(repo, raw, by)
        else:
            policies.set_fleet(raw, by)

    def change_policy(
        self,
        rules: str | Mapping[str, Any] = "",
        *,
        unset: Sequence[str] = (),
        repo: str | None = None,
        workspace: str | None = None,
        by: str = "",
    ) -> None:
        """As `set_policy`, but fields that are neither in `rules` nor in `unset` stay as they were set there.

        What was set there and cannot be read (by hand, or by another version) is replaced.
        """
        from mothball import policy

        if unknown := [name for name in unset if name not in policy.FIELDS]:
            raise errors.InvalidParams(f"policy: unknown field {unknown[0][:50]!r}; known are {', '.join(policy.FIELDS)}")
        named = policy.parse_text(rules) if isinstance(rules, str) and rules else dict(rules or {})

        def changed(found: Mapping[str, Any]) -> dict[str, Any] | None:
            return {name: value for name, value in {**found, **named}.items() if name not in unset} or None

        policies = self.registry.policies
        if workspace is not None:
            _one_level(repo)
        for left in reversed(range(_TRIES)):
            book = policies.book(mending=True)
            try:
                if workspace is not None:
                    own = self._readable_policy(workspace)
                    policies.set_workspace(workspace, changed(own or {}), by, seen=own)
                elif repo is not None:
                    policies.set_repo(repo, changed(book.repos.get(repo, {})), by, version=book.version)
                else:
                    policies.set_fleet(changed(book.fleet), by, version=book.version)
            except errors.Busy:
                if not left:
                    raise
            else:
                return

    def own_policy(self, workspace: str) -> dict[str, Any]:
        """What the workspace itself says about reclaiming it; without what it says of its retention and captures."""
        from mothball import policy

        return policy.check(self.registry.workspaces.get(check_workspace_id(workspace)).policy, "workspace")

    def _readable_policy(self, workspace: str) -> dict[str, Any] | None:
        """`own_policy`; None for one that cannot be read: what is set now takes its place."""
        try:
            return self.own_policy(workspace)
        except errors.InvalidParams:
            return None

    # -- what runs there --------------------------------------------------------------------------------------------

    def stats(self, workspace: str) -> JobHandle[dict[str, Any]]:
        """Ask for cpu seconds, resident bytes, disk bytes and processes (N-24). Looking is no sign of life (N-32)."""
        return self._ask("workspace.stats", workspace)

    def health(self, workspace: str) -> JobHandle[dict[str, Any]]:
        """Ask whether what runs there is well, and why not (N-23)."""
        return self._ask("workspace.health", workspace)

    def ping(self, workspace: str) -> JobHandle[dict[str, Any]]:
        """Ask whether what runs there is alive."""
        return self._ask("workspace.ping", workspace)

    def ports(self, workspace: str) -> JobHandle[dict[str, Any]]:
        """Ask what listens there, and which of it speaks http or https (N-26)."""
        return self._ask("workspace.ports", workspace)

    def _ask(self, task: str, workspace: str) -> JobHandle[dict[str, Any]]:
        # A job of the host: one of the workspace would wait for a long capture of it.
        host = self.registry.workspaces.get(check_workspace_id(workspace)).host
        submitted = self.submit(task, {"host": host, "workspace": workspace}, workspace=None, host=host)
        return JobHandle(self, submitted.job.id, dict)


def _one_level(repo: str | None) -> None:
    if repo is not None:
        raise errors.InvalidParams("give repo or workspace, not both")


def _veto(rule: str, *, force: bool) -> str | None:
    """What to do about a rule that keeps a workspace somebody wants evicted; None when it is none of his business."""
    if rule == "hold":
        return "`mothball unhold` lifts it"
    if rule == "submitted":
        return "`mothball mark ID merged` or `active` comes first"
    if rule == "lease":
        return "`mothball jobs` shows it, `mothball cancel` ends it"
    if rule == "stranded":
        return "it can be resumed, or it is abandoned in time"
    if rule in {"pin", "queued", "presence", "unknown"} and not force:
        return "--force evicts it all the same"
    return None
