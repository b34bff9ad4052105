"""Lists of what was left out or torn, cut to what a job's outcome and an image's config can hold."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, TypeVar

from mothball.capture.types import Omission, printable

LABEL_BYTES = 1024**2
"""Most bytes of one list in the image's config: the tools of the containers project refuse a config above 4 MiB."""
RESULT_BYTES = 32 * 1024
"""Most bytes of one list in a job's outcome, which Redis holds and 256 KiB bound; further items are only counted."""
MAX_LISTED_OMISSIONS = 10_000
MAX_RESULT_OMISSIONS = 100

T = TypeVar("T")


def listed(omissions: list[Omission]) -> dict[str, Any]:
    """Counts per reason, and the first omissions, as fields of a result."""
    first = fitting([_omission(o) for o in omissions[:MAX_RESULT_OMISSIONS]], RESULT_BYTES)
    return {"omitted": dict(sorted(Counter(o.reason for o in omissions).items())), "omissions": first}


def _omission(omission: Omission) -> dict[str, Any]:
    out: dict[str, Any] = {"path": printable(omission.path), "reason": omission.reason, "size": omission.size}
    if omission.detail:
        out["detail"] = omission.detail
    return out


def omission_label(omissions: list[Omission]) -> str:
    """The omissions as a label of the image's config: one by one as far as they fit, the others counted."""
    shown = fitting([_omission(o) for o in omissions[:MAX_LISTED_OMISSIONS]], LABEL_BYTES)
    return json.dumps({"listed": shown, "further": len(omissions) - len(shown)}, sort_keys=True)


def fitting(items: list[T], limit: int) -> list[T]:
    """The first `items` whose JSON fits into `limit` bytes: names of 4 KiB must not burst what holds a list of them."""
    used, fit = 2, 0
    for item in items:
        used += len(json.dumps(item)) + 2
        if used > limit:
            break
        fit += 1
    return items[:fit]
