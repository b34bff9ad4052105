"""Crash reports: what the registry knows of each, who holds its files, and how often the same failure came again.

The report itself and its capture are in the store of `host`; lists, counts, retention and the storm brake go by the record here.
Every write of a job carries its fence. The record goes last when a report is deleted, so that nothing of one is ever left unnamed.
"""

from __future__ import annotations

import base64
import json
import re
import zlib
from typing import Any

import msgspec

from mothball.errors import InvalidParams, LeaseLost, NotFound, Oversize
from mothball.names import check_host
from mothball.registry import encode, keys
from mothball.registry.checks import MAX_TEXT
from mothball.registry.connection import Connection
from mothball.registry.scripts import Scripts, pairs
from mothball.settings import Settings

MOST_OCCURRENCES = 20
"""Newest occurrences of one failure that its report names; the count counts all."""
DRAFT_MS = 24 * 3600 * 1000
"""How long the evidence of a report is kept that was not finished."""
MAX_DRAFT_BYTES = 4 * 1024**2
"""Largest evidence, compressed, that the registry takes."""
_MAX_UNPACKED = 1024**3
_ID = re.compile(r"crash-[A-Za-z0-9._-]{1,122}\Z")
_PREFIX = re.compile(r"[A-Za-z0-9._-]{1,128}\Z")
_SIGNATURE = re.compile(r"[0-9a-f]{16}\Z")
_NUMBERS = ("number", "at", "generation", "bytes", "files", "count", "first_at", "last_at")
_FLAGS = ("sealed", "keep", "auto", "deleting")
_BATCH = 200


