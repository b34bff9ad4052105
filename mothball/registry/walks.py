"""Walks through the indexes: what is due, what is oldest, what was used least recently. Pages by place, never by position alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mothball.errors import InvalidParams, Unavailable
from mothball.names import check_host
from mothball.policy import Facts
from mothball.registry import keys
from mothball.registry.connection import Connection
from mothball.registry.facts import read_facts
from mothball.settings import Settings

Place = tuple[str, int]
"""An id and its score (ms) in an index."""
_PAGE = 500


class Walks:
    """Reads indexes; changes nothing."""

    def __init__(self, connection: Connection, settings: Settings) -> None:
        self._connection = connection
        self._key = keys.Keys(settings.namespace)

    def facts(self, ids: Sequence[str], *, job: str = "") -> list[Facts | None]:
        """The facts of each of `ids`, None for one that is not registered. The lease of `job`, the asker's own, counts as none."""
        return read_facts(self._connection, self._key, ids, job)

    def readable(self, ids: Sequence[str]) -> list[Facts | str | None]:
        """As `facts`; a text that says why for one that cannot be read. A damaged one costs only itself. Raises `Unavailable`."""
        try:
            return list(self.facts(ids))
        except Unavailable:
            raise
        except Exception as error:  # one of them is damaged: which one?
            if len(ids) == 1:
                return [f"its record cannot be read ({type(error).__name__}: {error})"[:500]]
            return [self.readable([each])[0] for each in ids]

    def due(self, kind: str, limit: int, until: int | None = None, start: int = 0) -> list[Place]:
        """At most `limit` workspaces at which a sweep of `kind` (``evict``, ``stop``) has to look by `until` (None: now).

        The earliest comes first; `start` of them are passed over.
        """
        if limit <= 0:
            return []
        end = self._connection.time_ms() if until is None else until
        with self._connection.guard() as client:
            found = client.zrangebyscore(self._due(kind), "-inf", end, start=start, num=limit, withscores=True)
        return [(each, int(score)) for each, score in found]

    def due_count(self, kind: str, until: int | None = None) -> int:
        """How many `due` would give without a limit."""
        end = self._connection.time_ms() if until is None else until
        with self._connection.guard() as client:
            return int(client.zcount(self._due(kind), "-inf", end))

    def due_at(self, kind: str, id: str) -> int | None:  # noqa: A002
        """When a sweep of `kind` looks at the workspace next, None when time alone does not make it."""
        with self._connection.guard() as client:
            score = client.zscore(self._due(kind), keys.workspace_id(id))
        return None if score is None else int(score)

    def _due(self, kind: str) -> str:
        if kind not in {"evict", "stop"}:
            raise InvalidParams(f"kind {kind!r}: use evict or stop")
        return self._key("ws", "due", kind)

    def oldest(self, limit: int, after: Place | None = None, repo: str | None = None) -> list[Place]:
        """At most `limit` workspaces (of `repo`) with their `created_at`, the oldest first, then by id; those beyond `after`."""
        if repo is None:
            return self._page(self._key("ws", "by", "created"), limit, after)
        with self._connection.guard() as client:
            members = list(client.smembers(self._key("ws", "repo", keys.repo_name(repo))))
            ages = client.zmscore(self._key("ws", "by", "created"), members) if members else []
        places = sorted((int(age), each) for age, each in zip(ages, members, strict=True) if age is not None)
        first = (after[1], after[0]) if after is not None else (-1, "")
        return [(each, age) for age, each in places if (age, each) > first][: max(limit, 0)]

    def least_active(self, limit: int, after: Place | None = None) -> list[Place]:
        """At most `limit` workspaces with their `last_active`, the least recently used first; those beyond `after`."""
        return self._page(self._key("ws", "by", "active"), limit, after)

    def _page(self, index: str, limit: int, after: Place | None) -> list[Place]:
        out: list[Place] = []
        with self._connection.guard() as client:
            # `after` itself may be gone by now, so its place is found by its score; equal ones before it are passed over.
            start = int(client.zcount(index, "-inf", f"({after[1]}")) if after is not None else 0
            while len(out) < limit and (page := client.zrange(index, start, start + max(limit, _PAGE) - 1, withscores=True)):
                start += len(page)
                places = [(each, int(score)) for each, score in page]
                out += [place for place in places if after is None or (place[1], place[0]) > (after[1], after[0])]
        return out[: max(limit, 0)]

    def scope(self, *, host: str | None = None, repo: str | None = None) -> Iterator[tuple[str, Facts | str]]:
        """Every workspace of `host` and `repo`, or of the fleet, the oldest first: its id with what `readable` gives."""
        with self._connection.guard() as client:
            on_host = set(client.smembers(self._key("ws", "host", check_host(host)))) if host is not None else None
        after: Place | None = None
        while page := self.oldest(_PAGE, after, repo):
            after = page[-1]
            ids = [each for each, _ in page if on_host is None or each in on_host]
            yield from ((each, facts) for each, facts in zip(ids, self.readable(ids), strict=True) if facts is not None)
