"""JSON that somebody else may have written: a registry, another tool, or an enemy.

What is accepted here can be written again by every writer of this project and read by every reader: valid UTF-8 without lone
surrogates (which Python's own parser lets through and no other reader takes), no NaN, nested a few levels only. A text that is
valid and hostile must end as a damaged document does, with an error that names it, and never as a `RecursionError`.
"""

from __future__ import annotations

from typing import Any, Final, TypeVar

import msgspec

from mothball.errors import Corrupt

MAX_DEPTH: Final = 64
"""Levels of lists and objects within each other; what nests deeper could be read here and not be written elsewhere."""
MAX_DOCUMENT: Final = 16 * 1024**2

T = TypeVar("T")


def read_json(data: bytes | str, kind: type[T], what: str, *, limit: int = MAX_DOCUMENT, digest: str = "") -> T:
    """The JSON document `data` as a `kind`; `Corrupt`, which calls it `what` and names the blob `digest`, when it is none.

    `limit` is the most bytes (of a text: characters) that are looked at.
    """
    try:
        if len(data) > limit:
            raise ValueError(f"it has more than {limit:,} bytes")
        found = msgspec.json.decode(data, type=kind)
    except RecursionError:
        reason = f"it is nested deeper than {MAX_DEPTH} levels"
    except UnicodeError:
        reason = "it is not valid UTF-8"
    except ValueError as error:  # msgspec's errors too
        reason = str(error)
    else:
        if _depth_is_sane(found):
            return found
        reason = f"it is nested deeper than {MAX_DEPTH} levels"
    raise Corrupt(what=what, reason=reason, **({"digest": digest} if digest else {})) from None


def _depth_is_sane(document: Any) -> bool:
    """Level by level: whatever walks it by recursion might not come back."""
    level = [document]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += [value for value in item.values() if isinstance(value, (dict, list))]
            elif isinstance(item, list):
                below += [value for value in item if isinstance(value, (dict, list))]
        if not below:
            return True
        level = below
    return False
