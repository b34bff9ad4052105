"""Long input in windows of bounded size, whose borders depend on the bytes alone and never on how they arrived."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from mothball.redact import files, inside, judge
from mothball.redact.engine import BLOCK, OVERLAP
from mothball.redact.patterns import compiled

if TYPE_CHECKING:
    from mothball.redact.engine import Redactor
    from mothball.redact.rescan import Rescan
    from mothball.redact.scan import Span

_ROUNDS = 5
_LINE_BACK = 64 * 1024


def redacted(redactor: Redactor, pieces: Iterable[bytes], name: bytes) -> Iterator[bytes]:
    """The pieces without their secrets; see `Redactor.stream`."""
    buffer = bytearray()
    order: str | None = None
    begun = False
    level, form = files.judged_as(name)
    for piece in pieces:
        buffer += piece
        if not begun and len(buffer) >= 4:  # noqa: PLR2004 - the mark of UTF-16, or of UTF-32
            order, begun = files.utf16(bytes(buffer[:4])), True
        width = 1 if order is None else 2
        while begun and len(buffer) >= width * (BLOCK + OVERLAP):
            window = bytes(buffer[: width * (BLOCK + OVERLAP)])
            out, used = _window(redactor, window, order, level, form=form, last=False)
            del buffer[:used]
            yield out
    order = files.utf16(bytes(buffer[:4])) if not begun else order
    if buffer:
        out, _ = _window(redactor, bytes(buffer), order, level, form=form, last=True)
        yield out


def _window(redactor: Redactor, window: bytes, order: str | None, level: int, *, form: str, last: bool) -> tuple[bytes, int]:
    """What the window's own bytes become, and how many of them were used up."""
    view = window if order is None else files.narrow(window, order)
    spans = redactor.spans(view, 0, len(view), level, form=form)
    cut = len(view) if last else _cut(redactor, view, spans)
    spans = [span for span in spans if span.end <= cut]
    width = 1 if order is None else 2
    used = len(window) if last else cut * width
    if not spans:
        return window[:used], used
    if order is None:
        out = redactor.replace(view, spans, 0, cut)
        for _ in range(_ROUNDS):
            spans = redactor.spans(out, 0, len(out), level, form=form)
            if not spans:
                break
            out = redactor.replace(out, spans, 0, len(out))
        return out, used
    return _replace_wide(redactor, window[:used], view, spans, order), used


def _replace_wide(redactor: Redactor, window: bytes, view: bytes, spans: list[Span], order: str) -> bytes:
    out: list[bytes] = []
    at = 0
    for span in spans:
        hidden = redactor.replace(view, [span], span.start, span.end)
        out += (window[at : 2 * span.start], files.widen(hidden, order))
        at = 2 * span.end
    return b"".join([*out, window[at:]])


def line_cut(view: bytes, place: int) -> int:
    """Behind the last line that ends before `place`, or `place` when that is far."""
    line = view.rfind(b"\n", max(0, place - _LINE_BACK), place)
    return line + 1 if line >= 0 else place


def _cut(redactor: Redactor, view: bytes, spans: list[Span]) -> int:
    """Where the window ends: behind a line if there is one, and never within a secret or a pseudonym."""
    cut = redactor.behind_pseudonym(view, line_cut(view, BLOCK))
    for span in spans:
        if span.start < cut < span.end:
            cut = span.end
    return cut


_TEXT = re.compile(rb"(?:[ -~]|[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3})+")
_SOURCE = re.compile(rb"[a-z_]{0,16}(?:/[0-9a-z_.-]{1,64}){2,16}\.(?:rs|cc?|cpp|h|go|hs|zig)(?![0-9a-z_])")
_WIDE = rb"(?:[\t\r\n -~]\x00){8,}|(?:[\t\r\n -~]\x00\x00\x00){8,}"


