"""Which key and which rules: the redactor of a fleet, and the keyless one for logs and error messages."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

from mothball.redact.engine import Redactor
from mothball.redact.rules import Rules

if TYPE_CHECKING:
    from pydantic import SecretStr


class _Settings(Protocol):
    @property
    def redaction_key(self) -> SecretStr: ...
    @property
    def redaction_rules(self) -> str: ...


class _Registry(Protocol):
    def redaction_key(self) -> bytes: ...


def redactor_for(settings: _Settings, registry: _Registry | None, known: Iterable[bytes] = ()) -> Redactor:
    """A redactor with the rules and the key that `settings` name, else with the key that the fleet shares in `registry`.

    Without both there is no key, and pseudonyms have no digits: they cannot be compared. `known` are values to find wherever they
    stand. Raises `ConfigError` for a wrong rules file, `Unavailable` when the key cannot be read.
    """
    rules = Rules.load(settings.redaction_rules) if settings.redaction_rules else Rules.default()
    key: bytes | None = settings.redaction_key.get_secret_value().encode() or None
    if key is None and registry is not None:
        key = registry.redaction_key()
    return Redactor(key, rules, known)


@lru_cache(maxsize=1)
def masker() -> Redactor:
    """The redactor behind `mask`: built-in rules, no key."""
    return Redactor(None, Rules.default())


def mask(text: str) -> str:
    """`text` for a log line or an error message: what the built-in rules find reads ``[redacted:<rule>]``. Never raises."""
    return masker().text(text)


def masked(value: Any) -> Any:
    """`value` (strings, lists, dicts) with every string in it masked, values of telling keys as a whole."""
    return masker().document(value)
