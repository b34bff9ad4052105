"""One pattern of an ignore file as a regular expression that cannot be made slow (git's ``wildmatch``, over bytes).

The patterns come from whoever owns the workspace. A plain translation (``*`` to ``[^/]*``) backtracks exponentially:
``*a*a*a*a*a*b`` against one name of 120 letters takes seconds, so one line could hold a worker for its whole time limit. Here
every ``*`` but the last of a segment, and every ``**`` but the last, is an atomic group that takes the leftmost match and
never comes back; for globs the leftmost match is always good enough.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

SPECIAL = frozenset(b"*?[\\")
_SLASH = 0x2F


class BrokenPattern(ValueError):
    """A pattern that git can never match; the text says why."""


def compile_glob(pattern: bytes, *, path: bool) -> re.Pattern[bytes]:
    """The expression whose ``fullmatch`` answers as git does.

    `path`: the pattern has a slash and is matched against a path below its ignore file; else against a base name.
    Raises `BrokenPattern`.
    """
    literal = _literal_prefix(pattern) if path else 0
    chunks: list[tuple[bytes, list[list[bytes]]]] = [(b"", [[]])]
    # A chunk is what stands between two `**`: a star kind in front of it, then pieces of fixed length between its `*`.
    for kind, value in _tokens(pattern, literal, path):
        if kind == "char":
            chunks[-1][1][-1].append(value)
        elif kind == "star":
            chunks[-1][1].append([])
        else:
            chunks.append((value, [[]]))
    out = [b"(?s:"]
    for number, (lead, pieces) in enumerate(chunks):
        body = lead + _chunk(pieces)
        out.append(body if number in {0, len(chunks) - 1} else b"(?>" + body + b")")
    return re.compile(b"".join([*out, b")"]))


def _literal_prefix(pattern: bytes) -> int:
    """How many bytes git compares literally before it looks for wildcards; a ``**`` right there counts as one of its own."""
    return next((place for place, char in enumerate(pattern) if char in SPECIAL), len(pattern))


_DIRS = rb"(?:.*?/)??"
_ANYTHING = rb".*?"
_STAR = rb"[^/]*"


def _tokens(pattern: bytes, literal: int, path: bool) -> Iterator[tuple[str, bytes]]:
    place, end = 0, len(pattern)
    while place < end:
        char = pattern[place]
        if char == ord("*"):
            stop = place
            while stop < end and pattern[stop] == ord("*"):
                stop += 1
            after = pattern[stop : stop + 2]
            bounded = place == literal or pattern[place - 1] == _SLASH
            if path and stop - place > 1 and bounded and after[:1] == b"/":
                yield "any", _DIRS
                stop += 1
            elif path and stop - place > 1 and bounded and after in {b"", b"\\/"}:
                yield "any", _ANYTHING
            else:
                yield "star", b""
            place = stop
        elif char == ord("?"):
            yield "char", b"[^/]"
            place += 1
        elif char == ord("["):
            value, place = _bracket(pattern, place + 1)
            yield "char", value
        else:
            if char == ord("\\"):
                place += 1
                if place == end:
                    raise BrokenPattern("a backslash at the end")
            yield "char", re.escape(pattern[place : place + 1])
            place += 1


def _chunk(pieces: list[list[bytes]]) -> bytes:
    """Pieces between ``*``: each but the last star of a segment is atomic. A slash in a piece ends the segment."""
    slash = re.escape(b"/")
    out = [b"".join(pieces[0])]
    for number, piece in enumerate(pieces[1:], 1):
        text = b"".join(piece)
        last_of_segment = number == len(pieces) - 1 or slash in piece
        out.append(_STAR + text if last_of_segment else b"(?>[^/]*?" + text + b")")
    return b"".join(out)


def _bracket(pattern: bytes, place: int) -> tuple[bytes, int]:
    """The class that begins after ``[`` at `place`, and the place behind it; the steps are those of git's wildmatch."""
    negated = pattern[place : place + 1] in {b"!", b"^"} and place < len(pattern)
    place += negated
    chosen: set[int] = set()
    previous = 0
    first = True
    while first or pattern[place : place + 1] != b"]":
        first = False
        char = _at(pattern, place)
        if char == ord("\\"):
            place += 1
            char = _at(pattern, place)
            chosen.add(char)
        elif char == ord("-") and previous and place + 1 < len(pattern) and pattern[place + 1] != ord("]"):
            place += 1
            char = _at(pattern, place)
            if char == ord("\\"):
                place += 1
                char = _at(pattern, place)
            chosen.update(range(previous, char + 1))
            char = 0
        elif char == ord("[") and pattern[place + 1 : place + 2] == b":":
            close = pattern.find(b"]", place + 2)
            if close < 0:
                raise BrokenPattern("a '[' without its ']'")
            if close - place - 3 >= 0 and pattern[close - 1] == ord(":"):
                name = pattern[place + 2 : close - 1]
                if name not in _CLASSES:
                    raise BrokenPattern(f"there is no class [:{name.decode('ascii', 'replace')}:]")
                chosen |= _CLASSES[name]
                place, char = close, 0
            else:
                chosen.add(char)
        else:
            chosen.add(char)
        previous = char
        place += 1
    values = (set(range(256)) - chosen if negated else chosen) - {_SLASH}
    if not values:
        return b"(?!)", place + 1
    return b"[" + b"".join(b"\\x%02x" % value for value in sorted(values)) + b"]", place + 1


def _at(pattern: bytes, place: int) -> int:
    if place >= len(pattern):
        raise BrokenPattern("a '[' without its ']'")
    return pattern[place]


def _ascii(expression: bytes) -> frozenset[int]:
    return frozenset(value for value in range(128) if re.fullmatch(expression, bytes([value]), re.DOTALL))


_CLASSES = {
    b"alnum": _ascii(rb"[0-9A-Za-z]"),
    b"alpha": _ascii(rb"[A-Za-z]"),
    b"blank": _ascii(rb"[ \t]"),
    b"cntrl": _ascii(rb"[\x00-\x1f\x7f]"),
    b"digit": _ascii(rb"[0-9]"),
    b"graph": _ascii(rb"[\x21-\x7e]"),
    b"lower": _ascii(rb"[a-z]"),
    b"print": _ascii(rb"[\x20-\x7e]"),
    b"punct": _ascii(rb"[!-/:-@\[-`{-~]"),
    b"space": _ascii(rb"[ \t\n\r]"),
    b"upper": _ascii(rb"[A-Z]"),
    b"xdigit": _ascii(rb"[0-9A-Fa-f]"),
}
