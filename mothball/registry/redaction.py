"""The fleet's own key for the pseudonyms of secrets: made once, the same for every worker and producer."""

from __future__ import annotations

import secrets

from mothball.errors import OperationFailed
from mothball.registry import keys
from mothball.registry.connection import Connection
from mothball.settings import Settings

KEY_BYTES = 32


def fleet_key(connection: Connection, settings: Settings) -> bytes:
    """The 32 bytes; the first caller makes them, and of two first callers both get the winner's. Raises `Unavailable`."""
    name = keys.Keys(settings.namespace)("redaction", "key")
    with connection.guard() as client:
        found = client.get(name)
        if found is None:
            client.set(name, secrets.token_hex(KEY_BYTES), nx=True)
            found = client.get(name)
    try:
        key = bytes.fromhex(found or "")
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise OperationFailed(
            reason=f"{name} in the registry holds no key of {KEY_BYTES} bytes; delete it there (pseudonyms of later reports then "
            "differ from those of earlier ones), or set MOTHBALL_REDACTION_KEY"
        )
    return key
