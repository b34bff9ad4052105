"""Text of somebody else's making, as a crash report keeps it: no control character that reaches a terminal, not too long.

Everything is linear in the text. What is cut is cut between lines, and never within a private key: half a secret is no shape
that a redaction rule would know.
"""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec

HEAD_BYTES: Final = 16 * 1024
TAIL_BYTES: Final = 48 * 1024
ERROR_BYTES: Final = HEAD_BYTES + TAIL_BYTES
"""Longest error text of a report, bytes; of a longer one the head (what went wrong first) and the tail (the cause) are kept."""
TITLE_CHARACTERS: Final = 200
_NOTE: Final = 64
_LINE_LOOK: Final = 4096
"""How far a cut moves to the end of a line; without one so far, that much is given up."""

# grep and compilers colour within a word: a colour that stays would split a secret in two that no rule finds.
_COLOUR = re.compile(r"(?:\x1b\[|\x9b)[0-9;:]{0,64}[mK]")
# The closing bracket keeps the next word a word of its own: `\b` in a rule must find it.
_SEQUENCE = re.compile(r"(?:\x1b\[|\x9b)([0-9:;<=>?]{0,64}[ -/]{0,8}[@-~])")
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e0fff]"
)
_KEY_BEGIN = re.compile(r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY")
_KEY_END = re.compile(r"-----END [A-Z0-9 ]{0,40}PRIVATE KEY[A-Z ]{0,10}-----|-----END PGP PRIVATE KEY BLOCK-----")
_BYTE_FIRST, _BYTE_LAST = 0xDC80, 0xDCFF
_LATIN = 0x100


class Clipped(msgspec.Struct, frozen=True):
    """A text of bounded length. `bytes` is the size of the whole one, UTF-8; `truncated` says that some of it is missing."""

    text: str
    truncated: bool
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        """In JSON types."""
        return msgspec.structs.asdict(self)


def clean(text: str) -> str:
    """`text` with nothing in it that a terminal obeys: colours go, other sequences and controls show as ``<ESC[2J>``, ``<0x07>``.

    Newlines and tabs stay; CR and CR LF become a newline. Halves of characters and marks that turn the direction of writing show
    as ``<U+202E>``, bytes that are no UTF-8 (lone surrogates of `os.fsdecode`) as ``<0xff>``. Clean text stays as it is.
    """
    if text.isascii() and text.replace("\n", "").isprintable():
        return text
    text = _COLOUR.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    return _CONTROL.sub(_shown, _SEQUENCE.sub(r"<ESC[\1>", text))


def one_line(text: str, limit: int = TITLE_CHARACTERS) -> str:
    """`text` as one clean line of at most `limit` characters."""
    # Whoever sends a title of ten megabytes gets the beginning of it.
    line = " ".join(clean(text[: limit * 16]).split())
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"


def clip(text: str, limit: int = ERROR_BYTES) -> Clipped:
    """`text`, clean; of one over `limit` bytes the first quarter and the last three, with a line between that says so.

    The cuts lie between lines where there are any, and no key block is cut so that the rest of it would stand alone.
    """
    size = len(text.encode("utf-8", "surrogatepass"))
    if len(text) > 8 * limit:
        # Of megabytes only what may be kept is cleaned, with room for what cleaning takes away.
        first, last = clean(text[: 2 * limit]), clean(text[-2 * limit :])
    else:
        first = last = clean(text)
        if len(first.encode()) <= limit:
            return Clipped(first, truncated=False, bytes=size)
    room = max(limit - _NOTE, 0)  # with the note it must not be too long again for the next one who clips
    head = line_end(first.encode()[: room // 4].decode("utf-8", "ignore"))
    tail = line_start(_last(last.encode(), room - room // 4).decode("utf-8", "ignore"))
    left_out = max(size - len(head.encode()) - len(tail.encode()), 1)
    return Clipped(f"{head}\n[... {left_out} bytes left out ...]\n{tail}", truncated=True, bytes=size)


def _last(data: bytes, count: int) -> bytes:
    return data[len(data) - count :] if count else b""


def line_start(text: str) -> str:
    """The end of a longer text, without its first line, of which the beginning is missing, and without the rest of a key."""
    cut = text.find("\n", 0, _LINE_LOOK)
    text = text[cut + 1 :] if cut >= 0 else text[_LINE_LOOK:]
    begin, end = _KEY_BEGIN.search(text), _KEY_END.search(text)
    if end is not None and (begin is None or begin.start() > end.start()):
        return text[end.end() :].removeprefix("\n")
    return text


def line_end(text: str) -> str:
    """The beginning of a longer text, without its last line, of which the end is missing."""
    cut = text.rfind("\n", max(len(text) - _LINE_LOOK, 0))
    return text[:cut] if cut >= 0 else text[: max(len(text) - _LINE_LOOK, 0)]


def _shown(match: re.Match[str]) -> str:
    number = ord(match[0])
    if number == 0x1B:  # noqa: PLR2004 - ESC
        return "<ESC>"
    if _BYTE_FIRST <= number <= _BYTE_LAST:
        return f"<0x{number - 0xDC00:02x}>"
    return f"<0x{number:02x}>" if number < _LATIN else f"<U+{number:04X}>"
