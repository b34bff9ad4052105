"""Time slots of sweeps: however many beats run, one sweep per slot."""

from __future__ import annotations

from mothball.errors import InvalidParams
from mothball.registry import keys
from mothball.registry.scripts import Scripts


class Slots:
    """Claims slots of Redis time; a beat that dies holds nothing, so there is no lock to lose."""

    def __init__(self, scripts: Scripts) -> None:
        self._scripts = scripts

    def claim(self, sweep: str, interval_ms: int) -> bool:
        """True for exactly one caller per `sweep` and slot of `interval_ms` ms."""
        if interval_ms <= 0:
            raise InvalidParams(f"interval_ms {interval_ms} must be above 0")
        return bool(self._scripts.run("slot", keys.word(sweep, "sweep"), interval_ms) == 1)
