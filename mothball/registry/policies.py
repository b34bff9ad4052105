"""What reclaims workspaces, as it was said: for the fleet, for a repo, for one workspace. `mothball.policy` reads and decides.

A change for the fleet or a repo makes the sweeps look at every workspace again: a walk through all records, a bounded piece at a
time, which repairs the indexes on its way.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import msgspec

from mothball import policy
from mothball.errors import Busy, InvalidParams
from mothball.policy import Facts, Policy
from mothball.registry import encode, keys
from mothball.registry.connection import Connection
from mothball.registry.overrides import change_policy
from mothball.registry.scripts import Scripts
from mothball.registry.workspaces import Workspace, Workspaces
from mothball.settings import Settings

WALK_EVERY_MS = 86_400_000
"""A walk begins by itself when the last one ended longer ago than this."""
SETTING_EVERY_MS = 300_000
"""A walk begins when the setting `policy` is another than before; not oftener than this, when workers do not agree on it."""
_BATCH = 500
_REPO = "repo:"
_ALL = {"all": True, "cursor": 0, "todo": []}
_INDEXES = ("ws:by:", "ws:due:", "ws:repo:", "ws:host:", "ws:good:", "ws:state:")
_TOMB = "ws:gone:"


class PolicyBook(msgspec.Struct, frozen=True):
    """All policies of the fleet and its repos at one moment. `default` is the setting; `repos` are by name."""

    version: int
    default: dict[str, Any]
    fleet: dict[str, Any]
    repos: dict[str, dict[str, Any]]
    damaged: dict[str, str] = {}
    """Levels that cannot be read (``fleet``, ``repo:<repo>``), and why. Whom they concern is kept (D-70), all others are not."""
    cache: dict[str | None, Policy] = {}
    """Merged policies by repo (None: of the fleet), for the many workspaces that have none of their own."""

    def fleet_policy(self) -> Policy:
        """What counts for a workspace about which nobody said anything else. Raises `InvalidParams` when it cannot be read."""
        return policy.merge(self.default, self.fleet, strict=False)

    def levels(self, of: Facts | Workspace) -> list[tuple[str, Mapping[str, Any]]]:
        """The levels that apply to a workspace with their names, the weakest first."""
        if of.repo is not None and (problem := self.damaged.get(_REPO + of.repo)):
            raise InvalidParams(problem)
        found: list[tuple[str, Mapping[str, Any]]] = [("setting", self.default), ("fleet", self.fleet)]
        if of.repo is not None and of.repo in self.repos:
            found.append((f"repo {of.repo}", self.repos[of.repo]))
        return [*found, ("workspace", policy.check(of.policy, "workspace"))]

    def of(self, workspace: Facts | Workspace) -> Policy:
        """The policy that counts for this workspace.

        Raises `InvalidParams` when one of the levels cannot be read: nothing is reclaimed by a policy that nobody understands.
        """
        if workspace.policy:
            return policy.merge(*(level for _, level in self.levels(workspace)), strict=False)
        repo = workspace.repo
        if repo is not None and repo not in self.repos and _REPO + repo not in self.damaged:
            repo = None
        if repo not in self.cache:
            self.cache[repo] = policy.merge(*(level for _, level in self.levels(workspace)), strict=False)
        return self.cache[repo]


class Policies:
    """The policies of the fleet, and the walk that makes a new one count for every workspace."""

    def __init__(self, connection: Connection, scripts: Scripts, workspaces: Workspaces, settings: Settings) -> None:
        self._connection = connection
        self._scripts = scripts
        self._workspaces = workspaces
        self._settings = settings
        self._key = keys.Keys(settings.namespace)

    def book(self, *, mending: bool = False) -> PolicyBook:
        """All policies as they are now. Raises `InvalidParams` when the fleet's cannot be read, `Unavailable`.

        That of a repo costs only its own workspaces (`PolicyBook.damaged`). `mending` is for whoever is about to set a policy, and
        decides nothing: the fleet's is empty then when it cannot be read.
        """
        with self._connection.guard() as client:
            raw = client.hgetall(self._key("policies"))
        damaged: dict[str, str] = {}
        levels: dict[str, dict[str, Any]] = {}
        for name, text in raw.items():
            if name == "fleet" or name.startswith(_REPO):
                try:
                    levels[name] = _read(name, text)
                except InvalidParams as error:
                    if name == "fleet" and not mending:
                        raise
                    damaged[name] = error.message
        fleet = levels.pop("fleet", {})
        repos = {name.removeprefix(_REPO): level for name, level in levels.items()}
        return PolicyBook(int(raw.get("version", 0)), _default(self._settings.policy), fleet, repos, damaged)

    def set_fleet(self, raw: Mapping[str, Any] | None, by: str = "", *, version: int | None = None) -> PolicyBook:
        """Replace the policy of the fleet; None: that of the setting counts. Raises `InvalidParams` for one that makes no sense.

        With the `version` of the book that was read, `Busy` when anybody changed a policy since.
        """
        book = self.book(mending=True)
        checked = policy.check(raw, "fleet") if raw is not None else {}
        policy.merge(book.default, checked)
        return self._set("fleet", checked, by, version)

    def set_repo(self, repo: str, raw: Mapping[str, Any] | None, by: str = "", *, version: int | None = None) -> PolicyBook:
        """As `set_fleet` for `repo`; None: none of its own."""
        book = self.book(mending=True)
        checked = policy.check(raw, "repo") if raw is not None else {}
        policy.merge(book.default, book.fleet, checked)
        return self._set(_REPO + keys.repo_name(repo), checked, by, version)

    def _set(self, level: str, checked: dict[str, Any], by: str, version: int | None) -> PolicyBook:
        text = encode.dumps(checked, "policy", encode.MAX_DOCUMENT_BYTES) if checked else ""
        done, _ = self._scripts.run("set_policies", level, text, by, json.dumps(_ALL), "" if version is None else version)
        if done < 0:
            raise Busy(what="the book of policies", reason="others have changed it since it was read; do it again")
        return self.book(mending=True)

    def set_workspace(
        self,
        id: str,  # noqa: A002
        raw: Mapping[str, Any] | None,
        by: str = "",
        *,
        seen: Mapping[str, Any] | None = None,
    ) -> Workspace:
        """Replace what the workspace's own policy says about reclaiming it; None: nothing. Its other keys (`FOREIGN`) stay.

        Raises `InvalidParams`, `NotFound`, `Gone`, `Busy` (others change it all the time; or it does not say what was `seen`).
        """
        book = self.book(mending=True)
        checked = policy.check(raw, "workspace") if raw is not None else {}

        def change(record: Workspace) -> dict[str, Any]:
            if seen is not None and policy.check(record.policy, "workspace") != seen:
                raise Busy(what=f"the policy of workspace {id}", reason="others have changed it since it was read; do it again")
            repo = book.repos.get(record.repo or "", {})
            policy.merge(book.default, book.fleet, repo, checked, mode=record.mode)
            return {**{name: record.policy[name] for name in policy.FOREIGN if name in record.policy}, **checked}

        value = encode.dumps(checked, "policy", encode.MAX_DOCUMENT_BYTES)
        return change_policy(self._scripts, id, change, event="workspace.policy_changed", value=value, by=by)

    def walking(self) -> bool:
        """True while a walk through all records goes on."""
        with self._connection.guard() as client:
            return bool(client.hexists(self._key("policies"), "walk"))

    def heal(self, limit: int = 5000) -> dict[str, Any]:
        """Go on with the walk by about `limit` keys and entries, or begin one: daily, and after a change of policy or setting.

        Every record gets back the index entries it lost, entries without a record go, and after a change of policy the sweeps look
        at every workspace again. Returns ``{walking, seen, repaired}``: call it again while `walking`. Two callers do no harm.
        """
        with self._connection.guard() as client:
            before = client.hget(self._key("policies"), "walk") or ""
        if not before:
            setting = json.dumps(_default(self._settings.policy), sort_keys=True)
            begun = json.dumps({**_ALL, "all": False}), json.dumps(_ALL)
            which = self._scripts.run("walk", "", begun[0], WALK_EVERY_MS, setting, SETTING_EVERY_MS, begun[1])
            if not which:
                return {"walking": self.walking(), "seen": 0, "repaired": 0}
            before = begun[which - 1]
        walk = _walk_at(before)
        seen = repaired = 0
        while seen < limit and (walk["todo"] or walk["cursor"] is not None):
            found, fixed = self._index(walk) if walk["todo"] else self._records(walk)
            seen += found
            repaired += fixed
        done = not walk["todo"] and walk["cursor"] is None
        moved = self._scripts.run("walk", before, "" if done else json.dumps(walk), WALK_EVERY_MS)
        return {"walking": not (moved and done), "seen": seen, "repaired": repaired}

    def _records(self, walk: dict[str, Any]) -> tuple[int, int]:
        """One step through the keyspace: records are repaired here, indexes are noted for later."""
        with self._connection.guard() as client:
            cursor, names = client.scan(walk["cursor"], match=self._key("ws", "*"), count=_BATCH)
        walk["cursor"] = int(cursor) or None
        bare = [self._key.bare(name) for name in names]
        walk["todo"] += [[name, 0] for name in bare if name.startswith(_INDEXES)]
        ids = [name.removeprefix("ws:") for name in bare if not name.startswith((*_INDEXES, _TOMB))]
        return _BATCH, int(self._scripts.run("heal", "records", "1" if walk["all"] else "", *ids)) if ids else 0

    def _index(self, walk: dict[str, Any]) -> tuple[int, int]:
        """One step through an index: entries without their record go."""
        name, cursor = walk["todo"][-1]
        kind = "zset" if name.startswith(("ws:by:", "ws:due:", "ws:good:")) else "set"
        with self._connection.guard() as client:
            scan = client.zscan if kind == "zset" else client.sscan
            cursor, found = scan(self._key(name), cursor, count=_BATCH)
        if int(cursor):
            walk["todo"][-1][1] = int(cursor)
        else:
            walk["todo"].pop()
        ids = [each[0] for each in found] if kind == "zset" else list(found)
        return max(len(ids), 1), int(self._scripts.run("heal", kind, name, *ids)) if ids else 0


@lru_cache(maxsize=8)
def _default(text: str) -> dict[str, Any]:
    return policy.parse_text(text) if text else {}


def _walk_at(text: str) -> dict[str, Any]:
    """Where a walk stands; one that nobody can read begins again, or no walk would ever end any more."""
    try:
        walk = json.loads(text)
        return {"all": bool(walk["all"]), "cursor": walk["cursor"], "todo": [[str(name), int(at)] for name, at in walk["todo"]]}
    except (ValueError, KeyError, TypeError):
        return json.loads(json.dumps(_ALL))  # type: ignore[no-any-return]


def _read(level: str, text: str) -> dict[str, Any]:
    """A stored policy. One that cannot be read is an error and never an empty one: that would let the defaults reclaim."""
    if not text:
        return {}
    try:
        return policy.check(json.loads(text), "repo" if level.startswith(_REPO) else "fleet")
    except InvalidParams as error:
        why = error.message
    except (ValueError, RecursionError):
        why = "it is no JSON"
    of = level.replace(":", " ", 1)
    raise InvalidParams(f"the policy of {of} in the registry cannot be read ({why}); set it again with `mothball policy set`")
