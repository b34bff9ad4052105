"""Names: workspace ids, safe names on disk, queues.

One path function shared by every task (behaviours.md B-07), an allow-list instead of a replacement list (B-60).
"""

from __future__ import annotations

import hashlib
import re

from mothball.errors import InvalidParams

MAX_ID_LENGTH = 128
MAX_SLUG_BYTES = 100
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/#:@-]*\Z")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z")

QUEUE_CONTROL = "control"
QUEUE_DISPATCH = "dispatch"
_HOST_QUEUE_PREFIX = "host."


def check_workspace_id(value: object) -> str:
    """Return `value` when it is a workspace id, else raise `InvalidParams` (B-06).

    1-128 characters of ``[A-Za-z0-9._/#:@-]``, beginning with a letter or digit, no ``..`` component.
    """
    if not isinstance(value, str) or not value:
        raise InvalidParams("a workspace id must be a non-empty text, for example owner/repo#12")
    if len(value) > MAX_ID_LENGTH:
        raise InvalidParams(f"the workspace id has {len(value)} characters; at most {MAX_ID_LENGTH} are allowed")
    if not _ID.match(value):
        raise InvalidParams(
            f"workspace id {value!r}: use letters, digits and . _ / # : @ - only, beginning with a letter or digit"
        )
    if ".." in value.split("/"):
        raise InvalidParams(f"workspace id {value!r} must not have '..' as a component")
    return value


def check_host(value: object) -> str:
    """Return `value` when it can name a host and its queue, else raise `InvalidParams`."""
    if not isinstance(value, str) or not _HOST.match(value):
        raise InvalidParams(f"host name {value!r}: use 1-100 letters, digits and . _ - only, beginning with a letter or digit")
    return value


def slug(value: str) -> str:
    """The name of `value` on disk (B-60).

    Characters outside ``[A-Za-z0-9._-]`` become ``-``; whenever anything was changed (or the result would be
    ``.``, ``..``, hidden or too long) 8 hex digits of the sha256 of `value` are appended, so two ids never share a name.
    """
    if not value or "\0" in value:
        raise InvalidParams("an empty name, or one with a NUL, has no place on disk")
    safe = _UNSAFE.sub("-", value)
    if safe[0] in ".-":
        safe = "_" + safe
    if safe == value and len(safe) <= MAX_SLUG_BYTES and not _ends_like_digest(safe):
        return safe
    digest = hashlib.sha256(value.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{safe[: MAX_SLUG_BYTES - 9]}-{digest}"


def _ends_like_digest(name: str) -> bool:
    """True when a plain name could be mistaken for another id's slug (``a-0f3c2a11``): it gets a digest of its own."""
    return re.search(r"-[0-9a-f]{8}\Z", name) is not None


def host_queue(host: str) -> str:
    """The queue that only the worker on `host` consumes."""
    return _HOST_QUEUE_PREFIX + check_host(host)


def queue_host(queue: str) -> str | None:
    """The host of a host queue, None for the fleet's own queues."""
    return queue.removeprefix(_HOST_QUEUE_PREFIX) if queue.startswith(_HOST_QUEUE_PREFIX) else None
