"""What is looked for: the built-in rules and an operator's own, from a TOML file.

::

    [[rule]]
    name = "acme-key"                    # lower case, digits, '-'
    pattern = 'acme_([0-9a-f]{32})'      # RE2 syntax: no look-around, no back references
    group = 1                            # what is the secret; default: the whole match
    keywords = ["acme_"]                 # optional: where none of these stands, the pattern is not tried

    [allow]
    values = ["example-key-of-our-docs"] # never a secret, whatever rule finds them
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mothball.errors import ConfigError

NAME = re.compile(r"[a-z][a-z0-9-]{0,31}\Z")
MOST_RULES = 200
MOST_PATTERN = 2000
MOST_BYTES = 256 * 1024
_RULE_FIELDS = {"name", "pattern", "group", "keywords"}


@dataclass(frozen=True)
class Rule:
    """One kind of secret.

    A built-in rule begins at one of its `keywords` (bytes as they stand in the text); an operator's `pattern` may begin anywhere,
    and its keywords only say where to try. `group` of the match is the secret; `check` may refuse what was matched.
    """

    name: str
    pattern: bytes
    keywords: tuple[bytes, ...] = ()
    group: int | str = 0
    check: Callable[[bytes], bool] | None = None


@dataclass(frozen=True)
class Rules:
    """Built-in and own rules, and the values that are never secrets. `digest` names the set: same digest, same findings."""

    builtin: tuple[Rule, ...]
    own: tuple[Rule, ...]
    allow: frozenset[bytes]
    digest: str

    @property
    def names(self) -> list[str]:
        """The names of all rules, those of telling names and known values included, sorted."""
        from mothball.redact.builtin import OTHER_NAMES

        return sorted({rule.name for rule in (*self.builtin, *self.own)} | set(OTHER_NAMES))

    @staticmethod
    def default() -> Rules:
        """The built-in rules only."""
        return _default()

    @staticmethod
    def load(path: str) -> Rules:
        """The built-in rules and those of the TOML file `path`; raises `ConfigError` naming file, rule and reason."""
        try:
            with Path(path).expanduser().open("rb") as file:
                content = file.read(MOST_BYTES + 1)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ConfigError(reason=f"redaction rules {path}: cannot be read: {reason}") from None
        return _parse(path, content)


@lru_cache(maxsize=1)
def _default() -> Rules:
    from mothball.redact.builtin import RULES, VERSION

    return Rules(builtin=RULES, own=(), allow=frozenset(), digest=f"builtin-{VERSION}")


@lru_cache(maxsize=8)
def _parse(path: str, content: bytes) -> Rules:
    def wrong(reason: str) -> ConfigError:
        return ConfigError(reason=f"redaction rules {path}: {reason}")

    if len(content) > MOST_BYTES:
        raise wrong(f"is larger than {MOST_BYTES} bytes")
    try:
        document = tomllib.loads(content.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise wrong(f"is no TOML: {error}") from None
    if unknown := sorted(set(document) - {"rule", "allow"}):
        raise wrong(f"unknown section {', '.join(unknown)}; known are [[rule]] and [allow]")
    entries = document.get("rule", [])
    if not isinstance(entries, list) or len(entries) > MOST_RULES:
        raise wrong(f"rules are written as [[rule]], at most {MOST_RULES} of them")
    default = _default()
    taken = set(default.names)
    own: list[Rule] = []
    for number, entry in enumerate(entries, 1):
        try:
            rule = _rule(entry)
        except ValueError as error:
            label = entry.get("name") if isinstance(entry, dict) else None
            raise wrong(f"rule {label if isinstance(label, str) else number!r}: {error}") from None
        if rule.name in taken:
            raise wrong(f"rule {rule.name!r}: the name is taken, by a built-in rule or by one above it")
        taken.add(rule.name)
        own.append(rule)
    return Rules(
        builtin=default.builtin, own=tuple(own), allow=_allowed(document.get("allow", {}), wrong),
        digest=f"{default.digest}+{hashlib.sha256(content).hexdigest()[:12]}",
    )  # fmt: skip


def _rule(entry: Any) -> Rule:
    if not isinstance(entry, dict):
        raise ValueError("is no table")
    if unknown := sorted(set(entry) - _RULE_FIELDS):
        raise ValueError(f"unknown field {', '.join(unknown)}; known are {', '.join(sorted(_RULE_FIELDS))}")
    name, pattern, group, keywords = (entry.get(field) for field in ("name", "pattern", "group", "keywords"))
    if not isinstance(name, str) or not NAME.match(name):
        raise ValueError("name has 1-32 lower-case letters, digits and '-', beginning with a letter")
    if not isinstance(pattern, str) or not 0 < len(pattern) <= MOST_PATTERN:
        raise ValueError(f"pattern is a text of 1-{MOST_PATTERN} characters")
    keywords = [] if keywords is None else keywords
    if not isinstance(keywords, list) or not all(isinstance(word, str) and word for word in keywords):
        raise ValueError("keywords is a list of texts")
    return Rule(name, pattern.encode(), tuple(word.encode() for word in keywords), _group(pattern, group))


def _group(pattern: str, group: Any) -> int | str:
    from mothball.redact.patterns import compiled, error_of

    if reason := error_of(pattern.encode()):
        raise ValueError(f"pattern is no RE2 pattern: {reason}")
    found = compiled(pattern.encode())
    if found.search(b"") is not None:
        raise ValueError("pattern matches the empty text, so it would match everywhere")
    if group is None:
        return 0
    if isinstance(group, bool) or not isinstance(group, (int, str)):
        raise ValueError("group is the number or the name of a group of the pattern")
    names = {name.decode() if isinstance(name, bytes) else name: index for name, index in found.groupindex.items()}
    if isinstance(group, str):
        if group not in names:
            raise ValueError(f"the pattern has no group named {group!r}")
        return int(names[group])
    if not 0 <= group <= found.groups:
        raise ValueError(f"the pattern has no group {group}")
    return group


def _allowed(section: Any, wrong: Callable[[str], ConfigError]) -> frozenset[bytes]:
    values = section.get("values", []) if isinstance(section, dict) else None
    if values is None or set(section) - {"values"} or not isinstance(values, list):
        raise wrong("[allow] has one field: values, a list of texts")
    if not all(isinstance(value, str) and value for value in values):
        raise wrong("[allow] values: each is a text that is not empty")
    return frozenset(value.encode() for value in values)
