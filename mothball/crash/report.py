"""The document of a crash report: made from evidence, redacted, and written as bytes that depend on nothing but its content.

docs/crash-report.schema.json describes it. `build` makes the clear document, which never leaves the process; `finish` redacts
it and gives it its id; `encode` writes it. The report in the store and the one in a package are the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec

from mothball.crash.facts import PackageFacts
from mothball.crash.given import MOST_COMMAND, Given
from mothball.crash.names import report_id
from mothball.crash.signature import Signature
from mothball.crash.text import clean, clip, one_line

if TYPE_CHECKING:
    from mothball.redact.engine import Redactor

SCHEMA: Final = "dev.mothball.crash-report/1"
MOST_OMISSIONS: Final = 1000
_LONG_TITLE: Final = 2000
"""A title is cut when it has no secrets any more: half a secret is no shape that a rule knows."""
MOST_REPOSITORIES: Final = 50
_PSEUDONYM = re.compile(r"\[redacted:([A-Za-z0-9._-]{1,64})(?::[0-9a-f]{12})?\]")
_MADE = ("id", "package", "redactions")
"""What is made last. Id and package do not count for the digest in the id: with a package it is the same report."""
_PLAIN = ("schema", "at", "time")
"""Parts of our own making, with nothing in them that could be a secret."""
_TEXTS = ("workspace", "error", "capture", "since", "omissions")
_WORKSPACE = (
    "id", "repo", "number", "title", "host", "path", "mode", "agent_id", "agent_name", "intent", "changeset_id", "base_commit",
    "state", "created_at", "last_active",
)  # fmt: skip

Source = Literal["fresh", "latest", "last_good"]
"""Where the packaged content is from: a capture made for this report; on request the newest there was; the last good one, because
the directory could not be captured."""


class Captured(msgspec.Struct, frozen=True, kw_only=True):
    """The capture that the report is about. `reason` says why it is not a fresh one; `changed`: this report made a generation."""

    digest: str
    generation: int
    source: Source
    reason: str = ""
    files: int
    bytes: int
    changed: bool


def build(
    *,
    given: Given,
    workspace: Any,
    evidence: Mapping[str, Any],
    signature: Signature,
    at: int,
    capture: Captured,
    since: Mapping[str, Any] | None = None,
    git: Sequence[Mapping[str, Any]] = (),
    omitted: Mapping[str, int] | None = None,
    omissions: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The clear document. `workspace` is its record, `evidence` what `evidence.collect` found, `at` ms of Redis TIME.

    `since` is what `since.changes` found, `git`, `omitted` and `omissions` are those of the capture's result. It holds secrets:
    only what `finish` makes of it may be stored or shown.
    """
    error = clip(given.error)
    facts = dict(evidence)
    host = facts.pop("host", {"error": "not collected"})
    facts["command"] = list(given.command[:MOST_COMMAND])
    return {
        "schema": SCHEMA,
        "id": None,
        "at": at,
        "time": datetime.fromtimestamp(at / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "workspace": {name: getattr(workspace, name) for name in _WORKSPACE},
        "error": {
            "title": one_line(given.title, _LONG_TITLE) or signature.title,
            "text": error.text,
            "truncated": error.truncated or given.error_bytes > error.bytes,
            "bytes": max(error.bytes, given.error_bytes),
            "signature": signature.hex16,
            "frames": list(signature.frames),
        },
        "host": host,
        "evidence": facts,
        "git": [dict(each) for each in git[:MOST_REPOSITORIES]],
        "capture": msgspec.to_builtins(capture),
        "since": None if since is None else dict(since),
        "omissions": {"counts": dict(omitted or {}), "listed": [dict(each) for each in omissions[:MOST_OMISSIONS]]},
        "package": None,
    }


def finish(document: Mapping[str, Any], redactor: Redactor, *, key_id: str | None = None) -> dict[str, Any]:
    """`document` without secrets and control characters, with its id and with how often which rule fired.

    A secret that one part gives away by its name (a variable, an option) is found in the others too. The counts are those of the
    pseudonyms in the result, so a document that was redacted before has the same ones. `key_id` names the key of the pseudonyms:
    two reports with the same one can be compared.
    """
    clear = {name: value for name, value in document.items() if name not in _MADE}
    out: dict[str, Any] = _again(_redacted(clear, redactor), redactor)
    out["error"] = {**out["error"], "title": one_line(out["error"]["title"])}
    out["redactions"] = _redactions(out, redactor.rules.digest, key_id or redactor.key_id or "")
    digest = hashlib.sha256(encode(out)).hexdigest()
    workspace = out["workspace"]
    out["id"] = report_id(
        repo=workspace["repo"], workspace=workspace["id"], number=workspace["number"], at_ms=out["at"], digest=digest
    )
    out["package"] = None
    return out


def redact_evidence(evidence: Mapping[str, Any], redactor: Redactor) -> dict[str, Any]:
    """What `evidence.collect` found without secrets and control characters, for a draft that is stored before there is a report."""
    found: dict[str, Any] = _cleaned(_evidence(evidence, redactor))
    return found


def with_package(report: Mapping[str, Any], facts: PackageFacts, redactor: Redactor) -> dict[str, Any]:
    """A finished report with the facts of its package; the id stays the same.

    A secret that only a file of the package gave away is replaced in the report too, for that is part of the package.
    """
    out: dict[str, Any] = {name: value for name, value in report.items() if name not in _MADE}
    out = _again(out, redactor)
    known = report["redactions"]
    out["redactions"] = _redactions(out, known["rules"], known["key_id"])
    return {**out, "id": report["id"], "package": _cleaned(_tree(facts.to_dict(), redactor.text))}


def encode(document: Mapping[str, Any]) -> bytes:
    """The bytes of a report: JSON with sorted keys, no spaces, UTF-8, one newline at the end."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8") + b"\n"


def _redacted(document: dict[str, Any], redactor: Redactor) -> dict[str, Any]:
    """Each part by what it is: ours are the keys, somebody else's are the texts."""
    out = dict(document)
    out["evidence"] = _evidence(out["evidence"], redactor)
    for name in ("git", "host"):
        out[name] = redactor.document(out[name])
    for name in _TEXTS:
        out[name] = _tree(out[name], redactor.text)
    return out


def _evidence(evidence: Mapping[str, Any], redactor: Redactor) -> dict[str, Any]:
    """A value of an environment is found by its name, a word of a command by the word before it."""
    rest = dict(evidence)
    out: dict[str, Any] = {}
    if "command" in rest:
        out["command"] = _words(rest.pop("command"), redactor)
    if "environment" in rest:
        environment = dict(rest.pop("environment"))
        if "variables" in environment:
            environment["variables"] = redactor.env(environment["variables"])
        out["environment"] = _tree(environment, redactor.text)
    if "processes" in rest:
        processes = dict(rest.pop("processes"))
        if "listed" in processes:
            processes["listed"] = [{**each, "argv": _words(each["argv"], redactor)} for each in processes["listed"]]
        out["processes"] = _tree(processes, redactor.text)
    return {**redactor.document(rest), **out}


def _again(document: dict[str, Any], redactor: Redactor) -> dict[str, Any]:
    """`document` with what was learned from all of it, and from whatever else the redactor has seen."""
    redactor.remember()
    changed = {name: _tree(value, redactor.text) for name, value in document.items() if name not in _PLAIN}
    return {**document, **_cleaned(changed)}


def _words(words: Sequence[str], redactor: Redactor) -> list[str]:
    return redactor.argv([str(word) for word in words])


def _tree(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with every text in it changed, keys too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(str(key)): _tree(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_tree(item, change) for item in value]
    return value


def _cleaned(value: Any) -> Any:
    return _tree(value, clean)


def _redactions(document: Any, rules: str, key_id: str) -> dict[str, Any]:
    counts: Counter[str] = Counter()

    def count(text: str) -> str:
        counts.update(_PSEUDONYM.findall(text))
        return text

    _tree(document, count)
    return {"counts": dict(sorted(counts.items())), "total": counts.total(), "rules": rules, "key_id": key_id}
