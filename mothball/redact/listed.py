"""Telling names whose value is a list or an object: ``"passwords": ["a", "b"]``, ``"db_password": {"value": "a"}``."""

from __future__ import annotations

import re
from collections.abc import Iterator

from mothball.redact import judge

_ITEM = re.compile(rb"""[ \t\r\n]{0,200}(?:\\{0,3})(["'])([^"'\\\r\n\x00]{1,512})(?:\\{0,3})\1[ \t\r\n]{0,200}(,?)""")
_OPEN = re.compile(rb"""[ \t]{0,16}\[""")
_OBJECT = re.compile(
    rb"""[ \t]{0,16}\{\s{0,200}["']?(?:value|default|plaintext|current)["']?\s{0,16}[:=]>?\s{0,16}["']([^"'\r\n\x00]{1,512})["']"""
)
_MOST = 1000


def listed(data: bytes, at: int, hi: int, name: bytes, level: int) -> Iterator[tuple[int, int, str]]:
    """(start, end, rule) of the secrets in the list or the object that begins at `at`, beside the telling `name`."""
    if judge.says_not(name):
        return
    rule = "password" if judge.is_password(name) else "secret"
    found = _OBJECT.match(data, at, min(hi, at + 1024))
    if found is not None:
        if judge.is_secret(name, found[1], quoted=True, tight=True, level=level):
            yield *found.span(1), rule
        return
    opened = _OPEN.match(data, at, hi)
    if opened is None:
        return
    at = opened.end()
    for _ in range(_MOST):
        item = _ITEM.match(data, at, min(hi, at + 1024))
        if item is None:
            return
        # A list beside `tokens` may as well be one of names: each must look like a secret by itself.
        if judge.is_secret(name, item[2], quoted=True, tight=True, level=level) and (judge.no_name(item[2]) or rule == "password"):
            yield *item.span(2), rule
        at = item.end()
        if not item[3]:
            return