class Crash(msgspec.Struct, frozen=True, kw_only=True):
    """The record of a crash report. Times are ms of Redis TIME, sizes bytes.

    `digest` and `generation` are those of the capture, `artifact` is the digest of the report's manifest in the store of `host`.
    `path`, `sha256`, `bytes` and `files` are those of the package there; `path` is empty without one. `source` is ``fresh`` or
    ``last_good``. `count` counts the same failure within the window, `occurrences` has the newest: workspace, at, digest, job.
    """

    id: str
    workspace: str
    repo: str | None = None
    number: int | None = None
    host: str = ""
    at: int = 0
    signature: str = ""
    title: str = ""
    digest: str = ""
    generation: int = 0
    artifact: str = ""
    source: str = ""
    path: str = ""
    sha256: str = ""
    bytes: int = 0
    files: int = 0
    sealed: bool = False
    keep: bool = False
    auto: bool = False
    deleting: bool = False
    count: int = 1
    first_at: int = 0
    last_at: int = 0
    occurrences: list[dict[str, Any]] = []
    by: str = ""
    job: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The record in JSON types."""
        return msgspec.structs.asdict(self)


class Draft(msgspec.Struct, frozen=True):
    """What a job has of its report: the evidence, when it was taken (ms of Redis TIME), and the report once there is one."""

    evidence: dict[str, Any] | None
    at: int
    report: str


class Crashes:
    """The crash reports of the fleet."""

    def __init__(self, connection: Connection, scripts: Scripts, settings: Settings) -> None:
        self._connection = connection
        self._scripts = scripts
        self._settings = settings
        self._key = keys.Keys(settings.namespace)

    # -- made by a job ----------------------------------------------------------------------------------------------

    def draft(self, job: str, fence: int, evidence: dict[str, Any]) -> Draft:
        """Keep the (redacted) `evidence` of the report that `job` makes. A later run of the job gets the first run's, and its time.

        Raises `LeaseLost`, `Oversize` (more than `MAX_DRAFT_BYTES` even when compressed), `Unavailable`.
        """
        answer = self._fenced("crash_draft", job, fence, _pack(evidence), DRAFT_MS)
        return Draft(evidence=_unpack(answer[1]), at=int(answer[2]), report=answer[3])

    def drafted(self, job: str) -> Draft | None:
        """What an earlier run of `job` has kept; None when there was none."""
        with self._connection.guard() as client:
            found = client.hgetall(self._key("crash", "draft", keys.job_id(job)))
        if not found:
            return None
        return Draft(evidence=_unpack(found.get("evidence", "")), at=int(found.get("at", "0")), report=found.get("report", ""))

    def name(self, job: str, fence: int, id: str) -> str:  # noqa: A002
        """The id of the report that `job` makes: `id`, or that of an earlier run, whose files may be there. Raises `LeaseLost`."""
        return str(self._fenced("crash_name", job, fence, crash_id(id))[1])

    def repeat(
        self, job: str, fence: int, *, workspace: str, scope: str, signature: str, at: int, occurrence: dict[str, Any]
    ) -> Crash | None:
        """Count this failure on the report of the same one, when there is one within the window; None when there is none.

        The window is `crash_window_seconds` from the first of them. Counts once per job. Raises `LeaseLost`, `Unavailable`.
        """
        answer = self._fenced(
            "crash_repeat", job, fence, keys.workspace_id(workspace), _signature(signature), _scope(scope), at, self._window,
            _occurrence(occurrence), MOST_OCCURRENCES,
        )  # fmt: skip
        return _decode(pairs(answer[1])) if answer[0] == "again" else None

    def add(self, job: str, fence: int, record: Crash, *, scope: str, occurrence: dict[str, Any]) -> tuple[Crash, bool]:
        """Record a report whose files are in the store: (its record, True).

        (The record of the other, False) when the same failure of another job was recorded first: this one is counted there, and the
        caller takes its files away. Asked twice by one job it counts once. Raises `LeaseLost`, `InvalidParams`, `Unavailable`.
        """
        at, ws = record.at, keys.workspace_id(record.workspace)
        answer = self._fenced(
            "crash_add", job, fence, crash_id(record.id), ws, record.repo or "", check_host(record.host),
            _signature(record.signature), _scope(scope), at, self._window, _occurrence(occurrence), MOST_OCCURRENCES,
            *_fields(record),
        )  # fmt: skip
        return _decode(pairs(answer[1])), answer[0] == "added"

    # -- what is there ----------------------------------------------------------------------------------------------

    def same(self, scope: str, signature: str) -> str | None:
        """The report on which this failure would be counted now; None when it would get one of its own."""
        with self._connection.guard() as client:
            found = client.get(self._key("crash", "sig", _signature(signature), _scope(scope)))
            first, going = client.hmget(self._key("crash", found), "first_at", "deleting") if found else (None, None)
            if first is None or going == "1":
                return None
            seconds, micros = client.time()
        return str(found) if int(seconds) * 1000 + int(micros) // 1000 - int(first) < self._window else None

    def get(self, id: str) -> Crash:  # noqa: A002 - the record's own name for it
        """The record of a report, named by its id, by the beginning of it or by its last 8 digits when only one is.

        Raises `NotFound`, and `InvalidParams` when several are meant.
        """
        name = id.removesuffix(".tar.age").removesuffix(".tar")
        if not _PREFIX.match(name):
            raise NotFound(what="crash report", id=id[:200])
        with self._connection.guard() as client:
            found = client.hgetall(self._key("crash", name)) if _ID.match(name) else {}
            if not found:
                every = client.zrange(self._key("crash", "by", "at"), 0, -1)
                meant = [each for each in every if each.startswith(name) or each.endswith(f"-{name}")]
                if len(meant) > 1:
                    raise InvalidParams(f"{name!r} may be {len(meant)} crash reports, among them {meant[0]} and {meant[1]}")
                found = client.hgetall(self._key("crash", meant[0])) if meant else {}
        if not found:
            raise NotFound(
                f"crash report {id!r} is not known; `mothball crash-reports` lists those that are", what="crash report", id=id
            )
        return _decode(found)

    def list(
        self,
        *,
        workspace: str | None = None,
        repo: str | None = None,
        host: str | None = None,
        since: int | None = None,
        limit: int = 100,
    ) -> list[Crash]:
        """At most `limit` records, newest first, of one workspace, repo or host and not older than `since` (ms) if asked."""
        index = self._index(workspace, repo, host)
        out: list[Crash] = []
        start = 0
        with self._connection.guard() as client:
            while len(out) < limit:
                least = "-inf" if since is None else since
                page = client.zrange(index, "+inf", least, desc=True, byscore=True, offset=start, num=_BATCH)
                pipe = client.pipeline(transaction=False)
                for each in page:
                    pipe.hgetall(self._key("crash", each))
                found = [_decode(record) for record in pipe.execute() if record.get("id")]
                out += [
                    each
                    for each in found
                    if (workspace is None or each.workspace == workspace)
                    and (repo is None or each.repo == repo)
                    and (host is None or each.host == host)
                ]
                start += _BATCH
                if len(page) < _BATCH:
                    break
        return out[:limit]

    def count(self, *, workspace: str | None = None, host: str | None = None) -> int:
        """How many reports there are, of one workspace or host if asked."""
        with self._connection.guard() as client:
            return int(client.zcard(self._index(workspace, None, host)))

    def of_workspace_here(self, workspace: str, host: str) -> str:
        """``some`` when `host` has reports of `workspace`, ``gone`` when the last of them was deleted a while ago, else ``none``.

        For the collector: a layout with reports is needed, whether the workspace still has a record or not.
        """
        with self._connection.guard() as client:
            if client.zinter([self._key("crash", "ws", workspace), self._key("crash", "host", check_host(host))]):
                return "some"
            return "gone" if client.exists(self._key("crash", "gone", host, workspace)) else "none"

    # -- changes by operators and sweeps ----------------------------------------------------------------------------

    def mark(self, id: str, keep: bool, by: str = "") -> Crash:  # noqa: A002
        """Protect a report from retention, or end that. Raises `NotFound`."""
        return self._mark(id, "crash.kept" if keep else "crash.unkept", by, keep="1" if keep else "0")

    def packaged(self, id: str, *, path: str, sha256: str, bytes: int, files: int, sealed: bool, artifact: str = "") -> Crash:  # noqa: A002
        """Note the package of a report; an empty `path` says that it is gone. Raises `NotFound`."""
        fields = {"path": path, "sha256": sha256, "bytes": str(bytes), "files": str(files), "sealed": "1" if sealed else "0"}
        if artifact:
            fields["artifact"] = artifact
        return self._mark(id, "", "", **fields)

    def deleting(self, id: str, by: str = "") -> Crash:  # noqa: A002
        """Note that a report is being deleted: whoever finds what is left of it ends that. Raises `NotFound`."""
        return self._mark(id, "", by, deleting="1")

    def drop(self, id: str, *, reason: str = "deleted", by: str = "") -> bool:  # noqa: A002
        """Forget the record of a report whose files are gone; True when there was one."""
        stays = self._settings.tombstone_seconds * 1000
        return bool(self._scripts.run("crash_drop", crash_id(id), reason[:MAX_TEXT], by[:MAX_TEXT], stays))

    def adopt(self, record: Crash) -> bool:
        """Make the record of a report again that only the store knows; False when there is one."""
        occurrence = _occurrence({"workspace": record.workspace, "at": record.at, "digest": record.digest, "job": ""})
        answer = self._scripts.run(
            "crash_adopt", crash_id(record.id), keys.workspace_id(record.workspace), record.repo or "", check_host(record.host),
            record.at, occurrence, "signature", record.signature, "keep", "1" if record.keep else "0", *_fields(record),
        )  # fmt: skip
        return bool(answer)

    @property
    def _window(self) -> int:
        return self._settings.crash_window_seconds * 1000

    def _index(self, workspace: str | None, repo: str | None, host: str | None) -> str:
        if workspace is not None:
            return self._key("crash", "ws", keys.workspace_id(workspace))
        if repo is not None:
            return self._key("crash", "repo", keys.repo_name(repo))
        return self._key("crash", "host", check_host(host)) if host is not None else self._key("crash", "by", "at")

    def _mark(self, id: str, event: str, by: str, **fields: str) -> Crash:  # noqa: A002
        answer = self._scripts.run(
            "crash_mark", crash_id(id), event, by[:MAX_TEXT], *(text for pair in fields.items() for text in pair)
        )
        if answer[0] != "ok":
            raise NotFound(what="crash report", id=id)
        return _decode(pairs(answer[1]))

    def _fenced(self, name: str, job: str, fence: int, *args: str | int) -> Any:
        answer = self._scripts.run(name, keys.job_id(job), str(fence), *args)
        if answer[0] == "lost":
            raise LeaseLost(job=job)
        return answer


def crash_id(value: object) -> str:
    """`value` as the whole id of a crash report, or `InvalidParams`."""
    if not isinstance(value, str) or not _ID.match(value):
        raise InvalidParams("the id of a crash report has at most 128 letters, digits and . _ -, and begins with crash-")
    return value


def scope_of(workspace: str, repo: str | None) -> str:
    """Within what the same failure is one: the repository, or the workspace that has none."""
    return f"repo:{repo}" if repo else f"ws:{workspace}"


def _signature(value: str) -> str:
    if not _SIGNATURE.match(value):
        raise InvalidParams("the signature of a failure has 16 hexadecimal digits")
    return value


def _scope(value: str) -> str:
    if not value.startswith(("repo:", "ws:")) or len(value) > 256:  # noqa: PLR2004 - longer than any id or repo
        raise InvalidParams("a scope is repo:<repo> or ws:<workspace>")
    return value


def _occurrence(value: dict[str, Any]) -> str:
    return encode.dumps(value, "occurrence", 4096)


def _fields(record: Crash) -> list[str]:
    """What a record says besides its place in the indexes, name and value in turn; what is not known is left out."""
    texts = {
        "number": "" if record.number is None else str(record.number), "title": record.title[:MAX_TEXT], "digest": record.digest,
        "generation": str(record.generation), "artifact": record.artifact, "source": record.source, "path": record.path,
        "sha256": record.sha256, "bytes": str(record.bytes), "files": str(record.files), "sealed": "1" if record.sealed else "0",
        "auto": "1" if record.auto else "0", "by": record.by[:MAX_TEXT], "job": record.job,
    }  # fmt: skip
    return [text for pair in texts.items() for text in pair]


def _decode(record: dict[str, str]) -> Crash:
    """The HASH of a report as a record; a field an older version did not write has its empty value."""
    known = {name: value for name, value in record.items() if name in Crash.__struct_fields__}
    values: dict[str, Any] = dict(known)
    for name in _NUMBERS:
        if name in known:
            values[name] = int(known[name]) if known[name] else None
    values |= {name: known[name] == "1" for name in _FLAGS if name in known}
    values["occurrences"] = encode.loads(known.get("occurrences")) or []
    values["repo"] = known.get("repo") or None
    return Crash(**values)


def _pack(evidence: dict[str, Any]) -> str:
    data = zlib.compress(json.dumps(evidence, separators=(",", ":"), sort_keys=True).encode("ascii"), 6)
    if len(data) > MAX_DRAFT_BYTES:
        raise Oversize(what="the evidence of a crash report", size=len(data), limit=MAX_DRAFT_BYTES)
    return base64.b85encode(data).decode("ascii")


def _unpack(text: str) -> dict[str, Any] | None:
    if not text:
        return None
    found = json.loads(zlib.decompressobj().decompress(base64.b85decode(text), _MAX_UNPACKED))
    return found if isinstance(found, dict) else None
