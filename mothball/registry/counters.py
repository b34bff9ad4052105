"""Fleet counters: written only inside the script that has the effect, so an effect counts exactly once."""

from __future__ import annotations

from mothball.registry import keys
from mothball.registry.connection import Connection
from mothball.settings import Settings


class Counters:
    """Reads the counters. There is no way to add to one from outside a script, and that is the point."""

    def __init__(self, connection: Connection, settings: Settings) -> None:
        self._connection = connection
        self._key = keys.Keys(settings.namespace)("counters")

    def all(self) -> dict[str, int]:
        """Every counter by name, sorted; one that never counted is missing."""
        with self._connection.guard() as client:
            return {name: int(value) for name, value in sorted(client.hgetall(self._key).items())}
