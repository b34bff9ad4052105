"""The last look: the finished bytes once more, with the same rules and with every secret that was found on the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mothball.redact.known import Known
from mothball.redact.windows import binary_spans

if TYPE_CHECKING:
    from mothball.redact.engine import Redactor

BLOCK = 4 * 1024 * 1024
OVERLAP = 128 * 1024


@dataclass(frozen=True)
class Finding:
    """A secret that is still there: which rule says so, and where in the finished bytes. Never the secret itself."""

    rule: str
    offset: int


class Rescan:
    """Feed it the finished bytes in pieces of any size; an empty list at the end says that nothing was found."""

    def __init__(self, redactor: Redactor) -> None:
        self._redactor = redactor
        self._known = Known(redactor.values)
        self._buffer = bytearray()
        self._offset = 0
        self._findings: dict[tuple[str, int], Finding] = {}

    def feed(self, data: bytes) -> None:
        """The next bytes."""
        self._buffer += data
        while len(self._buffer) >= BLOCK + OVERLAP:
            self._look()
            del self._buffer[:BLOCK]
            self._offset += BLOCK

    def finish(self) -> list[Finding]:
        """What was found, by place."""
        self._look()
        self._buffer.clear()
        return sorted(self._findings.values(), key=lambda found: (found.offset, found.rule))

    def _look(self) -> None:
        window = bytes(self._buffer)
        found = [(span.rule, span.start) for span in binary_spans(self._redactor, window, 0, len(window))]
        found += [("known", start) for start, _ in self._known.spans(window, 0, len(window))]
        for rule, start in found:
            self._findings[rule, self._offset + start] = Finding(rule, self._offset + start)
