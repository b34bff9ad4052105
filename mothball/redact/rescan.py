"""The last look: the finished bytes once more, with the same rules and with every secret that was found on the way.

A tar is recognised by its first header and looked at member by member: a file's end and the next one's header are no sentence, a
file's name says how strictly its values are judged, and a binary's strings are judged as `Redactor.binary` judges them. Whatever
cannot be read as a tar any more is looked at as plain bytes, never skipped.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mothball.redact import files, formats
from mothball.redact.engine import BLOCK, OVERLAP
from mothball.redact.known import Known
from mothball.redact.windows import line_cut, loud_enough, wide_runs

if TYPE_CHECKING:
    from mothball.redact.engine import Redactor
    from mothball.redact.scan import Span

_RECORD = 512
_NAME, _SIZE, _SUM, _TYPE, _PREFIX = slice(0, 100), slice(124, 136), slice(148, 156), slice(156, 157), slice(345, 500)
_EXTENDED = frozenset(b"xgLK")
_LARGEST_HEADER = 1024 * 1024


@dataclass(frozen=True)
class Finding:
    """A secret that is still there: which rule says so, and where in the finished bytes. Never the secret itself."""

    rule: str
    offset: int


@dataclass
class _Region:
    """Bytes that are looked at together, from `start` to `end` (absolute; None: to the very end)."""

    start: int
    end: int | None
    name: bytes = b""
    kind: str = "unknown"
    """``text``, ``little``, ``big`` (UTF-16), ``binary``, ``padding``, or ``unknown`` until its first bytes are there."""


class Rescan:
    """Feed it the finished bytes in pieces of any size; an empty list at the end says that nothing was found."""

    def __init__(self, redactor: Redactor, known: Known | None = None) -> None:
        """`known` are the values looked for beside the rules' own findings: by default all that `redactor` has found until now."""
        self._redactor = redactor
        self._known = Known(redactor.values) if known is None else known
        self._buffer = bytearray()
        self._offset = 0
        self._tar: bool | None = None
        self._next = 0
        """Where the next header stands (absolute), while it is a tar."""
        self._renamed: bytes | None = None
        self._resized: int | None = None
        self._regions: list[_Region] = []
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._findings: dict[tuple[str, int], Finding] = {}

    def feed(self, data: bytes) -> None:
        """The next bytes."""
        self._buffer += data
        while len(self._buffer) >= BLOCK + OVERLAP:
            self._look(last=False)

    def finish(self) -> list[Finding]:
        """What was found, by place."""
        while self._buffer:
            self._look(last=len(self._buffer) < BLOCK + OVERLAP)
        return sorted(self._findings.values(), key=lambda found: (found.offset, found.rule))

    # --- where members begin and end ----------------------------------------------------------------------------------------------

    def _look(self, *, last: bool) -> None:
        window = bytes(self._buffer[: BLOCK + OVERLAP])
        whole = self._offset + len(window)
        if self._tar is None:
            self._tar = is_header(window[:_RECORD])
            if not self._tar:
                self._regions.append(_Region(0, None))
        while self._tar and self._next + _RECORD <= whole:
            self._header(window, whole, last=last)
            if self._regions and self._regions[-1].kind == "waits":
                self._regions.pop()
                break
        if last and self._tar and self._next < whole:
            self._regions.append(_Region(self._next, None, kind="text"))
        cut = len(window) if last else self._cut(window)
        self._scan(window, cut, last=last)
        del self._buffer[:cut]
        self._offset += cut
        self._regions = [region for region in self._regions if region.end is None or region.end > self._offset]

    def _header(self, window: bytes, whole: int, *, last: bool) -> None:
        """Take the header at `_next`: its own bytes are a region, and so is the content behind it."""
        at = self._next - self._offset
        record = window[at : at + _RECORD]
        if not record.strip(b"\0"):
            self._next += _RECORD
            return
        size = _size(record) if is_header(record) else None
        if size is None:
            # No tar from here on: everything is looked at as it stands.
            self._tar = False
            self._regions.append(_Region(self._next, None, kind="text"))
            return
        kind = record[_TYPE]
        start = self._next + _RECORD
        extended = kind[0] in _EXTENDED
        if extended and start + min(size, _LARGEST_HEADER) > whole and not last:
            self._regions.append(_Region(0, 0, kind="waits"))
            return
        self._regions.append(_Region(self._next, start, kind="text"))
        name = record[_NAME].rstrip(b"\0")
        if extended:
            content = window[at + _RECORD : at + _RECORD + size]
            self._extended(kind, content)
            self._regions.append(_Region(start, start + size, kind="text"))
        else:
            size = size if self._resized is None else self._resized
            if kind not in b"0\x007":
                size = 0
            prefix = record[_PREFIX].rstrip(b"\0")
            name = self._renamed or (prefix + b"/" + name if prefix else name)
            self._regions.append(_Region(start, start + size, name))
            self._renamed = self._resized = None
        self._next = start + -(-size // _RECORD) * _RECORD
        if size % _RECORD:
            self._regions.append(_Region(start + size, self._next, kind="padding"))

    def _extended(self, kind: bytes, content: bytes) -> None:
        if kind == b"L":
            self._renamed = content.rstrip(b"\0")
        elif kind == b"x":
            at = 0
            while (space := content.find(b" ", at, at + 20)) > at and content[at:space].isdigit():
                end = at + int(content[at:space])
                name, _, value = content[space + 1 : end - 1].partition(b"=")
                if name == b"path":
                    self._renamed = value
                elif name == b"size" and value.isdigit():
                    self._resized = int(value)
                if end <= at:
                    break
                at = end

    def _cut(self, window: bytes) -> int:
        """Where this window's own bytes end: at a member's border, or behind a line of a long one, never within a pseudonym."""
        place = self._offset + BLOCK
        for region in self._regions:
            if region.start <= place and (region.end is None or region.end > place):
                line = line_cut(window, BLOCK)
                cut = max(line, region.start - self._offset)
                if region.kind in ("little", "big"):
                    cut -= (cut + self._offset - region.start) % 2
                return self._redactor.behind_pseudonym(window, cut) if cut > 0 else BLOCK
        return BLOCK

    # --- what stands in them ------------------------------------------------------------------------------------------------------

    def _scan(self, window: bytes, cut: int, *, last: bool) -> None:
        # One look at all members together; only those that it touches, or that need a stricter look, are looked at by themselves.
        at_once = self._redactor.spans(window, 0, len(window), files.CODE, known=self._known)
        self._starts, self._ends = [span.start for span in at_once], [span.end for span in at_once]
        for region in self._regions:
            lo = max(0, region.start - self._offset)
            hi = len(window) if region.end is None else min(len(window), region.end - self._offset)
            if lo >= hi or lo >= cut:
                continue
            if region.kind == "padding" and not window[lo:hi].strip(b"\0"):
                continue
            if region.kind == "unknown":
                head = window[lo : min(hi, lo + files.HEAD)]
                region.kind = files.utf16(head) or ("text" if files.is_text(head) else "binary")
            if region.kind in ("little", "big"):
                found = self._wide(window, lo, hi, region)
            else:
                found = self._plain(window, lo, hi, region)
            for rule, start in found:
                if start < cut or last:
                    self._findings[rule, self._offset + start] = Finding(rule, self._offset + start)

    def _clean(self, window: bytes, lo: int, hi: int, region: _Region) -> bool:
        """True when the look at the whole window says that this region holds nothing: NULs part it from what stands around it."""
        if (lo and window[lo - 1]) or (hi < len(window) and window[hi] and window[hi - 1]):
            return False
        first = bisect_right(self._ends, lo)
        return (first == len(self._starts) or self._starts[first] >= hi) and not formats.stricter(region.name, window, lo, hi)

    def _plain(self, window: bytes, lo: int, hi: int, region: _Region) -> list[tuple[str, int]]:
        spans = [] if self._clean(window, lo, hi, region) else self._spans(window, lo, hi, region)
        if region.kind == "binary":
            spans = [span for span in spans if loud_enough(span, window)]
            for start, text in wide_runs(window, lo, hi):
                inside = self._spans(text, 0, len(text), _Region(0, None))
                spans += [span._replace(start=start, end=start) for span in inside if loud_enough(span, text)]
        return [(span.rule, span.start) for span in spans]

    def _wide(self, window: bytes, lo: int, hi: int, region: _Region) -> list[tuple[str, int]]:
        view = files.narrow(window[lo:hi], region.kind)
        return [(span.rule, lo + 2 * span.start) for span in self._spans(view, 0, len(view), region)]

    def _spans(self, data: bytes, lo: int, hi: int, region: _Region) -> list[Span]:
        level, form = files.judged_as(region.name)
        return self._redactor.spans(data, lo, hi, level, form=form, known=self._known)


def is_header(record: bytes) -> bool:
    """True for 512 bytes whose checksum is that of a tar's header."""
    try:
        said = int(record[_SUM].strip(b" \0") or b"x", 8)
    except ValueError:
        return False
    return len(record) == _RECORD and said == sum(record) - sum(record[_SUM]) + 8 * 32


def _size(record: bytes) -> int | None:
    field = record[_SIZE]
    try:
        size = int.from_bytes(field[1:], "big") if field[0] == 0x80 else int(field.strip(b" \0") or b"0", 8)  # noqa: PLR2004
    except ValueError:
        return None
    return size if size >= 0 else None