def wide_runs(data: bytes, lo: int, hi: int) -> Iterator[tuple[int, bytes]]:
    """Runs of UTF-16 or UTF-32 in binary content: where each begins, and its text in one byte a character."""
    for run in compiled(_WIDE, spans_only=True).finditer(data, lo, hi):
        start, end = run.span()
        yield start, data[start:end].replace(b"\0", b"")


class _Watch:
    """Bytes in pieces, and the rules that fire in them."""

    def __init__(self, redactor: Redactor, *, inflated: bool) -> None:
        """Of `inflated` documents those that are text are judged as text; the bytes of a binary file are judged as its strings."""
        self._redactor = redactor
        self._inflated = inflated
        self._quiet = True
        self._tar: Rescan | None = None
        self._begun = False
        self._buffer = bytearray()
        self.rules: set[str] = set()

    def feed(self, piece: bytes) -> None:
        if self._tar is not None:
            self._tar.feed(piece)
            return
        self._buffer += piece
        if not self._begun and len(self._buffer) >= files.HEAD:
            self._begin()
        while len(self._buffer) >= BLOCK + OVERLAP:
            self._look(bytes(self._buffer[: BLOCK + OVERLAP]))
            del self._buffer[:BLOCK]

    def end(self) -> None:
        """Nothing follows, or something that has nothing to do with it."""
        if not self._begun and self._buffer:
            self._begin()
        if self._buffer:
            self._look(bytes(self._buffer))
        if self._tar is not None:
            self.rules |= {found.rule for found in self._tar.finish()}
        self._buffer.clear()
        self._tar, self._begun = None, False

    def _begin(self) -> None:
        from mothball.redact.rescan import Rescan, is_header

        self._begun = True
        head = bytes(self._buffer[: files.HEAD])
        if is_header(head[:512]):
            # Member by member: the same file would be judged as text when it lay beside the archive.
            self._tar = Rescan(self._redactor, self._redactor.known_values())
            self._tar.feed(bytes(self._buffer))
            self._buffer.clear()
        # A git object begins with its kind, its size and a NUL.
        content = head.partition(b"\0")[2] if head.startswith(_GIT_KINDS) else head
        self._quiet = not self._inflated or 0 in content

    def _look(self, data: bytes) -> None:
        spans = self._redactor.spans(data, 0, len(data), files.CODE)
        self.rules |= {span.rule for span in spans if not self._quiet or loud_enough(span, data)}
        if self._quiet:
            for _, text in wide_runs(data, 0, len(data)):
                wide = self._redactor.spans(text, 0, len(text), files.CODE)
                self.rules |= {span.rule for span in wide if loud_enough(span, text)}


_GIT_KINDS = (b"blob ", b"commit ", b"tag ", b"tree ")


def fired(redactor: Redactor, pieces: Iterable[bytes]) -> set[str]:
    """The rules that fire in binary content; see `Redactor.binary`."""
    raw, inner = _Watch(redactor, inflated=False), _Watch(redactor, inflated=True)
    source = inside.Source(pieces, raw.feed)
    try:
        for piece in inside.contents(source):
            if piece is None:
                inner.end()
            else:
                inner.feed(piece)
    except inside.Unread:
        inner.rules.add(inside.UNREAD)
    source.drain()
    raw.end()
    inner.end()
    return raw.rules | inner.rules


def loud_enough(span: Span, data: bytes) -> bool:
    """In binary content, where strings are many, what stands beside a telling name must look made by a machine, and what stands in
    a URL must be text: among random bytes there is ``://`` with a colon and an at sign behind it now and then.

    Beside a name only the text that the value begins with is judged: among random bytes ``pw=`` stands in every few megabytes,
    before anything. And compilers put the texts of a program one behind the other without a gap: of such a run, which has the path
    of a source file in it, only what stands before that is judged.
    """
    if span.rule == "url":
        return _TEXT.fullmatch(data, span.start, span.end) is not None
    if span.rule not in ("password", "secret"):
        return True
    text = _TEXT.match(data, span.start, span.end)
    value = text[0] if text is not None else b""
    source = _SOURCE.search(value)
    return judge.is_strong(value if source is None else value[: source.start()])
