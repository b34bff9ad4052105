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
from typing import Any, Final, Literal, Protocol

import msgspec

from mothball.crash.facts import PackageFacts
from mothball.crash.given import MOST_COMMAND, Given
from mothball.crash.names import report_id
from mothball.crash.signature import Signature
from mothball.crash.text import clean, clip, one_line

SCHEMA: Final = "dev.mothball.crash-report/1"
MOST_OMISSIONS: Final = 1000
MOST_REPOSITORIES: Final = 50
_PSEUDONYM = re.compile(r"\[redacted:([A-Za-z0-9._-]{1,64})(?::[0-9a-f]{12})?\]")
_NO_IDENTITY = ("id", "package")
"""What does not count for the digest in the id: the same report without package and with one is the same report."""
_WORKSPACE = (
    "id", "repo", "number", "title", "host", "path", "mode", "agent_id", "agent_name", "intent", "changeset_id", "base_commit",
    "state", "created_at", "last_active",
)  # fmt: skip

Source = Literal["fresh", "latest", "last_good"]
"""Where the packaged content is from: a capture made for this report; on request the newest there was; the last good one, because
the directory could not be captured."""


class Redactor(Protocol):
    """What `finish` asks of `mothball.redact.engine.Redactor`."""

    def text(self, text: str, /) -> str: ...
    def document(self, document: Any, /) -> Any: ...
    def env(self, env: Mapping[str, str], /) -> dict[str, str]: ...
    def argv(self, argv: list[str], /) -> list[str]: ...
    def name(self, name: bytes, /) -> bytes: ...


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
            "title": one_line(given.title) or signature.title,
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


def finish(document: Mapping[str, Any], redactor: Redactor, *, key_id: str = "") -> dict[str, Any]:
    """`document` without secrets and control characters, with its id and with how often which rule fired.

    The counts are those of the pseudonyms in the result, so a document that was redacted before has the same ones. `key_id` names
    the key of the pseudonyms: two reports with the same one can be compared.
    """
    clear = {name: value for name, value in document.items() if name not in _NO_IDENTITY and name != "redactions"}
    out: dict[str, Any] = _cleaned(_redacted(clear, redactor))
    counts = _counts(out)
    out["redactions"] = {"counts": counts, "total": sum(counts.values()), "key_id": key_id}
    digest = hashlib.sha256(encode(out)).hexdigest()
    workspace = out["workspace"]
    out["id"] = report_id(
        repo=workspace["repo"], workspace=workspace["id"], number=workspace["number"], at_ms=out["at"], digest=digest
    )
    out["package"] = None
    return out


def with_package(report: Mapping[str, Any], facts: PackageFacts, redactor: Redactor) -> dict[str, Any]:
    """A finished report with the facts of its package; the id stays the same."""
    plain = facts.to_dict()
    return {**report, "package": _cleaned(_tree(plain, redactor.text))}


def encode(document: Mapping[str, Any]) -> bytes:
    """The bytes of a report: JSON with sorted keys, no spaces, UTF-8, one newline at the end."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8") + b"\n"


def _redacted(document: dict[str, Any], redactor: Redactor) -> dict[str, Any]:
    """Each part by what it is: a value of an environment is found by its name, a word of a command by the word before it."""
    out = {**document, "evidence": redact_evidence(document["evidence"], redactor)}
    for name in ("git", "host"):
        out[name] = redactor.document(out[name])
    # Ours are the keys, somebody else's are the texts.
    for name in ("workspace", "error", "capture", "since", "omissions"):
        out[name] = _tree(out[name], redactor.text)
    return out


def redact_evidence(found: Mapping[str, Any], redactor: Redactor) -> dict[str, Any]:
    """Evidence without secrets, each part by what it is; redacted once more it is the same."""
    evidence = dict(found)
    command = _words(evidence.pop("command", []), redactor)
    environment = dict(evidence.pop("environment", None) or {})
    processes = dict(evidence.pop("processes", None) or {})
    if isinstance(environment.get("variables"), Mapping):
        environment["variables"] = redactor.env(environment["variables"])
    if isinstance(processes.get("listed"), list):
        processes["listed"] = [{**each, "argv": _words(each.get("argv", []), redactor)} for each in processes["listed"]]
    return {
        **redactor.document(evidence),
        "command": command,
        # Again as text: a name that tells nothing may have a value that does.
        "environment": _tree(environment, redactor.text),
        "processes": _tree(processes, redactor.text),
    }


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


def _counts(document: Any) -> dict[str, int]:
    counts: Counter[str] = Counter()

    def count(text: str) -> str:
        counts.update(_PSEUDONYM.findall(text))
        return text

    _tree(document, count)
    return dict(sorted(counts.items()))
