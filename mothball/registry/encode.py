"""How arguments and small documents are written into the registry.

A document is opaque JSON text for the scripts. Only the arguments of a job in a lane are also given in parts, which
submit.lua joins without decoding a value: file names are bytes, and a JSON library in between may not keep them.
"""

from __future__ import annotations

import json
from typing import Any

from mothball.errors import InvalidParams

MAX_ARGS_BYTES = 256 * 1024
MAX_DOCUMENT_BYTES = 64 * 1024
MAX_OUTCOME_BYTES = 256 * 1024
MAX_NESTING = 32
_MAX_EXACT = 2**53


def dumps(value: object, what: str, limit: int) -> str:
    """`value` as compact JSON of at most `limit` bytes and 32 levels; raises `InvalidParams` naming `what`.

    Whoever reads it may be deep in a stack of its own: what can be written must be readable anywhere.
    Text that came from a file name which is not UTF-8 keeps its bytes.
    """
    if _deeper(value, MAX_NESTING):
        raise InvalidParams(f"{what} must be nested at most {MAX_NESTING} levels deep")
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        size = len(text.encode("utf-8", "surrogateescape"))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidParams(f"{what} must be JSON: {str(error)[:200]}") from None
    if size > limit:
        raise InvalidParams(f"{what}: {size} bytes of JSON, at most {limit} are allowed")
    return text


def _deeper(value: object, levels: int) -> bool:
    if isinstance(value, dict):
        return levels == 0 or any(_deeper(each, levels - 1) for each in value.values())
    if isinstance(value, (list, tuple)):
        return levels == 0 or any(_deeper(each, levels - 1) for each in value)
    return False


def arguments(args: object) -> str:
    """The arguments of a job as JSON text, at most 256 KiB (design, section 8)."""
    if not isinstance(args, dict) or not all(isinstance(name, str) for name in args):
        raise InvalidParams("a job's arguments must be a mapping of names")
    return dumps(args, "a job's arguments", MAX_ARGS_BYTES)


def lane_arguments(args: dict[str, Any]) -> tuple[str, str]:
    """The arguments of a job in a lane: as JSON text with sorted keys and lists, and in the parts of submit.lua (Q-31)."""
    arguments(args)
    parts: list[tuple[str, str, str | list[str]]] = []
    for name, value in args.items():
        if isinstance(value, (list, tuple)):
            items = {_text(item) for item in value}
            parts.append((_text(name), "l", sorted(items, key=_order)))
        else:
            parts.append((_text(name), _class_of(value), _text(_sorted(value))))
    parts.sort(key=lambda part: _order(part[0]))
    joined = ",".join(f"{name}:{'[' + ','.join(value) + ']' if isinstance(value, list) else value}" for name, _, value in parts)
    return "{" + joined + "}", _text(parts)


def _sorted(value: object) -> object:
    """`value` with the names of its mappings in one order, so that equal options have equal texts."""
    if isinstance(value, dict):
        return {name: _sorted(value[name]) for name in sorted(value, key=str)}
    return [_sorted(each) for each in value] if isinstance(value, (list, tuple)) else value


def _class_of(value: object) -> str:
    if value is None:
        return "n"
    if isinstance(value, bool):
        return "b"
    return "i" if isinstance(value, int) and abs(value) < _MAX_EXACT else "o"


def _text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _order(text: str) -> bytes:
    """Sort key: bytes without the closing quote, so that texts sort as their values do. submit.lua does the same."""
    return text.removesuffix('"').encode("utf-8", "surrogateescape")


def loads(text: str | None) -> Any:
    """A stored document; None for none."""
    return json.loads(text) if text else None
